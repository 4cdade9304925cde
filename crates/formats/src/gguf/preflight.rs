//! What llama.cpp asserts, or does not check at all, looked at before it sees a file: a failed assertion there ends the
//! whole process. The checks are for any architecture; they say nothing about whether llama.cpp implements it.
//!
//! Read in llama.cpp's `llama-model.cpp` (`load_hparams`), `llama-vocab.cpp` (`load`, `tokenize`) and `llama-hparams.cpp`.

use ternion_core::{Error, Result};

mod charsmap;
mod vocabulary;

use super::keys::{self, Keys};
use super::spec::refuse_transformed;
use super::{File, TensorType};
pub use vocabulary::preflight_tokenizer;

/// `LLAMA_MAX_LAYERS` and `LLAMA_MAX_EXPERTS`.
const MAX_LAYERS: u64 = 512;
const MAX_EXPERTS: u64 = 1024;
const MAX_WIDTH: u64 = 1 << 24;
const MAX_CONTEXT: u64 = 1 << 30;

/// Checks a file for llama.cpp, beyond what [`File::open`] has checked. A model in several parts has been
/// [joined](File::joined).
///
/// # Errors
/// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for an element type that llama.cpp does not have, and for weights that are
/// transformed in a way that it does not know,
/// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) for the rest; the message names the key or tensor, what was
/// found and what was expected.
pub fn preflight(file: &File) -> Result<()> {
    texts(file)?;
    refuse_transformed(file)?;
    types(file)?;
    sizes(file)?;
    vocabulary::check(file)
}

/// llama.cpp sees keys and texts up to their first NUL: what stands behind it would be another key or value than is checked here.
fn texts(file: &File) -> Result<()> {
    let has_nul = |text: &str| text.contains('\0');
    match file.metadata().find(|(key, value)| has_nul(key) || value.as_str().is_some_and(has_nul)) {
        None => Ok(()),
        Some((key, _)) => {
            Err(Error::invalid_model("the key or its value has a NUL character, expected none")
                .with("key", crate::json::shorten(&key))
                .with("file", file.path().display()))
        }
    }
}

/// Whether each of the values of a key is within `range`: there may be one for all layers or an array with one for each.
fn per_layer(file: &File, key: &str, layers: u64, range: std::ops::RangeInclusive<u64>) -> Result<Vec<u64>> {
    let expected = || format!("integers from {} to {}, one or {layers} of them", range.start(), range.end());
    let Some(value) = file.value(key) else { return Ok(Vec::new()) };
    let values: Vec<i128> = match value.as_array() {
        None => value.as_integer().into_iter().collect(),
        Some(array) if array.len() as u64 == layers => array.as_integers().into_iter().flatten().collect(),
        Some(_) => Vec::new(),
    };
    let values: Option<Vec<u64>> =
        values.into_iter().map(|n| u64::try_from(n).ok().filter(|n| range.contains(n))).collect();
    values.filter(|values| !values.is_empty()).ok_or_else(|| file.invalid(key, &expected()))
}

fn sizes(file: &File) -> Result<()> {
    let architecture = file.architecture()?;
    let keys = Keys::new(architecture);
    if architecture == "clip" {
        return Err(file.unsupported(keys::ARCHITECTURE, "language models"));
    }
    let layers = file.required_integer(&keys.of("block_count"), 1..=MAX_LAYERS)?;
    file.required_integer(&keys.of("context_length"), 1..=MAX_CONTEXT)?;
    let width = file.required_integer(&keys.of("embedding_length"), 1..=MAX_WIDTH)?;
    file.integer(&keys.of("nextn_predict_layers"), 0..=layers)?;
    experts(file, &keys, layers)?;

    per_layer(file, &keys.of("feed_forward_length"), layers, 0..=MAX_WIDTH)?;
    // 0 heads: a layer (or a model) without attention.
    let head_key = keys.of("attention.head_count");
    let heads = per_layer(file, &head_key, layers, 0..=MAX_WIDTH)?;
    let kv_key = keys.of("attention.head_count_kv");
    let kv_heads = per_layer(file, &kv_key, layers, 0..=MAX_WIDTH)?;
    for layer in 0..layers as usize {
        let of = |list: &[u64]| list.get(layer).or(list.first()).copied();
        let (Some(heads), Some(kv_heads)) = (of(&heads), of(&kv_heads)) else { continue };
        if kv_heads > 0 && heads % kv_heads != 0 {
            return Err(
                file.invalid(&kv_key, &format!("divisors of `{head_key}` ({heads} in layer {layer})"))
            );
        }
    }
    let attends = |layer: usize| {
        ["attn_q", "attn_qkv"].iter().any(|part| file.tensor(&format!("blk.{layer}.{part}.weight")).is_some())
    };
    if let Some(layer) = (0..layers as usize)
        .find(|&layer| heads.get(layer).or(heads.first()).is_none_or(|heads| *heads == 0) && attends(layer))
    {
        return Err(file.invalid(&head_key, &format!("at least 1 for layer {layer}, which has attention")));
    }
    let key_length = file.integer(&keys.of("attention.key_length"), 1..=MAX_WIDTH)?;
    file.integer(&keys.of("attention.value_length"), 1..=MAX_WIDTH)?;
    if let Some(&heads) = heads.first().filter(|heads| **heads > 0)
        && key_length.is_none()
        && width / heads == 0
    {
        return Err(file.invalid(&head_key, &format!("at most `embedding_length` ({width})")));
    }
    file.integer(&keys.of("rope.dimension_count"), 0..=MAX_WIDTH)?;
    let scaling = keys.of("rope.scaling.type");
    if let Some(kind) = file.string(&scaling)?
        && !["none", "linear", "yarn", "longrope"].contains(&kind)
    {
        return Err(file.invalid(&scaling, "none, linear, yarn or longrope"));
    }
    file.number(&keys.of("rope.freq_base"), f32::MIN_POSITIVE..=f32::MAX)?;
    file.number(&keys.of("rope.scaling.factor"), 0.0..=f32::MAX)?;
    Ok(())
}

fn experts(file: &File, keys: &Keys, layers: u64) -> Result<()> {
    let count = file.integer(&keys.of("expert_count"), 0..=MAX_EXPERTS)?.unwrap_or(0);
    let used_key = keys.of("expert_used_count");
    let used = per_layer(file, &used_key, layers, 0..=count)?.into_iter().max().unwrap_or(0);
    let groups_key = keys.of("expert_group_count");
    let groups = file.integer(&groups_key, 0..=count.saturating_sub(1))?.unwrap_or(0);
    if count == 0 {
        return Ok(());
    }
    if used == 0 {
        return Err(file.invalid(&used_key, &format!("from 1 to `expert_count` ({count})")));
    }
    if groups > 1 {
        if count % groups != 0 {
            return Err(file.invalid(&groups_key, &format!("a divisor of `expert_count` ({count})")));
        }
        file.required_integer(&keys.of("expert_group_used_count"), 1..=groups - 1)?;
    }
    Ok(())
}

fn types(file: &File) -> Result<()> {
    for tensor in file.tensors() {
        // Of ggml's types these are no weights: intermediate forms, and integers.
        let error = match tensor.kind {
            TensorType::Foreign(foreign) => foreign.error(),
            kind if kind.is_of_forks() => Error::unsupported(format!(
                "the element type is {kind}, which llama.cpp does not have; the backend `candle` computes with it"
            )),
            kind @ (TensorType::I2S
            | TensorType::Q8_1
            | TensorType::Q8K
            | TensorType::I64
            | TensorType::F64) => {
                Error::unsupported(format!("llama.cpp has no use for the element type {kind}"))
            }
            _ => continue,
        };
        return Err(error.with("tensor", &tensor.name).with("file", file.path().display()));
    }
    Ok(())
}
