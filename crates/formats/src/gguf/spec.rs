//! The metadata of a ternary or Llama model, turned into a [`ModelSpec`].

use ternion_core::{Error, Result, SamplingDefaults};

use super::File;
use super::keys::{self, Keys};
use super::special::{self, SpecialIds};
use crate::{Activation, Family, ModelSpec, Quantization, RopeScaling, RopeSpec, ScaleUse};

// As for `config.json`: bounds that no real model comes near, and that keep products of sizes far from overflow.
const MAX_WIDTH: u64 = 1 << 20;
const MAX_LAYERS: u64 = 1024;
const MAX_VOCAB: u64 = 1 << 24;
const MAX_CONTEXT: u64 = 1 << 28;

/// Reads the specification. `quantization` is set as for ternary projections that are all packed.
pub(super) fn read(file: &File) -> Result<ModelSpec> {
    let architecture = file.architecture()?.to_owned();
    let keys = Keys::new(&architecture);
    let activation = activation(file, &keys)?;
    let family = match architecture.as_str() {
        "llama" => Family::Llama,
        "bitnet-b1.58" | "bitnet-25" | "bitnet" if activation == Activation::Relu2 => Family::BitNet,
        "bitnet-b1.58" | "bitnet-25" | "bitnet" => Family::OneBitLlm,
        _ => return Err(file.unsupported(keys::ARCHITECTURE, "bitnet-b1.58, bitnet-25, bitnet, llama")),
    };
    if let Some(parts) = file.integer(keys::SPLIT_COUNT, 0..=u64::from(u16::MAX))?.filter(|parts| *parts > 1)
    {
        return Err(Error::unsupported(format!(
            "the file is one of {parts} parts, which is not supported; supported: a single file"
        ))
        .with("file", file.path().display()));
    }
    let size = |key: &str, max: u64| file.required_integer(&keys.of(key), 1..=max).map(|n| n as usize);
    let hidden_size = size("embedding_length", MAX_WIDTH)?;
    let heads = size("attention.head_count", MAX_WIDTH)?;
    let head_dim = head_dim(file, &keys, hidden_size, heads)?;
    let kv_key = keys.of("attention.head_count_kv");
    let kv_heads = file.integer(&kv_key, 1..=MAX_WIDTH)?.map_or(heads, |n| n as usize);
    if !heads.is_multiple_of(kv_heads) {
        return Err(file.invalid(&kv_key, &format!("a divisor of `attention.head_count` ({heads})")));
    }
    if file.integer(&keys.of("expert_count"), 0..=MAX_WIDTH)?.is_some_and(|count| count > 0) {
        return Err(file.unsupported(&keys.of("expert_count"), "models without experts"));
    }
    let vocab_size = match file.integer(&keys.of("vocab_size"), 1..=MAX_VOCAB)? {
        Some(n) => n as usize,
        // Older files do not say it.
        None => embedding_rows(file)?,
    };
    let context_length = size("context_length", MAX_CONTEXT)?;
    let layers = size("block_count", MAX_LAYERS)?;
    Ok(ModelSpec {
        family,
        hidden_size,
        intermediate_size: size("feed_forward_length", MAX_WIDTH)?,
        layers,
        heads,
        kv_heads,
        head_dim,
        vocab_size,
        context_length,
        rms_eps: file.number(&keys.of("attention.layer_norm_rms_epsilon"), 0.0..=1.0)?.ok_or_else(|| {
            file.invalid(&keys.of("attention.layer_norm_rms_epsilon"), "a float from 0.0 to 1.0")
        })?,
        rope: rope(file, &keys)?,
        activation,
        sub_norms: family != Family::Llama,
        tied: file.tensor(keys::HEAD).is_none(),
        bos: SpecialIds::read(file, vocab_size)?.bos,
        eos: special::end_tokens(file, vocab_size)?,
        quantization: Some(Quantization {
            scale_use: ScaleUse::Multiplies,
            online: false,
            input_norm_eps: None,
            keep_dense: Vec::new(),
        }),
        architecture,
    })
}

/// What llama.cpp's files say nothing of: `bitnet-b1.58` and `bitnet-25` are 2B4T's, the elder `bitnet` is 1bitLLM's.
fn activation(file: &File, keys: &Keys) -> Result<Activation> {
    let key = keys.of(keys::ACTIVATION);
    match file.string(&key)? {
        Some("relu2") => Ok(Activation::Relu2),
        Some("silu" | "swish" | "swiglu") => Ok(Activation::Silu),
        Some(_) => Err(file.unsupported(&key, "relu2, silu")),
        None if matches!(keys.architecture(), "bitnet-b1.58" | "bitnet-25") => Ok(Activation::Relu2),
        None => Ok(Activation::Silu),
    }
}

fn head_dim(file: &File, keys: &Keys, hidden_size: usize, heads: usize) -> Result<usize> {
    let key = keys.of("attention.key_length");
    let head_dim = match file.integer(&key, 1..=MAX_WIDTH)? {
        Some(n) => n as usize,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let expected = format!("a divisor of `embedding_length` ({hidden_size})");
            return Err(file.invalid(&keys.of("attention.head_count"), &expected));
        }
    };
    if !head_dim.is_multiple_of(2) || heads * head_dim > MAX_WIDTH as usize {
        let expected =
            format!("an even width of a head, at most {} for {heads} heads", MAX_WIDTH as usize / heads);
        let found = if file.value(&key).is_some() { key } else { keys.of("attention.head_count") };
        return Err(file.invalid(&found, &expected));
    }
    for key in ["attention.value_length", "rope.dimension_count"] {
        let key = keys.of(key);
        if file.integer(&key, 0..=MAX_WIDTH)?.is_some_and(|n| n != head_dim as u64) {
            return Err(file.unsupported(&key, &format!("the width of a head ({head_dim})")));
        }
    }
    Ok(head_dim)
}

fn embedding_rows(file: &File) -> Result<usize> {
    match file.tensor(keys::EMBED).map(|t| &t.dims[..]) {
        Some(&[_, rows]) if rows <= MAX_VOCAB => Ok(rows as usize),
        Some(dims) => Err(Error::invalid_model(format!(
            "the dimensions are {dims:?}, expected a matrix with at most {MAX_VOCAB} rows"
        ))
        .with("tensor", keys::EMBED)
        .with("file", file.path().display())),
        None => Err(Error::invalid_model("the tensor is missing")
            .with("tensor", keys::EMBED)
            .with("file", file.path().display())),
    }
}

fn rope(file: &File, keys: &Keys) -> Result<RopeSpec> {
    let theta = file.number(&keys.of("rope.freq_base"), 1.0..=1e12)?.unwrap_or(10_000.0);
    let scale = |key: &str| file.number(&keys.of(key), 0.0..=1e6);
    // As in llama.cpp: the elder key where there is no other, 0 stands for none.
    let factor = match scale("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => scale("rope.scale_linear")?,
    };
    let factor = factor.filter(|factor| *factor != 0.0).unwrap_or(1.0);
    let key = keys.of("rope.scaling.type");
    let scaling = match file.string(&key)? {
        Some("none") => RopeScaling::None,
        None | Some("linear") if factor == 1.0 => RopeScaling::None,
        None | Some("linear") => RopeScaling::Linear { factor },
        Some(_) => return Err(file.unsupported(&key, "none, linear")),
    };
    Ok(RopeSpec { theta, scaling })
}

/// The sampling that the file asks for; greedy where it does not.
pub(super) fn sampling(file: &File) -> Result<SamplingDefaults> {
    let mut sampling = SamplingDefaults::default();
    if let Some(penalty) = file.number(keys::PENALTY, f32::MIN_POSITIVE..=100.0)? {
        sampling.repetition_penalty = penalty;
    }
    let Some(temperature) = file.number(keys::TEMPERATURE, 0.0..=100.0)? else { return Ok(sampling) };
    sampling.temperature = temperature;
    if let Some(top_k) = file.integer(keys::TOP_K, 0..=i32::MAX as u64)? {
        sampling.top_k = top_k as usize;
    }
    if let Some(top_p) = file.number(keys::TOP_P, f32::MIN_POSITIVE..=1.0)? {
        sampling.top_p = top_p;
    }
    if let Some(min_p) = file.number(keys::MIN_P, 0.0..=1.0)? {
        sampling.min_p = min_p;
    }
    Ok(sampling)
}
