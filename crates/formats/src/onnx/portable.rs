//! The portable variant: operators of the ONNX standard and of ONNX Runtime, inputs and outputs as in exports of Hugging
//! Face models, and W1.58A8 to the last bit.
//!
//! Inputs `input_ids`, `attention_mask`, `position_ids` and `past_key_values.N.key/value` (`[batch, kv_heads, past,
//! head_dim]`), outputs `logits` and `present.N.key/value`. One more input may be left out: `num_logits_to_keep` asks for the
//! logits of the last so many tokens only; 0, which it is when it is not given, for all.
//!
//! # The ternary product
//! `MatMulNBits` holds two bits for a weight, but quantises its input itself, by the largest element of each block of
//! columns. So the graph quantises each token as W1.58A8 asks for, to integers of at most 127, and lays them out in
//! blocks of 127 with the constant 127 behind them. In each block the largest element is then 127, the operator's own scale
//! 1 and its rounding the identity; the constant meets a weight of 0. What comes out is the exact integer product, on a
//! path of the runtime that computes in integers and on one that widens the weights to floats alike: every partial sum
//! is an integer below 2^24.
//!
//! # Weights with a scale for each group of a row
//! `MatMulNBits` has their form, two bits and a scale for each block. Their models do not round activations, but the operator
//! computes with floats only after it has widened all weights, which takes hundreds of times longer than its path in integers (81
//! against 0.2 ms for 6144 by 2048 weights). So the graph writes each token as a sum of three terms, each a multiple of its
//! block's scale by an integer of at most 127: the operator's rounding is the identity on the first and second, and what
//! it takes from the third is 127^-3 of the largest activation, as much as a float rounds. The three are rows of one product,
//! which reads the weights once.
//!
//! An embedding of this kind is looked up by rows of codes, four of which a table of 256 entries widens.
//!
//! # The head
//! As the checkpoint has it where that is in groups, else in single precision, or in 8 bits with a scale for each 32 columns where size and speed matter more than the last
//! percent: it is the largest matrix by far, and not ternary. The embedding stays as it is; only the rows that are used
//! are read.

use ternion_core::{Error, Result};

use super::bits::{self, BYTE_BLOCK, TERNARY_BLOCK, TERNARY_BYTES, TERNARY_COLUMNS};
use super::graph::{Builder, Dim, Operator, onnx};
use super::proto::Attribute;
use super::{Element, Head};
use ternion_kernels::GroupedMatrix;

use crate::{Activation, Checkpoint, DenseTensor, DenseType, Linear, ModelSpec, RmsNorm, Table, Weights};

/// The oldest ONNX Runtime, 1.x, that has `MatMulNBits` for two bits, and `RMSNormalization`.
pub(super) const MINIMUM_RUNTIME: u32 = 24;

/// The revision of the ONNX standard's operators; 23 is the first with `RMSNormalization`.
pub(super) const OPSET: i64 = 23;

const fn microsoft(name: &str) -> Operator<'_> {
    Operator { domain: "com.microsoft", name }
}

/// Builds the graph; `progress` is called after each layer with the bytes that have been written.
pub(super) fn build(
    checkpoint: &Checkpoint,
    head: Head,
    b: &mut Builder,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let spec = &checkpoint.spec;
    if !spec.head_dim.is_multiple_of(16) {
        return Err(Error::unsupported(format!(
            "`head_dim` is {}; the portable variant needs a multiple of 16 (GroupQueryAttention), the fast one does not",
            spec.head_dim
        )));
    }
    let mut decoder = Decoder { b, spec };
    decoder.interface()?;
    decoder.shared()?;
    let mut h = match &checkpoint.embed {
        Table::Dense(table) => decoder.embedding(table)?,
        Table::Quantized(_) => unreachable!("invariant: writers are given plain tables"),
        Table::Grouped(matrix) => decoder.grouped_embedding(matrix)?,
    };
    for (index, layer) in checkpoint.layers.iter().enumerate() {
        let name = |part: &str| format!("layers.{index}.{part}");
        let normed = decoder.norm(&name("input_norm"), &h, &layer.input_norm)?;
        let qkv = decoder.projections(&name("qkv"), &normed, &[&layer.q, &layer.k, &layer.v])?;
        let mut attended = match layer.q_norm.as_ref().zip(layer.k_norm.as_ref()) {
            Some(norms) => {
                let [q, k, v] = decoder.normed_heads(&name("qkv"), &qkv, norms)?;
                decoder.attention(index, [&q, &k, &v])
            }
            None => decoder.attention(index, [&qkv, "", ""]),
        };
        if let Some(norm) = &layer.attn_sub_norm {
            attended = decoder.norm(&name("attn_sub_norm"), &attended, norm)?;
        }
        let o = decoder.projections(&name("o"), &attended, &[&layer.o])?;
        h = decoder.plain(&name("attention_residual"), "Add", &[&h, &o]);
        let normed = decoder.norm(&name("post_attention_norm"), &h, &layer.post_attention_norm)?;
        let gate_up = decoder.projections(&name("gate_up"), &normed, &[&layer.gate, &layer.up])?;
        let mut gated = decoder.gated(&name("gated"), &gate_up);
        if let Some(norm) = &layer.ffn_sub_norm {
            gated = decoder.norm(&name("ffn_sub_norm"), &gated, norm)?;
        }
        let down = decoder.projections(&name("down"), &gated, &[&layer.down])?;
        h = decoder.plain(&name("residual"), "Add", &[&h, &down]);
        progress(decoder.b.written());
    }
    decoder.head(&h, &checkpoint.final_norm, checkpoint.head_or_embed(), head, checkpoint.head.is_none())?;
    progress(decoder.b.written());
    Ok(())
}

struct Decoder<'a> {
    b: &'a mut Builder,
    spec: &'a ModelSpec,
}

impl Decoder<'_> {
    fn interface(&mut self) -> Result<()> {
        let (batch, past) = (|| Dim::Named("batch_size"), || Dim::Named("past_sequence_length"));
        let (new, total) = (|| Dim::Named("sequence_length"), || Dim::Named("total_sequence_length"));
        let (kv_heads, head_dim) = (self.spec.kv_heads, self.spec.head_dim);
        let b = &mut *self.b;
        b.input("input_ids", Element::I64, &[batch(), new()]);
        b.input("attention_mask", Element::I64, &[batch(), total()]);
        b.input("position_ids", Element::I64, &[batch(), new()]);
        b.output(
            "logits",
            Element::F32,
            &[batch(), Dim::Named("logits_length"), Dim::Known(self.spec.vocab_size)],
        );
        for layer in 0..self.spec.layers {
            for part in ["key", "value"] {
                let cache = |length| [batch(), Dim::Known(kv_heads), length, Dim::Known(head_dim)];
                b.input(&format!("past_key_values.{layer}.{part}"), Element::F32, &cache(past()));
                b.output(&format!("present.{layer}.{part}"), Element::F32, &cache(total()));
            }
        }
        // An input with a value: it may be left out.
        b.input("num_logits_to_keep", Element::I64, &[]);
        b.tensor("num_logits_to_keep", Element::I64, &[], &0i64.to_le_bytes())
    }

    /// What all layers use: lengths by the mask, and the rotary embedding's tables.
    fn shared(&mut self) -> Result<()> {
        let spec = self.spec;
        let frequencies = spec.rope.frequencies(spec.head_dim);
        let rotations = |p| spec.rope.rotation(&frequencies, p);
        let shape = [spec.context_length, spec.head_dim / 2];
        let (cosines, sines): (Vec<f32>, Vec<f32>) = (0..spec.context_length).flat_map(rotations).unzip();
        let b = &mut *self.b;
        b.floats("cos_cache", &shape, &cosines)?;
        b.floats("sin_cache", &shape, &sines)?;
        let one = b.integers(&[], &[1])?;
        let axis = b.integers(&[1], &[1])?;
        let to_i32 = || vec![Attribute::int("to", i64::from(Element::I32.number()))];
        let keep = vec![Attribute::int("keepdims", 0)];
        let sum = b.node("mask.sum", onnx("ReduceSum"), &["attention_mask", &axis], keep);
        let last = b.node("mask.last", onnx("Sub"), &[&sum, &one], Vec::new());
        b.node("seqlens_k", onnx("Cast"), &[&last], to_i32());
        let shape = b.node("mask.shape", onnx("Shape"), &["attention_mask"], Vec::new());
        let total = b.node("mask.total", onnx("Gather"), &[&shape, &one], vec![Attribute::int("axis", 0)]);
        b.node("total_sequence_length", onnx("Cast"), &[&total], to_i32());
        Ok(())
    }

    /// A node of the standard without attributes.
    fn plain(&mut self, name: &str, operator: &str, inputs: &[&str]) -> String {
        self.b.node(name, onnx(operator), inputs, Vec::new())
    }

    fn embedding(&mut self, table: &DenseTensor) -> Result<String> {
        self.b.tensor("embedding", table.dtype.into(), &table.shape, &table.bytes)?;
        let axis = vec![Attribute::int("axis", 0)];
        let rows = self.b.node("embedded.rows", onnx("Gather"), &["embedding", "input_ids"], axis);
        if table.dtype == DenseType::F32 {
            return Ok(rows);
        }
        let to = vec![Attribute::int("to", i64::from(Element::F32.number()))];
        Ok(self.b.node("embedded", onnx("Cast"), &[&rows], to))
    }

    fn norm(&mut self, name: &str, x: &str, norm: &RmsNorm) -> Result<String> {
        let weight = format!("{name}.weight");
        self.b.floats(&weight, &[norm.weight.len()], &norm.weight)?;
        let attributes = vec![Attribute::int("axis", -1), Attribute::float("epsilon", norm.eps)];
        Ok(self.b.node(name, onnx("RMSNormalization"), &[x, &weight], attributes))
    }

    /// The table of a token's row of codes, widened.
    fn grouped_embedding(&mut self, matrix: &GroupedMatrix) -> Result<String> {
        let (codes, scales) = self.group_tensors("embedding", &[matrix])?;
        let (cols, group) = (matrix.cols(), matrix.group());
        // The weights of each byte of codes.
        let weights = |byte: u32| (0..4).map(move |i| (byte >> (2 * i) & 3) as f32 - 2.0);
        let widened: Vec<f32> = (0..256).flat_map(weights).collect();
        self.b.floats("embedding.weights_of_byte", &[256, 4], &widened)?;
        let axis = || vec![Attribute::int("axis", 0)];
        let shape = self.b.integers(&[2], &[matrix.rows() as i64, (cols / group) as i64])?;
        let table = self.plain("embedding.scales_of_row", "Reshape", &[&scales, &shape]);
        let rows = self.b.node("embedded.codes", onnx("Gather"), &[&codes, "input_ids"], axis());
        let to = vec![Attribute::int("to", i64::from(Element::I32.number()))];
        let bytes = self.b.node("embedded.bytes", onnx("Cast"), &[&rows], to);
        let inputs = ["embedding.weights_of_byte", &bytes];
        let weights = self.b.node("embedded.weights", onnx("Gather"), &inputs, axis());
        let shape = self.b.integers(&[4], &[0, 0, (cols / group) as i64, group as i64])?;
        let grouped = self.plain("embedded.grouped", "Reshape", &[&weights, &shape]);
        let scales = self.b.node("embedded.scales", onnx("Gather"), &[&table, "input_ids"], axis());
        let last = self.b.integers(&[1], &[-1])?;
        let scales = self.plain("embedded.scales_by_group", "Unsqueeze", &[&scales, &last]);
        let scaled = self.plain("embedded.scaled", "Mul", &[&grouped, &scales]);
        let shape = self.b.integers(&[3], &[0, 0, cols as i64])?;
        Ok(self.plain("embedded", "Reshape", &[&scaled, &shape]))
    }

    /// Takes queries, keys and values apart and normalises each head of the first two.
    fn normed_heads(&mut self, name: &str, qkv: &str, norms: (&RmsNorm, &RmsNorm)) -> Result<[String; 3]> {
        let head_dim = self.spec.head_dim as i64;
        let (width, kv_width) = (self.spec.heads as i64 * head_dim, self.spec.kv_heads as i64 * head_dim);
        let sizes = self.b.integers(&[3], &[width, kv_width, kv_width])?;
        let parts = ["q", "k", "v"].map(|part| format!("{name}.{part}"));
        self.b.node_with_outputs(
            &format!("{name}.split"),
            onnx("Split"),
            &[qkv, &sizes],
            &parts.each_ref().map(String::as_str),
            vec![Attribute::int("axis", -1)],
        );
        let [q, k, v] = parts;
        let heads = self.b.integers(&[4], &[0, 0, -1, head_dim])?;
        let mut normed = |part: &str, norm, width| -> Result<String> {
            let split = self.plain(&format!("{part}.heads"), "Reshape", &[part, &heads]);
            let normed = self.norm(&format!("{part}_norm"), &split, norm)?;
            let shape = self.b.integers(&[3], &[0, 0, width])?;
            Ok(self.plain(&format!("{part}.normed"), "Reshape", &[&normed, &shape]))
        };
        Ok([normed(&q, norms.0, width)?, normed(&k, norms.1, kv_width)?, v])
    }

    /// Rotates queries and keys, appends to the cache, attends. Keys and values are left out where they stand behind the queries.
    fn attention(&mut self, layer: usize, [q, k, v]: [&str; 3]) -> String {
        let spec = self.spec;
        let cache = |side: &str, part: &str| format!("{side}.{layer}.{part}");
        let name = format!("layers.{layer}.attention");
        let (key, value) = (cache("past_key_values", "key"), cache("past_key_values", "value"));
        let outputs = [name.clone(), cache("present", "key"), cache("present", "value")];
        self.b.node_with_outputs(
            &name,
            microsoft("GroupQueryAttention"),
            &[
                q,
                k,
                v,
                &key,
                &value,
                "seqlens_k",
                "total_sequence_length",
                "cos_cache",
                "sin_cache",
                "position_ids",
            ],
            &outputs.each_ref().map(String::as_str),
            vec![
                Attribute::int("num_heads", spec.heads as i64),
                Attribute::int("kv_num_heads", spec.kv_heads as i64),
                Attribute::int("do_rotary", 1),
                Attribute::float("scale", 1.0 / (spec.head_dim as f32).sqrt()),
            ],
        );
        name
    }

    fn gated(&mut self, name: &str, gate_up: &str) -> String {
        let (gate, up) = (format!("{name}.gate"), format!("{name}.up"));
        self.b.node_with_outputs(
            &format!("{name}.split"),
            onnx("Split"),
            &[gate_up],
            &[&gate, &up],
            vec![Attribute::int("axis", -1), Attribute::int("num_outputs", 2)],
        );
        let activated = match self.spec.activation {
            Activation::Relu2 => {
                let relu = self.plain(&format!("{name}.relu"), "Relu", &[&gate]);
                self.plain(&format!("{name}.relu2"), "Mul", &[&relu, &relu])
            }
            Activation::Silu => {
                let sigmoid = self.plain(&format!("{name}.sigmoid"), "Sigmoid", &[&gate]);
                self.plain(&format!("{name}.silu"), "Mul", &[&gate, &sigmoid])
            }
        };
        self.plain(name, "Mul", &[&activated, &up])
    }

    /// Projections of the same input side by side; neighbours that are ternary are one product.
    fn projections(&mut self, name: &str, x: &str, parts: &[&Linear]) -> Result<String> {
        if parts.iter().all(|p| p.input_norm.is_none() && matches!(p.weights, Weights::Ternary(_))) {
            return self.ternary(name, x, parts);
        }
        let group = |part: &&Linear| match &part.weights {
            Weights::Grouped(matrix) if part.input_norm.is_none() => Some(matrix.group()),
            _ => None,
        };
        if group(&parts[0]).is_some() && parts.iter().all(|part| group(part) == group(&parts[0])) {
            return self.grouped(name, x, parts);
        }
        let mut outputs = Vec::with_capacity(parts.len());
        for (i, part) in parts.iter().enumerate() {
            let name = if parts.len() == 1 { name.to_owned() } else { format!("{name}.{i}") };
            let normed = match &part.input_norm {
                Some(norm) => self.norm(&format!("{name}.input_norm"), x, norm)?,
                None => x.to_owned(),
            };
            outputs.push(match &part.weights {
                Weights::Ternary(_) => self.ternary(&name, &normed, &[part])?,
                Weights::Dense(dense) => self.dense(&name, &normed, dense)?,
                Weights::Grouped(_) => self.grouped(&name, &normed, &[part])?,
            });
        }
        if let [only] = &mut *outputs {
            return Ok(std::mem::take(only));
        }
        let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
        Ok(self.b.node(name, onnx("Concat"), &outputs, vec![Attribute::int("axis", -1)]))
    }

    /// `x @ W^T` in floats.
    fn dense(&mut self, name: &str, x: &str, weights: &DenseTensor) -> Result<String> {
        let (rows, cols) = (weights.shape[0], weights.shape[1]);
        let values = weights.to_f32();
        let mut transposed = vec![0.0; values.len()];
        for (row, values) in values.chunks_exact(cols).enumerate() {
            for (col, value) in values.iter().enumerate() {
                transposed[col * rows + row] = *value;
            }
        }
        let weight = format!("{name}.weight");
        self.b.floats(&weight, &[cols, rows], &transposed)?;
        Ok(self.plain(name, "MatMul", &[x, &weight]))
    }

    /// The exact product of W1.58A8; see the module's comment.
    fn ternary(&mut self, name: &str, x: &str, parts: &[&Linear]) -> Result<String> {
        let cols = parts[0].cols();
        let blocks = cols.div_ceil(TERNARY_COLUMNS);
        let rows: usize = parts.iter().map(|part| part.rows()).sum();
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for part in parts {
            let Weights::Ternary(t) = &part.weights else { continue };
            let view = t
                .view()
                .map_err(|e| Error::invalid_model("the codes do not fit the shape").with_source(e))?;
            bits::append_ternary(t, &ternion_kernels::unpack(view), &mut codes);
            scales.resize(scales.len() + t.rows, t.scale);
        }
        let weight = format!("{name}.codes");
        self.b.tensor(&weight, Element::U8, &[rows, blocks, TERNARY_BYTES], &codes)?;
        let ones = self.ones(rows * blocks)?;
        let scale = format!("{name}.scale");
        if scales.iter().all(|s| *s == scales[0]) {
            scales.truncate(1);
        }
        self.b.floats(&scale, &[scales.len()], &scales)?;

        let part = |part: &str| format!("{name}.{part}");
        let (integers, factor) = self.quantised(name, x, cols)?;
        let product = self.b.node(
            part("product"),
            microsoft("MatMulNBits"),
            &[&integers, &weight, &ones],
            vec![
                Attribute::int("K", (blocks * TERNARY_BLOCK) as i64),
                Attribute::int("N", rows as i64),
                Attribute::int("bits", 2),
                Attribute::int("block_size", TERNARY_BLOCK as i64),
                Attribute::int("accuracy_level", 4),
            ],
        );
        let factor = self.plain(&part("factor"), "Div", &[&scale, &factor]);
        Ok(self.plain(name, "Mul", &[&product, &factor]))
    }

    /// `x @ W^T` with weights in groups of one width; see the module's comment.
    fn grouped(&mut self, name: &str, x: &str, parts: &[&Linear]) -> Result<String> {
        let matrices = parts.iter().filter_map(|part| match &part.weights {
            Weights::Grouped(matrix) => Some(&**matrix),
            _ => None,
        });
        let matrices: Vec<&GroupedMatrix> = matrices.collect();
        let tensors = self.group_tensors(name, &matrices)?;
        self.grouped_product(name, x, &matrices, (&tensors.0, &tensors.1))
    }

    /// The codes `[rows, groups, bytes]` and scales of matrices with groups of one width, below each other.
    fn group_tensors(&mut self, name: &str, matrices: &[&GroupedMatrix]) -> Result<(String, String)> {
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for matrix in matrices {
            bits::append_grouped(matrix, &mut codes);
            scales.extend(bits::scales(matrix));
        }
        let (cols, group) = (matrices[0].cols(), matrices[0].group());
        let rows: usize = matrices.iter().map(|matrix| matrix.rows()).sum();
        let names = (format!("{name}.codes"), format!("{name}.scales"));
        self.b.tensor(&names.0, Element::U8, &[rows, cols / group, group / 4], &codes)?;
        self.b.floats(&names.1, &[scales.len()], &scales)?;
        Ok(names)
    }

    fn grouped_product(
        &mut self,
        name: &str,
        x: &str,
        matrices: &[&GroupedMatrix],
        (codes, scales): (&str, &str),
    ) -> Result<String> {
        let (cols, group) = (matrices[0].cols(), matrices[0].group());
        let rows: usize = matrices.iter().map(|matrix| matrix.rows()).sum();
        let part = |part: &str| format!("{name}.{part}");
        let first = self.on_grid(&part("first"), x, cols, group)?;
        let rest = self.plain(&part("first.rest"), "Sub", &[x, &first]);
        let second = self.on_grid(&part("second"), &rest, cols, group)?;
        let third = self.plain(&part("third"), "Sub", &[&rest, &second]);
        let axis = || Attribute::int("axis", 0);
        let terms = [&*first, &*second, &*third];
        let terms = self.b.node(part("terms"), onnx("Concat"), &terms, vec![axis()]);
        let products = self.b.node(
            part("products"),
            microsoft("MatMulNBits"),
            &[&terms, codes, scales],
            vec![
                Attribute::int("K", cols as i64),
                Attribute::int("N", rows as i64),
                Attribute::int("bits", 2),
                Attribute::int("block_size", group as i64),
                Attribute::int("accuracy_level", 4),
            ],
        );
        let outputs = ["of_first", "of_second", "of_third"].map(part);
        self.b.node_with_outputs(
            &part("by_term"),
            onnx("Split"),
            &[&products],
            &outputs.each_ref().map(String::as_str),
            vec![axis(), Attribute::int("num_outputs", 3)],
        );
        // The small ones first.
        let rest = self.plain(&part("of_rest"), "Add", &[&outputs[1], &outputs[2]]);
        Ok(self.plain(name, "Add", &[&outputs[0], &rest]))
    }

    /// Each block of `group` elements rounded to the multiples of 1/127 of its largest.
    fn on_grid(&mut self, name: &str, x: &str, cols: usize, group: usize) -> Result<String> {
        let part = |part: &str| format!("{name}.{part}");
        let shape = self.b.integers(&[4], &[0, 0, (cols / group) as i64, group as i64])?;
        let blocks = self.plain(&part("blocks"), "Reshape", &[x, &shape]);
        let axis = self.b.integers(&[1], &[-1])?;
        let magnitude = self.plain(&part("abs"), "Abs", &[&blocks]);
        let keep = vec![Attribute::int("keepdims", 1)];
        let largest = self.b.node(part("largest"), onnx("ReduceMax"), &[&magnitude, &axis], keep);
        // Below this, activations are as good as 0.
        let (steps, least) = (self.b.float(127.0)?, self.b.float(1e-30)?);
        let step = self.plain(&part("step"), "Div", &[&largest, &steps]);
        let step = self.plain(&part("bounded_step"), "Max", &[&step, &least]);
        let scaled = self.plain(&part("scaled"), "Div", &[&blocks, &step]);
        let rounded = self.plain(&part("rounded"), "Round", &[&scaled]);
        let values = self.plain(&part("values"), "Mul", &[&rounded, &step]);
        let shape = self.b.integers(&[3], &[0, 0, cols as i64])?;
        Ok(self.plain(name, "Reshape", &[&values, &shape]))
    }

    /// Each token as integers in blocks, and what they were multiplied by, `[batch, tokens, 1]`.
    fn quantised(&mut self, name: &str, x: &str, cols: usize) -> Result<(String, String)> {
        let blocks = cols.div_ceil(TERNARY_COLUMNS);
        let part = |part: &str| format!("{name}.{part}");
        let axis = self.b.integers(&[1], &[-1])?;
        let (least, most) = (self.b.float(1e-5)?, self.b.float(127.0)?);
        let magnitude = self.plain(&part("abs"), "Abs", &[x]);
        let keep = vec![Attribute::int("keepdims", 1)];
        let largest = self.b.node(part("largest"), onnx("ReduceMax"), &[&magnitude, &axis], keep);
        let bound = self.plain(&part("bound"), "Max", &[&largest, &least]);
        // 127 times the reciprocal, in this order, as PyTorch computes 127 / bound.
        let reciprocal = self.plain(&part("reciprocal"), "Reciprocal", &[&bound]);
        let factor = self.plain(&part("activation_scale"), "Mul", &[&reciprocal, &most]);
        let scaled = self.plain(&part("scaled"), "Mul", &[x, &factor]);
        let rounded = self.plain(&part("rounded"), "Round", &[&scaled]);
        let missing = (blocks * TERNARY_COLUMNS - cols) as i64;
        let tail = self.b.integers(&[6], &[0, 0, 0, 0, 0, missing])?;
        let padded = self.plain(&part("padded"), "Pad", &[&rounded, &tail]);
        let shape = self.b.integers(&[4], &[0, 0, blocks as i64, TERNARY_COLUMNS as i64])?;
        let split = self.plain(&part("split"), "Reshape", &[&padded, &shape]);
        let one = self.b.integers(&[8], &[0, 0, 0, 0, 0, 0, 0, 1])?;
        let with_constant = self.plain(&part("with_constant"), "Pad", &[&split, &one, &most]);
        let shape = self.b.integers(&[3], &[0, 0, (blocks * TERNARY_BLOCK) as i64])?;
        Ok((self.plain(&part("integers"), "Reshape", &[&with_constant, &shape]), factor))
    }

    /// The scales of a ternary product's blocks. All are 1, so products of the same size share them.
    fn ones(&mut self, count: usize) -> Result<String> {
        let name = format!("ones.{count}");
        if !self.b.has_tensor(&name) {
            self.b.floats(&name, &[count], &vec![1.0; count])?;
        }
        Ok(name)
    }

    fn head(&mut self, h: &str, norm: &RmsNorm, weights: &Table, head: Head, is_tied: bool) -> Result<()> {
        let one = self.b.integers(&[1], &[1])?;
        let end = self.b.integers(&[1], &[i64::MAX])?;
        let negative = self.plain("keep.negative", "Neg", &["num_logits_to_keep"]);
        let start = self.plain("keep.start", "Reshape", &[&negative, &one]);
        let kept = self.plain("keep.hidden", "Slice", &[h, &start, &end, &one]);
        let normed = self.norm("final_norm", &kept, norm)?;
        let weights = match weights {
            Table::Dense(weights) => weights,
            Table::Quantized(_) => unreachable!("invariant: writers are given plain tables"),
            Table::Grouped(matrix) => {
                let (codes, scales) = if is_tied {
                    ("embedding.codes".to_owned(), "embedding.scales".to_owned())
                } else {
                    self.group_tensors("head", &[matrix])?
                };
                self.grouped_product("logits", &normed, &[matrix], (&codes, &scales))?;
                return Ok(());
            }
        };
        match head {
            Head::Full => {
                self.dense("logits", &normed, weights)?;
            }
            Head::Bits8 => {
                let (rows, cols) = (weights.shape[0], weights.shape[1]);
                let blocks = cols.div_ceil(BYTE_BLOCK);
                let (codes, scales) = bits::bytes(weights);
                self.b.tensor("head.codes", Element::U8, &[rows, blocks, BYTE_BLOCK], &codes)?;
                self.b.floats("head.scales", &[rows * blocks], &scales)?;
                self.b.node(
                    "logits",
                    microsoft("MatMulNBits"),
                    &[&normed, "head.codes", "head.scales"],
                    vec![
                        Attribute::int("K", cols as i64),
                        Attribute::int("N", rows as i64),
                        Attribute::int("bits", 8),
                        Attribute::int("block_size", BYTE_BLOCK as i64),
                        Attribute::int("accuracy_level", 4),
                    ],
                );
            }
        }
        Ok(())
    }
}
