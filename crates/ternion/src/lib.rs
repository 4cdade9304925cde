//! Run BitNet b1.58 and other ternary language models on plain CPUs, behind one trait.
//!
//! A host names a model in a configuration file, gets an `Arc<dyn LlmBackend>` and streams answers from it. Another
//! model, format or engine is another configuration; the program stays as it is.
//!
//! ```
//! use ternion::{Event, GenerateRequest, Message};
//!
//! # async fn run() -> ternion::Result<()> {
//! let model = ternion::open("path/to/checkpoint").await?;
//! let request = GenerateRequest::chat([Message::user("How many days are in a week?")]);
//! let mut answer = model.generate(request).await?;
//! while let Some(event) = answer.next().await {
//!     if let Event::Text(piece) = event? {
//!         print!("{}", piece.text);
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A host that runs for long keeps handles of its models ([`models`]): their configuration may change while it runs, and
//! one model may stand in for another. What else goes around a model, such as timeouts and metrics, are [`layers`]. A model that
//! calls functions of the host runs in a loop of [`tools`].
//!
//! Loading and generating are awaited in a tokio runtime: what would block it runs on its threads for blocking work.
//! Outside of one, loading panics and `generate` returns an error.
//!
//! Load models after `fork(2)`, so after a daemon has put itself into the background and after a server has started its
//! workers. A model has threads of its own, which a child process does not get: in it, requests to a model that the parent
//! has loaded fail with [`ErrorKind::Closed`].
//!
//! # Features
//!
//! * `candle` (default): the engine in pure Rust, for checkpoints in safetensors and GGUF.
//! * `dense`: dense models on `candle`, by candle-transformers: Qwen2, Gemma 2 and 3, Phi 3, and quantised GGUF files.
//! * `llama-cpp`: llama.cpp, for ternary checkpoints and for all GGUF models that it knows. Building it takes CMake, a C++
//!   compiler and libclang.
//! * `onnx`: ONNX Runtime, whose native library is loaded at run time, for decoders in .onnx files.
//! * `constraints`: answers of local models that follow a JSON schema, a regular expression or a grammar ([`Constraint`]).
//! * `hub`: models from the Hugging Face Hub, by `hf://owner/name` wherever a path is taken ([`hub`]).
//! * `openai`: remote models behind OpenAI's HTTP API, such as vLLM, llama-server or another Ternion.
#![forbid(unsafe_code)]

use std::{path::Path, sync::Arc};

pub use ternion_core::{
    BackendWrapper, CancellationToken, Capabilities, ChatOptions, Completion, Constraint, Content,
    ContentPart, DoneEvent, EmbedInput, EmbedRequest, Embedding, EmbeddingInfo, Embeddings, Error, ErrorKind,
    Event, FinishReason, GenerateParams, GenerateRequest, GenerateStream, InputTruncation, Limits,
    LlmBackend, LlmBackendExt, LogitsRequest, MemoryPart, MemoryPlan, Message, ModelInfo, Pooling,
    Prediction, PrefillEvent, ProcessMemory, Prompt, Result, ResultExt, Sampling, SamplingDefaults, Score,
    ScoreRequest, Segment, ServedBy, Stats, TextEvent, TextStream, Timing, TokenEvent, TokenLogprob,
    TokenScore, Tool, ToolCall, ToolCallEvent, ToolChoice, Unloaded, Usage, async_trait,
};
pub use ternion_core::{answer, config, context, echo, embed, logprob, registry, text, validate};
#[cfg(feature = "local")]
pub use ternion_engine::{self as engine, CausalLm, LogitsWanted, SequenceId, SequenceInput, kv};
#[cfg(feature = "local")]
pub use ternion_formats as formats;
#[cfg(feature = "hub")]
pub use ternion_hub as hub;

pub mod blocking;
pub mod layers;
pub mod models;
mod source;
pub mod tools;

use config::{Config, ModelConfig};
use models::Models;
use registry::{Progress, Registry};

/// The backends that are compiled in.
pub fn registry() -> Registry {
    #[allow(unused_mut, reason = "no engine may be compiled in")]
    let mut registry = Registry::new();
    #[cfg(feature = "candle")]
    ternion_backend_candle::register(&mut registry);
    #[cfg(feature = "llama-cpp")]
    ternion_backend_llama_cpp::register(&mut registry);
    #[cfg(feature = "onnx")]
    ternion_backend_onnx::register(&mut registry);
    #[cfg(feature = "openai")]
    ternion_backend_openai::register(&mut registry);
    registry
}

/// Loads a model of a configuration: the one that is named, else its default, with its layers and its fallback. Must be
/// awaited in a tokio runtime.
///
/// # Errors
/// An unknown model or backend, or a model that cannot be loaded and for which no other stands in.
pub async fn load(config: &Config, model: Option<&str>) -> Result<Arc<dyn LlmBackend>> {
    load_with_progress(config, model, Progress::none()).await
}

/// [`load`] that reports how far it is.
///
/// # Errors
/// As [`load`].
pub async fn load_with_progress(
    config: &Config,
    model: Option<&str>,
    progress: Progress,
) -> Result<Arc<dyn LlmBackend>> {
    let models = Models::new(config.clone())?;
    let (name, _) = config.model(model).with_operation("load")?;
    Ok(Arc::new(models.get_with_progress(name, progress).await?))
}

/// What a model of a configuration would take in memory, without loading it. Blocks while it reads the files. A model of the hub
/// must be in the cache.
///
/// # Errors
/// As [`Registry::plan`].
pub fn plan(config: &Config, model: Option<&str>) -> Result<MemoryPlan> {
    let (name, wanted) = config.model(model).with_operation("plan")?;
    let mut local = config.clone();
    local.models.insert(name.to_owned(), source::cached(wanted)?);
    registry().plan(&local, Some(name))
}

/// How well each backend that is compiled in suits a model of a configuration, or why it cannot run it, in the order in which
/// `backend = "auto"` chooses. Blocks while it looks at the files.
///
/// # Errors
/// For an unknown model.
pub fn suitability(
    config: &Config,
    model: Option<&str>,
) -> Result<Vec<(&'static str, Result<registry::Suitability>)>> {
    registry().suitability(config, model)
}

/// The backends of this project that are not compiled in. Each is a feature of the same name.
pub fn missing_backends() -> impl Iterator<Item = &'static str> {
    let all = [
        ("candle", cfg!(feature = "candle")),
        ("llama-cpp", cfg!(feature = "llama-cpp")),
        ("onnx", cfg!(feature = "onnx")),
        ("openai", cfg!(feature = "openai")),
    ];
    all.into_iter().filter_map(|(name, is_compiled_in)| (!is_compiled_in).then_some(name))
}

/// Reads a configuration file (TOML, JSON or YAML), with the overrides of the environment, and loads its default model.
/// Must be awaited in a tokio runtime.
///
/// # Errors
/// As [`Config::load`] and [`load`].
pub async fn load_file(path: impl AsRef<Path>) -> Result<Arc<dyn LlmBackend>> {
    load(&Config::load(path.as_ref())?, None).await
}

/// Loads the checkpoint in a folder or file, or with the feature `hub` at an address `hf://...`, with default options. Must be awaited in a tokio runtime.
///
/// # Errors
/// As [`load`].
pub async fn open(path: impl AsRef<Path>) -> Result<Arc<dyn LlmBackend>> {
    let model = ModelConfig::for_path(path.as_ref());
    let name =
        path.as_ref().file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
    load(&Config::single(name, model), None).await
}

/// The README's example is compiled with the documentation's tests.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
