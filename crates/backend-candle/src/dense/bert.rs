//! BERT for embeddings, by candle-transformers: the encoder of most small models of sentence-transformers.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use candle_transformers::models::bert::{BertModel, Config, HiddenAct};
use ternion_core::{
    Error, LlmBackend, ModelInfo, Pooling, Result, ResultExt, config::ModelConfig, registry::Progress,
    text::Tokenizer,
};
use ternion_engine::{EmbeddingEngine, EmbeddingModel};
use ternion_formats::{EmbeddingSpec, JsonObject, RawCheckpoint};

use super::{check_options, weights::Weights};
use crate::{CandleOptions, embed::Pool, projection::Projections};

const MAX_WIDTH: u64 = 1 << 20;
/// Tokens of one step.
const STEP: usize = 2048;
const INPUTS: usize = 16;
const MAX_QUEUED: usize = 64;

/// A checkpoint of BERT.
pub(crate) struct Bert {
    checkpoint: RawCheckpoint,
    config: Config,
}

/// The BERT at the path of a configuration; `None` where there is another model.
///
/// # Errors
/// Where its configuration asks for what candle's model does not compute, and those of opening it.
pub(crate) fn bert(config: &ModelConfig) -> Result<Option<Bert>> {
    let Some(path) = &config.path else { return Ok(None) };
    if RawCheckpoint::architecture_at(path)?.as_deref() != Some("bert") {
        return Ok(None);
    }
    let checkpoint = RawCheckpoint::open(path)?;
    let config = read(&checkpoint.config)?;
    Ok(Some(Bert { checkpoint, config }))
}

fn read(config: &JsonObject) -> Result<Config> {
    let size = |key: &str| config.required_integer(key, 1..=MAX_WIDTH);
    let (hidden, heads) = (size("hidden_size")?, size("num_attention_heads")?);
    if !hidden.is_multiple_of(heads) {
        return Err(config.invalid("num_attention_heads", &heads, &format!("a divisor of {hidden}")));
    }
    if let Some(other) = config.string("position_embedding_type")?.filter(|kind| *kind != "absolute") {
        return Err(config.unsupported("position_embedding_type", &other, "absolute"));
    }
    let hidden_act = match config.string("hidden_act")?.unwrap_or("gelu") {
        "gelu" => HiddenAct::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" => HiddenAct::GeluApproximate,
        "relu" => HiddenAct::Relu,
        other => return Err(config.unsupported("hidden_act", &other, "gelu, gelu_new, relu")),
    };
    if config.boolean("is_decoder")? == Some(true) {
        return Err(config.unsupported("is_decoder", &true, "false"));
    }
    Ok(Config {
        vocab_size: size("vocab_size")?,
        hidden_size: hidden,
        num_hidden_layers: config.required_integer("num_hidden_layers", 1..=1024)?,
        num_attention_heads: heads,
        intermediate_size: size("intermediate_size")?,
        hidden_act,
        max_position_embeddings: size("max_position_embeddings")?,
        type_vocab_size: config.integer("type_vocab_size", 1..=MAX_WIDTH)?.unwrap_or(2),
        layer_norm_eps: f64::from(config.number("layer_norm_eps", 0.0..=1.0)?.unwrap_or(1e-12)),
        model_type: None,
        ..Config::default()
    })
}

/// Loads it.
///
/// # Errors
/// Damaged files, and sizes out of range.
pub(crate) fn load_bert(
    name: &str,
    config: &ModelConfig,
    spec: &EmbeddingSpec,
    Bert { checkpoint, config: bert }: &Bert,
    progress: &Progress,
) -> Result<Arc<dyn LlmBackend>> {
    let options: CandleOptions = config.parse_options()?;
    check_options(config, &options)?;
    let path = config.path.as_deref().unwrap_or(Path::new(""));
    let most = bert.max_position_embeddings;
    let context = match config.context_length {
        Some(context) if context > most => {
            let message = format!(
                "context_length: {context} is out of range; at most {most}, the model's own, expected"
            );
            return Err(Error::invalid_config(message));
        }
        Some(context) => context,
        None => spec.max_tokens.map_or(most, |wanted| wanted.min(most)),
    };
    // Files also hold the pooler of BERT's first training, and positions that follow from their number.
    let is_used = |name: &str| {
        !name.contains("pooler.") && !name.ends_with("position_ids") && !name.starts_with("cls.")
    };
    let names: Vec<String> =
        checkpoint.tensors().map(|(name, ..)| name.to_owned()).filter(|name| is_used(name)).collect();
    let prefix = if checkpoint.contains("bert.embeddings.word_embeddings.weight") { "bert." } else { "" };
    let total = checkpoint.tensors().map(|(_, shape, ..)| shape.iter().product::<usize>() as u64).sum();
    let weights = Weights::new(names, total, progress, |name| {
        Ok(checkpoint.dense(name)?.map(|tensor| (tensor.shape.clone(), tensor.to_f32())))
    });
    let model = weights.build(|builder| {
        let builder = if prefix.is_empty() { builder } else { builder.pp("bert") };
        BertModel::load(builder, bert)
    });
    let model = model.with("path", path.display())?;

    let mut info = ModelInfo::new(name, "candle");
    info.architecture.clone_from(&checkpoint.architecture);
    let stored = checkpoint.tensors().map(|(.., dtype, _)| dtype).next().unwrap_or_default();
    info.format = format!("safetensors ({stored}, computed in F32)");
    info.parameters = total;
    info.weight_bytes = 4 * total;
    let mut parts = options.checkpoint().tokenizer_parts(path)?;
    parts.vocab_limit = Some(bert.vocab_size);
    let tokenizer = Tokenizer::from_parts(parts).with_operation("load").with("path", path.display())?;
    let embedder = BertEmbedder {
        model,
        pooling: spec.pooling,
        projections: Projections::load(spec, bert.hidden_size)?,
        context_length: context,
        vocab_size: bert.vocab_size,
    };
    tracing::info!(model = name, context, pooling = %spec.pooling, "loaded with candle-transformers for embeddings");
    let queued = config.max_queued.unwrap_or(MAX_QUEUED);
    let embedding = spec.info(bert.hidden_size);
    Ok(Arc::new(EmbeddingEngine::start(Box::new(embedder), tokenizer, info, embedding, queued)?))
}

struct BertEmbedder {
    model: BertModel,
    pooling: Pooling,
    projections: Projections,
    context_length: usize,
    vocab_size: usize,
}

impl BertEmbedder {
    /// All inputs of one length in one pass, so that nothing has to be masked.
    fn states(&self, inputs: &[&[u32]]) -> candle_core::Result<Vec<Vec<Vec<f32>>>> {
        let length = inputs.first().map_or(0, |input| input.len());
        let ids: Vec<u32> = inputs.iter().flat_map(|input| input.iter().copied()).collect();
        let ids = Tensor::from_vec(ids, (inputs.len(), length), &Device::Cpu)?;
        let kinds = ids.zeros_like()?;
        self.model.forward(&ids, &kinds, None)?.to_dtype(DType::F32)?.to_vec3()
    }
}

impl EmbeddingModel for BertEmbedder {
    fn context_length(&self) -> usize {
        self.context_length
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_batch_tokens(&self) -> usize {
        STEP
    }

    fn max_batch_inputs(&self) -> usize {
        INPUTS
    }

    fn pool(&mut self, inputs: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let mut pooled = vec![Vec::new(); inputs.len()];
        let mut order: Vec<usize> = (0..inputs.len()).collect();
        order.sort_by_key(|&index| inputs[index].len());
        for alike in order.chunk_by(|&a, &b| inputs[a].len() == inputs[b].len()) {
            let group: Vec<&[u32]> = alike.iter().map(|&index| inputs[index]).collect();
            let states = self
                .states(&group)
                .map_err(|e| Error::backend("candle cannot compute the step").with_source(e))?;
            for (&index, rows) in alike.iter().zip(states) {
                let mut pool = Pool::new(self.pooling);
                for row in &rows {
                    pool.add(row);
                }
                pooled[index] = self.projections.apply(pool.finish()?)?;
            }
        }
        Ok(pooled)
    }
}
