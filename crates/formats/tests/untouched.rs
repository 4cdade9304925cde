//! Checkpoints that are opened without touching their maps: the same model, the same refusals.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::fs;
use std::path::{Path, PathBuf};

use ternion_core::ErrorKind;
use ternion_formats::Checkpoint;
use ternion_test_support::fixture;

fn open_within(path: &Path, memory: u64) -> ternion_core::Result<Checkpoint> {
    Checkpoint::open_within(path, memory, &mut |_, _| {})
}

fn all() -> [PathBuf; 8] {
    [
        "nano-packed",
        "tiny-packed",
        "nano-master",
        "llama-ternary",
        "1bitllm/model.safetensors",
        "gguf/bitnet-tq.gguf",
        "gguf/llama-tq.gguf",
        "gguf-llama/model.gguf",
    ]
    .map(fixture)
}

#[test]
fn the_same_tensors_are_read() {
    for path in all() {
        let touched = Checkpoint::open(&path).unwrap();
        let untouched = open_within(&path, u64::MAX).unwrap();
        assert_eq!(touched.report(), untouched.report(), "{}", path.display());
        assert_eq!(touched.spec, untouched.spec);
        let bytes = |c: &Checkpoint| {
            let linears = c.layers.iter().flat_map(ternion_formats::LayerTensors::linears);
            let all = linears
                .filter_map(ternion_formats::Linear::bytes)
                .chain([&c.embed, c.head_or_embed()].into_iter().filter_map(ternion_formats::Table::bytes));
            all.map(|b| b.loaded().unwrap().to_vec()).collect::<Vec<_>>()
        };
        assert!(bytes(&touched) == bytes(&untouched), "{}", path.display());
    }
}

#[test]
fn what_must_be_converted_is_refused_where_there_is_no_memory_for_it() {
    let mut refused = 0;
    for path in all() {
        let owned = open_within(&path, u64::MAX)
            .unwrap()
            .layers
            .iter()
            .any(|layer| layer.linears().iter().any(|linear| !linear.is_mapped()));
        match open_within(&path, 1000) {
            Ok(_) => assert!(!owned, "{}", path.display()),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
                let said = error.to_string();
                assert!(said.contains("tensor: ") && said.contains("ternion convert"), "{said}");
                refused += 1;
            }
        }
    }
    assert!(refused >= 4, "masters and TQ2_0 among them: {refused}");
}

#[test]
fn damage_is_found_as_ever() {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("nano-packed")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let weights = folder.path().join("model.safetensors");
    let good = fs::read(&weights).unwrap();
    let step = good.len() / 40;
    let mut found = 0;
    for at in (good.len() / 10..good.len() - 8).step_by(step) {
        let mut bad = good.clone();
        bad[at..at + 8].fill(0xff);
        fs::write(&weights, &bad).unwrap();
        let (touched, untouched) = (Checkpoint::open(folder.path()), open_within(folder.path(), u64::MAX));
        let message = |result: ternion_core::Result<Checkpoint>| result.err().map(|e| e.to_string());
        let (touched, untouched) = (message(touched), message(untouched));
        assert_eq!(touched, untouched, "byte {at}");
        found += usize::from(touched.is_some());
    }
    assert!(found > 20, "{found}");
}
