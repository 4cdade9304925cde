//! The head with a certified copy, in the place of a product of llama.cpp's graph.

use std::sync::{Mutex, PoisonError};

use ternion_core::{Error, ErrorKind, Result};
use ternion_engine::LogitsPrecision;
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
    /// A node that computes `head` with so many threads.
    ///
    /// # Errors
    /// Where they cannot be started.
    pub(crate) fn new(head: CertifiedHead, threads: usize) -> Result<Self> {
        let no_threads =
            |e| Error::new(ErrorKind::ResourceExhausted, "cannot start the threads").with_source(e);
        Ok(Self { head, team: Team::new(threads).map_err(no_threads)?, precision: Mutex::default() })
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
