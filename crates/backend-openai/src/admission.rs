//! Which requests are on their way to the server, and which wait for that: the limits that the host sets, kept on this side.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use ternion_core::{Error, ErrorKind, Limits, Result, Stats, Usage};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The places of one model.
#[derive(Debug)]
pub(crate) struct Admission {
    sequences: Arc<Semaphore>,
    max_sequences: usize,
    places: usize,
    /// Requests that hold a place, at work or waiting.
    held: AtomicUsize,
    active: AtomicUsize,
    finished: AtomicU64,
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    completion_tokens: AtomicU64,
}

impl Admission {
    pub(crate) fn new(limits: &Limits) -> Arc<Self> {
        let max_sequences = limits.max_sequences.clamp(1, Semaphore::MAX_PERMITS);
        Arc::new(Self {
            sequences: Arc::new(Semaphore::new(max_sequences)),
            max_sequences,
            places: max_sequences.saturating_add(limits.max_queued),
            held: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            finished: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            cached_tokens: AtomicU64::new(0),
            completion_tokens: AtomicU64::new(0),
        })
    }

    /// A place among those that are at work or wait.
    ///
    /// # Errors
    /// [`Busy`](ErrorKind::Busy) where there is none.
    pub(crate) fn place(self: &Arc<Self>) -> Result<Place> {
        let taken = self.held.fetch_update(Ordering::AcqRel, Ordering::Acquire, |held| {
            (held < self.places).then_some(held + 1)
        });
        match taken {
            Ok(_) => Ok(Place { admission: Arc::clone(self), permit: None }),
            Err(_) => Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "{} requests are at work and {} wait; try again later",
                    self.max_sequences,
                    self.places - self.max_sequences
                ),
            )),
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        stats.active = self.active.load(Ordering::Acquire);
        stats.queued = self.held.load(Ordering::Acquire).saturating_sub(stats.active);
        stats.finished = self.finished.load(Ordering::Relaxed);
        stats.prompt_tokens = self.prompt_tokens.load(Ordering::Relaxed);
        stats.cached_tokens = self.cached_tokens.load(Ordering::Relaxed);
        stats.completion_tokens = self.completion_tokens.load(Ordering::Relaxed);
        stats
    }
}

/// The place of one request, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    admission: Arc<Admission>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Place {
    /// Goes to work if that is possible at once.
    pub(crate) fn try_start(&mut self) -> bool {
        if self.permit.is_none()
            && let Ok(permit) = Arc::clone(&self.admission.sequences).try_acquire_owned()
        {
            self.started(permit);
        }
        self.permit.is_some()
    }

    /// Waits until it is this request's turn.
    pub(crate) async fn start(&mut self) {
        if self.permit.is_some() {
            return;
        }
        // The semaphore is never closed.
        if let Ok(permit) = Arc::clone(&self.admission.sequences).acquire_owned().await {
            self.started(permit);
        }
    }

    fn started(&mut self, permit: OwnedSemaphorePermit) {
        self.permit = Some(permit);
        self.admission.active.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts the tokens of an answer.
    pub(crate) fn count(&self, usage: &Usage) {
        let computed = usage.prompt_tokens.saturating_sub(usage.cached_tokens);
        self.admission.prompt_tokens.fetch_add(computed as u64, Ordering::Relaxed);
        self.admission.cached_tokens.fetch_add(usage.cached_tokens as u64, Ordering::Relaxed);
        self.admission.completion_tokens.fetch_add(usage.completion_tokens as u64, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.permit.is_some() {
            self.admission.active.fetch_sub(1, Ordering::AcqRel);
        }
        self.admission.finished.fetch_add(1, Ordering::Relaxed);
        self.admission.held.fetch_sub(1, Ordering::AcqRel);
    }
}
