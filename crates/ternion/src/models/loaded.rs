//! One loaded model with its layers, for as long as anybody uses it.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::SystemTime,
};

use async_trait::async_trait;
use futures_core::Stream;
use ternion_core::{
    Event, GenerateRequest, GenerateStream, LlmBackend, LogitsRequest, ModelInfo, Result, Score,
    ScoreRequest, Stats, Unloaded, config::ModelConfig, text::Tokenizer,
};
use tokio::sync::{OnceCell, watch};

use super::event::{Events, ModelEvent};
use crate::layers::Layer;

/// A model that is loaded. Whoever uses it holds it by an `Arc`; it goes when the last one lets go.
pub(super) struct Loaded {
    /// What it was loaded from.
    pub(super) config: ModelConfig,
    pub(super) files: Files,
    /// Without its layers.
    pub(super) bare: Arc<dyn LlmBackend>,
    backend: Arc<dyn LlmBackend>,
    vocabulary: OnceCell<Option<u64>>,
    /// Goes after the backend, and tells of it.
    leaving: Arc<Leaving>,
}

struct Leaving {
    events: Events,
    model: String,
    backend: String,
    /// Closed when the model is given up.
    alive: watch::Sender<()>,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        let (model, backend) = (std::mem::take(&mut self.model), std::mem::take(&mut self.backend));
        self.events.send(ModelEvent::Unloaded { model, backend });
    }
}

impl Loaded {
    pub(super) fn new(
        name: &str,
        config: ModelConfig,
        files: Files,
        bare: Arc<dyn LlmBackend>,
        events: &Events,
    ) -> Arc<Self> {
        let backend = config.layers.wrap(Arc::clone(&bare));
        let leaving = Leaving {
            events: events.clone(),
            model: name.to_owned(),
            backend: bare.info().backend.clone(),
            alive: watch::channel(()).0,
        };
        let (vocabulary, leaving) = (OnceCell::new(), Arc::new(leaving));
        Arc::new(Self { config, files, bare, backend, vocabulary, leaving })
    }

    /// The same model with the layers of this configuration.
    pub(super) fn with_layers_of(&self, config: ModelConfig) -> Arc<Self> {
        let (files, bare) = (self.files.clone(), Arc::clone(&self.bare));
        let backend = config.layers.wrap(Arc::clone(&bare));
        let (vocabulary, leaving) = (OnceCell::new(), Arc::clone(&self.leaving));
        Arc::new(Self { config, files, bare, backend, vocabulary, leaving })
    }

    /// A future that ends when nobody uses the model any more and its memory is free.
    pub(super) fn gone(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut alive = self.leaving.alive.subscribe();
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
impl LlmBackend for Pinned {
    fn info(&self) -> Arc<ModelInfo> {
        self.0.backend.info()
    }

    fn tokenizer(&self) -> Option<Arc<Tokenizer>> {
        self.0.backend.tokenizer()
    }

    fn stats(&self) -> Stats {
        self.0.backend.stats()
    }

    fn unloaded(&self) -> Unloaded {
        self.0.backend.unloaded()
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        let stream = self.0.backend.generate(request).await?;
        Ok(GenerateStream::new(Lease(Some((stream, Arc::clone(&self.0))))))
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        self.0.backend.score(request).await
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        self.0.backend.logits(request).await
    }
}

/// A stream that keeps its model until it has ended.
struct Lease(Option<(GenerateStream, Arc<Loaded>)>);

impl Stream for Lease {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some((stream, _)) = &mut self.0 else { return Poll::Ready(None) };
        let event = ready!(Pin::new(stream).poll_next(cx));
        if !matches!(event, Some(Ok(Event::Prefill { .. } | Event::Token { .. }))) {
            self.0 = None;
        }
        Poll::Ready(event)
    }
}

/// What the files of a checkpoint look like from outside: names, sizes and times.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Files(Vec<(PathBuf, u64, Option<SystemTime>)>);

impl Files {
    /// Looks at the file, or at those that lie in the folder itself. What cannot be seen is left to the loading to tell.
    pub(super) async fn look(path: Option<&Path>) -> Self {
        let Some(path) = path.map(Path::to_owned) else { return Self::default() };
        tokio::task::spawn_blocking(move || Self::look_now(&path)).await.unwrap_or_default()
    }

    fn look_now(path: &Path) -> Self {
        let paths = match std::fs::read_dir(path) {
            Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
            Err(_) => vec![path.to_owned()],
        };
        // Symbolic links are followed: that they point elsewhere now is a change too.
        let look = |path: PathBuf| {
            let metadata = std::fs::metadata(&path).ok().filter(std::fs::Metadata::is_file)?;
            Some((path, metadata.len(), metadata.modified().ok()))
        };
        let mut files: Vec<_> = paths.into_iter().filter_map(look).collect();
        files.sort();
        Self(files)
    }
}
