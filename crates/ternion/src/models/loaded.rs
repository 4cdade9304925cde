//! One loaded model with its layers, for as long as anybody uses it.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use async_trait::async_trait;
use futures_core::Stream;
use ternion_core::{
    BackendWrapper, EmbedRequest, Embeddings, ErrorKind, Event, GenerateRequest, GenerateStream, LlmBackend,
    LogitsRequest, Result, Score, ScoreRequest, config::ModelConfig, text::Tokenizer,
};
use tokio::{
    sync::{OnceCell, watch},
    time::Instant,
};

use super::{
    event::{Events, ModelEvent},
    files::Files,
};
use crate::layers::{Layer, is_end};

/// A model that is loaded. Whoever uses it holds it by an `Arc`; it goes when the last one lets go.
pub(super) struct Loaded {
    /// What it was loaded from.
    pub(super) config: ModelConfig,
    /// Where its files are, also if the configuration names a model of the hub.
    pub(super) path: Option<PathBuf>,
    pub(super) files: Files,
    /// Without its layers.
    pub(super) bare: Arc<dyn LlmBackend>,
    backend: Arc<dyn LlmBackend>,
    vocabulary: OnceCell<Option<u64>>,
    /// Goes after the backend, and tells of it.
    lifetime: Arc<Lifetime>,
}

struct Lifetime {
    events: Events,
    model: String,
    backend: String,
    /// Closed when the model is given up.
    alive: watch::Sender<()>,
    loaded_at: Instant,
    /// A request has failed with [`ErrorKind::Closed`].
    closed: AtomicBool,
}

impl Drop for Lifetime {
    fn drop(&mut self) {
        let (model, backend) = (std::mem::take(&mut self.model), std::mem::take(&mut self.backend));
        self.events.send(ModelEvent::Unloaded { model, backend });
    }
}

impl Loaded {
    pub(super) fn new(
        name: &str,
        config: ModelConfig,
        (path, files): (Option<PathBuf>, Files),
        bare: Arc<dyn LlmBackend>,
        events: &Events,
    ) -> Arc<Self> {
        let backend = config.layers.wrap(Arc::clone(&bare));
        let lifetime = Lifetime {
            events: events.clone(),
            model: name.to_owned(),
            backend: bare.info().backend.clone(),
            alive: watch::channel(()).0,
            loaded_at: Instant::now(),
            closed: AtomicBool::new(false),
        };
        let (vocabulary, lifetime) = (OnceCell::new(), Arc::new(lifetime));
        Arc::new(Self { config, path, files, bare, backend, vocabulary, lifetime })
    }

    /// The same model with the layers of this configuration.
    pub(super) fn with_layers_of(&self, config: ModelConfig) -> Arc<Self> {
        let (path, files, bare) = (self.path.clone(), self.files.clone(), Arc::clone(&self.bare));
        let backend = config.layers.wrap(Arc::clone(&bare));
        let (vocabulary, lifetime) = (OnceCell::new(), Arc::clone(&self.lifetime));
        Arc::new(Self { config, path, files, bare, backend, vocabulary, lifetime })
    }

    /// Whether the model has stopped for good: by what its backend says, or by how a request has failed.
    pub(super) fn is_closed(&self) -> bool {
        self.lifetime.closed.load(Ordering::Acquire) || self.backend.is_closed()
    }

    /// Notes that the model has stopped, if that is how a request has failed.
    fn observe<T>(&self, result: &Result<T>) {
        if result.as_ref().is_err_and(|e| e.kind() == ErrorKind::Closed) {
            self.lifetime.closed.store(true, Ordering::Release);
        }
    }

    /// How long ago it was loaded.
    pub(super) fn age(&self) -> Duration {
        self.lifetime.loaded_at.elapsed()
    }

    /// A future that ends when nobody uses the model any more and its memory is free.
    pub(super) fn gone(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut alive = self.lifetime.alive.subscribe();
        let unloaded = self.bare.unloaded();
        async move {
            while alive.changed().await.is_ok() {}
            unloaded.await;
        }
    }

    /// What tells apart vocabularies in which the same id means another token; `None` where the tokens are not known.
    pub(super) async fn vocabulary(&self) -> Option<u64> {
        let compute = || async {
            let tokenizer = self.backend.tokenizer()?;
            tokio::task::spawn_blocking(move || hash_tokens(&tokenizer)).await.ok()
        };
        *self.vocabulary.get_or_init(compute).await
    }
}

fn hash_tokens(tokenizer: &Tokenizer) -> u64 {
    let mut hasher = DefaultHasher::new();
    for id in 0..tokenizer.vocab_size() as u32 {
        tokenizer.token(id).hash(&mut hasher);
    }
    hasher.finish()
}

/// A loaded model that stays the same while this is held, whatever happens to the configuration.
pub(super) struct Pinned(pub(super) Arc<Loaded>);

#[async_trait]
impl BackendWrapper for Pinned {
    fn inner(&self) -> &dyn LlmBackend {
        &*self.0.backend
    }

    async fn validate(&self, request: &GenerateRequest) -> Result<()> {
        let result = self.0.backend.validate(request).await;
        self.0.observe(&result);
        result
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        let result = self.0.backend.generate(request).await;
        self.0.observe(&result);
        Ok(GenerateStream::new(Lease(Some((result?, Arc::clone(&self.0))))))
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        let result = self.0.backend.score(request).await;
        self.0.observe(&result);
        result
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        let result = self.0.backend.logits(request).await;
        self.0.observe(&result);
        result
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings> {
        let result = self.0.backend.embed(request).await;
        self.0.observe(&result);
        result
    }
}

/// A stream that keeps its model until it has ended.
struct Lease(Option<(GenerateStream, Arc<Loaded>)>);

impl Stream for Lease {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some((stream, model)) = &mut self.0 else { return Poll::Ready(None) };
        let event = ready!(Pin::new(stream).poll_next(cx));
        if let Some(event) = &event {
            model.observe(event);
        }
        if event.as_ref().is_none_or(is_end) {
            self.0 = None;
        }
        Poll::Ready(event)
    }
}
