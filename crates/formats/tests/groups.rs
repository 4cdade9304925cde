//! Weights with a scale for each group of a row: the same values through every form, and what is refused.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::gguf::Raw;
use common::{Model, assert_says, fixture, open_error};
use serde_json::json;
use ternion_core::ErrorKind::{InvalidConfig, InvalidModel, Unsupported};
use ternion_core::Result;
use ternion_formats::convert::{Converted, Options, Target, convert};
use ternion_formats::gguf::{TensorType, Value, preflight};
use ternion_formats::{Checkpoint, Family, LayerTensors, RopeScaling, Table, Weights};
use ternion_kernels::GroupedKind;

fn ternary() -> PathBuf {
    fixture("qwen3-ternary").join("ptq1_0.gguf")
}

fn binary() -> PathBuf {
    fixture("qwen3-binary").join("q1_0.gguf")
}

fn to(checkpoint: &Checkpoint, out: &Path, target: Target, lossy: bool) -> Result<Converted> {
    let mut options = Options::new(target);
    options.lossy = lossy;
    convert(checkpoint, out, &options, &mut |_, _| {})
}

/// The values of all matrices.
fn values(checkpoint: &Checkpoint) -> Vec<Vec<f32>> {
    let linears = checkpoint.layers.iter().flat_map(LayerTensors::linears);
    let linears = linears.map(|linear| match &linear.weights {
        Weights::Grouped(matrix) => Table::Grouped(matrix.clone()).to_f32(),
        Weights::Dense(dense) => dense.to_f32(),
        Weights::Ternary(_) => panic!("{} has one scale", linear.name),
    });
    let tables = [&checkpoint.embed, checkpoint.head_or_embed()].map(Table::to_f32);
    linears.chain(tables).collect()
}

fn assert_same(a: &Checkpoint, b: &Checkpoint, place: &str) {
    let (mut spec, mut other) = (a.spec.clone(), b.spec.clone());
    // Of these the forms say different things.
    (spec.bos, other.bos) = (None, None);
    assert_eq!(spec, other, "{place}");
    assert!(values(a) == values(b), "{place}");
    for (a, b) in a.layers.iter().zip(&b.layers) {
        assert!(a.norms().eq(b.norms()), "{place}");
    }
    let ids = |checkpoint: &Checkpoint| checkpoint.tokenizer().unwrap().encode("The mill, 12", true).unwrap();
    assert_eq!(ids(a), ids(b), "{place}");
}

#[test]
fn files_are_read_as_what_they_are() {
    for (path, kind, tied) in
        [(ternary(), GroupedKind::Ternary, false), (binary(), GroupedKind::Binary, true)]
    {
        let checkpoint = Checkpoint::open(&path).unwrap();
        let spec = &checkpoint.spec;
        assert_eq!(
            (spec.family, spec.qk_norm, spec.head_dim, spec.hidden_size),
            (Family::Qwen3, true, 96, 256)
        );
        assert!(matches!(spec.rope.scaling, RopeScaling::Yarn { factor: 4.0, original_context: 64, .. }));
        assert!((spec.rope.attention_factor() - (0.1 * 4f32.ln() + 1.0)).abs() < 1e-6);
        assert_eq!(checkpoint.head.is_none(), tied);
        for linear in checkpoint.layers[0].linears() {
            let Weights::Grouped(matrix) = &linear.weights else { panic!("{}", linear.name) };
            assert_eq!((matrix.kind(), matrix.group(), matrix.has_f16_scales()), (kind, 128, true));
        }
        let report = checkpoint.report();
        assert_eq!(report.ternary_parameters, report.parameters - 256 * 7 - 2 * 3 * 96);
    }
}

#[test]
fn values_are_the_same_through_every_form() {
    let folder = tempfile::tempdir().unwrap();
    let targets = [
        Target::GgufQ2,
        Target::GgufQ2G128,
        Target::GgufPq2,
        Target::GgufPtq1,
        Target::Mlx,
        Target::Safetensors,
    ];
    for (path, more) in [(ternary(), None), (binary(), Some(Target::GgufQ1))] {
        let original = Checkpoint::open(&path).unwrap();
        for target in targets.into_iter().chain(more) {
            let out = folder.path().join(format!("{target}-{}", original.name));
            assert_eq!(to(&original, &out, target, false).unwrap(), Converted::default());
            let read = Checkpoint::open(&out).unwrap();
            assert_same(&original, &read, &target.to_string());
            assert!(matches!(read.embed, Table::Grouped(_)), "{target}");
            // And from there to the form that it came from.
            let back = folder.path().join(format!("{target}-{}-back", original.name));
            to(&read, &back, more.unwrap_or(Target::GgufPtq1), false).unwrap();
            assert_same(&original, &Checkpoint::open(&back).unwrap(), &format!("{target} and back"));
        }
    }
}

#[test]
fn what_a_form_cannot_hold_is_refused_or_counted() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let original = Checkpoint::open(ternary()).unwrap();
    let refused = |target| to(&original, &out, target, false).unwrap_err();
    assert_says(&refused(Target::GgufTq2), InvalidModel, &["384 elements", "multiple of 256", "TQ2_0"]);
    assert_says(&refused(Target::GgufQ1), Unsupported, &["row 0, group 0", "a weight is 0", "Q1_0"]);
    assert_says(&refused(Target::GgufI2s), Unsupported, &["token_embd.weight", "each group"]);
    assert!(!out.exists());
    // 384 columns are no multiple of 256, so a model that TQ2_0 could hold is made narrower.
    let mut narrow = original.clone();
    narrow.layers.clear();
    narrow.spec.layers = 0;
    let error = to(&narrow, &out, Target::GgufTq2, false).unwrap_err();
    assert_says(&error, Unsupported, &["row 0, group 0", "TQ2_0", "--lossy", "token_embd.weight"]);
    assert!(!out.exists());
    let lost = to(&narrow, &out, Target::GgufTq2, true).unwrap().lost.unwrap();
    assert!(lost.groups > 900 && lost.of == 1024 && lost.largest > 0.2 && lost.largest < 1.2, "{lost:?}");

    // One scale and int8 inputs are another arithmetic.
    let bitnet = Checkpoint::open(fixture("tiny-packed")).unwrap();
    for target in [Target::GgufPq2, Target::GgufQ1, Target::Mlx] {
        let error = to(&bitnet, &folder.path().join("bitnet"), target, true).unwrap_err();
        assert_eq!(error.kind(), Unsupported, "{target}: {error}");
    }
}

/// A converted fixture with its tensors in memory.
fn mlx() -> (tempfile::TempDir, Model) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("mlx");
    to(&Checkpoint::open(ternary()).unwrap(), &out, Target::Mlx, false).unwrap();
    let model = Model::fixture(out.to_str().unwrap());
    (folder, model)
}

#[test]
fn broken_mlx_matrices_are_refused_by_row_and_group() {
    const Q: &str = "model.layers.1.self_attn.q_proj";
    let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
    let broken = |change: &dyn Fn(&mut Model)| {
        let (_folder, mut model) = mlx();
        change(&mut model);
        model.error()
    };
    // Row 2 has the values 4 and 5 of 2 groups a row.
    let set = |part: &str, value: f32| {
        let name = format!("{Q}.{part}");
        broken(&|m| m.tensor(&name).bytes[10..12].copy_from_slice(&half(value)))
    };
    assert_says(&set("biases", 0.25), InvalidModel, &[Q, "row 2, group 1", "minus the scale"]);
    for bad in [f32::NAN, f32::INFINITY, -0.0] {
        assert_says(&set("scales", bad), InvalidModel, &[Q, "row 2, group 1", "the scale is"]);
    }
    let code = broken(&|m| m.tensor(&format!("{Q}.weight")).bytes[2 * 64 + 40] |= 0x0f);
    assert_says(&code, InvalidModel, &[Q, "row 2, group 1", "the code 3"]);
    let bits = broken(&|m| m.config["quantization"]["bits"] = 4.into());
    assert_says(&bits, Unsupported, &["quantization.bits", "4"]);
    let group = broken(&|m| m.config["quantization"]["group_size"] = 32.into());
    assert_says(&group, Unsupported, &["quantization.group_size", "32"]);
    // A row of 256 columns.
    let rest = broken(&|m| m.config["hidden_size"] = 320.into());
    assert_says(&rest, InvalidModel, &["320 columns", "a multiple of the group (128)"]);
    let missing = broken(&|m| drop(m.remove(&format!("{Q}.biases"))));
    assert_says(&missing, InvalidModel, &[&format!("{Q}.biases"), "missing"]);
    let shape = broken(&|m| m.tensor(&format!("{Q}.scales")).shape = vec![192, 4]);
    assert_says(&shape, InvalidModel, &[&format!("{Q}.scales"), "[192, 4]", "[384, 2]"]);
}

/// With one bit, the bias is half the scale.
#[test]
fn a_bias_of_one_bit_is_half_the_scale() {
    const Q: &str = "model.layers.1.self_attn.q_proj";
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("mlx");
    to(&Checkpoint::open(binary()).unwrap(), &out, Target::Mlx, false).unwrap();
    let mut model = Model::fixture(out.to_str().unwrap());
    assert_eq!(model.config["quantization"]["bits"], 1);
    let scales = model.tensor(&format!("{Q}.scales")).bytes.clone();
    // What would be right with two bits.
    let minus = half::f16::from_le_bytes([scales[10], scales[11]]) * half::f16::NEG_ONE;
    model.tensor(&format!("{Q}.biases")).bytes[10..12].copy_from_slice(&minus.to_le_bytes());
    assert_says(&model.error(), InvalidModel, &[Q, "row 2, group 1", "minus half the scale", "not binary"]);
}

/// TQ1_0 and TQ2_0 whose blocks differ in scale, and floats in GGUF: what is wrong is told by row and group, too.
#[test]
fn other_gguf_tensors_are_refused_by_row_and_group() {
    const Q: &str = "blk.0.attn_q.weight";
    let source = fixture("gguf-ternary");
    let block = TensorType::Tq2_0.block_bytes();
    // A model with int8 inputs has one scale for the tensor, and is read by blocks.
    for (path, place) in [
        (source.join("qwen3.gguf"), "row 2, group 0"),
        // The second row of a head, whose halves are interleaved in the file.
        (source.join("llama-scales.gguf"), "row 1, group 0"),
        (fixture("gguf").join("llama-tq.gguf"), "block 2"),
    ] {
        assert_eq!(Raw::read(&path).tensor(Q).kind, TensorType::Tq2_0.id());
        for (bad, said) in
            [(half::f16::NAN, "NaN"), (half::f16::INFINITY, "inf"), (half::f16::NEG_ZERO, "-0.0")]
        {
            let mut raw = Raw::read(&path);
            raw.tensor(Q).data[3 * block - 2..3 * block].copy_from_slice(&bad.to_le_bytes());
            let error = raw.open_error();
            assert_says(&error, InvalidModel, &[Q, place, "the scale", said]);
        }
        let mut raw = Raw::read(&path);
        // A block with the scale 0 is all zeros, whatever its codes.
        let blocks = raw.tensor(Q).data.chunks_exact_mut(block);
        blocks.filter(|block| block[block.len() - 2..] != [0, 0]).take(1).for_each(|block| block[0] |= 3);
        assert_says(&raw.open_error(), InvalidModel, &[Q, "the code 3"]);
    }
    // A row that no group divides cannot be in a file of such a type at all.
    let mut raw = Raw::read(&binary());
    raw.tensor("blk.0.ffn_down.weight").dims[0] = 390;
    assert_says(&raw.error(), InvalidModel, &["390", "multiple of 128", "Q1_0", "blk.0.ffn_down.weight"]);
}

/// The same model as plain floats.
fn floats() -> (tempfile::TempDir, Model) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("floats");
    to(&Checkpoint::open(ternary()).unwrap(), &out, Target::Safetensors, false).unwrap();
    let model = Model::fixture(out.to_str().unwrap());
    (folder, model)
}

#[test]
fn floats_that_are_grouped_are_found_and_almost_so_is_an_error() {
    const UP: &str = "model.layers.0.mlp.up_proj.weight";
    let (_folder, mut model) = floats();
    let folder = model.write();
    let found = Checkpoint::open(folder.path()).unwrap();
    assert!(
        found.assumptions.iter().any(|line| line.contains("are exactly ternary")),
        "{:?}",
        found.assumptions
    );
    // One value of row 5 in its second group.
    let at = 2 * (5 * 256 + 130);
    model.tensor(UP).bytes[at..at + 2].copy_from_slice(&half::f16::from_f32(0.3).to_le_bytes());
    assert_says(&model.error(), InvalidModel, &[UP, "row 5, group 1", "almost ternary"]);
    // What is nothing like it stays dense.
    let noise =
        (0..384 * 256).flat_map(|i: u32| half::f16::from_f32((i * 7919 % 2003) as f32 / 9e3).to_le_bytes());
    model.tensor(UP).bytes = noise.collect();
    let folder = model.write();
    let mixed = Checkpoint::open(folder.path()).unwrap();
    assert!(matches!(mixed.layers[0].up.weights, Weights::Dense(_)));
    assert!(matches!(mixed.layers[0].gate.weights, Weights::Grouped(_)));
    // BF16 with one scale for all is ternary, too.
    let ternary =
        (0..384 * 256).flat_map(|i: u32| half::bf16::from_f32((i % 3) as f32 * 0.7 - 0.7).to_le_bytes());
    let tensor = model.tensor(UP);
    (tensor.dtype, tensor.bytes) = ("BF16".into(), ternary.collect());
    let folder = model.write();
    let one_scale = Checkpoint::open(folder.path()).unwrap();
    let Weights::Grouped(matrix) = &one_scale.layers[0].up.weights else { panic!("dense") };
    assert_eq!((matrix.group(), matrix.scale(9, 0)), (256, half::bf16::from_f32(0.7).to_f32()));
}

#[test]
fn broken_gguf_tensors_are_refused_by_row_and_group() {
    let folder = tempfile::tempdir().unwrap();
    let original = Checkpoint::open(ternary()).unwrap();
    for (target, block) in [(Target::GgufQ2, 18), (Target::GgufPq2, 34), (Target::GgufQ2G128, 34)] {
        let path = folder.path().join(format!("{target}.gguf"));
        to(&original, &path, target, false).unwrap();
        let row = 256 / if block == 18 { 64 } else { 128 } * block;
        let broken = |at: usize, value: u8| {
            let mut raw = Raw::read(&path);
            raw.tensor("blk.2.ffn_up.weight").data[at] = value;
            raw.open_error()
        };
        let place = ["blk.2.ffn_up.weight", "row 3, group 1"];
        let says = |error, what| assert_says(&error, InvalidModel, &[place[0], place[1], what]);
        says(broken(3 * row + block + 5, 0x3f), "the code 3");
        // The upper byte of a scale: infinity or NaN.
        says(broken(3 * row + block + 1, 0x7f), "the scale is");
    }
    // Every bad scale in every type, at its place in the block.
    let types = [
        (Target::GgufQ2, 18, 0),
        (Target::GgufQ2G128, 34, 0),
        (Target::GgufPq2, 34, 0),
        (Target::GgufPtq1, 28, 26),
        (Target::GgufQ1, 18, 0),
    ];
    for (target, block, at) in types {
        let path = folder.path().join(format!("scales-{target}.gguf"));
        let source = if target == Target::GgufQ1 { binary() } else { ternary() };
        to(&Checkpoint::open(source).unwrap(), &path, target, false).unwrap();
        for (bad, said) in [
            (half::f16::NAN, "NaN"),
            (half::f16::INFINITY, "inf"),
            (half::f16::NEG_INFINITY, "-inf"),
            (half::f16::NEG_ZERO, "-0.0"),
        ] {
            let mut raw = Raw::read(&path);
            let data = &mut raw.tensor("token_embd.weight").data;
            data[block + at..block + at + 2].copy_from_slice(&bad.to_le_bytes());
            let parts = ["token_embd.weight", "row 0, group 1", &format!("the scale is {said}")];
            assert_says(&raw.open_error(), InvalidModel, &parts);
        }
    }
    // Bytes that are neither of the layouts of id 42.
    let mut raw = Raw::read(&folder.path().join("gguf-q2.gguf"));
    raw.tensor("blk.0.attn_q.weight").data.extend([0; 960]);
    assert_says(&raw.error(), InvalidModel, &["blk.0.attn_", "a gap"]);
}

#[test]
fn what_would_be_computed_wrong_is_refused() {
    let changed = |change: &dyn Fn(&mut Raw)| {
        let mut raw = Raw::read(&ternary());
        change(&mut raw);
        raw.open_error()
    };
    for (key, value) in [
        ("prism.hadamard.version", Value::from(2u32)),
        ("prism.hadamard.block_size", Value::from(1024u32)),
        ("prism.something.new", Value::from("yes")),
    ] {
        let rotated = changed(&|r| r.set(key, value.clone()));
        assert_says(&rotated, Unsupported, &[key, "same transformation of their inputs"]);
        // Nor does llama.cpp know such a key: in a file that it would read, of any architecture.
        for architecture in ["qwen3", "qwen35"] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("q2.gguf");
            to(&Checkpoint::open(ternary()).unwrap(), &path, Target::GgufQ2, false).unwrap();
            let mut raw = Raw::read(&path);
            raw.set(key, value.clone());
            raw.set("general.architecture", architecture);
            let error = raw.open_error();
            assert_says(&error, Unsupported, &[key]);
            assert!(!error.to_string().contains("llama-cpp"), "{error}");
            let refused = preflight(&raw.parse().unwrap()).unwrap_err();
            assert_says(&refused, Unsupported, &[key, "same transformation of their inputs"]);
        }
    }
    let hybrid = changed(&|r| r.set("general.architecture", "qwen35"));
    assert_says(&hybrid, Unsupported, &["general.architecture", "qwen35", "DeltaNet"]);
    let rope = changed(&|r| r.set("qwen3.rope.scaling.type", "longrope"));
    assert_says(&rope, Unsupported, &["qwen3.rope.scaling.type", "longrope", "none, linear, yarn"]);
    let missing = changed(&|r| r.tensors.retain(|t| t.name != b"blk.1.attn_k_norm.weight"));
    assert_says(&missing, InvalidModel, &["blk.1.attn_k_norm.weight", "missing"]);

    let (_folder, model) = floats();
    for (key, value, words) in [
        ("model_type", json!("qwen3_5"), "DeltaNet"),
        ("use_sliding_window", json!(true), "true"),
        ("layer_types", json!(["full_attention", "sliding_attention"]), "sliding_attention"),
        ("prism_hadamard", json!({"version": 2}), "rotated"),
        ("rope_scaling", json!({"rope_type": "longrope"}), "longrope"),
    ] {
        let mut changed = Model { config: model.config.clone(), tensors: model.tensors.clone() };
        changed.config[key] = value;
        assert_says(&changed.error(), Unsupported, &[key, words]);
    }
}

/// YaRN's keys in `config.json`, and what transformers makes of them.
#[test]
fn yarn_is_read_as_by_transformers() {
    let (_folder, mut model) = floats();
    let mut yarn = |keys: serde_json::Value| {
        let mut scaling = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
        scaling.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        model.config["rope_scaling"] = scaling;
        let folder = model.write();
        Checkpoint::open(folder.path()).unwrap().spec.rope
    };
    let near = |a: f32, b: f64| (f64::from(a) - b).abs() < 1e-6;
    assert!(near(yarn(json!({})).attention_factor(), 0.1 * 4f64.ln() + 1.0));
    assert!(near(yarn(json!({"attention_factor": 0.5})).attention_factor(), 0.5));
    let both = yarn(json!({"mscale": 0.707, "mscale_all_dim": 1.0})).attention_factor();
    assert!(near(both, (0.0707 * 4f64.ln() + 1.0) / (0.1 * 4f64.ln() + 1.0)));
    // 0 counts as left out.
    let zero = yarn(json!({"mscale": 1.0, "mscale_all_dim": 0, "beta_fast": 0})).scaling;
    assert!(matches!(zero, RopeScaling::Yarn { beta_fast: 32.0, beta_slow: 1.0, truncate: true, .. }));
    // Without the factor it is the ratio of the contexts.
    let mut keys = json!({"rope_type": "yarn", "original_max_position_embeddings": 128});
    keys["factor"] = json!(null);
    model.config["rope_scaling"] = keys;
    let folder = model.write();
    let rope = Checkpoint::open(folder.path()).unwrap().spec.rope;
    assert!(matches!(rope.scaling, RopeScaling::Yarn { factor: 2.0, original_context: 128, .. }));
}

#[test]
fn dynamic_scaling_ends_with_the_context_and_says_why() {
    let (_folder, mut model) = floats();
    for key in ["rope_scaling", "rope_parameters"] {
        model.config.as_object_mut().unwrap().remove("rope_scaling");
        model.config.as_object_mut().unwrap().remove("rope_parameters");
        model.config[key] = json!({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6});
        let folder = model.write();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let spec = &checkpoint.spec;
        assert_eq!(spec.rope.scaling, RopeScaling::Dynamic { factor: 4.0 });
        assert!(spec.check_context(spec.context_length).is_ok());
        let error = spec.check_context(spec.context_length + 1).unwrap_err();
        assert_says(
            &error,
            InvalidConfig,
            &["context_length: 257", "at most 256", "dynamic rotary scaling", "yarn"],
        );
        let said = |part: &str| checkpoint.assumptions.iter().any(|assumption| assumption.contains(part));
        assert!(said("context of 256 tokens") && said("dynamic"), "{:?}", checkpoint.assumptions);
    }
    model.config["rope_parameters"] = json!({"rope_type": "dynamic", "rope_theta": 1e6});
    assert_says(&model.error(), InvalidModel, &["rope_parameters.factor", "missing"]);
}

#[test]
fn a_file_that_is_cut_short_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let bytes = fs::read(ternary()).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1000]).unwrap();
    assert_says(&open_error(&path), InvalidModel, &["complete file"]);
}
