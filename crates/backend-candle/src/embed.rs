//! Embeddings: the hidden states behind the final norm of Ternion's own decoder, pooled.

use std::sync::Arc;

use ternion_core::{Error, LlmBackend, Pooling, Result, ResultExt, config::ModelConfig, registry::Progress};
use ternion_engine::{ComputeThreads, EmbeddingEngine, EmbeddingModel};
use ternion_formats::EmbeddingSpec;

use crate::backend::{Prepared, described, prepare};
use crate::plan::Sizes;
use crate::projection::Projections;
use crate::{CandleOptions, Decoder};

/// Tokens of one step.
const STEP: usize = 512;
/// Inputs of one step.
const INPUTS: usize = 16;
/// Requests that may wait, unless the configuration says otherwise.
const MAX_QUEUED: usize = 64;

/// How the model of a configuration makes embeddings; `None` for one that generates.
///
/// # Errors
/// Those of [`EmbeddingSpec::at`].
pub(crate) fn spec(config: &ModelConfig, options: &CandleOptions) -> Result<Option<EmbeddingSpec>> {
    let Some(path) = &config.path else { return Ok(None) };
    let mut spec = match (EmbeddingSpec::at(path)?, options.pooling) {
        (spec, None) => spec,
        (Some(spec), Some(pooling)) => Some(spec.with_pooling(pooling)),
        (None, Some(pooling)) => Some(EmbeddingSpec::new(pooling)),
    };
    if let Some(spec) = &mut spec {
        spec.normalized = options.normalize.unwrap_or(spec.normalized);
        if let Some(matryoshka) = options.matryoshka {
            spec.shortened = matryoshka.then(Vec::new);
        }
    }
    Ok(spec)
}

/// Loads a model for embeddings.
///
/// # Errors
/// Those of loading the checkpoint.
pub(crate) fn load(
    name: &str,
    config: &ModelConfig,
    spec: &EmbeddingSpec,
    progress: &Progress,
) -> Result<Arc<dyn LlmBackend>> {
    #[cfg(feature = "dense")]
    if let Some(model) = crate::dense::bert(config)? {
        return crate::dense::load_bert(name, config, spec, &model, progress);
    }
    let mut config = config.clone();
    if config.context_length.is_none() {
        config.context_length = spec.max_tokens;
    }
    // There are no logits, so the head needs no copy.
    config.options.insert("head".to_owned(), "exact".into());
    let threads = ComputeThreads::of(&config)?;
    threads.load(|| load_decoder(name, &config, spec, progress, &threads))
}

fn load_decoder(
    name: &str,
    config: &ModelConfig,
    spec: &EmbeddingSpec,
    progress: &Progress,
    threads: &ComputeThreads,
) -> Result<Arc<dyn LlmBackend>> {
    let Prepared { checkpoint, tokenizer, sizes } = prepare(name, config, progress, false)?;
    let Sizes { options, plan, .. } = sizes;
    checkpoint.log_notes();
    let mut info = described(name, &checkpoint);
    info.memory = Some(plan);
    let embedding = spec.info(checkpoint.spec.hidden_size);
    let projections = Projections::load(spec, checkpoint.spec.hidden_size)?;
    let decoder = Decoder::new(checkpoint, threads, options)?;
    let most = options.context_length;
    let model = DecoderEmbedder { decoder, pooling: spec.pooling, projections, context_length: most };
    tracing::info!(model = name, context = most, pooling = %spec.pooling, "loaded for embeddings");
    let queued = config.max_queued.unwrap_or(MAX_QUEUED);
    Ok(Arc::new(EmbeddingEngine::start(Box::new(model), tokenizer, info, embedding, queued)?))
}

/// A decoder whose hidden states are pooled.
struct DecoderEmbedder {
    decoder: Decoder,
    pooling: Pooling,
    projections: Projections,
    context_length: usize,
}

impl EmbeddingModel for DecoderEmbedder {
    fn context_length(&self) -> usize {
        self.context_length
    }

    fn vocab_size(&self) -> usize {
        ternion_engine::CausalLm::vocab_size(&self.decoder)
    }

    fn max_batch_tokens(&self) -> usize {
        STEP
    }

    fn max_batch_inputs(&self) -> usize {
        INPUTS
    }

    fn pool(&mut self, inputs: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let mut pools: Vec<Pool> = inputs.iter().map(|_| Pool::new(self.pooling)).collect();
        let short = inputs.iter().map(|input| input.len()).sum::<usize>() <= STEP;
        let outcome = if short {
            self.decoder.hidden(inputs, STEP, |input, row| pools[input].add(row))
        } else {
            // One after the other, each in pieces.
            inputs
                .iter()
                .zip(&mut pools)
                .try_for_each(|(input, pool)| self.decoder.hidden(&[input], STEP, |_, row| pool.add(row)))
        };
        outcome.with_operation("embed")?;
        pools.into_iter().map(|pool| self.projections.apply(pool.finish()?)).collect()
    }
}

/// What has come of an input's hidden states.
pub(crate) struct Pool {
    pooling: Pooling,
    rows: usize,
    sum: Vec<f64>,
}

impl Pool {
    pub(crate) fn new(pooling: Pooling) -> Self {
        Self { pooling, rows: 0, sum: Vec::new() }
    }

    /// Takes the next row.
    pub(crate) fn add(&mut self, row: &[f32]) {
        self.rows += 1;
        let row = row.iter().map(|x| f64::from(*x));
        match self.pooling {
            Pooling::Cls if self.rows > 1 => {}
            Pooling::Mean if self.rows > 1 => self.sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x),
            _ => self.sum = row.collect(),
        }
    }

    /// The vector.
    ///
    /// # Errors
    /// For a way of pooling that is not known.
    pub(crate) fn finish(self) -> Result<Vec<f32>> {
        let count = match self.pooling {
            Pooling::Mean => self.rows.max(1) as f64,
            Pooling::Cls | Pooling::Last => 1.0,
            other => {
                let message = format!("options.pooling: `{other}`; mean, cls or last expected");
                return Err(Error::invalid_config(message));
            }
        };
        Ok(self.sum.into_iter().map(|x| (x / count) as f32).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_pooled() {
        let pooled = |pooling| {
            let mut pool = Pool::new(pooling);
            for row in [[1.0, 2.0], [3.0, 6.0]] {
                pool.add(&row);
            }
            pool.finish()
        };
        assert_eq!(pooled(Pooling::Mean).unwrap(), [2.0, 4.0]);
        assert_eq!(pooled(Pooling::Cls).unwrap(), [1.0, 2.0]);
        assert_eq!(pooled(Pooling::Last).unwrap(), [3.0, 6.0]);
        assert!(pooled(Pooling::Unknown).is_err());
    }
}
