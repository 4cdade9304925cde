//! The decoder: one graph for all families, which differ by what their [`Checkpoint`] has (sub-norms, activation,
//! projections that are ternary or plain).

use std::{cell::RefCell, sync::Arc};

use candle_core::{Device, Tensor};
use candle_nn::rotary_emb::rope_thd;
use ternion_core::{
    CausalLm, Error, ErrorKind, LogitsWanted, Result, SequenceId, SequenceInput,
    batch::{self, Span},
    kv::{KvCache, KvType},
};
use ternion_formats::{Activation, Checkpoint, DenseTensor, LayerTensors, ModelSpec};

use crate::{
    HeadPrecision,
    head::Head,
    ops::{self, CachedAttention, GatedUnit, Norm, Projections},
};

/// Sizes that a host may set.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct DecoderOptions {
    /// Tokens that a sequence may hold.
    pub context: usize,
    /// Sequences that may exist at the same time.
    pub max_sequences: usize,
    /// The most tokens of one step.
    pub prefill_chunk: usize,
    /// What logits are computed from.
    pub head: HeadPrecision,
    /// How keys and values are stored.
    pub kv_type: KvType,
}

impl DecoderOptions {
    /// The model's whole context, 4 sequences, prefill in chunks of 128 tokens.
    pub fn new(spec: &ModelSpec) -> Self {
        Self {
            context: spec.context_length,
            max_sequences: 4,
            prefill_chunk: 128,
            head: HeadPrecision::Exact,
            kv_type: KvType::F32,
        }
    }
}

/// A decoder with its weights and KV caches.
pub struct Decoder {
    options: DecoderOptions,
    vocab_size: usize,
    embed: DenseTensor,
    layers: Vec<Layer>,
    final_norm: Norm,
    head: Head,
    /// Angle per position of each pair of dimensions, `[head_dim / 2]`.
    frequencies: Vec<f32>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    cache: KvCache,
    pool: Arc<rayon::ThreadPool>,
}

struct Layer {
    input_norm: Norm,
    qkv: Projections,
    attn_sub_norm: Option<Norm>,
    o: Projections,
    post_attention_norm: Norm,
    gate_up: Projections,
    activation: GatedUnit,
    ffn_sub_norm: Option<Norm>,
    down: Projections,
}

impl Layer {
    fn new(tensors: LayerTensors, activation: Activation) -> Self {
        let t = tensors;
        Self {
            input_norm: Norm(t.input_norm),
            qkv: Projections::new(vec![t.q, t.k, t.v]),
            attn_sub_norm: t.attn_sub_norm.map(Norm),
            o: Projections::new(vec![t.o]),
            post_attention_norm: Norm(t.post_attention_norm),
            gate_up: Projections::new(vec![t.gate, t.up]),
            activation: GatedUnit(activation),
            ffn_sub_norm: t.ffn_sub_norm.map(Norm),
            down: Projections::new(vec![t.down]),
        }
    }
}

impl Decoder {
    /// The threads that a decoder computes with; 0 takes one for each core.
    ///
    /// # Errors
    /// [`ErrorKind::ResourceExhausted`] where they cannot be started.
    pub fn threads(count: usize) -> Result<Arc<rayon::ThreadPool>> {
        rayon::ThreadPoolBuilder::new()
            .num_threads(count)
            .thread_name(|i| format!("ternion-compute-{i}"))
            .build()
            .map(Arc::new)
            .map_err(|e| Error::new(ErrorKind::ResourceExhausted, "cannot start the threads").with_source(e))
    }

    /// A decoder on the tensors of `checkpoint`; none of the mapped ones is copied.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] for a size that is 0 or a context beyond the model's.
    pub fn new(
        checkpoint: Checkpoint,
        pool: Arc<rayon::ThreadPool>,
        options: DecoderOptions,
    ) -> Result<Self> {
        let spec = &checkpoint.spec;
        let positive = [
            ("context", options.context),
            ("max_sequences", options.max_sequences),
            ("prefill_chunk", options.prefill_chunk),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(Error::invalid_config(format!("{key}: 0 is out of range; at least 1 expected")));
        }
        if options.context > spec.context_length {
            return Err(Error::invalid_config(format!(
                "context: {} is out of range; at most {}, the model's own, expected",
                options.context, spec.context_length
            )));
        }
        let head = checkpoint.head.clone().unwrap_or_else(|| checkpoint.embed.clone());
        let head = pool.install(|| Head::new(head, options.head == HeadPrecision::Int8));
        Ok(Self {
            options,
            vocab_size: spec.vocab_size,
            frequencies: spec.rope.frequencies(spec.head_dim),
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            cache: KvCache::new(spec.kv_layout(), options.kv_type),
            layers: {
                let activation = spec.activation;
                checkpoint.layers.into_iter().map(|l| Layer::new(l, activation)).collect()
            },
            head,
            embed: checkpoint.embed,
            final_norm: Norm(checkpoint.final_norm),
            pool,
        })
    }

    fn run(&mut self, batch: &[SequenceInput<'_>], spans: &[Span], logits: &mut Vec<f32>) -> Result<()> {
        for span in spans {
            self.cache.reserve(span.sequence, span.count)?;
        }
        let h = self.hidden_states(batch, spans).map_err(candle_error)?;
        self.head(&h, batch, spans, logits).map_err(candle_error)
    }

    /// The hidden states after the last layer, `[T, hidden]`.
    fn hidden_states(&mut self, batch: &[SequenceInput<'_>], spans: &[Span]) -> candle_core::Result<Tensor> {
        let tokens: usize = spans.iter().map(|s| s.count).sum();
        let hidden = self.embed.shape[1];
        let mut rows = vec![0.0; tokens * hidden];
        let ids = batch.iter().flat_map(|input| input.tokens);
        for (&id, row) in ids.zip(rows.chunks_exact_mut(hidden)) {
            self.embed.view().row(id as usize, row);
        }
        let mut h = Tensor::from_vec(rows, (tokens, hidden), &Device::Cpu)?;
        let (cos, sin) = self.rotations(spans, tokens)?;
        let (width, kv_width) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let rotate = |x: &Tensor, heads: usize| -> candle_core::Result<Tensor> {
            rope_thd(&x.contiguous()?.reshape((1, tokens, heads, self.head_dim))?, &cos, &sin)
        };
        for (index, layer) in self.layers.iter().enumerate() {
            let qkv = layer.qkv.forward(&layer.input_norm.forward(&h)?)?;
            let q = rotate(&qkv.narrow(1, 0, width)?, self.heads)?;
            let k = rotate(&qkv.narrow(1, width, kv_width)?, self.kv_heads)?;
            let v = qkv.narrow(1, width + kv_width, kv_width)?.contiguous()?;
            let attention = CachedAttention {
                cache: RefCell::new(&mut self.cache),
                layer: index,
                spans,
                heads: self.heads,
                kv_heads: self.kv_heads,
                head_dim: self.head_dim,
            };
            let mut o = q.apply_op3_no_bwd(&k, &v, &attention)?;
            if let Some(norm) = &layer.attn_sub_norm {
                o = norm.forward(&o)?;
            }
            h = (h + layer.o.forward(&o)?)?;
            let gate_up = layer.gate_up.forward(&layer.post_attention_norm.forward(&h)?)?;
            let mut g = gate_up.apply_op1_no_bwd(&layer.activation)?;
            if let Some(norm) = &layer.ffn_sub_norm {
                g = norm.forward(&g)?;
            }
            h = (h + layer.down.forward(&g)?)?;
        }
        Ok(h)
    }

    /// Cosines and sines of the rotary embedding for each token of the batch, `[T, head_dim / 2]`.
    fn rotations(&self, spans: &[Span], tokens: usize) -> candle_core::Result<(Tensor, Tensor)> {
        let angles: Vec<f32> = spans
            .iter()
            .flat_map(|s| s.past..s.past + s.count)
            .flat_map(|position| self.frequencies.iter().map(move |f| position as f32 * f))
            .collect();
        let angles = Tensor::from_vec(angles, (tokens, self.frequencies.len()), &Device::Cpu)?;
        Ok((angles.cos()?, angles.sin()?))
    }

    /// The rows of logits that the batch asks for.
    fn head(
        &self,
        h: &Tensor,
        batch: &[SequenceInput<'_>],
        spans: &[Span],
        logits: &mut Vec<f32>,
    ) -> candle_core::Result<()> {
        let mut wanted = Vec::new();
        for (input, span) in batch.iter().zip(spans) {
            let first = match input.logits {
                LogitsWanted::None => continue,
                LogitsWanted::Last => span.count - 1,
                LogitsWanted::From(first) => first.min(span.count),
            };
            wanted.extend((span.start + first..span.start + span.count).map(|i| i as u32));
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let count = wanted.len();
        let rows = h.index_select(&Tensor::from_vec(wanted, count, &Device::Cpu)?, 0)?;
        let rows = self.final_norm.forward(&rows)?;
        logits.resize(count * self.vocab_size, 0.0);
        let (storage, layout) = rows.storage_and_layout();
        let candle_core::Storage::Cpu(storage) = &*storage else {
            candle_core::bail!("a tensor on the CPU expected")
        };
        self.head.forward(ops::floats(storage, layout)?, logits);
        Ok(())
    }
}

impl CausalLm for Decoder {
    fn context_length(&self) -> usize {
        self.options.context
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_sequences(&self) -> usize {
        self.options.max_sequences
    }

    fn max_batch_tokens(&self) -> usize {
        self.options.prefill_chunk
    }

    fn new_sequence(&mut self) -> Result<SequenceId> {
        batch::room_for_one(self.cache.sequences(), self.options.max_sequences)?;
        Ok(self.cache.create())
    }

    fn forward(&mut self, batch: &[SequenceInput<'_>], logits: &mut Vec<f32>) -> Result<()> {
        logits.clear();
        let length = |id| self.cache.length(id);
        let spans = batch::spans(batch, length, self.options.context, self.vocab_size)?;
        let pool = Arc::clone(&self.pool);
        let outcome = pool.install(|| self.run(batch, &spans, logits));
        for span in &spans {
            match outcome {
                Ok(()) => self.cache.advance(span.sequence, span.count),
                Err(_) => self.cache.truncate(span.sequence, span.past),
            }
        }
        outcome
    }

    fn len(&self, sequence: SequenceId) -> usize {
        self.cache.length(sequence).unwrap_or(0)
    }

    fn truncate(&mut self, sequence: SequenceId, length: usize) -> Result<()> {
        self.cache.truncate(sequence, length);
        Ok(())
    }

    fn fork(&mut self, sequence: SequenceId, length: usize) -> Result<SequenceId> {
        batch::room_for_one(self.cache.sequences(), self.options.max_sequences)?;
        self.cache.fork(sequence, length)
    }

    fn free(&mut self, sequence: SequenceId) {
        self.cache.free(sequence);
    }
}

fn candle_error(error: candle_core::Error) -> Error {
    Error::backend("the decoder failed").with_source(error)
}
