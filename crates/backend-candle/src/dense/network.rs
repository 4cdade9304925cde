//! The models of candle-transformers behind one trait, with what each can and cannot do.
//!
//! All of them give the logits of the last token alone. They differ in how they keep keys and values, on which depends whether
//! a second sequence can share their weights, and in where they take several tokens at once. What is stated here was read in
//! candle-transformers 0.11.1 and is held to by the tests of `tests/dense.rs`.

use candle_core::{Result, Tensor};
use candle_transformers::models::{
    gemma2, gemma3, phi3, quantized_llama, quantized_phi3, quantized_qwen2, quantized_qwen3, qwen2,
};

/// A model with the keys and values of one sequence.
pub(super) trait Network: Send {
    /// The logits of the last of `tokens` `[1, n]`, which follow the `past` ones that were fed since the last reset.
    fn forward(&mut self, tokens: &Tensor, past: usize) -> Result<Tensor>;

    /// Forgets all tokens.
    fn reset(&mut self);

    /// Another network on the same weights that has been fed the same tokens; `None` where the model cannot share its weights,
    /// or not with what it has been fed.
    fn fork(&self) -> Option<Box<dyn Network>>;

    /// The most tokens that one call of [`forward`](Self::forward) takes behind `past` others.
    fn most(&self, past: usize) -> usize {
        let _ = past;
        usize::MAX
    }
}

/// A model that makes new tensors when it appends keys and values, so that its clones share what is there.
macro_rules! shared {
    ($model:ty) => {
        impl Network for $model {
            fn forward(&mut self, tokens: &Tensor, past: usize) -> Result<Tensor> {
                <$model>::forward(self, tokens, past)
            }

            fn reset(&mut self) {
                self.clear_kv_cache();
            }

            fn fork(&self) -> Option<Box<dyn Network>> {
                Some(Box::new(self.clone()))
            }
        }
    };
}

shared!(qwen2::ModelForCausalLM);
shared!(gemma2::Model);
shared!(phi3::Model);
shared!(quantized_llama::ModelWeights);

/// Gemma 3, whose caches are written in place and take one token at a time: several at once are not laid out as its cache for
/// layers without a window needs them.
pub(super) struct Gemma3 {
    pub(super) model: gemma3::Model,
    pub(super) is_empty: bool,
}

impl Network for Gemma3 {
    fn forward(&mut self, tokens: &Tensor, past: usize) -> Result<Tensor> {
        self.is_empty = false;
        self.model.forward(tokens, past)
    }

    fn reset(&mut self) {
        self.model.clear_kv_cache();
        self.is_empty = true;
    }

    fn fork(&self) -> Option<Box<dyn Network>> {
        let copy = || Self { model: self.model.clone(), is_empty: true };
        self.is_empty.then(|| Box::new(copy()) as Box<dyn Network>)
    }

    fn most(&self, _past: usize) -> usize {
        1
    }
}

/// Quantised Phi 3, whose caches are written in place.
pub(super) struct QuantizedPhi3 {
    pub(super) model: quantized_phi3::ModelWeights,
    /// The model as it was loaded: it has no other way to forget its tokens and its masks.
    pub(super) empty: quantized_phi3::ModelWeights,
    pub(super) is_empty: bool,
}

impl Network for QuantizedPhi3 {
    fn forward(&mut self, tokens: &Tensor, past: usize) -> Result<Tensor> {
        self.is_empty = false;
        self.model.forward(tokens, past)
    }

    fn reset(&mut self) {
        self.model = self.empty.clone();
        self.is_empty = true;
    }

    fn fork(&self) -> Option<Box<dyn Network>> {
        let copy = || Self { model: self.empty.clone(), empty: self.empty.clone(), is_empty: true };
        self.is_empty.then(|| Box::new(copy()) as Box<dyn Network>)
    }
}

/// How a model is loaded again.
pub(super) type Reload<M> = Box<dyn FnMut() -> Result<M> + Send>;

/// Bytes of masks that quantised Qwen2 may gather.
const MASK_BYTES: usize = 64 << 20;

/// Quantised Qwen2, which cannot be cloned. It keeps a mask for each number of tokens at each position and never drops one, so
/// it is loaded again when these have become many.
pub(super) struct QuantizedQwen2 {
    pub(super) model: quantized_qwen2::ModelWeights,
    pub(super) reload: Reload<quantized_qwen2::ModelWeights>,
    pub(super) mask_bytes: usize,
}

impl Network for QuantizedQwen2 {
    fn forward(&mut self, tokens: &Tensor, past: usize) -> Result<Tensor> {
        let count = tokens.dim(1)?;
        if count > 1 {
            self.mask_bytes += count * (past + count);
        }
        self.model.forward(tokens, past)
    }

    fn reset(&mut self) {
        self.model.clear_kv_cache();
        if self.mask_bytes > MASK_BYTES {
            match (self.reload)() {
                Ok(model) => (self.model, self.mask_bytes) = (model, 0),
                Err(error) => {
                    tracing::warn!(%error, "the model cannot be loaded again; its masks stay in memory");
                }
            }
        }
    }

    fn fork(&self) -> Option<Box<dyn Network>> {
        None
    }
}

/// Quantised Qwen3, whose clones would copy a cache of 4096 positions. It has two caches, one for several tokens at a time and
/// one for one; the former misses the tokens that went into the latter.
pub(super) struct QuantizedQwen3 {
    pub(super) model: quantized_qwen3::ModelWeights,
    pub(super) decodes: bool,
}

impl Network for QuantizedQwen3 {
    fn forward(&mut self, tokens: &Tensor, past: usize) -> Result<Tensor> {
        self.decodes |= tokens.dim(1)? == 1;
        self.model.forward(tokens, past)
    }

    fn reset(&mut self) {
        self.model.clear_kv_cache();
        self.decodes = false;
    }

    fn fork(&self) -> Option<Box<dyn Network>> {
        None
    }

    fn most(&self, _past: usize) -> usize {
        if self.decodes { 1 } else { usize::MAX }
    }
}
