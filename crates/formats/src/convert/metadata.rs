//! The metadata of a GGUF file that is written: complete enough for llama.cpp, and for Ternion to find what it was.

use ternion_core::{Error, Pooling, Result};

use super::vocabulary;
use crate::gguf::keys::{self, Keys};
use crate::gguf::{Array, TensorType, Writer};
use crate::{Activation, Checkpoint, EmbeddingSpec, ModelSpec, RopeScaling};

/// llama.cpp's numbers for a file of mostly this type; I2_S is bitnet.cpp's.
fn file_type(ternary: TensorType) -> u32 {
    match ternary {
        TensorType::Tq1_0 => 36,
        TensorType::Tq2_0 => 37,
        TensorType::Q2_0 | TensorType::Q2_0G128 | TensorType::Pq2_0 | TensorType::Ptq1_0 => 41,
        // Q1_0 and I2_S.
        _ => 40,
    }
}

/// The architecture's name. llama.cpp knows `bitnet` alone, and computes SiLU in it; bitnet.cpp and the official file have
/// `bitnet-b1.58` for squared ReLU. I2_S, which only bitnet.cpp reads, goes with the latter.
fn architecture(spec: &ModelSpec, ternary: TensorType) -> Result<&'static str> {
    match (spec.sub_norms, spec.activation) {
        (false, Activation::Silu) if spec.qk_norm => Ok("qwen3"),
        (true, Activation::Relu2) if ternary == TensorType::I2S => Ok("bitnet-b1.58"),
        (true, _) => Ok("bitnet"),
        (false, Activation::Silu) => Ok("llama"),
        (false, Activation::Relu2) => Err(Error::unsupported(
            "GGUF has no architecture with squared ReLU and without sub-norms; supported: safetensors",
        )),
    }
}

/// How a model for embeddings pools, by llama.cpp's numbers.
fn pooling(checkpoint: &Checkpoint) -> Result<Option<u32>> {
    let spec = match &checkpoint.gguf {
        Some(file) => EmbeddingSpec::of_gguf(file)?,
        None => EmbeddingSpec::at(&checkpoint.folder)?,
    };
    let Some(spec) = spec else { return Ok(None) };
    if !spec.dense.is_empty() {
        return Err(Error::unsupported("GGUF has no place for the modules Dense of sentence-transformers"));
    }
    Ok(match spec.pooling {
        Pooling::Mean => Some(1),
        Pooling::Cls => Some(2),
        Pooling::Last => Some(3),
        _ => None,
    })
}

/// A writer with all of the metadata.
pub(super) fn metadata(checkpoint: &Checkpoint, ternary: TensorType) -> Result<Writer> {
    let spec = &checkpoint.spec;
    let keys = Keys::new(architecture(spec, ternary)?);
    let mut out = Writer::new();
    out.set(keys::ARCHITECTURE, keys.architecture());
    out.set("general.type", "model");
    out.set("general.name", checkpoint.name.as_str());
    out.set("general.file_type", file_type(ternary));
    out.set("general.quantization_version", 2);
    out.set(keys::WRITER, env!("CARGO_PKG_VERSION"));
    for (key, value) in [
        ("vocab_size", spec.vocab_size),
        ("context_length", spec.context_length),
        ("embedding_length", spec.hidden_size),
        ("block_count", spec.layers),
        ("feed_forward_length", spec.intermediate_size),
        ("rope.dimension_count", spec.head_dim),
        ("attention.head_count", spec.heads),
        ("attention.head_count_kv", spec.kv_heads),
    ] {
        out.set(keys.of(key), value as u32);
    }
    if let Some(pooling) = pooling(checkpoint)? {
        out.set(keys.of("pooling_type"), pooling);
    }
    if spec.heads * spec.head_dim != spec.hidden_size {
        out.set(keys.of("attention.key_length"), spec.head_dim as u32);
        out.set(keys.of("attention.value_length"), spec.head_dim as u32);
    }
    out.set(keys.of("attention.layer_norm_rms_epsilon"), spec.rms_eps);
    out.set(keys.of("rope.freq_base"), spec.rope.theta);
    let scaling = |key: &str| keys.of(&format!("rope.scaling.{key}"));
    match spec.rope.scaling {
        RopeScaling::Yarn { truncate: false, .. } => {
            return Err(Error::unsupported(
                "GGUF has no YaRN whose bounds are not rounded; supported: safetensors",
            ));
        }
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, .. } => {
            out.set(scaling("type"), "yarn");
            out.set(scaling("factor"), factor);
            out.set(scaling("original_context_length"), original_context as u32);
            out.set(scaling("yarn_beta_fast"), beta_fast);
            out.set(scaling("yarn_beta_slow"), beta_slow);
            let implied = crate::spec::yarn_magnitude(factor, 1.0) as f32;
            if attention_factor != implied {
                out.set(scaling("attn_factor"), attention_factor / implied);
            }
        }
        RopeScaling::Factors(_) | RopeScaling::Llama3 { .. } if spec.qk_norm => {
            return Err(Error::unsupported(
                "GGUF of the architecture qwen3 has no place for rotary factors; supported: safetensors",
            ));
        }
        RopeScaling::Linear { factor } => {
            out.set(keys.of("rope.scaling.type"), "linear");
            out.set(keys.of("rope.scaling.factor"), factor);
        }
        // The others are the factors in a tensor.
        _ => out.set(keys.of("rope.scaling.type"), "none"),
    }
    out.set(
        keys.of(keys::ACTIVATION),
        match spec.activation {
            Activation::Relu2 => "relu2",
            Activation::Silu => "silu",
        },
    );
    let sampling = &checkpoint.sampling;
    out.set(keys::TEMPERATURE, sampling.temperature);
    out.set(keys::TOP_K, sampling.top_k as i32);
    out.set(keys::TOP_P, sampling.top_p);
    out.set(keys::MIN_P, sampling.min_p);
    out.set(keys::PENALTY, sampling.repetition_penalty);
    out.set(keys::EOS_LIST, Array::u32s(&spec.eos));
    vocabulary::set(&mut out, checkpoint)?;
    Ok(out)
}
