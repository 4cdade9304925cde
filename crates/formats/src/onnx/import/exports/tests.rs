//! A decoder written as onnxruntime-genai's model builder writes one, read back.

use std::path::{Path, PathBuf};

use ternion_core::{Error, ErrorKind};
use ternion_kernels::GroupedMatrix;
use ternion_test_support::fixture;

use crate::convert::{self, Options, Target};
use crate::onnx::Element;
use crate::onnx::bits;
use crate::onnx::graph::{Builder, Dim, Operator};
use crate::onnx::proto::Attribute;
use crate::{Checkpoint, CheckpointOptions, Linear, RmsNorm, Table, Weights};

const OPSETS: [(&str, i64); 2] = [("", 21), ("com.microsoft", 1)];

fn microsoft(name: &str) -> Operator<'_> {
    Operator { domain: "com.microsoft", name }
}

/// How the weights of a file are written.
#[derive(Clone, Copy, Default)]
struct Form {
    /// The code of the weight 0 where zero points are written: 1, or 2 with scales of the other sign.
    zero: Option<u8>,
    /// Queries, keys and values are one product.
    packed: bool,
    bits: Option<i64>,
    bias: bool,
}

struct Export {
    b: Builder,
    form: Form,
}

impl Export {
    fn norm(&mut self, name: &str, norm: &RmsNorm) {
        self.b.floats(name, &[norm.weight.len()], &norm.weight).unwrap();
        let epsilon = Attribute::float("epsilon", norm.eps);
        self.b.node(
            format!("/{name}"),
            microsoft("SimplifiedLayerNormalization"),
            &["x", name],
            vec![epsilon],
        );
    }

    /// Codes, scales and zero points of matrices below each other.
    fn tensors(&mut self, name: &str, matrices: &[&GroupedMatrix]) -> Vec<String> {
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for matrix in matrices {
            bits::append_grouped(matrix, &mut codes);
            scales.extend(bits::scales(matrix));
        }
        let (cols, group) = (matrices[0].cols(), matrices[0].group());
        let rows: usize = matrices.iter().map(|matrix| matrix.rows()).sum();
        match self.form.zero {
            // One less than with the zero 2.
            Some(1) => codes.iter_mut().for_each(|byte| *byte -= 0b01_01_01_01),
            // 1, 2 and 3 are 3, 2 and 1 of the other sign; neither borrows from its neighbour.
            Some(_) => {
                for byte in &mut codes {
                    *byte = (!*byte).wrapping_add(0b01_01_01_01);
                }
                for scale in &mut scales {
                    *scale = -*scale;
                }
            }
            None => {}
        }
        let names = ["Q2", "scales", "zp"].map(|part| format!("{name}_{part}"));
        self.b.tensor(&names[0], Element::U8, &[rows, cols / group, group / 4], &codes).unwrap();
        let halves: Vec<u8> =
            scales.iter().flat_map(|scale| half::f16::from_f32(*scale).to_le_bytes()).collect();
        self.b.tensor(&names[1], Element::F16, &[scales.len()], &halves).unwrap();
        let mut inputs = names[..2].to_vec();
        if let Some(zero) = self.form.zero {
            let width = (cols / group).div_ceil(4);
            self.b
                .tensor(&names[2], Element::U8, &[rows * width], &vec![zero * 0b01_01_01_01; rows * width])
                .unwrap();
            inputs.push(names[2].clone());
        }
        inputs
    }

    fn product(&mut self, name: &str, linears: &[&Linear]) {
        let matrices: Vec<&GroupedMatrix> = linears
            .iter()
            .map(|linear| match &linear.weights {
                Weights::Grouped(matrix) => &**matrix,
                _ => panic!("{}: no groups", linear.name),
            })
            .collect();
        let (cols, group) = (matrices[0].cols(), matrices[0].group());
        let rows: usize = matrices.iter().map(|matrix| matrix.rows()).sum();
        let tensors = self.tensors(&format!("{name}.MatMul.weight"), &matrices);
        let mut inputs = vec!["x"];
        inputs.extend(tensors.iter().map(String::as_str));
        let attributes =
            [("K", cols), ("N", rows), ("bits", self.form.bits.unwrap_or(2) as usize), ("block_size", group)];
        let attributes = attributes.map(|(key, value)| Attribute::int(key, value as i64)).to_vec();
        self.b.node(
            format!("/{}/MatMul_Q2", name.replace('.', "/")),
            microsoft("MatMulNBits"),
            &inputs,
            attributes,
        );
        if self.form.bias {
            self.b.floats(&format!("{name}.Add.bias"), &[rows], &vec![0.5; rows]).unwrap();
        }
    }
}

/// Writes `checkpoint` into a folder, with the files beside the graph that our own exports have.
fn export(checkpoint: &Checkpoint, form: Form, folder: &Path) -> PathBuf {
    let path = folder.join("model");
    convert::convert(checkpoint, &path, &Options::new(Target::OnnxFast), &mut |_, _| {}).unwrap();
    let mut e = Export { b: Builder::new(&path, "model.onnx.data", &OPSETS).unwrap(), form };
    e.b.input("input_ids", Element::I64, &[Dim::Named("batch"), Dim::Named("sequence")]);
    let Table::Grouped(table) = &checkpoint.embed else { panic!("a plain embedding") };
    let tensors = e.tensors("model.embed_tokens.weight", &[table]);
    let mut inputs = vec![tensors[0].as_str(), "input_ids"];
    inputs.extend(tensors[1..].iter().map(String::as_str));
    let attributes =
        [("bits", 2), ("block_size", table.group() as i64), ("gather_axis", 0), ("quantize_axis", 1)];
    let attributes = attributes.map(|(key, value)| Attribute::int(key, value)).to_vec();
    e.b.node("/model/embed_tokens/Gather", microsoft("GatherBlockQuantized"), &inputs, attributes);
    for (index, layer) in checkpoint.layers.iter().enumerate() {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        e.norm(&name("input_layernorm.weight"), &layer.input_norm);
        e.norm(&name("post_attention_layernorm.weight"), &layer.post_attention_norm);
        e.norm(&name("attn.q_norm.layernorm.weight"), layer.q_norm.as_ref().unwrap());
        e.norm(&name("attn.k_norm.layernorm.weight"), layer.k_norm.as_ref().unwrap());
        if form.packed {
            e.product(&name("attn.qkv_proj"), &[&layer.q, &layer.k, &layer.v]);
        } else {
            e.product(&name("attn.q_proj"), &[&layer.q]);
            e.product(&name("attn.k_proj"), &[&layer.k]);
            e.product(&name("attn.v_proj"), &[&layer.v]);
        }
        let heads = [("num_heads", checkpoint.spec.heads), ("kv_num_heads", checkpoint.spec.kv_heads)];
        let heads = heads.map(|(key, value)| Attribute::int(key, value as i64)).to_vec();
        e.b.node(name("attn/GroupQueryAttention"), microsoft("GroupQueryAttention"), &["q", "k", "v"], heads);
        e.product(&name("attn.o_proj"), &[&layer.o]);
        e.product(&name("mlp.gate_proj"), &[&layer.gate]);
        e.product(&name("mlp.up_proj"), &[&layer.up]);
        e.product(&name("mlp.down_proj"), &[&layer.down]);
    }
    e.norm(
        &format!("model.layers.{}.final_norm_layernorm.weight", checkpoint.layers.len()),
        &checkpoint.final_norm,
    );
    let head = Linear { name: String::new(), weights: Weights::Grouped(table.clone()), input_norm: None };
    e.product("lm_head", &[&head]);
    e.b.finish(&path.join("model.onnx"), &[]).unwrap();
    path
}

fn open(path: &Path) -> Result<Checkpoint, Error> {
    convert::open(path, &CheckpointOptions::default(), &mut |_, _| {})
}

#[test]
fn matrices_are_those_of_the_source_whatever_their_zero_points() {
    for name in ["qwen3-ternary/ptq1_0.gguf", "qwen3-binary/q1_0.gguf"] {
        let source = Checkpoint::open(fixture(name)).unwrap();
        for zero in [None, Some(1), Some(2)] {
            let folder = tempfile::tempdir().unwrap();
            let form = Form { zero, packed: zero.is_none(), ..Form::default() };
            let back = open(&export(&source, form, folder.path())).unwrap();
            assert_eq!(back.format, "ONNX (MatMulNBits)");
            let (Table::Grouped(a), Table::Grouped(b)) = (&source.embed, &back.embed) else {
                panic!("{name}")
            };
            assert!(a.kind() == b.kind() && **a == **b, "{name} {zero:?}");
            assert_eq!(back.head.is_some(), source.head.is_some());
            for (a, b) in source.layers.iter().zip(&back.layers) {
                assert_eq!(a.norms().collect::<Vec<_>>(), b.norms().collect::<Vec<_>>());
                for (a, b) in a.linears().into_iter().zip(b.linears()) {
                    let (Weights::Grouped(x), Weights::Grouped(y)) = (&a.weights, &b.weights) else {
                        panic!("{}", a.name)
                    };
                    assert!(x.kind() == y.kind() && **x == **y, "{name} {zero:?} {}", a.name);
                }
            }
            assert_eq!(source.final_norm, back.final_norm);
        }
    }
}

#[test]
fn what_is_not_ternary_is_refused() {
    let source = Checkpoint::open(fixture("qwen3-ternary/ptq1_0.gguf")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let error = |form: Form, name: &str| {
        let folder = folder.path().join(name);
        open(&export(&source, form, &folder)).unwrap_err()
    };
    let four = error(Form { bits: Some(4), ..Form::default() }, "four");
    assert_eq!(four.kind(), ErrorKind::Unsupported, "{four}");
    assert!(four.to_string().contains("weights of 4 bits, expected 2"), "{four}");
    let bias = error(Form { bias: true, ..Form::default() }, "bias");
    assert!(
        bias.kind() == ErrorKind::Unsupported && bias.to_string().contains("a bias is not supported"),
        "{bias}"
    );
    // With the zero 3 the code 0, which no weight has, would be -3.
    let zero = error(Form { zero: Some(3), ..Form::default() }, "zero");
    assert_eq!(zero.kind(), ErrorKind::InvalidModel, "{zero}");
    assert!(zero.to_string().contains("is not -1, 0 or 1 times the scale"), "{zero}");
}
