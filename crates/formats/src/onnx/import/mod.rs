//! A checkpoint from an ONNX file: one that this crate has written, in either variant, or an export whose products are
//! `MatMulNBits` with two bits.
//!
//! The weights come from the graph's constants and get the names that they have in safetensors; from there on they are read as those
//! are. What a graph does not say is in the files beside it. What both say is compared, so that a `config.json` of another model is
//! an error and not another model.

mod codes;
mod constants;
mod exports;
mod fast;
mod portable;

pub use fast::head as fast_head;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use ::safetensors::Dtype;
use ternion_core::{Error, Result};
use ternion_kernels::GroupedMatrix;

use super::{Host, Summary};
use crate::checkpoint::{Access, Means, Progress};
use crate::config::Signs;
use crate::huggingface::{CONFIG, CONFIG_CAP, Facts};
use crate::json::Object;
use crate::layers::Reader;
use crate::notes::Notes;
use crate::safetensors::RawTensor;
use crate::{
    Activation, Checkpoint, CheckpointOptions, DenseTensor, ModelSpec, Quantization, ScaleUse, SharedBytes,
};
use codes::Blocks;
use constants::Graph;

/// Relative difference of the rotary frequencies in a graph and those of the configuration: more than mathematical libraries differ by.
const FREQUENCIES: f32 = 1e-4;

/// Opens the ONNX file that `path` names, or the one in that folder.
pub(crate) fn open(path: &Path, notes: &mut Notes, progress: &mut Progress<'_>) -> Result<Checkpoint> {
    let host = Host::open(path)?;
    let summary = Summary::read(&host.model)?;
    let graph = Graph::open(&summary)?;
    let config = Object::read(&host.folder.join(CONFIG), CONFIG_CAP)?;
    let variant = Variant::of(&graph)?;
    let Facts { mut spec, sampling } =
        Facts::read(&host.folder, &config, &Signs::of_graph(variant.has_head(&graph)?), notes)?;
    let mut tensors =
        Tensors { graph: &graph, named: BTreeMap::new(), matrices: BTreeMap::new(), eps: Vec::new() };
    variant.check_layers(&graph, &spec)?;
    match variant {
        Variant::Fast => fast::read(&graph, &spec, &mut tensors)?,
        Variant::Portable => portable::read(&graph, &spec, &mut tensors)?,
        Variant::Export => exports::read(&graph, &spec, &mut tensors)?,
    }
    tensors.check_eps(&spec)?;
    if tensors.named.values().any(|tensor| tensor.dtype == Dtype::U8) {
        // The scales in a graph multiply, whatever those do for which the configuration was written.
        let quantization = spec.quantization.get_or_insert_with(|| Quantization {
            scale_use: ScaleUse::Multiplies,
            online: false,
            input_norm_eps: None,
            keep_dense: Vec::new(),
        });
        (quantization.scale_use, quantization.online) = (ScaleUse::Multiplies, false);
    }
    let Tensors { named, matrices, .. } = tensors;
    let file = graph.file();
    let reader =
        Reader::new(&spec, named, &file, notes, Means::of(Access::Mapped), progress).matrices(matrices);
    let parts = reader.read_all()?;
    let mut files = vec![host.model.clone()];
    files.extend(summary.data_files.iter().cloned());
    Ok(Checkpoint {
        name: host.name(),
        spec,
        embed: parts.embed,
        layers: parts.layers,
        final_norm: parts.final_norm,
        head: parts.head,
        sampling,
        format: format!("ONNX ({})", variant.name()),
        files,
        folder: host.folder,
        assumptions: Vec::new(),
        warnings: Vec::new(),
        options: CheckpointOptions::default(),
        gguf: None,
    })
}

/// Who wrote a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    /// This crate, with its own operators.
    Fast,
    /// This crate, with those of the standard and of ONNX Runtime.
    Portable,
    /// Others.
    Export,
}

impl Variant {
    fn of(graph: &Graph<'_>) -> Result<Self> {
        match graph.summary.metadata("ternion.variant") {
            Some("fast") => Ok(Self::Fast),
            Some("portable") => Ok(Self::Portable),
            None => Ok(Self::Export),
            Some(other) => Err(Error::unsupported(format!(
                "is of the variant `{other}`; supported: fast, portable, and exports with MatMulNBits"
            ))
            .with("file", graph.file().display())),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Portable => "portable",
            Self::Export => "MatMulNBits",
        }
    }

    /// Checks that the graph has no more layers than the configuration says. One of fewer lacks tensors.
    fn check_layers(self, graph: &Graph<'_>, spec: &ModelSpec) -> Result<()> {
        let operator = if self == Self::Fast { super::fast::ATTENTION } else { "GroupQueryAttention" };
        let mut attentions = graph.summary.nodes.iter().filter(|node| node.operator == operator);
        let layers = attentions.clone().count();
        match attentions.next_back().filter(|_| layers > spec.layers) {
            Some(last) => check_fact(graph, &last.name, "num_hidden_layers", [layers, spec.layers]),
            None => Ok(()),
        }
    }

    fn has_head(self, graph: &Graph<'_>) -> Result<bool> {
        match self {
            Self::Fast => fast::has_head(graph),
            Self::Portable => Ok(["head.codes", "logits.weight"].iter().any(|name| graph.has(name))),
            Self::Export => Ok(exports::has_head(graph)),
        }
    }
}

/// A projection's place in a product.
#[derive(Clone)]
struct Part {
    /// The module's name in safetensors.
    module: String,
    rows: usize,
    cols: usize,
}

impl Part {
    /// The embedding or the head.
    fn table(module: &str, spec: &ModelSpec) -> Self {
        Self { module: module.to_owned(), rows: spec.vocab_size, cols: spec.hidden_size }
    }
}

/// Projections of one input.
struct Group {
    /// What our graphs call them.
    name: &'static str,
    /// The norm of their input, by its name in safetensors.
    norm: Option<String>,
    parts: Vec<Part>,
}

impl Group {
    /// Those of a layer, in the order in which they are applied.
    fn all(spec: &ModelSpec, layer: usize) -> [Self; 4] {
        let (hidden, inner) = (spec.hidden_size, spec.intermediate_size);
        let (width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let part =
            |name: &str, rows, cols| Part { module: format!("model.layers.{layer}.{name}_proj"), rows, cols };
        let norm = |name: &str| Some(format!("model.layers.{layer}.{name}"));
        let sub_norm = |name: &str| norm(name).filter(|_| spec.sub_norms);
        [
            Self {
                name: "qkv",
                norm: norm("input_layernorm"),
                parts: vec![
                    part("self_attn.q", width, hidden),
                    part("self_attn.k", kv_width, hidden),
                    part("self_attn.v", kv_width, hidden),
                ],
            },
            Self {
                name: "o",
                norm: sub_norm("self_attn.attn_sub_norm"),
                parts: vec![part("self_attn.o", hidden, width)],
            },
            Self {
                name: "gate_up",
                norm: norm("post_attention_layernorm"),
                parts: vec![part("mlp.gate", inner, hidden), part("mlp.up", inner, hidden)],
            },
            Self {
                name: "down",
                norm: sub_norm("mlp.ffn_sub_norm"),
                parts: vec![part("mlp.down", hidden, inner)],
            },
        ]
    }
}

/// The tensors of a checkpoint by their names in safetensors, as they are found.
struct Tensors<'a> {
    graph: &'a Graph<'a>,
    named: BTreeMap<String, RawTensor>,
    matrices: BTreeMap<String, Arc<GroupedMatrix>>,
    /// Epsilons of norms, with the node and the key that says the same.
    eps: Vec<(String, f32, &'static str)>,
}

impl Tensors<'_> {
    /// A norm, by its module's name.
    fn norm(&mut self, module: &str, constant: &str) -> Result<()> {
        let raw = self.graph.constant(constant)?.raw()?;
        self.named.insert(format!("{module}.weight"), raw);
        Ok(())
    }

    /// The epsilon of a norm's node, which the configuration says too.
    fn eps(&mut self, node: &str, eps: Option<f32>, key: &'static str) -> Result<()> {
        let eps =
            eps.ok_or_else(|| self.graph.invalid("node", node, "the norm has no attribute `epsilon`"))?;
        self.eps.push((node.to_owned(), eps, key));
        Ok(())
    }

    fn check_eps(&self, spec: &ModelSpec) -> Result<()> {
        for (node, eps, key) in &self.eps {
            let own = match *key {
                INPUT_NORM_EPS => spec.quantization.as_ref().and_then(|q| q.input_norm_eps),
                _ => Some(spec.rms_eps),
            };
            if own != Some(*eps) {
                let own = own.map_or("nothing".to_owned(), |own| format!("{own:e}"));
                let message =
                    format!("the epsilon of the norm is {eps:e}, but `{key}` in {CONFIG} says {own}");
                return Err(self.graph.invalid("node", node, message));
            }
        }
        Ok(())
    }

    fn insert(&mut self, name: String, dtype: Dtype, shape: Vec<usize>, bytes: impl Into<SharedBytes>) {
        let file = self.graph.file();
        self.named.insert(name, RawTensor { dtype, shape, bytes: bytes.into(), file });
    }

    /// A projection with one scale, its codes in quarters.
    fn ternary(&mut self, part: &Part, codes: SharedBytes, scale: f32) {
        self.insert(format!("{}.weight", part.module), Dtype::U8, vec![part.rows / 4, part.cols], codes);
        let bytes = scale.to_le_bytes().to_vec();
        self.insert(format!("{}.weight_scale", part.module), Dtype::F32, vec![1], bytes);
    }

    /// Checks that a ternary projection can be packed.
    fn check_ternary(&self, node: &str, part: &Part) -> Result<()> {
        if part.rows.is_multiple_of(4) {
            return Ok(());
        }
        let message = format!("the projection has {} rows, expected a multiple of 4", part.rows);
        Err(self.graph.invalid("node", node, message))
    }

    /// The dense weights of a module.
    fn dense(&mut self, module: &str, weights: DenseTensor) {
        let raw = RawTensor::from_dense(weights, self.graph.file());
        self.named.insert(format!("{module}.weight"), raw);
    }

    /// The weights of modules that lie below each other.
    fn blocks(&mut self, blocks: &Blocks<'_>, parts: &[Part]) -> Result<()> {
        let mut first = 0;
        for part in parts {
            self.matrix(&part.module, blocks.matrix(first..first + part.rows, part.cols)?);
            first += part.rows;
        }
        Ok(())
    }

    fn matrix(&mut self, module: &str, matrix: GroupedMatrix) {
        self.matrices.insert(module.to_owned(), Arc::new(matrix));
    }
}

/// The key for the epsilon of most norms.
const RMS_EPS: &str = "rms_norm_eps";
/// The key for that of norms before single projections.
const INPUT_NORM_EPS: &str = "quantization_config.rms_norm_eps";

/// Checks a fact that the graph and the configuration both state.
fn check_fact<T: PartialEq + std::fmt::Display>(
    graph: &Graph<'_>,
    node: &str,
    key: &str,
    [in_graph, in_config]: [T; 2],
) -> Result<()> {
    if in_graph == in_config {
        return Ok(());
    }
    let message =
        format!("`{key}` is {in_graph} in the graph and {in_config} in {CONFIG}, expected the same in both");
    Err(graph.invalid("node", node, message))
}

/// Checks the heads of a node of attention.
fn check_heads(graph: &Graph<'_>, node: &str, [heads, kv_heads]: [usize; 2], spec: &ModelSpec) -> Result<()> {
    check_fact(graph, node, "num_attention_heads", [heads, spec.heads])?;
    check_fact(graph, node, "num_key_value_heads", [kv_heads, spec.kv_heads])
}

fn check_activation(graph: &Graph<'_>, node: &str, found: Activation, spec: &ModelSpec) -> Result<()> {
    check_fact(graph, node, "hidden_act", [found, spec.activation])
}

/// Checks the rotary frequencies `found`, or what was made of them, against `expected`.
fn check_rotation(graph: &Graph<'_>, name: &str, found: &[f32], expected: &[f32]) -> Result<()> {
    let differ = |(a, b): (&f32, &f32)| (a - b).abs() > FREQUENCIES * b.abs().max(FREQUENCIES) || a.is_nan();
    if found.len() == expected.len() && !found.iter().zip(expected).any(differ) {
        return Ok(());
    }
    let message = format!(
        "the rotary embedding is not that of {CONFIG} (rope_theta, rope_scaling, head_dim); expected the configuration of this model"
    );
    Err(graph.invalid("tensor", name, message))
}
