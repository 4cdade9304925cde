//! What the tests of hosts share: backends that fail when they are told to, configurations, requests.
#![allow(dead_code, reason = "each test uses its part")]

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use ternion::{
    BackendWrapper, Completion, Error, ErrorKind, Event, GenerateRequest, GenerateStream, LlmBackend,
    LogitsRequest, Result, Sampling, Score, ScoreRequest,
    config::{Config, Format, ModelConfig},
    echo::{Echo, EchoOptions},
    registry::{BackendFactory, Progress},
};
pub(crate) use ternion_test_support::fixture;

/// A configuration from TOML, in which `FIXTURES` stands for the folder of the fixtures.
pub(crate) fn config(text: &str) -> Config {
    let text = text.replace("FIXTURES", fixture("").to_str().unwrap());
    Config::from_str(&text, Format::Toml).unwrap()
}

pub(crate) fn echo(options: &str) -> Arc<dyn LlmBackend> {
    let options: EchoOptions = serde_json::from_str(options).unwrap();
    Arc::new(Echo::new("echo", options))
}

pub(crate) fn say(text: &str) -> GenerateRequest {
    GenerateRequest::new(text).with_sampling(Sampling::greedy())
}

pub(crate) async fn answer(model: &dyn LlmBackend, request: GenerateRequest) -> Result<Completion> {
    model.generate(request).await?.collect().await
}

pub(crate) fn served_by(completion: &Completion) -> String {
    completion.served_by.as_ref().map(ToString::to_string).unwrap_or_default()
}

/// Waits until nothing is being worked on.
pub(crate) async fn idle(model: &dyn LlmBackend) {
    for _ in 0..1000 {
        let stats = model.stats();
        if stats.active + stats.queued == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("work goes on: {:?}", model.stats());
}

/// A backend that fails as long as its script says, and then does what the one inside does.
pub(crate) struct Flaky {
    inner: Arc<dyn LlmBackend>,
    script: Mutex<VecDeque<Failing>>,
    /// Calls of `generate`, `score` and `logits`.
    pub(crate) calls: AtomicUsize,
}

/// How one call fails.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Failing {
    /// The call itself.
    Call(ErrorKind),
    /// The stream, after so many of its events.
    After(usize, ErrorKind),
    /// Nothing comes, for ever.
    Hang,
}

impl Flaky {
    pub(crate) fn new(inner: Arc<dyn LlmBackend>, script: impl IntoIterator<Item = Failing>) -> Arc<Self> {
        let script = Mutex::new(script.into_iter().collect());
        Arc::new(Self { inner, script, calls: AtomicUsize::new(0) })
    }

    pub(crate) fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    fn next(&self) -> Option<Failing> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.script.lock().unwrap().pop_front()
    }

    async fn call<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        match self.next() {
            None => work.await,
            Some(Failing::Call(kind)) => Err(Error::new(kind, "told to fail")),
            Some(Failing::After(_, kind)) => work.await.and(Err(Error::new(kind, "told to fail"))),
            Some(Failing::Hang) => std::future::pending().await,
        }
    }
}

#[async_trait]
impl BackendWrapper for Flaky {
    fn inner(&self) -> &dyn LlmBackend {
        &*self.inner
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        match self.next() {
            None => self.inner.generate(request).await,
            Some(Failing::Call(kind)) => Err(Error::new(kind, "told to fail")),
            Some(Failing::Hang) => std::future::pending().await,
            Some(Failing::After(count, kind)) => {
                let inner = self.inner.generate(request).await?;
                Ok(GenerateStream::new(Cut {
                    inner,
                    left: count,
                    error: Some(Error::new(kind, "told to fail")),
                }))
            }
        }
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        self.call(self.inner.score(request)).await
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        self.call(self.inner.logits(request)).await
    }
}

/// A stream that fails after some events.
struct Cut {
    inner: GenerateStream,
    left: usize,
    error: Option<Error>,
}

impl futures_core::Stream for Cut {
    type Item = Result<Event>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        if self.left == 0 {
            return std::task::Poll::Ready(self.error.take().map(Err));
        }
        let event = std::task::ready!(std::pin::Pin::new(&mut self.inner).poll_next(cx));
        self.left -= 1;
        std::task::Poll::Ready(event)
    }
}

/// The backend `counted`: what another backend of the registry makes, with a count of those that are alive. Its options
/// are `of`, the backend; `broken`, what is wrong with it; `load_ms`, how long loading takes at least.
#[derive(Clone, Default)]
pub(crate) struct Counted {
    pub(crate) alive: Arc<AtomicUsize>,
    pub(crate) most_alive: Arc<AtomicUsize>,
    pub(crate) loads: Arc<AtomicUsize>,
}

#[derive(Default, serde::Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct CountedOptions {
    of: String,
    broken: Option<String>,
    load_ms: u64,
    reply: Option<String>,
    delay_ms: u64,
}

struct CountedBackend {
    inner: Arc<dyn LlmBackend>,
    broken: Option<String>,
    alive: Arc<AtomicUsize>,
}

impl Drop for CountedBackend {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl BackendFactory for Counted {
    fn name(&self) -> &'static str {
        "counted"
    }

    fn description(&self) -> &'static str {
        "another backend that is counted"
    }

    async fn load(
        &self,
        name: &str,
        config: &ModelConfig,
        progress: Progress,
    ) -> Result<Arc<dyn LlmBackend>> {
        let options: CountedOptions = config.parse_options()?;
        tokio::time::sleep(Duration::from_millis(options.load_ms)).await;
        if options.broken.as_deref() == Some("load") {
            return Err(Error::invalid_model("told to be broken"));
        }
        let mut inner = config.clone();
        inner.backend = options.of;
        inner.options.clear();
        if let Some(reply) = options.reply {
            inner.options.insert("reply".into(), reply.into());
        }
        if options.delay_ms > 0 {
            inner.options.insert("delay_ms".into(), options.delay_ms.into());
        }
        let inner = ternion::registry()
            .load_with_progress(&Config::single(name, inner), Some(name), progress)
            .await?;
        self.loads.fetch_add(1, Ordering::SeqCst);
        let alive = self.alive.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_alive.fetch_max(alive, Ordering::SeqCst);
        Ok(Arc::new(CountedBackend { inner, broken: options.broken, alive: Arc::clone(&self.alive) }))
    }
}

#[async_trait]
impl BackendWrapper for CountedBackend {
    fn inner(&self) -> &dyn LlmBackend {
        &*self.inner
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        match self.broken.as_deref() {
            None => self.inner.generate(request).await,
            Some("hang") => std::future::pending().await,
            Some("endless") => {
                let inner = self.inner.generate(request).await?;
                Ok(GenerateStream::new(Cut { inner, left: 2, error: None }))
            }
            Some("answer") => Err(Error::backend("told to be broken")),
            Some(_) => {
                let mut inner = self.inner.generate(request).await?;
                let mut events = VecDeque::new();
                while let Some(event) = inner.next().await {
                    events.push_back(event.map(|event| match event {
                        Event::Token(token) => Event::Token(token.with_logprob(f32::NAN)),
                        other => other,
                    }));
                }
                Ok(GenerateStream::new(Listed(events)))
            }
        }
    }
}

struct Listed(VecDeque<Result<Event>>);

impl futures_core::Stream for Listed {
    type Item = Result<Event>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        std::task::Poll::Ready(self.0.pop_front())
    }
}
