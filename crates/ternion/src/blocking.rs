//! The same calls for a host without async: each blocks the calling thread until it is done.
//!
//! ```no_run
//! use ternion::{GenerateRequest, Message, blocking::Model};
//!
//! # fn main() -> ternion::Result<()> {
//! let model = Model::open("path/to/checkpoint")?;
//! let request = GenerateRequest::chat([Message::user("How many days are in a week?")]);
//! for piece in model.generate(request)?.text() {
//!     print!("{}", piece?);
//! }
//! # Ok(()) }
//! ```
//!
//! The calls panic within a tokio runtime, whose threads they would block: there, use the async API.

use std::{fmt, path::Path, sync::Arc};

use ternion_core::{
    Completion, EmbedRequest, Embeddings, Error, ErrorKind, Event, GenerateRequest, GenerateStream,
    LlmBackend, LlmBackendExt, LogitsRequest, Message, ModelInfo, Result, ResultExt, Score, ScoreRequest,
    Stats, config::Config, text::Tokenizer,
};
use tokio::runtime::{Builder, Runtime};

/// A model with a runtime of its own. Cheap to clone, and usable from several threads at the same time.
#[derive(Clone)]
pub struct Model {
    backend: Arc<dyn LlmBackend>,
    runtime: Arc<Runtime>,
}

impl Model {
    /// [`crate::open`]
    ///
    /// # Errors
    /// Those of [`crate::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::load_by(|| async { crate::open(path).await })
    }

    /// [`crate::load_file`]
    ///
    /// # Errors
    /// Those of [`crate::load_file`].
    pub fn load_file(path: impl AsRef<Path>) -> Result<Self> {
        Self::load_by(|| async { crate::load_file(path).await })
    }

    /// [`crate::load`]
    ///
    /// # Errors
    /// Those of [`crate::load`].
    pub fn load(config: &Config, model: Option<&str>) -> Result<Self> {
        Self::load_by(|| crate::load(config, model))
    }

    /// A model over a backend that is loaded already.
    ///
    /// # Errors
    /// [`ResourceExhausted`](ErrorKind::ResourceExhausted) if the runtime's thread cannot be started.
    pub fn new(backend: Arc<dyn LlmBackend>) -> Result<Self> {
        Ok(Self { backend, runtime: runtime()? })
    }

    fn load_by<F>(load: impl FnOnce() -> F) -> Result<Self>
    where
        F: Future<Output = Result<Arc<dyn LlmBackend>>>,
    {
        let runtime = runtime()?;
        let backend = runtime.block_on(load())?;
        Ok(Self { backend, runtime })
    }

    /// The backend itself.
    pub fn backend(&self) -> &Arc<dyn LlmBackend> {
        &self.backend
    }

    /// [`LlmBackend::info`]
    pub fn info(&self) -> Arc<ModelInfo> {
        self.backend.info()
    }

    /// [`LlmBackend::tokenizer`]
    pub fn tokenizer(&self) -> Option<Arc<Tokenizer>> {
        self.backend.tokenizer()
    }

    /// [`LlmBackend::stats`]
    pub fn stats(&self) -> Stats {
        self.backend.stats()
    }

    /// [`LlmBackend::validate`]
    ///
    /// # Errors
    /// Those of [`LlmBackend::validate`].
    pub fn validate(&self, request: &GenerateRequest) -> Result<()> {
        self.runtime.block_on(self.backend.validate(request))
    }

    /// [`LlmBackend::generate`]: returns when the request is accepted.
    ///
    /// # Errors
    /// Those of [`LlmBackend::generate`].
    pub fn generate(&self, request: GenerateRequest) -> Result<Events> {
        let stream = self.runtime.block_on(self.backend.generate(request))?;
        Ok(Events { stream, runtime: Arc::clone(&self.runtime) })
    }

    /// [`LlmBackendExt::chat`]
    ///
    /// # Errors
    /// Those of [`LlmBackend::generate`].
    pub fn chat(&self, messages: Vec<Message>) -> Result<Completion> {
        self.runtime.block_on(self.backend.chat(messages))
    }

    /// [`LlmBackendExt::complete`]
    ///
    /// # Errors
    /// Those of [`LlmBackend::generate`].
    pub fn complete(&self, text: &str, max_tokens: usize) -> Result<Completion> {
        self.runtime.block_on(self.backend.complete(text, max_tokens))
    }

    /// [`LlmBackend::score`]
    ///
    /// # Errors
    /// Those of [`LlmBackend::score`].
    pub fn score(&self, request: ScoreRequest) -> Result<Score> {
        self.runtime.block_on(self.backend.score(request))
    }

    /// [`LlmBackend::logits`]
    ///
    /// # Errors
    /// Those of [`LlmBackend::logits`].
    pub fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        self.runtime.block_on(self.backend.logits(request))
    }

    /// [`LlmBackend::embed`]
    ///
    /// # Errors
    /// Those of [`LlmBackend::embed`].
    pub fn embed(&self, request: EmbedRequest) -> Result<Embeddings> {
        self.runtime.block_on(self.backend.embed(request))
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("backend", &self.backend).finish_non_exhaustive()
    }
}

/// One thread besides those that the model computes with.
fn runtime() -> Result<Arc<Runtime>> {
    let start = || {
        Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("ternion-blocking")
            .enable_all()
            .build()
            .map_err(|e| {
                Error::new(ErrorKind::ResourceExhausted, "cannot start a tokio runtime").with_source(e)
            })
    };
    start().map(Arc::new).with_operation("load")
}

/// The events of one generation, one for each call of `next`. Dropping it cancels the generation.
#[derive(Debug)]
pub struct Events {
    stream: GenerateStream,
    runtime: Arc<Runtime>,
}

impl Events {
    /// Just the text of the answer, piece by piece.
    pub fn text(self) -> impl Iterator<Item = Result<String>> {
        self.filter_map(|event| match event {
            Ok(Event::Text(piece)) => Some(Ok(piece.text)),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        })
    }

    /// Waits for the end and puts the answer together.
    ///
    /// # Errors
    /// Those of [`GenerateStream::collect`].
    pub fn collect_answer(self) -> Result<Completion> {
        self.runtime.block_on(self.stream.collect())
    }
}

impl Iterator for Events {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        self.runtime.block_on(self.stream.next())
    }
}
