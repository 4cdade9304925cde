//! Writing a folder as Hugging Face has it: configuration, tokenizer, and packed weights in one safetensors file.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value, json};
use ternion_core::{Error, ErrorKind, Result};
use ternion_kernels::{GroupedKind, GroupedMatrix};

use super::grouped::{Form, Rewrite};
use super::{Options, PIECE, not_written};
use crate::checkpoint::Progress;
use crate::gguf::rows::{codes_of, pack_quarters};
use crate::gguf::{self, TensorType};
use crate::{
    Activation, Checkpoint, DenseTensor, DenseType, Family, LayerTensors, Linear, ModelSpec, RmsNorm,
    RopeScaling, Table, TernaryTensor, Weights,
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
    /// Weights of groups, widened to this type.
    Widened(&'a GroupedMatrix, DenseType),
    /// The words of such, as MLX has them.
    Words(&'a GroupedMatrix, Form),
    /// Their scales times a factor, in this type.
    Scales(&'a GroupedMatrix, Form, f32, DenseType),
}

/// How MLX holds all matrices of a model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mlx {
    form: Form,
    /// The type of scales and biases.
    dtype: DenseType,
}

impl Mlx {
    fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let linears = checkpoint.layers.iter().flat_map(LayerTensors::linears);
        let of_linears = linears.filter_map(|linear| match &linear.weights {
            Weights::Grouped(matrix) => Some(matrix),
            _ => None,
        });
        let tables = [Some(&checkpoint.embed), checkpoint.head.as_ref()].into_iter().flatten();
        let of_tables = tables.filter_map(|table| match table {
            Table::Grouped(matrix) => Some(matrix),
            Table::Dense(_) | Table::Quantized(_) => None,
        });
        let all: Vec<_> = of_linears.chain(of_tables).collect();
        let Some(group) = all.iter().map(|matrix| matrix.group()).min() else {
            return Err(Error::unsupported(
                "the model has no weights with a scale for each group of a row, which MLX's form stands for; supported: \
                 safetensors, gguf-i2s, gguf-tq1, gguf-tq2",
            ));
        };
        let is_binary = all.iter().all(|matrix| matrix.kind() == GroupedKind::Binary);
        let halves = all.iter().all(|matrix| matrix.has_f16_scales());
        let kind = if is_binary { GroupedKind::Binary } else { GroupedKind::Ternary };
        let form = Form { name: "MLX", kind, group: group.min(128), halves };
        Ok(Self { form, dtype: if halves { DenseType::F16 } else { DenseType::F32 } })
    }
}

/// Fills the folder.
pub(super) fn write(
    checkpoint: &Checkpoint,
    folder: &Path,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let mlx = (options.target == super::Target::Mlx).then(|| Mlx::of(checkpoint)).transpose()?;
    let tensors = plan(checkpoint, options, mlx)?;
    beside(checkpoint, mlx, folder)?;
    weights(&folder.join("model.safetensors"), &tensors, progress)
}

/// Configuration and tokenizer: what stands beside the weights.
pub(super) fn beside(checkpoint: &Checkpoint, mlx: Option<Mlx>, folder: &Path) -> Result<()> {
    let mut config = config(checkpoint);
    if let Some(Mlx { form, .. }) = mlx {
        let bits = if form.kind == GroupedKind::Binary { 1 } else { 2 };
        let quantization = json!({"group_size": form.group, "bits": bits, "mode": "affine"});
        config["quantization"] = quantization.clone();
        config["quantization_config"] = quantization;
    }
    write_json(&folder.join("config.json"), &config)?;
    write_json(&folder.join("generation_config.json"), &generation_config(checkpoint))?;
    tokenizer(checkpoint, folder)
}

fn plan<'a>(checkpoint: &'a Checkpoint, options: &Options, mlx: Option<Mlx>) -> Result<Vec<Planned<'a>>> {
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
    let mut plan = Plan { tensors: Vec::new(), mlx };
    plan.table("model.embed_tokens", &checkpoint.embed, dtype);
    for (index, layer) in checkpoint.layers.iter().enumerate() {
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        plan.norm(name("input_layernorm"), Some(&layer.input_norm));
        plan.norm(name("self_attn.q_norm"), layer.q_norm.as_ref());
        plan.norm(name("self_attn.k_norm"), layer.k_norm.as_ref());
        plan.norm(name("self_attn.attn_sub_norm"), layer.attn_sub_norm.as_ref());
        plan.norm(name("post_attention_layernorm"), Some(&layer.post_attention_norm));
        plan.norm(name("mlp.ffn_sub_norm"), layer.ffn_sub_norm.as_ref());
        for linear in layer.linears() {
            plan.linear(linear)?;
        }
    }
    plan.norm("model.norm.weight".into(), Some(&checkpoint.final_norm));
    if let Some(head) = &checkpoint.head {
        plan.table("lm_head", head, dtype);
    }
    Ok(plan.tensors)
}

struct Plan<'a> {
    tensors: Vec<Planned<'a>>,
    mlx: Option<Mlx>,
}

impl<'a> Plan<'a> {
    fn add(
        &mut self,
        name: String,
        dtype: &'static str,
        shape: Vec<usize>,
        bytes: usize,
        content: Content<'a>,
    ) {
        self.tensors.push(Planned { name, dtype, shape, bytes, content });
    }

    fn dense(&mut self, name: String, tensor: &'a DenseTensor, dtype: Option<DenseType>) {
        let dtype = dtype.unwrap_or(tensor.dtype);
        let bytes = tensor.elements() * dtype.size();
        self.add(name, dtype.name(), tensor.shape.clone(), bytes, Content::Dense(tensor, dtype));
    }

    /// An embedding or a head.
    fn table(&mut self, module: &str, table: &'a Table, dtype: Option<DenseType>) {
        match table {
            Table::Dense(tensor) => self.dense(format!("{module}.weight"), tensor, dtype),
            Table::Quantized(_) => unreachable!("invariant: writers are given plain tables"),
            Table::Grouped(matrix) => self.grouped(module, matrix, dtype),
        }
    }

    fn grouped(&mut self, module: &str, matrix: &'a GroupedMatrix, dtype: Option<DenseType>) {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let name = format!("{module}.weight");
        let Some(Mlx { form, dtype: scales }) = self.mlx.filter(|_| dtype.is_none()) else {
            let own = if matrix.has_f16_scales() { DenseType::F16 } else { DenseType::F32 };
            let dtype = dtype.unwrap_or(own);
            let bytes = rows * cols * dtype.size();
            return self.add(name, dtype.name(), vec![rows, cols], bytes, Content::Widened(matrix, dtype));
        };
        let words = cols / form.kind.word();
        self.add(name, "U32", vec![rows, words], rows * words * 4, Content::Words(matrix, form));
        // MLX's weights are scale * code + bias.
        let factor = if form.kind == GroupedKind::Binary { 2.0 } else { 1.0 };
        for (part, factor) in [("scales", factor), ("biases", -1.0)] {
            let groups = cols / form.group;
            let content = Content::Scales(matrix, form, factor, scales);
            let bytes = rows * groups * scales.size();
            self.add(format!("{module}.{part}"), scales.name(), vec![rows, groups], bytes, content);
        }
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
            Weights::Grouped(matrix) => self.grouped(&linear.name, matrix, None),
            Weights::Ternary(_) if self.mlx.is_some() => {
                let message = "the projection has one scale and rounds its input to int8, which MLX's form does not stand for";
                return Err(Error::unsupported(message).with("tensor", name));
            }
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
            Content::Widened(matrix, dtype) => {
                let kind = dense_type(*dtype);
                by_rows(matrix.rows(), matrix.cols() * dtype.size(), out, path, |row, bytes| {
                    let mut values = vec![0.0; matrix.cols()];
                    matrix.row(row, &mut values);
                    gguf::encode(kind, &values, bytes)
                })
            }
            Content::Words(matrix, form) => {
                let rewrite = Rewrite::new(false);
                by_rows(matrix.rows(), matrix.cols() / form.kind.word() * 4, out, path, |row, bytes| {
                    let (words, _) = rewrite.row(matrix, row, *form)?;
                    for (bytes, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
                        *bytes = word.to_le_bytes();
                    }
                    Ok(())
                })
            }
            Content::Scales(matrix, form, factor, dtype) => {
                let (rewrite, kind) = (Rewrite::new(false), dense_type(*dtype));
                by_rows(matrix.rows(), matrix.cols() / form.group * dtype.size(), out, path, |row, bytes| {
                    let (_, scales) = rewrite.row(matrix, row, *form)?;
                    let scales: Vec<f32> = scales.iter().map(|scale| scale * factor).collect();
                    gguf::encode(kind, &scales, bytes)
                })
            }
            Content::Ternary(tensor) => {
                let packed =
                    pack_quarters(tensor.rows, tensor.cols, |row, codes| codes_of(tensor, row, codes));
                out.write_all(&packed).map_err(io)
            }
        }
    }
}

/// Makes rows of `width` bytes on all threads and writes them, a piece at a time.
fn by_rows(
    rows: usize,
    width: usize,
    out: &mut impl Write,
    path: &Path,
    encode: impl Fn(usize, &mut [u8]) -> Result<()> + Sync,
) -> Result<()> {
    let step = (PIECE / width).clamp(1, rows);
    let mut piece = vec![0; step * width];
    for first in (0..rows).step_by(step) {
        let piece = &mut piece[..step.min(rows - first) * width];
        piece.par_chunks_exact_mut(width).enumerate().try_for_each(|(i, bytes)| encode(first + i, bytes))?;
        out.write_all(piece).map_err(|e| not_written(path, e))?;
    }
    Ok(())
}

fn dense_type(dtype: DenseType) -> TensorType {
    match dtype {
        DenseType::F32 => TensorType::F32,
        DenseType::F16 => TensorType::F16,
        DenseType::Bf16 => TensorType::Bf16,
    }
}

/// A `config.json` that says the same as the specification. Scales multiply, whatever they did in the source.
fn config(checkpoint: &Checkpoint) -> Value {
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
        "rope_scaling": rope_scaling(spec),
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
            .filter(|linear| !matches!(linear.weights, Weights::Ternary(_)))
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
    config
}

fn rope_scaling(spec: &ModelSpec) -> Value {
    match &spec.rope.scaling {
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
        // The only type with factors of its own, which has one list up to a length and another beyond. Both are this one.
        RopeScaling::Factors(factors) => {
            let factors: Vec<Value> = factors.iter().map(|factor| shortest(*factor)).collect();
            json!({
                "rope_type": "longrope",
                "factor": 1.0,
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
                "original_max_position_embeddings": spec.context_length
            })
        }
    }
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
