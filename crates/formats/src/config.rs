//! `config.json` of a Hugging Face repository, turned into a [`ModelSpec`].
//!
//! Where a key may be absent, the default is the one of the model's configuration class in transformers. The sizes of
//! the model may not: a guess there would only move the error to a tensor's shape.

use std::collections::BTreeMap;

use ::safetensors::Dtype;
use ternion_core::Result;

use crate::json::Object;
use crate::notes::{Notes, ROPE_THETA};
use crate::safetensors::RawTensor;
use crate::{Activation, Family, ModelSpec, Quantization, RopeScaling, RopeSpec, ScaleUse};

// Bounds that no real model comes near. They keep every product of sizes far from overflow.
const MAX_WIDTH: u64 = 1 << 20;
const MAX_LAYERS: u64 = 1024;
const MAX_VOCAB: u64 = 1 << 24;
const MAX_CONTEXT: u64 = 1 << 28;

/// The context length of transformers' BitNet and Llama classes.
const DEFAULT_CONTEXT: usize = 2048;
/// That of its Qwen3 class, and the width of a head there.
const QWEN3_CONTEXT: usize = 32768;
const QWEN3_HEAD: usize = 128;

/// A vocabulary of this size is that of Llama 3 or a later model, whose rotary base is not 10000.
const LARGE_VOCAB: usize = 100_000;

/// What the names and shapes of the tensors tell about facts that the configuration may leave open.
#[derive(Debug, Default)]
pub(crate) struct Signs {
    sub_norms: Option<SubNorms>,
    /// Output width of the first key projection.
    kv_width: Option<usize>,
    has_head: bool,
    /// Each projection has a norm of its own before it, as in BitNet-embedding.
    projection_norms: bool,
}

/// By whose names the sub-norms go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SubNorms {
    Transformers,
    OneBitLlm,
}

impl Signs {
    /// Those of a graph, whose weights have other names.
    pub(crate) fn of_graph(has_head: bool) -> Self {
        Self { has_head, ..Self::default() }
    }

    pub(crate) fn of(tensors: &BTreeMap<String, RawTensor>) -> Self {
        let has = |name: &str| tensors.contains_key(&format!("model.layers.0.{name}.weight"));
        let sub_norms = if has("self_attn.attn_sub_norm") || has("mlp.ffn_sub_norm") {
            Some(SubNorms::Transformers)
        } else {
            (has("self_attn.inner_attn_ln") || has("mlp.ffn_layernorm")).then_some(SubNorms::OneBitLlm)
        };
        let kv_width = tensors.get("model.layers.0.self_attn.k_proj.weight").and_then(|tensor| {
            // Packed rows hold four.
            let rows = *tensor.shape.first()?;
            if tensor.dtype == Dtype::U8 { rows.checked_mul(4) } else { Some(rows) }
        });
        let projection_norms = has("self_attn.q_proj.norm");
        Self { sub_norms, kv_width, has_head: tensors.contains_key(crate::layers::HEAD), projection_norms }
    }
}

/// How MLX has quantised matrices: `scale * code + bias` for each group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MlxQuantization {
    pub(crate) bits: usize,
    pub(crate) group: usize,
}

impl MlxQuantization {
    /// Its object, which MLX writes under one or two names.
    pub(crate) fn read(config: &Object) -> Result<Option<Self>> {
        for key in ["quantization", "quantization_config"] {
            let Some(object) = config.object(key)? else { continue };
            if object.value("bits").is_none() || object.value("quant_method").is_some() {
                continue;
            }
            if let Some(mode) = object.string("mode")?.filter(|mode| *mode != "affine") {
                return Err(object.unsupported("mode", &format!("`{mode}`"), "affine"));
            }
            if let Some(module) = object.key_of_object() {
                return Err(object.unsupported(module, &"an object", "one quantisation for all modules"));
            }
            let bits = object.required_integer("bits", 1..=64)?;
            if bits > 2 {
                return Err(object.unsupported("bits", &bits, "2 (ternary) and 1 (binary)"));
            }
            let group = object.required_integer("group_size", 1..=MAX_WIDTH)?;
            if !matches!(group, 64 | 128 | 256) {
                return Err(object.unsupported("group_size", &group, "64, 128, 256"));
            }
            return Ok(Some(Self { bits, group }));
        }
        Ok(None)
    }
}

/// Model types of hybrids that PrismML and others publish in ternary form.
const HYBRIDS: [&str; 5] = ["qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_next", "qwen35"];

/// Reads the specification, the end-of-text tokens included as far as this file names them. What it leaves open is
/// concluded from `signs`, or is transformers' default.
pub(crate) fn read(config: &Object, signs: &Signs, notes: &mut Notes) -> Result<ModelSpec> {
    let architecture =
        config.required_string("model_type", "`bitnet`, `llama`, `mistral` or `qwen3`")?.to_owned();
    let family = family(config, &architecture, signs, notes)?;
    if let Some(key) = config.key_with_prefix("prism") {
        let needed = "none: weights that are rotated need the same rotation of their inputs";
        return Err(config.unsupported(&key, &"there", needed));
    }
    if family == Family::Qwen3 {
        attends_to_all(config)?;
    }
    let hidden_size = config.required_integer("hidden_size", 1..=MAX_WIDTH)?;
    let intermediate_size = config.required_integer("intermediate_size", 1..=MAX_WIDTH)?;
    let layers = config.required_integer("num_hidden_layers", 1..=MAX_LAYERS)?;
    let heads = config.required_integer("num_attention_heads", 1..=MAX_WIDTH)?;
    let head_dim = head_dim(config, family, hidden_size, heads, notes)?;
    let kv_heads = kv_heads(config, heads, head_dim, signs, notes)?;
    let vocab_size = config.required_integer("vocab_size", 1..=MAX_VOCAB)?;
    let context_length = if let Some(length) = config.integer("max_position_embeddings", 1..=MAX_CONTEXT)? {
        length
    } else {
        let context = if family == Family::Qwen3 { QWEN3_CONTEXT } else { DEFAULT_CONTEXT };
        notes.assume(format!(
            "context of {context} tokens: config.json has no `max_position_embeddings`; transformers' default"
        ));
        context
    };
    let context_length = within_window(config, &architecture, context_length, notes)?;
    for key in ["attention_bias", "mlp_bias"] {
        if config.boolean(key)? == Some(true) {
            return Err(config.unsupported(key, &true, "projections without bias (false)"));
        }
    }
    let rms_eps = if let Some(eps) = config.number("rms_norm_eps", 0.0..=1.0)? {
        eps
    } else {
        let eps = if family.is_bitnet() { 1e-5 } else { 1e-6 };
        notes.assume(format!(
            "RMS norm epsilon {eps:e}: config.json has no `rms_norm_eps`; transformers' default"
        ));
        eps
    };
    let sub_norms = notes.options.sub_norms.unwrap_or(family.is_bitnet());
    Ok(ModelSpec {
        architecture,
        // Without sub-norms it is a Llama, whatever it calls itself.
        family: if sub_norms || !family.is_bitnet() { family } else { Family::Llama },
        hidden_size,
        intermediate_size,
        layers,
        heads,
        kv_heads,
        head_dim,
        vocab_size,
        context_length,
        rms_eps,
        rope: rope(config, family, head_dim, (context_length, vocab_size), notes)?,
        activation: activation(config, family, notes)?,
        qk_norm: family == Family::Qwen3,
        sub_norms,
        tied: tied(config, signs, notes)?,
        bos: config.token_ids("bos_token_id")?.and_then(|ids| ids.first().copied()),
        eos: config.token_ids("eos_token_id")?.unwrap_or_default(),
        quantization: match quantization(config, family, notes)? {
            None if signs.projection_norms => Some(with_norms(rms_eps, notes)),
            found => found,
        },
    })
}

/// The quantisation of a model whose projections have norms of their own: W1.58A8 by the mean of absolute values, as in
/// Microsoft's BitNet-embedding, whose files hold float masters.
fn with_norms(eps: f32, notes: &mut Notes) -> Quantization {
    notes.assume(
        "float weights are masters of ternary ones: each projection has a norm of its own, as in BitNet-embedding, and config.json \
         has no `quantization_config`",
    );
    Quantization {
        scale_use: ScaleUse::Multiplies,
        online: true,
        input_norm_eps: Some(eps),
        keep_dense: Vec::new(),
    }
}

fn family(config: &Object, architecture: &str, signs: &Signs, notes: &mut Notes) -> Result<Family> {
    match architecture {
        "bitnet" => Ok(Family::BitNet),
        "qwen3" => Ok(Family::Qwen3),
        // A Llama with a sliding window, beyond which no context goes.
        "mistral" => Ok(Family::Llama),
        // The 1bitLLM checkpoints say `llama` and differ from it by a class of their own and its bit widths.
        "llama" => {
            let own_class = config.strings("architectures")?.iter().any(|name| name == "BitnetForCausalLM");
            if !own_class && config.value("weight_bits").is_none() {
                return Ok(family_of_llama(signs, notes));
            }
            for (key, supported) in [("weight_bits", 1), ("input_bits", 8)] {
                let bits = config.integer(key, 1..=64)?.unwrap_or(supported);
                if bits != supported {
                    return Err(config.unsupported(key, &bits, &supported.to_string()));
                }
            }
            Ok(Family::OneBitLlm)
        }
        other if HYBRIDS.contains(&other) => {
            let needed =
                "bitnet, llama, mistral, qwen3; a hybrid needs gated DeltaNet layers with a recurrent state";
            Err(config.unsupported("model_type", &format!("`{other}`"), needed))
        }
        other => {
            Err(config.unsupported("model_type", &format!("`{other}`"), "bitnet, llama, mistral, qwen3"))
        }
    }
}

/// The family of a model that calls itself `llama`. Llama itself has no sub-norms.
fn family_of_llama(signs: &Signs, notes: &mut Notes) -> Family {
    let Some(names) = signs.sub_norms.filter(|_| notes.options.sub_norms != Some(false)) else {
        return Family::Llama;
    };
    let (family, name) = match names {
        SubNorms::Transformers => (Family::BitNet, "attn_sub_norm"),
        SubNorms::OneBitLlm => (Family::OneBitLlm, "inner_attn_ln"),
    };
    notes.warn(format!(
        "`model_type` in config.json is `llama`, which has no sub-norms, but the tensors have (`{name}`): read as \
         {family}; the option `sub_norms` decides, and `activation` for the activation"
    ));
    family
}

fn kv_heads(
    config: &Object,
    heads: usize,
    head_dim: usize,
    signs: &Signs,
    notes: &mut Notes,
) -> Result<usize> {
    const KEY: &str = "num_key_value_heads";
    if let Some(kv_heads) = config.integer(KEY, 1..=MAX_WIDTH)? {
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of `num_attention_heads` ({heads})");
            return Err(config.invalid(KEY, &kv_heads, &expected));
        }
        return Ok(kv_heads);
    }
    let width = signs.kv_width.filter(|width| *width > 0 && width.is_multiple_of(head_dim));
    let kv_heads = width.map(|width| width / head_dim).filter(|n| heads.is_multiple_of(*n)).unwrap_or(heads);
    notes.assume(format!(
        "{kv_heads} heads for keys and values: config.json has no `{KEY}`; taken from {}",
        if width.is_some() { "the shape of `k_proj`" } else { "`num_attention_heads`" }
    ));
    Ok(kv_heads)
}

fn tied(config: &Object, signs: &Signs, notes: &mut Notes) -> Result<bool> {
    if let Some(tied) = config.boolean("tie_word_embeddings")? {
        return Ok(tied);
    }
    if !signs.has_head {
        notes.assume(
            "the head is the embedding: config.json has no `tie_word_embeddings`, and there is no `lm_head.weight`",
        );
    }
    Ok(!signs.has_head)
}

/// Sliding windows are not computed.
fn attends_to_all(config: &Object) -> Result<()> {
    if config.boolean("use_sliding_window")? == Some(true) {
        return Err(config.unsupported("use_sliding_window", &true, "false"));
    }
    match config.strings("layer_types")?.iter().find(|kind| *kind != "full_attention") {
        Some(other) => Err(config.unsupported("layer_types", &format!("`{other}`"), "full_attention")),
        None => Ok(()),
    }
}

/// The context in which a sliding window leaves nothing out: windows are not computed.
fn within_window(config: &Object, architecture: &str, context: usize, notes: &mut Notes) -> Result<usize> {
    const KEY: &str = "sliding_window";
    if architecture != "mistral" {
        return Ok(context);
    }
    match config.integer(KEY, 1..=MAX_CONTEXT)? {
        Some(window) if window < context => {
            notes.assume(format!(
                "context of {window} tokens instead of {context}: `{KEY}` in config.json, which no longer context is computed with"
            ));
            Ok(window)
        }
        _ => Ok(context),
    }
}

fn head_dim(
    config: &Object,
    family: Family,
    hidden_size: usize,
    heads: usize,
    notes: &mut Notes,
) -> Result<usize> {
    let head_dim = match config.integer("head_dim", 1..=MAX_WIDTH)? {
        Some(head_dim) => head_dim,
        None if family == Family::Qwen3 => {
            notes.assume(format!(
                "heads of {QWEN3_HEAD} elements: config.json has no `head_dim`; transformers' default for Qwen3"
            ));
            QWEN3_HEAD
        }
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

fn activation(config: &Object, family: Family, notes: &mut Notes) -> Result<Activation> {
    if let Some(activation) = notes.options.activation {
        return Ok(activation);
    }
    match config.string("hidden_act")? {
        Some("relu2") => Ok(Activation::Relu2),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some(other) => Err(config.unsupported("hidden_act", &format!("`{other}`"), "relu2, silu")),
        None => {
            let activation = if family == Family::BitNet { Activation::Relu2 } else { Activation::Silu };
            notes.assume(format!(
                "activation {activation}: config.json has no `hidden_act`; the default of the family {family}"
            ));
            Ok(activation)
        }
    }
}

/// The rotary embedding, as transformers 5 reads it. `rope_scaling` and `rope_parameters` are two names of one object, of
/// which the first wins as a whole; `rope_theta` and `partial_rotary_factor` in it win over those at the top.
fn rope(
    config: &Object,
    family: Family,
    head_dim: usize,
    (context_length, vocab_size): (usize, usize),
    notes: &mut Notes,
) -> Result<RopeSpec> {
    let named = |key: &str| -> Result<Option<Object>> {
        // An empty object counts as absent.
        Ok(config.object(key)?.filter(|object| !object.is_empty()))
    };
    let (scaling, parameters) = (named("rope_scaling")?, named("rope_parameters")?);
    if let (Some(scaling), Some(parameters)) = (&scaling, &parameters)
        && !scaling.same_as(parameters)
    {
        notes.warn(
            "`rope_scaling` and `rope_parameters` in config.json differ; transformers takes all from the first, and so is \
             done here; remove one of them, or set the option `rope_theta`",
        );
    }
    let object = scaling.or(parameters);
    if let Some((object, key)) = object.as_ref().and_then(|o| Some((o, o.key_of_object()?))) {
        return Err(object.unsupported(key, &"an object", "one rotary embedding for all layers"));
    }
    let within = |key: &str, range: std::ops::RangeInclusive<f32>| -> Result<Option<f32>> {
        object.as_ref().map(|o| o.number(key, range)).transpose().map(Option::flatten)
    };
    let inner = within("rope_theta", ROPE_THETA)?;
    let outer = config.number("rope_theta", ROPE_THETA)?;
    if let (Some(inner), Some(outer)) = (inner, outer)
        && inner != outer
        && notes.options.rope_theta.is_none()
    {
        notes.warn(format!(
            "config.json states two values of `rope_theta`, {inner} beside the scaling and {outer} at the top; the \
             first is used, as by transformers 5 (4.57 takes the other); the option `rope_theta` decides"
        ));
    }
    let theta = match notes.options.rope_theta.or(inner).or(outer) {
        Some(theta) => theta,
        None => default_theta(family, vocab_size, notes),
    };
    let range = 0.0..=1.0;
    let part = within("partial_rotary_factor", range.clone())?;
    let place = if part.is_some() { object.as_ref().unwrap_or(config) } else { config };
    let part = part.map_or_else(|| config.number("partial_rotary_factor", range), |part| Ok(Some(part)))?;
    if let Some(part) = part.filter(|part| *part != 1.0) {
        return Err(place.unsupported("partial_rotary_factor", &part, "1.0"));
    }
    if config.boolean("rope_interleaved")? == Some(true) {
        return Err(config.unsupported("rope_interleaved", &true, "false"));
    }
    let scaling = object.map_or(Ok(RopeScaling::None), |o| rope_scaling(&o, head_dim, context_length))?;
    if matches!(scaling, RopeScaling::Dynamic { .. }) {
        notes.assume(format!(
            "context of {context_length} tokens, up to which dynamic rotary scaling changes nothing; beyond it the same tokens would \
             give other logits in other chunks, in transformers too"
        ));
    }
    Ok(RopeSpec { theta, scaling })
}

fn default_theta(family: Family, vocab_size: usize, notes: &mut Notes) -> f32 {
    let theta = if family == Family::BitNet { 500_000.0 } else { 10_000.0 };
    let message = format!("rotary base {theta}: config.json has no `rope_theta`; transformers' default");
    if !family.is_bitnet() && vocab_size >= LARGE_VOCAB {
        notes.warn(format!(
            "{message}, but models with a vocabulary of {vocab_size} have larger ones; the option `rope_theta` decides"
        ));
    } else {
        notes.assume(message);
    }
    theta
}

fn rope_scaling(scaling: &Object, head_dim: usize, context_length: usize) -> Result<RopeScaling> {
    let key = if scaling.value("rope_type").is_some() { "rope_type" } else { "type" };
    let factor = |key: &str| {
        let found = scaling.number(key, f32::MIN_POSITIVE..=1e6)?;
        found.ok_or_else(|| scaling.invalid(key, &"missing", "a positive number"))
    };
    let original_context = || -> Result<usize> {
        let inner = scaling.integer("original_max_position_embeddings", 1..=MAX_CONTEXT)?;
        Ok(inner.unwrap_or(context_length))
    };
    match scaling.string(key)? {
        None | Some("default") => Ok(RopeScaling::None),
        Some("dynamic") => Ok(RopeScaling::Dynamic { factor: factor("factor")? }),
        Some("yarn") => yarn(scaling, original_context()?, context_length),
        Some("linear") => Ok(RopeScaling::Linear { factor: factor("factor")? }),
        Some("llama3") => {
            let (low, high) = (factor("low_freq_factor")?, factor("high_freq_factor")?);
            if low >= high {
                let expected = format!("less than `high_freq_factor` ({high})");
                return Err(scaling.invalid("low_freq_factor", &low, &expected));
            }
            Ok(RopeScaling::Llama3 {
                factor: factor("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: original_context()?,
            })
        }
        Some("longrope") => factors(scaling, key, head_dim),
        Some(other) => Err(scaling.unsupported(key, &format!("`{other}`"), ROPE_TYPES)),
    }
}

const ROPE_TYPES: &str = "default, linear, dynamic, yarn, llama3; longrope with the same factors for short and long contexts and an `attention_factor` of 1";

/// Factors for each frequency. Two lists, of which the length of a text chooses one, would be as dynamic scaling is.
fn factors(scaling: &Object, key: &str, head_dim: usize) -> Result<RopeScaling> {
    let list = |key: &str| scaling.value(key).and_then(serde_json::Value::as_array);
    let (Some(short), Some(long)) = (list("short_factor"), list("long_factor")) else {
        return Err(scaling.unsupported(key, &"`longrope`", ROPE_TYPES));
    };
    if short != long || scaling.number("attention_factor", 0.0..=1e6)? != Some(1.0) {
        return Err(scaling.unsupported(key, &"`longrope`", ROPE_TYPES));
    }
    let factors: Option<Vec<f32>> =
        long.iter().map(|factor| factor.as_f64().map(|factor| factor as f32)).collect();
    let valid = factors.filter(|factors| {
        factors.len() == head_dim / 2 && factors.iter().all(|factor| *factor > 0.0 && factor.is_finite())
    });
    valid.map(RopeScaling::Factors).ok_or_else(|| {
        let expected = format!("{} positive numbers, one for each frequency", head_dim / 2);
        scaling.invalid("long_factor", &format!("a list of {}", long.len()), &expected)
    })
}

fn yarn(scaling: &Object, original_context: usize, context_length: usize) -> Result<RopeScaling> {
    let positive = |key: &str| scaling.number(key, f32::MIN_POSITIVE..=1e6);
    let factor = positive("factor")?.unwrap_or(context_length as f32 / original_context as f32);
    // 0 counts as left out for these, as in transformers.
    let optional = |key: &str| Ok(scaling.number(key, 0.0..=1e6)?.filter(|x| *x != 0.0));
    let (mscale, all): (Option<f32>, Option<f32>) = (optional("mscale")?, optional("mscale_all_dim")?);
    let magnitude = |mscale: f32| crate::spec::yarn_magnitude(factor, mscale);
    let attention_factor = match (scaling.number("attention_factor", 0.0..=1e6)?, mscale, all) {
        (Some(stated), ..) => stated,
        (None, Some(mscale), Some(all)) => (magnitude(mscale) / magnitude(all)) as f32,
        _ => magnitude(1.0) as f32,
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_context,
        beta_fast: optional("beta_fast")?.unwrap_or(32.0),
        beta_slow: optional("beta_slow")?.unwrap_or(1.0),
        truncate: scaling.boolean("truncate")?.unwrap_or(true),
        attention_factor,
    })
}

fn quantization(config: &Object, family: Family, notes: &mut Notes) -> Result<Option<Quantization>> {
    let quantization = if MlxQuantization::read(config)?.is_some() {
        if family.is_bitnet() {
            return Err(config.unsupported("quantization", &"of MLX", "llama and qwen3 in MLX's form"));
        }
        None
    } else {
        config.object("quantization_config")?
    };
    let Some(quantization) = quantization else {
        // A BitNet's projections are ternary whether or not it is said; float weights of one are masters.
        if family.is_bitnet() {
            notes.assume(format!(
                "projections are ternary and their inputs int8: config.json has no `quantization_config`; the family {family}"
            ));
        }
        return Ok(family.is_bitnet().then(|| Quantization {
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
        Some("bitlinear") => ScaleUse::Divides,
        None => {
            notes.assume(
                "a stored `weight_scale` divides: `quantization_config` has no `linear_class`; transformers' default, `bitlinear`",
            );
            ScaleUse::Divides
        }
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
