//! Families in safetensors, as transformers saves them: from `config.json` to candle's configuration and model.

use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{gemma2, gemma3, phi3, qwen2};
use ternion_core::{Error, Result, registry::Progress};
use ternion_formats::{JsonObject, RawCheckpoint};

use super::network::{Gemma3, Network};
use super::weights::Weights;

// Bounds that no real model comes near. They keep products of sizes far from overflow.
const MAX_WIDTH: u64 = 1 << 20;
const MAX_LAYERS: u64 = 1024;
const MAX_VOCAB: u64 = 1 << 24;
const MAX_CONTEXT: u64 = 1 << 24;

/// A family that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Qwen2,
    Gemma2,
    Gemma3,
    Phi3,
}

impl Family {
    /// The family of `model_type`.
    pub(super) fn of(architecture: &str) -> Option<Self> {
        match architecture {
            "qwen2" => Some(Self::Qwen2),
            "gemma2" => Some(Self::Gemma2),
            "gemma3_text" => Some(Self::Gemma3),
            "phi3" => Some(Self::Phi3),
            _ => None,
        }
    }
}

/// What all families state.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    pub(super) hidden: usize,
    pub(super) inner: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocab_size: usize,
    /// Positions that candle's model computes right.
    pub(super) context: usize,
    pub(super) eps: f64,
    pub(super) activation: Activation,
}

impl Facts {
    pub(super) fn read(config: &JsonObject, family: Family) -> Result<Self> {
        let size = |key: &str, most: u64| config.required_integer(key, 1..=most);
        let (hidden, heads) = (size("hidden_size", MAX_WIDTH)?, size("num_attention_heads", MAX_WIDTH)?);
        let kv_heads = config.integer("num_key_value_heads", 1..=MAX_WIDTH)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of `num_attention_heads` ({heads})");
            return Err(config.invalid("num_key_value_heads", &kv_heads, &expected));
        }
        // The Gemmas have heads of their own width; the models of the others compute it.
        let is_gemma = matches!(family, Family::Gemma2 | Family::Gemma3);
        let head_dim = match config.integer("head_dim", 1..=MAX_WIDTH)? {
            Some(head_dim) if is_gemma || head_dim * heads == hidden => head_dim,
            Some(head_dim) => {
                return Err(config.unsupported("head_dim", &head_dim, "hidden_size / num_attention_heads"));
            }
            None if is_gemma => return Err(config.invalid("head_dim", &"missing", "the width of a head")),
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let expected = format!("a divisor of `hidden_size` ({hidden})");
                return Err(config.invalid("num_attention_heads", &heads, &expected));
            }
        };
        if head_dim % 2 != 0 || head_dim * heads > MAX_WIDTH as usize {
            return Err(config.invalid("head_dim", &head_dim, "an even number of a size that models have"));
        }
        let mut context = size("max_position_embeddings", MAX_CONTEXT)?;
        // Windows are not computed, but for the one of Gemma 3. Qwen2 has one only where it is switched on.
        if family == Family::Qwen2 {
            if config.boolean("use_sliding_window")? == Some(true) {
                return Err(config.unsupported("use_sliding_window", &true, "false"));
            }
        } else if family != Family::Gemma3
            && let Some(window) = config.integer("sliding_window", 1..=MAX_CONTEXT)?
        {
            context = context.min(window);
        }
        let key = if is_gemma { "hidden_activation" } else { "hidden_act" };
        let activation = match (config.string(key)?, is_gemma) {
            (Some("silu") | None, false) => Activation::Silu,
            (Some("gelu_pytorch_tanh") | None, true) => Activation::GeluPytorchTanh,
            (Some(other), true) => {
                return Err(config.unsupported(key, &format!("`{other}`"), "gelu_pytorch_tanh"));
            }
            (Some(other), false) => return Err(config.unsupported(key, &format!("`{other}`"), "silu")),
        };
        for key in ["attention_bias", "mlp_bias"] {
            if config.boolean(key)? == Some(true) {
                return Err(config.unsupported(key, &true, "false"));
            }
        }
        Ok(Self {
            hidden,
            inner: size("intermediate_size", MAX_WIDTH)?,
            layers: size("num_hidden_layers", MAX_LAYERS)?,
            heads,
            kv_heads,
            head_dim,
            vocab_size: size("vocab_size", MAX_VOCAB)?,
            context,
            eps: f64::from(config.number("rms_norm_eps", 0.0..=1.0)?.unwrap_or(1e-6)),
            activation,
        })
    }
}

/// The rotary base of `kind` of layers; a scaling of it is not computed. transformers 5 states it in `rope_parameters`, with an
/// object for each kind of layers where they differ, and before it stood at the top as `key`.
fn theta(config: &JsonObject, kind: &str, key: &str, default: f64) -> Result<f64> {
    const RANGE: std::ops::RangeInclusive<f32> = 1.0..=1e12;
    let mut theta = config.number(key, RANGE)?;
    for name in ["rope_scaling", "rope_parameters"] {
        let Some(object) = config.object(name)? else { continue };
        let object = if object.value(kind).is_some() { object.object(kind)? } else { Some(object) };
        let Some(object) = object else { continue };
        let scaling = object.string("rope_type")?.or(object.string("type")?).unwrap_or("default");
        if scaling != "default" {
            return Err(object.unsupported("rope_type", &format!("`{scaling}`"), "default"));
        }
        theta = object.number("rope_theta", RANGE)?.or(theta);
    }
    Ok(theta.map_or(default, f64::from))
}

/// Loads a model of `family` for a context of `context` tokens.
pub(super) fn load(
    checkpoint: &RawCheckpoint,
    family: Family,
    facts: Facts,
    context: usize,
    progress: &Progress,
) -> Result<Box<dyn Network>> {
    let config = &checkpoint.config;
    let tied = config.boolean("tie_word_embeddings")?.unwrap_or(!checkpoint.contains("lm_head.weight"));
    let build = builder(config, family, facts, context, tied)?;
    let names = checkpoint.tensors().map(|(name, ..)| name.to_owned());
    // transformers 4 wrote the head beside the embedding that it is.
    let names = names.filter(|name| !(tied && name == "lm_head.weight"));
    let total = checkpoint.tensors().map(|(_, shape, ..)| shape.iter().product::<usize>() as u64).sum();
    let weights = Weights::new(names, total, progress, |name| {
        Ok(checkpoint.dense(name)?.map(|tensor| (tensor.shape.clone(), tensor.to_f32())))
    });
    weights.build(build)
}

type Build = Box<dyn FnOnce(VarBuilder<'_>) -> candle_core::Result<Box<dyn Network>>>;

/// What makes a model of `config` on given weights.
fn builder(config: &JsonObject, family: Family, f: Facts, context: usize, tied: bool) -> Result<Build> {
    Ok(match family {
        Family::Qwen2 => {
            let config = qwen2::Config {
                vocab_size: f.vocab_size,
                hidden_size: f.hidden,
                intermediate_size: f.inner,
                num_hidden_layers: f.layers,
                num_attention_heads: f.heads,
                num_key_value_heads: f.kv_heads,
                max_position_embeddings: context,
                sliding_window: context,
                max_window_layers: f.layers,
                tie_word_embeddings: tied,
                rope_theta: theta(config, "full_attention", "rope_theta", 10_000.0)?,
                rms_norm_eps: f.eps,
                use_sliding_window: false,
                hidden_act: f.activation,
            };
            Box::new(move |weights| Ok(Box::new(qwen2::ModelForCausalLM::new(&config, weights)?)))
        }
        Family::Gemma2 => {
            query_scale(config, f.head_dim)?;
            let config = gemma2::Config {
                attention_bias: false,
                head_dim: f.head_dim,
                hidden_activation: f.activation,
                hidden_size: f.hidden,
                intermediate_size: f.inner,
                num_attention_heads: f.heads,
                num_hidden_layers: f.layers,
                num_key_value_heads: f.kv_heads,
                rms_norm_eps: f.eps,
                rope_theta: theta(config, "full_attention", "rope_theta", 10_000.0)?,
                vocab_size: f.vocab_size,
                final_logit_softcapping: soft_cap(config, "final_logit_softcapping")?,
                attn_logit_softcapping: soft_cap(config, "attn_logit_softcapping")?,
                query_pre_attn_scalar: f.head_dim,
                sliding_window: None,
                max_position_embeddings: context,
            };
            Box::new(move |weights| Ok(Box::new(gemma2::Model::new(false, &config, weights)?)))
        }
        Family::Gemma3 => {
            query_scale(config, f.head_dim)?;
            let window = config.required_integer("sliding_window", 1..=MAX_CONTEXT)?;
            let mut built = gemma3_config(f, context, window, window_pattern(config, f.layers)?);
            built.rope_theta = theta(config, "full_attention", "rope_theta", 1_000_000.0)?;
            built.rope_local_base_freq =
                theta(config, "sliding_attention", "rope_local_base_freq", 10_000.0)?;
            built.final_logit_softcapping = soft_cap(config, "final_logit_softcapping")?;
            built.attn_logit_softcapping = soft_cap(config, "attn_logit_softcapping")?;
            Box::new(move |weights| gemma3_network(&built, weights))
        }
        Family::Phi3 => {
            let config = phi3::Config {
                vocab_size: f.vocab_size,
                hidden_act: f.activation,
                hidden_size: f.hidden,
                intermediate_size: f.inner,
                num_hidden_layers: f.layers,
                num_attention_heads: f.heads,
                num_key_value_heads: f.kv_heads,
                rms_norm_eps: f.eps,
                rope_theta: theta(config, "full_attention", "rope_theta", 10_000.0)?,
                bos_token_id: None,
                eos_token_id: None,
                rope_scaling: None,
                max_position_embeddings: context,
                original_max_position_embeddings: None,
                partial_rotary_factor: partial(config, f.head_dim)?,
                tie_word_embeddings: tied,
            };
            Box::new(move |weights| Ok(Box::new(phi3::Model::new(&config, weights)?)))
        }
    })
}

/// Gemma 3 for `context` tokens, with the values of its 1B model where files may leave them out.
pub(super) fn gemma3_config(f: Facts, context: usize, window: usize, pattern: usize) -> gemma3::Config {
    gemma3::Config {
        attention_bias: false,
        head_dim: f.head_dim,
        hidden_activation: f.activation,
        hidden_size: f.hidden,
        intermediate_size: f.inner,
        num_attention_heads: f.heads,
        num_hidden_layers: f.layers,
        num_key_value_heads: f.kv_heads,
        rms_norm_eps: f.eps,
        rope_theta: 1_000_000.0,
        rope_local_base_freq: 10_000.0,
        vocab_size: f.vocab_size,
        final_logit_softcapping: None,
        attn_logit_softcapping: None,
        query_pre_attn_scalar: f.head_dim,
        sliding_window: window,
        sliding_window_pattern: pattern,
        max_position_embeddings: context,
    }
}

/// Builds it.
pub(super) fn gemma3_network(
    config: &gemma3::Config,
    weights: VarBuilder<'_>,
) -> candle_core::Result<Box<dyn Network>> {
    let model = gemma3::Model::new(false, config, weights)?;
    Ok(Box::new(Gemma3 { model, is_empty: true }))
}

/// candle's models scale queries by the width of a head, which is not what the largest Gemmas do.
fn query_scale(config: &JsonObject, head_dim: usize) -> Result<()> {
    const KEY: &str = "query_pre_attn_scalar";
    match config.integer(KEY, 1..=MAX_WIDTH)? {
        Some(scalar) if scalar != head_dim => {
            Err(config.unsupported(KEY, &scalar, &format!("the width of a head ({head_dim})")))
        }
        _ => Ok(()),
    }
}

fn soft_cap(config: &JsonObject, key: &str) -> Result<Option<f64>> {
    Ok(config.number(key, f32::MIN_POSITIVE..=1e6)?.map(f64::from))
}

/// Every how many layers one attends to all positions: the last of each group does.
fn window_pattern(config: &JsonObject, layers: usize) -> Result<usize> {
    let stated = config.integer("sliding_window_pattern", 1..=MAX_LAYERS)?;
    let stated = stated.or(config.integer("_sliding_window_pattern", 1..=MAX_LAYERS)?).unwrap_or(6);
    let kinds = config.strings("layer_types")?;
    if kinds.is_empty() {
        return Ok(stated);
    }
    let full = |kind: &String| kind == "full_attention";
    let pattern = kinds.iter().position(full).map_or(layers + 1, |first| first + 1);
    let follows = |(i, kind): (usize, &String)| {
        full(kind) == (i + 1).is_multiple_of(pattern) && (full(kind) || kind == "sliding_attention")
    };
    if kinds.len() == layers && kinds.iter().enumerate().all(follows) {
        return Ok(pattern);
    }
    let expected =
        "one kind for each layer, with every n-th `full_attention` and the others `sliding_attention`";
    Err(config.unsupported("layer_types", &format!("{} others", kinds.len()), expected))
}

/// The part of a head that is rotated, where it is not all.
fn partial(config: &JsonObject, head_dim: usize) -> Result<Option<f64>> {
    const KEY: &str = "partial_rotary_factor";
    let inner = config.object("rope_parameters")?.map(|object| object.number(KEY, 0.0..=1.0)).transpose()?;
    let factor = inner.flatten().or(config.number(KEY, 0.0..=1.0)?).map_or(1.0, f64::from);
    let width = (factor * head_dim as f64) as usize;
    if width == 0 || !width.is_multiple_of(2) {
        return Err(Error::unsupported(format!(
            "`{KEY}` is {factor}, expected one that rotates an even part of a head"
        )));
    }
    Ok((width < head_dim).then_some(factor))
}
