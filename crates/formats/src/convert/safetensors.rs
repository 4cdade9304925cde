//! Writing a folder as Hugging Face has it: configuration, tokenizer, and packed weights in one safetensors file.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value, json};
use ternion_core::{Error, ErrorKind, Result};

use super::{Options, PIECE, not_written};
use crate::checkpoint::Progress;
use crate::gguf::rows::{codes_of, pack_quarters};
use crate::gguf::{self, TensorType};
use crate::tensors::not_written as no_groups;
use crate::{
    Activation, Checkpoint, DenseTensor, DenseType, Family, Linear, ModelSpec, RmsNorm, RopeScaling,
    TernaryTensor, Weights,
};

const TOKENIZER_FILES: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];
const TEMPLATES: &str = "additional_chat_templates";

struct Planned<'a> {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: usize,
    content: Content<'a>,
}

enum Content<'a> {
    /// A dense tensor, in this type.
    Dense(&'a DenseTensor, DenseType),
    Ternary(&'a TernaryTensor),
    Floats(&'a [f32]),
    Scale(f32),
}

/// Fills the folder.
pub(super) fn write(
    checkpoint: &Checkpoint,
    folder: &Path,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let tensors = plan(checkpoint, options)?;
    beside(checkpoint, folder)?;
    weights(&folder.join("model.safetensors"), &tensors, progress)
}

/// Configuration and tokenizer: what stands beside the weights.
pub(crate) fn beside(checkpoint: &Checkpoint, folder: &Path) -> Result<()> {
    write_json(&folder.join("config.json"), &config(checkpoint)?)?;
    write_json(&folder.join("generation_config.json"), &generation_config(checkpoint))?;
    tokenizer(checkpoint, folder)
}

fn plan<'a>(checkpoint: &'a Checkpoint, options: &Options) -> Result<Vec<Planned<'a>>> {
    let wanted = options.embedding.map(super::Embedding::kind);
    let dtype = match wanted {
        None => None,
        Some(TensorType::F32) => Some(DenseType::F32),
        Some(TensorType::F16) => Some(DenseType::F16),
        Some(TensorType::Bf16) => Some(DenseType::Bf16),
        Some(other) => {
            return Err(Error::invalid_request(format!(
                "safetensors cannot hold an embedding of {other}; expected f32, f16 or bf16"
            )));
        }
    };
    let mut plan = Plan(Vec::new());
    plan.dense("model.embed_tokens.weight".into(), checkpoint.embed.dense()?, dtype);
    for (index, layer) in checkpoint.layers.iter().enumerate() {
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        plan.norm(name("input_layernorm"), Some(&layer.input_norm));
        plan.norm(name("self_attn.attn_sub_norm"), layer.attn_sub_norm.as_ref());
        plan.norm(name("post_attention_layernorm"), Some(&layer.post_attention_norm));
        plan.norm(name("mlp.ffn_sub_norm"), layer.ffn_sub_norm.as_ref());
        for linear in layer.linears() {
            plan.linear(linear)?;
        }
    }
    plan.norm("model.norm.weight".into(), Some(&checkpoint.final_norm));
    if let Some(head) = &checkpoint.head {
        plan.dense("lm_head.weight".into(), head.dense()?, dtype);
    }
    Ok(plan.0)
}

struct Plan<'a>(Vec<Planned<'a>>);

impl<'a> Plan<'a> {
    fn add(
        &mut self,
        name: String,
        dtype: &'static str,
        shape: Vec<usize>,
        bytes: usize,
        content: Content<'a>,
    ) {
        self.0.push(Planned { name, dtype, shape, bytes, content });
    }

    fn dense(&mut self, name: String, tensor: &'a DenseTensor, dtype: Option<DenseType>) {
        let dtype = dtype.unwrap_or(tensor.dtype);
        let bytes = tensor.elements() * dtype.size();
        self.add(name, dtype.name(), tensor.shape.clone(), bytes, Content::Dense(tensor, dtype));
    }

    fn norm(&mut self, name: String, norm: Option<&'a RmsNorm>) {
        if let Some(norm) = norm {
            let width = norm.weight.len();
            self.add(name, "F32", vec![width], 4 * width, Content::Floats(&norm.weight));
        }
    }

    fn linear(&mut self, linear: &'a Linear) -> Result<()> {
        let name = format!("{}.weight", linear.name);
        self.norm(format!("{}.rms_norm.weight", linear.name), linear.input_norm.as_ref());
        match &linear.weights {
            Weights::Dense(tensor) => self.dense(name, tensor, None),
            Weights::Grouped(_) => return Err(no_groups().with("tensor", name)),
            Weights::Ternary(tensor) => {
                if !tensor.rows.is_multiple_of(4) {
                    let message =
                        format!("the projection has {} rows, expected a multiple of 4", tensor.rows);
                    return Err(Error::invalid_model(message).with("tensor", name));
                }
                let scale = format!("{}.weight_scale", linear.name);
                self.add(scale, "F32", vec![1], 4, Content::Scale(tensor.scale));
                let shape = vec![tensor.rows / 4, tensor.cols];
                self.add(name, "U8", shape, tensor.rows / 4 * tensor.cols, Content::Ternary(tensor));
            }
        }
        Ok(())
    }
}

fn weights(path: &Path, tensors: &[Planned<'_>], progress: &mut Progress<'_>) -> Result<()> {
    let io = |e| not_written(path, e);
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut total = 0;
    for tensor in tensors {
        let end = total + tensor.bytes;
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [total, end]});
        header.insert(tensor.name.clone(), entry);
        total = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // So that the data begins at a multiple of 64 bytes, the width of the widest vector load.
    header.resize((header.len() + 8).next_multiple_of(64) - 8, b' ');
    let mut out = BufWriter::new(File::create(path).map_err(io)?);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    out.write_all(&header).map_err(io)?;
    let mut done = 0;
    for tensor in tensors {
        tensor.write(&mut out, path).map_err(|e| e.with("tensor", &tensor.name))?;
        done += tensor.bytes as u64;
        progress(done, total as u64);
    }
    let file = out.into_inner().map_err(|e| io(e.into_error()))?;
    file.sync_all().map_err(io)
}

impl Planned<'_> {
    fn write(&self, out: &mut impl Write, path: &Path) -> Result<()> {
        let io = |e| not_written(path, e);
        match &self.content {
            Content::Scale(scale) => out.write_all(&scale.to_le_bytes()).map_err(io),
            Content::Floats(values) => {
                let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                out.write_all(&bytes).map_err(io)
            }
            Content::Dense(tensor, dtype) if tensor.dtype == *dtype => {
                tensor.bytes.chunks(PIECE).try_for_each(|piece| out.write_all(piece)).map_err(io)
            }
            Content::Dense(tensor, dtype) => {
                let (kind, cols) = (dense_type(*dtype), tensor.shape[1]);
                let mut piece = vec![0; cols * dtype.size() * (PIECE / cols).max(1)];
                let width = cols * dtype.size();
                let step = piece.len() / width;
                for first in (0..tensor.shape[0]).step_by(step) {
                    let piece = &mut piece[..step.min(tensor.shape[0] - first) * width];
                    piece.par_chunks_exact_mut(width).enumerate().try_for_each(|(i, bytes)| {
                        let mut values = vec![0.0; cols];
                        tensor.view().row(first + i, &mut values);
                        gguf::encode(kind, &values, bytes)
                    })?;
                    out.write_all(piece).map_err(io)?;
                }
                Ok(())
            }
            Content::Ternary(tensor) => {
                let packed =
                    pack_quarters(tensor.rows, tensor.cols, |row, codes| codes_of(tensor, row, codes));
                out.write_all(&packed).map_err(io)
            }
        }
    }
}

fn dense_type(dtype: DenseType) -> TensorType {
    match dtype {
        DenseType::F32 => TensorType::F32,
        DenseType::F16 => TensorType::F16,
        DenseType::Bf16 => TensorType::Bf16,
    }
}

/// A `config.json` that says the same as the specification. Scales multiply, whatever they did in the source.
fn config(checkpoint: &Checkpoint) -> Result<Value> {
    let spec = &checkpoint.spec;
    let (model_type, class) = match spec.family {
        Family::BitNet => ("bitnet", "BitNetForCausalLM"),
        Family::OneBitLlm => ("llama", "BitnetForCausalLM"),
        Family::Llama => ("llama", "LlamaForCausalLM"),
        Family::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
    };
    let mut config = json!({
        "architectures": [class],
        "model_type": model_type,
        "hidden_act": match spec.activation { Activation::Relu2 => "relu2", Activation::Silu => "silu" },
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_length,
        "rms_norm_eps": shortest(spec.rms_eps),
        "rope_theta": shortest(spec.rope.theta),
        "rope_scaling": rope_scaling(spec)?,
        "tie_word_embeddings": checkpoint.head.is_none(),
        "bos_token_id": spec.bos,
        "eos_token_id": spec.eos,
        "attention_bias": false,
        "use_cache": true
    });
    if spec.family == Family::OneBitLlm {
        config["weight_bits"] = 1.into();
        config["input_bits"] = 8.into();
    }
    let linears = || checkpoint.layers.iter().flat_map(crate::LayerTensors::linears);
    // A BitNet needs it even if all of its projections are dense: without it they would be read as masters.
    if spec.family.is_bitnet() || linears().any(|linear| matches!(linear.weights, Weights::Ternary(_))) {
        let dense: Vec<&str> = linears()
            .filter(|linear| matches!(linear.weights, Weights::Dense(_)))
            .map(|linear| linear.name.as_str())
            .collect();
        let mut quantization = json!({
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": (!dense.is_empty()).then_some(dense)
        });
        if let Some(eps) = spec.quantization.as_ref().and_then(|q| q.input_norm_eps) {
            quantization["use_rms_norm"] = true.into();
            quantization["rms_norm_eps"] = shortest(eps);
        }
        config["quantization_config"] = quantization;
    }
    Ok(config)
}

fn rope_scaling(spec: &ModelSpec) -> Result<Value> {
    Ok(match &spec.rope.scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": shortest(*factor)}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3",
            "factor": shortest(*factor),
            "low_freq_factor": shortest(*low_freq_factor),
            "high_freq_factor": shortest(*high_freq_factor),
            "original_max_position_embeddings": original_context
        }),
        RopeScaling::Dynamic { factor } => json!({"rope_type": "dynamic", "factor": shortest(*factor)}),
        &RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, attention_factor } => {
            json!({
                "rope_type": "yarn",
                "factor": shortest(factor),
                "original_max_position_embeddings": original_context,
                "beta_fast": shortest(beta_fast),
                "beta_slow": shortest(beta_slow),
                "truncate": truncate,
                "attention_factor": shortest(attention_factor)
            })
        }
        RopeScaling::Factors(_) => {
            return Err(Error::unsupported(
                "config.json cannot describe rotary frequencies with factors of their own; supported: GGUF",
            ));
        }
    })
}

/// A single-precision number with the digits that a person would write: 1e-5 and not 9.999999747378752e-6.
fn shortest(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or_else(|_| json!(x), |x| json!(x))
}

fn generation_config(checkpoint: &Checkpoint) -> Value {
    let sampling = &checkpoint.sampling;
    let mut config = json!({
        "bos_token_id": checkpoint.spec.bos,
        "eos_token_id": checkpoint.spec.eos,
        "do_sample": sampling.temperature != 0.0,
        "repetition_penalty": shortest(sampling.repetition_penalty)
    });
    if sampling.temperature != 0.0 {
        config["temperature"] = shortest(sampling.temperature);
        config["top_k"] = sampling.top_k.into();
        config["top_p"] = shortest(sampling.top_p);
        config["min_p"] = shortest(sampling.min_p);
    }
    config
}

/// The tokenizer's files as they are where the source has them, else made of its parts.
fn tokenizer(checkpoint: &Checkpoint, folder: &Path) -> Result<()> {
    if checkpoint.folder.join(TOKENIZER_FILES[0]).exists() {
        for name in TOKENIZER_FILES {
            let source = checkpoint.folder.join(name);
            if source.exists() {
                let bytes = crate::json::read_capped(&source, 64 << 20)?;
                write_file(&folder.join(name), &bytes)?;
            }
        }
        return templates(&checkpoint.folder.join(TEMPLATES), &folder.join(TEMPLATES));
    }
    let parts = checkpoint.tokenizer_parts()?;
    write_file(&folder.join(TOKENIZER_FILES[0]), &parts.tokenizer_json)?;
    let mut config = Map::new();
    for (name, token) in parts.special_tokens {
        config.insert(name, token.into());
    }
    if let Some(template) = parts.chat_template {
        config.insert("chat_template".into(), template.into());
    }
    config.insert("model_max_length".into(), checkpoint.spec.context_length.into());
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    write_json(&folder.join(TOKENIZER_FILES[1]), &config.into())
}

/// Copies the folder of further chat templates, where there is one.
fn templates(from: &Path, to: &Path) -> Result<()> {
    if !from.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(to).map_err(|e| not_written(to, e))?;
    for entry in fs::read_dir(from).map_err(|e| Error::io(from, e))? {
        let source = entry.map_err(|e| Error::io(from, e))?.path();
        if let (true, Some(name)) = (source.extension().is_some_and(|e| e == "jinja"), source.file_name()) {
            write_file(&to.join(name), &crate::json::read_capped(&source, 4 << 20)?)?;
        }
    }
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| {
        Error::new(ErrorKind::Io, "cannot be serialised").with("path", path.display()).with_source(e)
    })?;
    text.push(b'\n');
    write_file(path, &text)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).and_then(|()| File::open(path)?.sync_all()).map_err(|e| not_written(path, e))
}
