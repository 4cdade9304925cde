//! [`CausalLm`] on a context of llama.cpp.

use std::{ops::Range, path::PathBuf, sync::Arc};

use ternion_core::{Error, ErrorKind, Result, ResultExt};
use ternion_engine::{
    CausalLm, ComputeThreads, KvIdentity, LogitsWanted, SequenceId, SequenceInput, batch,
    kv::{BLOCK, KvPrefix},
};
use ternion_formats::{Checkpoint, FileWatch, Table};
use ternion_head::HeadWeights;

use crate::{
    KvType, LlamaCppOptions,
    ffi::{Batch, Context, ContextSizes, Input, MAX_SEQUENCES, Model},
    head::HeadNode,
    hook::Hook,
    memory, runtime,
    saved::{self, Saved},
    source::Parts,
};

/// The fewest tokens of context; llama.cpp ends the process for some that are smaller.
const MIN_CONTEXT: usize = 32;

/// Bytes of KV cache beyond which the context is not the model's own unless the configuration says so: llama.cpp allocates
/// all of it at once.
const DEFAULT_KV_BYTES: u64 = 1 << 30;

/// Sizes that a host may set.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ModelOptions {
    /// Threads that compute. More than there are CPUs are as many as there are.
    pub threads: ComputeThreads,
    /// Tokens that a sequence may hold. `None`: as many as the model was made for, or as fit into 1 GiB for all sequences if
    /// that is less.
    pub context_length: Option<usize>,
    /// Sequences that may exist at the same time. The KV cache of all of them is allocated when the model is loaded.
    pub max_sequences: usize,
    /// The most tokens of one step.
    pub prefill_chunk: usize,
    /// Whether llama.cpp maps the files that it loads, rather than reading them into memory.
    pub mmap: bool,
    /// Whether sequences can be saved, for a prompt cache.
    pub keeps_prompts: bool,
    /// What only llama.cpp knows.
    pub llama_cpp: LlamaCppOptions,
}

impl Default for ModelOptions {
    /// All cores, one sequence, prefill in chunks of 128 tokens.
    fn default() -> Self {
        Self {
            threads: ComputeThreads::default(),
            context_length: None,
            max_sequences: 1,
            prefill_chunk: 128,
            mmap: true,
            keeps_prompts: false,
            llama_cpp: LlamaCppOptions::default(),
        }
    }
}

/// What of a model decides how large its KV cache is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvShape {
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Tokens that the model was made for.
    pub(crate) context_length: usize,
}

impl KvShape {
    fn bytes_per_token(&self, kv_type: KvType) -> u64 {
        let sizes = [self.layers, self.kv_heads, self.head_dim];
        kv_type.bytes(sizes.iter().fold(2, |elements: u64, size| elements.saturating_mul(*size as u64)))
    }
}

/// A model that runs in llama.cpp.
pub struct LlamaCpp {
    context: Context,
    batch: Batch,
    /// Where rows of the embedding are looked up; `None` where llama.cpp does it.
    embed: Option<Table>,
    context_length: usize,
    prefill_chunk: usize,
    /// The head, where it has a copy.
    head: Option<Arc<HeadNode>>,
    /// Tokens of each sequence; `None` for one that does not exist.
    lengths: Vec<Option<usize>>,
    /// Whether tokens can be removed from the end of a sequence.
    can_cut: bool,
    /// The files that weights are read from.
    watch: FileWatch,
    saved: Saved,
}

impl LlamaCpp {
    /// A model on the tensors of `checkpoint`; none of the mapped ones is copied.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] for a size out of its range, [`ErrorKind::ResourceExhausted`] where the KV cache does
    /// not fit into memory, [`ErrorKind::Unsupported`] for what llama.cpp's graphs cannot express, or for a model whose sequences
    /// are to be saved and cannot be.
    pub fn new(checkpoint: &Checkpoint, options: &ModelOptions) -> Result<Self> {
        let spec = &checkpoint.spec;
        let shape = KvShape {
            layers: spec.layers,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            context_length: spec.context_length,
        };
        let (context_length, sizes) = sizes(&shape, options, KvType::F32, true)?;
        runtime::start_hooked()?;
        let watch = checkpoint.watch()?;
        let mut parts = Parts::from(checkpoint);
        parts.activations = options.llama_cpp.activations.unwrap_or(parts.activations);
        let head = HeadWeights::of(&parts.head);
        let head = head.and_then(|head| options.llama_cpp.head.certified(head, options.mmap, &sizes.threads));
        parts.head_node = head.map(|head| HeadNode::new(head, &sizes.threads)).transpose()?.map(Arc::new);
        let (model, hook) = parts.load()?;
        let mut this = Self::start(model, Some(hook), Some(checkpoint.embed.clone()), context_length, sizes)?;
        this.prefill_chunk = options.prefill_chunk;
        this.watch = watch;
        this.head = parts.head_node;
        let facts = format!("{spec:?} {:?}", options.llama_cpp);
        this.finish(options, checkpoint.files.clone(), &facts)
    }

    /// A model that llama.cpp has loaded, from `files`, which may be watched, and looks up by itself.
    pub(crate) fn native(
        model: Model,
        files: Vec<PathBuf>,
        watch: FileWatch,
        shape: &KvShape,
        can_cut: bool,
        options: &ModelOptions,
    ) -> Result<Self> {
        let (context_length, sizes) = sizes(shape, options, KvType::F16, false)?;
        let mut this = Self::start(model, None, None, context_length, sizes)?;
        this.can_cut = can_cut;
        this.watch = watch;
        this.prefill_chunk = options.prefill_chunk;
        this.finish(options, files, &format!("{:?}", options.llama_cpp))
    }

    /// The same, ready to save its sequences if that is asked for. `facts` are what keys and values depend on besides the files.
    fn finish(mut self, options: &ModelOptions, files: Vec<PathBuf>, facts: &str) -> Result<Self> {
        if options.keeps_prompts {
            let sizes = self.context.sizes();
            // Sizes, because llama.cpp chooses its graphs and their threads by them, and some rotary embeddings too.
            self.saved.facts = format!(
                "{} {} {} {} {} {:?} {} {} {facts}",
                env!("CARGO_PKG_VERSION"),
                runtime::description(),
                sizes.cache_tokens,
                sizes.threads.count(),
                sizes.batch,
                sizes.kv_type,
                sizes.flash_attention,
                self.context.is_hooked(),
            );
            self.saved.files = files;
            self.keep_prompts()?;
        }
        Ok(self)
    }

    pub(crate) fn context(&mut self) -> &mut Context {
        &mut self.context
    }

    pub(crate) fn saved(&mut self) -> &mut Saved {
        &mut self.saved
    }

    pub(crate) fn start(
        model: Model,
        hook: Option<Hook>,
        embed: Option<Table>,
        context_length: usize,
        sizes: ContextSizes,
    ) -> Result<Self> {
        let lengths = vec![None; sizes.sequences];
        let context = Context::new(model, hook, sizes)?;
        let input = match &embed {
            None => Input::Tokens(Vec::new()),
            Some(embed) => Input::Embeddings { rows: Vec::new(), width: embed.shape()[1] },
        };
        let (batch, prefill_chunk) = (Batch::new(input), context.sizes().batch);
        let watch = FileWatch::default();
        let saved = Saved::default();
        Ok(Self {
            context,
            batch,
            embed,
            head: None,
            context_length,
            prefill_chunk,
            lengths,
            can_cut: true,
            watch,
            saved,
        })
    }

    fn length(&self, sequence: SequenceId) -> Option<usize> {
        self.lengths.get(sequence.0 as usize).copied().flatten()
    }

    /// Computes inputs whose logits must be equally exact together: llama.cpp may put the rows of a graph into another order.
    fn run(&mut self, batch: &[SequenceInput<'_>], logits: &mut Vec<f32>) -> Result<()> {
        let Some(head) = self.head.clone() else { return self.decode(batch, logits) };
        let mut wanted = batch.iter().filter(|input| input.rows() > 0).map(|input| input.precision);
        let first = wanted.next().unwrap_or_default();
        if wanted.all(|precision| precision == first) {
            head.set_precision(first);
            return self.decode(batch, logits);
        }
        for same in batch.chunk_by(|a, b| a.precision == b.precision) {
            head.set_precision(same[0].precision);
            self.decode(same, logits)?;
        }
        Ok(())
    }

    fn decode(&mut self, batch: &[SequenceInput<'_>], logits: &mut Vec<f32>) -> Result<()> {
        let tokens: Vec<(u32, usize, u32, bool)> = batch
            .iter()
            .flat_map(|input| {
                let past = self.length(input.sequence).unwrap_or(0);
                let first_wanted = match input.logits {
                    LogitsWanted::None => input.tokens.len(),
                    LogitsWanted::Last => input.tokens.len() - 1,
                    LogitsWanted::From(start) => start,
                };
                let sequence = input.sequence.0;
                let tokens = input.tokens.iter().enumerate();
                tokens.map(move |(i, &token)| (sequence, past + i, token, i >= first_wanted))
            })
            .collect();
        for chunk in tokens.chunks(self.context.sizes().batch) {
            self.batch.clear();
            for &(sequence, position, token, wanted) in chunk {
                self.batch.push(sequence, position, wanted);
                match (&mut self.batch.input, &self.embed) {
                    (Input::Embeddings { rows, width }, Some(embed)) => {
                        let start = rows.len();
                        rows.resize(start + *width, 0.0);
                        embed.row(token as usize, &mut rows[start..])?;
                    }
                    (Input::Tokens(ids), _) => ids.push(token as i32),
                    (Input::Embeddings { .. }, None) => {
                        return Err(Error::backend("rows of an embedding without one"));
                    }
                }
            }
            self.context.decode(&mut self.batch)?;
            for (i, _) in chunk.iter().enumerate().filter(|(_, token)| token.3) {
                logits.extend_from_slice(self.context.logits(i)?);
            }
        }
        Ok(())
    }

    /// The lowest id that is free.
    fn free_id(&self) -> Result<u32> {
        let id = self.lengths.iter().position(Option::is_none).ok_or_else(|| {
            let most = self.lengths.len();
            Error::new(ErrorKind::ResourceExhausted, format!("all {most} sequences are in use"))
        })?;
        Ok(id as u32)
    }
}

impl CausalLm for LlamaCpp {
    fn context_length(&self) -> usize {
        self.context_length
    }

    fn vocab_size(&self) -> usize {
        self.context.vocab_size()
    }

    fn max_sequences(&self) -> usize {
        self.lengths.len()
    }

    fn max_batch_tokens(&self) -> usize {
        self.prefill_chunk
    }

    fn can_truncate(&self) -> bool {
        self.can_cut
    }

    fn new_sequence(&mut self) -> Result<SequenceId> {
        let id = self.free_id()?;
        self.lengths[id as usize] = Some(0);
        Ok(SequenceId(id))
    }

    fn forward(&mut self, batch: &[SequenceInput<'_>], logits: &mut Vec<f32>) -> Result<()> {
        logits.clear();
        self.watch.check()?;
        // Also what llama.cpp would abort for, or what would leave a call half done.
        batch::spans(batch, |id| self.length(id), self.context_length, self.context.vocab_size())?;
        let outcome = self.run(batch, logits);
        // A file that changed meanwhile explains whatever was computed.
        let outcome = self.watch.check().and(outcome);
        for input in batch {
            let index = input.sequence.0 as usize;
            let past = self.lengths[index].unwrap_or(0);
            if outcome.is_ok() {
                self.lengths[index] = Some(past + input.tokens.len());
            } else if !self.context.remove(input.sequence.0, past) {
                // A cache that cannot be cut is emptied, rather than left with tokens that nobody knows of.
                self.context.remove(input.sequence.0, 0);
                self.lengths[index] = Some(0);
            }
        }
        if outcome.is_err() {
            logits.clear();
        }
        outcome.with_operation("forward")
    }

    fn len(&self, sequence: SequenceId) -> usize {
        self.length(sequence).unwrap_or(0)
    }

    fn truncate(&mut self, sequence: SequenceId, length: usize) -> Result<()> {
        let current = self.len(sequence);
        if length >= current {
            return Ok(());
        }
        let possible = self.can_cut || length == 0;
        if !possible || !self.context.remove(sequence.0, length) {
            return Err(Error::unsupported("the model's state cannot be cut to a shorter text"));
        }
        self.lengths[sequence.0 as usize] = Some(length);
        Ok(())
    }

    fn fork(&mut self, sequence: SequenceId, length: usize) -> Result<SequenceId> {
        let current = self.length(sequence).ok_or_else(|| batch::no_such(sequence))?;
        let length = length.min(current);
        if !self.can_cut && length < current {
            return Err(Error::unsupported("the model's state cannot be cut to a shorter text"));
        }
        let id = self.free_id()?;
        if length > 0 {
            self.context.share(sequence.0, id, length);
        }
        self.lengths[id as usize] = Some(length);
        Ok(SequenceId(id))
    }

    fn free(&mut self, sequence: SequenceId) {
        if let Some(length) = self.lengths.get_mut(sequence.0 as usize)
            && length.take().is_some()
        {
            self.context.remove(sequence.0, 0);
        }
    }

    fn kv_identity(&self) -> Result<KvIdentity> {
        self.saved.identity(self.prefill_chunk)
    }

    fn prefix(&mut self, sequence: SequenceId, blocks: Range<usize>) -> Result<KvPrefix> {
        let length = self.length(sequence).ok_or_else(|| batch::no_such(sequence))?;
        let end = blocks.end.min(length / BLOCK);
        saved::take(&mut self.context, &self.saved, sequence.0, blocks.start.min(end)..end)
    }

    fn adopt(&mut self, prefix: KvPrefix) -> Result<SequenceId> {
        let id = self.free_id()?;
        if prefix.tokens() > self.context_length {
            return Err(Error::backend("the saved tokens are more than the context holds"));
        }
        if let Err(error) = saved::put(&mut self.context, &self.saved, id, &prefix) {
            self.context.remove(id, 0);
            return Err(error);
        }
        self.lengths[id as usize] = Some(prefix.tokens());
        Ok(SequenceId(id))
    }
}

/// The context's length, and sizes that llama.cpp takes without ending the process. `flash`: whether attention is computed in
/// one pass unless the options say otherwise.
fn sizes(
    shape: &KvShape,
    options: &ModelOptions,
    default_kv_type: KvType,
    flash: bool,
) -> Result<(usize, ContextSizes)> {
    let out_of_range = |key: &str, value: usize, expected: String| {
        Err(Error::invalid_config(format!("{key}: {value} is out of range; {expected} expected")))
    };
    let kv_type = options.llama_cpp.kv_type.unwrap_or(default_kv_type);
    let per_token = shape.bytes_per_token(kv_type).max(1);
    let own = shape.context_length;
    let sequences = options.max_sequences.max(1);
    let fits = usize::try_from(DEFAULT_KV_BYTES / per_token).unwrap_or(usize::MAX) / sequences;
    let context = options.context_length.unwrap_or_else(|| own.min(fits).max(MIN_CONTEXT.min(own)));
    if context < MIN_CONTEXT {
        return out_of_range("context_length", context, format!("at least {MIN_CONTEXT}"));
    }
    if context > own {
        return out_of_range("context_length", context, format!("at most {own}, the model's own,"));
    }
    let most = MAX_SEQUENCES - usize::from(options.keeps_prompts);
    if options.max_sequences == 0 || options.max_sequences > most {
        return out_of_range("max_sequences", options.max_sequences, format!("1 to {most}"));
    }
    if options.prefill_chunk == 0 {
        return out_of_range("prefill_chunk", 0, "at least 1".to_owned());
    }
    let cache_tokens =
        options.llama_cpp.cache_tokens.unwrap_or(context.saturating_mul(options.max_sequences));
    if cache_tokens < context || cache_tokens > context.saturating_mul(options.max_sequences) {
        let expected = format!("`context_length` ({context}) to `context_length` times `max_sequences`");
        return out_of_range("options.cache_tokens", cache_tokens, expected);
    }
    let flash_attention = options.llama_cpp.flash_attention.unwrap_or(flash || kv_type == KvType::Q8_0);
    if kv_type == KvType::Q8_0 && !flash_attention {
        return Err(Error::invalid_config("options.kv_type: q8_0 needs `flash_attention`, which is off"));
    }
    if !shape.head_dim.is_multiple_of(kv_type.block()) {
        let message =
            format!("options.kv_type: q8_0 needs heads of a multiple of 32; {} found", shape.head_dim);
        return Err(Error::invalid_config(message));
    }
    memory::check(per_token.saturating_mul(cache_tokens as u64), "the KV cache")?;
    let sizes = ContextSizes {
        cache_tokens,
        batch: options.prefill_chunk.max(options.max_sequences).min(cache_tokens),
        sequences: options.max_sequences,
        threads: runtime::threads(&options.threads),
        kv_type,
        flash_attention,
        keeps_prompts: options.keeps_prompts,
    };
    Ok((context, sizes))
}
