//! `config.json` of a Hugging Face repository, turned into a [`ModelSpec`].
//!
//! Where a key may be absent, the default is the one of the model's configuration class in transformers. The sizes of
//! the model may not: a guess there would only move the error to a tensor's shape.

use ternion_core::Result;

use crate::json::Object;
use crate::{Activation, Family, ModelSpec, Quantization, RopeScaling, RopeSpec, ScaleUse};

// Bounds that no real model comes near. They keep every product of sizes far from overflow.
const MAX_WIDTH: u64 = 1 << 20;
const MAX_LAYERS: u64 = 1024;
const MAX_VOCAB: u64 = 1 << 24;
const MAX_CONTEXT: u64 = 1 << 28;

/// Reads the specification, the end-of-text tokens included as far as this file names them.
pub(crate) fn read(config: &Object) -> Result<ModelSpec> {
    let architecture = config.required_string("model_type", "`bitnet` or `llama`")?.to_owned();
    let family = family(config, &architecture)?;
    let hidden_size = config.required_integer("hidden_size", 1..=MAX_WIDTH)?;
    let intermediate_size = config.required_integer("intermediate_size", 1..=MAX_WIDTH)?;
    let layers = config.required_integer("num_hidden_layers", 1..=MAX_LAYERS)?;
    let heads = config.required_integer("num_attention_heads", 1..=MAX_WIDTH)?;
    let kv_heads = config.integer("num_key_value_heads", 1..=MAX_WIDTH)?.unwrap_or(heads);
    if heads % kv_heads != 0 {
        let expected = format!("a divisor of `num_attention_heads` ({heads})");
        return Err(config.invalid("num_key_value_heads", &kv_heads, &expected));
    }
    let head_dim = head_dim(config, hidden_size, heads)?;
    let vocab_size = config.required_integer("vocab_size", 1..=MAX_VOCAB)?;
    let context_length = config.required_integer("max_position_embeddings", 1..=MAX_CONTEXT)?;
    for key in ["attention_bias", "mlp_bias"] {
        if config.boolean(key)? == Some(true) {
            return Err(config.unsupported(key, &true, "projections without bias (false)"));
        }
    }
    let default_eps = if family == Family::Llama { 1e-6 } else { 1e-5 };
    Ok(ModelSpec {
        architecture,
        family,
        hidden_size,
        intermediate_size,
        layers,
        heads,
        kv_heads,
        head_dim,
        vocab_size,
        context_length,
        rms_eps: config.number("rms_norm_eps", 0.0..=1.0)?.unwrap_or(default_eps),
        rope: rope(config, family, context_length)?,
        activation: activation(config, family)?,
        sub_norms: family != Family::Llama,
        tied: config.boolean("tie_word_embeddings")?.unwrap_or(false),
        bos: config.token_ids("bos_token_id")?.and_then(|ids| ids.first().copied()),
        eos: config.token_ids("eos_token_id")?.unwrap_or_default(),
        quantization: quantization(config, family)?,
    })
}

fn family(config: &Object, architecture: &str) -> Result<Family> {
    match architecture {
        "bitnet" => Ok(Family::BitNet),
        // The 1bitLLM checkpoints say `llama` and differ from it by a class of their own and its bit widths.
        "llama" => {
            let own_class = config.strings("architectures")?.iter().any(|name| name == "BitnetForCausalLM");
            if !own_class && config.value("weight_bits").is_none() {
                return Ok(Family::Llama);
            }
            for (key, supported) in [("weight_bits", 1), ("input_bits", 8)] {
                let bits = config.integer(key, 1..=64)?.unwrap_or(supported);
                if bits != supported {
                    return Err(config.unsupported(key, &bits, &supported.to_string()));
                }
            }
            Ok(Family::OneBitLlm)
        }
        other => Err(config.unsupported("model_type", &format!("`{other}`"), "bitnet, llama")),
    }
}

fn head_dim(config: &Object, hidden_size: usize, heads: usize) -> Result<usize> {
    let head_dim = match config.integer("head_dim", 1..=MAX_WIDTH)? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let expected = format!("a divisor of `hidden_size` ({hidden_size}), or `head_dim` beside it");
            return Err(config.invalid("num_attention_heads", &heads, &expected));
        }
    };
    if head_dim % 2 != 0 {
        return Err(config.invalid(
            "head_dim",
            &head_dim,
            "an even number, of which one half is rotated against the other",
        ));
    }
    if heads * head_dim > MAX_WIDTH as usize {
        let expected = format!("a head of at most {} for {heads} heads", MAX_WIDTH as usize / heads);
        return Err(config.invalid("head_dim", &head_dim, &expected));
    }
    Ok(head_dim)
}

fn activation(config: &Object, family: Family) -> Result<Activation> {
    match config.string("hidden_act")? {
        Some("relu2") => Ok(Activation::Relu2),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some(other) => Err(config.unsupported("hidden_act", &format!("`{other}`"), "relu2, silu")),
        None if family == Family::BitNet => Ok(Activation::Relu2),
        None => Ok(Activation::Silu),
    }
}

/// The rotary embedding, in either of its forms: `rope_theta` and `rope_scaling`, or `rope_parameters`, which holds both
/// (transformers 5).
fn rope(config: &Object, family: Family, context_length: usize) -> Result<RopeSpec> {
    let parameters = config.object("rope_parameters")?;
    let scaling = match config.object("rope_scaling")? {
        Some(scaling) => Some(scaling),
        None => config.object("rope_parameters")?,
    };
    let range = 1.0..=1e12;
    let stated =
        match parameters.as_ref().map(|p| p.number("rope_theta", range.clone())).transpose()?.flatten() {
            Some(theta) => Some(theta),
            None => config.number("rope_theta", range)?,
        };
    let theta = stated.unwrap_or(if family == Family::BitNet { 500_000.0 } else { 10_000.0 });
    for place in [Some(config), parameters.as_ref()].into_iter().flatten() {
        if let Some(part) = place.number("partial_rotary_factor", 0.0..=1.0)?.filter(|part| *part != 1.0) {
            return Err(place.unsupported("partial_rotary_factor", &part, "1.0"));
        }
    }
    if config.boolean("rope_interleaved")? == Some(true) {
        return Err(config.unsupported("rope_interleaved", &true, "false"));
    }
    let scaling = scaling.map_or(Ok(RopeScaling::None), |s| rope_scaling(&s, context_length))?;
    Ok(RopeSpec { theta, scaling })
}

fn rope_scaling(scaling: &Object, context_length: usize) -> Result<RopeScaling> {
    let key = if scaling.value("rope_type").is_some() { "rope_type" } else { "type" };
    let factor = |key: &str| {
        let found = scaling.number(key, f32::MIN_POSITIVE..=1e6)?;
        found.ok_or_else(|| scaling.invalid(key, &"missing", "a positive number"))
    };
    match scaling.string(key)? {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: factor("factor")? }),
        Some("llama3") => {
            let (low, high) = (factor("low_freq_factor")?, factor("high_freq_factor")?);
            if low >= high {
                let expected = format!("less than `high_freq_factor` ({high})");
                return Err(scaling.invalid("low_freq_factor", &low, &expected));
            }
            let original = scaling.integer("original_max_position_embeddings", 1..=MAX_CONTEXT)?;
            Ok(RopeScaling::Llama3 {
                factor: factor("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: original.unwrap_or(context_length),
            })
        }
        Some(other) => Err(scaling.unsupported(key, &format!("`{other}`"), "default, linear, llama3")),
    }
}

fn quantization(config: &Object, family: Family) -> Result<Option<Quantization>> {
    let Some(quantization) = config.object("quantization_config")? else {
        // A BitNet's projections are ternary whether or not it is said; float weights of one are masters.
        return Ok((family != Family::Llama).then(|| Quantization {
            scale_use: ScaleUse::Divides,
            online: true,
            input_norm_eps: None,
            keep_dense: Vec::new(),
        }));
    };
    if let Some(method) = quantization.string("quant_method")?.filter(|method| *method != "bitnet") {
        return Err(quantization.unsupported("quant_method", &format!("`{method}`"), "bitnet"));
    }
    let scale_use = match quantization.string("linear_class")? {
        Some("autobitlinear") => ScaleUse::Multiplies,
        None | Some("bitlinear") => ScaleUse::Divides,
        Some(other) => {
            return Err(quantization.unsupported(
                "linear_class",
                &format!("`{other}`"),
                "autobitlinear, bitlinear",
            ));
        }
    };
    let online = match quantization.string("quantization_mode")? {
        Some("online") => true,
        // Masters of the 1bitLLM family are quantised whatever a later configuration says.
        None | Some("offline") => family == Family::OneBitLlm,
        Some(other) => {
            return Err(quantization.unsupported(
                "quantization_mode",
                &format!("`{other}`"),
                "online, offline",
            ));
        }
    };
    let norm = quantization.boolean("use_rms_norm")?.unwrap_or(false);
    let eps = quantization.number("rms_norm_eps", 0.0..=1.0)?.unwrap_or(1e-6);
    Ok(Some(Quantization {
        scale_use,
        online,
        input_norm_eps: norm.then_some(eps),
        keep_dense: keep_dense(&quantization)?,
    }))
}

/// The names of `modules_to_not_convert`. transformers takes them as regular expressions; what occurs are plain names,
/// sometimes with `.*` at the end, which says nothing more about a prefix.
fn keep_dense(quantization: &Object) -> Result<Vec<String>> {
    const KEY: &str = "modules_to_not_convert";
    let mut names = quantization.strings(KEY)?;
    for name in &mut names {
        if let Some(prefix) = name.strip_suffix(".*") {
            *name = prefix.to_owned();
        }
        if name.contains(|c: char| "*+?[](){}|^$\\".contains(c)) {
            return Err(quantization.unsupported(
                KEY,
                &format!("`{name}`"),
                "names of modules, or their beginnings or ends",
            ));
        }
    }
    Ok(names)
}

/// Whether transformers keeps a module dense: a name of the list begins or ends the module's.
pub(crate) fn stays_dense(quantization: &Quantization, module: &str) -> bool {
    quantization
        .keep_dense
        .iter()
        .any(|name| module.starts_with(name.as_str()) || module.ends_with(name.as_str()))
}
