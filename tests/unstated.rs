//! Files that leave facts out, on every engine: the logits are those that transformers computed for the model.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "oracle/cases.rs"]
#[allow(dead_code, reason = "other test files use the rest")]
mod cases;

use std::collections::BTreeMap;
use std::path::Path;

use cases::{cases, largest_difference};
use serde_json::{Value, json};
use ternion::config::{Config, ModelConfig};
use ternion::formats::convert::{Options, Target, convert};
use ternion::formats::gguf::{File, TensorType, Writer};
use ternion::formats::{Checkpoint, Weights};
use ternion::{ErrorKind, LogitsRequest};
use ternion_kernels::unpack;
use ternion_test_support::fixture;

/// What strict cases are held to, absolutely.
const TOLERANCE: f32 = 1e-3;

const BACKENDS: &[&str] = if cfg!(feature = "llama-cpp") { &["candle", "llama-cpp"] } else { &["candle"] };

async fn logits(path: &Path, backend: &str, options: &Value, ids: &[u32]) -> ternion::Result<Vec<f32>> {
    let mut config = ModelConfig::for_path(path);
    config.backend = backend.to_owned();
    config.threads = Some(1); // tests run side by side
    config.options = options.as_object().unwrap().clone();
    let model = ternion::load(&Config::single("model", config), None).await?;
    model.logits(LogitsRequest::new(ids.to_vec())).await
}

/// Asserts that the strict cases of the fixture `of` have their logits with the model at `path`, on all engines.
async fn assert_golden(path: &Path, of: &str, options: Value) {
    for backend in BACKENDS {
        let mut strict = 0;
        for case in cases(&fixture(of)).iter().filter(|case| case.strict).take(3) {
            strict += 1;
            let found = logits(path, backend, &options, &case.ids).await.unwrap();
            let difference = largest_difference(&found, &case.logits);
            assert!(difference <= TOLERANCE, "{backend} {options} {}: {difference}", case.name);
        }
        assert!(strict > 0, "no strict case");
    }
}

/// How projections are written: their type and the bytes of weights `-1`, 0 and 1 with this width and scale.
type Projections = (TensorType, fn(&[i8], usize, f32) -> Vec<u8>);

/// Writes the fixture as GGUF under another architecture's name, without its activation.
fn write(of: &str, out: &Path, architecture: &str, target: Target, projections: Option<Projections>) {
    let checkpoint = Checkpoint::open(fixture(of)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("x.gguf");
    convert(&checkpoint, &source, &Options::new(target), &mut |_, _| {}).unwrap();
    let file = File::open(&source).unwrap();
    let own = file.architecture().unwrap().to_owned();

    let mut writer = Writer::new();
    for (key, value) in file.metadata() {
        if !key.starts_with("ternion.") && !key.ends_with(".hidden_activation") {
            let key = key.replacen(&format!("{own}."), &format!("{architecture}."), 1);
            writer.set(key, value.clone());
        }
    }
    writer.set("general.architecture", architecture);
    writer.set("general.name", "model");
    let names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
    let mut written = BTreeMap::new();
    for (index, layer) in checkpoint.layers.iter().enumerate() {
        for (name, linear) in names.iter().zip(layer.linears()) {
            let (Weights::Ternary(tensor), Some((kind, encode))) = (&linear.weights, projections) else {
                continue;
            };
            let bytes = encode(&unpack(tensor.view().unwrap()), tensor.cols, tensor.scale);
            written.insert(format!("blk.{index}.{name}.weight"), (kind, bytes));
        }
    }
    for tensor in file.tensors() {
        let kind = written.get(&tensor.name).map_or(tensor.kind, |(kind, _)| *kind);
        writer.tensor(&tensor.name, kind, &tensor.dims).unwrap();
    }
    let mut data = writer.begin(std::fs::File::create(out).unwrap()).unwrap();
    for tensor in file.tensors() {
        let mapped = file.data(tensor);
        let bytes = written.get(&tensor.name).map_or(&mapped[..], |(_, bytes)| bytes);
        data.tensor(&tensor.name, |out| out.write_all(bytes)).unwrap();
    }
    data.finish().unwrap();
}

fn floats(trits: &[i8], scale: f32) -> impl Iterator<Item = f32> {
    trits.iter().map(move |&trit| f32::from(trit) * scale)
}

fn as_f32(trits: &[i8], _: usize, scale: f32) -> Vec<u8> {
    floats(trits, scale).flat_map(f32::to_le_bytes).collect()
}

fn as_bf16(trits: &[i8], _: usize, scale: f32) -> Vec<u8> {
    floats(trits, scale).flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect()
}

/// I2_S with `place` of a weight in row and column: its byte and its field.
fn i2s(trits: &[i8], cols: usize, scale: f32, place: fn(usize, usize, usize) -> (usize, usize)) -> Vec<u8> {
    let mut out = vec![0; trits.len() / 4 + 32];
    for (i, trit) in trits.iter().enumerate() {
        let (byte, field) = place(i / cols, i % cols, cols);
        out[byte] |= ((trit + 1) as u8) << (6 - 2 * field);
    }
    out[trits.len() / 4..][..4].copy_from_slice(&scale.to_le_bytes());
    out
}

fn on_arm(trits: &[i8], cols: usize, scale: f32) -> Vec<u8> {
    i2s(trits, cols, scale, |row, col, cols| (row * cols / 4 + col / 64 * 16 + col % 16, col % 64 / 16))
}

fn four_rows(trits: &[i8], cols: usize, scale: f32) -> Vec<u8> {
    i2s(trits, cols, scale, |row, col, cols| (row / 4 * cols + col, row % 4))
}

#[tokio::test]
async fn a_gguf_without_activation_has_that_of_its_signs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    for architecture in ["bitnet", "bitnet-b1.58", "bitnet-25"] {
        write("tiny-packed", &path, architecture, Target::GgufTq2, None);
        assert_golden(&path, "tiny-packed", json!({})).await;
        assert_golden(&path, "tiny-packed", json!({"activation": "relu2", "sub_norms": true})).await;
    }
    // Of a single token, the rotary base changes nothing.
    let ids = cases(&fixture("tiny-packed")).into_iter().map(|case| case.ids).max_by_key(Vec::len).unwrap();
    for backend in BACKENDS {
        let right = logits(&path, backend, &json!({}), &ids).await.unwrap();
        for other in
            [json!({"activation": "silu"}), json!({"sub_norms": false}), json!({"rope_theta": 100.0})]
        {
            let found = logits(&path, backend, &other, &ids).await.unwrap();
            assert!(largest_difference(&found, &right) > 0.1, "{backend}: {other} changes nothing");
        }
        let error = logits(&path, backend, &json!({"activation": "gelu"}), &ids).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(error.to_string().contains("options.activation"), "{error}");
    }
}

#[tokio::test]
async fn float_projections_of_a_bitnet_are_computed_as_ternary_ones() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let forms: [Projections; 2] = [(TensorType::F32, as_f32), (TensorType::Bf16, as_bf16)];
    for form in forms {
        write("nano-packed", &path, "bitnet-b1.58", Target::GgufI2s, Some(form));
        assert_golden(&path, "nano-packed", json!({})).await;
    }
}

#[tokio::test]
async fn i2s_of_other_builds_needs_the_option() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let forms: [(&str, Projections); 2] =
        [("arm", (TensorType::I2S, on_arm)), ("x86-4rows", (TensorType::I2S, four_rows))];
    for (layout, form) in forms {
        write("nano-packed", &path, "bitnet-b1.58", Target::GgufI2s, Some(form));
        assert_golden(&path, "nano-packed", json!({"i2s_layout": layout})).await;
        let case = &cases(&fixture("nano-packed"))[0];
        let unset = logits(&path, "candle", &json!({}), &case.ids).await.unwrap();
        assert!(largest_difference(&unset, &case.logits) > 0.1);
    }
}

/// A file that llama.cpp itself computes takes these facts from the file.
#[cfg(feature = "llama-cpp")]
#[tokio::test]
async fn options_that_cannot_be_applied_are_refused() {
    let path = fixture("gguf-llama/model.gguf");
    let error = logits(&path, "llama-cpp", &json!({"activation": "relu2"}), &[1]).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.to_string().contains("options.activation: applies to ternary checkpoints"), "{error}");
}
