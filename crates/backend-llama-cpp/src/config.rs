//! What the configuration of a model may say to this backend beyond what all backends share.

use llama_cpp_sys_2 as sys;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use ternion_core::Pooling;
use ternion_formats::{Activation, CheckpointOptions, I2sLayout};
use ternion_head::HeadKind;
use ternion_kernels::ActivationType;

/// The table `options` of a model that runs on the backend `llama-cpp`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct LlamaCppOptions {
    /// How keys and values are stored. Left out: `f32` for ternary models, whose logits are then those of the other
    /// backends; `f16` for others, as llama.cpp does it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_type: Option<KvType>,
    /// Whether attention is computed in one pass without storing its scores. Ternary models, and others whose products this library
    /// computes, take its kernels for that, unless `kv_type` is `q8_0`. Left out: on for these, and where `kv_type` needs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flash_attention: Option<bool>,
    /// Tokens that all sequences together may hold, at least `context_length`. The KV cache of this size is allocated when the
    /// model is loaded; one that is full makes room by forgetting conversations that nobody waits for, and refuses requests
    /// where that is not enough. Left out: `context_length` times `max_sequences`, which is always enough.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 32))]
    pub cache_tokens: Option<usize>,
    /// How activations are represented in products with weights that have a scale for each group of a row: `f32`, `int8` or
    /// `int8x2`. Left out: `int8x2`. See the backend `candle`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activations: Option<ActivationType>,
    /// What the logits of a ternary model are computed from. Models that llama.cpp computes by itself refuse anything but `auto`.
    pub head: HeadKind,
    /// Who computes a GGUF model that llama.cpp could compute as well. Left out: `ternion`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arithmetic: Option<Arithmetic>,
    /// How a model for embeddings pools: `mean`, `cls` or `last`. Left out: as the file says. Set for a model that generates, it
    /// makes embeddings instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pooling: Option<Pooling>,
    /// Whether embeddings have the length 1. Left out: they have, as llama.cpp's tools give them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normalize: Option<bool>,
    /// Whether the first values of an embedding are one too, so that a request may ask for fewer (`dimensions`): for models that
    /// are trained that way (Matryoshka). Left out: they are not, as no GGUF file says so.
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

impl LlamaCppOptions {
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

/// Who computes the products of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub enum Arithmetic {
    /// Ternion's kernels, in the graph of llama.cpp.
    #[serde(rename = "ternion")]
    Ternion,
    /// llama.cpp, which reads the file itself and rounds activations in its own way.
    #[serde(rename = "llama-cpp")]
    LlamaCpp,
}

/// The element type of a KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum KvType {
    /// Single precision: nothing is lost, twice the memory of `f16`.
    F32,
    /// Half precision. An activation near a rounding tie may then go the other way, which changes the most probable token
    /// in 3 of 100 places of the test models.
    F16,
    /// 8 bits and a scale for 32 elements; needs flash attention and a head width that is a multiple of 32.
    Q8_0,
}

impl KvType {
    /// ggml's name of the type.
    pub(crate) fn ggml(self) -> sys::ggml_type {
        match self {
            Self::F32 => sys::GGML_TYPE_F32,
            Self::F16 => sys::GGML_TYPE_F16,
            Self::Q8_0 => sys::GGML_TYPE_Q8_0,
        }
    }

    /// Elements that share a scale.
    pub(crate) fn block(self) -> usize {
        match self {
            Self::F32 | Self::F16 => 1,
            Self::Q8_0 => 32,
        }
    }

    /// Bytes of `elements`, which are a multiple of the block.
    pub(crate) fn bytes(self, elements: u64) -> u64 {
        match self {
            Self::F32 => elements.saturating_mul(4),
            Self::F16 => elements.saturating_mul(2),
            Self::Q8_0 => (elements / 32).saturating_mul(34),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_named_as_in_files() {
        for (name, kv_type) in [("f32", KvType::F32), ("f16", KvType::F16), ("q8_0", KvType::Q8_0)] {
            let options: LlamaCppOptions =
                serde_json::from_str(&format!("{{\"kv_type\": \"{name}\"}}")).unwrap();
            assert_eq!(options.kv_type, Some(kv_type));
        }
        assert_eq!(LlamaCppOptions::default().kv_type, None);
        assert!(serde_json::from_str::<LlamaCppOptions>("{\"kv_type\": \"i2_s\"}").is_err());
        assert!(serde_json::from_str::<LlamaCppOptions>("{\"kv\": \"f16\"}").is_err());
    }

    #[test]
    fn sizes_are_those_of_ggml() {
        for kv_type in [KvType::F32, KvType::F16, KvType::Q8_0] {
            // SAFETY: A pure function of a type that exists.
            let bytes = unsafe { sys::ggml_row_size(kv_type.ggml(), 128) };
            assert_eq!(kv_type.bytes(128), bytes as u64);
        }
    }
}
