//! The metadata of a ternary or Llama model, turned into a [`ModelSpec`].

use ternion_core::{Error, Result, SamplingDefaults};

use super::File;
use super::keys::{self, Keys};
use super::signs::{self, Facts};
use super::special::{self, SpecialIds};
use crate::generation::DEFAULT_TOP_K;
use crate::notes::{Notes, ROPE_THETA};
use crate::{Activation, Family, ModelSpec, Quantization, RopeScaling, RopeSpec, ScaleUse};

// As for `config.json`: bounds that no real model comes near, and that keep products of sizes far from overflow.
const MAX_WIDTH: u64 = 1 << 20;
const MAX_LAYERS: u64 = 1024;
const MAX_VOCAB: u64 = 1 << 24;
const MAX_CONTEXT: u64 = 1 << 28;

/// Reads the specification. `quantization` is set as for ternary projections that are all packed.
pub(super) fn read(file: &File, notes: &mut Notes) -> Result<ModelSpec> {
    let architecture = file.architecture()?.to_owned();
    let keys = Keys::new(&architecture);
    refuse_transformed(file)?;
    let is_bitnet = match architecture.as_str() {
        "llama" | "qwen3" => false,
        "bitnet-b1.58" | "bitnet-25" | "bitnet" => true,
        other => {
            let known = "bitnet-b1.58, bitnet-25, bitnet, llama, qwen3";
            let known = if HYBRIDS.contains(&other) {
                format!("{known}; a hybrid needs gated DeltaNet layers with a recurrent state")
            } else {
                known.to_owned()
            };
            return Err(file.unsupported(keys::ARCHITECTURE, &known));
        }
    };
    let size = |key: &str, max: u64| file.required_integer(&keys.of(key), 1..=max).map(|n| n as usize);
    let hidden_size = size("embedding_length", MAX_WIDTH)?;
    let heads = size("attention.head_count", MAX_WIDTH)?;
    let head_dim = head_dim(file, &keys, hidden_size, heads)?;
    let kv_key = keys.of("attention.head_count_kv");
    let kv_heads = match file.integer(&kv_key, 1..=MAX_WIDTH)? {
        Some(n) => n as usize,
        None => kv_heads_of_tensor(file, heads, head_dim, &kv_key, notes),
    };
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
    let rope_theta = file.number(&keys.of("rope.freq_base"), ROPE_THETA)?;
    let facts = Facts { heads, kv_heads, vocab_size, rope_theta };
    let sub_norms = sub_norms(file, &keys, is_bitnet, notes);
    let activation = activation(file, &keys, is_bitnet || sub_norms, &facts, notes)?;
    let eps_key = keys.of("attention.layer_norm_rms_epsilon");
    let rms_eps =
        file.number(&eps_key, 0.0..=1.0)?.ok_or_else(|| file.invalid(&eps_key, "a float from 0.0 to 1.0"))?;
    Ok(ModelSpec {
        family: match activation {
            _ if architecture == "qwen3" => Family::Qwen3,
            _ if !sub_norms => Family::Llama,
            Activation::Relu2 => Family::BitNet,
            Activation::Silu => Family::OneBitLlm,
        },
        hidden_size,
        intermediate_size: size("feed_forward_length", MAX_WIDTH)?,
        layers,
        heads,
        kv_heads,
        head_dim,
        vocab_size,
        context_length,
        rms_eps,
        rope: rope(file, &keys, &facts, activation, context_length, notes)?,
        activation,
        qk_norm: architecture == "qwen3",
        sub_norms,
        tied: file.tensor(keys::HEAD).is_none(),
        bos: SpecialIds::read(file, vocab_size)?.bos,
        eos: special::end_tokens(file, vocab_size)?,
        quantization: Some(Quantization {
            scale_use: ScaleUse::Multiplies,
            online: false,
            input_norm_eps: has_input_norms(file).then_some(rms_eps),
            keep_dense: Vec::new(),
        }),
        architecture,
    })
}

/// Whether projections have norms on their own inputs, as in BitNet-embedding: their weights are ternary and their inputs int8.
fn has_input_norms(file: &File) -> bool {
    file.tensor(&format!("blk.0.attn_q{}.weight", keys::INPUT_NORM)).is_some()
}

/// Architectures with a recurrent state beside attention.
const HYBRIDS: [&str; 3] = ["qwen35", "qwen35moe", "qwen3next"];

/// Refuses weights that are transformed: keys of PrismML say so, and without the same transformation of their inputs the model
/// writes fluent nonsense, in llama.cpp as well, which does not know these keys.
///
/// # Errors
/// [`Unsupported`](ternion_core::ErrorKind::Unsupported), naming the key.
pub fn refuse_transformed(file: &File) -> Result<()> {
    match file.metadata().find(|(key, _)| key.starts_with("prism.")) {
        None => Ok(()),
        Some((key, _)) => Err(Error::unsupported(format!(
            "`{key}` says that the weights are transformed (`prism.hadamard.*`: rotated by Hadamard matrices), which needs the \
             same transformation of their inputs; supported: files without `prism.` keys"
        ))
        .with("file", file.path().display())),
    }
}

/// The activation, which llama.cpp's converters do not write.
fn activation(
    file: &File,
    keys: &Keys,
    is_bitnet: bool,
    facts: &Facts,
    notes: &mut Notes,
) -> Result<Activation> {
    if let Some(activation) = notes.options.activation {
        return Ok(activation);
    }
    let key = keys.of(keys::ACTIVATION);
    match file.string(&key)? {
        Some("relu2") => Ok(Activation::Relu2),
        Some("silu" | "swish" | "swiglu") => Ok(Activation::Silu),
        Some(_) => Err(file.unsupported(&key, "relu2, silu")),
        None if is_bitnet => signs::activation(file, keys, facts, notes),
        None => Ok(Activation::Silu),
    }
}

/// Whether the model has sub-norms: as the option says, else as the architecture and the tensors do.
fn sub_norms(file: &File, keys: &Keys, is_bitnet: bool, notes: &mut Notes) -> bool {
    if let Some(sub_norms) = notes.options.sub_norms {
        return sub_norms;
    }
    let are_there =
        ["attn_sub_norm", "ffn_sub_norm"].iter().any(|n| file.tensor(&format!("blk.0.{n}.weight")).is_some());
    if are_there && !is_bitnet {
        notes.warn(format!(
            "the architecture `{}` has no sub-norms, but the tensors have (`blk.0.attn_sub_norm.weight`): they are \
             applied; the option `sub_norms` decides",
            keys.architecture()
        ));
    }
    are_there || is_bitnet
}

/// Heads for keys and values of a file that does not state them.
fn kv_heads_of_tensor(file: &File, heads: usize, head_dim: usize, key: &str, notes: &mut Notes) -> usize {
    let rows = file.tensor("blk.0.attn_k.weight").and_then(|t| t.dims.get(1)).map(|rows| *rows as usize);
    let kv_heads = rows.filter(|rows| *rows > 0 && rows.is_multiple_of(head_dim)).map(|rows| rows / head_dim);
    let kv_heads = kv_heads.filter(|n| heads.is_multiple_of(*n)).unwrap_or(heads);
    notes.assume(format!("{kv_heads} heads for keys and values: the file states no `{key}`"));
    kv_heads
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

fn rope(
    file: &File,
    keys: &Keys,
    facts: &Facts,
    activation: Activation,
    context_length: usize,
    notes: &mut Notes,
) -> Result<RopeSpec> {
    let theta = match notes.options.rope_theta.or(facts.rope_theta) {
        Some(theta) => theta,
        None => default_theta(keys, facts, activation, notes),
    };
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
        Some("yarn") => return Ok(RopeSpec { theta, scaling: yarn(file, keys, factor, context_length)? }),
        None | Some("linear") if factor == 1.0 => RopeScaling::None,
        None | Some("linear") => RopeScaling::Linear { factor },
        Some(_) => return Err(file.unsupported(&key, "none, linear, yarn")),
    };
    Ok(RopeSpec { theta, scaling })
}

/// YaRN with the keys and defaults of llama.cpp.
fn yarn(file: &File, keys: &Keys, factor: f32, context_length: usize) -> Result<RopeScaling> {
    let number = |key: &str| file.number(&keys.of(&format!("rope.scaling.{key}")), 0.0..=1e6);
    let original = keys.of("rope.scaling.original_context_length");
    let original = file.integer(&original, 1..=MAX_CONTEXT)?.map_or(context_length, |n| n as usize);
    for (key, plain) in [("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)] {
        if number(key)?.is_some_and(|x| x != plain) {
            let key = keys.of(&format!("rope.scaling.{key}"));
            return Err(file.unsupported(&key, &plain.to_string()));
        }
    }
    let stated = match number("yarn_attn_factor")? {
        Some(factor) => Some(factor),
        None => number("attn_factor")?,
    };
    let attention_factor = crate::spec::yarn_magnitude(factor, 1.0) as f32 * stated.unwrap_or(1.0);
    Ok(RopeScaling::Yarn {
        factor,
        original_context: original,
        beta_fast: number("yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: number("yarn_beta_slow")?.unwrap_or(1.0),
        truncate: true,
        attention_factor,
    })
}

/// The rotary base of a file that does not state it. Converters leave it out where the model's `config.json` does, which
/// then means transformers' default: 500000 for BitNet, 10000 for Llama and so for llama.cpp.
fn default_theta(keys: &Keys, facts: &Facts, activation: Activation, notes: &mut Notes) -> f32 {
    let is_2b4t = keys.architecture().starts_with("bitnet") && activation == Activation::Relu2;
    let theta = if is_2b4t { 500_000.0 } else { 10_000.0 };
    let key = keys.of("rope.freq_base");
    if is_2b4t {
        notes.warn(format!(
            "the file states no `{key}`: {theta} is used, transformers' default for BitNet; llama.cpp takes 10000; the \
             option `rope_theta` decides"
        ));
    } else if facts.vocab_size >= signs::LARGE_VOCAB {
        notes.warn(format!(
            "the file states no `{key}`: {theta} is used, as by llama.cpp, but models with a vocabulary of {} have larger \
             ones; the option `rope_theta` decides",
            facts.vocab_size
        ));
    } else {
        notes.assume(format!("rotary base {theta}: the file states no `{key}`; llama.cpp's default"));
    }
    theta
}

/// The sampling that a file of any architecture asks for; greedy where it states no temperature.
///
/// # Errors
/// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where a key has the wrong type.
pub fn sampling_defaults(file: &File) -> Result<SamplingDefaults> {
    sampling(file, &mut Notes::default())
}

/// The sampling that the file asks for; greedy where it states no temperature. Values out of range are off, as in
/// llama.cpp.
pub(super) fn sampling(file: &File, notes: &mut Notes) -> Result<SamplingDefaults> {
    let mut sampling = SamplingDefaults::default();
    if let Some(penalty) = file.number(keys::PENALTY, f32::MIN_POSITIVE..=100.0)? {
        sampling.repetition_penalty = penalty;
    }
    for key in [keys::XTC, keys::MIROSTAT] {
        let is_off = |value: &super::Value| {
            value.as_float().or(value.as_integer().map(|n| n as f64)).is_none_or(|n| n == 0.0)
        };
        if !file.value(key).is_none_or(is_off) {
            notes.warn(format!("the file asks for `{key}`, a way to sample that is not applied here"));
        }
    }
    let Some(temperature) = file.number(keys::TEMPERATURE, f32::MIN..=100.0)? else {
        if [keys::TOP_K, keys::TOP_P, keys::MIN_P].iter().any(|key| file.value(key).is_some()) {
            notes.warn(format!(
                "the file states how to sample but no `{}`: answers are greedy; `sampling.temperature` decides",
                keys::TEMPERATURE
            ));
        }
        return Ok(sampling);
    };
    if temperature <= 0.0 {
        return Ok(sampling);
    }
    sampling.temperature = temperature;
    // Converters copy these keys from `generation_config.json`, so what is absent has transformers' default.
    sampling.top_k = if let Some(value) = file.value(keys::TOP_K) {
        let top_k = value.as_integer().ok_or_else(|| file.invalid(keys::TOP_K, "an integer"))?;
        usize::try_from(top_k).unwrap_or(0)
    } else {
        notes.assume(format!(
            "top-k {DEFAULT_TOP_K}: the model samples and the file states no `{}`; transformers' default",
            keys::TOP_K
        ));
        DEFAULT_TOP_K
    };
    if let Some(top_p) = file.number(keys::TOP_P, 0.0..=f32::MAX)? {
        sampling.top_p = top_p.clamp(f32::MIN_POSITIVE, 1.0);
    }
    if let Some(min_p) = file.number(keys::MIN_P, 0.0..=1.0)? {
        sampling.min_p = min_p;
    }
    Ok(sampling)
}
