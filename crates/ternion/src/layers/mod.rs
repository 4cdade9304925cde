//! Layers: what can be laid around any backend without its knowing.
//!
//! A layer takes an `Arc<dyn LlmBackend>` and gives another that keeps the same contract. Dropping a stream or a future
//! through any number of layers cancels the work underneath. A layer of your own implements
//! [`BackendWrapper`](ternion_core::BackendWrapper), which forwards every method that it does not override.
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//! use ternion::{LlmBackend, layers::{LayerExt, ConcurrencyLimitLayer, TimeoutLayer}};
//!
//! fn guarded(model: Arc<dyn LlmBackend>) -> Arc<dyn LlmBackend> {
//!     let limit = ConcurrencyLimitLayer::new(2).with_waiting(16);
//!     let timeout = TimeoutLayer::new().with_first_token(Duration::from_secs(10));
//!     model.layer(&limit).layer(&timeout) // the last is the outermost
//! }
//! ```
//!
//! In a configuration they stand in the table `layers` of a model ([`LayersConfig`]). Their order is then always the
//! same, from the outside in:
//!
//! 1. tracing and metrics see what the host sees;
//! 2. the timeout is what the host promises to its own callers: waits and retries count;
//! 3. the retry waits outside of the limit, so that a request which waits for its next attempt takes nobody's place;
//! 4. the limit stands before the model.

mod limit;
mod metrics;
mod permits;
mod restart;
mod retry;
mod timeout;
mod tracing;

use std::sync::Arc;

use ternion_core::{
    DoneEvent, Event, FinishReason, GenerateStream, LlmBackend, Timing, Usage, config::LayersConfig,
};

pub use self::{
    limit::ConcurrencyLimitLayer, metrics::MetricsLayer, retry::RetryLayer, timeout::TimeoutLayer,
    tracing::TracingLayer,
};
pub(crate) use restart::{Attempts, start};

/// Something that can be laid around a backend.
pub trait Layer {
    /// The backend with this around it.
    fn wrap(&self, inner: Arc<dyn LlmBackend>) -> Arc<dyn LlmBackend>;
}

/// [`Layer`]s on a backend, one after the other.
pub trait LayerExt {
    /// This backend with `layer` around all that is around it already.
    fn layer(self, layer: &dyn Layer) -> Arc<dyn LlmBackend>;
}

impl LayerExt for Arc<dyn LlmBackend> {
    fn layer(self, layer: &dyn Layer) -> Arc<dyn LlmBackend> {
        layer.wrap(self)
    }
}

/// All layers that a configuration asks for.
impl Layer for LayersConfig {
    fn wrap(&self, inner: Arc<dyn LlmBackend>) -> Arc<dyn LlmBackend> {
        let mut backend = inner;
        if let Some(limit) = &self.limit {
            backend = ConcurrencyLimitLayer::from(limit).wrap(backend);
        }
        if let Some(retry) = &self.retry {
            backend = RetryLayer::from(retry).wrap(backend);
        }
        if let Some(timeout) = &self.timeout {
            backend = TimeoutLayer::from(timeout).wrap(backend);
        }
        if self.metrics {
            backend = MetricsLayer::new().wrap(backend);
        }
        if self.tracing {
            backend = TracingLayer::new().wrap(backend);
        }
        backend
    }
}

/// Whether an event is the last one of a stream.
pub(crate) fn is_end(event: &ternion_core::Result<Event>) -> bool {
    matches!(event, Err(_) | Ok(Event::Done(_)))
}

/// The stream of a request that its token cancelled before any model saw it.
pub(crate) fn cancelled() -> GenerateStream {
    let done = DoneEvent::new(FinishReason::Cancelled, Usage::default(), Timing::default());
    GenerateStream::from_events([Ok(done.into())])
}
