//! What we export is what the tools of ONNX accept and what onnxruntime in Python computes.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{cases_of, exported, fixtures, largest_difference, open, whole};
use serde_json::Value;
use ternion_formats::convert::{Options, Target};

/// A Python with the packages of ONNX: the one that `cargo xtask setup` makes, else the system's.
fn python() -> Option<PathBuf> {
    let imports = ["-c", "import numpy, onnx, onnxruntime"];
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/bin/python");
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map(|target| Path::new(&target).join("tools/bin/python"));
    let found = target
        .into_iter()
        .chain([tools, "python3".into()])
        .find(|program| Command::new(program).args(imports).output().is_ok_and(|out| out.status.success()));
    if found.is_none() {
        common::skipped("Python has no packages onnx, onnxruntime and numpy");
    }
    found
}

#[test]
fn python_accepts_the_portable_variant_and_gives_the_same_logits() {
    let Some(library) = common::library() else { return };
    let Some(python) = python() else { return };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/portable.py");
    for (name, golden) in [
        ("tiny-packed", "tiny-packed"),
        ("llama-ternary", "llama-ternary"),
        ("1bitllm", "1bitllm"),
        ("nano-master", "nano-master"),
        ("qwen3-ternary/ptq1_0.gguf", "qwen3-ternary/hf"),
        ("qwen3-binary/q1_0.gguf", "qwen3-binary/hf"),
    ] {
        let file = exported(&fixtures().join(name), &Options::new(Target::Onnx));
        let mut model = open(&library, &file.path, 2);
        let cases = cases_of(&fixtures().join(golden));
        for case in cases.iter().filter(|case| case.strict && case.ids.len() > 8).take(2) {
            let (ids, target) = (file.folder.path().join("ids.json"), file.folder.path().join("logits.bin"));
            std::fs::write(&ids, serde_json::to_string(&case.ids).unwrap()).unwrap();
            let out = Command::new(&python).arg(&script).args([&file.path, &ids, &target]).output().unwrap();
            assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
            let theirs: Vec<f32> = std::fs::read(&target)
                .unwrap()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect();
            let difference = largest_difference(&whole(&mut model, &case.ids), &theirs);
            println!("{name} {}: {difference:.1e}", case.name);
            assert!(difference <= 1e-4, "{name} {}: {difference}", case.name);
        }
    }
}

#[test]
fn python_finds_both_variants_well_formed() {
    let Some(python) = python() else { return };
    for variant in [Target::OnnxFast, Target::Onnx] {
        for name in ["tiny-packed", "qwen3-ternary/ptq1_0.gguf"] {
            let file = exported(&fixtures().join(name), &Options::new(variant));
            let program = "import onnx, sys; onnx.checker.check_model(sys.argv[1])";
            let model = file.path.join("model.onnx");
            let out = Command::new(&python).args(["-c", program]).arg(model).output().unwrap();
            assert!(out.status.success(), "{name} {variant:?}: {}", String::from_utf8_lossy(&out.stderr));
        }
    }
}

/// Exports in 4 bits (MatMulNBits), with and without GroupQueryAttention.
#[test]
fn quantised_exports_run() {
    let Some(library) = common::library() else { return };
    let Some(python) = python() else { return };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/quantised.py");
    for name in ["grouped-f32", "plain-f32"] {
        let source = fixtures().join("onnx").join(name);
        let folder = tempfile::tempdir().unwrap();
        let out = Command::new(&python).arg(&script).args([&source, folder.path()]).output().unwrap();
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        let rows: Vec<Vec<f32>> = serde_json::from_slice(&out.stdout).unwrap();
        let golden: Value =
            serde_json::from_slice(&std::fs::read(source.join("golden.json")).unwrap()).unwrap();
        let ids: Vec<u32> = serde_json::from_value(golden["input_ids"].clone()).unwrap();
        let mut model = open(&library, folder.path(), 2);
        let difference = largest_difference(&whole(&mut model, &ids), &rows.concat());
        println!("{name} in 4 bits: {difference:.1e}");
        assert!(difference <= 1e-4, "{name}: {difference}");
    }
}
