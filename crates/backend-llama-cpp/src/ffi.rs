//! llama.cpp's objects with an owner: what is created is freed, in order, and what would abort the process is an error.

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;
use ternion_core::{Error, ErrorKind, Result};
use ternion_engine::ComputeThreads;

use crate::{KvType, hook, hook::Hook, log, runtime};

/// The most sequences that llama.cpp is built for.
pub(crate) const MAX_SEQUENCES: usize = 256;

/// A model.
pub(crate) struct Model(NonNull<sys::llama_model>);

impl Model {
    /// The model that `load` returns, or an error with what llama.cpp logged meanwhile.
    pub(crate) fn load(load: impl FnOnce() -> *mut sys::llama_model) -> Result<Self> {
        let (model, log) = log::capture(load);
        let model = NonNull::new(model).map(Self);
        log.check_panics()?;
        model.ok_or_else(|| Error::invalid_model(format!("llama.cpp cannot load the model: {}", log.why())))
    }

    /// For llama.cpp's functions that look at a model.
    pub(crate) fn as_ptr(&self) -> *mut sys::llama_model {
        self.0.as_ptr()
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: It is this owner's, and no context uses it any more, see `Context`.
        unsafe { sys::llama_model_free(self.0.as_ptr()) };
    }
}

/// Sizes and types of a [`Context`]; [`Context::new`] checks none of them.
#[derive(Debug, Clone)]
pub(crate) struct ContextSizes {
    /// Tokens that all sequences together may hold.
    pub(crate) cache_tokens: usize,
    /// Tokens of one call of [`Context::decode`].
    pub(crate) batch: usize,
    pub(crate) sequences: usize,
    pub(crate) threads: ComputeThreads,
    pub(crate) kv_type: KvType,
    pub(crate) flash_attention: bool,
    /// Whether there is a further sequence, by which blocks of others are saved and restored.
    pub(crate) keeps_prompts: bool,
}

/// A model with its KV cache and its threads.
pub(crate) struct Context {
    // Dropped by hand, before what it uses.
    raw: NonNull<sys::llama_context>,
    memory: sys::llama_memory_t,
    pool: sys::ggml_threadpool_t,
    hook: Option<NonNull<Hook>>,
    model: Model,
    sizes: ContextSizes,
    vocab_size: usize,
}

// SAFETY: llama.cpp ties a context to no thread; all calls go through `&mut self` or touch nothing that changes. The hook
// and the pool are this owner's alone.
unsafe impl Send for Context {}

impl Context {
    pub(crate) fn new(model: Model, hook: Option<Hook>, sizes: ContextSizes) -> Result<Self> {
        let hook = hook.map(|hook| NonNull::from(Box::leak(Box::new(hook))));
        // SAFETY: A function without arguments that returns a plain structure.
        let mut params = unsafe { sys::llama_context_default_params() };
        params.n_ctx = sizes.cache_tokens as u32;
        params.n_batch = sizes.batch as u32;
        params.n_ubatch = sizes.batch as u32;
        params.n_seq_max = (sizes.sequences + usize::from(sizes.keeps_prompts)) as u32;
        params.n_threads = sizes.threads.count() as i32;
        params.n_threads_batch = sizes.threads.count() as i32;
        params.type_k = sizes.kv_type.ggml();
        params.type_v = sizes.kv_type.ggml();
        params.flash_attn_type = if sizes.flash_attention {
            sys::LLAMA_FLASH_ATTN_TYPE_ENABLED
        } else {
            sys::LLAMA_FLASH_ATTN_TYPE_DISABLED
        };
        // One cache for all sequences: each may take what the others leave, and a fork shares what it has in common.
        params.kv_unified = true;
        params.no_perf = true;
        if let Some(hook) = hook {
            params.cb_eval = Some(hook::on_node);
            params.cb_eval_user_data = hook.as_ptr().cast::<c_void>();
        }
        // SAFETY: The model is alive, and so is the hook as long as the context.
        let (raw, log) = log::capture(|| unsafe { sys::llama_init_from_model(model.as_ptr(), params) });
        let Some(raw) = NonNull::new(raw) else {
            free_hook(hook);
            log.check_panics()?;
            return Err(Error::backend(format!("llama.cpp cannot make a context: {}", log.why())));
        };
        // SAFETY: The model is alive; its vocabulary lives as long as it.
        let vocab_size = unsafe { sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(model.as_ptr())) };
        // SAFETY: The context is alive.
        let memory = unsafe { sys::llama_get_memory(raw.as_ptr()) };
        let vocab_size = usize::try_from(vocab_size).unwrap_or(0);
        let pool = std::ptr::null_mut();
        // SAFETY: The context is alive. It may take a smaller batch than it was asked for.
        let batch = unsafe { sys::llama_n_batch(raw.as_ptr()) } as usize;
        let sizes = ContextSizes { batch: sizes.batch.min(batch), ..sizes };
        let mut context = Self { raw, memory, pool, hook, model, sizes, vocab_size };
        log.check_panics()?;
        if memory.is_null() || vocab_size == 0 {
            return Err(Error::unsupported(
                "the model generates no text: it has no KV cache or no vocabulary",
            ));
        }
        context.start_threads()?;
        Ok(context)
    }

    fn start_threads(&mut self) -> Result<()> {
        self.pool = runtime::thread_pool(&self.sizes.threads)?;
        // SAFETY: The context is alive and does not compute, and the pool lives until after it.
        unsafe { sys::llama_attach_threadpool(self.raw.as_ptr(), self.pool, self.pool) };
        Ok(())
    }

    pub(crate) fn sizes(&self) -> &ContextSizes {
        &self.sizes
    }

    pub(crate) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Computes a batch. After an error the batch's tokens may be in the KV cache in part.
    pub(crate) fn decode(&mut self, batch: &mut Batch) -> Result<()> {
        self.check(batch)?;
        if let Some(hook) = self.hook {
            // SAFETY: The hook is this owner's, and no graph is being computed.
            unsafe { (*hook.as_ptr()).begin() };
        }
        // SAFETY: `check` has seen that every array of the batch is as long as it says and that its sequences, tokens
        // and size are in range. It lives for the call, which changes nothing of it.
        let (code, log) = log::capture(|| unsafe { sys::llama_decode(self.raw.as_ptr(), batch.raw()) });
        if let Some(hook) = self.hook {
            // SAFETY: As above.
            unsafe { (*hook.as_ptr()).check_panics()? };
        }
        log.check_panics()?;
        match code {
            0 => {}
            1 => {
                return Err(Error::new(
                    ErrorKind::ResourceExhausted,
                    format!("the KV cache of {} tokens is full", self.sizes.cache_tokens),
                ));
            }
            _ => return Err(Error::backend(format!("llama.cpp failed to compute ({code}): {}", log.why()))),
        }
        match self.hook {
            // SAFETY: As above.
            Some(hook) => unsafe { (*hook.as_ptr()).finish() },
            None => Ok(()),
        }
    }

    fn check(&self, batch: &Batch) -> Result<()> {
        let tokens = batch.positions.len();
        let in_range = (1..=self.sizes.batch).contains(&tokens)
            && batch.sequences.iter().all(|s| self.is_sequence(*s))
            && batch.positions.iter().all(|p| *p >= 0)
            && batch.sequences.len() == tokens
            && batch.wanted.len() == tokens
            && match batch.input {
                Input::Tokens(ref ids) => {
                    ids.len() == tokens && ids.iter().all(|id| (0..self.vocab_size as i32).contains(id))
                }
                Input::Embeddings { ref rows, width } => {
                    // SAFETY: The model is alive.
                    let expected = unsafe { sys::llama_model_n_embd_inp(self.model.as_ptr()) };
                    width == expected as usize && rows.len() == tokens * width
                }
            };
        if in_range { Ok(()) } else { Err(Error::backend("a batch for llama.cpp is out of range")) }
    }

    fn is_sequence(&self, sequence: i32) -> bool {
        usize::try_from(sequence).is_ok_and(|s| s < self.sizes.sequences)
    }

    /// The logits of token `index` of the last batch, which asked for them.
    pub(crate) fn logits(&self, index: usize) -> Result<&[f32]> {
        // SAFETY: The context is alive; an index that has no logits gives NULL.
        let row = unsafe { sys::llama_get_logits_ith(self.raw.as_ptr(), index as i32) };
        if row.is_null() {
            return Err(Error::backend(format!("llama.cpp has no logits of token {index}")));
        }
        // SAFETY: A row has as many floats as the vocabulary has tokens, and stays until the next batch, which needs
        // `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts(row, self.vocab_size) })
    }

    /// Removes the tokens from position `from` on; `false` if the model's cache cannot be cut there.
    pub(crate) fn remove(&mut self, sequence: u32, from: usize) -> bool {
        self.is_sequence(sequence as i32)
            // SAFETY: The memory is that of a context that is alive, and the sequence is in range.
            && unsafe { sys::llama_memory_seq_rm(self.memory, sequence as i32, from as i32, -1) }
    }

    /// The state of the tokens at `positions` of a sequence, in llama.cpp's own form, as of the sequence [`passing`](Self::passing).
    pub(crate) fn save(&mut self, sequence: u32, positions: Range<usize>) -> Result<Vec<u8>> {
        let passing = self.passing()?;
        if !self.is_sequence(sequence as i32) {
            return Err(Error::backend(format!("there is no sequence {sequence}")));
        }
        let (from, to) = (positions.start as i32, positions.end as i32);
        let (context, memory) = (self.raw.as_ptr(), self.memory);
        // SAFETY: The context is alive, both sequences are in its range, and the buffer is as long as is said.
        let ((size, written, bytes), log) = log::capture(|| unsafe {
            sys::llama_memory_seq_cp(memory, sequence as i32, passing, from, to);
            let size = sys::llama_state_seq_get_size(context, passing);
            let mut bytes = Vec::new();
            let mut written = 0;
            if bytes.try_reserve_exact(size).is_ok() {
                bytes.resize(size, 0u8);
                written = sys::llama_state_seq_get_data(context, bytes.as_mut_ptr(), size, passing);
            }
            sys::llama_memory_seq_rm(memory, passing, -1, -1);
            (size, written, bytes)
        });
        log.check_panics()?;
        if size == 0 || written != size {
            return Err(Error::backend(format!(
                "llama.cpp cannot save a part of its KV cache: {}",
                log.why()
            )));
        }
        Ok(bytes)
    }

    /// Appends tokens to a sequence, of which `bytes` are the state that [`save`](Self::save) returns for these `positions`. After
    /// an error the sequence is as it was.
    pub(crate) fn restore(&mut self, sequence: u32, positions: Range<usize>, bytes: &[u8]) -> Result<()> {
        let passing = self.passing()?;
        if !self.is_sequence(sequence as i32) {
            return Err(Error::backend(format!("there is no sequence {sequence}")));
        }
        let (from, to) = (positions.start as i32, positions.end as i32);
        let (context, memory) = (self.raw.as_ptr(), self.memory);
        // SAFETY: The context is alive, both sequences are in its range, and llama.cpp reads no further than it is told. It compares
        // the shape and type of what it reads with its own, and the caller has seen to the positions.
        let (read, log) = log::capture(|| unsafe {
            let read = sys::llama_state_seq_set_data(context, bytes.as_ptr(), bytes.len(), passing);
            if read == bytes.len() {
                sys::llama_memory_seq_cp(memory, passing, sequence as i32, from, to);
            }
            sys::llama_memory_seq_rm(memory, passing, -1, -1);
            read
        });
        log.check_panics()?;
        if read == bytes.len() {
            return Ok(());
        }
        Err(Error::backend(format!("llama.cpp cannot restore a part of its KV cache: {}", log.why())))
    }

    /// The sequence by which blocks of others pass. It is empty in between.
    pub(crate) fn passing(&self) -> Result<i32> {
        if self.sizes.keeps_prompts {
            return Ok(self.sizes.sequences as i32);
        }
        Err(Error::unsupported("the context was made without a sequence to save others by"))
    }

    /// Tokens that attention looks back at most; 0 for all.
    pub(crate) fn window(&self) -> usize {
        // SAFETY: The model is alive.
        usize::try_from(unsafe { sys::llama_model_n_swa(self.model.as_ptr()) }).unwrap_or(0)
    }

    /// Whether the products are Ternion's.
    pub(crate) fn is_hooked(&self) -> bool {
        self.hook.is_some()
    }

    /// Makes `target`, which is empty, share the first `length` tokens of `source`.
    pub(crate) fn share(&mut self, source: u32, target: u32, length: usize) {
        if self.is_sequence(source as i32) && self.is_sequence(target as i32) && source != target {
            // SAFETY: As in `remove`; the cache is one for all sequences, so that a part can be shared.
            unsafe { sys::llama_memory_seq_cp(self.memory, source as i32, target as i32, 0, length as i32) };
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: The context is freed before what it uses: its threads, the hook and (as a field, after this) the model.
        unsafe {
            sys::llama_free(self.raw.as_ptr());
            if !self.pool.is_null() {
                sys::ggml_threadpool_free(self.pool);
            }
        }
        free_hook(self.hook);
    }
}

fn free_hook(hook: Option<NonNull<Hook>>) {
    if let Some(hook) = hook {
        // SAFETY: It was leaked from a box by `Context::new`, and no context uses it any more.
        drop(unsafe { Box::from_raw(hook.as_ptr()) });
    }
}

/// What goes into the graph for each token.
pub(crate) enum Input {
    /// Ids, which llama.cpp looks up.
    Tokens(Vec<i32>),
    /// Rows of the embedding, `width` floats each.
    Embeddings { rows: Vec<f32>, width: usize },
}

/// Tokens for [`Context::decode`].
pub(crate) struct Batch {
    pub(crate) input: Input,
    positions: Vec<i32>,
    sequences: Vec<i32>,
    wanted: Vec<i8>,
    counts: Vec<i32>,
    pointers: Vec<*mut i32>,
}

// SAFETY: The pointers are into a vector of the same value and are set anew for each use.
unsafe impl Send for Batch {}

impl Batch {
    pub(crate) fn new(input: Input) -> Self {
        Self {
            input,
            positions: Vec::new(),
            sequences: Vec::new(),
            wanted: Vec::new(),
            counts: Vec::new(),
            pointers: Vec::new(),
        }
    }

    /// Makes it empty.
    pub(crate) fn clear(&mut self) {
        match &mut self.input {
            Input::Tokens(ids) => ids.clear(),
            Input::Embeddings { rows, .. } => rows.clear(),
        }
        self.positions.clear();
        self.sequences.clear();
        self.wanted.clear();
    }

    /// Adds a token whose id or embedding has been added to `input`.
    pub(crate) fn push(&mut self, sequence: u32, position: usize, wanted: bool) {
        self.positions.push(position as i32);
        self.sequences.push(sequence as i32);
        self.wanted.push(i8::from(wanted));
    }

    pub(crate) fn raw(&mut self) -> sys::llama_batch {
        let tokens = self.positions.len();
        self.counts.clear();
        self.counts.resize(tokens, 1);
        self.pointers.clear();
        self.pointers.extend(self.sequences.iter_mut().map(std::ptr::from_mut));
        let (token, embd) = match &mut self.input {
            Input::Tokens(ids) => (ids.as_mut_ptr(), std::ptr::null_mut()),
            Input::Embeddings { rows, .. } => (std::ptr::null_mut(), rows.as_mut_ptr()),
        };
        sys::llama_batch {
            n_tokens: tokens as i32,
            token,
            embd,
            pos: self.positions.as_mut_ptr(),
            n_seq_id: self.counts.as_mut_ptr(),
            seq_id: self.pointers.as_mut_ptr(),
            logits: self.wanted.as_mut_ptr(),
        }
    }
}
