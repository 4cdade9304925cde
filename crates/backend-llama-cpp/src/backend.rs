//! From a configuration to a running backend: opens the checkpoint, or lets llama.cpp do it, and starts the engine.

use std::{path::Path, sync::Arc};

use ternion_core::{
    Error, ErrorKind, LlmBackend, ModelInfo, Result, ResultExt,
    config::ModelConfig,
    registry::{BlockingFactory, LoadProgress, Progress, Suitability},
    text::Tokenizer,
};
use ternion_engine::{CausalLm, Engine, EngineOptions};
use ternion_formats::Access;

use crate::{
    Arithmetic, LlamaCpp, LlamaCppOptions, ModelOptions, gguf,
    preflight::{self, Loader},
};

const NAME: &str = "llama-cpp";

/// Loads models for the backend `llama-cpp`.
pub fn factory() -> BlockingFactory {
    BlockingFactory::new::<LlamaCppOptions>(
        NAME,
        "llama.cpp: ternary checkpoints, and all GGUF models that it knows",
        load,
    )
    .with_prompt_cache()
    .with_suitability(suitability)
}

fn suitability(config: &ModelConfig) -> Result<Suitability> {
    let options: LlamaCppOptions = config.parse_options()?;
    let path = config.path.as_ref().ok_or_else(|| Error::invalid_config("the model has no `path`"))?;
    let judged = preflight::loader(path).and_then(|loader| match loader {
        Loader::Ternion => options.checkpoint().recognise(path).map(drop),
        Loader::TernionOrLlamaCpp(_) => Ok(()),
        Loader::LlamaCpp(file) => preflight::check(&file),
    });
    match judged {
        // Loading says what is wrong with damaged files.
        Err(error) if error.kind() != ErrorKind::InvalidModel => Err(error),
        _ => Ok(Suitability::Able),
    }
}

/// What both ways of loading end in.
struct Loaded {
    model: LlamaCpp,
    tokenizer: Tokenizer,
    engine: EngineOptions,
}

fn load(name: &str, config: &ModelConfig, progress: &Progress) -> Result<Arc<dyn LlmBackend>> {
    let mut options = ModelOptions { llama_cpp: config.parse_options()?, ..ModelOptions::default() };
    options.threads = config.threads.unwrap_or(options.threads);
    options.context_length = config.context_length;
    options.mmap = config.mmap.unwrap_or(true);
    options.keeps_prompts = config.prompt_cache.is_some();
    options.max_sequences = config.max_sequences.unwrap_or(options.max_sequences);
    options.prefill_chunk = config.prefill_chunk.unwrap_or(options.prefill_chunk);
    let path = config.path.as_ref().ok_or_else(|| {
        Error::invalid_config(format!(
            "model `{name}` has no `path`; a folder, a .safetensors or a .gguf file expected"
        ))
    })?;

    let checkpoint = || load_checkpoint(path, name, &options, progress);
    let Loaded { model, tokenizer, mut engine } = match preflight::loader(path)? {
        Loader::Ternion if options.llama_cpp.arithmetic == Some(Arithmetic::LlamaCpp) => {
            let message = "options.arithmetic: llama-cpp is for GGUF files that llama.cpp can compute; `ternion` expected";
            return Err(Error::invalid_config(message).with("path", path.display()));
        }
        Loader::TernionOrLlamaCpp(file) if options.llama_cpp.arithmetic == Some(Arithmetic::LlamaCpp) => {
            load_gguf(&file, name, &options, progress)?
        }
        Loader::Ternion => checkpoint()?,
        Loader::LlamaCpp(file) => load_gguf(&file, name, &options, progress)?,
        Loader::TernionOrLlamaCpp(file) => match checkpoint() {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                tracing::info!(%error, "llama.cpp loads the file and computes in its own arithmetic");
                load_gguf(&file, name, &options, progress)?
            }
            result => result?,
        },
    };
    engine.configure(config);
    tracing::info!(model = name, ?options, "loaded");
    Ok(Arc::new(Engine::start(Box::new(model), tokenizer, engine)?))
}

/// A ternary checkpoint, in Ternion's arithmetic.
fn load_checkpoint(path: &Path, name: &str, options: &ModelOptions, progress: &Progress) -> Result<Loaded> {
    let mut report = |done, total| progress.report(LoadProgress::new("weights", done, total));
    let access = if options.mmap { Access::Mapped } else { Access::InMemory };
    let facts = options.llama_cpp.checkpoint();
    let (checkpoint, tokenizer) = facts.open_with_tokenizer(path, access, &mut report)?;
    checkpoint.log_notes();
    let report = checkpoint.report();
    let mut info = ModelInfo::new(name, NAME);
    info.architecture.clone_from(&checkpoint.spec.architecture);
    info.format.clone_from(&checkpoint.format);
    info.parameters = report.parameters;
    info.weight_bytes = report.mapped_bytes + report.owned_bytes;
    info.defaults = checkpoint.sampling.clone();
    let mut engine = EngineOptions::new(info);
    engine.eos_tokens.clone_from(&checkpoint.spec.eos);
    let model = LlamaCpp::new(&checkpoint, options).with("path", path.display())?;
    Ok(Loaded { model, tokenizer, engine })
}

/// Another GGUF model, in llama.cpp's arithmetic.
fn load_gguf(path: &Path, name: &str, options: &ModelOptions, progress: &Progress) -> Result<Loaded> {
    preflight::check(path)?;
    let facts = options.llama_cpp.checkpoint();
    if let Some(option) = facts.decoder_option() {
        return Err(Error::invalid_config(format!(
            "options.{option}: applies to ternary checkpoints; llama.cpp itself reads this file and takes the fact from it"
        ))
        .with("file", path.display()));
    }
    let mut parts = facts.tokenizer_parts(path)?;
    let gguf::Loaded { model, info, eos } = gguf::load(path, name, options, progress)?;
    parts.vocab_limit = Some(model.vocab_size());
    let tokenizer = Tokenizer::from_parts(parts).with("file", path.display())?;
    let mut engine = EngineOptions::new(info);
    engine.eos_tokens = eos;
    Ok(Loaded { model, tokenizer, engine })
}
