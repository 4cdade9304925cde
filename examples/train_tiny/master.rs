//! The trained model as a folder of Hugging Face's form: a BF16 master, like microsoft/bitnet-b1.58-2B-4T-bf16.

use std::error::Error;
use std::fs;
use std::path::Path;

use half::bf16;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::{Value, json};
use ternion::text::{Tokenizer, TokenizerParts};

use super::model::{CONTEXT, Model, Shape, THETA};
use super::ops::with_floats;
use super::text;
use super::tokenizer::{self, Files};

/// Writes the files of a tokenizer of this size, learned from so many documents.
pub(crate) fn tokenizer(
    folder: &Path,
    vocab: usize,
    seed: u64,
    documents: usize,
) -> Result<Tokenizer, Box<dyn Error>> {
    fs::create_dir_all(folder)?;
    let Files { tokenizer, config } = tokenizer::learn(vocab, seed, documents)?;
    write_json(&folder.join("tokenizer.json"), &tokenizer)?;
    write_json(&folder.join("tokenizer_config.json"), &config)?;
    open_tokenizer(folder)
}

/// The tokenizer of a folder.
pub(crate) fn open_tokenizer(folder: &Path) -> Result<Tokenizer, Box<dyn Error>> {
    Ok(Tokenizer::from_parts(TokenizerParts::from_folder(folder)?)?)
}

/// Writes weights and configuration beside the tokenizer.
pub(crate) fn write(folder: &Path, model: &Model, tokenizer: &Tokenizer) -> Result<(), Box<dyn Error>> {
    let id = |token: &str| tokenizer.token_id(token).ok_or_else(|| format!("{token} is no token"));
    let bos = tokenizer.bos_id().ok_or("the tokenizer has no BOS")?;
    let (end_of_text, end_of_turn) = (id(text::END_OF_TEXT)?, id(text::END_OF_TURN)?);
    write_json(&folder.join("config.json"), &config(&model.shape, bos, end_of_text))?;
    let generation = json!({
        "bos_token_id": bos,
        "eos_token_id": [end_of_text, end_of_turn],
        "do_sample": false,
        "max_length": CONTEXT
    });
    write_json(&folder.join("generation_config.json"), &generation)?;
    let mut tensors = Vec::new();
    for parameter in &model.parameters {
        let bytes: Vec<u8> = with_floats(&parameter.value, |values| {
            values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect()
        })?;
        tensors.push((parameter.name.clone(), parameter.value.dims().to_vec(), bytes));
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::BF16, shape.clone(), bytes)?)));
    let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    Ok(serialize_to_file(views, Some(metadata), &folder.join("model.safetensors"))?)
}

fn config(shape: &Shape, bos: u32, eos: u32) -> Value {
    json!({
        "architectures": ["BitNetForCausalLM"],
        "bos_token_id": bos,
        "eos_token_id": eos,
        "hidden_act": "relu2",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": CONTEXT,
        "model_type": "bitnet",
        "rms_norm_eps": 1e-5,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rope_theta": THETA,
        "tie_word_embeddings": true,
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "vocab_size": shape.vocab,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online"
        }
    })
}

fn write_json(path: &Path, value: &Value) -> Result<(), Box<dyn Error>> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    Ok(fs::write(path, text)?)
}
