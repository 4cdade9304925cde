//! Opening a model's file: which kind it is, and a session of the runtime for it.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use ort::ep;
use ort::session::Session;
use ort::session::builder::SessionBuilder;
use sha2::{Digest, Sha256};
use ternion_core::{Error, Result};
use ternion_engine::kv::{KvPrefix, KvType};
use ternion_engine::{CausalLm, ComputeThreads, KvIdentity, SequenceId, SequenceInput};
use ternion_formats::FileWatch;
use ternion_formats::onnx::{Host, Summary};
use ternion_head::HeadKind;
use ternion_kernels::ActivationType;

use crate::constants::{self, Constants};
use crate::exported::ExportedDecoder;
use crate::fast::{self, FastDecoder};
use crate::library::{Library, one_line};

/// The most logits of a token: as many as `config.json` may say. Products with a number of tokens cannot overflow.
pub(crate) const MOST_LOGITS: i64 = 1 << 28;

/// Sizes that a host may set.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DecoderOptions {
    /// Threads that compute.
    pub threads: ComputeThreads,
    /// Tokens that a sequence may hold; 0 takes as many as the model was made for.
    pub context_length: usize,
    /// Sequences that may exist at the same time.
    pub max_sequences: usize,
    /// The most tokens of one step.
    pub prefill_chunk: usize,
    /// How keys and values are stored; models that are not of the fast variant leave no choice.
    pub kv_type: KvType,
    /// How activations are multiplied with weights that have a scale for each group of a row, in models of the fast variant; others
    /// leave no choice.
    pub activations: ActivationType,
    /// What logits are computed from, in models of the fast variant.
    pub head: HeadKind,
    /// Whether the runtime maps the files of constants, rather than this reading them into memory.
    pub mmap: bool,
}

impl Default for DecoderOptions {
    /// All cores, the model's whole context, 4 sequences, prefill in chunks of 128 tokens.
    fn default() -> Self {
        Self {
            threads: ComputeThreads::default(),
            context_length: 0,
            max_sequences: 4,
            prefill_chunk: 128,
            kv_type: KvType::F32,
            activations: ActivationType::default(),
            head: HeadKind::default(),
            mmap: true,
        }
    }
}

/// The same with nothing left open.
#[derive(Debug, Clone)]
pub(crate) struct Sizes {
    pub(crate) threads: ComputeThreads,
    pub(crate) context: usize,
    pub(crate) max_sequences: usize,
    pub(crate) prefill_chunk: usize,
}

impl Sizes {
    fn new(options: &DecoderOptions, host: &Host) -> Result<Self> {
        let positive = [("max_sequences", options.max_sequences), ("prefill_chunk", options.prefill_chunk)];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(Error::invalid_config(format!("{key}: 0 is out of range; at least 1 expected")));
        }
        let context = match (options.context_length, host.context_length) {
            (0, Some(own)) => own,
            (0, None) => {
                return Err(Error::invalid_config(
                    "context_length: neither the configuration nor the model's config.json or genai_config.json says how long it \
                     is; a number of tokens expected",
                ));
            }
            (wanted, Some(own)) if wanted > own => {
                return Err(Error::invalid_config(format!(
                    "context_length: {wanted} is out of range; at most {own}, the model's own, expected"
                )));
            }
            (wanted, _) => wanted,
        };
        Ok(Self {
            threads: options.threads.clone(),
            context,
            max_sequences: options.max_sequences,
            prefill_chunk: options.prefill_chunk,
        })
    }
}

/// A decoder in ONNX Runtime.
pub struct Decoder {
    inner: Box<dyn CausalLm>,
    is_fast: bool,
    /// The files that the runtime maps.
    watch: FileWatch,
    /// All files of the model, and what else keys and values depend on, in words.
    files: Vec<PathBuf>,
    facts: String,
}

impl Decoder {
    /// Opens the model that `summary` was read from.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) and [`Unsupported`](ternion_core::ErrorKind::Unsupported)
    /// for a graph that is no decoder that can be driven, or does not agree with the configuration beside it;
    /// [`InvalidConfig`](ternion_core::ErrorKind::InvalidConfig) for a size out of its range.
    pub fn new(
        library: &Library,
        summary: &Summary,
        host: &Host,
        mut options: DecoderOptions,
    ) -> Result<Self> {
        if options.kv_type == KvType::Exact {
            // The graph gives keys and values as floats.
            options.kv_type = KvType::F32;
        }
        summary.check_operators(library.minor())?;
        let sizes = Sizes::new(&options, host)?;
        let (is_fast, threads) = (fast::is_fast(summary), sizes.threads.count());
        // Opened before the runtime maps them, so that a change in between is noticed.
        let (constants, watch) = if options.mmap {
            (Constants::new(), FileWatch::open(&summary.data_files)?)
        } else {
            (constants::read(summary)?, FileWatch::default())
        };
        let inner: Box<dyn CausalLm> = if is_fast {
            Box::new(FastDecoder::open(library, summary, host, sizes, &options, &constants)?)
        } else {
            if options.head != HeadKind::Auto {
                return Err(Error::invalid_config(
                    "options.head: this model's graph computes its logits; only a model of the fast variant leaves open what from",
                ));
            }
            if options.kv_type != KvType::F32 {
                return Err(Error::invalid_config(
                    "options.kv_type: this model's graph has a KV cache of its own; only a model of the fast variant leaves \
                     the type open",
                ));
            }
            Box::new(ExportedDecoder::open(library, summary, host, sizes, &constants)?)
        };
        summary.check_unchanged()?;
        // Threads, because the runtime divides sums over them; the instruction set, because sums differ in their last bits.
        let facts = format!(
            "{} {} {is_fast} {} {} {}",
            env!("CARGO_PKG_VERSION"),
            library.version(),
            ternion_kernels::Isa::detect(),
            options.activations,
            if is_fast { 0 } else { threads }
        );
        let files = [summary.path.clone()].into_iter().chain(summary.data_files.iter().cloned()).collect();
        Ok(Self { inner, is_fast, watch, files, facts })
    }

    /// Whether the file is of the fast variant.
    pub fn is_fast(&self) -> bool {
        self.is_fast
    }
}

impl CausalLm for Decoder {
    fn context_length(&self) -> usize {
        self.inner.context_length()
    }

    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    fn max_sequences(&self) -> usize {
        self.inner.max_sequences()
    }

    fn max_batch_tokens(&self) -> usize {
        self.inner.max_batch_tokens()
    }

    fn new_sequence(&mut self) -> Result<SequenceId> {
        self.inner.new_sequence()
    }

    fn forward(&mut self, batch: &[SequenceInput<'_>], logits: &mut Vec<f32>) -> Result<()> {
        logits.clear();
        self.watch.check()?;
        let pasts: Vec<_> = batch.iter().map(|input| self.inner.len(input.sequence)).collect();
        let outcome = self.inner.forward(batch, logits);
        // A file that changed meanwhile explains whatever was computed.
        if let Err(changed) = self.watch.check() {
            logits.clear();
            for (input, past) in batch.iter().zip(pasts) {
                self.inner.truncate(input.sequence, past)?;
            }
            return Err(changed);
        }
        outcome
    }

    fn len(&self, sequence: SequenceId) -> usize {
        self.inner.len(sequence)
    }

    fn truncate(&mut self, sequence: SequenceId, length: usize) -> Result<()> {
        self.inner.truncate(sequence, length)
    }

    fn fork(&mut self, sequence: SequenceId, length: usize) -> Result<SequenceId> {
        self.inner.fork(sequence, length)
    }

    fn free(&mut self, sequence: SequenceId) {
        self.inner.free(sequence);
    }

    fn kv_identity(&self) -> Result<KvIdentity> {
        let mut hash = Sha256::new_with_prefix(&self.facts);
        hash.update(FileWatch::open(&self.files)?.fingerprint());
        let mut identity = self.inner.kv_identity()?;
        identity.fingerprint = hash.finalize().into();
        Ok(identity)
    }

    fn prefix(&mut self, sequence: SequenceId, blocks: Range<usize>) -> Result<KvPrefix> {
        self.inner.prefix(sequence, blocks)
    }

    fn adopt(&mut self, prefix: KvPrefix) -> Result<SequenceId> {
        self.inner.adopt(prefix)
    }
}

/// A session's options, for shapes that change with every step: the runtime's plan of its memory is made for one shape and
/// kept, so it is off. Its arena serves buffers that are of the same few sizes again and again; where `has_arena` is
/// false, each one is given back to the system, so that ever longer ones leave no holes.
pub(crate) fn session_builder(
    library: &Library,
    threads: &ComputeThreads,
    has_arena: bool,
    constants: &Constants,
) -> ort::Result<SessionBuilder> {
    let mut builder = Session::builder(library.environment())?
        .with_intra_threads(threads.count())?
        .with_inter_threads(1)?
        .with_memory_pattern(false)?
        .with_execution_providers([ep::CPU::default().with_arena_allocator(has_arena).build()])?;
    if let [_, others @ ..] = threads.cpus()
        && !others.is_empty()
    {
        // CPUs are counted from 1, and the first thread is the caller's.
        let list: Vec<String> = others.iter().map(|cpu| (cpu + 1).to_string()).collect();
        builder = builder.with_config_entry("session.intra_op_thread_affinities", list.join(";"))?;
    }
    for (name, value) in constants {
        builder = builder.with_external_initializer(name, Arc::clone(value))?;
    }
    Ok(builder)
}

pub(crate) fn engine_error(message: &str, error: &ort::Error) -> Error {
    Error::backend(format!("{message}: ONNX Runtime says")).with_source(one_line(error))
}
