//! The checkpoints of `fixtures/` and of the folder that `TERNION_ORACLE` names, with what transformers computes on them.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;

pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) strict: bool,
    /// What transformers computed, `[tokens, vocab_size]`.
    pub(crate) logits: Vec<f32>,
    pub(crate) golden: Value,
}

pub(crate) fn checkpoints() -> Vec<PathBuf> {
    let mut roots = vec![ternion_test_support::fixtures()];
    roots.extend(ternion_test_support::oracle());
    let mut found: Vec<PathBuf> = roots
        .iter()
        .flat_map(|root| std::fs::read_dir(root).unwrap_or_else(|e| panic!("{}: {e}", root.display())))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("golden.json").is_file() && path.join("config.json").is_file())
        .collect();
    found.sort();
    assert!(found.len() >= 5, "the fixtures are missing: {found:?}");
    found
}

pub(crate) fn cases(checkpoint: &Path) -> Vec<Case> {
    let golden: Value =
        serde_json::from_slice(&std::fs::read(checkpoint.join("golden.json")).unwrap()).unwrap();
    let file = std::fs::read(checkpoint.join("golden.f32.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    golden["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| {
            let name = case["name"].as_str().unwrap().to_owned();
            let tensor = tensors.tensor(&format!("{name}.logits")).unwrap();
            let logits =
                tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            Case {
                ids: ids(&case["input_ids"]),
                strict: case["strict"] == true,
                logits,
                golden: case.clone(),
                name,
            }
        })
        .collect()
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

pub(crate) fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

pub(crate) fn argmax(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}
