//! The graph of the portable variant, which this crate has written.

use ternion_core::{Error, Result};

use super::codes::{self, Blocks};
use super::constants::{Constant, Graph};
use super::{Group, INPUT_NORM_EPS, Part, RMS_EPS, Tensors, check_activation, check_heads, check_rotation};
use crate::onnx::Node;
use crate::onnx::bits::{TERNARY_BYTES, TERNARY_COLUMNS};
use crate::{Activation, DenseTensor, DenseType, ModelSpec};

pub(super) fn read(graph: &Graph<'_>, spec: &ModelSpec, out: &mut Tensors<'_>) -> Result<()> {
    rotation(graph, spec, ["cos_cache", "sin_cache"])?;
    let embedding = if graph.has("embedding") {
        let embedding = graph.constant("embedding")?;
        let dense = embedding.dense()?;
        out.named.insert("model.embed_tokens.weight".to_owned(), embedding.raw()?);
        Some(dense)
    } else {
        let codes = graph.constant("embedding.codes")?;
        grouped(graph, codes, "embedding.scales", &[Part::table("model.embed_tokens", spec)], out)?;
        None
    };
    // Dense weights were widened for their product. They get the type of the embedding where that holds them.
    let narrow = embedding.as_ref().map_or(DenseType::F16, |embedding| embedding.dtype);
    for layer in 0..spec.layers {
        let name = |part: &str| format!("layers.{layer}.{part}");
        for group in Group::all(spec, layer) {
            projections(graph, spec, &name(group.name), &group, narrow, out)?;
        }
        let norms = [("input_norm", "input_layernorm"), ("post_attention_norm", "post_attention_layernorm")];
        let optional = [
            ("attn_sub_norm", "self_attn.attn_sub_norm"),
            ("ffn_sub_norm", "mlp.ffn_sub_norm"),
            ("qkv.q_norm", "self_attn.q_norm"),
            ("qkv.k_norm", "self_attn.k_norm"),
        ];
        let there = optional.into_iter().filter(|(part, _)| graph.find(&name(part)).is_some());
        for (part, module) in norms.into_iter().chain(there) {
            norm(graph, &name(part), &format!("model.layers.{layer}.{module}"), RMS_EPS, out)?;
        }
        let attention = graph.node(&name("attention"))?;
        let heads = [graph.size(attention, "num_heads")?, graph.size(attention, "kv_num_heads")?];
        check_heads(graph, &attention.name, heads, spec)?;
        let is_relu = graph.find(&name("gated.relu")).is_some();
        let activation = if is_relu { Activation::Relu2 } else { Activation::Silu };
        check_activation(graph, &name("gated"), activation, spec)?;
    }
    norm(graph, "final_norm", "model.norm", RMS_EPS, out)?;
    head(graph, spec, embedding.as_ref(), narrow, out)
}

/// Checks the second row of the tables of cosines and sines, which is that of position 1.
pub(super) fn rotation(graph: &Graph<'_>, spec: &ModelSpec, tables: [&str; 2]) -> Result<()> {
    let width = spec.head_dim / 2;
    let frequencies = spec.rope.frequencies(spec.head_dim);
    let (cosines, sines): (Vec<f32>, Vec<f32>) = spec.rope.rotation(&frequencies, 1).unzip();
    for (name, expected) in tables.into_iter().zip([cosines, sines]) {
        let table = graph.constant(name)?;
        let dense = table.dense()?;
        let [positions, found] = dense.shape[..] else {
            return Err(
                table.invalid(format!("the shape is {:?}, expected positions and frequencies", table.dims))
            );
        };
        if positions < 2 || found != width {
            let message = format!("the shape is {:?}, expected two or more rows of {width}", table.dims);
            return Err(table.invalid(message));
        }
        if dense.dtype == DenseType::F32 {
            check_rotation(graph, name, &dense.row(1).to_f32(), &expected)?;
        }
    }
    Ok(())
}

fn norm(graph: &Graph<'_>, name: &str, module: &str, key: &'static str, out: &mut Tensors<'_>) -> Result<()> {
    let node = graph.node(name)?;
    out.norm(module, graph.input(node, 1)?)?;
    out.eps(name, node.float("epsilon"), key)
}

fn projections(
    graph: &Graph<'_>,
    spec: &ModelSpec,
    name: &str,
    group: &Group,
    narrow: DenseType,
    out: &mut Tensors<'_>,
) -> Result<()> {
    let node = graph.node(name)?;
    if node.operator == "Concat" {
        for (i, part) in group.parts.iter().enumerate() {
            let name = format!("{name}.{i}");
            product(graph, graph.node(&name)?, std::slice::from_ref(part), narrow, out)?;
            own_norm(graph, spec, &name, part, out)?;
        }
        return Ok(());
    }
    product(graph, node, &group.parts, narrow, out)?;
    match &group.parts[..] {
        [part] => own_norm(graph, spec, name, part, out),
        _ => Ok(()),
    }
}

/// The norm of one projection's own.
fn own_norm(
    graph: &Graph<'_>,
    spec: &ModelSpec,
    name: &str,
    part: &Part,
    out: &mut Tensors<'_>,
) -> Result<()> {
    let name = format!("{name}.input_norm");
    let has_norms = spec.quantization.as_ref().is_some_and(|q| q.input_norm_eps.is_some());
    if graph.find(&name).is_none() || !has_norms {
        return Ok(());
    }
    norm(graph, &name, &format!("{}.rms_norm", part.module), INPUT_NORM_EPS, out)
}

/// The weights of one product, whose last node this is.
fn product(
    graph: &Graph<'_>,
    node: &Node,
    parts: &[Part],
    narrow: DenseType,
    out: &mut Tensors<'_>,
) -> Result<()> {
    let name = &node.name;
    let codes = |product: &str| {
        let product = graph.node(&format!("{name}.{product}"))?;
        graph.constant(graph.input(product, 1)?)
    };
    match node.operator.as_str() {
        "Mul" => ternary(graph, name, &codes("product")?, parts, out),
        "Add" => grouped(graph, codes("products")?, &format!("{name}.scales"), parts, out),
        "MatMul" => {
            let [part] = parts else {
                return Err(graph.invalid("node", name, "a plain product of several matrices, expected one"));
            };
            let weight = graph.constant(graph.input(node, 1)?)?;
            let dense = transposed(&weight, [part.rows, part.cols], narrow)?;
            out.dense(&part.module, dense);
            Ok(())
        }
        other => {
            let message =
                format!("the operator is `{other}`, expected Mul, Add or MatMul, the end of a product");
            Err(graph.invalid("node", name, message))
        }
    }
}

/// Projections with one scale each, below each other.
fn ternary(
    graph: &Graph<'_>,
    name: &str,
    codes: &Constant,
    parts: &[Part],
    out: &mut Tensors<'_>,
) -> Result<()> {
    let rows: usize = parts.iter().map(|part| part.rows).sum();
    let cols = parts[0].cols;
    codes.check_codes(rows * cols.div_ceil(TERNARY_COLUMNS) * TERNARY_BYTES)?;
    let scales = graph.constant(&format!("{name}.scale"))?;
    let count: usize = scales.dims.iter().product();
    let values = scales.floats(if count == 1 { 1 } else { rows })?;
    let mut first = 0;
    for part in parts {
        out.check_ternary(name, part)?;
        let own = if count == 1 { &values[..] } else { &values[first..first + part.rows] };
        if own.iter().any(|scale| *scale != own[0]) {
            let message = format!("the rows of `{}` have different scales, expected one", part.module);
            return Err(scales.invalid(message));
        }
        out.ternary(part, codes::ternary(codes, first..first + part.rows, cols)?, own[0]);
        first += part.rows;
    }
    Ok(())
}

/// Matrices with a scale for each group, below each other.
fn grouped(
    graph: &Graph<'_>,
    codes: Constant,
    scales: &str,
    parts: &[Part],
    out: &mut Tensors<'_>,
) -> Result<()> {
    let (rows, cols) = (parts.iter().map(|part| part.rows).sum::<usize>(), parts[0].cols);
    let group = match codes.dims[..] {
        [found, groups, bytes]
            if found == rows && bytes.checked_mul(groups).and_then(|n| n.checked_mul(4)) == Some(cols) =>
        {
            4 * bytes
        }
        _ => {
            let message =
                format!("the shape is {:?}, expected {rows} rows of {cols} codes in groups", codes.dims);
            return Err(codes.invalid(message));
        }
    };
    codes.check_codes(rows * cols / 4)?;
    let scales = graph.constant(scales)?.floats(rows * (cols / group.max(1)))?;
    out.blocks(&Blocks { codes: &codes, scales: &scales, zeros: None, group }, parts)
}

/// The head, where it is not the embedding.
fn head(
    graph: &Graph<'_>,
    spec: &ModelSpec,
    embedding: Option<&DenseTensor>,
    narrow: DenseType,
    out: &mut Tensors<'_>,
) -> Result<()> {
    let logits = graph.node("logits")?;
    match logits.operator.as_str() {
        "Add" if graph.has("head.codes") => {
            grouped(graph, graph.constant("head.codes")?, "head.scales", &[Part::table("lm_head", spec)], out)
        }
        "Add" => Ok(()),
        "MatMul" => {
            let weight = graph.constant(graph.input(logits, 1)?)?;
            let head = transposed(&weight, [spec.vocab_size, spec.hidden_size], narrow)?;
            let is_tied = spec.tied && embedding.is_some_and(|embedding| embedding.to_f32() == head.to_f32());
            if !is_tied {
                out.dense("lm_head", head);
            }
            Ok(())
        }
        // Eight bits are a copy for speed. The embedding has the weights themselves, if they are the head's.
        "MatMulNBits" if spec.tied => Ok(()),
        "MatMulNBits" => Err(Error::unsupported(
            "the head has been rounded to 8 bits, and its weights are nowhere else; convert the checkpoint from which this file was \
             written",
        )
        .with("node", "logits")
        .with("file", graph.file().display())),
        other => Err(graph.invalid("node", "logits", format!("the operator is `{other}`, expected a product"))),
    }
}

/// A matrix from its transpose, in `narrow` where that holds all values.
pub(super) fn transposed(
    weight: &Constant,
    [rows, cols]: [usize; 2],
    narrow: DenseType,
) -> Result<DenseTensor> {
    if weight.dims != [cols, rows] {
        return Err(weight.invalid(format!("the shape is {:?}, expected {:?}", weight.dims, [cols, rows])));
    }
    let values = weight.floats(rows * cols)?;
    let at = |row: usize, col: usize| values[col * rows + row];
    let by_rows =
        || (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))).map(|(row, col)| at(row, col));
    let halves = |half: &dyn Fn(f32) -> (u16, f32)| -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(2 * values.len());
        for value in by_rows() {
            let (bits, back) = half(value);
            if back.to_bits() != value.to_bits() {
                return None;
            }
            bytes.extend(bits.to_le_bytes());
        }
        Some(bytes)
    };
    let narrowed = match narrow {
        DenseType::F32 => None,
        DenseType::F16 => halves(&|x| {
            let half = half::f16::from_f32(x);
            (half.to_bits(), half.to_f32())
        }),
        DenseType::Bf16 => halves(&|x| {
            let half = half::bf16::from_f32(x);
            (half.to_bits(), half.to_f32())
        }),
    };
    let (dtype, bytes) = match narrowed {
        Some(bytes) => (narrow, bytes),
        None => (DenseType::F32, by_rows().flat_map(f32::to_le_bytes).collect()),
    };
    Ok(DenseTensor { dtype, shape: vec![rows, cols], bytes: bytes.into() })
}
