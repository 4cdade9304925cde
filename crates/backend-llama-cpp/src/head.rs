//! The head with a certified copy, in the place of a product of llama.cpp's graph.

use std::sync::{Mutex, PoisonError};

use ternion_core::Result;
use ternion_engine::{ComputeThreads, LogitsPrecision};
use ternion_head::CertifiedHead;
use ternion_kernels::Team;

/// A head that one of ggml's threads computes, with a team of its own: to certify logits takes several passes over them, and a custom
/// operation of ggml has one.
pub(crate) struct HeadNode {
    head: CertifiedHead,
    team: Team,
    precision: Mutex<LogitsPrecision>,
}

impl HeadNode {
    /// A node that computes `head` with threads of its own.
    ///
    /// # Errors
    /// Where they cannot be started.
    pub(crate) fn new(head: CertifiedHead, threads: &ComputeThreads) -> Result<Self> {
        Ok(Self { head, team: threads.team()?, precision: Mutex::default() })
    }

    /// Rows and columns of the weights.
    pub(crate) fn shape(&self) -> [usize; 2] {
        self.head.weights().shape()
    }

    /// Sets how exact the logits of the next graphs must be.
    pub(crate) fn set_precision(&self, precision: LogitsPrecision) {
        *self.precision.lock().unwrap_or_else(PoisonError::into_inner) = precision;
    }

    /// Logits of hidden states, `[tokens, vocab_size]` of `[tokens, hidden]`.
    ///
    /// # Errors
    /// Where a row of the weights cannot be read.
    pub(crate) fn forward(&self, hidden: &[f32], logits: &mut [f32]) -> Result<()> {
        let precision = *self.precision.lock().unwrap_or_else(PoisonError::into_inner);
        let precision = vec![precision; hidden.len() / self.shape()[1]];
        self.team.install(|| self.head.forward(hidden, &precision, logits))
    }
}
