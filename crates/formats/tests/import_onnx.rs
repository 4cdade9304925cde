//! ONNX files as sources of conversions: the same model comes back, and what is wrong with a file is an error that names it.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::path::{Path, PathBuf};

use common::{assert_says, trits};
use ternion_core::{Error, ErrorKind};
use ternion_formats::convert::{self, Embedding, Options, Target, convert};
use ternion_formats::onnx::{Element, Summary};
use ternion_formats::{
    Checkpoint, CheckpointOptions, DenseTensor, LayerTensors, Linear, RmsNorm, Table, Weights,
};
use ternion_test_support::fixture;

const MODELS: [&str; 9] = [
    "tiny-packed",
    "llama-ternary",
    "1bitllm",
    "nano-packed",
    "nano-master",
    "ternion-tiny",
    "qwen3-ternary/ptq1_0.gguf",
    "qwen3-binary/q1_0.gguf",
    "dense/qwen3",
];

struct Exported {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

fn exported(checkpoint: &Checkpoint, options: &Options) -> Exported {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    convert(checkpoint, &path, options, &mut |_, _| {})
        .unwrap_or_else(|e| panic!("{}: {e}", checkpoint.name));
    Exported { _folder: folder, path }
}

fn open(path: &Path) -> Result<Checkpoint, Error> {
    convert::open(path, &CheckpointOptions::default(), &mut |_, _| {})
}

#[track_caller]
fn assert_same_dense(a: &DenseTensor, b: &DenseTensor) {
    assert_eq!(a.shape, b.shape);
    let bits = |tensor: &DenseTensor| tensor.to_f32().into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert!(bits(a) == bits(b), "other values");
}

#[track_caller]
fn assert_same_table(a: &Table, b: &Table) {
    match (a, b) {
        (Table::Grouped(a), Table::Grouped(b)) => assert!(a.kind() == b.kind() && **a == **b, "other groups"),
        (Table::Grouped(_), _) | (_, Table::Grouped(_)) => panic!("one of the tables is in groups"),
        _ => assert_same_dense(&a.to_dense(), &b.to_dense()),
    }
}

#[track_caller]
fn assert_same_linear(a: &Linear, b: &Linear) {
    match (&a.weights, &b.weights) {
        (Weights::Ternary(x), Weights::Ternary(y)) => {
            assert_eq!(
                (x.rows, x.cols, x.scale.to_bits()),
                (y.rows, y.cols, y.scale.to_bits()),
                "{}",
                a.name
            );
            assert!(trits(x) == trits(y), "{}", a.name);
        }
        (Weights::Dense(x), Weights::Dense(y)) => assert_same_dense(x, y),
        (Weights::Grouped(x), Weights::Grouped(y)) => assert!(**x == **y, "{}", a.name),
        _ => panic!("{}: weights of another kind", a.name),
    }
    assert_eq!((&a.name, &a.input_norm), (&b.name, &b.input_norm));
}

/// Everything that an engine computes with.
#[track_caller]
fn assert_same(a: &Checkpoint, b: &Checkpoint) {
    let (mut left, mut right) = (a.spec.clone(), b.spec.clone());
    // How scales and masters were stored, and by which name the architecture went.
    (left.quantization, right.quantization) = (None, None);
    (left.architecture, right.architecture) = (String::new(), String::new());
    (left.tied, right.tied) = (a.head.is_none(), b.head.is_none());
    assert_eq!(left, right);
    assert_same_table(&a.embed, &b.embed);
    assert_eq!(a.head.is_some(), b.head.is_some());
    assert_same_table(a.head_or_embed(), b.head_or_embed());
    assert_eq!(a.final_norm, b.final_norm);
    assert_eq!(a.layers.len(), b.layers.len());
    for (x, y) in a.layers.iter().zip(&b.layers) {
        assert_eq!(x.norms().collect::<Vec<&RmsNorm>>(), y.norms().collect::<Vec<_>>());
        for (x, y) in LayerTensors::linears(x).into_iter().zip(y.linears()) {
            assert_same_linear(x, y);
        }
    }
    assert_eq!(a.sampling, b.sampling);
    let encode = |of: &Checkpoint| of.tokenizer().unwrap().encode("A week has seven days.", true).unwrap();
    assert_eq!(encode(a), encode(b));
}

#[test]
fn the_same_model_comes_back_from_both_variants() {
    for name in MODELS {
        let source = Checkpoint::open(fixture(name)).unwrap();
        for target in [Target::OnnxFast, Target::Onnx] {
            let file = exported(&source, &Options::new(target));
            let back = open(&file.path).unwrap_or_else(|e| panic!("{name} {target}: {e}"));
            println!("{name}: {}", back.format);
            assert_same(&source, &back);
            assert_eq!(back.files.len(), 2, "{:?}", back.files);
            // And from the file itself.
            assert_same(&source, &open(&file.path.join("model.onnx")).unwrap());
        }
    }
}

#[test]
fn it_is_written_in_the_forms_that_the_source_could_be_written_in() {
    let ternary = [Target::Safetensors, Target::GgufTq1, Target::GgufTq2, Target::GgufI2s];
    let grouped = [
        Target::Safetensors,
        Target::GgufQ2,
        Target::GgufQ2G128,
        Target::GgufPq2,
        Target::GgufPtq1,
        Target::Mlx,
    ];
    let binary = [Target::GgufQ1, Target::Mlx, Target::GgufQ2];
    let cases: [(&str, &[Target]); 3] = [
        ("tiny-packed", &ternary),
        ("qwen3-ternary/ptq1_0.gguf", &grouped),
        ("qwen3-binary/q1_0.gguf", &binary),
    ];
    for (name, targets) in cases {
        let source = Checkpoint::open(fixture(name)).unwrap();
        for variant in [Target::OnnxFast, Target::Onnx] {
            let file = exported(&source, &Options::new(variant));
            let back = open(&file.path).unwrap();
            for target in targets {
                let folder = tempfile::tempdir().unwrap();
                let write = |checkpoint: &Checkpoint, name: &str| {
                    let path = folder.path().join(name);
                    convert(checkpoint, &path, &Options::new(*target), &mut |_, _| {}).map(|_| path)
                };
                match (write(&source, "direct"), write(&back, "back")) {
                    (Ok(direct), Ok(back)) => {
                        let (direct, back) =
                            (Checkpoint::open(direct).unwrap(), Checkpoint::open(back).unwrap());
                        assert_same(&direct, &back);
                    }
                    // A row that is no multiple of the form's block.
                    (Err(direct), Err(back)) => {
                        assert_eq!(direct.kind(), back.kind(), "{name} {target}: {direct}, {back}");
                    }
                    (direct, back) => panic!("{name} {variant} {target}: {direct:?}, {back:?}"),
                }
            }
        }
    }
}

#[test]
fn a_head_of_eight_bits_is_taken_from_the_embedding_or_refused() {
    let mut options = Options::new(Target::Onnx);
    options.embedding = Some(Embedding::Q8_0);
    let tied = Checkpoint::open(fixture("tiny-packed")).unwrap();
    assert!(tied.head.is_none());
    assert_same(&tied, &open(&exported(&tied, &options).path).unwrap());

    let mut untied = tied.clone();
    untied.head = Some(tied.embed.clone());
    let error = open(&exported(&untied, &options).path).unwrap_err();
    assert_says(&error, ErrorKind::Unsupported, &["rounded to 8 bits", "model.onnx"]);
}

/// Factors of their own for the rotary frequencies, which only GGUF has in a tensor.
#[test]
fn rotary_factors_come_through_every_form() {
    let mut raw = common::gguf::Raw::fixture("llama-ternary", Target::GgufTq2);
    let factors: Vec<f32> = (0..32).map(|i| 1.0 + i as f32 / 3.0).collect();
    raw.add("rope_freqs.weight", &[32], 0, factors.iter().flat_map(|x| x.to_le_bytes()).collect());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("factors.gguf");
    std::fs::write(&path, raw.bytes()).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("llama-ternary").join(file), folder.path().join(file)).unwrap();
    }
    let source = Checkpoint::open(&path).unwrap();
    assert_eq!(source.spec.rope.scaling, ternion_formats::RopeScaling::Factors(factors));
    let safetensors = exported(&source, &Options::new(Target::Safetensors));
    assert_same(&source, &Checkpoint::open(&safetensors.path).unwrap());
    for variant in [Target::OnnxFast, Target::Onnx] {
        let file = exported(&source, &Options::new(variant));
        let back = open(&file.path).unwrap();
        assert_same(&source, &back);
        let gguf = exported(&back, &Options::new(Target::GgufTq1));
        assert_same(&source, &Checkpoint::open(&gguf.path).unwrap());
    }
    // Of two lists the length of a text would choose one.
    let config = safetensors.path.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    for (from, to) in [
        ("\"attention_factor\": 1.0", "\"attention_factor\": 1.1"),
        ("\"short_factor\": [", "\"short_factor\": [2.0,"),
    ] {
        std::fs::write(&config, text.replace(from, to)).unwrap();
        let error = Checkpoint::open(&safetensors.path).unwrap_err();
        assert_says(
            &error,
            ErrorKind::Unsupported,
            &["rope_scaling.rope_type", "longrope", "the same factors"],
        );
    }
}

fn small(target: Target) -> Exported {
    exported(&Checkpoint::open(fixture("nano-packed")).unwrap(), &Options::new(target))
}

#[test]
fn what_is_missing_beside_the_graph_is_named() {
    for target in [Target::OnnxFast, Target::Onnx] {
        let file = small(target);
        std::fs::remove_file(file.path.join("model.onnx.data")).unwrap();
        assert_says(&open(&file.path).unwrap_err(), ErrorKind::NotFound, &["model.onnx.data"]);

        let file = small(target);
        std::fs::remove_file(file.path.join("config.json")).unwrap();
        assert_says(&open(&file.path).unwrap_err(), ErrorKind::NotFound, &["config.json"]);

        let file = small(target);
        std::fs::remove_file(file.path.join("tokenizer.json")).unwrap();
        let checkpoint = open(&file.path).unwrap();
        let out = file.path.with_extension("gguf");
        let error = convert(&checkpoint, &out, &Options::new(Target::GgufTq2), &mut |_, _| {}).unwrap_err();
        assert_says(&error, ErrorKind::NotFound, &["tokenizer.json"]);
    }
}

/// Changes a key of the configuration of an export.
fn edited(target: Target, key: &str, value: serde_json::Value) -> Error {
    let file = small(target);
    let path = file.path.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert!(config.get(key).is_some(), "{key}");
    config[key] = value;
    std::fs::write(&path, config.to_string()).unwrap();
    match open(&file.path) {
        Ok(_) => panic!("{target} {key} was accepted"),
        Err(error) => error,
    }
}

#[test]
fn a_configuration_of_another_model_is_refused() {
    for target in [Target::OnnxFast, Target::Onnx] {
        for (key, value, part) in [
            ("rope_theta", 1234.5.into(), "rope_theta"),
            ("rms_norm_eps", 1e-3.into(), "rms_norm_eps"),
            ("hidden_act", "silu".into(), "hidden_act"),
            ("num_hidden_layers", 99.into(), "the node is missing"),
            ("num_hidden_layers", 1.into(), "`num_hidden_layers` is 2 in the graph and 1 in config.json"),
            ("intermediate_size", 64.into(), "expected"),
            ("vocab_size", 77.into(), "expected"),
        ] {
            assert_says(&edited(target, key, value), ErrorKind::InvalidModel, &[part]);
        }
    }
}

/// Codes that stand for no weight: the bytes of a matrix in the data file become all ones.
#[test]
fn code_3_is_refused() {
    for (name, target) in [
        ("nano-packed", Target::OnnxFast),
        ("nano-packed", Target::Onnx),
        ("qwen3-ternary/ptq1_0.gguf", Target::OnnxFast),
        ("qwen3-ternary/ptq1_0.gguf", Target::Onnx),
    ] {
        let file = exported(&Checkpoint::open(fixture(name)).unwrap(), &Options::new(target));
        let summary = Summary::read(file.path.join("model.onnx")).unwrap();
        let codes = summary
            .initializers
            .iter()
            .find(|tensor| tensor.name.starts_with("layers.0.down") && tensor.element == Element::U8);
        let (path, offset) = codes.unwrap().external.clone().unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        // Of what `MatMulNBits` holds 0 stands for the weight -2.
        bytes[offset as usize + 5] = if target == Target::Onnx { 0 } else { 0xff };
        std::fs::write(&path, bytes).unwrap();
        let error = open(&file.path).unwrap_err();
        println!("{error}");
        assert_says(&error, ErrorKind::InvalidModel, &["code"]);
    }
}

/// Bytes of a small file flipped and files cut, everywhere: errors or another model, never a panic.
#[test]
fn damaged_files_are_errors() {
    for (name, target) in [
        ("nano-packed", Target::OnnxFast),
        ("nano-packed", Target::Onnx),
        ("qwen3-ternary/ptq1_0.gguf", Target::Onnx),
    ] {
        let file = exported(&Checkpoint::open(fixture(name)).unwrap(), &Options::new(target));
        let path = file.path.join("model.onnx");
        let whole = std::fs::read(&path).unwrap();
        let (mut refused, mut accepted, mut state) = (0, 0, 7u64);
        let mut try_it = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            match open(&file.path) {
                Ok(_) => accepted += 1,
                Err(error) => {
                    let line = error.to_string();
                    assert!(!line.contains('\n') && line.len() < 1000, "{line}");
                    refused += 1;
                }
            }
        };
        for _ in 0..400 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let mut bytes = whole.clone();
            let at = (state >> 33) as usize % bytes.len();
            bytes[at] ^= 1 << (state >> 29 & 7);
            try_it(&bytes);
        }
        for cut in (0..whole.len()).step_by(whole.len() / 40 + 1) {
            try_it(&whole[..cut]);
        }
        println!("{name} {target}: {refused} refused, {accepted} read");
        assert!(refused > 100);
        std::fs::write(&path, &whole).unwrap();
        let data = file.path.join("model.onnx.data");
        let bytes = std::fs::read(&data).unwrap();
        std::fs::write(&data, &bytes[..bytes.len() / 2]).unwrap();
        assert_says(
            &open(&file.path).unwrap_err(),
            ErrorKind::InvalidModel,
            &["model.onnx.data", "of a file of"],
        );
    }
}
