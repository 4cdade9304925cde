//! What a host keeps of a model: its name, which stands for whatever the configuration says at the moment.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use async_trait::async_trait;
use ternion_core::{
    EmbedRequest, Embeddings, GenerateRequest, GenerateStream, LlmBackend, LogitsRequest, ModelInfo, Result,
    ResultExt, Score, ScoreRequest, Stats, Unloaded, text::Tokenizer,
};
use tokio_util::sync::CancellationToken;

use super::{
    fallback,
    loaded::Pinned,
    slot::{Slot, Snapshot},
};

/// A model by its name. Cheap to clone, and an [`LlmBackend`] itself: a host keeps it, as an `Arc<dyn LlmBackend>` if it
/// likes, and what is behind it changes with the configuration.
///
/// A request belongs to the model that it begins on, whatever happens to the configuration meanwhile. While a model is
/// given up for another (`reload.mode = "unload_then_load"`), requests wait.
///
/// `info()` and `tokenizer()` are those of the model that would be asked now. A host that makes tokens itself and sends
/// them later takes [`pinned`](Self::pinned) for both, since the model may be another by then.
///
/// `stats()` is the sum over all models of the chain that are loaded, since each was loaded.
///
/// Where a model has a `fallback`, a request that fails with a kind that [falls over](crate::ErrorKind::should_fail_over) goes
/// on to the next model of the chain as long as no token of its answer was delivered; token ids only to a model with
/// the same vocabulary. [`ServedBy`](crate::ServedBy) tells which one answered. If all fail, the error is the first
/// that is worth a retry, or else that of the first model, with those of the others as context. A model of the chain is loaded when it is first needed.
#[derive(Clone)]
pub struct ModelHandle {
    pub(super) target: Target,
}

/// The place that a handle points to. That of the default model follows the configuration.
pub(super) type Target = Arc<RwLock<Arc<Slot>>>;

impl ModelHandle {
    /// What the configuration calls the model.
    pub fn name(&self) -> String {
        self.slot().name.clone()
    }

    /// The model that serves now, which stays the same for as long as this is held: for calls that belong together.
    /// It keeps the model in memory. Must be awaited in a tokio runtime.
    ///
    /// # Errors
    /// What loading the models of the chain returned, if none of them is there.
    pub async fn pinned(&self) -> Result<Arc<dyn LlmBackend>> {
        let mut first = None;
        for slot in self.slot().chain() {
            match slot.ready(&CancellationToken::new()).await {
                Ok(Some(model)) => return Ok(Arc::new(model)),
                Ok(None) => {}
                Err(error) => first = first.or(Some(error)),
            }
        }
        Err(first.unwrap_or_else(fallback::given_up))
    }

    fn slot(&self) -> Arc<Slot> {
        Arc::clone(&self.target.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn snapshot(&self) -> Option<Snapshot> {
        self.slot().chain().iter().find_map(|slot| slot.snapshot())
    }
}

impl ModelHandle {
    /// The model itself, without those that stand in for it.
    async fn own(&self) -> Result<Pinned> {
        self.slot().ready(&CancellationToken::new()).await?.ok_or_else(fallback::given_up)
    }
}

#[async_trait]
impl LlmBackend for ModelHandle {
    fn info(&self) -> Arc<ModelInfo> {
        self.snapshot().map_or_else(
            || {
                let slot = self.slot();
                Arc::new(ModelInfo::new(&*slot.name, slot.wanted().backend))
            },
            |snapshot| snapshot.info,
        )
    }

    fn tokenizer(&self) -> Option<Arc<Tokenizer>> {
        self.snapshot()?.tokenizer
    }

    fn stats(&self) -> Stats {
        let mut sum = Stats::default();
        for model in self.slot().chain().iter().filter_map(|slot| slot.serving()) {
            let stats = model.stats();
            sum.active += stats.active;
            sum.queued += stats.queued;
            sum.finished += stats.finished;
            sum.prompt_tokens += stats.prompt_tokens;
            sum.cached_tokens += stats.cached_tokens;
            sum.completion_tokens += stats.completion_tokens;
        }
        sum
    }

    fn unloaded(&self) -> Unloaded {
        let serving = self.slot().chain().iter().find_map(|slot| slot.serving());
        serving.map_or_else(|| Box::pin(std::future::ready(())) as Unloaded, |model| model.unloaded())
    }

    async fn validate(&self, request: &GenerateRequest) -> Result<()> {
        fallback::validate(self.slot().chain(), request).await.with_operation("generate")
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        fallback::generate(self.slot().chain(), request).await.with_operation("generate")
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        fallback::score(self.slot().chain(), request).await.with_operation("score")
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        fallback::logits(self.slot().chain(), request).await.with_operation("logits")
    }

    /// By the model itself: vectors of another one cannot be compared with its own, so that none stands in for it.
    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings> {
        self.own().await.with_operation("embed")?.embed(request).await
    }

    /// Of the model itself: a session is of no use to another one.
    async fn save_session(&self, name: &str, tokens: Vec<u32>) -> Result<()> {
        self.own().await.with_operation("save_session")?.save_session(name, tokens).await
    }

    async fn load_session(&self, name: &str) -> Result<Vec<u32>> {
        self.own().await.with_operation("load_session")?.load_session(name).await
    }
}

impl fmt::Debug for ModelHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ModelHandle").field(&self.name()).finish()
    }
}
