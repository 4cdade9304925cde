//! From a configuration to a running backend: opens the checkpoint, builds the decoder, starts the engine.

use std::sync::Arc;

use async_trait::async_trait;
use ternion_core::{
    Error, LlmBackend, ModelInfo, Result,
    config::ModelConfig,
    engine::{Engine, EngineOptions},
    registry::{BackendFactory, LoadProgress, Progress, load_blocking},
};
use ternion_formats::Checkpoint;

use crate::{CandleOptions, Decoder, DecoderOptions};

/// Loads models for the backend `candle`.
#[derive(Debug, Clone, Copy, Default)]
pub struct CandleFactory;

#[async_trait]
impl BackendFactory for CandleFactory {
    fn name(&self) -> &'static str {
        "candle"
    }

    fn description(&self) -> &'static str {
        "pure Rust, safetensors and GGUF checkpoints"
    }

    async fn load(
        &self,
        name: &str,
        config: &ModelConfig,
        progress: Progress,
    ) -> Result<Arc<dyn LlmBackend>> {
        load_blocking(name, config, progress, load).await
    }
}

fn load(name: &str, config: &ModelConfig, progress: &Progress) -> Result<Arc<dyn LlmBackend>> {
    let CandleOptions { head, kv_type } = config.parse_options()?;
    let path = config.path.as_ref().ok_or_else(|| {
        Error::invalid_config(format!(
            "model `{name}` has no `path`; a folder, a .gguf or a .safetensors file expected"
        ))
    })?;
    let pool = Decoder::threads(config.threads.unwrap_or(0))?;
    let checkpoint = pool.install(|| {
        Checkpoint::open_with(path, &mut |done, total| {
            progress.report(LoadProgress::new("weights", done, total));
        })
    })?;
    let tokenizer = checkpoint.tokenizer()?;

    let mut options = DecoderOptions::new(&checkpoint.spec);
    options.head = head;
    options.kv_type = kv_type;
    options.context = config.context.unwrap_or(options.context);
    options.max_sequences = config.max_sequences.unwrap_or(options.max_sequences);
    options.prefill_chunk = config.prefill_chunk.unwrap_or(options.prefill_chunk);

    let report = checkpoint.report();
    let mut info = ModelInfo::new(name, "candle");
    info.architecture.clone_from(&checkpoint.spec.architecture);
    info.format.clone_from(&checkpoint.format);
    info.parameters = report.parameters;
    info.weight_bytes = report.mapped_bytes + report.owned_bytes;
    info.defaults = checkpoint.sampling.clone();
    let mut engine = EngineOptions::new(info);
    engine.eos_tokens.clone_from(&checkpoint.spec.eos);
    engine.sampling = config.sampling.clone();
    engine.max_queued = config.max_queued.unwrap_or(engine.max_queued);

    let decoder = Decoder::new(checkpoint, pool, options)?;
    tracing::info!(model = name, context = options.context, "loaded");
    Ok(Arc::new(Engine::start(Box::new(decoder), tokenizer, engine)?))
}
