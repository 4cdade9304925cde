//! Ends requests that take too long.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use async_trait::async_trait;
use futures_core::Stream;
use ternion_core::{
    BackendWrapper, EmbedRequest, Embeddings, Error, ErrorKind, Event, GenerateRequest, GenerateStream,
    LlmBackend, LogitsRequest, Result, ResultExt, Score, ScoreRequest, config::TimeoutConfig,
};
use tokio::{sync::Notify, task::JoinHandle, time::Instant};

use super::{Layer, is_end};

/// Ends a request that takes too long with [`Timeout`](ErrorKind::Timeout), and the work on it. A stream ends in time whether
/// or not anybody reads it.
///
/// Scores, logits and embeddings know the whole time only. Needs a tokio runtime with its timer enabled.
#[derive(Debug, Clone, Copy, Default)]
pub struct TimeoutLayer {
    first_token: Option<Duration>,
    between_tokens: Option<Duration>,
    total: Option<Duration>,
}

impl TimeoutLayer {
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

impl From<&TimeoutConfig> for TimeoutLayer {
    fn from(config: &TimeoutConfig) -> Self {
        Self {
            first_token: config.first_token_ms.map(Duration::from_millis),
            between_tokens: config.between_tokens_ms.map(Duration::from_millis),
            total: config.total_ms.map(Duration::from_millis),
        }
    }
}

impl Layer for TimeoutLayer {
    fn wrap(&self, inner: Arc<dyn LlmBackend>) -> Arc<dyn LlmBackend> {
        Arc::new(Timed { inner, limits: *self })
    }
}

#[derive(Debug)]
struct Timed {
    inner: Arc<dyn LlmBackend>,
    limits: TimeoutLayer,
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
impl BackendWrapper for Timed {
    fn inner(&self) -> &dyn LlmBackend {
        &*self.inner
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        let start = Instant::now();
        let total = self.total(start);
        let first = Deadline::after(start, self.limits.first_token, "no first token");
        let earliest = first.into_iter().chain(total).min();
        let inner = within(earliest, self.inner.generate(request)).await.with_operation("generate")?;
        Ok(GenerateStream::new(TimedStream::start(State {
            inner: Some(inner),
            total,
            first,
            between: self.limits.between_tokens,
            started: false,
            next: None,
            found: VecDeque::new(),
            reader: None,
            alarm: None,
        })))
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        within(self.total(Instant::now()), self.inner.score(request)).await.with_operation("score")
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        within(self.total(Instant::now()), self.inner.logits(request)).await.with_operation("logits")
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings> {
        within(self.total(Instant::now()), self.inner.embed(request)).await.with_operation("embed")
    }
}

/// The state of a stream, shared by its reader and its alarm.
struct State {
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
    /// Events that the alarm has found before the reader.
    found: VecDeque<Result<Event>>,
    /// The reader, if it waits.
    reader: Option<Waker>,
    /// When the alarm looks at this again.
    alarm: Option<Instant>,
}

impl State {
    fn deadline(&self) -> Option<Deadline> {
        self.total.into_iter().chain(self.first).chain(self.next).min()
    }

    /// Takes note of an event that has come out of the inner stream.
    fn note(&mut self, event: &Result<Event>) {
        if is_end(event) {
            self.inner = None;
        } else if event.as_ref().is_ok_and(Event::is_answer) {
            self.started = true;
            (self.first, self.next) = (None, None);
        }
    }

    /// Ends the work; returns the error that says so.
    fn fail(&mut self, deadline: Deadline) -> Result<Event> {
        self.inner = None; // cancels the work
        Err(deadline.error().with_operation("generate"))
    }

    /// Ends the work if it is over its time, whether or not anybody reads the stream.
    fn check(&mut self) {
        while let Some(deadline) = self.deadline().filter(|deadline| deadline.at <= Instant::now())
            && let Some(inner) = &mut self.inner
        {
            // A token that has come in time counts, although nobody has read it. That it is polled here must not keep the
            // reader from being woken.
            let waker = self.reader.as_ref().unwrap_or(Waker::noop()).clone();
            let polled = Pin::new(inner).poll_next(&mut Context::from_waker(&waker));
            let event = match polled {
                Poll::Ready(Some(event)) if self.total != Some(deadline) => {
                    self.note(&event);
                    event
                }
                Poll::Ready(None) => {
                    self.inner = None;
                    break;
                }
                _ => self.fail(deadline),
            };
            self.found.push_back(event);
        }
        if (!self.found.is_empty() || self.inner.is_none())
            && let Some(reader) = self.reader.take()
        {
            reader.wake();
        }
    }
}

/// A stream whose deadlines hold although nobody polls it: a task watches them.
struct TimedStream {
    state: Arc<Mutex<State>>,
    /// Tells the task that a deadline has come that is earlier than the one that it waits for.
    earlier: Arc<Notify>,
    task: Option<JoinHandle<()>>,
}

impl TimedStream {
    fn start(state: State) -> Self {
        let watched = state.deadline().is_some() || state.between.is_some();
        let state = Arc::new(Mutex::new(state));
        let earlier = Arc::new(Notify::new());
        let task = watched.then(|| tokio::spawn(watch(Arc::downgrade(&state), Arc::clone(&earlier))));
        Self { state, earlier, task }
    }

    fn end(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

/// Looks at a stream whenever one of its deadlines is over.
async fn watch(state: Weak<Mutex<State>>, earlier: Arc<Notify>) {
    loop {
        let alarm = {
            let Some(state) = state.upgrade() else { return };
            let mut state = lock(&state);
            state.check();
            if state.inner.is_none() {
                return;
            }
            state.alarm = state.deadline().map(|deadline| deadline.at);
            state.alarm
        };
        match alarm {
            None => earlier.notified().await,
            Some(at) => tokio::select! {
                () = tokio::time::sleep_until(at) => {}
                () = earlier.notified() => {}
            },
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stream for TimedStream {
    type Item = Result<Event>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let mut guard = lock(&this.state);
        let state = &mut *guard;
        if let Some(event) = state.found.pop_front() {
            return Poll::Ready(Some(event));
        }
        let polled = match &mut state.inner {
            Some(inner) => Pin::new(inner).poll_next(cx),
            None => Poll::Ready(None),
        };
        let event = match polled {
            Poll::Ready(Some(event)) => {
                // The time of a slow reader counts.
                let late = state.total.filter(|total| total.at <= Instant::now() && !is_end(&event));
                if let Some(total) = late {
                    Some(state.fail(total))
                } else {
                    state.note(&event);
                    Some(event)
                }
            }
            Poll::Ready(None) => {
                state.inner = None;
                None
            }
            Poll::Pending => {
                state.reader = Some(cx.waker().clone());
                if state.started && state.next.is_none() {
                    state.next = Deadline::after(Instant::now(), state.between, "no further token");
                }
                let deadline = state.deadline().map(|deadline| deadline.at);
                if deadline.is_some_and(|at| state.alarm.is_none_or(|alarm| at < alarm)) {
                    state.alarm = deadline;
                    this.earlier.notify_one();
                }
                return Poll::Pending;
            }
        };
        let ended = state.inner.is_none();
        drop(guard);
        if ended {
            this.end();
        }
        Poll::Ready(event)
    }
}

impl Drop for TimedStream {
    fn drop(&mut self) {
        self.end();
    }
}
