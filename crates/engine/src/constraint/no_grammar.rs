//! Stands in for the grammars where the feature `constraints` is off.

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

    pub(crate) fn check_schema(_: &serde_json::Value) -> Result<()> {
        Ok(())
    }

    pub(crate) fn compile(&self, _: &Constraint) -> Result<Grammar> {
        Err(Error::unsupported(
            "constraint: this build has no constraints; switch the feature `constraints` on",
        ))
    }
}

/// A grammar, of which there is none.
#[derive(Clone)]
pub(crate) enum Grammar {}

impl Grammar {
    pub(crate) fn restrict(&mut self, _: &mut [f32]) -> Result<()> {
        match *self {}
    }

    pub(crate) fn push(&mut self, _: u32) -> Result<()> {
        match *self {}
    }

    pub(crate) fn allows(&mut self, _: u32) -> bool {
        match *self {}
    }

    pub(crate) fn forced(&mut self) -> Vec<u32> {
        match *self {}
    }

    pub(crate) fn can_end(&mut self) -> bool {
        match *self {}
    }

    pub(crate) fn must_end(&self) -> bool {
        match *self {}
    }

    pub(crate) fn tokens_beyond(&self, _: &str) -> Vec<u32> {
        match *self {}
    }

    pub(crate) fn line_breaks(&self) -> &[u32] {
        match *self {}
    }
}
