//! Exports of others: decoders whose products are `MatMulNBits` with two bits, named as transformers names its modules. onnxruntime-genai
//! and the exporters of transformers.js write `model.layers.0.attn.q_proj.MatMul.weight_Q2` and nodes such as
//! `/model/layers.0/attn/q_proj/MatMul_Q2`.

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]
mod tests;

use ternion_core::{Error, Result};

use super::codes::Blocks;
use super::constants::{Constant, Graph};
use super::portable::{rotation, transposed};
use super::{Group, Part, RMS_EPS, Tensors, check_heads};
use crate::ModelSpec;
use crate::onnx::{Element, Node};

/// Projections that exporters put below each other.
const PACKED: [(&str, &[&str]); 2] =
    [("qkv_proj", &["q_proj", "k_proj", "v_proj"]), ("gate_up_proj", &["gate_proj", "up_proj"])];

/// Whether the head has a name of its own.
pub(super) fn has_head(graph: &Graph<'_>) -> bool {
    graph.names().iter().any(|name| words(name).any(|word| word == "lm_head"))
}

/// The words of a name.
fn words(name: &str) -> impl Iterator<Item = &str> {
    name.split(['/', '.'])
}

/// The layer in a name.
fn layer_of(name: &str) -> Option<usize> {
    let mut words = words(name).skip_while(|word| *word != "layers");
    words.nth(1)?.parse().ok()
}

pub(super) fn read(graph: &Graph<'_>, spec: &ModelSpec, out: &mut Tensors<'_>) -> Result<()> {
    if let Some(bias) = graph.names().into_iter().find(|name| words(name).any(|word| word.contains("bias"))) {
        return Err(graph
            .constant(bias)?
            .unsupported("a bias is not supported, expected projections without"));
    }
    let groups: Vec<Vec<Group>> = (0..spec.layers).map(|layer| Group::all(spec, layer).into()).collect();
    for node in &graph.summary.nodes {
        match node.operator.as_str() {
            "GatherBlockQuantized" => embedding(graph, spec, node, out)?,
            "Gather" => {
                let table = node
                    .input(0)
                    .filter(|name| graph.has(name) && words(name).any(|word| word == "embed_tokens"));
                if let Some(table) = table {
                    out.named.insert("model.embed_tokens.weight".to_owned(), graph.constant(table)?.raw()?);
                }
            }
            "MatMulNBits" | "MatMul" => product(graph, spec, node, &groups, out)?,
            "GroupQueryAttention" => {
                let heads = [graph.size(node, "num_heads")?, graph.size(node, "kv_num_heads")?];
                check_heads(graph, &node.name, heads, spec)?;
                if let (Some(cosines), Some(sines)) = (node.input(7), node.input(8))
                    && graph.has(cosines)
                    && graph.has(sines)
                {
                    rotation(graph, spec, [cosines, sines])?;
                }
            }
            "SimplifiedLayerNormalization" | "SkipSimplifiedLayerNormalization" | "RMSNormalization" => {
                if let Some(eps) = node.float("epsilon") {
                    out.eps(&node.name, Some(eps), RMS_EPS)?;
                }
            }
            _ => {}
        }
    }
    for name in graph.names() {
        if let Some(module) = norm(name) {
            out.norm(&module, name)?;
        }
    }
    Ok(())
}

/// The module of a norm's weight.
fn norm(name: &str) -> Option<String> {
    let has = |word: &str| words(name).any(|found| found == word);
    if !has("weight") {
        return None;
    }
    if has("final_norm_layernorm") || name == "model.norm.weight" {
        return Some("model.norm".to_owned());
    }
    let layer = layer_of(name)?;
    let known = [
        ("input_layernorm", "input_layernorm"),
        ("post_attention_layernorm", "post_attention_layernorm"),
        ("q_norm", "self_attn.q_norm"),
        ("k_norm", "self_attn.k_norm"),
    ];
    let (_, module) = known.into_iter().find(|(word, _)| has(word))?;
    Some(format!("model.layers.{layer}.{module}"))
}

/// A product with constant weights: a projection or the head.
fn product(
    graph: &Graph<'_>,
    spec: &ModelSpec,
    node: &Node,
    groups: &[Vec<Group>],
    out: &mut Tensors<'_>,
) -> Result<()> {
    // A product of two values, and a head that is the embedding, turned.
    let Some(weight) = node.input(1).filter(|name| graph.has(name)) else { return Ok(()) };
    let names = [weight, &node.name];
    let is_head = names.iter().any(|name| words(name).any(|word| word == "lm_head"))
        || node.outputs.iter().any(|name| name == "logits");
    if is_head {
        return weights(graph, node, &[Part::table("lm_head", spec)], out);
    }
    let place = names.iter().find_map(|name| {
        let projection = words(name).find(|word| word.ends_with("_proj"))?;
        Some((groups.get(layer_of(name)?)?, projection))
    });
    let parts = place.map(|(groups, projection)| {
        let packed = PACKED.iter().find(|(name, _)| *name == projection).map(|(_, parts)| *parts);
        let single = [projection];
        let wanted = packed.unwrap_or(&single);
        let all = groups.iter().flat_map(|group| &group.parts);
        all.filter(|part| wanted.iter().any(|name| part.module.ends_with(&format!(".{name}"))))
            .cloned()
            .collect::<Vec<_>>()
    });
    let Some(parts) = parts.filter(|parts| !parts.is_empty()) else {
        let message = format!(
            "neither the product nor its weights `{weight}` are named as a projection of the {} layers, such as layers.0.attn.q_proj",
            spec.layers
        );
        return Err(Error::unsupported(message)
            .with("node", &node.name)
            .with("file", graph.file().display()));
    };
    weights(graph, node, &parts, out)
}

/// The weights of a product, of which the parts are rows below each other.
fn weights(graph: &Graph<'_>, node: &Node, parts: &[Part], out: &mut Tensors<'_>) -> Result<()> {
    let (rows, cols) = (parts.iter().map(|part| part.rows).sum::<usize>(), parts[0].cols);
    let constant = graph.constant(graph.input(node, 1)?)?;
    if node.operator == "MatMul" {
        let [part] = parts else {
            return Err(constant.unsupported("plain weights of several projections, expected those of one"));
        };
        let dense = transposed(&constant, [rows, cols], constant.dense()?.dtype)?;
        out.dense(&part.module, dense);
        return Ok(());
    }
    let attribute = |key: &str, expected: usize| {
        super::check_fact(graph, &node.name, key, [graph.size(node, key)?, expected])
    };
    attribute("N", rows)?;
    attribute("K", cols)?;
    let bits = node.integer("bits").unwrap_or(4);
    if bits != 2 {
        return Err(
            constant.unsupported(format!("weights of {bits} bits, expected 2: others are not ternary"))
        );
    }
    if node.input(4).is_some() || node.input(5).is_some() {
        return Err(constant.unsupported("MatMulNBits with an order of columns or a bias, expected neither"));
    }
    let group = graph.size(node, "block_size")?;
    blocks(graph, constant, [node.input(2), node.input(3)], group, parts, out)
}

/// An embedding in groups.
fn embedding(graph: &Graph<'_>, spec: &ModelSpec, node: &Node, out: &mut Tensors<'_>) -> Result<()> {
    let axis = node.integer("quantize_axis").unwrap_or(1);
    if node.integer("gather_axis").unwrap_or(0) != 0 || !matches!(axis, 1 | -1 | 2) {
        return Err(graph.invalid("node", &node.name, "the axes are not those of a table of rows"));
    }
    let constant = graph.constant(graph.input(node, 0)?)?;
    let group = graph.size(node, "block_size")?;
    blocks(
        graph,
        constant,
        [node.input(2), node.input(3)],
        group,
        &[Part::table("model.embed_tokens", spec)],
        out,
    )
}

/// Matrices in blocks with a scale and perhaps a zero point each.
fn blocks(
    graph: &Graph<'_>,
    codes: Constant,
    [scales, zeros]: [Option<&str>; 2],
    group: usize,
    parts: &[Part],
    out: &mut Tensors<'_>,
) -> Result<()> {
    let (rows, cols) = (parts.iter().map(|part| part.rows).sum::<usize>(), parts[0].cols);
    if !matches!(group, 64 | 128 | 256) || !cols.is_multiple_of(group) {
        let message =
            format!("blocks of {group} of {cols} columns, expected 64, 128 or 256 that divide a row");
        return Err(codes.unsupported(message));
    }
    codes.check_codes(rows * cols / 4)?;
    let of_rows = cols / group;
    let scales =
        scales.ok_or_else(|| codes.invalid("its product has no scales, expected one for each block"))?;
    let scales = graph.constant(scales)?.floats(rows * of_rows)?;
    let zeros = zeros.map(|name| packed(&graph.constant(name)?, rows, of_rows)).transpose()?;
    out.blocks(&Blocks { codes: &codes, scales: &scales, zeros: zeros.as_deref(), group }, parts)
}

/// Zero points of two bits, four to a byte, each row from a byte on.
fn packed(zeros: &Constant, rows: usize, of_rows: usize) -> Result<Vec<u8>> {
    if zeros.element != Element::U8 {
        let message = format!(
            "zero points of {}, expected uint8: others stand for weights that are not ternary",
            zeros.element
        );
        return Err(zeros.unsupported(message));
    }
    let width = of_rows.div_ceil(4);
    zeros.check_codes(rows * width)?;
    let row = |bytes: &[u8]| (0..of_rows).map(|at| bytes[at / 4] >> (2 * (at % 4)) & 3).collect::<Vec<_>>();
    Ok(zeros.bytes.chunks_exact(width).flat_map(row).collect())
}
