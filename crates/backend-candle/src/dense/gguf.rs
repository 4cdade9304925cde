//! Dense models in GGUF, quantised ones above all: from our reader's metadata and tensors to candle's models.
//!
//! candle gets metadata that is made here of checked values, and tensors whose names, shapes and types are those that the
//! architecture has. A file with anything else, or of which candle's model would compute something wrong, is refused.

use std::{
    collections::{HashMap, HashSet},
    ops::RangeInclusive,
};

use candle_core::{
    Device,
    quantized::{
        GgmlDType,
        gguf_file::{Content, TensorInfo, Value, VersionedMagic},
    },
};
use candle_nn::Activation;
use candle_transformers::models::{quantized_llama, quantized_phi3, quantized_qwen2, quantized_qwen3};
use ternion_core::{Error, Result, registry::Progress};
use ternion_formats::{
    FileWatch,
    gguf::{self, File, TensorType},
};

use super::{
    hub::{Facts, gemma3_config, gemma3_network},
    network::{Network, QuantizedPhi3, QuantizedQwen2, QuantizedQwen3, Reload},
    weights::{TensorReader, Weights},
};

const MAX_WIDTH: u64 = 1 << 20;
const MAX_LAYERS: u64 = 1024;
const MAX_CONTEXT: u64 = 1 << 24;
const MAX_VOCAB: u64 = 1 << 24;
const THETA: RangeInclusive<f32> = 1.0..=1e12;

/// Layers of Gemma 3 27B, whose queries have another scale.
const GEMMA3_27B: usize = 62;

/// An architecture that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
    /// Dequantised: candle's quantised model computes SiLU where Gemma 3 has GELU.
    Gemma3,
    Phi3,
}

impl Architecture {
    pub(super) fn of(name: &str) -> Option<Self> {
        match name {
            "llama" => Some(Self::Llama),
            "qwen2" => Some(Self::Qwen2),
            "qwen3" => Some(Self::Qwen3),
            "gemma3" => Some(Self::Gemma3),
            "phi3" => Some(Self::Phi3),
            _ => None,
        }
    }

    /// Whether Ternion's own decoder computes the architecture too.
    pub(super) fn is_native(self) -> bool {
        matches!(self, Self::Llama | Self::Qwen3)
    }
}

/// A file of which candle's model computes what it means.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) file: File,
    pub(super) facts: Facts,
    architecture: Architecture,
    theta: f32,
    window: usize,
}

/// The type that candle has for a tensor's.
fn dtype(kind: TensorType) -> Option<GgmlDType> {
    Some(match kind {
        TensorType::F32 => GgmlDType::F32,
        TensorType::F16 => GgmlDType::F16,
        TensorType::Bf16 => GgmlDType::BF16,
        TensorType::Q4_0 => GgmlDType::Q4_0,
        TensorType::Q4_1 => GgmlDType::Q4_1,
        TensorType::Q5_0 => GgmlDType::Q5_0,
        TensorType::Q5_1 => GgmlDType::Q5_1,
        TensorType::Q8_0 => GgmlDType::Q8_0,
        TensorType::Q2K => GgmlDType::Q2K,
        TensorType::Q3K => GgmlDType::Q3K,
        TensorType::Q4K => GgmlDType::Q4K,
        TensorType::Q5K => GgmlDType::Q5K,
        TensorType::Q6K => GgmlDType::Q6K,
        _ => return None,
    })
}

impl Model {
    /// Checks that candle computes the model in `file` as it is meant.
    ///
    /// # Errors
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported) where it does not,
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where the file contradicts itself.
    pub(super) fn check(file: File, architecture: Architecture) -> Result<Self> {
        gguf::refuse_transformed(&file)?;
        let name = file.architecture()?.to_owned();
        let key = |key: &str| format!("{name}.{key}");
        let size = |part: &str, most: u64| file.required_integer(&key(part), 1..=most).map(|n| n as usize);
        let stated = |part: &str| file.integer(&key(part), 1..=MAX_WIDTH).map(|n| n.map(|n| n as usize));
        let refuse = |part: &str, needed: &str| {
            let found = file.invalid(&key(part), needed);
            Error::unsupported(format!("{}, which candle's model needs", found.message()))
                .with("file", file.path().display())
        };

        let (hidden, heads) =
            (size("embedding_length", MAX_WIDTH)?, size("attention.head_count", MAX_WIDTH)?);
        let kv_heads = stated("attention.head_count_kv")?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(file.invalid(&key("attention.head_count_kv"), &format!("a divisor of {heads}")));
        }
        let free_heads = matches!(architecture, Architecture::Qwen3 | Architecture::Gemma3);
        let head_dim = match stated("attention.key_length")? {
            Some(width) if free_heads || width * heads == hidden => width,
            Some(_) => return Err(refuse("attention.key_length", "embedding_length / head_count")),
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => return Err(file.invalid(&key("attention.head_count"), &format!("a divisor of {hidden}"))),
        };
        if head_dim % 2 != 0 || head_dim * heads > MAX_WIDTH as usize {
            return Err(
                file.invalid(&key("attention.key_length"), "an even number of a size that models have")
            );
        }
        for part in ["attention.value_length", "rope.dimension_count"] {
            if stated(part)?.is_some_and(|width| width != head_dim) {
                return Err(refuse(part, &format!("the width of a head ({head_dim})")));
            }
        }
        if file.string(&key("rope.scaling.type"))?.is_some_and(|kind| kind != "none") {
            return Err(refuse("rope.scaling.type", "none"));
        }
        if file.integer(&key("expert_count"), 0..=MAX_WIDTH)?.is_some_and(|count| count > 0) {
            return Err(refuse("expert_count", "0"));
        }
        let default_theta = if architecture == Architecture::Gemma3 { 1e6 } else { 1e4 };
        let theta = file.number(&key("rope.freq_base"), THETA)?.unwrap_or(default_theta);
        if architecture == Architecture::Phi3 && theta != 1e4 {
            return Err(refuse("rope.freq_base", "10000"));
        }
        let layers = size("block_count", MAX_LAYERS)?;
        if architecture == Architecture::Gemma3 && layers == GEMMA3_27B {
            return Err(refuse(
                "block_count",
                "another number: the queries of the 27B model have another scale",
            ));
        }
        let vocab_size = match file.integer(&key("vocab_size"), 1..=MAX_VOCAB)? {
            Some(size) => size as usize,
            None => file.tensor("token_embd.weight").and_then(|t| t.dims.get(1)).map_or(0, |n| *n as usize),
        };
        let window = file.integer(&key("attention.sliding_window"), 1..=MAX_CONTEXT)?.map(|n| n as usize);
        let mut context = size("context_length", MAX_CONTEXT)?;
        context = match architecture {
            // The tables of its rotary embedding end there.
            Architecture::Llama => context.min(quantized_llama::MAX_SEQ_LEN),
            Architecture::Phi3 => context.min(window.unwrap_or(context)),
            Architecture::Gemma3 if window.is_none() => {
                return Err(file.invalid(&key("attention.sliding_window"), "the width of the window"));
            }
            _ => context,
        };
        let eps_key = key("attention.layer_norm_rms_epsilon");
        let eps = file.number(&eps_key, 0.0..=1.0)?;
        let eps = f64::from(eps.ok_or_else(|| file.invalid(&eps_key, "a float from 0.0 to 1.0"))?);
        let inner = size("feed_forward_length", MAX_WIDTH)?;
        let activation = match architecture {
            Architecture::Gemma3 => Activation::GeluPytorchTanh,
            _ => Activation::Silu,
        };
        let facts =
            Facts { hidden, inner, layers, heads, kv_heads, head_dim, vocab_size, context, eps, activation };
        let model = Self { file, facts, architecture, theta, window: window.unwrap_or(context) };
        model.check_tensors()?;
        Ok(model)
    }

    /// The names and shapes of all tensors, outermost dimension first.
    fn expected(&self) -> impl Iterator<Item = (String, Vec<usize>)> {
        let Facts { hidden, inner, layers, heads, kv_heads, head_dim, vocab_size, .. } = self.facts;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let mut parts = vec![
            ("attn_norm.weight", vec![hidden]),
            ("ffn_norm.weight", vec![hidden]),
            ("attn_output.weight", vec![hidden, q]),
            ("ffn_down.weight", vec![hidden, inner]),
        ];
        if self.architecture == Architecture::Phi3 {
            parts.push(("attn_qkv.weight", vec![q + 2 * kv, hidden]));
            parts.push(("ffn_up.weight", vec![2 * inner, hidden]));
        } else {
            parts.push(("attn_q.weight", vec![q, hidden]));
            parts.push(("attn_k.weight", vec![kv, hidden]));
            parts.push(("attn_v.weight", vec![kv, hidden]));
            parts.push(("ffn_gate.weight", vec![inner, hidden]));
            parts.push(("ffn_up.weight", vec![inner, hidden]));
        }
        match self.architecture {
            Architecture::Qwen2 => {
                parts.push(("attn_q.bias", vec![q]));
                parts.push(("attn_k.bias", vec![kv]));
                parts.push(("attn_v.bias", vec![kv]));
            }
            Architecture::Qwen3 | Architecture::Gemma3 => {
                parts.push(("attn_q_norm.weight", vec![head_dim]));
                parts.push(("attn_k_norm.weight", vec![head_dim]));
            }
            Architecture::Llama | Architecture::Phi3 => {}
        }
        if self.architecture == Architecture::Gemma3 {
            parts.push(("post_attention_norm.weight", vec![hidden]));
            parts.push(("post_ffw_norm.weight", vec![hidden]));
        }
        let blocks = (0..layers).flat_map(move |layer| {
            parts.clone().into_iter().map(move |(part, shape)| (format!("blk.{layer}.{part}"), shape))
        });
        let table = vec![vocab_size, hidden];
        let has_head = self.architecture == Architecture::Phi3 || self.file.tensor("output.weight").is_some();
        let ends = [("token_embd.weight", table.clone()), ("output_norm.weight", vec![hidden])];
        let ends = ends.into_iter().chain(has_head.then_some(("output.weight", table)));
        ends.map(|(name, shape)| (name.to_owned(), shape)).chain(blocks)
    }

    fn check_tensors(&self) -> Result<()> {
        let wrong = |name: &str, message: String| {
            Error::invalid_model(message).with("tensor", name).with("file", self.file.path().display())
        };
        let mut known = HashSet::new();
        for (name, shape) in self.expected() {
            let tensor =
                self.file.tensor(&name).ok_or_else(|| wrong(&name, "the tensor is missing".to_owned()))?;
            if !tensor.dims.iter().rev().copied().eq(shape.iter().map(|&n| n as u64)) {
                let found: Vec<u64> = tensor.dims.iter().rev().copied().collect();
                return Err(wrong(&name, format!("the shape is {found:?}, expected {shape:?}")));
            }
            if dtype(tensor.kind).is_none() {
                let message = format!("the element type is {}, which candle does not have", tensor.kind);
                return Err(Error::unsupported(message)
                    .with("tensor", &name)
                    .with("file", self.file.path().display()));
            }
            known.insert(name);
        }
        match self.file.tensors().iter().find(|tensor| !known.contains(&tensor.name)) {
            None => Ok(()),
            Some(tensor) => Err(Error::unsupported("candle's model has no place for the tensor")
                .with("tensor", &tensor.name)
                .with("file", self.file.path().display())),
        }
    }

    /// Whether all norms and biases are finite.
    fn check_vectors(&self) -> Result<()> {
        for tensor in self.file.tensors().iter().filter(|tensor| tensor.dims.len() == 1) {
            let mut values = vec![0.0; tensor.dims[0] as usize];
            gguf::decode(tensor.kind, &self.file.data(tensor), &mut values)?;
            if values.iter().any(|value| !value.is_finite()) {
                return Err(Error::invalid_model(
                    "a value is infinite or not a number, expected finite numbers",
                )
                .with("tensor", &tensor.name)
                .with("file", self.file.path().display()));
            }
        }
        Ok(())
    }

    /// The type of the projections, for people.
    pub(super) fn kind(&self) -> String {
        let projection =
            self.file.tensor("blk.0.ffn_down.weight").map_or(TensorType::F32, |tensor| tensor.kind);
        if self.architecture == Architecture::Gemma3 {
            return format!("GGUF ({projection}, decoded at load)");
        }
        format!("GGUF ({projection})")
    }

    /// Bytes that the weights take in memory, but for the embedding, which candle decodes.
    pub(super) fn weight_bytes(&self) -> u64 {
        if self.architecture == Architecture::Gemma3 {
            return 4 * self.parameters();
        }
        let table = 4 * (self.facts.vocab_size * self.facts.hidden) as u64;
        self.file.tensors().iter().map(|tensor| tensor.bytes).sum::<u64>() + table
    }

    pub(super) fn parameters(&self) -> u64 {
        self.file.tensors().iter().map(|tensor| tensor.dims.iter().product::<u64>()).sum()
    }

    /// Loads the model for a context of `context` tokens.
    pub(super) fn load(&self, context: usize, progress: &Progress) -> Result<Box<dyn Network>> {
        if self.architecture == Architecture::Gemma3 {
            return self.load_gemma3(context, progress);
        }
        self.check_vectors()?;
        let mut parts = self.parts(context);
        let device = Device::Cpu;
        let failed = |e| {
            Error::invalid_model("candle cannot build the model")
                .with("file", self.file.path().display())
                .with_source(e)
        };
        let network: candle_core::Result<Box<dyn Network>> = match self.architecture {
            Architecture::Llama => {
                let (content, mut reader) = parts();
                quantized_llama::ModelWeights::from_gguf(content, &mut reader, &device)
                    .map(|m| Box::new(m) as _)
            }
            Architecture::Phi3 => {
                let (content, mut reader) = parts();
                quantized_phi3::ModelWeights::from_gguf(false, content, &mut reader, &device)
                    .map(|model| Box::new(QuantizedPhi3 { empty: model.clone(), model, is_empty: true }) as _)
            }
            Architecture::Qwen3 => {
                let (content, mut reader) = parts();
                quantized_qwen3::ModelWeights::from_gguf(content, &mut reader, &device)
                    .map(|model| Box::new(QuantizedQwen3 { model, decodes: false }) as _)
            }
            Architecture::Qwen2 | Architecture::Gemma3 => {
                let mut watch = FileWatch::open(self.file.paths())?;
                let mut reload: Reload<_> = Box::new(move || {
                    watch.check().map_err(candle_core::Error::wrap)?;
                    let (content, mut reader) = parts();
                    quantized_qwen2::ModelWeights::from_gguf(content, &mut reader, &Device::Cpu)
                });
                reload().map(|model| Box::new(QuantizedQwen2 { model, reload, mask_bytes: 0 }) as _)
            }
        };
        network.map_err(failed)
    }

    /// What makes candle's view of the file, as often as it is needed.
    fn parts(&self, context: usize) -> impl FnMut() -> (Content, TensorReader) + Send + use<> {
        let f = self.facts;
        let name = self.file.architecture().unwrap_or_default().to_owned();
        let (file, theta) = (self.file.clone(), self.theta);
        move || {
            let number = |n: usize| Value::U32(u32::try_from(n).unwrap_or(u32::MAX));
            let values = [
                ("attention.head_count", number(f.heads)),
                ("attention.head_count_kv", number(f.kv_heads)),
                ("attention.key_length", number(f.head_dim)),
                ("attention.layer_norm_rms_epsilon", Value::F32(f.eps as f32)),
                ("block_count", number(f.layers)),
                ("context_length", number(context)),
                ("embedding_length", number(f.hidden)),
                ("feed_forward_length", number(f.inner)),
                ("rope.dimension_count", number(f.head_dim)),
                ("rope.freq_base", Value::F32(theta)),
            ];
            let mut metadata: HashMap<String, Value> =
                values.into_iter().map(|(key, value)| (format!("{name}.{key}"), value)).collect();
            metadata.insert("general.architecture".to_owned(), Value::String(name.clone()));
            // Of rotary angles, which candle else rounds to f16.
            metadata.insert("general.dtype".to_owned(), Value::U32(0));
            let reader = TensorReader::new(file.clone());
            let tensor_infos = reader.tensors().filter_map(|(tensor, offset)| {
                let shape: Vec<usize> = tensor.dims.iter().rev().map(|&n| n as usize).collect();
                let info = TensorInfo { ggml_dtype: dtype(tensor.kind)?, shape: shape.into(), offset };
                Some((tensor.name.clone(), info))
            });
            let tensor_infos = tensor_infos.collect();
            let content =
                Content { magic: VersionedMagic::GgufV3, metadata, tensor_infos, tensor_data_offset: 0 };
            (content, reader)
        }
    }

    /// Gemma 3 by the model for safetensors, with decoded weights.
    fn load_gemma3(&self, context: usize, progress: &Progress) -> Result<Box<dyn Network>> {
        let mut config = gemma3_config(self.facts, context, self.window, 6);
        config.rope_theta = f64::from(self.theta);
        let names: HashMap<String, &str> = self
            .file
            .tensors()
            .iter()
            .map(|tensor| (transformers_name(&tensor.name), &*tensor.name))
            .collect();
        let weights = Weights::new(names.keys().cloned(), self.parameters(), progress, |name| {
            let Some(tensor) = names.get(name).and_then(|name| self.file.tensor(name)) else {
                return Ok(None);
            };
            let shape: Vec<usize> = tensor.dims.iter().rev().map(|&n| n as usize).collect();
            let mut values = vec![0.0; shape.iter().product()];
            gguf::decode(tensor.kind, &self.file.data(tensor), &mut values)?;
            if shape.len() == 1 {
                // The file holds 1 + w of its norms, and candle adds 1 as transformers does.
                for value in &mut values {
                    *value -= 1.0;
                }
            }
            Ok(Some((shape, values)))
        });
        weights
            .build(|weights| gemma3_network(&config, weights))
            .map_err(|e| e.with("file", self.file.path().display()))
    }
}

/// The name that transformers has for a tensor of Gemma 3.
fn transformers_name(name: &str) -> String {
    const PARTS: [(&str, &str); 13] = [
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
        ("attn_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    ];
    match name {
        "token_embd.weight" => return "model.embed_tokens.weight".to_owned(),
        "output_norm.weight" => return "model.norm.weight".to_owned(),
        "output.weight" => return "lm_head.weight".to_owned(),
        _ => {}
    }
    let split = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let known = split.and_then(|(layer, part)| {
        let part = part.strip_suffix(".weight")?;
        let (_, module) = PARTS.iter().find(|(known, _)| *known == part)?;
        Some(format!("model.layers.{layer}.{module}.weight"))
    });
    known.unwrap_or_else(|| name.to_owned())
}
