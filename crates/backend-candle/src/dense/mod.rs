//! Dense models by candle-transformers: families that Ternion's own decoder does not compute, and quantised GGUF files.
//!
//! candle-transformers has the graphs. Files are read by `ternion-formats`, which checks them, and candle gets tensors made of
//! their bytes (`weights`). What its models cannot do, `network` states and `model` works around where it is cheap: a sequence is a clone
//! that shares the weights, where the model can be cloned; logits at several positions are computed token by token; a part of a
//! sequence cannot be forgotten, so the engine computes it anew.
//!
//! Llama, Mistral and Qwen3 in safetensors, and such GGUF files of floats, stay with the own decoder: it uses weights where they
//! lie and has all that is missing here.

mod bert;
mod gguf;
mod hub;
mod model;
mod network;
mod weights;

use std::{path::Path, sync::Arc};

use ternion_core::{
    Error, LlmBackend, ModelInfo, Result, ResultExt, config::ModelConfig, registry::Progress, text::Tokenizer,
};
use ternion_engine::{Engine, EngineOptions};
use ternion_formats::{RawCheckpoint, gguf::File, gguf_file};

pub(crate) use bert::{bert, load_bert};

use crate::{CandleOptions, HeadPrecision};
use gguf::Architecture;
use hub::{Facts, Family};
use model::{DenseLm, Sizes};
use network::Network;

/// The context of Gemma 3 where the configuration does not say: each of its layers has tables for all positions.
const GEMMA3_CONTEXT: usize = 8192;

/// A dense model that has been found to be one that candle-transformers computes.
pub(crate) struct Dense(Source);

enum Source {
    Gguf(Box<gguf::Model>),
    Hub(Box<RawCheckpoint>, Family, Facts),
}

/// Looks at what is at `path`. `None`: it is for Ternion's own decoder, or for nobody.
///
/// # Errors
/// Where files are damaged, or where a model of a family that the own decoder does not know needs what candle's model has not.
pub(crate) fn find(path: &Path, context: Option<usize>) -> Result<Option<Dense>> {
    if let Some(file) = gguf_file(path)? {
        return find_gguf(File::open(&file)?.joined()?, context)
            .map(|model| model.map(|m| Dense(Source::Gguf(Box::new(m)))));
    }
    let Some(family) = RawCheckpoint::architecture_at(path)?.as_deref().and_then(Family::of) else {
        return Ok(None);
    };
    let checkpoint = RawCheckpoint::open(path)?;
    let facts = Facts::read(&checkpoint.config, family)?;
    Ok(Some(Dense(Source::Hub(Box::new(checkpoint), family, facts))))
}

fn find_gguf(file: File, context: Option<usize>) -> Result<Option<gguf::Model>> {
    let is_for_kernels =
        file.tensors().iter().any(|tensor| tensor.kind.is_ternary() || tensor.kind.is_grouped());
    let architecture = file.architecture().ok().and_then(Architecture::of).filter(|_| !is_for_kernels);
    let Some(architecture) = architecture else { return Ok(None) };
    if !architecture.is_native() {
        return gguf::Model::check(file, architecture).map(Some);
    }
    // Weights that are plain are used where they lie by the own decoder, which decodes others to floats where candle's model
    // falls short, and says what is wrong with a file.
    let is_plain =
        |name: &str| file.tensor(name).is_none_or(|t| ["F32", "F16", "BF16"].contains(&t.kind.name()));
    if is_plain("blk.0.attn_q.weight") && is_plain("blk.0.ffn_down.weight") {
        return Ok(None);
    }
    match gguf::Model::check(file, architecture) {
        Ok(model) if context.is_none_or(|context| context <= model.facts.context) => Ok(Some(model)),
        Ok(_) => Ok(None),
        Err(error) => {
            tracing::info!(%error, "the weights are decoded to floats");
            Ok(None)
        }
    }
}

/// Loads a model.
///
/// # Errors
/// Options that are not for dense models, a size out of range, and damaged files.
pub(crate) fn load(
    name: &str,
    config: &ModelConfig,
    Dense(model): Dense,
    progress: &Progress,
) -> Result<Arc<dyn LlmBackend>> {
    let options: CandleOptions = config.parse_options()?;
    check_options(config, &options)?;
    let path = config.path.as_deref().unwrap_or(Path::new(""));
    let mut info = ModelInfo::new(name, "candle");
    let facts = match &model {
        Source::Gguf(model) => model.facts,
        Source::Hub(_, _, facts) => *facts,
    };
    let context = context(config, &model, facts.context)?;
    let (network, eos): (Box<dyn Network>, Vec<u32>) = match &model {
        Source::Gguf(model) => {
            model.file.architecture()?.clone_into(&mut info.architecture);
            info.format = model.kind();
            info.parameters = model.parameters();
            info.weight_bytes = model.weight_bytes();
            info.defaults = ternion_formats::gguf::sampling_defaults(&model.file)?;
            let eos = ternion_formats::gguf::end_tokens(&model.file, facts.vocab_size)?;
            (model.load(context, progress)?, eos)
        }
        Source::Hub(checkpoint, family, facts) => {
            for assumption in &checkpoint.assumptions {
                tracing::info!(model = name, "{assumption}");
            }
            for warning in &checkpoint.warnings {
                tracing::warn!(model = name, "{warning}");
            }
            info.architecture.clone_from(&checkpoint.architecture);
            let stored = checkpoint.tensors().map(|(.., dtype, _)| dtype).next().unwrap_or_default();
            info.format = format!("safetensors ({stored}, computed in F32)");
            info.parameters =
                checkpoint.tensors().map(|(_, shape, ..)| shape.iter().product::<usize>() as u64).sum();
            info.weight_bytes = 4 * info.parameters;
            info.defaults = checkpoint.sampling.clone();
            let network = hub::load(checkpoint, *family, *facts, context, progress);
            (network.with("path", path.display())?, checkpoint.eos.clone())
        }
    };
    let mut parts = options.checkpoint().tokenizer_parts(path)?;
    parts.vocab_limit = Some(facts.vocab_size);
    let tokenizer = Tokenizer::from_parts(parts).with_operation("load").with("path", path.display())?;

    let can_fork = network.fork().is_some();
    let sizes = Sizes {
        context_length: context,
        vocab_size: facts.vocab_size,
        max_sequences: sequences(config, can_fork)?,
        prefill_chunk: config.prefill_chunk.unwrap_or(128),
    };
    let mut engine = EngineOptions::new(info);
    engine.eos_tokens = eos.into_iter().filter(|id| (*id as usize) < facts.vocab_size).collect();
    engine.configure(config);
    tracing::info!(model = name, context, "loaded with candle-transformers");
    Ok(Arc::new(Engine::start(Box::new(DenseLm::new(network, sizes)), tokenizer, engine)?))
}

/// Refuses what is for the own decoder alone.
fn check_options(config: &ModelConfig, options: &CandleOptions) -> Result<()> {
    let set = [
        ("head", !matches!(options.head, HeadPrecision::Auto | HeadPrecision::Exact)),
        ("kv_type", options.kv_type.is_some()),
        ("activations", options.activations.is_some()),
    ];
    let set = set.into_iter().find_map(|(key, is_set)| is_set.then_some(key));
    if let Some(key) = set.or(options.checkpoint().decoder_option()) {
        return Err(Error::invalid_config(format!(
            "options.{key}: does not apply to a dense model, which candle-transformers computes; leave it out"
        )));
    }
    if config.memory_limit.is_some() {
        return Err(Error::unsupported(
            "memory_limit: a dense model, which candle-transformers computes, cannot keep one; leave it out",
        ));
    }
    if !config.pin_threads.is_no() {
        return Err(Error::unsupported(
            "pin_threads: a dense model computes with candle-transformers' own threads; leave it out, or start the process with \
             `taskset`",
        ));
    }
    if config.threads.is_some() {
        tracing::warn!(
            "threads: candle-transformers computes with threads of its own; the variable RAYON_NUM_THREADS sets how many"
        );
    }
    Ok(())
}

fn context(config: &ModelConfig, model: &Source, most: usize) -> Result<usize> {
    let is_gemma3 = match model {
        Source::Gguf(model) => model.file.architecture().is_ok_and(|name| name == "gemma3"),
        Source::Hub(_, family, _) => *family == Family::Gemma3,
    };
    let default = if is_gemma3 { most.min(GEMMA3_CONTEXT) } else { most };
    match config.context_length {
        Some(context) if context > most => Err(Error::invalid_config(format!(
            "context_length: {context} is out of range; at most {most}, which candle's model computes, expected"
        ))),
        context => Ok(context.unwrap_or(default)),
    }
}

fn sequences(config: &ModelConfig, can_fork: bool) -> Result<usize> {
    match config.max_sequences {
        Some(count) if count > 1 && !can_fork => Err(Error::invalid_config(format!(
            "max_sequences: {count} is out of range; candle's model of this architecture computes one sequence at a time"
        ))),
        Some(count) => Ok(count),
        None => Ok(if can_fork { 4 } else { 1 }),
    }
}
