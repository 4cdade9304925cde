//! Decoders that other tools made, in the layout of Hugging Face exports: `fixtures/onnx/`, whose expected logits and
//! continuations onnxruntime has computed in Python.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::path::{Path, PathBuf};

use common::{feed, fixtures, largest_difference, open, whole};
use serde_json::Value;
use ternion_backend_onnx::OnnxFactory;
use ternion_core::config::ModelConfig;
use ternion_core::registry::{BackendFactory, Progress};
use ternion_core::{FinishReason, GenerateRequest, Sampling};
use ternion_engine::CausalLm;

fn decoders() -> Vec<(PathBuf, Value)> {
    let entries = std::fs::read_dir(fixtures().join("onnx")).unwrap();
    let mut found: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .map(|path| {
            let golden = std::fs::read(path.join("golden.json")).unwrap();
            (path, serde_json::from_slice(&golden).unwrap())
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(found.len(), 4, "with and without grouped attention, caches of f32 and f16");
    found
}

fn ids(golden: &Value, key: &str) -> Vec<u32> {
    golden[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Logits lie within 10 here. The caches round keys and values to 11 bits, and so do the logits themselves.
fn tolerance(path: &Path) -> f32 {
    if path.ends_with("plain-f16") || path.ends_with("grouped-f16") { 0.05 } else { 1e-4 }
}

#[test]
fn logits_are_those_of_python() {
    let Some(library) = common::library() else { return };
    for (path, golden) in decoders() {
        let mut model = open(&library, &path, 2);
        let vocab = model.vocab_size();
        let logits = whole(&mut model, &ids(&golden, "input_ids"));
        let rows = golden["rows"].as_array().unwrap().iter().zip(golden["logits"].as_array().unwrap());
        for (row, expected) in rows {
            let row = row.as_u64().unwrap() as usize;
            let expected: Vec<f32> =
                expected.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
            let difference = largest_difference(&logits[row * vocab..(row + 1) * vocab], &expected);
            println!("{}: row {row}: {difference:.1e}", path.display());
            assert!(difference <= tolerance(&path) / 10.0, "{}: row {row}: {difference}", path.display());
        }
    }
}

/// Past the sizes at which a buffer grows, whole and token by token, and on a fork.
#[test]
fn long_sequences_grow_their_caches() {
    let Some(library) = common::library() else { return };
    for (path, _) in decoders() {
        let mut model = open(&library, &path, 1);
        let vocab = model.vocab_size();
        let tokens: Vec<u32> = (0..200u32).map(|i| i * 7919 % vocab as u32).collect();
        let expected = whole(&mut model, &tokens);
        let sequence = model.new_sequence().unwrap();
        let mut logits = feed(&mut model, sequence, &tokens[..50]);
        for token in &tokens[50..140] {
            logits.extend(feed(&mut model, sequence, &[*token]));
        }
        let fork = model.fork(sequence, 100).unwrap();
        // The fork's own tokens must not reach its source.
        feed(&mut model, fork, &[1, 2, 3]);
        logits.extend(feed(&mut model, sequence, &tokens[140..]));
        let difference = largest_difference(&logits, &expected);
        assert!(difference <= tolerance(&path), "{}: {difference}", path.display());
        model.truncate(fork, 100).unwrap();
        let rest = feed(&mut model, fork, &tokens[100..]);
        let difference = largest_difference(&rest, &expected[100 * vocab..]);
        assert!(difference <= tolerance(&path), "{}: on a fork: {difference}", path.display());
    }
}

#[tokio::test]
async fn they_generate() {
    let Some(_) = common::library() else { return };
    for (path, golden) in decoders() {
        let config = ModelConfig::for_path(&path);
        let model = OnnxFactory.load("example", &config, Progress::none()).await.unwrap();
        let info = model.info();
        assert_eq!((&*info.backend, &*info.architecture), ("onnx", "example"));
        assert_eq!((&*info.format, info.limits.context_length), ("onnx (exported)", 256));
        let expected = ids(&golden, "greedy");
        let mut request = GenerateRequest::new(ids(&golden, "input_ids"))
            .with_max_tokens(expected.len())
            .with_sampling(Sampling::greedy());
        request.ignore_eos = true;
        let answer = model.generate(request).await.unwrap().collect().await.unwrap();
        assert_eq!(answer.tokens, expected, "{}", path.display());
        assert_eq!(answer.finish_reason, FinishReason::MaxTokens);
    }
}

#[tokio::test]
async fn what_cannot_be_loaded_says_why() {
    let Some(_) = common::library() else { return };
    let load = async |config: &ModelConfig| {
        OnnxFactory.load("m", config, Progress::none()).await.err().unwrap().to_string()
    };
    let error = load(&ModelConfig::for_path(fixtures().join("nano-packed"))).await;
    assert!(error.contains("holds no model") && error.contains("model.onnx"), "{error}");

    let mut config = ModelConfig::for_path(fixtures().join("onnx/plain-f32"));
    config.context = Some(257);
    let error = load(&config).await;
    assert!(error.contains("context: 257 is out of range; at most 256"), "{error}");

    config.context = None;
    config.options.insert("library".into(), "/another/libonnxruntime.so".into());
    let error = load(&config).await;
    assert!(error.contains("options.library") && error.contains("has loaded"), "{error}");

    config.options.insert("libary".into(), "x".into());
    let error = load(&config).await;
    assert!(error.contains("libary") && error.contains("library"), "{error}");

    // The configuration beside the graph is about another model.
    for (key, value, words) in [
        ("vocab_size", 321, "the logits have 320 elements, but `vocab_size` in config.json is 321"),
        ("num_hidden_layers", 3, "has 4 inputs for past keys and values, but `num_hidden_layers`"),
        ("num_key_value_heads", 4, "has 2 for `num_key_value_heads`, but config.json says 4"),
        ("head_dim", 8, "has 16 for `head_dim`, but config.json says 8"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let from = fixtures().join("onnx/plain-f32");
        for file in ["model.onnx", "tokenizer.json"] {
            std::fs::copy(from.join(file), folder.path().join(file)).unwrap();
        }
        let mut facts: Value =
            serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
        facts[key] = value.into();
        std::fs::write(folder.path().join("config.json"), facts.to_string()).unwrap();
        let error = load(&ModelConfig::for_path(folder.path())).await;
        assert!(error.contains(words), "{key}: {error}");
    }
}
