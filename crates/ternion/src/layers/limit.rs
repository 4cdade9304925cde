//! Lets a bounded number of requests through at a time.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use async_trait::async_trait;
use futures_core::Stream;
use ternion_core::{
    Error, ErrorKind, Event, GenerateRequest, GenerateStream, LlmBackend, LogitsRequest, ModelInfo, Result,
    ResultExt, Score, ScoreRequest, Stats, config::LimitConfig,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::{Layer, cancelled, forward, is_end};

/// Lets at most so many requests reach the backend at the same time. Further ones wait, first come first served; of
/// those that may not even wait, each fails with [`Busy`](ErrorKind::Busy).
///
/// A request has its place until its stream has ended or is dropped. `info()` and `stats()` tell of the waiting room.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    concurrent: usize,
    waiting: usize,
}

impl Limit {
    /// At most `concurrent` requests (at least 1) at the same time, while none waits.
    pub fn new(concurrent: usize) -> Self {
        Self { concurrent: concurrent.clamp(1, Semaphore::MAX_PERMITS), waiting: 0 }
    }

    /// So many requests may wait.
    pub fn with_waiting(mut self, waiting: usize) -> Self {
        self.waiting = waiting;
        self
    }
}

impl From<&LimitConfig> for Limit {
    fn from(config: &LimitConfig) -> Self {
        Self::new(config.concurrent).with_waiting(config.waiting)
    }
}

impl Layer for Limit {
    fn wrap(&self, inner: Arc<dyn LlmBackend>) -> Arc<dyn LlmBackend> {
        let places = Arc::new(Semaphore::new(self.concurrent));
        Arc::new(Limited { inner, limit: *self, places, waiting: AtomicUsize::new(0) })
    }
}

struct Limited {
    inner: Arc<dyn LlmBackend>,
    limit: Limit,
    places: Arc<Semaphore>,
    /// Requests that wait for a place.
    waiting: AtomicUsize,
}

/// One of those that wait, for as long as it does.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Limited {
    /// A place; `None` if the request was cancelled before there was one.
    async fn place(&self, cancel: &CancellationToken) -> Result<Option<OwnedSemaphorePermit>> {
        // Does not overtake those that wait: a place that becomes free is theirs at once.
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            return Ok(Some(place));
        }
        let most = self.limit.waiting;
        self.waiting
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < most).then_some(n + 1))
            .map_err(|_| {
                Error::new(ErrorKind::Busy, "all places are taken; try again later")
                    .with("concurrent", self.limit.concurrent)
                    .with("waiting", most)
            })?;
        let _waiting = Waiting(&self.waiting);
        tokio::select! {
            biased;
            () = cancel.cancelled() => Ok(None),
            place = Arc::clone(&self.places).acquire_owned() => place
                .map(Some)
                .map_err(|e| Error::new(ErrorKind::Closed, "no places are given any more").with_source(e)),
        }
    }
}

#[async_trait]
impl LlmBackend for Limited {
    forward!(inner: tokenizer unloaded);

    fn info(&self) -> Arc<ModelInfo> {
        let mut info = self.inner.info();
        let limits = &mut Arc::make_mut(&mut info).limits;
        let room = limits.max_sequences.saturating_add(limits.max_queued);
        // Where the backend itself takes fewer, it is the one that refuses, and nobody ever waits here.
        if self.limit.concurrent <= room {
            limits.max_sequences = limits.max_sequences.min(self.limit.concurrent);
            let accepted = self.limit.concurrent.saturating_add(self.limit.waiting);
            limits.max_queued = accepted - limits.max_sequences;
        }
        info
    }

    fn stats(&self) -> Stats {
        let mut stats = self.inner.stats();
        stats.queued = stats.queued.saturating_add(self.waiting.load(Ordering::Acquire));
        stats
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        let Some(place) = self.place(&request.cancel).await.during("generate")? else {
            return Ok(cancelled());
        };
        let stream = self.inner.generate(request).await?;
        Ok(GenerateStream::new(LimitedStream(Some((stream, place)))))
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        let place = self.place(&request.cancel).await.during("score")?;
        let _place = place.ok_or_else(|| given_up("score"))?;
        self.inner.score(request).await
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        let place = self.place(&request.cancel).await.during("logits")?;
        let _place = place.ok_or_else(|| given_up("logits"))?;
        self.inner.logits(request).await
    }
}

fn given_up(operation: &'static str) -> Error {
    Error::new(ErrorKind::Cancelled, "the request was cancelled").during(operation)
}

/// A stream with its place, until it ends. The stream goes first, so that the place is free when the work has ended.
struct LimitedStream(Option<(GenerateStream, OwnedSemaphorePermit)>);

impl Stream for LimitedStream {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some((stream, _)) = &mut self.0 else { return Poll::Ready(None) };
        let event = std::task::ready!(Pin::new(stream).poll_next(cx));
        if event.as_ref().is_none_or(is_end) {
            self.0 = None;
        }
        Poll::Ready(event)
    }
}
