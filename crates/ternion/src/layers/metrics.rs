//! Counters and histograms of all requests, by the facade `metrics`.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use async_trait::async_trait;
use futures_core::Stream;
use metrics::{
    SharedString, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use ternion_core::{
    BackendWrapper, DoneEvent, EmbedRequest, Embeddings, Event, GenerateRequest, GenerateStream, LlmBackend,
    LogitsRequest, Result, Score, ScoreRequest, Usage, context::ContextStep,
};

use super::Layer;

const REQUESTS: &str = "ternion_requests_total";
const ACTIVE: &str = "ternion_requests_active";
const DURATION: &str = "ternion_request_duration_seconds";
const QUEUED: &str = "ternion_queued_seconds";
const FIRST_TOKEN: &str = "ternion_first_token_seconds";
const GENERATIONS: &str = "ternion_generations_total";
const PROMPT_TOKENS: &str = "ternion_prompt_tokens_total";
const CACHED_TOKENS: &str = "ternion_cached_tokens_total";
const GENERATED_TOKENS: &str = "ternion_completion_tokens_total";

/// Counts and measures all requests, for whatever recorder of the facade `metrics` the host has installed.
///
/// Whoever wants to see them installs a recorder, such as that of `metrics-exporter-prometheus`; without one they cost
/// next to nothing.
///
/// | name | kind | what it tells | labels |
/// | --- | --- | --- | --- |
/// | `ternion_requests_total` | counter | requests that have ended | `model`, `operation`, `outcome` |
/// | `ternion_requests_active` | gauge | requests that have not ended | `model`, `operation` |
/// | `ternion_request_duration_seconds` | histogram | from a request to its end | `model`, `operation` |
/// | `ternion_queued_seconds` | histogram | how long a generation waited for its turn | `model` |
/// | `ternion_first_token_seconds` | histogram | from a request to its first token | `model` |
/// | `ternion_generations_total` | counter | answers that the model has ended; several for one request where a context policy works in steps | `model` |
/// | `ternion_prompt_tokens_total` | counter | tokens of the prompts of all these, and of what was embedded | `model` |
/// | `ternion_cached_tokens_total` | counter | those of them that did not have to be computed | `model` |
/// | `ternion_completion_tokens_total` | counter | tokens of all these answers | `model` |
///
/// `model` is the model's name and `operation` one of `generate`, `score`, `logits` and `embed`. `outcome` is the reason for the
/// end ([`FinishReason::as_str`](ternion_core::FinishReason::as_str)), or `ok` for all but `generate`; the kind of the
/// error ([`ErrorKind::as_str`](ternion_core::ErrorKind::as_str)); or `dropped` for what nobody waited for.
#[derive(Debug, Clone, Copy, Default)]
pub struct MetricsLayer(());

impl MetricsLayer {
    /// Tells the recorder that is installed what the names mean. Recorders that come later do without.
    pub fn new() -> Self {
        describe_counter!(REQUESTS, "requests that have ended, by outcome");
        describe_gauge!(ACTIVE, "requests that have not ended");
        describe_histogram!(DURATION, Unit::Seconds, "time from a request to its end");
        describe_histogram!(QUEUED, Unit::Seconds, "time that a generation waited for its turn");
        describe_histogram!(FIRST_TOKEN, Unit::Seconds, "time from a request to its first token");
        describe_counter!(GENERATIONS, "answers that the model has ended");
        describe_counter!(PROMPT_TOKENS, "tokens of prompts");
        describe_counter!(CACHED_TOKENS, "tokens of prompts that did not have to be computed");
        describe_counter!(GENERATED_TOKENS, "tokens generated");
        Self(())
    }
}

impl Layer for MetricsLayer {
    fn wrap(&self, inner: Arc<dyn LlmBackend>) -> Arc<dyn LlmBackend> {
        Arc::new(Measured { inner })
    }
}

#[derive(Debug)]
struct Measured {
    inner: Arc<dyn LlmBackend>,
}

impl Measured {
    fn begin(&self, operation: &'static str) -> Measurement {
        let model = SharedString::from(self.inner.info().name.clone());
        gauge!(ACTIVE, "model" => model.clone(), "operation" => operation).increment(1.0);
        Measurement { model, operation, begun: Instant::now(), outcome: "dropped" }
    }

    async fn measure<T>(
        &self,
        operation: &'static str,
        work: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        let mut measurement = self.begin(operation);
        let result = work.await;
        measurement.outcome = result.as_ref().map_or_else(|e| e.kind().as_str(), |_| "ok");
        result
    }
}

#[async_trait]
impl BackendWrapper for Measured {
    fn inner(&self) -> &dyn LlmBackend {
        &*self.inner
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        let mut measurement = self.begin("generate");
        let inner = self.inner.generate(request).await.inspect_err(|error| {
            measurement.outcome = error.kind().as_str();
        })?;
        Ok(GenerateStream::new(MeasuredStream { inner, measurement: Some(measurement) }))
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        self.measure("score", self.inner.score(request)).await
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        self.measure("logits", self.inner.logits(request)).await
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings> {
        let embeddings = self.measure("embed", self.inner.embed(request)).await?;
        let model = SharedString::from(self.inner.info().name.clone());
        counter!(PROMPT_TOKENS, "model" => model).increment(embeddings.usage.prompt_tokens as u64);
        Ok(embeddings)
    }
}

/// One request. Reports when it is dropped, so that a request which is given up is counted too.
struct Measurement {
    model: SharedString,
    operation: &'static str,
    begun: Instant,
    outcome: &'static str,
}

impl Measurement {
    fn see(&mut self, event: &Result<Event>) {
        match event {
            Ok(Event::Done(DoneEvent { finish_reason, usage, timing, .. })) => {
                self.outcome = finish_reason.as_str();
                self.count(usage);
                let model = || self.model.clone();
                histogram!(QUEUED, "model" => model()).record(timing.queued);
                if let Some(first) = timing.first_token {
                    histogram!(FIRST_TOKEN, "model" => model()).record(first);
                }
            }
            // The usage of `Done` is that of the last step alone.
            Ok(Event::Context(ContextStep::PartDone { usage, .. })) => self.count(usage),
            Ok(_) => {}
            Err(error) => self.outcome = error.kind().as_str(),
        }
    }

    /// Counts one answer of the model.
    fn count(&self, usage: &Usage) {
        let model = || self.model.clone();
        counter!(GENERATIONS, "model" => model()).increment(1);
        counter!(PROMPT_TOKENS, "model" => model()).increment(usage.prompt_tokens as u64);
        counter!(CACHED_TOKENS, "model" => model()).increment(usage.cached_tokens as u64);
        counter!(GENERATED_TOKENS, "model" => model()).increment(usage.completion_tokens as u64);
    }
}

impl Drop for Measurement {
    fn drop(&mut self) {
        let (model, operation) = (|| self.model.clone(), self.operation);
        gauge!(ACTIVE, "model" => model(), "operation" => operation).decrement(1.0);
        histogram!(DURATION, "model" => model(), "operation" => operation).record(self.begun.elapsed());
        counter!(REQUESTS, "model" => model(), "operation" => operation, "outcome" => self.outcome)
            .increment(1);
    }
}

struct MeasuredStream {
    inner: GenerateStream,
    /// `None` after the end.
    measurement: Option<Measurement>,
}

impl Stream for MeasuredStream {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let event = std::task::ready!(Pin::new(&mut self.inner).poll_next(cx));
        if let (Some(event), Some(measurement)) = (&event, &mut self.measurement) {
            measurement.see(event);
        }
        if event.as_ref().is_none_or(super::is_end) {
            self.measurement = None;
        }
        Poll::Ready(event)
    }
}
