//! The graph of [`fast`](crate::onnx::fast).

use ternion_core::Result;

use super::codes;
use super::constants::Graph;
use super::{
    Group, INPUT_NORM_EPS, Part, RMS_EPS, Tensors, check_activation, check_fact, check_heads, check_rotation,
};
use crate::onnx::fast::{
    ATTENTION, DENSE_LINEAR, DOMAIN, EMBEDDING, GATED_UNIT, GROUPED_EMBEDDING, GROUPED_LINEAR, LAYOUTS,
    LOGITS, RMS_NORM, ROTATIONS, TERNARY_LINEAR, activation_name,
};
use crate::onnx::{Node, Summary};
use crate::{Activation, DenseTensor, ModelSpec};

/// Whether the head is a matrix of its own.
pub(super) fn has_head(graph: &Graph<'_>) -> Result<bool> {
    let (embedded, logits) = (graph.node("embedded")?, graph.node(LOGITS)?);
    let index = if is(logits, GROUPED_LINEAR) { 2 } else { 1 };
    Ok(graph.input(embedded, 1)? != graph.input(logits, index)?)
}

/// The plain weights of the head, `[vocab_size, hidden]`; `None` where they have a scale for each group.
///
/// # Errors
/// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) for a graph whose node of logits is missing or has no such weights.
pub fn head(summary: &Summary) -> Result<Option<DenseTensor>> {
    let graph = Graph::open(summary)?;
    let logits = graph.node(LOGITS)?;
    if !is(logits, DENSE_LINEAR) {
        return Ok(None);
    }
    let weights = graph.constant(graph.input(logits, 1)?)?;
    match weights.dims[..] {
        [_, cols] if cols > 0 => weights.dense().map(Some),
        _ => Err(weights.invalid(format!("the shape is {:?}, expected a matrix", weights.dims))),
    }
}

fn is(node: &Node, operator: &str) -> bool {
    node.domain == DOMAIN && node.operator == operator
}

fn unexpected(graph: &Graph<'_>, node: &Node, expected: &str) -> ternion_core::Error {
    graph.invalid("node", &node.name, format!("the operator is `{}`, expected {expected}", node.operator))
}

pub(super) fn read(graph: &Graph<'_>, spec: &ModelSpec, out: &mut Tensors<'_>) -> Result<()> {
    let rotations = graph.node("rotations")?;
    if !is(rotations, ROTATIONS) {
        return Err(unexpected(graph, rotations, ROTATIONS));
    }
    let frequencies = graph.constant(graph.input(rotations, 1)?)?;
    let found = frequencies.floats(spec.head_dim / 2)?;
    check_rotation(graph, &frequencies.name, &found, &spec.rope.frequencies(spec.head_dim))?;
    let factor = rotations.float("factor").unwrap_or(1.0);
    check_rotation(graph, &frequencies.name, &[factor], &[spec.rope.attention_factor()])?;

    let embedded = graph.node("embedded")?;
    table(graph, spec, embedded, "model.embed_tokens", 1, out)?;
    for layer in 0..spec.layers {
        let name = |part: &str| format!("layers.{layer}.{part}");
        for group in Group::all(spec, layer) {
            projections(graph, spec, &name(group.name), &group, out)?;
        }
        let attention = graph.node(&name("attention"))?;
        if !is(attention, ATTENTION) {
            return Err(unexpected(graph, attention, ATTENTION));
        }
        let size = |key| graph.size(attention, key);
        check_heads(graph, &attention.name, [size("heads")?, size("kv_heads")?], spec)?;
        check_fact(graph, &attention.name, "head_dim", [size("head_dim")?, spec.head_dim])?;
        for (part, input) in [("q_norm", 4), ("k_norm", 5)] {
            if let Some(norm) = attention.input(input) {
                out.norm(&format!("model.layers.{layer}.self_attn.{part}"), norm)?;
                out.eps(&attention.name, attention.float("epsilon"), RMS_EPS)?;
            }
        }
        let gated = graph.node(&name("gated"))?;
        let activation = [Activation::Relu2, Activation::Silu]
            .into_iter()
            .find(|known| is(gated, GATED_UNIT) && gated.text("activation") == Some(activation_name(*known)));
        let activation = activation
            .ok_or_else(|| unexpected(graph, gated, "GatedUnit with the activation relu2 or silu"))?;
        check_activation(graph, &gated.name, activation, spec)?;
    }
    let logits = graph.node(LOGITS)?;
    let norm = if is(logits, GROUPED_LINEAR) { 1 } else { 2 };
    out.norm("model.norm", graph.input(logits, norm)?)?;
    out.eps(&logits.name, logits.float("epsilon"), RMS_EPS)?;
    if has_head(graph)? {
        let first = if is(logits, GROUPED_LINEAR) { 2 } else { 1 };
        table(graph, spec, logits, "lm_head", first, out)?;
    }
    Ok(())
}

/// The embedding or the head, whose tensors are the inputs of a node from `first` on.
fn table(
    graph: &Graph<'_>,
    spec: &ModelSpec,
    node: &Node,
    module: &str,
    first: usize,
    out: &mut Tensors<'_>,
) -> Result<()> {
    let input = |index: usize| {
        let name = node.input(index);
        name.ok_or_else(|| graph.invalid("node", &node.name, format!("input {index} is missing")))
            .and_then(|n| graph.constant(n))
    };
    if is(node, EMBEDDING) || is(node, DENSE_LINEAR) {
        out.named.insert(format!("{module}.weight"), input(first)?.raw()?);
        return Ok(());
    }
    if !is(node, GROUPED_EMBEDDING) && !is(node, GROUPED_LINEAR) {
        return Err(unexpected(graph, node, "a table of ours"));
    }
    let (codes, scales) = (input(first)?, input(first + 1)?);
    let shape = [spec.vocab_size, spec.hidden_size];
    out.matrix(module, codes::grouped(&codes, &scales, graph.size(node, "bits")?, shape)?);
    Ok(())
}

/// The projections of one input, as one node or as several side by side.
fn projections(
    graph: &Graph<'_>,
    spec: &ModelSpec,
    name: &str,
    group: &Group,
    out: &mut Tensors<'_>,
) -> Result<()> {
    let node = graph.node(name)?;
    let mut products = vec![(node, &group.parts[..])];
    if node.domain.is_empty() && node.operator == "Concat" {
        if node.inputs.len() != group.parts.len() {
            let message = format!("{} projections, expected {}", node.inputs.len(), group.parts.len());
            return Err(graph.invalid("node", name, message));
        }
        let parts = node.inputs.iter().zip(group.parts.chunks(1));
        products = parts.map(|(input, part)| Ok((graph.node(input)?, part))).collect::<Result<_>>()?;
    }
    let has_own_norms = spec.quantization.as_ref().is_some_and(|q| q.input_norm_eps.is_some());
    let mut common = false;
    for (node, parts) in &products {
        let norm = match &node.operator {
            operator if operator == TERNARY_LINEAR => node.input(4),
            operator if operator == GROUPED_LINEAR => node.input(1),
            _ => node.input(2),
        };
        if let Some(norm) = norm {
            match (&group.norm, *parts) {
                (_, [part]) if has_own_norms => {
                    out.norm(&format!("{}.rms_norm", part.module), norm)?;
                    out.eps(&node.name, node.float("epsilon"), INPUT_NORM_EPS)?;
                }
                (Some(module), _) => {
                    out.norm(module, norm)?;
                    out.eps(&node.name, node.float("epsilon"), RMS_EPS)?;
                    common = true;
                }
                (None, _) => {
                    let message = "the product normalises its input, which the model of config.json does not";
                    return Err(graph.invalid("node", &node.name, message));
                }
            }
        }
        product(graph, node, parts, out)?;
    }
    // A norm of a node of its own.
    let before = node_before(graph, products[0].0).filter(|node| is(node, RMS_NORM));
    if let (Some(before), Some(module), false) = (before, &group.norm, common) {
        out.norm(module, graph.input(before, 1)?)?;
        out.eps(&before.name, before.float("epsilon"), RMS_EPS)?;
    }
    Ok(())
}

/// The node whose output is the input of this one.
fn node_before<'a>(graph: &Graph<'a>, node: &'a Node) -> Option<&'a Node> {
    graph.find(node.input(0)?)
}

/// The weights of one product.
fn product(graph: &Graph<'_>, node: &Node, parts: &[Part], out: &mut Tensors<'_>) -> Result<()> {
    let input = |index: usize| {
        let name = node.input(index).ok_or_else(|| {
            graph.invalid(
                "node",
                &node.name,
                format!("{} matrices expected, input {index} is missing", parts.len()),
            )
        })?;
        graph.constant(name)
    };
    if is(node, DENSE_LINEAR) {
        let [part] = parts else { return Err(unexpected(graph, node, "a product of several matrices")) };
        out.named.insert(format!("{}.weight", part.module), input(1)?.raw()?);
        return Ok(());
    }
    if is(node, GROUPED_LINEAR) {
        check_fact(graph, &node.name, "matrices", [graph.size(node, "matrices")?, parts.len()])?;
        let bits = graph.size(node, "bits")?;
        for (i, part) in parts.iter().enumerate() {
            let (codes, scales) = (input(2 + 2 * i)?, input(3 + 2 * i)?);
            out.matrix(&part.module, codes::grouped(&codes, &scales, bits, [part.rows, part.cols])?);
        }
        return Ok(());
    }
    if !is(node, TERNARY_LINEAR) {
        return Err(unexpected(graph, node, "a product of ours"));
    }
    let layout = LAYOUTS.iter().find(|(_, name)| node.text("layout") == Some(name));
    let layout =
        layout.ok_or_else(|| unexpected(graph, node, "TernaryLinear with the layout quarters or i2s"))?.0;
    let scales = node.floats("scales");
    check_fact(graph, &node.name, "scales", [scales.len(), parts.len()])?;
    for (i, (part, scale)) in parts.iter().zip(scales).enumerate() {
        out.check_ternary(&node.name, part)?;
        let codes = input(1 + i)?;
        codes.check_codes(part.rows / 4 * part.cols)?;
        if layout == ternion_kernels::TernaryLayout::I2s && !part.cols.is_multiple_of(128) {
            return Err(
                codes.invalid(format!("a row has {} columns, expected a multiple of 128 for i2s", part.cols))
            );
        }
        out.ternary(part, codes::in_quarters(&codes, layout, part.rows, part.cols), *scale);
    }
    Ok(())
}
