//! What the configuration of a model may say to this backend beyond what all backends share.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use ternion_core::Pooling;
use ternion_engine::kv::KvType;
use ternion_formats::{Activation, CheckpointOptions, I2sLayout};
use ternion_kernels::{ActivationType, CompactBits};

/// The table `options` of a model that runs on the backend `candle`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct CandleOptions {
    /// What logits are computed from.
    pub head: HeadPrecision,
    /// How keys and values are stored. Left out: `f32`, or what fits where there is a `memory_limit`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_type: Option<KvType>,
    /// How activations are represented in products with weights that have a scale for each group of a row (Qwen3 in ternary and
    /// binary forms), whose models are trained without rounding activations: `f32` as they are, `int8` in 8 bits with a scale for
    /// each quarter of a group, `int8x2` as the sum of two of these. Left out: `int8x2`, whose logits are those of `f32` but for
    /// less than float rounding does elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activations: Option<ActivationType>,
    /// How a model for embeddings pools: `mean`, `cls` or `last`. Left out: as its files say (`modules.json`, or `pooling_type` of a
    /// GGUF file). Set for a model that generates, it makes embeddings instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pooling: Option<Pooling>,
    /// Whether embeddings have the length 1. Left out: as the files say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normalize: Option<bool>,
    /// Whether the first values of an embedding are one too, so that a request may ask for fewer (`dimensions`): for models that
    /// are trained that way (Matryoshka). Left out: as `config.json` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matryoshka: Option<bool>,
    /// The activation of the feed-forward network. Left out: what the checkpoint states, else what its other facts tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activation: Option<Activation>,
    /// Whether there is an RMS norm before `o_proj` and one before `down_proj`. Left out: as the checkpoint says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sub_norms: Option<bool>,
    /// The base of the rotary embedding's frequencies. Left out: what the checkpoint states, else its family's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1.0))]
    pub rope_theta: Option<f32>,
    /// The order of weights in I2_S tensors, which depends on the machine that wrote the file. Left out: `x86`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub i2s_layout: Option<I2sLayout>,
    /// Whether the tokenizer puts a BOS before a text. Left out: as the files say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub add_bos: Option<bool>,
    /// The id of the BOS. Left out: as the files say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bos: Option<u32>,
    /// The rule by which the tokenizer of a GGUF file splits a text: `llama-bpe`, `qwen2` and so on. Left out: the one that the
    /// file names, else `default` as in llama.cpp.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pre_tokenizer: Option<String>,
}

impl CandleOptions {
    /// What they say about reading the checkpoint.
    pub fn checkpoint(&self) -> CheckpointOptions {
        let mut options = CheckpointOptions::default();
        options.activation = self.activation;
        options.sub_norms = self.sub_norms;
        options.rope_theta = self.rope_theta;
        options.i2s_layout = self.i2s_layout;
        options.add_bos = self.add_bos;
        options.bos = self.bos;
        options.pre_tokenizer.clone_from(&self.pre_tokenizer);
        options
    }
}

/// What logits are computed from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum HeadPrecision {
    /// `certified` where the head is larger than a cache and there is no memory limit, else `exact`.
    #[default]
    Auto,
    /// The weights of the checkpoint.
    Exact,
    /// An int8 copy with proven bounds of its errors, made when the model is loaded: half the bytes to read for each token. What
    /// may be among the largest logits is computed from the weights of the checkpoint, so greedy answers and the candidates of
    /// top-k are those of `exact`, by proof. Where tokens are drawn from all candidates, those beyond the 64 largest are rounded.
    /// Scores, raw logits and answers with log-probabilities are computed from the weights of the checkpoint.
    Certified,
    /// An int8 copy of them, made when the model is loaded: half the bytes to read for each token. The 64 largest logits
    /// are exact all the same, so greedy answers stay what they are as far as the best token is among these. That was so in
    /// all 4272 places of the test models; the KL divergence from the exact logits was 1.8e-5 there.
    Int8,
    /// A copy of four bits and a scale for each 128 columns: a quarter of the bytes of half-precision weights, and less to read
    /// for each token than int8. The 64 largest logits are exact here as well, and the best token was the same in the
    /// same places; the KL divergence was 2.0e-3.
    Int4,
}

impl HeadPrecision {
    /// The bits of a copy that takes the place of the weights; `None` where there is none.
    pub(crate) fn copy(self) -> Option<CompactBits> {
        match self {
            Self::Auto | Self::Exact | Self::Certified => None,
            Self::Int8 => Some(CompactBits::Eight),
            Self::Int4 => Some(CompactBits::Four),
        }
    }
}
