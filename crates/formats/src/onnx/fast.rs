//! The fast variant: a graph of a few operators of our own, which read the weights as they lie in the mapped file.
//!
//! Domain [`DOMAIN`], version 1. `T` is the number of tokens of a step, of all its sequences together; floats are f32.
//!
//! | operator | inputs | output | attributes |
//! | --- | --- | --- | --- |
//! | [`EMBEDDING`] | ids `[T]`, table `[vocabulary, width]` | `[T, width]` | |
//! | [`GROUPED_EMBEDDING`] | ids `[T]`, codes, scales | `[T, width]` | `bits` |
//! | [`ROTATIONS`] | positions `[T]`, frequencies `[head_dim / 2]` | `[T, head_dim]`: cosines, then sines | `factor`, which multiplies them |
//! | [`TERNARY_LINEAR`] | x `[T, K]`, codes of one to three matrices, norm `[K]` | `[T, sum of rows]` | `scales`, `layout`, `epsilon` |
//! | [`GROUPED_LINEAR`] | x `[T, K]`, norm `[K]`, codes and scales of one to three matrices | `[T, sum of rows]` | `matrices`, their number; `bits`, `epsilon` |
//! | [`DENSE_LINEAR`] | x `[T, K]`, weights `[N, K]`, norm `[K]` | `[T, N]` | `epsilon` |
//! | [`RMS_NORM`] | x `[T, K]`, norm `[K]` | `[T, K]` | `epsilon` |
//! | [`GATED_UNIT`] | gate and up `[T, 2 F]` | `[T, F]` | `activation`: `relu2` or `silu` |
//! | [`ATTENTION`] | q, k and v `[T, (heads + 2 kv_heads) * head_dim]`, rotations, positions `[T]`, sequences `[T]`, norms of each head of q and of k `[head_dim]` | `[T, heads * head_dim]` | `layer`, `heads`, `kv_heads`, `head_dim`, `epsilon` |
//!
//! A linear operator normalises its input where `norm` is given, then (the ternary one) quantises it once for all of its
//! matrices. Codes are `[rows / 4, K]` bytes in the layout that the checkpoint has them in, `quarters` or `i2s`
//! ([`TernaryLayout`]). Tables and dense weights are f32, f16 or bf16.
//!
//! Matrices with a scale for each group of a row have codes `[rows, K * bits / 8]`, the first column in the lowest bits, and
//! scales `[rows, groups]` in f16 or f32: with two `bits` a weight is its code minus 1, with one twice its code minus 1. How
//! activations are multiplied with them is the runtime's choice, not the file's. Norms and `factor` may be left out.
//!
//! The KV cache is not in the graph: [`ATTENTION`] appends to the cache that the runtime keeps for each of `sequences`, and
//! attends over it. So several sequences are computed in one step, and no past is ever copied.
//!
//! The graph has the inputs [`IDS`], [`POSITIONS`], [`SEQUENCES`] (all `[T]`, int64) and [`ROWS`] (the tokens whose logits
//! are wanted), and the output [`LOGITS`] `[rows, vocabulary]`. The tokens of a sequence follow each other.

use ternion_core::{Error, Result};
use ternion_kernels::{GroupedKind, GroupedMatrix, TernaryLayout};

use super::graph::{Builder, Dim, Operator, onnx};
use super::proto::Attribute;
use super::{Element, bits};
use crate::{Activation, Checkpoint, DenseTensor, Linear, RmsNorm, Table, Weights};

/// The domain of the operators.
pub const DOMAIN: &str = "ai.ternion";
/// Its version.
pub const VERSION: u32 = 1;
/// Rows of a table.
pub const EMBEDDING: &str = "Embedding";
/// Rows of a table with a scale for each group.
pub const GROUPED_EMBEDDING: &str = "GroupedEmbedding";
/// Cosines and sines of the rotary embedding.
pub const ROTATIONS: &str = "Rotations";
/// W1.58A8 products.
pub const TERNARY_LINEAR: &str = "TernaryLinear";
/// Products with weights that have a scale for each group of a row.
pub const GROUPED_LINEAR: &str = "GroupedLinear";
/// Plain products.
pub const DENSE_LINEAR: &str = "DenseLinear";
/// RMS normalisation.
pub const RMS_NORM: &str = "RmsNorm";
/// `activation(gate) * up`.
pub const GATED_UNIT: &str = "GatedUnit";
/// Causal attention over a KV cache of the runtime.
pub const ATTENTION: &str = "CachedAttention";

/// Input: the tokens.
pub const IDS: &str = "input_ids";
/// Input: each token's position in its sequence.
pub const POSITIONS: &str = "position_ids";
/// Input: each token's sequence.
pub const SEQUENCES: &str = "sequence_ids";
/// Input: the tokens whose logits are wanted, by their place in the step.
pub const ROWS: &str = "logits_rows";
/// Output: the logits of those.
pub const LOGITS: &str = "logits";

/// The names by which [`GATED_UNIT`] knows the activations.
pub fn activation_name(activation: Activation) -> &'static str {
    match activation {
        Activation::Relu2 => "relu2",
        Activation::Silu => "silu",
    }
}

/// The names by which [`TERNARY_LINEAR`] knows the layouts of codes.
pub const LAYOUTS: [(TernaryLayout, &str); 2] =
    [(TernaryLayout::Quarters, "quarters"), (TernaryLayout::I2s, "i2s")];

const fn own(name: &str) -> Operator<'_> {
    Operator { domain: DOMAIN, name }
}

/// Builds the graph; `progress` is called after each layer with the bytes that have been written.
pub(super) fn build(checkpoint: &Checkpoint, b: &mut Builder, progress: &mut dyn FnMut(u64)) -> Result<()> {
    let spec = &checkpoint.spec;
    for name in [IDS, POSITIONS, SEQUENCES] {
        b.input(name, Element::I64, &[Dim::Named("tokens")]);
    }
    b.input(ROWS, Element::I64, &[Dim::Named("rows")]);
    b.output(LOGITS, Element::F32, &[Dim::Named("rows"), Dim::Known(spec.vocab_size)]);

    let embedding = MatrixTensors::table(b, "embedding", &checkpoint.embed)?;
    b.floats("frequencies", &[spec.head_dim / 2], &spec.rope.frequencies(spec.head_dim))?;
    let factor = spec.rope.attention_factor();
    // Left out where there is none, so that older versions of this crate read what they can compute.
    let attributes = if factor == 1.0 { Vec::new() } else { vec![Attribute::float("factor", factor)] };
    let rotations = b.node("rotations", own(ROTATIONS), &[POSITIONS, "frequencies"], attributes);
    let mut h = match &embedding {
        MatrixTensors::Dense(table) => b.node("embedded", own(EMBEDDING), &[IDS, table], Vec::new()),
        MatrixTensors::Grouped { codes, scales, bits } => {
            let attributes = vec![Attribute::int("bits", *bits)];
            b.node("embedded", own(GROUPED_EMBEDDING), &[IDS, codes, scales], attributes)
        }
    };
    for (index, layer) in checkpoint.layers.iter().enumerate() {
        let name = |part: &str| format!("layers.{index}.{part}");
        let qkv = projections(b, &name("qkv"), &h, Some(&layer.input_norm), &[&layer.q, &layer.k, &layer.v])?;
        let sizes = [
            ("layer", index),
            ("heads", spec.heads),
            ("kv_heads", spec.kv_heads),
            ("head_dim", spec.head_dim),
        ];
        let mut attributes = sizes.map(|(key, value)| Attribute::int(key, value as i64)).to_vec();
        let mut inputs = vec![qkv, rotations.clone(), POSITIONS.to_owned(), SEQUENCES.to_owned()];
        if let (Some(q), Some(k)) = (&layer.q_norm, &layer.k_norm) {
            if q.eps != k.eps {
                return Err(Error::unsupported("the norms of queries and keys have different epsilons"));
            }
            for (part, norm) in [("q_norm", q), ("k_norm", k)] {
                norm_tensor(b, &name(part), norm)?;
                inputs.push(name(part));
            }
            attributes.push(Attribute::float("epsilon", q.eps));
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let attended = b.node(name("attention"), own(ATTENTION), &inputs, attributes);
        let o = projections(b, &name("o"), &attended, layer.attn_sub_norm.as_ref(), &[&layer.o])?;
        h = b.node(name("attention_residual"), onnx("Add"), &[&h, &o], Vec::new());
        let both = [&layer.gate, &layer.up];
        let gate_up = projections(b, &name("gate_up"), &h, Some(&layer.post_attention_norm), &both)?;
        let activation = Attribute::text("activation", activation_name(spec.activation));
        let gated = b.node(name("gated"), own(GATED_UNIT), &[&gate_up], vec![activation]);
        let down = projections(b, &name("down"), &gated, layer.ffn_sub_norm.as_ref(), &[&layer.down])?;
        h = b.node(name("residual"), onnx("Add"), &[&h, &down], Vec::new());
        progress(b.written());
    }
    let rows = b.node("rows", onnx("Gather"), &[&h, ROWS], vec![Attribute::int("axis", 0)]);
    let head = match &checkpoint.head {
        Some(head) => MatrixTensors::table(b, "head", head)?,
        None => embedding,
    };
    norm_tensor(b, "final_norm", &checkpoint.final_norm)?;
    let epsilon = Attribute::float("epsilon", checkpoint.final_norm.eps);
    match &head {
        MatrixTensors::Dense(head) => {
            b.node(LOGITS, own(DENSE_LINEAR), &[&rows, head, "final_norm"], vec![epsilon]);
        }
        MatrixTensors::Grouped { codes, scales, bits } => {
            let attributes = vec![Attribute::int("matrices", 1), Attribute::int("bits", *bits), epsilon];
            b.node(LOGITS, own(GROUPED_LINEAR), &[&rows, "final_norm", codes, scales], attributes);
        }
    }
    progress(b.written());
    Ok(())
}

/// The tensors of a matrix in the file.
enum MatrixTensors {
    Dense(String),
    Grouped { codes: String, scales: String, bits: i64 },
}

impl MatrixTensors {
    /// Adds an embedding or a head.
    fn table(b: &mut Builder, name: &str, table: &Table) -> Result<Self> {
        match table {
            Table::Dense(dense) => dense_tensor(b, name, dense).map(|()| Self::Dense(name.to_owned())),
            Table::Quantized(_) => unreachable!("invariant: writers are given plain tables"),
            Table::Grouped(matrix) => Self::grouped(b, name, matrix),
        }
    }

    /// Adds a matrix with a scale for each group.
    fn grouped(b: &mut Builder, name: &str, matrix: &GroupedMatrix) -> Result<Self> {
        let (rows, cols, bits) = (matrix.rows(), matrix.cols(), code_bits(matrix));
        let (codes, scales) = (format!("{name}.codes"), format!("{name}.scales"));
        b.tensor(&codes, Element::U8, &[rows, cols * bits as usize / 8], &bits::words(matrix))?;
        let shape = [rows, cols / matrix.group()];
        if matrix.has_f16_scales() {
            let halves = bits::scales(matrix).flat_map(|scale| half::f16::from_f32(scale).to_le_bytes());
            b.tensor(&scales, Element::F16, &shape, &halves.collect::<Vec<u8>>())?;
        } else {
            b.floats(&scales, &shape, &bits::scales(matrix).collect::<Vec<f32>>())?;
        }
        Ok(Self::Grouped { codes, scales, bits })
    }
}

/// Bits of a code.
fn code_bits(matrix: &GroupedMatrix) -> i64 {
    match matrix.kind() {
        GroupedKind::Ternary => 2,
        GroupedKind::Binary => 1,
    }
}

/// Projections of the same input side by side: one node where all are of one kind of ternary weights, else one for each.
fn projections(
    b: &mut Builder,
    name: &str,
    x: &str,
    norm: Option<&RmsNorm>,
    parts: &[&Linear],
) -> Result<String> {
    let layout = |part: &&Linear| match &part.weights {
        Weights::Ternary(t) if part.input_norm.is_none() => Some(t.layout),
        _ => None,
    };
    if layout(&parts[0]).is_some() && parts.iter().all(|part| layout(part) == layout(&parts[0])) {
        return ternary(b, name, x, norm, parts);
    }
    let grouped_as = |part: &&Linear| match &part.weights {
        Weights::Grouped(matrix) if part.input_norm.is_none() => {
            Some((code_bits(matrix), matrix.has_f16_scales()))
        }
        _ => None,
    };
    if grouped_as(&parts[0]).is_some() && parts.iter().all(|part| grouped_as(part) == grouped_as(&parts[0])) {
        return grouped(b, name, x, norm, parts);
    }
    // A norm of one part's own acts on what the common norm has made.
    let normed = match norm {
        Some(norm) => {
            let weight = format!("{name}.norm");
            norm_tensor(b, &weight, norm)?;
            let epsilon = Attribute::float("epsilon", norm.eps);
            b.node(format!("{name}.normed"), own(RMS_NORM), &[x, &weight], vec![epsilon])
        }
        None => x.to_owned(),
    };
    let mut outputs = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let name = if parts.len() == 1 { name.to_owned() } else { format!("{name}.{i}") };
        outputs.push(match &part.weights {
            Weights::Ternary(_) => ternary(b, &name, &normed, part.input_norm.as_ref(), &[part])?,
            Weights::Grouped(_) => grouped(b, &name, &normed, part.input_norm.as_ref(), &[part])?,
            Weights::Dense(dense) => {
                let weights = format!("{name}.weight");
                dense_tensor(b, &weights, dense)?;
                let (norm, attributes) = norm_input(b, &name, part.input_norm.as_ref())?;
                b.node(name, own(DENSE_LINEAR), &[&normed, &weights, &norm], attributes)
            }
        });
    }
    if let [only] = &mut *outputs {
        return Ok(std::mem::take(only));
    }
    let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
    Ok(b.node(name, onnx("Concat"), &outputs, vec![Attribute::int("axis", -1)]))
}

fn ternary(
    b: &mut Builder,
    name: &str,
    x: &str,
    norm: Option<&RmsNorm>,
    parts: &[&Linear],
) -> Result<String> {
    linear(b, name, TERNARY_LINEAR, norm, |b, norm, attributes| {
        let mut inputs = vec![x.to_owned()];
        let (mut scales, mut layout) = (Vec::new(), "");
        for (i, part) in parts.iter().enumerate() {
            let Weights::Ternary(t) = &part.weights else { continue };
            let known = LAYOUTS.iter().find(|(layout, _)| *layout == t.layout);
            layout = known.map(|(_, name)| *name).ok_or_else(|| {
                Error::unsupported(format!("codes in the layout {:?} cannot be written", t.layout))
            })?;
            let codes = format!("{name}.codes.{i}");
            b.tensor(&codes, Element::U8, &[t.rows / 4, t.cols], &t.codes)?;
            inputs.push(codes);
            scales.push(t.scale);
        }
        inputs.resize(4, String::new());
        inputs.push(norm);
        attributes.extend([Attribute::floats("scales", scales), Attribute::text("layout", layout)]);
        Ok(inputs)
    })
}

/// Products with weights that have a scale for each group, with codes and scales of one type.
fn grouped(
    b: &mut Builder,
    name: &str,
    x: &str,
    norm: Option<&RmsNorm>,
    parts: &[&Linear],
) -> Result<String> {
    linear(b, name, GROUPED_LINEAR, norm, |b, norm, attributes| {
        attributes.push(Attribute::int("matrices", parts.len() as i64));
        let mut inputs = vec![x.to_owned(), norm];
        for (i, part) in parts.iter().enumerate() {
            let Weights::Grouped(matrix) = &part.weights else { continue };
            if i == 0 {
                attributes.push(Attribute::int("bits", code_bits(matrix)));
            }
            let tensors = MatrixTensors::grouped(b, &format!("{name}.{i}"), matrix)?;
            if let MatrixTensors::Grouped { codes, scales, .. } = tensors {
                inputs.extend([codes, scales]);
            }
        }
        Ok(inputs)
    })
}

/// The node of a product. `matrices` adds its tensors and attributes, and gives its inputs, the one for the norm among them.
fn linear(
    b: &mut Builder,
    name: &str,
    operator: &str,
    norm: Option<&RmsNorm>,
    matrices: impl FnOnce(&mut Builder, String, &mut Vec<Attribute>) -> Result<Vec<String>>,
) -> Result<String> {
    let (norm, mut attributes) = norm_input(b, name, norm)?;
    let inputs = matrices(b, norm, &mut attributes)?;
    let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
    Ok(b.node(name, own(operator), &inputs, attributes))
}

/// The input for an optional norm and the attribute that goes with it.
fn norm_input(b: &mut Builder, name: &str, norm: Option<&RmsNorm>) -> Result<(String, Vec<Attribute>)> {
    let Some(norm) = norm else { return Ok((String::new(), Vec::new())) };
    let weight = format!("{name}.norm");
    norm_tensor(b, &weight, norm)?;
    Ok((weight, vec![Attribute::float("epsilon", norm.eps)]))
}

fn norm_tensor(b: &mut Builder, name: &str, norm: &RmsNorm) -> Result<()> {
    b.floats(name, &[norm.weight.len()], &norm.weight)
}

fn dense_tensor(b: &mut Builder, name: &str, tensor: &DenseTensor) -> Result<()> {
    b.tensor(name, tensor.dtype.into(), &tensor.shape, &tensor.bytes)
}
