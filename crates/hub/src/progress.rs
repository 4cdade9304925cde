//! How far a download is.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use ternion_core::registry::{LoadProgress, Progress};

/// Counts bytes over all files of a model and reports their sum. Clones count together.
#[derive(Clone)]
pub(crate) struct Counter {
    done: Arc<AtomicU64>,
    total: u64,
    progress: Progress,
}

impl Counter {
    pub(crate) fn new(total: u64, progress: &Progress) -> Self {
        let counter = Self { done: Arc::default(), total, progress: progress.clone() };
        counter.add(0);
        counter
    }

    /// Counts bytes that are there.
    pub(crate) fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.progress.report(LoadProgress::new("download", done.min(self.total), self.total));
    }

    /// Takes back bytes that have to be fetched again.
    pub(crate) fn take_back(&self, bytes: u64) {
        self.done.fetch_sub(bytes, Ordering::Relaxed);
    }
}
