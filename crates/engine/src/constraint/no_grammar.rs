//! Stands in for the grammars where the feature `constraints` is off.
#![allow(clippy::unused_self, reason = "the methods are those of the grammars with the feature")]

use std::sync::Arc;

use ternion_core::{Constraint, Error, Result, text::Tokenizer};

/// Compiles nothing.
pub(crate) struct Grammars;

impl Grammars {
    pub(crate) fn new(_: Arc<Tokenizer>, _: usize, _: &[u32]) -> Self {
        Self
    }

    pub(crate) fn is_supported(_: &Tokenizer) -> bool {
        false
    }

    pub(crate) fn prepared(_: &serde_json::Value) -> Result<serde_json::Value> {
        Err(off())
    }

    pub(crate) fn compile(&self, _: &Constraint) -> Result<Grammar> {
        Err(off())
    }
}

/// A grammar, of which none is ever made. It allows nothing.
#[derive(Clone)]
pub(crate) struct Grammar(());

impl Grammar {
    pub(crate) fn restrict(&mut self, _: &mut [f32]) -> Result<()> {
        Err(off())
    }

    pub(crate) fn push(&mut self, _: u32) -> Result<()> {
        Err(off())
    }

    pub(crate) fn allows(&mut self, _: u32) -> bool {
        false
    }

    pub(crate) fn forced(&mut self) -> Vec<u32> {
        Vec::new()
    }

    pub(crate) fn can_end(&mut self) -> bool {
        false
    }

    pub(crate) fn must_end(&self) -> bool {
        false
    }

    pub(crate) fn tokens_beyond(&self, _: &str) -> Vec<u32> {
        Vec::new()
    }

    pub(crate) fn line_breaks(&self) -> &[u32] {
        &[]
    }
}

fn off() -> Error {
    Error::unsupported("constraint: this build has no constraints; switch the feature `constraints` on")
}
