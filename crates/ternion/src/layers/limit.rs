//! Lets a bounded number of requests through at a time.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use async_trait::async_trait;
use futures_core::Stream;
use ternion_core::{
    BackendWrapper, EmbedRequest, Embeddings, Error, ErrorKind, Event, GenerateRequest, GenerateStream,
    LlmBackend, LogitsRequest, ModelInfo, Result, ResultExt, Score, ScoreRequest, Stats, config::LimitConfig,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use super::{
    Layer, cancelled, is_end,
    permits::{Permit, PermitPool, Turn},
};

/// Lets at most so many requests reach the backend at the same time. Further ones wait, first come first served; of
/// those that may not even wait, each fails with [`Busy`](ErrorKind::Busy).
///
/// A request has its place until its stream has ended or is dropped, or it is cancelled. While others wait, a request whose
/// reader leaves its events unread for half a second loses its place, and gets another in turn when it is read again.
///
/// One that has to wait gets its stream at once, after the backend's own checks ([`LlmBackend::validate`]), so that it is
/// judged as one that does not have to wait; the stream begins when its turn has come. `info()` and `stats()` include
/// those that wait. Needs a tokio runtime with its timer enabled.
#[derive(Debug, Clone, Copy)]
pub struct ConcurrencyLimitLayer {
    concurrent: usize,
    waiting: usize,
}

impl ConcurrencyLimitLayer {
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

impl From<&LimitConfig> for ConcurrencyLimitLayer {
    fn from(config: &LimitConfig) -> Self {
        Self::new(config.concurrent).with_waiting(config.waiting)
    }
}

impl Layer for ConcurrencyLimitLayer {
    fn wrap(&self, inner: Arc<dyn LlmBackend>) -> Arc<dyn LlmBackend> {
        Arc::new(Limited { inner, limit: *self, pool: PermitPool::new(self.concurrent) })
    }
}

#[derive(Debug)]
struct Limited {
    inner: Arc<dyn LlmBackend>,
    limit: ConcurrencyLimitLayer,
    pool: Arc<PermitPool>,
}

/// A place, or one in the queue before it.
enum Admission {
    Granted(OwnedSemaphorePermit),
    Queued(Turn),
}

impl Limited {
    /// A place in the order in which this is called.
    async fn place(&self) -> Result<Admission> {
        if let Some(place) = self.pool.try_take() {
            return Ok(Admission::Granted(place));
        }
        let most = self.limit.waiting;
        let mut turn = self.pool.wait(most).ok_or_else(|| {
            Error::new(ErrorKind::Busy, "all places are taken; try again later")
                .with("concurrent", self.limit.concurrent)
                .with("waiting", most)
        })?;
        // The first poll is what enters it into the queue.
        match std::future::poll_fn(|cx| Poll::Ready(turn.as_mut().poll(cx))).await {
            Poll::Ready(place) => place.map(Admission::Granted),
            Poll::Pending => Ok(Admission::Queued(turn)),
        }
    }

    /// Waits for a place.
    async fn wait(&self, cancel: &CancellationToken) -> Result<OwnedSemaphorePermit> {
        match self.place().await? {
            Admission::Granted(place) => Ok(place),
            Admission::Queued(turn) => in_turn(turn, cancel).await?.ok_or_else(Error::cancelled),
        }
    }

    /// Starts a request that has its place.
    async fn run(&self, place: OwnedSemaphorePermit, request: GenerateRequest) -> Result<GenerateStream> {
        let place = Permit::new(&self.pool, place, request.cancel.clone());
        let stream = self.inner.generate(request).await?;
        Ok(GenerateStream::new(LimitedStream::Running { stream, place: Some(place) }))
    }
}

/// `None` if the request is cancelled before its turn.
async fn in_turn(turn: Turn, cancel: &CancellationToken) -> Result<Option<OwnedSemaphorePermit>> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => Ok(None),
        place = turn => place.map(Some),
    }
}

#[async_trait]
impl BackendWrapper for Limited {
    fn inner(&self) -> &dyn LlmBackend {
        &*self.inner
    }

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
        stats.queued = stats.queued.saturating_add(self.pool.waiting());
        stats
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        let mut turn = match self.place().await.with_operation("generate")? {
            Admission::Granted(place) => return self.run(place, request).await,
            Admission::Queued(turn) => turn,
        };
        // The turn may come while the request is checked; the backend then checks it itself.
        tokio::select! {
            biased;
            place = &mut turn => return self.run(place.with_operation("generate")?, request).await,
            checked = self.inner.validate(&request) => checked?,
        }
        // A task of its own, so that a place which becomes free is used even if nobody reads the stream just then.
        let (inner, pool) = (Arc::clone(&self.inner), Arc::clone(&self.pool));
        let begin = async move {
            match in_turn(turn, &request.cancel).await? {
                Some(place) => {
                    let place = Permit::new(&pool, place, request.cancel.clone());
                    Ok((inner.generate(request).await?, Some(place)))
                }
                None => Ok((cancelled(), None)),
            }
        };
        Ok(GenerateStream::new(LimitedStream::Waiting(Beginning(tokio::spawn(begin)))))
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        let _place = self.wait(&request.cancel).await.with_operation("score")?;
        self.inner.score(request).await
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        let _place = self.wait(&request.cancel).await.with_operation("logits")?;
        self.inner.logits(request).await
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings> {
        let _place = self.wait(&request.cancel).await.with_operation("embed")?;
        self.inner.embed(request).await
    }
}

/// The task of a request that waits; it ends with this.
struct Beginning(JoinHandle<Result<(GenerateStream, Option<Permit>)>>);

impl Drop for Beginning {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A stream with its place, until it ends. The stream goes first, so that the place is free when the work has ended.
enum LimitedStream {
    Waiting(Beginning),
    Running { stream: GenerateStream, place: Option<Permit> },
    Ended,
}

impl Stream for LimitedStream {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            match &mut *self {
                Self::Waiting(Beginning(task)) => {
                    let begun = ready!(Pin::new(task).poll(cx));
                    let begun = begun.unwrap_or_else(|e| {
                        Err(Error::new(ErrorKind::Closed, "the request was interrupted").with_source(e))
                    });
                    match begun {
                        Ok((stream, place)) => *self = Self::Running { stream, place },
                        Err(error) => {
                            *self = Self::Ended;
                            return Poll::Ready(Some(Err(error.with_operation("generate"))));
                        }
                    }
                }
                Self::Running { stream, place } => {
                    if let Some(place) = place {
                        ready!(place.poll_read(cx));
                    }
                    let event = ready!(Pin::new(stream).poll_next(cx));
                    if event.as_ref().is_none_or(is_end) {
                        *self = Self::Ended;
                    } else if let Some(place) = place {
                        place.has_event();
                    }
                    return Poll::Ready(event);
                }
                Self::Ended => return Poll::Ready(None),
            }
        }
    }
}
