//! A span of `tracing` for each request.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use async_trait::async_trait;
use futures_core::Stream;
use ternion_core::{
    BackendWrapper, DoneEvent, EmbedRequest, Embeddings, Error, Event, GenerateRequest, GenerateStream,
    LlmBackend, LogitsRequest, Prompt, Result, Score, ScoreRequest,
};
use tracing::{Instrument, Span, debug, field::Empty, info_span, warn};

use super::{Layer, is_end};

/// Lays a span around each request: `generate`, `score`, `logits` or `embed` with the target `ternion::layers::tracing` and the
/// level `info`.
///
/// Its fields are `model` and `backend`; for generations also `prompt` (`text`, `tokens` or `chat`), `max_tokens` and, from
/// their end, `prompt_tokens`, `cached_tokens`, `completion_tokens`, `finish_reason` and `served_by`; for embeddings `inputs`
/// and, from their end, `prompt_tokens`; for others `tokens`.
/// A request that fails has the kind of its `error`. The end is an event of level `debug`, a failure one of level
/// `warn`. What was said, by whomever, is in none of them.
#[derive(Debug, Clone, Copy, Default)]
pub struct TracingLayer(());

impl TracingLayer {
    /// The layer.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Layer for TracingLayer {
    fn wrap(&self, inner: Arc<dyn LlmBackend>) -> Arc<dyn LlmBackend> {
        Arc::new(Traced { inner })
    }
}

#[derive(Debug)]
struct Traced {
    inner: Arc<dyn LlmBackend>,
}

fn failed(span: &Span, error: &Error) {
    span.record("error", error.kind().as_str());
    warn!(parent: span, %error, "failed");
}

#[async_trait]
impl BackendWrapper for Traced {
    fn inner(&self) -> &dyn LlmBackend {
        &*self.inner
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        let info = self.inner.info();
        let prompt = match &request.params.prompt {
            Prompt::Text(_) => "text",
            Prompt::Tokens(_) => "tokens",
            Prompt::Chat(_) => "chat",
            _ => "other",
        };
        let span = info_span!(
            "generate",
            model = info.name,
            backend = info.backend,
            prompt,
            max_tokens = request.params.max_tokens,
            prompt_tokens = Empty,
            cached_tokens = Empty,
            completion_tokens = Empty,
            finish_reason = Empty,
            served_by = Empty,
            error = Empty,
        );
        match self.inner.generate(request).instrument(span.clone()).await {
            Ok(inner) => Ok(GenerateStream::new(TracedStream { inner, span, ended: false })),
            Err(error) => {
                failed(&span, &error);
                Err(error)
            }
        }
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        let info = self.inner.info();
        let tokens = request.tokens.len();
        let span = info_span!("score", model = info.name, backend = info.backend, tokens, error = Empty);
        let result = self.inner.score(request).instrument(span.clone()).await;
        result.inspect_err(|error| failed(&span, error))
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        let info = self.inner.info();
        let tokens = request.tokens.len();
        let span = info_span!("logits", model = info.name, backend = info.backend, tokens, error = Empty);
        let result = self.inner.logits(request).instrument(span.clone()).await;
        result.inspect_err(|error| failed(&span, error))
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings> {
        let info = self.inner.info();
        let inputs = request.inputs.len();
        let span = info_span!(
            "embed",
            model = info.name,
            backend = info.backend,
            inputs,
            prompt_tokens = Empty,
            error = Empty
        );
        let result = self.inner.embed(request).instrument(span.clone()).await;
        if let Ok(embeddings) = &result {
            span.record("prompt_tokens", embeddings.usage.prompt_tokens);
        }
        result.inspect_err(|error| failed(&span, error))
    }
}

struct TracedStream {
    inner: GenerateStream,
    span: Span,
    ended: bool,
}

impl TracedStream {
    fn see(&self, event: &Result<Event>) {
        match event {
            Ok(Event::Done(DoneEvent { finish_reason, usage, served_by, .. })) => {
                self.span.record("prompt_tokens", usage.prompt_tokens);
                self.span.record("cached_tokens", usage.cached_tokens);
                self.span.record("completion_tokens", usage.completion_tokens);
                self.span.record("finish_reason", finish_reason.as_str());
                if let Some(served_by) = served_by {
                    self.span.record("served_by", tracing::field::display(served_by));
                }
                debug!(parent: &self.span, "ended");
            }
            Ok(_) => {}
            Err(error) => failed(&self.span, error),
        }
    }
}

impl Stream for TracedStream {
    type Item = Result<Event>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let event = {
            let _entered = this.span.enter();
            std::task::ready!(Pin::new(&mut this.inner).poll_next(cx))
        };
        if let Some(event) = &event {
            this.see(event);
        }
        this.ended |= event.as_ref().is_none_or(is_end);
        Poll::Ready(event)
    }
}

impl Drop for TracedStream {
    fn drop(&mut self) {
        if !self.ended {
            self.span.record("finish_reason", "dropped");
            debug!(parent: &self.span, "dropped before its end");
        }
    }
}
