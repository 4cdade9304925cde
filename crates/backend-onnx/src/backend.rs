//! From a configuration to a running backend: looks at the file, loads the library, builds the decoder, starts the engine.

use std::sync::Arc;

use ternion_core::{
    Error, ErrorKind, LlmBackend, ModelInfo, Result,
    config::ModelConfig,
    registry::{BlockingFactory, LoadProgress, Progress, Suitability},
};
use ternion_engine::{CausalLm, ComputeThreads, Engine, EngineOptions};
use ternion_formats::onnx::{Host, Summary, fast};

use crate::{Decoder, DecoderOptions, Library, OnnxOptions};

/// Loads models for the backend `onnx`.
pub fn factory() -> BlockingFactory {
    BlockingFactory::new::<OnnxOptions>("onnx", "ONNX Runtime, decoders in .onnx files", load)
        .with_prompt_cache()
        .with_suitability(suitability)
}

fn suitability(config: &ModelConfig) -> Result<Suitability> {
    config.parse_options::<OnnxOptions>()?;
    let path = config.path.as_ref().ok_or_else(|| Error::invalid_config("the model has no `path`"))?;
    match Host::open(path) {
        // Loading says what is wrong with damaged files.
        Err(error) if error.kind() != ErrorKind::InvalidModel => Err(error),
        _ => Ok(Suitability::Able),
    }
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
    let OnnxOptions { library, kv_type, activations, head } = config.parse_options()?;
    let path = config.path.as_ref().ok_or_else(|| {
        Error::invalid_config(format!("model `{name}` has no `path`; a folder or a .onnx file expected"))
    })?;
    let host = Host::open(path)?;
    for warning in &host.warnings {
        tracing::warn!(model = name, "{warning}");
    }
    let summary = Summary::read(&host.model)?;
    let library = Library::load(library.as_deref())?;

    // The runtime does not tell how far it is.
    progress.report(LoadProgress::new("weights", 0, summary.data_bytes()));
    let options = DecoderOptions {
        threads: threads.clone(),
        context_length: config.context_length.unwrap_or(0),
        max_sequences: config.max_sequences.unwrap_or(DecoderOptions::default().max_sequences),
        prefill_chunk: config.prefill_chunk.unwrap_or(DecoderOptions::default().prefill_chunk),
        kv_type,
        activations: activations.unwrap_or_default(),
        head,
        mmap: config.mmap.unwrap_or(true),
    };
    if activations.is_some() && !summary.nodes.iter().any(|node| node.operator == fast::GROUPED_LINEAR) {
        return Err(Error::invalid_config(
            "options.activations: the model has no weights with a scale for each group of a row in the fast variant, which alone \
             leaves it open",
        ));
    }
    let decoder = Decoder::new(&library, &summary, &host, options)?;
    progress.report(LoadProgress::new("weights", summary.data_bytes(), summary.data_bytes()));
    let tokenizer = host.tokenizer(decoder.vocab_size())?;

    let mut info = ModelInfo::new(name, "onnx");
    info.architecture = host.architecture.clone().unwrap_or_default();
    let kind =
        if decoder.is_fast() { "fast" } else { summary.metadata("ternion.variant").unwrap_or("exported") };
    info.format = format!("onnx ({kind})");
    info.parameters = summary.metadata("ternion.parameters").and_then(|n| n.parse().ok()).unwrap_or(0);
    info.weight_bytes = summary.data_bytes();
    info.defaults = host.sampling.clone();
    // ONNX Runtime's own products of one row and of several go different ways.
    info.capabilities.batch_invariant = decoder.is_fast();
    let mut engine = EngineOptions::new(info);
    let known = |id: &u32| (*id as usize) < decoder.vocab_size();
    engine.eos_tokens = host.eos.iter().copied().filter(known).collect();
    engine.configure(config);

    tracing::info!(model = name, runtime = library.version(), context = decoder.context_length(), "loaded");
    Ok(Arc::new(Engine::start(Box::new(decoder), tokenizer, engine)?))
}
