//! Writes checkpoints with random weights: valid in every respect, of any shape, from a seed.
//!
//! Speed and memory do not depend on what the weights say, so a synthetic model of the exact shape measures what the
//! real one would take, without a download. Text does tokenise, but what such a model answers is noise.

mod random;
mod shape;
mod tokenizer;
mod weights;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use ternion_core::{Error, ErrorKind, Result, ResultExt};

pub use shape::{Shape, ShapeFamily};
pub(crate) use tokenizer::CHAT_TEMPLATE;

use crate::checkpoint::Progress;
use crate::unfinished::Unfinished;

/// Writes a checkpoint of this shape, in its family's form, to the folder `dir`, which must not exist or be empty.
///
/// The bytes depend on the shape and the seed alone. The folder appears under its name only when it is complete;
/// `progress` is told the bytes of weights that have been written and their sum.
///
/// # Errors
/// [`InvalidRequest`](ErrorKind::InvalidRequest) where `dir` is in use or the shape is impossible,
/// [`Io`](ErrorKind::Io) where writing fails.
pub fn write(dir: &Path, shape: &Shape, seed: u64, progress: &mut Progress<'_>) -> Result<()> {
    write_folder(dir, shape, seed, progress, false).with_operation("synth")
}

/// [`write()`] in place of the folder that may be there, which stays until the new one is complete.
///
/// # Errors
/// As [`write()`], except that `dir` may be in use.
pub fn replace(dir: &Path, shape: &Shape, seed: u64, progress: &mut Progress<'_>) -> Result<()> {
    write_folder(dir, shape, seed, progress, true).with_operation("synth")
}

fn write_folder(
    dir: &Path,
    shape: &Shape,
    seed: u64,
    progress: &mut Progress<'_>,
    replace: bool,
) -> Result<()> {
    shape.check()?;
    if dir.exists() && !replace {
        // An empty folder may be replaced; `remove_dir` fails on any other.
        fs::remove_dir(dir).map_err(|e| {
            Error::invalid_request("the output exists, expected a new or empty folder")
                .with("path", dir.display())
                .with_source(e)
        })?;
    }
    let unfinished = Unfinished::folder(dir)?;
    let folder = unfinished.path();
    write_json(&folder.join("config.json"), &config(shape))?;
    write_json(&folder.join("generation_config.json"), &generation_config(shape))?;
    write_json(&folder.join("tokenizer.json"), &tokenizer::tokenizer(shape))?;
    write_json(&folder.join("tokenizer_config.json"), &tokenizer::config(shape))?;
    weights::write(&folder.join("model.safetensors"), shape, seed, progress)?;
    unfinished.finish()
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| {
        Error::new(ErrorKind::Io, "cannot be serialised").with("path", path.display()).with_source(e)
    })?;
    text.push(b'\n');
    fs::write(path, text).map_err(|e| Error::io(path, e))
}

/// The keys of the 2B4T's `config.json`, or those of Ternary-Bonsai's.
fn config(shape: &Shape) -> Value {
    if let ShapeFamily::Qwen3 { tied } = shape.family {
        return qwen3(shape, tied);
    }
    json!({
        "architectures": ["BitNetForCausalLM"],
        "bos_token_id": tokenizer::special_id(shape, tokenizer::BOS),
        "eos_token_id": tokenizer::special_id(shape, tokenizer::END_OF_TEXT),
        "hidden_act": "relu2",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.context_length,
        "model_type": "bitnet",
        "rms_norm_eps": 1e-05,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": true,
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "vocab_size": shape.vocab_size,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline"
        }
    })
}

fn qwen3(shape: &Shape, tied: bool) -> Value {
    let quantization = json!({"group_size": shape::GROUP, "bits": 2, "mode": "affine"});
    json!({
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": false,
        "bos_token_id": tokenizer::special_id(shape, tokenizer::BOS),
        "eos_token_id": tokenizer::special_id(shape, tokenizer::END_OF_TEXT),
        "head_dim": shape.head_dim(),
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.context_length,
        "model_type": "qwen3",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "quantization": quantization,
        "quantization_config": quantization,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "factor": 4.0,
            "original_max_position_embeddings": shape.context_length.div_ceil(4),
            "rope_theta": 1_000_000.0,
            "rope_type": "yarn"
        },
        "tie_word_embeddings": tied,
        "use_cache": true,
        "vocab_size": shape.vocab_size
    })
}

fn generation_config(shape: &Shape) -> Value {
    json!({
        "bos_token_id": tokenizer::special_id(shape, tokenizer::BOS),
        "eos_token_id": [
            tokenizer::special_id(shape, tokenizer::END_OF_TEXT),
            tokenizer::special_id(shape, tokenizer::END_OF_TURN)
        ],
        "do_sample": true,
        "temperature": 0.6,
        "max_length": shape.context_length,
        "top_p": 0.9
    })
}
