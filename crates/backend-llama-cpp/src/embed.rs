//! Embeddings by llama.cpp: a model of a GGUF file in a context that pools.

use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;
use ternion_core::{Error, Pooling, Result, ResultExt};
use ternion_engine::{ComputeThreads, EmbeddingModel};
use ternion_formats::FileWatch;

use crate::{
    ModelOptions,
    ffi::{Batch, Input, Model},
    log, memory, runtime,
};

/// Bytes of logits that the graph of a decoder makes room for, beyond which the default context is shorter than the model's own.
/// llama.cpp computes them whether they are wanted or not.
const DEFAULT_LOGIT_BYTES: u64 = 1 << 30;
/// The default context has at least so many tokens, if the model does.
const LEAST_DEFAULT: usize = 512;
/// The fewest tokens of context; llama.cpp ends the process for some that are smaller.
const MIN_CONTEXT: usize = 32;
/// Inputs of one step.
const SEQUENCES: usize = 16;
/// Tokens of one step, where the context is shorter.
const STEP: usize = 512;

/// A model that pools.
pub(crate) struct Embedder {
    // Dropped by hand, before what it uses.
    raw: NonNull<sys::llama_context>,
    pool: sys::ggml_threadpool_t,
    /// Null for an encoder, which keeps no keys and values.
    memory: sys::llama_memory_t,
    _model: Model,
    batch: Batch,
    watch: FileWatch,
    context_length: usize,
    batch_tokens: usize,
    vocab_size: usize,
    dimensions: usize,
    pooling: Pooling,
}

// SAFETY: llama.cpp ties a context to no thread, and all calls go through `&mut self`. The pool is this owner's alone.
unsafe impl Send for Embedder {}

impl Embedder {
    /// A context for a model that llama.cpp has loaded from the files that are watched.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a model that does not pool, [`ErrorKind::InvalidConfig`] for a context out of range.
    pub(crate) fn new(
        model: Model,
        watch: FileWatch,
        pooling: Option<Pooling>,
        options: &ModelOptions,
    ) -> Result<Self> {
        // SAFETY: The model is alive; its vocabulary lives as long as it.
        let [trained, vocab_size, dimensions] = unsafe {
            [
                sys::llama_model_n_ctx_train(model.as_ptr()),
                sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(model.as_ptr())),
                sys::llama_model_n_embd_out(model.as_ptr()),
            ]
        }
        .map(|size| usize::try_from(size).unwrap_or(0));
        if trained == 0 || vocab_size == 0 || dimensions == 0 {
            return Err(Error::invalid_model(
                "the model says of itself that it has no context, vocabulary or width",
            ));
        }
        let fits = usize::try_from(DEFAULT_LOGIT_BYTES / (4 * vocab_size as u64)).unwrap_or(usize::MAX);
        let context = options.context_length.unwrap_or_else(|| trained.min(fits.max(LEAST_DEFAULT)));
        if context < MIN_CONTEXT.min(trained) || context > trained {
            return Err(Error::invalid_config(format!(
                "context_length: {context} is out of range; {} to {trained}, the model's own, expected",
                MIN_CONTEXT.min(trained)
            )));
        }
        let batch_tokens = context.max(STEP.min(trained)).max(MIN_CONTEXT);
        memory::check(4 * batch_tokens as u64 * vocab_size as u64, "the context for embeddings")?;
        let threads = runtime::threads(&options.threads);
        // SAFETY: A function without arguments that returns a plain structure.
        let mut params = unsafe { sys::llama_context_default_params() };
        params.embeddings = true;
        params.pooling_type = match pooling {
            None | Some(Pooling::Unknown) => sys::LLAMA_POOLING_TYPE_UNSPECIFIED,
            Some(Pooling::Mean) => sys::LLAMA_POOLING_TYPE_MEAN,
            Some(Pooling::Cls) => sys::LLAMA_POOLING_TYPE_CLS,
            Some(Pooling::Last) => sys::LLAMA_POOLING_TYPE_LAST,
            Some(other) => {
                return Err(Error::unsupported(format!("options.pooling: llama.cpp has no `{other}`")));
            }
        };
        // A step is one piece of llama.cpp's: it pools piece by piece, and a model without a causal mask needs all tokens.
        params.n_ctx = batch_tokens as u32;
        params.n_batch = batch_tokens as u32;
        params.n_ubatch = batch_tokens as u32;
        params.n_seq_max = SEQUENCES as u32;
        params.n_threads = threads.count() as i32;
        params.n_threads_batch = threads.count() as i32;
        params.type_k = sys::GGML_TYPE_F32;
        params.type_v = sys::GGML_TYPE_F32;
        params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_DISABLED;
        params.kv_unified = true;
        params.no_perf = true;
        // SAFETY: The model is alive.
        let (raw, log) = log::capture(|| unsafe { sys::llama_init_from_model(model.as_ptr(), params) });
        log.check_panics()?;
        let raw = NonNull::new(raw)
            .ok_or_else(|| Error::backend(format!("llama.cpp cannot make a context: {}", log.why())))?;
        // SAFETY: The context is alive.
        let (memory, kind) =
            unsafe { (sys::llama_get_memory(raw.as_ptr()), sys::llama_pooling_type(raw.as_ptr())) };
        let mut this = Self {
            raw,
            pool: std::ptr::null_mut(),
            memory,
            _model: model,
            batch: Batch::new(Input::Tokens(Vec::new())),
            watch,
            context_length: context,
            batch_tokens,
            vocab_size,
            dimensions,
            pooling: Pooling::Unknown,
        };
        this.pooling = match kind {
            sys::LLAMA_POOLING_TYPE_MEAN => Pooling::Mean,
            sys::LLAMA_POOLING_TYPE_CLS => Pooling::Cls,
            sys::LLAMA_POOLING_TYPE_LAST => Pooling::Last,
            sys::LLAMA_POOLING_TYPE_RANK => {
                return Err(Error::unsupported(
                    "the model ranks texts, which is not implemented; one for embeddings expected",
                ));
            }
            _ => {
                return Err(Error::unsupported(
                    "the file does not say how the model pools; `options.pooling` does",
                ));
            }
        };
        this.start_threads(&threads)?;
        Ok(this)
    }

    fn start_threads(&mut self, threads: &ComputeThreads) -> Result<()> {
        self.pool = runtime::thread_pool(threads)?;
        // SAFETY: The context is alive and does not compute, and the pool lives until after it.
        unsafe { sys::llama_attach_threadpool(self.raw.as_ptr(), self.pool, self.pool) };
        Ok(())
    }

    pub(crate) fn dimensions(&self) -> usize {
        self.dimensions
    }

    pub(crate) fn pooling(&self) -> Pooling {
        self.pooling
    }

    fn compute(&mut self, inputs: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let tokens: usize = inputs.iter().map(|input| input.len()).sum();
        let in_range = (1..=SEQUENCES).contains(&inputs.len())
            && tokens <= self.batch_tokens
            && inputs.iter().all(|input| !input.is_empty())
            && inputs.iter().copied().flatten().all(|id| (*id as usize) < self.vocab_size);
        if !in_range {
            return Err(Error::backend("a batch for llama.cpp is out of range"));
        }
        self.batch.clear();
        for (sequence, input) in inputs.iter().enumerate() {
            for (position, &id) in input.iter().enumerate() {
                self.batch.push(sequence as u32, position, true);
                if let Input::Tokens(ids) = &mut self.batch.input {
                    ids.push(id as i32);
                }
            }
        }
        let (raw, memory) = (self.raw.as_ptr(), self.memory);
        let batch = self.batch.raw();
        // SAFETY: The context is alive, and its memory with it. The sizes and ids of the batch were checked above; it
        // lives for the call, which changes nothing of it.
        let (code, log) = log::capture(|| unsafe {
            if memory.is_null() {
                sys::llama_encode(raw, batch)
            } else {
                sys::llama_memory_clear(memory, true);
                sys::llama_decode(raw, batch)
            }
        });
        log.check_panics()?;
        if code != 0 {
            return Err(Error::backend(format!("llama.cpp failed to compute ({code}): {}", log.why())));
        }
        (0..inputs.len())
            .map(|sequence| {
                // SAFETY: The context is alive; a sequence without a vector gives NULL.
                let vector = unsafe { sys::llama_get_embeddings_seq(raw, sequence as i32) };
                if vector.is_null() {
                    return Err(Error::backend(format!("llama.cpp has no vector of input {sequence}")));
                }
                // SAFETY: A vector has as many values as the model says, and stays until the next batch.
                Ok(unsafe { std::slice::from_raw_parts(vector, self.dimensions) }.to_vec())
            })
            .collect()
    }
}

impl EmbeddingModel for Embedder {
    fn context_length(&self) -> usize {
        self.context_length
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_batch_tokens(&self) -> usize {
        self.batch_tokens
    }

    fn max_batch_inputs(&self) -> usize {
        SEQUENCES
    }

    fn pool(&mut self, inputs: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        self.watch.check()?;
        let outcome = self.compute(inputs);
        // A file that changed meanwhile explains whatever was computed.
        self.watch.check().and(outcome).with_operation("embed")
    }
}

impl Drop for Embedder {
    fn drop(&mut self) {
        // SAFETY: The context is freed before what it uses: its threads and (as a field, after this) the model.
        unsafe {
            sys::llama_free(self.raw.as_ptr());
            if !self.pool.is_null() {
                sys::ggml_threadpool_free(self.pool);
            }
        }
    }
}
