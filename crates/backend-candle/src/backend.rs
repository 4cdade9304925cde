//! From a configuration to a running backend: opens the checkpoint, plans its memory, builds the decoder, starts the
//! engine.

use std::sync::Arc;

use ternion_core::{
    Error, ErrorKind, LlmBackend, MemoryPlan, ModelInfo, ProcessMemory, Result,
    config::ModelConfig,
    registry::{BlockingFactory, LoadProgress, Progress, Suitability},
    text::Tokenizer,
};
use ternion_engine::{ComputeThreads, Engine, EngineOptions};
use ternion_formats::{Access, Checkpoint, Recognised};

#[cfg(feature = "dense")]
use crate::dense;
use crate::embed;
use crate::plan::{self, Sizes, Taken};
use crate::{CandleOptions, Decoder};

/// Loads models for the backend `candle`.
pub fn factory() -> BlockingFactory {
    BlockingFactory::new::<CandleOptions>("candle", "pure Rust, safetensors and GGUF checkpoints", load)
        .with_plan(memory_plan)
        .with_prompt_cache()
        .with_suitability(suitability)
}

/// Ternary models and floats, wherever they lie, are what the decoder is made for; quantised dense ones have limits.
fn suitability(config: &ModelConfig) -> Result<Suitability> {
    let options: CandleOptions = config.parse_options()?;
    let path = config.path.as_ref().ok_or_else(|| Error::invalid_config("the model has no `path`"))?;
    let embeds = match embed::spec(config, &options) {
        Ok(spec) => spec.is_some(),
        Err(error) if error.kind() == ErrorKind::Unsupported => return Err(error),
        Err(_) => false,
    };
    #[cfg(not(feature = "dense"))]
    let _ = embeds;
    #[cfg(feature = "dense")]
    if embeds && dense::bert(config)?.is_some() {
        return Ok(Suitability::Native);
    }
    #[cfg(feature = "dense")]
    if !embeds {
        match dense::find(path, config.context_length) {
            Ok(None) => {}
            Err(error) if error.kind() == ErrorKind::Unsupported => return Err(error),
            // Loading says what is wrong with damaged files.
            Ok(Some(_)) | Err(_) => return Ok(Suitability::Limited),
        }
    }
    match options.checkpoint().recognise(path) {
        Ok(Recognised::AsItLies) => Ok(Suitability::Native),
        Ok(_) => Ok(Suitability::Limited),
        Err(error) if error.kind() == ErrorKind::InvalidModel => Ok(Suitability::Native),
        Err(error) => Err(crate::with_feature(error, path)),
    }
}

fn memory_plan(name: &str, config: &ModelConfig) -> Result<MemoryPlan> {
    #[cfg(feature = "dense")]
    if let Some(path) = &config.path
        && dense::find(path, config.context_length)?.is_some()
    {
        return Err(Error::unsupported(
            "the memory of a dense model, which candle-transformers computes, is not planned",
        ));
    }
    let prepare = || prepare(name, config, &Progress::none(), true);
    ComputeThreads::of(config)?.load(prepare).map(|prepared| prepared.sizes.plan)
}

fn load(name: &str, config: &ModelConfig, progress: &Progress) -> Result<Arc<dyn LlmBackend>> {
    if let Some(spec) = embed::spec(config, &config.parse_options()?)? {
        return embed::load(name, config, &spec, progress);
    }
    #[cfg(feature = "dense")]
    if let Some(path) = &config.path
        && let Some(model) = dense::find(path, config.context_length)?
    {
        return dense::load(name, config, model, progress);
    }
    let threads = ComputeThreads::of(config)?;
    threads.load(|| load_ternary(name, config, progress, &threads))
}

fn load_ternary(
    name: &str,
    config: &ModelConfig,
    progress: &Progress,
    threads: &ComputeThreads,
) -> Result<Arc<dyn LlmBackend>> {
    let prepared = prepare(name, config, progress, false).map_err(|error| match &config.path {
        Some(path) if error.kind() == ErrorKind::Unsupported => crate::with_feature(error, path),
        _ => error,
    });
    let Prepared { checkpoint, tokenizer, sizes } = prepared?;
    let Sizes { options, plan, logits_bytes } = sizes;
    checkpoint.log_notes();
    let mut info = described(name, &checkpoint);
    info.defaults = checkpoint.sampling.clone();
    let choices = plan.choices.join("; ");
    tracing::info!(model = name, memory = %plan, choices, "loading");
    info.memory = Some(plan);
    let mut engine = EngineOptions::new(info);
    engine.eos_tokens.clone_from(&checkpoint.spec.eos);
    engine.configure(config);
    engine.logits_bytes = logits_bytes;
    engine.prompt_cache = plan::prompt_cache(config);

    let decoder = Decoder::new(checkpoint, threads, options)?;
    tracing::info!(model = name, context = options.context_length, "loaded");
    Ok(Arc::new(Engine::start(Box::new(decoder), tokenizer, engine)?))
}

/// What a checkpoint tells of its model on this backend.
pub(crate) fn described(name: &str, checkpoint: &Checkpoint) -> ModelInfo {
    let report = checkpoint.report();
    let mut info = ModelInfo::new(name, "candle");
    info.architecture.clone_from(&checkpoint.spec.architecture);
    info.format.clone_from(&checkpoint.format);
    info.parameters = report.parameters;
    info.weight_bytes = report.mapped_bytes + report.owned_bytes;
    info.capabilities.batch_invariant = true; // each sum is taken in one order, whatever the batch
    info
}

/// What is known of a model before memory is taken for it.
pub(crate) struct Prepared {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) sizes: Sizes,
}

/// Opens a model and plans its memory. With a limit, or `only_planned`, no page of its weights is touched.
pub(crate) fn prepare(
    name: &str,
    config: &ModelConfig,
    progress: &Progress,
    only_planned: bool,
) -> Result<Prepared> {
    let options: CandleOptions = config.parse_options()?;
    let path = config.path.as_ref().ok_or_else(|| {
        Error::invalid_config(format!(
            "model `{name}` has no `path`; a folder, a .gguf or a .safetensors file expected"
        ))
    })?;
    let limit = config.memory_limit.map(|limit| limit.0);
    if limit.is_some() {
        plan::check_measurable(ProcessMemory::now())?;
        if config.mmap == Some(false) {
            return Err(Error::invalid_config(
                "mmap: false together with `memory_limit`, which keeps weights in memory as far as they fit and reads the \
                 others from their files; leave one of them out",
            ));
        }
    }
    let mut taken = Taken { process: plan::resident(), ..Taken::default() };
    let mut report = |done, total| progress.report(LoadProgress::new("weights", done, total));
    let (checkpoint, tokenizer) = if limit.is_none() && !only_planned {
        let access = match config.mmap {
            Some(false) => Access::InMemory,
            // With a copy of the head, what it was made from is not to stay in memory beside it.
            _ if options.head.copy().is_some() => Access::Untouched,
            _ => Access::Mapped,
        };
        let before = plan::anonymous();
        let facts = options.checkpoint();
        let both = facts.open_with_tokenizer(path, access, &mut report)?;
        taken.tokenizer = plan::anonymous().saturating_sub(before + both.0.report().owned_bytes);
        both
    } else {
        let left = limit.map_or(u64::MAX, |limit| limit.saturating_sub(taken.process));
        let facts = options.checkpoint();
        let checkpoint = facts.open_within(path, left, &mut report)?;
        let before = plan::resident();
        let tokenizer = checkpoint.tokenizer()?;
        taken.tokenizer = plan::resident().saturating_sub(before);
        (checkpoint, tokenizer)
    };
    if limit.is_some() {
        taken.reusable = plan::reusable(taken.tokenizer).min(taken.tokenizer);
    }
    let sizes = plan::sizes(&checkpoint, config, &options, taken)?;
    Ok(Prepared { checkpoint, tokenizer, sizes })
}
