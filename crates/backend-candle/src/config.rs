//! What the configuration of a model may say to this backend beyond what all backends share.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use ternion_core::kv::KvType;

/// The table `options` of a model that runs on the backend `candle`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct CandleOptions {
    /// What logits are computed from.
    pub head: HeadPrecision,
    /// How keys and values are stored. Left out: `f32`, or what fits where there is a `memory_limit`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_type: Option<KvType>,
}

/// What logits are computed from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum HeadPrecision {
    /// The weights of the checkpoint.
    #[default]
    Exact,
    /// An int8 copy of them, made when the model is loaded: half the bytes to read for each token, which for
    /// BitNet 2B4T makes decoding a fifth faster. The 64 largest logits are exact all the same, so greedy answers stay
    /// what they are as far as the best token is among these; the others are off by 1 % of their spread (KL divergence 3e-5
    /// with random weights of that shape).
    Int8,
}
