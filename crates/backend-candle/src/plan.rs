//! What a model will take in memory, and with a limit the sizes that keep it.
//!
//! What takes memory is counted from the checkpoint's tensors and the sizes that are set; what the process has already,
//! its tokenizer among it, is measured. Under a limit, what the configuration leaves open is chosen by trying, in this
//! order, until it fits:
//!
//! 1. fewer sequences at the same time (others wait in the queue),
//! 2. weights that do not fit are streamed from the disk: the same results, slower,
//! 3. smaller prefill chunks: the same results, slower,
//! 4. keys and values in f16, then in int8: nearly the same results (`exact` and `f32` give the same ones),
//! 5. a shorter context.
//!
//! So what changes no result comes first. Under a limit the head has a copy only if the configuration wants one: an int8 copy
//! takes more memory than no copy, since the original can be streamed and the copy cannot. What the configuration fixes stays,
//! and a limit that cannot be kept with it is refused with the least that could be.

use ternion_core::{
    Error, ErrorKind, MemoryPlan, ProcessMemory, Result, config::ByteSize, config::ModelConfig,
};
use ternion_engine::{
    PromptCacheOptions,
    kv::{BLOCK, KvType},
};
use ternion_formats::{Checkpoint, LayerTensors, ModelSpec, Table};
use ternion_head::HeadWeights;
use ternion_kernels::{ActivationType, BoundedMatrix, CompactBits};

use crate::residency::{Budget, Division};
use crate::stream::BUFFERS;
use crate::{CandleOptions, DecoderOptions, HeadPrecision};

/// Chunks that are tried, and the shortest context that is chosen.
const CHUNKS: [usize; 3] = [128, 64, 32];
const LEAST_CONTEXT: usize = 256;

/// Rows of logits that a request may ask for at a time under a limit.
const LOGIT_ROWS: usize = 4;

/// About the size of a projection.
const PROBE: usize = 1 << 20;

/// What the process will take beyond all that is counted: pages of the program that have not been used yet, stacks of
/// threads, and what lies between the blocks of an allocator that has given much back.
const RUNTIME: u64 = 6_000_000;

/// The sizes that keep a limit, or that are simply set, with their plan.
#[derive(Debug)]
pub(crate) struct Sizes {
    pub(crate) options: DecoderOptions,
    pub(crate) plan: MemoryPlan,
    /// Bytes of logits that a request may ask for at a time.
    pub(crate) logits_bytes: Option<u64>,
}

/// What the process takes already.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Taken {
    /// Before anything of the model.
    pub(crate) process: u64,
    /// By the tokenizer, with what was needed to build it.
    pub(crate) tokenizer: u64,
    /// The part of that which the allocator gives to weights that are copied to memory.
    pub(crate) reusable: u64,
}

/// Bytes that are resident now; 0 where the system does not tell.
pub(crate) fn resident() -> u64 {
    ProcessMemory::now().map_or(0, |memory| memory.resident)
}

/// Those of them that are no part of a file; 0 where the system does not tell.
pub(crate) fn anonymous() -> u64 {
    ProcessMemory::now().and_then(|memory| memory.anonymous).unwrap_or(0)
}

/// Checks that a limit can be kept at all, which takes a system that tells what the process takes.
///
/// # Errors
/// [`Unsupported`](ErrorKind::Unsupported) if `measured` is none.
pub(crate) fn check_measurable(measured: Option<ProcessMemory>) -> Result<()> {
    match measured {
        Some(_) => Ok(()),
        None => Err(Error::unsupported(
            "memory_limit: this system does not tell how much memory the process takes, so no limit can be kept; remove \
             `memory_limit`",
        )),
    }
}

/// How much of `freed` bytes the allocator has kept and gives out again in pieces as large as weights: found by taking as
/// much and looking at what the process grew by.
pub(crate) fn reusable(freed: u64) -> u64 {
    let before = resident();
    let pieces: Vec<Vec<u8>> = (0..freed as usize / PROBE).map(|_| vec![1; PROBE]).collect();
    let taken = std::hint::black_box(&pieces).len() as u64 * PROBE as u64;
    taken.saturating_sub(resident().saturating_sub(before))
}

/// Chooses the sizes for a checkpoint.
///
/// # Errors
/// [`ResourceExhausted`](ErrorKind::ResourceExhausted) for a limit that cannot be kept, with the least that could be.
pub(crate) fn sizes(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    options: &CandleOptions,
    taken: Taken,
) -> Result<Sizes> {
    let prompts = prompt_cache(config);
    let planner = Planner { checkpoint, taken, limit: config.memory_limit.map(|limit| limit.0), prompts };
    let mut wanted = DecoderOptions::new(&checkpoint.spec);
    wanted.head = head(checkpoint, options.head, planner.limit)?;
    wanted.kv_type = checkpoint.kv_type(options.kv_type);
    wanted.activations = options.activations.unwrap_or(wanted.activations);
    wanted.context_length = config.context_length.unwrap_or(wanted.context_length);
    wanted.max_sequences = config.max_sequences.unwrap_or(wanted.max_sequences);
    wanted.prefill_chunk = config.prefill_chunk.unwrap_or(wanted.prefill_chunk);
    let Some(limit) = planner.limit else { return Ok(planner.finish(wanted, &wanted)) };

    let mut least: Option<(u64, DecoderOptions)> = None;
    for candidate in candidates(wanted, config, options, planner.streams()) {
        let plan = planner.plan(&candidate);
        if plan.total() <= limit {
            // What is left holds weights that need not be streamed then.
            let left = limit - plan.total() + taken.reusable;
            let resident_weights = candidate.resident_weights.map(|_| left);
            return Ok(planner.finish(DecoderOptions { resident_weights, ..candidate }, &wanted));
        }
        if least.as_ref().is_none_or(|(bytes, _)| plan.total() < *bytes) {
            least = Some((plan.total(), candidate));
        }
    }
    let (bytes, options) = least.expect("invariant: the sizes that are wanted are among the candidates");
    let fixed: Vec<&str> = [
        ("context_length", config.context_length.is_some()),
        ("max_sequences", config.max_sequences.is_some()),
        ("prefill_chunk", config.prefill_chunk.is_some()),
    ]
    .into_iter()
    .filter_map(|(name, is_fixed)| is_fixed.then_some(name))
    .collect();
    let fixed = if fixed.is_empty() {
        String::new()
    } else {
        format!(" (fixed by the configuration: {})", fixed.join(", "))
    };
    Err(Error::new(
        ErrorKind::ResourceExhausted,
        format!(
            "memory_limit: {} is too little; the least is {}: context {}, {} sequence{}, keys and values in {}, weights \
             read from the disk for each step{fixed}",
            ByteSize(limit),
            ByteSize(bytes.next_multiple_of(1_000_000)),
            options.context_length,
            options.max_sequences,
            if options.max_sequences == 1 { "" } else { "s" },
            options.kv_type,
        ),
    ))
}

/// What logits are computed from.
///
/// # Errors
/// For a certified copy under a limit.
fn head(checkpoint: &Checkpoint, wanted: HeadPrecision, limit: Option<u64>) -> Result<HeadPrecision> {
    let weights = HeadWeights::of(checkpoint.head_or_embed());
    match (wanted, limit) {
        (HeadPrecision::Certified, Some(_)) => Err(Error::invalid_config(
            "options.head: `certified` together with `memory_limit`, for the copy takes memory beside the weights; set `int8` or \
             `exact`, or remove one of the two",
        )),
        (HeadPrecision::Auto, None) if weights.as_ref().is_some_and(HeadWeights::is_large) => {
            Ok(HeadPrecision::Certified)
        }
        (HeadPrecision::Auto, _) => Ok(HeadPrecision::Exact),
        (HeadPrecision::Certified, None) if weights.is_none() => Ok(HeadPrecision::Exact),
        _ => Ok(wanted),
    }
}

/// The sizes that are tried, the best first. `streams`: weights may be left on the disk.
fn candidates(
    wanted: DecoderOptions,
    config: &ModelConfig,
    options: &CandleOptions,
    streams: bool,
) -> Vec<DecoderOptions> {
    let sequences: Vec<usize> = match config.max_sequences {
        Some(fixed) => vec![fixed],
        None => (1..=wanted.max_sequences).rev().collect(),
    };
    let fewest = sequences[sequences.len() - 1];
    let chunks: Vec<usize> = config.prefill_chunk.map_or(CHUNKS.to_vec(), |fixed| vec![fixed]);
    let types = match options.kv_type {
        Some(_) => vec![wanted.kv_type],
        None => vec![wanted.kv_type, KvType::F16, KvType::Int8],
    };
    let mut found = Vec::new();
    let mut add = |context, max_sequences, prefill_chunk, kv_type, resident_weights| {
        found.push(DecoderOptions {
            context_length: context,
            max_sequences,
            prefill_chunk,
            resident_weights,
            kv_type,
            ..wanted
        });
    };
    for &kv_type in &types {
        for &sequences in &sequences {
            add(wanted.context_length, sequences, chunks[0], kv_type, None);
        }
        for &chunk in chunks.iter().filter(|_| streams) {
            add(wanted.context_length, fewest, chunk, kv_type, Some(0));
        }
    }
    if config.context_length.is_none() {
        let (smallest, last) = (chunks[chunks.len() - 1], types[types.len() - 1]);
        let longest = wanted.context_length.saturating_sub(1) / BLOCK * BLOCK;
        for context in (LEAST_CONTEXT..=longest).rev().step_by(BLOCK) {
            add(context, fewest, smallest, last, streams.then_some(0));
        }
    }
    found
}

/// The prompt cache of a configuration. Under a limit, one prompt at a time is on its way from the disk, and one to it.
pub(crate) fn prompt_cache(config: &ModelConfig) -> Option<PromptCacheOptions> {
    let mut options = PromptCacheOptions::of(config.prompt_cache.as_ref()?);
    if config.memory_limit.is_some() {
        options.in_memory = 1;
    }
    Some(options)
}

struct Planner<'a> {
    checkpoint: &'a Checkpoint,
    taken: Taken,
    limit: Option<u64>,
    prompts: Option<PromptCacheOptions>,
}

impl Planner<'_> {
    /// Whether any weights lie in a file in a form that can be computed with.
    fn streams(&self) -> bool {
        let linears = self.checkpoint.layers.iter().flat_map(LayerTensors::linears);
        linears.filter_map(ternion_formats::Linear::bytes).any(ternion_formats::SharedBytes::is_mapped)
            || self.checkpoint.head_or_embed().is_mapped()
    }

    fn finish(&self, options: DecoderOptions, wanted: &DecoderOptions) -> Sizes {
        let mut plan = self.plan(&options);
        let mut note = |what: &str, found: String, asked: String| {
            if found != asked {
                plan.choices.push(format!("{what} {found} instead of {asked}"));
            }
        };
        note("max_sequences", options.max_sequences.to_string(), wanted.max_sequences.to_string());
        note("prefill_chunk", options.prefill_chunk.to_string(), wanted.prefill_chunk.to_string());
        note("keys and values in", options.kv_type.to_string(), wanted.kv_type.to_string());
        note("context_length", options.context_length.to_string(), wanted.context_length.to_string());
        if plan.streamed_bytes > 0 {
            plan.choices.push(format!(
                "{} of weights read from the disk for each step instead of kept in memory",
                ByteSize(plan.streamed_bytes)
            ));
        }
        let logits_bytes =
            self.limit.map(|_| self.logit_rows(&options).saturating_mul(row_bytes(&self.checkpoint.spec)));
        Sizes { options, plan, logits_bytes }
    }

    fn logit_rows(&self, options: &DecoderOptions) -> u64 {
        let least = if self.limit.is_some() { LOGIT_ROWS } else { 1 };
        options.max_sequences.max(least) as u64
    }

    fn plan(&self, options: &DecoderOptions) -> MemoryPlan {
        let checkpoint = self.checkpoint;
        let spec = &checkpoint.spec;
        let mut plan = MemoryPlan::new();
        plan.limit = self.limit;
        plan.context_length = options.context_length;
        plan.max_sequences = options.max_sequences;
        plan.prefill_chunk = options.prefill_chunk;
        plan.kv_type = options.kv_type.to_string();

        // Grouped weights take fewer bits than a copy would.
        let is_grouped = matches!(checkpoint.head_or_embed(), Table::Grouped(_));
        let copy = options.head.copy().filter(|_| !is_grouped);
        let exact = copy.is_none();
        let division = Division::of(checkpoint, Budget::new(options.resident_weights), exact);
        plan.streamed_bytes = division.streamed;
        plan.add("ternary weights", division.ternary);
        plan.add("weights of groups", division.grouped);
        plan.add("plain weights", division.dense);
        plan.add(if checkpoint.head.is_some() { "head" } else { "embedding and head" }, division.head);
        let separate = checkpoint.head.is_some() && !checkpoint.embed.is_mapped();
        // Without a limit all of an embedding is looked at when it is opened; with one, rows are read as they are needed.
        let looked_at = checkpoint.head.is_some() && self.limit.is_none() && exact;
        plan.add("embedding", if separate || looked_at { checkpoint.embed.size() as u64 } else { 0 });
        if let Some(bits) = copy {
            let name = if bits == CompactBits::Eight { "head in int8" } else { "head in int4" };
            plan.add(name, bits.bytes(spec.vocab_size, spec.hidden_size) as u64);
        }
        if options.head == HeadPrecision::Certified {
            let bytes = BoundedMatrix::bytes(spec.vocab_size, spec.hidden_size);
            plan.add("certified copy of the head", bytes as u64);
        }
        plan.add("norms", norms(checkpoint));
        let kv = spec.kv_layout().bytes(options.kv_type, options.context_length);
        plan.add("keys and values", kv.saturating_mul(options.max_sequences as u64));
        plan.add(
            "prompts between memory and disk",
            self.prompts.as_ref().map_or(0, |prompts| prompts.memory(kv)),
        );
        plan.add("activations", activations(spec, options, division.grouped > 0));
        plan.add("logits", self.logit_rows(options).saturating_add(3).saturating_mul(row_bytes(spec)));
        plan.add("read-ahead", division.largest * BUFFERS as u64);
        let copied = options.resident_weights.map_or(0, |_| division.copied);
        plan.add("tokenizer", self.taken.tokenizer - self.taken.reusable.min(copied));
        plan.add("process", self.taken.process + RUNTIME);
        plan
    }
}

/// Bytes of a row of logits.
fn row_bytes(spec: &ModelSpec) -> u64 {
    4 * spec.vocab_size as u64
}

fn norms(checkpoint: &Checkpoint) -> u64 {
    let layers = checkpoint.layers.iter().flat_map(LayerTensors::norms);
    let inputs =
        checkpoint.layers.iter().flat_map(LayerTensors::linears).filter_map(|l| l.input_norm.as_ref());
    let elements: usize = layers.chain(inputs).chain([&checkpoint.final_norm]).map(|n| n.weight.len()).sum();
    4 * elements as u64
}

/// The hidden states of a chunk before and behind the layers, and the buffers of these: queries, keys and values as products
/// and rotated, with what attention makes of them, or in the same place gate and up; the gated unit; what is added; int8.
fn activations(spec: &ModelSpec, options: &DecoderOptions, is_grouped: bool) -> u64 {
    let (width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    let wide = (3 * width + 4 * kv_width).max(2 * spec.intermediate_size);
    // What the widest input is rounded to. For weights in groups that is up to two terms, each with a sum and a scale for every 32
    // columns, or 16 where the groups have 64 or the weights are binary; and the normalised input is kept.
    let rounded = match (is_grouped, options.activations) {
        (false, _) => spec.intermediate_size / 4,
        (true, ActivationType::F32) => spec.hidden_size,
        (true, ActivationType::Int8) => spec.hidden_size + spec.intermediate_size.max(width) * 3 / 8,
        (true, _) => spec.hidden_size + spec.intermediate_size.max(width) * 3 / 4,
    };
    let floats = 3 * spec.hidden_size + wide + spec.intermediate_size + rounded;
    let tokens = options.prefill_chunk.min(options.context_length).max(options.max_sequences);
    // Of the keys that are stored without it.
    let rotations = if options.kv_type == KvType::Exact { options.context_length } else { 0 };
    let rotations = (4 * spec.head_dim as u64).saturating_mul(rotations.next_multiple_of(BLOCK) as u64);
    (4 * floats as u64).saturating_mul(tokens as u64).saturating_add(rotations)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_needs_a_system_that_measures() {
        assert!(check_measurable(ProcessMemory::now()).is_ok() || ProcessMemory::now().is_none());
        let error = check_measurable(None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().starts_with("memory_limit: this system does not tell"), "{error}");
    }
}
