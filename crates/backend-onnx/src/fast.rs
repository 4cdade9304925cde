//! Decoders of the fast variant: the graph holds the weights and the order of the operators, the KV cache is ours.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use ort::session::Session;
use ort::value::Tensor;
use ternion_core::{Error, Result};
use ternion_engine::batch::{self, Span};
use ternion_engine::kv::{KvCache, KvLayout, KvPrefix, KvType};
use ternion_engine::{CausalLm, ComputeThreads, KvIdentity, LogitsWanted, SequenceId, SequenceInput};
use ternion_formats::onnx::{Host, Size, Summary, fast, fast_head};
use ternion_head::{HeadKind, HeadWeights};
use ternion_kernels::Team;

use crate::attributes::{self, Heads};
use crate::constants::Constants;
use crate::library::Library;
use crate::model::{DecoderOptions, MOST_LOGITS, Sizes, engine_error, session_builder};
use crate::ops::{self, Shared};

/// Held while a session is made: the runtime looks whether it knows the operators' domain and then adds it, without a lock
/// around the two.
static OPENING: Mutex<()> = Mutex::new(());

/// A decoder and the KV caches of its sequences.
pub(crate) struct FastDecoder {
    sizes: Sizes,
    kv_type: KvType,
    vocab_size: usize,
    session: Session,
    shared: Shared,
    team: Team,
}

/// Whether a file is of this kind.
pub(crate) fn is_fast(summary: &Summary) -> bool {
    summary.nodes.iter().any(|node| node.domain == fast::DOMAIN)
}

impl FastDecoder {
    pub(crate) fn open(
        library: &Library,
        summary: &Summary,
        host: &Host,
        sizes: Sizes,
        options: &DecoderOptions,
        constants: &Constants,
    ) -> Result<Self> {
        let DecoderOptions { kv_type, activations, .. } = *options;
        let in_file = |e: Error| e.with("file", summary.path.display());
        let vocab_size = interface(summary, host).map_err(in_file)?;
        let layout = cache_layout(summary, host).map_err(in_file)?;
        let shared = Shared::new(KvCache::new(layout, kv_type), activations);
        let team = sizes.threads.team()?;
        let open = || -> ort::Result<Session> {
            // Our operators have threads of their own; what is left for the runtime is too little to divide.
            session_builder(library, &ComputeThreads::new(1), true, constants)?
                .with_operators(ops::domain(&shared)?)?
                .commit_from_file(&summary.path)
        };
        let opening = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
        let session =
            team.install(open).map_err(|e| in_file(engine_error("the model cannot be loaded", &e)))?;
        drop(opening);
        if options.head != HeadKind::Exact
            && let Some(weights) = fast_head(summary)?
        {
            let weights = HeadWeights::Dense(weights);
            shared.lock().head = options.head.certified(weights, options.mmap, &sizes.threads);
        }
        Ok(Self { sizes, kv_type, vocab_size, session, shared, team })
    }

    fn run(&mut self, batch: &[SequenceInput<'_>], spans: &[Span], logits: &mut Vec<f32>) -> Result<()> {
        {
            let mut state = self.shared.lock();
            for span in spans {
                state.cache.reserve(span.sequence, span.count)?;
            }
        }
        let ids: Vec<i64> = batch.iter().flat_map(|input| input.tokens).map(|&id| i64::from(id)).collect();
        let positions: Vec<i64> =
            spans.iter().flat_map(|s| (s.past..s.past + s.count).map(|p| p as i64)).collect();
        let sequences: Vec<i64> =
            spans.iter().flat_map(|s| std::iter::repeat_n(i64::from(s.sequence.0), s.count)).collect();
        let mut rows: Vec<i64> = Vec::new();
        let mut precision = Vec::new();
        for (input, span) in batch.iter().zip(spans) {
            let first = match input.logits {
                LogitsWanted::None => span.count,
                LogitsWanted::Last => span.count - 1,
                LogitsWanted::From(start) => start.min(span.count),
            };
            rows.extend((span.start + first..span.start + span.count).map(|row| row as i64));
            precision.resize(rows.len(), input.precision);
        }
        self.shared.lock().precision = precision;
        let wanted = rows.len() * self.vocab_size;
        let vector = |values: Vec<i64>| Tensor::from_array(([values.len()], values));
        let session = &mut self.session;
        let compute = || -> ort::Result<()> {
            let outputs = session.run(ort::inputs![
                fast::IDS => vector(ids)?,
                fast::POSITIONS => vector(positions)?,
                fast::SEQUENCES => vector(sequences)?,
                fast::ROWS => vector(rows)?,
            ])?;
            let (_, values) = outputs[fast::LOGITS].try_extract_tensor::<f32>()?;
            logits.extend_from_slice(values);
            Ok(())
        };
        self.team.install(compute).map_err(|e| engine_error("the decoder failed", &e))?;
        if logits.len() != wanted {
            return Err(Error::backend(format!(
                "the decoder gave {} logits, expected {wanted}",
                logits.len()
            )));
        }
        Ok(())
    }
}

/// Checks inputs and outputs and returns the vocabulary's size.
fn interface(summary: &Summary, host: &Host) -> Result<usize> {
    for name in [fast::IDS, fast::POSITIONS, fast::SEQUENCES, fast::ROWS] {
        if summary.input(name).is_none() {
            return Err(Error::invalid_model(format!("the graph has no input `{name}`")));
        }
    }
    let dims = summary.output(fast::LOGITS).and_then(|output| output.dims.as_deref());
    let Some([_, Size::Known(vocab_size @ 1..=MOST_LOGITS)]) = dims else {
        let message =
            format!("the graph's output `{}` is {dims:?}, expected [rows, vocabulary]", fast::LOGITS);
        return Err(Error::invalid_model(message));
    };
    let vocab_size = *vocab_size as usize;
    match host.vocab_size {
        Some(expected) if expected != vocab_size => Err(Error::invalid_model(format!(
            "the logits have {vocab_size} elements, but `vocab_size` in config.json is {expected}"
        ))),
        _ => Ok(vocab_size),
    }
}

/// What the attention of all layers asks of the KV cache.
fn cache_layout(summary: &Summary, host: &Host) -> Result<KvLayout> {
    let mut layout = KvLayout { layers: 0, kv_heads: 0, head_dim: 0 };
    for node in summary.nodes.iter().filter(|n| n.domain == fast::DOMAIN && n.operator == fast::ATTENTION) {
        let in_node = |message: String| {
            Error::invalid_model(format!("{}: {message}", fast::ATTENTION)).with("node", &node.name)
        };
        let Heads { kv_heads, head_dim, .. } = Heads::new(|name| node.integer(name)).map_err(in_node)?;
        let layer = attributes::size("layer", node.integer("layer")).map_err(in_node)?;
        if layer != layout.layers {
            return Err(in_node(format!(
                "the attribute `layer` is {layer}, expected {}: the layers in their order",
                layout.layers
            )));
        }
        if layout.layers > 0 && (kv_heads, head_dim) != (layout.kv_heads, layout.head_dim) {
            return Err(in_node(format!(
                "the attributes `kv_heads` and `head_dim` are {kv_heads} and {head_dim}, but {} and {} in the layers before",
                layout.kv_heads, layout.head_dim
            )));
        }
        layout = KvLayout { layers: layout.layers + 1, kv_heads, head_dim };
    }
    let pairs = [
        ("num_hidden_layers", host.layers, layout.layers),
        ("num_key_value_heads", host.kv_heads, layout.kv_heads),
        ("head_dim", host.head_dim, layout.head_dim),
    ];
    for (key, expected, found) in pairs {
        if let Some(expected) = expected.filter(|e| *e != found) {
            return Err(Error::invalid_model(format!(
                "the graph's attention has {found}, but `{key}` in config.json is {expected}"
            )));
        }
    }
    if layout.layers.saturating_mul(layout.kv_heads).saturating_mul(layout.head_dim) > 1 << 30 {
        return Err(Error::invalid_model(format!("a KV cache of {layout:?} is beyond reason")));
    }
    Ok(layout)
}

impl CausalLm for FastDecoder {
    fn context_length(&self) -> usize {
        self.sizes.context
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_sequences(&self) -> usize {
        self.sizes.max_sequences
    }

    fn max_batch_tokens(&self) -> usize {
        self.sizes.prefill_chunk
    }

    fn new_sequence(&mut self) -> Result<SequenceId> {
        let mut state = self.shared.lock();
        batch::room_for_one(state.cache.sequences(), self.sizes.max_sequences)?;
        Ok(state.cache.create())
    }

    fn forward(&mut self, batch: &[SequenceInput<'_>], logits: &mut Vec<f32>) -> Result<()> {
        logits.clear();
        let spans = {
            let state = self.shared.lock();
            batch::spans(batch, |id| state.cache.length(id), self.sizes.context, self.vocab_size)?
        };
        let outcome = self.run(batch, &spans, logits);
        let mut state = self.shared.lock();
        for span in &spans {
            match outcome {
                Ok(()) => state.cache.advance(span.sequence, span.count),
                Err(_) => state.cache.truncate(span.sequence, span.past),
            }
        }
        if outcome.is_err() {
            logits.clear();
        }
        outcome
    }

    fn len(&self, sequence: SequenceId) -> usize {
        self.shared.lock().cache.length(sequence).unwrap_or(0)
    }

    fn truncate(&mut self, sequence: SequenceId, length: usize) -> Result<()> {
        self.shared.lock().cache.truncate(sequence, length);
        Ok(())
    }

    fn fork(&mut self, sequence: SequenceId, length: usize) -> Result<SequenceId> {
        let mut state = self.shared.lock();
        batch::room_for_one(state.cache.sequences(), self.sizes.max_sequences)?;
        state.cache.fork(sequence, length)
    }

    fn free(&mut self, sequence: SequenceId) {
        self.shared.lock().cache.free(sequence);
    }

    fn kv_identity(&self) -> Result<KvIdentity> {
        // `Decoder` knows the rest.
        Ok(KvIdentity::paged(self.shared.lock().cache.layout(), self.kv_type, [0; 32]))
    }

    fn prefix(&mut self, sequence: SequenceId, blocks: Range<usize>) -> Result<KvPrefix> {
        self.shared.lock().cache.prefix(sequence, blocks)
    }

    fn adopt(&mut self, prefix: KvPrefix) -> Result<SequenceId> {
        let mut state = self.shared.lock();
        batch::room_for_one(state.cache.sequences(), self.sizes.max_sequences)?;
        state.cache.adopt(prefix)
    }
}
