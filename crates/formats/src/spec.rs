//! What a decoder has to know of a model, with the same words for every format.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use ternion_core::{Error, Result};
use ternion_kernels::kv::{self, KvType};

/// The facts of a decoder-only transformer that an engine needs. All counts are checked: none is zero, heads divide
/// evenly, and products of them fit into memory addresses.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelSpec {
    /// The architecture as the checkpoint names it (`model_type`): `bitnet`, `llama`, `qwen3`.
    pub architecture: String,
    /// Which family of decoders it is. For people; all that follows from it is in the other fields.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between the feed-forward network's projections.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`. Query head `i` uses key-value head `i / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head; even. `heads * head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Rows of the embedding and of the head, which is the length of a row of logits.
    pub vocab_size: usize,
    /// Positions that the model was made for.
    pub context_length: usize,
    /// Epsilon of the decoder's RMS norms.
    pub rms_eps: f32,
    /// The rotary embedding (the two halves of a head are rotated against each other, NeoX form).
    pub rope: RopeSpec,
    /// The feed-forward network's activation: `activation(gate) * up`.
    pub activation: Activation,
    /// There is an RMS norm on each head of queries and keys, before they are rotated.
    pub qk_norm: bool,
    /// There is an RMS norm on the concatenated heads before `o_proj` and one before `down_proj`.
    pub sub_norms: bool,
    /// The configuration says that the head is the embedding.
    pub tied: bool,
    /// The token that begins a text, where there is one.
    pub bos: Option<u32>,
    /// Tokens that end an answer: those of `generation_config.json`, else those of `config.json`.
    pub eos: Vec<u32>,
    /// How the ternary weights come to be; `None` where all projections are dense.
    pub quantization: Option<Quantization>,
}

impl ModelSpec {
    /// What a KV cache holds for each token.
    pub fn kv_layout(&self) -> kv::KvLayout {
        kv::KvLayout { layers: self.layers, kv_heads: self.kv_heads, head_dim: self.head_dim }
    }

    /// Checks that the model can be computed with so long a context.
    ///
    /// # Errors
    /// [`InvalidConfig`](ternion_core::ErrorKind::InvalidConfig) for one beyond the model's own.
    pub fn check_context(&self, context: usize) -> Result<()> {
        let own = self.context_length;
        if context <= own {
            return Ok(());
        }
        let why = match self.rope.scaling {
            // Each token that is added changes the frequencies, and so all keys and hidden states before it.
            RopeScaling::Dynamic { .. } => {
                "; beyond it, dynamic rotary scaling rotates by a base that grows with each token, so that keys in a cache would no \
                 longer fit and the same tokens give other logits in other chunks; with `rope_type` linear or yarn longer ones \
                 are computed"
            }
            _ => "",
        };
        Err(Error::invalid_config(format!(
            "context_length: {context} is out of range; at most {own}, the model's own, expected{why}"
        )))
    }

    /// Bytes that one token takes in a KV cache of 32-bit floats.
    pub fn kv_bytes_per_token(&self) -> u64 {
        self.kv_layout().bytes_per_position(KvType::F32)
    }
}

impl Family {
    /// Whether its models are ternary by definition, with int8 activations: float weights of one are masters.
    pub(crate) fn is_bitnet(self) -> bool {
        matches!(self, Self::BitNet | Self::OneBitLlm)
    }
}

/// A family of decoders that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// BitNet b1.58 2B4T and what is made like it: squared ReLU, sub-norms.
    BitNet,
    /// The 1bitLLM reproductions (`bitnet_b1_58-large`, `-3B`): SiLU, sub-norms under other names, float masters.
    OneBitLlm,
    /// The Llama architecture, ternary or dense: Llama3-8B-1.58, Falcon3-1.58, Falcon-E.
    Llama,
    /// Qwen3, ternary, binary or dense: Ternary-Bonsai and Bonsai of the first generation.
    Qwen3,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BitNet => "BitNet b1.58",
            Self::OneBitLlm => "1bitLLM BitNet b1.58",
            Self::Llama => "Llama",
            Self::Qwen3 => "Qwen3",
        })
    }
}

/// The activation of the gated feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `max(x, 0)^2`
    Relu2,
    /// `x / (1 + exp(-x))`
    Silu,
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Relu2 => "squared ReLU",
            Self::Silu => "SiLU",
        })
    }
}

/// The rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Frequency `i` of `head_dim / 2` is `theta^(-2 i / head_dim)` before scaling.
    pub theta: f32,
    /// How the frequencies are changed for longer contexts.
    pub scaling: RopeScaling,
}

/// A change to the rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// No change.
    None,
    /// Every frequency is divided by `factor`.
    Linear {
        /// At least 1.
        factor: f32,
    },
    /// YaRN: long wavelengths are divided by `factor`, short ones kept, those between blended by the number of turns that a
    /// dimension makes in the original context; cosines and sines are multiplied by `attention_factor`.
    Yarn {
        /// Positive.
        factor: f32,
        /// The context length before scaling.
        original_context: usize,
        /// Dimensions with more turns are kept.
        beta_fast: f32,
        /// Dimensions with fewer turns are divided.
        beta_slow: f32,
        /// Whether the bounds of the blended dimensions are rounded outwards to whole ones.
        truncate: bool,
        /// `0.1 ln(factor) + 1` unless the checkpoint says otherwise.
        attention_factor: f32,
    },
    /// Dynamic NTK scaling: the base grows with a sequence that is longer than the context that the model was made for. There
    /// is no change up to that, and none longer is computed: [`ModelSpec::check_context`] says why.
    Dynamic {
        /// At least 1.
        factor: f32,
    },
    /// Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended.
    Llama3 {
        /// At least 1.
        factor: f32,
        /// Wavelengths above `original_context / low_freq_factor` are long.
        low_freq_factor: f32,
        /// Wavelengths below `original_context / high_freq_factor` are short; greater than `low_freq_factor`.
        high_freq_factor: f32,
        /// The context length before scaling.
        original_context: usize,
    },
    /// Frequency `i` is divided by factor `i` of `head_dim / 2` positive ones: how GGUF files describe any of these.
    Factors(Vec<f32>),
}

impl RopeSpec {
    /// The `head_dim / 2` angular frequencies, computed in `f32` in transformers' order of operations.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        // The power in f64: single-precision powers differ between mathematical libraries, and positions multiply that.
        let power = |i: usize| f64::from(self.theta).powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32;
        let base = (0..head_dim / 2).map(|i| 1.0 / power(i));
        match &self.scaling {
            RopeScaling::None | RopeScaling::Dynamic { .. } => base.collect(),
            RopeScaling::Yarn { .. } => self.yarn(base.collect()),
            RopeScaling::Linear { factor } => base.map(|f| f / factor).collect(),
            RopeScaling::Factors(factors) => base.zip(factors).map(|(f, factor)| f / factor).collect(),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let original = original_context as f32;
                let (long, short) = (original / low_freq_factor, original / high_freq_factor);
                base.map(|f| {
                    let wavelength = 2.0 * std::f32::consts::PI / f;
                    if wavelength < short {
                        f
                    } else if wavelength > long {
                        f / factor
                    } else {
                        let smooth =
                            (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect()
            }
        }
    }
}

/// What YaRN multiplies cosines and sines by.
pub(crate) fn yarn_magnitude(factor: f32, mscale: f32) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * f64::from(mscale) * f64::from(factor).ln() + 1.0 }
}

impl RopeSpec {
    /// What cosines and sines are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// The cosines and sines of a position's angles, one for each of the [`frequencies`](Self::frequencies).
    pub fn rotation(&self, frequencies: &[f32], position: usize) -> impl Iterator<Item = (f32, f32)> {
        let factor = self.attention_factor();
        frequencies.iter().map(move |frequency| {
            let (sin, cos) = (position as f32 * frequency).sin_cos();
            (cos * factor, sin * factor)
        })
    }

    /// YaRN's frequencies from the plain ones, in transformers' order of operations.
    fn yarn(&self, base: Vec<f32>) -> Vec<f32> {
        let RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } = self.scaling
        else {
            return base;
        };
        let dim = (2 * base.len()) as f64;
        // The dimension that makes so many turns in the original context.
        let dimension = |turns: f32| {
            let wavelengths = original_context as f64 / (f64::from(turns) * 2.0 * std::f64::consts::PI);
            dim * wavelengths.ln() / (2.0 * f64::from(self.theta).ln())
        };
        let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        let (low, width) = (low as f32, (high - low) as f32);
        let blend = |(i, frequency): (usize, f32)| {
            let kept = 1.0 - ((i as f32 - low) / width).clamp(0.0, 1.0);
            let divided = 1.0 / (factor * (1.0 / frequency));
            divided * (1.0 - kept) + frequency * kept
        };
        base.into_iter().enumerate().map(blend).collect()
    }
}

/// How a checkpoint's ternary projections are stored and scaled: `quantization_config`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Quantization {
    /// What a packed projection's `weight_scale` does.
    pub scale_use: ScaleUse,
    /// Float weights are masters: they are quantised when they are loaded.
    pub online: bool,
    /// Each projection has an RMS norm of its own on its input, with this epsilon.
    pub input_norm_eps: Option<f32>,
    /// Projections that stay dense: those whose module name begins or ends with one of these.
    pub keep_dense: Vec<String>,
}

/// What a stored `weight_scale` does to the integer product (`linear_class`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleUse {
    /// `autobitlinear` (Microsoft's 2B4T): the product is multiplied by it.
    Multiplies,
    /// `bitlinear`, and where nothing is said (HF1BitLLM, Falcon3): the product is divided by it.
    Divides,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_fall_from_one_and_scale() {
        let plain = RopeSpec { theta: 500_000.0, scaling: RopeScaling::None }.frequencies(128);
        assert_eq!(plain.len(), 64);
        assert_eq!(plain[0], 1.0);
        assert!((f64::from(plain[32]) - 500_000f64.powf(-0.5)).abs() < 1e-9);

        let halved =
            RopeSpec { theta: 500_000.0, scaling: RopeScaling::Linear { factor: 2.0 } }.frequencies(128);
        assert!(plain.iter().zip(&halved).all(|(a, b)| a / 2.0 == *b));
    }

    #[test]
    fn dynamic_scaling_changes_nothing_up_to_the_context() {
        let plain = RopeSpec { theta: 10_000.0, scaling: RopeScaling::None }.frequencies(96);
        let dynamic = RopeSpec { theta: 10_000.0, scaling: RopeScaling::Dynamic { factor: 4.0 } };
        assert_eq!((dynamic.frequencies(96), dynamic.attention_factor()), (plain, 1.0));
    }

    #[test]
    fn llama3_keeps_short_wavelengths_and_stretches_long_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let plain = RopeSpec { theta: 500_000.0, scaling: RopeScaling::None }.frequencies(128);
        let scaled = RopeSpec { theta: 500_000.0, scaling }.frequencies(128);
        assert_eq!(scaled[..28], plain[..28], "wavelengths below 2048");
        for i in 35..64 {
            assert_eq!(scaled[i], plain[i] / 8.0, "wavelengths above 8192");
        }
        assert!((29..35).all(|i| plain[i] / 8.0 < scaled[i] && scaled[i] < plain[i]));
    }
}
