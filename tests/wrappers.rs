//! What is laid around a backend keeps its contract: each layer and context policy, all layers together, a handle that is
//! swapped, and a fallback, over candle; all layers together over echo, too.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod host;

use std::{process::ExitCode, sync::Arc, time::Duration};

use async_trait::async_trait;
use host::config;
use ternion::validate;
use ternion::{
    BackendWrapper, Error, GenerateRequest, GenerateStream, LlmBackend, LogitsRequest, Result, Score,
    ScoreRequest,
    config::{Config, ModelConfig},
    context::ContextLayer,
    layers::{ConcurrencyLimitLayer, LayerExt, MetricsLayer, RetryLayer, TimeoutLayer, TracingLayer},
    models::Models,
    registry::{BackendFactory, Progress},
};
use ternion_conformance::Suite;

/// A model with a context that the checks fill soon, and a short queue; `more` are further keys.
fn model(name: &str, backend: &str, more: &str) -> String {
    let path = if backend == "echo" { "" } else { "path = 'FIXTURES/nano-packed'\nthreads = 1\n" };
    let context = if more.contains("context_length =") { "" } else { "context_length = 256\n" };
    format!(
        "[models.{name}]\nbackend = \"{backend}\"\n{path}max_sequences = 3\nmax_queued = 4\n{context}{more}"
    )
}

async fn plain(backend: &str) -> Result<Arc<dyn LlmBackend>> {
    ternion::registry().load(&config(&model("model", backend, "")), None).await
}

/// Longer than any check takes.
const LONG: Duration = Duration::from_secs(600);

fn timeout() -> TimeoutLayer {
    TimeoutLayer::new().with_first_token(LONG).with_between_tokens(LONG).with_total(LONG)
}

/// Waits so short that a refusal still comes at once.
fn retry() -> RetryLayer {
    RetryLayer::new(3).with_delays(Duration::from_millis(1), Duration::from_millis(2))
}

/// A model that refuses what is to be refused, and fails with everything else.
struct Failing(Arc<dyn LlmBackend>);

impl Failing {
    fn failure() -> Error {
        Error::backend("told to fail")
    }
}

#[async_trait]
impl BackendWrapper for Failing {
    fn inner(&self) -> &dyn LlmBackend {
        &*self.0
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        self.0.validate(&request).await?;
        Err(Self::failure())
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        validate::score(&request, &self.0.info().limits)?;
        Err(Self::failure())
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        validate::logits(&request, &self.0.info().limits)?;
        Err(Self::failure())
    }
}

/// The backend `failing`.
struct FailingFactory;

#[async_trait]
impl BackendFactory for FailingFactory {
    fn name(&self) -> &'static str {
        "failing"
    }

    fn description(&self) -> &'static str {
        "fails before its first token"
    }

    async fn load(&self, name: &str, config: &ModelConfig, _: Progress) -> Result<Arc<dyn LlmBackend>> {
        let mut config = config.clone();
        "candle".clone_into(&mut config.backend);
        let inner = ternion::registry().load(&Config::single(name, config), None).await?;
        Ok(Arc::new(Failing(inner)))
    }
}

/// A handle whose model has been swapped twice, so that what it hides is neither the first nor an echo.
async fn swapped() -> Result<Arc<dyn LlmBackend>> {
    let models = Models::new(config(&model("model", "candle", "prefill_chunk = 32\n")))?;
    let handle = models.get("model").await?;
    models.reload_with(config(&model("model", "echo", ""))).await?;
    models.reload_with(config(&model("model", "candle", "prefill_chunk = 32\n"))).await?;
    Ok(Arc::new(handle))
}

async fn policy(kind: &str) -> Result<Arc<dyn LlmBackend>> {
    let policy = format!("context_policy = {{ kind = \"{kind}\" }}\n");
    ternion::registry().load(&config(&model("model", "candle", &policy)), None).await
}

/// A policy inside of a limit, so that requests which wait are ones that a policy makes fit.
async fn limited_policy(kind: &str) -> Result<Arc<dyn LlmBackend>> {
    Ok(policy(kind).await?.layer(&ConcurrencyLimitLayer::new(1).with_waiting(4)))
}

/// A policy around a handle whose model is another than the one that the policy was made for.
async fn policy_around_swapped() -> Result<Arc<dyn LlmBackend>> {
    let models = Models::new(config(&model("model", "candle", "context_length = 128\n")))?;
    let handle: Arc<dyn LlmBackend> = Arc::new(models.get("model").await?);
    let layer = ContextLayer::new(handle, "truncate".parse()?)?;
    models.reload_with(config(&model("model", "candle", "prefill_chunk = 32\n"))).await?;
    Ok(Arc::new(layer))
}

async fn fallback(first: &str) -> Result<Arc<dyn LlmBackend>> {
    let mut registry = ternion::registry();
    registry.register(FailingFactory);
    let text = model("model", first, "fallback = [\"other\"]\n") + &model("other", "candle", "");
    let models = Models::with_registry(config(&text), registry)?;
    Ok(Arc::new(models.get("model").await?))
}

fn main() -> ExitCode {
    let all = "[models.model.layers]\ntracing = true\nmetrics = true\ntimeout.total_ms = 600000\n\
               retry = { attempts = 2, min_delay_ms = 1, max_delay_ms = 1 }\nlimit = { concurrent = 2, waiting = 3 }\n";
    Suite::new()
        .backend("limit", async || {
            Ok(plain("candle").await?.layer(&ConcurrencyLimitLayer::new(3).with_waiting(2)))
        })
        .backend("limit-narrow", async || {
            Ok(plain("candle").await?.layer(&ConcurrencyLimitLayer::new(1).with_waiting(4)))
        })
        .backend("truncate", async || policy("truncate").await)
        .backend("sliding", async || policy("sliding").await)
        .backend("limit-truncate", async || limited_policy("truncate").await)
        .backend("limit-map-reduce", async || limited_policy("map_reduce").await)
        .backend("truncate-swapped", async || policy_around_swapped().await)
        .backend("map-reduce", async || policy("map_reduce").await)
        .backend("retry", async || Ok(plain("candle").await?.layer(&retry())))
        .backend("timeout", async || Ok(plain("candle").await?.layer(&timeout())))
        .backend("metrics", async || Ok(plain("candle").await?.layer(&MetricsLayer::new())))
        .backend("tracing", async || Ok(plain("candle").await?.layer(&TracingLayer::new())))
        .backend("all", async move || {
            ternion::load(&config(&(model("model", "candle", "") + all)), None).await
        })
        .backend("all-echo", async move || {
            ternion::load(&config(&(model("model", "echo", "") + all)), None).await
        })
        .backend("handle", async || swapped().await)
        .backend("fallback-unused", async || fallback("candle").await)
        .backend("fallback", async || fallback("failing").await)
        .run()
}
