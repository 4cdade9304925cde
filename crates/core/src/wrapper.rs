//! A base for backends that wrap another one.

use std::sync::Arc;

use async_trait::async_trait;

use crate::{
    EmbedRequest, Embeddings, GenerateRequest, GenerateStream, LlmBackend, LogitsRequest, ModelInfo, Result,
    Score, ScoreRequest, Stats, Unloaded, text::Tokenizer,
};

/// A backend that wraps another one. Every method forwards to [`inner`](Self::inner) unless the wrapper overrides it, and
/// every wrapper is an [`LlmBackend`].
///
/// Implement this rather than [`LlmBackend`] for a wrapper: a method that a wrapper does not mention then keeps the
/// inner backend's behavior instead of falling back to the default.
///
/// ```
/// use std::sync::{Arc, atomic::{AtomicUsize, Ordering}};
/// use async_trait::async_trait;
/// use ternion_core::{BackendWrapper, GenerateRequest, GenerateStream, LlmBackend, Result};
///
/// /// Counts the requests for answers.
/// struct Counting {
///     inner: Arc<dyn LlmBackend>,
///     requests: AtomicUsize,
/// }
///
/// #[async_trait]
/// impl BackendWrapper for Counting {
///     fn inner(&self) -> &dyn LlmBackend {
///         &*self.inner
///     }
///
///     async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
///         self.requests.fetch_add(1, Ordering::Relaxed);
///         self.inner.generate(request).await
///     }
/// }
/// ```
#[async_trait]
pub trait BackendWrapper: Send + Sync {
    /// The backend inside.
    fn inner(&self) -> &dyn LlmBackend;

    /// See [`LlmBackend::info`].
    fn info(&self) -> Arc<ModelInfo> {
        self.inner().info()
    }

    /// See [`LlmBackend::tokenizer`].
    fn tokenizer(&self) -> Option<Arc<Tokenizer>> {
        self.inner().tokenizer()
    }

    /// See [`LlmBackend::stats`].
    fn stats(&self) -> Stats {
        self.inner().stats()
    }

    /// See [`LlmBackend::is_closed`].
    fn is_closed(&self) -> bool {
        self.inner().is_closed()
    }

    /// See [`LlmBackend::unloaded`].
    fn unloaded(&self) -> Unloaded {
        self.inner().unloaded()
    }

    /// See [`LlmBackend::validate`].
    ///
    /// # Errors
    /// Those of the inner backend.
    async fn validate(&self, request: &GenerateRequest) -> Result<()> {
        self.inner().validate(request).await
    }

    /// See [`LlmBackend::generate`].
    ///
    /// # Errors
    /// Those of the inner backend.
    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        self.inner().generate(request).await
    }

    /// See [`LlmBackend::score`].
    ///
    /// # Errors
    /// Those of the inner backend.
    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        self.inner().score(request).await
    }

    /// See [`LlmBackend::logits`].
    ///
    /// # Errors
    /// Those of the inner backend.
    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        self.inner().logits(request).await
    }

    /// See [`LlmBackend::embed`].
    ///
    /// # Errors
    /// Those of the inner backend.
    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings> {
        self.inner().embed(request).await
    }

    /// See [`LlmBackend::save_session`].
    ///
    /// # Errors
    /// Those of the inner backend.
    async fn save_session(&self, name: &str, tokens: Vec<u32>) -> Result<()> {
        self.inner().save_session(name, tokens).await
    }

    /// See [`LlmBackend::load_session`].
    ///
    /// # Errors
    /// Those of the inner backend.
    async fn load_session(&self, name: &str) -> Result<Vec<u32>> {
        self.inner().load_session(name).await
    }
}

// The lint fails when `LlmBackend` has a method that is not forwarded here.
#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl<W: BackendWrapper> LlmBackend for W {
    fn info(&self) -> Arc<ModelInfo> {
        BackendWrapper::info(self)
    }

    fn tokenizer(&self) -> Option<Arc<Tokenizer>> {
        BackendWrapper::tokenizer(self)
    }

    fn stats(&self) -> Stats {
        BackendWrapper::stats(self)
    }

    fn is_closed(&self) -> bool {
        BackendWrapper::is_closed(self)
    }

    fn unloaded(&self) -> Unloaded {
        BackendWrapper::unloaded(self)
    }

    async fn validate(&self, request: &GenerateRequest) -> Result<()> {
        BackendWrapper::validate(self, request).await
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        BackendWrapper::generate(self, request).await
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        BackendWrapper::score(self, request).await
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        BackendWrapper::logits(self, request).await
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings> {
        BackendWrapper::embed(self, request).await
    }

    async fn save_session(&self, name: &str, tokens: Vec<u32>) -> Result<()> {
        BackendWrapper::save_session(self, name, tokens).await
    }

    async fn load_session(&self, name: &str) -> Result<Vec<u32>> {
        BackendWrapper::load_session(self, name).await
    }
}
