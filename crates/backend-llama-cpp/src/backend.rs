//! From a configuration to a running backend: opens the checkpoint, or lets llama.cpp do it, and starts the engine.

use std::{path::Path, sync::Arc};

use ternion_core::{
    Error, ErrorKind, LlmBackend, ModelInfo, Result, ResultExt,
    config::ModelConfig,
    registry::{BlockingFactory, LoadProgress, Progress, Suitability},
    text::{Tokenizer, TokenizerParts},
};
use ternion_engine::{CausalLm, ComputeThreads, EmbeddingEngine, Engine, EngineOptions};
use ternion_formats::{Access, EmbeddingSpec, gguf as formats_gguf};

use crate::{
    Arithmetic, HeadKind, LlamaCpp, LlamaCppOptions, ModelOptions, gguf,
    preflight::{self, Loader},
    vocabulary,
};

/// Requests for embeddings that may wait, unless the configuration says otherwise.
const MAX_QUEUED: usize = 64;

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
    let is_embedder = options.pooling.is_some() || EmbeddingSpec::at(path).is_ok_and(|spec| spec.is_some());
    let judged = preflight::loader(path).and_then(|loader| match loader {
        Loader::Ternion | Loader::TernionOrLlamaCpp(_) if is_embedder => Err(no_embedder(path)),
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
    let threads = ComputeThreads::of(config)?;
    threads.load(|| load_with(name, config, progress, &threads))
}

fn load_with(
    name: &str,
    config: &ModelConfig,
    progress: &Progress,
    threads: &ComputeThreads,
) -> Result<Arc<dyn LlmBackend>> {
    let mut options = ModelOptions { llama_cpp: config.parse_options()?, ..ModelOptions::default() };
    options.threads = threads.clone();
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

    if let Some(model) = load_embedder(path, name, &options, progress, config.max_queued)? {
        return Ok(model);
    }
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
    if options.llama_cpp.head != HeadKind::Auto {
        let message = "options.head: llama.cpp itself computes the logits of this file; leave it out";
        return Err(Error::invalid_config(message).with("file", path.display()));
    }
    let gguf::Loaded { model, info, eos } = gguf::load(path, name, options, progress)?;
    let tokenizer = tokenizer(path, options, model.vocab_size())?;
    let mut engine = EngineOptions::new(info);
    engine.eos_tokens = eos;
    Ok(Loaded { model, tokenizer, engine })
}

/// A model for embeddings; `None` for one that is not made for them. Ternary ones are for `candle`.
fn load_embedder(
    path: &Path,
    name: &str,
    options: &ModelOptions,
    progress: &Progress,
    max_queued: Option<usize>,
) -> Result<Option<Arc<dyn LlmBackend>>> {
    let own = options.llama_cpp.pooling;
    let Some(file) = ternion_formats::gguf_file(path)? else {
        return match own.map(EmbeddingSpec::new).or(EmbeddingSpec::at(path)?) {
            None => Ok(None),
            Some(_) => Err(no_embedder(path)),
        };
    };
    let Some(mut spec) = EmbeddingSpec::at(&file)?.or(own.map(EmbeddingSpec::new)) else { return Ok(None) };
    if preflight::loader(&file)? != Loader::LlamaCpp(file.clone()) {
        return Err(no_embedder(path));
    }
    preflight::check(&file)?;
    let (model, info) = gguf::load_embedder(&file, name, own, options, progress)?;
    spec.pooling = model.pooling();
    spec.normalized = options.llama_cpp.normalize.unwrap_or(true);
    spec.shortened = options.llama_cpp.matryoshka.unwrap_or(false).then(Vec::new);
    let embedding = spec.info(model.dimensions());
    let tokenizer = tokenizer(&file, options, ternion_engine::EmbeddingModel::vocab_size(&model))?;
    tracing::info!(model = name, ?options, "loaded for embeddings");
    let engine = EmbeddingEngine::start(
        Box::new(model),
        tokenizer,
        info,
        embedding,
        max_queued.unwrap_or(MAX_QUEUED),
    )?;
    Ok(Some(Arc::new(engine)))
}

fn no_embedder(path: &Path) -> Error {
    Error::unsupported(
        "llama.cpp makes embeddings of GGUF files that it computes by itself, and of no others",
    )
    .with("path", path.display())
    .with("runs with", "the backend `candle`")
}

/// The tokenizer of a file that llama.cpp computes. Ours, which the other backends have too, reads a `tokenizer.json` in the file's
/// folder or in its metadata, SentencePiece, and byte-level BPE that splits by a rule it knows by name. Where it has no equal, and
/// where no rule is named, llama.cpp's own. Ternary models keep ours, so that the arithmetic changes no token.
fn tokenizer(path: &Path, options: &ModelOptions, vocab_size: usize) -> Result<Tokenizer> {
    let facts = options.llama_cpp.checkpoint();
    let build = |mut parts: TokenizerParts| {
        parts.vocab_limit = Some(vocab_size);
        Tokenizer::from_parts(parts).with("file", path.display())
    };
    let ours = || facts.tokenizer_parts(path).and_then(&build);
    // A `tokenizer.json` beside the file is the model's own; what is wrong with it is told.
    if path.with_file_name("tokenizer.json").exists() {
        return ours();
    }
    let file = formats_gguf::File::open(path)?;
    let is_ternary = preflight::loader(path)? != Loader::LlamaCpp(path.to_owned());
    let mut warnings = Vec::new();
    if !is_ternary && formats_gguf::splits_by_default(&file, &facts)? {
        warnings = facts.tokenizer_parts(path).map(|ours| ours.warnings).unwrap_or_default();
    } else {
        match ours() {
            Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::InvalidModel) => {
                tracing::info!(%error, "llama.cpp tokenizes by itself");
            }
            result => return result,
        }
    }
    let mut parts = vocabulary::parts(path, formats_gguf::chat_template(&file)?)?;
    parts.add_bos_token = facts.add_bos;
    parts.bos_id = facts.bos;
    parts.warnings = warnings;
    build(parts)
}
