//! Checkpoints of which some projections are ternary and others hold floats, on all engines.
//!
//! `fixtures/mixed` has the logits of a reference in double precision for `fixtures/nano-packed` with such projections. The
//! checkpoints are built here: the weights of a projection are its trits times its scale, which each float type holds exactly.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde_json::Value;
use ternion::LogitsRequest;
use ternion::config::{Config, ModelConfig};
use ternion::formats::{
    Checkpoint,
    convert::{Options, Target, convert},
};
use ternion_test_support::fixture;

const PROJECTIONS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// No activation of the cases lies near a rounding tie, so what is left is the rounding of sums.
const TOLERANCE: f32 = 1e-3;

struct Case {
    name: String,
    masks: Vec<i64>,
    ids: Vec<u32>,
    logits: Vec<f32>,
}

fn cases() -> Vec<Case> {
    let file = std::fs::read(fixture("mixed/golden.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let data = |name: String| tensors.tensor(&name).unwrap().data().to_vec();
    let integers =
        |name| data(name).as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect::<Vec<i64>>();
    let names = tensors.names().into_iter().filter_map(|name| name.strip_suffix(".masks"));
    let cases = names.map(|name| Case {
        masks: integers(format!("{name}.masks")),
        ids: integers(format!("{name}.ids")).into_iter().map(|id| id as u32).collect(),
        logits: data(format!("{name}.logits")).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        name: name.to_owned(),
    });
    cases.collect()
}

fn bf16(bytes: &[u8]) -> f32 {
    half::bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32()
}

/// The weights of a packed projection in a float type.
fn floats(packed: &[u8], cols: usize, scale: f32, dtype: Dtype) -> Vec<u8> {
    let quarter = packed.len() / cols;
    let weight = |row: usize, col: usize| {
        let code = packed[row % quarter * cols + col] >> (2 * (row / quarter)) & 3;
        (f32::from(code) - 1.0) * scale
    };
    let all = (0..4 * quarter).flat_map(|row| (0..cols).map(move |col| weight(row, col)));
    match dtype {
        Dtype::F32 => all.flat_map(f32::to_le_bytes).collect(),
        Dtype::F16 => all.flat_map(|w| half::f16::from_f32(w).to_le_bytes()).collect(),
        _ => all.flat_map(|w| half::bf16::from_f32(w).to_le_bytes()).collect(),
    }
}

/// Writes `fixtures/nano-packed` to `folder` with the projections of `masks` as floats.
fn write(folder: &Path, masks: &[i64], dtype: Dtype) {
    let source = fixture("nano-packed");
    for name in ["generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(source.join(name), folder.join(name)).unwrap();
    }
    let file = std::fs::read(source.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut out: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, t)| (name.to_owned(), (t.dtype(), t.shape().to_vec(), t.data().to_vec())))
        .collect();
    let mut modules = vec!["lm_head".to_owned()];
    for (layer, mask) in masks.iter().enumerate() {
        for (_, projection) in PROJECTIONS.iter().enumerate().filter(|(i, _)| mask >> i & 1 == 1) {
            let module = format!("model.layers.{layer}.{projection}");
            let (_, shape, packed) = out.remove(&format!("{module}.weight")).unwrap();
            let (_, _, scale) = out.remove(&format!("{module}.weight_scale")).unwrap();
            let weights = floats(&packed, shape[1], bf16(&scale), dtype);
            out.insert(format!("{module}.weight"), (dtype, vec![4 * shape[0], shape[1]], weights));
            modules.push(module);
        }
    }
    let views = out.iter().map(|(name, (dtype, shape, bytes))| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    std::fs::write(folder.join("model.safetensors"), serialize(views, None).unwrap()).unwrap();
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    config["quantization_config"]["modules_to_not_convert"] = modules.into();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

async fn check(backend: &str, path: &Path, case: &Case, threads: usize) {
    let mut config = ModelConfig::for_path(path);
    backend.clone_into(&mut config.backend);
    config.threads = Some(threads);
    let model = ternion::load(&Config::single("mixed", config), None).await.unwrap();
    // Twice, and one token at a time: llama.cpp computes some graphs again instead of making new ones.
    for _ in 0..2 {
        let logits = model.logits(LogitsRequest::new(case.ids.clone())).await.unwrap();
        let difference = logits.iter().zip(&case.logits).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert_eq!(logits.len(), case.logits.len());
        assert!(difference <= TOLERANCE, "{} on {backend} with {threads} threads: {difference}", case.name);
    }
    let vocab = model.info().limits.vocab_size;
    for length in 1..=case.ids.len() {
        let mut request = LogitsRequest::new(case.ids[..length].to_vec());
        request.start = length - 1;
        let logits = model.logits(request).await.unwrap();
        let expected = &case.logits[(length - 1) * vocab..length * vocab];
        let difference = logits.iter().zip(expected).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(difference <= TOLERANCE, "{} on {backend}, token {length}: {difference}", case.name);
    }
}

async fn check_all(backend: &str) {
    let all = cases();
    assert!(all.len() >= 28, "{}", all.len());
    for (i, case) in all.iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let dtype = [Dtype::BF16, Dtype::F16, Dtype::F32][i % 3];
        write(folder.path(), &case.masks, dtype);
        let path = if backend == "onnx" {
            let target = folder.path().join("onnx");
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            convert(&checkpoint, &target, &Options::new(Target::OnnxFast), &mut |_, _| {}).unwrap();
            target
        } else {
            folder.path().to_owned()
        };
        check(backend, &path, case, 1 + i % 3).await;
    }
}

#[cfg(feature = "candle")]
#[tokio::test]
async fn candle_computes_mixtures() {
    check_all("candle").await;
}

#[cfg(feature = "llama-cpp")]
#[tokio::test]
async fn llama_cpp_computes_mixtures() {
    check_all("llama-cpp").await;
}

#[cfg(feature = "onnx")]
#[tokio::test]
async fn onnx_computes_mixtures() {
    if std::env::var_os("ORT_DYLIB_PATH").is_none_or(|path| path.is_empty()) {
        eprintln!("skipped: ORT_DYLIB_PATH names no ONNX Runtime; `cargo xtask test` sets it");
        return;
    }
    check_all("onnx").await;
}
