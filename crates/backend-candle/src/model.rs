//! The decoder: one graph for all families, which differ by what their [`Checkpoint`] has (sub-norms, activation,
//! projections that are ternary or plain).

use std::{cell::RefCell, ops::Range, path::PathBuf, sync::Arc};

use candle_core::{Device, Tensor};
use sha2::{Digest, Sha256};
use ternion_core::{Error, Result};
use ternion_engine::{
    CausalLm, ComputeThreads, KvIdentity, LogitsPrecision, LogitsWanted, SequenceId, SequenceInput,
    batch::{self, Span},
    kv::{BLOCK, KeyRotation, KvCache, KvPrefix, KvType},
};
use ternion_formats::{Checkpoint, FileWatch, ModelSpec, RmsNorm, RopeSpec, Table};
use ternion_kernels::{ActivationType, Attention, Isa, Team};

use crate::{
    HeadPrecision,
    head::Head,
    layer::{Layer, Layers, Scratch},
    ops,
    residency::{Budget, Placement},
    stream::Stream,
};

/// Sizes that a host may set.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct DecoderOptions {
    /// Tokens that a sequence may hold.
    pub context_length: usize,
    /// Sequences that may exist at the same time.
    pub max_sequences: usize,
    /// The most tokens of one step.
    pub prefill_chunk: usize,
    /// What logits are computed from.
    pub head: HeadPrecision,
    /// Bytes of weights that are kept in memory; the others are read from their file for each step, with the same
    /// results. `None`: all lie in the mapped file.
    pub resident_weights: Option<u64>,
    /// How keys and values are stored. A model whose keys or values are no sums takes [`KvType::F32`] for [`KvType::Exact`].
    pub kv_type: KvType,
    /// How activations are represented in products with weights that have a scale for each group of a row.
    pub activations: ActivationType,
}

impl DecoderOptions {
    /// The model's whole context, 4 sequences, prefill in chunks of 128 tokens (256 with AMX, where codes are unpacked for each
    /// chunk), keys and values as they are.
    pub fn new(spec: &ModelSpec) -> Self {
        Self {
            context_length: spec.context_length,
            max_sequences: 4,
            prefill_chunk: if Isa::detect() == Isa::Amx { 256 } else { 128 },
            head: HeadPrecision::Auto,
            resident_weights: None,
            kv_type: KvType::Exact,
            activations: ActivationType::default(),
        }
    }
}

/// A decoder with its weights and KV caches.
pub struct Decoder {
    options: DecoderOptions,
    vocab_size: usize,
    embed: Table,
    layers: Vec<Layer>,
    final_norm: RmsNorm,
    head: Head,
    /// Angle per position of each pair of dimensions, `[head_dim / 2]`.
    frequencies: Vec<f32>,
    rope: RopeSpec,
    /// The rotary embedding of the positions that have been computed, where keys are stored without it.
    rotations: Vec<KeyRotation>,
    attention: Attention,
    cache: KvCache,
    scratch: Scratch,
    /// Where not all weights are kept in memory.
    stream: Option<Arc<Stream>>,
    team: Arc<Team>,
    /// The files that weights are read from.
    watch: FileWatch,
    /// What keys and values depend on, in words.
    facts: String,
    /// All files of weights, also those that were read into memory.
    files: Vec<PathBuf>,
}

impl Decoder {
    /// A decoder on the tensors of `checkpoint`, with threads of its own; none of the mapped tensors is copied unless `resident_weights`
    /// is set.
    ///
    /// # Errors
    /// [`ResourceExhausted`](ternion_core::ErrorKind::ResourceExhausted) where the threads cannot be started;
    /// [`InvalidConfig`](ternion_core::ErrorKind::InvalidConfig) for a size that is 0 or a context beyond the model's;
    /// [`Io`](ternion_core::ErrorKind::Io) where weights that are to be kept in memory cannot be read;
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where a file has changed since the
    /// checkpoint was opened.
    pub fn new(
        mut checkpoint: Checkpoint,
        threads: &ComputeThreads,
        mut options: DecoderOptions,
    ) -> Result<Self> {
        let team = Arc::new(threads.team()?);
        let watch = checkpoint.watch()?;
        options.kv_type = checkpoint.kv_type(Some(options.kv_type));
        let head = checkpoint.head_or_embed().clone();
        let spec = &checkpoint.spec;
        let positive = [
            ("context_length", options.context_length),
            ("max_sequences", options.max_sequences),
            ("prefill_chunk", options.prefill_chunk),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(Error::invalid_config(format!("{key}: 0 is out of range; at least 1 expected")));
        }
        spec.check_context(options.context_length)?;
        let mut placement = Placement::new(Budget::new(options.resident_weights));
        let places =
            checkpoint.layers.iter_mut().map(|layer| placement.layer(layer)).collect::<Result<Vec<_>>>()?;
        let head_begins = placement.len();
        let precision = (options.head, threads);
        let head = team.install(|| Head::new(head, precision, options.activations, &mut placement))?;
        let stream = match placement.into_pieces() {
            none if none.is_empty() => None,
            pieces => Some(Arc::new(Stream::start(pieces, head_begins)?)),
        };
        Ok(Self {
            // The instruction set, because sums of floats differ in their last bits.
            facts: format!(
                "{} {} {spec:?} {:?}",
                env!("CARGO_PKG_VERSION"),
                Isa::detect(),
                options.activations
            ),
            files: checkpoint.files,
            options,
            vocab_size: spec.vocab_size,
            frequencies: spec.rope.frequencies(spec.head_dim),
            rope: spec.rope.clone(),
            attention: Attention {
                heads: spec.heads,
                kv_heads: spec.kv_heads,
                head_dim: spec.head_dim,
                past: 0,
                scale: 1.0 / (spec.head_dim as f32).sqrt(),
            },
            rotations: Vec::new(),
            scratch: Scratch::default(),
            cache: KvCache::new(spec.kv_layout(), options.kv_type),
            layers: {
                let activation = spec.activation;
                let layers = checkpoint.layers.into_iter().zip(places);
                layers
                    .map(|(layer, places)| {
                        Layer::new(layer, places, stream.as_ref(), activation, options.activations)
                    })
                    .collect()
            },
            head,
            embed: checkpoint.embed,
            final_norm: checkpoint.final_norm,
            stream,
            team,
            watch,
        })
    }

    fn run(&mut self, batch: &[SequenceInput<'_>], spans: &[Span], logits: &mut Vec<f32>) -> Result<()> {
        for span in spans {
            self.cache.reserve(span.sequence, span.count)?;
        }
        let (wanted, precision) = wanted(batch, spans);
        if let Some(stream) = &self.stream {
            stream.begin(!wanted.is_empty());
        }
        let rows = self.embedded(batch, spans)?;
        let h = self.hidden_states(rows, spans).map_err(|e| self.failure(e))?;
        self.head(&h, wanted, &precision, logits)
    }

    /// Computes inputs from their beginnings, in steps of at most `step` tokens of each, and gives every token's hidden state behind
    /// the final norm to `take`, with the index of its input, in their order. All sequences are gone afterwards.
    pub(crate) fn hidden(
        &mut self,
        inputs: &[&[u32]],
        step: usize,
        mut take: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        self.watch.check()?;
        let sequences: Vec<SequenceId> = inputs.iter().map(|_| self.cache.create()).collect();
        let team = Arc::clone(&self.team);
        let outcome = team.install(|| self.hidden_of(inputs, &sequences, step, &mut take));
        for sequence in sequences {
            self.cache.free(sequence);
        }
        // A file that changed meanwhile explains whatever was computed.
        self.watch.check().and(outcome)
    }

    fn hidden_of(
        &mut self,
        inputs: &[&[u32]],
        sequences: &[SequenceId],
        step: usize,
        take: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let longest = inputs.iter().map(|input| input.len()).max().unwrap_or(0);
        for from in (0..longest).step_by(step) {
            let piece = |input: usize| &inputs[input][from..inputs[input].len().min(from + step)];
            let present: Vec<usize> = (0..inputs.len()).filter(|&input| inputs[input].len() > from).collect();
            let batch: Vec<SequenceInput<'_>> = present
                .iter()
                .map(|&input| SequenceInput::new(sequences[input], piece(input), LogitsWanted::None))
                .collect();
            let length = |id| self.cache.length(id);
            let spans = batch::spans(&batch, length, self.options.context_length, self.vocab_size)?;
            for span in &spans {
                self.cache.reserve(span.sequence, span.count)?;
            }
            if let Some(stream) = &self.stream {
                stream.begin(false);
            }
            let rows = self.embedded(&batch, &spans)?;
            let h = self.hidden_states(rows, &spans).map_err(|e| self.failure(e))?;
            let normed = self.normed(&h)?;
            let mut rows = normed.chunks_exact(self.embed.shape()[1]);
            for (&input, span) in present.iter().zip(&spans) {
                rows.by_ref().take(span.count).for_each(|row| take(input, row));
                self.cache.advance(span.sequence, span.count);
            }
        }
        Ok(())
    }

    /// The rows of the embedding for all tokens, `[T, hidden]`.
    fn embedded(&self, batch: &[SequenceInput<'_>], spans: &[Span]) -> Result<Vec<f32>> {
        let tokens: usize = spans.iter().map(|s| s.count).sum();
        let hidden = self.embed.shape()[1];
        let mut rows = vec![0.0; tokens * hidden];
        let ids = batch.iter().flat_map(|input| input.tokens);
        for (&id, out) in ids.zip(rows.chunks_exact_mut(hidden)) {
            self.embed.row(id as usize, out)?;
        }
        Ok(rows)
    }

    /// The hidden states after the last layer, `[T, hidden]`.
    fn hidden_states(&mut self, rows: Vec<f32>, spans: &[Span]) -> candle_core::Result<Tensor> {
        let hidden = self.embed.shape()[1];
        let h = Tensor::from_vec(rows, ((), hidden), &Device::Cpu)?;
        if self.cache.kv_type() == KvType::Exact {
            let end = spans.iter().map(|s| s.past + s.count).max().unwrap_or(0);
            for block in self.rotations.len()..end.div_ceil(BLOCK) {
                let (cos, sin) = self.angles(block * BLOCK..(block + 1) * BLOCK);
                self.rotations.push(KeyRotation::new(&cos, &sin));
            }
        }
        let (cos, sin) = self.angles(spans.iter().flat_map(|s| s.past..s.past + s.count));
        h.apply_op1_no_bwd(&Layers {
            layers: &self.layers,
            cache: RefCell::new(&mut self.cache),
            scratch: RefCell::new(&mut self.scratch),
            spans,
            shape: self.attention,
            angles: (&cos, &sin),
            rotations: &self.rotations,
        })
    }

    /// Cosines and sines of the rotary embedding, `head_dim / 2` of each for each position.
    fn angles(&self, positions: impl Iterator<Item = usize>) -> (Vec<f32>, Vec<f32>) {
        positions.flat_map(|position| self.rope.rotation(&self.frequencies, position)).unzip()
    }

    /// The rows of logits of the `wanted` tokens.
    fn head(
        &self,
        h: &Tensor,
        wanted: Vec<u32>,
        precision: &[LogitsPrecision],
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        let count = wanted.len();
        let select = || h.index_select(&Tensor::from_vec(wanted, count, &Device::Cpu)?, 0);
        let rows = select().map_err(candle_error)?;
        logits.resize(count * self.vocab_size, 0.0);
        let normed = self.normed(&rows)?;
        match self.head.forward(&normed, precision, logits, self.stream.as_deref())? {
            Some(()) => Ok(()),
            None => Err(self.failure(candle_core::Error::msg("the head could not be read"))),
        }
    }

    /// Hidden states behind the final norm, as floats.
    fn normed(&self, states: &Tensor) -> Result<Vec<f32>> {
        let (storage, layout) = states.storage_and_layout();
        let candle_core::Storage::Cpu(storage) = &*storage else {
            return Err(Error::backend("a tensor is not on the CPU"));
        };
        let mut normed = Vec::new();
        ops::normalize(ops::floats(storage, layout).map_err(candle_error)?, &self.final_norm, &mut normed);
        Ok(normed)
    }

    /// Why the layers or the head failed: the stream knows it of weights that could not be read.
    fn failure(&self, error: candle_core::Error) -> Error {
        let streamed = self.stream.as_ref().and_then(|stream| stream.failure());
        streamed.unwrap_or_else(|| candle_error(error))
    }
}

/// The tokens of a batch whose logits are asked for, by their place in it, and how exact those must be.
fn wanted(batch: &[SequenceInput<'_>], spans: &[Span]) -> (Vec<u32>, Vec<LogitsPrecision>) {
    let (mut wanted, mut precision) = (Vec::new(), Vec::new());
    for (input, span) in batch.iter().zip(spans) {
        let first = match input.logits {
            LogitsWanted::None => continue,
            LogitsWanted::Last => span.count - 1,
            LogitsWanted::From(first) => first.min(span.count),
        };
        wanted.extend((span.start + first..span.start + span.count).map(|i| i as u32));
        precision.resize(wanted.len(), input.precision);
    }
    (wanted, precision)
}

impl CausalLm for Decoder {
    fn context_length(&self) -> usize {
        self.options.context_length
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
        self.watch.check()?;
        let length = |id| self.cache.length(id);
        let spans = batch::spans(batch, length, self.options.context_length, self.vocab_size)?;
        let team = Arc::clone(&self.team);
        let outcome = team.install(|| self.run(batch, &spans, logits));
        // A file that changed meanwhile explains whatever was computed.
        let outcome = self.watch.check().and(outcome);
        for span in &spans {
            match outcome {
                Ok(()) => self.cache.advance(span.sequence, span.count),
                Err(_) => self.cache.truncate(span.sequence, span.past),
            }
        }
        if outcome.is_err() {
            logits.clear();
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

    fn kv_identity(&self) -> Result<KvIdentity> {
        let mut hash = Sha256::new_with_prefix(&self.facts);
        hash.update(FileWatch::open(&self.files)?.fingerprint());
        Ok(KvIdentity::paged(self.cache.layout(), self.options.kv_type, hash.finalize().into()))
    }

    fn prefix(&mut self, sequence: SequenceId, blocks: Range<usize>) -> Result<KvPrefix> {
        self.cache.prefix(sequence, blocks)
    }

    fn adopt(&mut self, prefix: KvPrefix) -> Result<SequenceId> {
        batch::room_for_one(self.cache.sequences(), self.options.max_sequences)?;
        self.cache.adopt(prefix)
    }
}

fn candle_error(error: candle_core::Error) -> Error {
    Error::backend("the decoder failed").with_source(error)
}
