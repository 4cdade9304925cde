//! Ends requests that take too long.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use futures_core::Stream;
use ternion_core::{
    Error, ErrorKind, Event, GenerateRequest, GenerateStream, LlmBackend, LogitsRequest, Result, ResultExt,
    Score, ScoreRequest, config::TimeoutConfig,
};
use tokio::time::{Instant, Sleep};

use super::{Layer, forward, is_end};

/// Ends a request that takes too long with [`Timeout`](ErrorKind::Timeout), and the work on it.
///
/// Scores and logits know the whole time only. Needs a tokio runtime with its timer enabled.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timeout {
    first_token: Option<Duration>,
    between_tokens: Option<Duration>,
    total: Option<Duration>,
}

impl Timeout {
    /// No bounds.
    pub fn new() -> Self {
        Self::default()
    }

    /// The longest time from a request to its first token.
    pub fn with_first_token(mut self, time: Duration) -> Self {
        self.first_token = Some(time);
        self
    }

    /// The longest time from one token to the next, or to the end, as far as the reader waits for it.
    pub fn with_between_tokens(mut self, time: Duration) -> Self {
        self.between_tokens = Some(time);
        self
    }

    /// The longest time from a request to its end, that of a slow reader included.
    pub fn with_total(mut self, time: Duration) -> Self {
        self.total = Some(time);
        self
    }
}

impl From<&TimeoutConfig> for Timeout {
    fn from(config: &TimeoutConfig) -> Self {
        Self {
            first_token: config.first_token_ms.map(Duration::from_millis),
            between_tokens: config.between_tokens_ms.map(Duration::from_millis),
            total: config.total_ms.map(Duration::from_millis),
        }
    }
}

impl Layer for Timeout {
    fn wrap(&self, inner: Arc<dyn LlmBackend>) -> Arc<dyn LlmBackend> {
        Arc::new(Timed { inner, limits: *self })
    }
}

struct Timed {
    inner: Arc<dyn LlmBackend>,
    limits: Timeout,
}

/// A moment after which a request has failed, and what to say then. Ordered by the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Deadline {
    at: Instant,
    what: &'static str,
    allowed: Duration,
}

impl Deadline {
    /// `None` if that is without bound, or later than a clock can tell.
    fn after(start: Instant, allowed: Option<Duration>, what: &'static str) -> Option<Self> {
        allowed.and_then(|allowed| Some(Self { at: start.checked_add(allowed)?, what, allowed }))
    }

    fn error(self) -> Error {
        let message = format!("{} within {} ms", self.what, self.allowed.as_millis());
        Error::new(ErrorKind::Timeout, message)
    }
}

async fn within<T>(deadline: Option<Deadline>, work: impl Future<Output = Result<T>>) -> Result<T> {
    match deadline {
        None => work.await,
        Some(deadline) => {
            tokio::time::timeout_at(deadline.at, work).await.unwrap_or_else(|_| Err(deadline.error()))
        }
    }
}

impl Timed {
    fn total(&self, start: Instant) -> Option<Deadline> {
        Deadline::after(start, self.limits.total, "no end")
    }
}

#[async_trait]
impl LlmBackend for Timed {
    forward!(inner: info tokenizer stats unloaded);

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        let start = Instant::now();
        let total = self.total(start);
        let first = Deadline::after(start, self.limits.first_token, "no first token");
        let earliest = first.into_iter().chain(total).min();
        let inner = within(earliest, self.inner.generate(request)).await.during("generate")?;
        let between = self.limits.between_tokens;
        Ok(GenerateStream::new(TimedStream {
            inner: Some(inner),
            total,
            first,
            between,
            started: false,
            next: None,
            alarm: None,
        }))
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        within(self.total(Instant::now()), self.inner.score(request)).await.during("score")
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        within(self.total(Instant::now()), self.inner.logits(request)).await.during("logits")
    }
}

struct TimedStream {
    /// `None` after the end.
    inner: Option<GenerateStream>,
    total: Option<Deadline>,
    /// `None` after the first token.
    first: Option<Deadline>,
    between: Option<Duration>,
    /// There was a token.
    started: bool,
    /// For the token that the reader waits for. The time begins when the reader does.
    next: Option<Deadline>,
    alarm: Option<Pin<Box<Sleep>>>,
}

impl TimedStream {
    fn deadline(&self) -> Option<Deadline> {
        self.total.into_iter().chain(self.first).chain(self.next).min()
    }

    fn fail(&mut self, deadline: Deadline) -> Poll<Option<Result<Event>>> {
        self.inner = None; // cancels the work
        Poll::Ready(Some(Err(deadline.error().during("generate"))))
    }
}

impl Stream for TimedStream {
    type Item = Result<Event>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let Some(inner) = &mut this.inner else { return Poll::Ready(None) };
        match Pin::new(inner).poll_next(cx) {
            Poll::Ready(None) => {
                this.inner = None;
                Poll::Ready(None)
            }
            Poll::Ready(Some(event)) if is_end(&event) => {
                this.inner = None;
                Poll::Ready(Some(event))
            }
            Poll::Ready(Some(event)) => {
                if let Some(total) = this.total.filter(|total| total.at <= Instant::now()) {
                    return this.fail(total);
                }
                if matches!(event, Ok(Event::Token { .. })) {
                    this.started = true;
                    (this.first, this.next) = (None, None);
                }
                Poll::Ready(Some(event))
            }
            Poll::Pending => {
                if this.started && this.next.is_none() {
                    this.next = Deadline::after(Instant::now(), this.between, "no further token");
                }
                let Some(deadline) = this.deadline() else { return Poll::Pending };
                let alarm = this.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline.at)));
                if alarm.deadline() != deadline.at {
                    alarm.as_mut().reset(deadline.at);
                }
                if alarm.as_mut().poll(cx).is_ready() { this.fail(deadline) } else { Poll::Pending }
            }
        }
    }
}
