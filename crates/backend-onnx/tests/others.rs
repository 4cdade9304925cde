//! Decoders that other tools made, in the layout of Hugging Face exports: `fixtures/onnx/`, whose expected logits and
//! continuations onnxruntime has computed in Python.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::path::{Path, PathBuf};

use common::{feed, fixtures, largest_difference, open, whole};
use serde_json::Value;

use ternion_core::config::ModelConfig;
use ternion_core::registry::{BackendFactory, Progress};
use ternion_core::{FinishReason, GenerateRequest, Sampling};
use ternion_engine::CausalLm;
use ternion_formats::onnx::Host;

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
    assert_eq!(
        found.len(),
        5,
        "with and without grouped attention, caches of f32 and f16; two graphs in one"
    );
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
        let model = ternion_backend_onnx::factory().load("example", &config, Progress::none()).await.unwrap();
        let info = model.info();
        assert_eq!((&*info.backend, &*info.architecture), ("onnx", "example"));
        assert_eq!((&*info.format, info.limits.context_length), ("onnx (exported)", 256));
        let expected = ids(&golden, "greedy");
        let mut request = GenerateRequest::new(ids(&golden, "input_ids"))
            .with_max_tokens(expected.len())
            .with_sampling(Sampling::greedy());
        request.params.ignore_eos = true;
        let answer = model.generate(request).await.unwrap().collect().await.unwrap();
        assert_eq!(answer.tokens, expected, "{}", path.display());
        assert_eq!(answer.finish_reason, FinishReason::MaxTokens);
    }
}

/// Copies the tokenizer and, as `model`, the graph of a fixture into a folder.
fn copy(from: &str, folder: &Path, model: &str) {
    let from = fixtures().join("onnx").join(from);
    let model = folder.join(model);
    std::fs::create_dir_all(model.parent().unwrap()).unwrap();
    std::fs::copy(from.join("model.onnx"), model).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(file), folder.join(file)).unwrap();
    }
}

#[tokio::test]
async fn folders_that_hold_only_a_variant_run() {
    let Some(_) = common::library() else { return };
    for (names, expected) in [
        (&["onnx/model_q4.onnx", "onnx/model_quantized.onnx"][..], Some("onnx/model_quantized.onnx")),
        (&["model_q4f16.onnx", "onnx/model_fp16.onnx"], Some("onnx/model_fp16.onnx")),
        (&["onnx/decoder_model_merged_quantized.onnx"], Some("onnx/decoder_model_merged_quantized.onnx")),
        (&["onnx/anything.onnx"], Some("onnx/anything.onnx")),
        (&["one.onnx", "onnx/two.onnx"], None),
    ] {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            copy("plain-f32", folder.path(), name);
        }
        std::fs::copy(fixtures().join("onnx/plain-f32/config.json"), folder.path().join("config.json"))
            .unwrap();
        let host = Host::open(folder.path());
        let Some(expected) = expected else {
            let error = host.unwrap_err().to_string();
            assert!(error.contains("2 .onnx files") && error.contains("`one.onnx`, `two.onnx`"), "{error}");
            continue;
        };
        assert_eq!(host.unwrap().model, folder.path().join(expected));
        let config = ModelConfig::for_path(folder.path());
        ternion_backend_onnx::factory().load("m", &config, Progress::none()).await.unwrap();
    }
}

/// What onnxruntime-genai's model builder writes has a configuration of its own.
#[tokio::test]
async fn genai_folders_run() {
    let Some(_) = common::library() else { return };
    let folder = tempfile::tempdir().unwrap();
    copy("grouped-f32", folder.path(), "weights.onnx");
    let golden: Value =
        serde_json::from_slice(&std::fs::read(fixtures().join("onnx/grouped-f32/golden.json")).unwrap())
            .unwrap();
    let expected = ids(&golden, "greedy");
    let write = |config: &Value| {
        std::fs::write(folder.path().join("genai_config.json"), config.to_string()).unwrap();
    };
    let mut config = serde_json::json!({
        "model": {
            "bos_token_id": 304, "context_length": 128, "eos_token_id": [expected[3]], "pad_token_id": 305,
            "type": "llama", "vocab_size": 320,
            "decoder": {
                "filename": "weights.onnx", "head_size": 16, "hidden_size": 64, "num_attention_heads": 4,
                "num_hidden_layers": 2, "num_key_value_heads": 2,
                "inputs": {
                    "input_ids": "input_ids", "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"
                },
                "outputs": {
                    "logits": "logits", "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value"
                }
            }
        },
        "search": { "do_sample": true, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "max_length": 128 }
    });
    write(&config);
    let model = ternion_backend_onnx::factory()
        .load("m", &ModelConfig::for_path(folder.path()), Progress::none())
        .await
        .unwrap();
    let info = model.info();
    assert_eq!((&*info.architecture, info.limits.context_length), ("llama", 128));
    assert_eq!((info.defaults.temperature, info.defaults.top_k, info.defaults.top_p), (0.5, 7, 0.9));
    let request = GenerateRequest::new(ids(&golden, "input_ids"))
        .with_max_tokens(expected.len())
        .with_sampling(Sampling::greedy());
    let answer = model.generate(request).await.unwrap().collect().await.unwrap();
    assert_eq!(answer.finish_reason, FinishReason::EndOfSequence, "the token of genai_config.json ends it");
    let end = expected.iter().position(|id| *id == expected[3]).unwrap();
    assert_eq!(answer.tokens[..end], expected[..end]);

    let load = async |config: &Value| {
        write(config);
        let config = ModelConfig::for_path(folder.path());
        ternion_backend_onnx::factory().load("m", &config, Progress::none()).await.err().unwrap().to_string()
    };
    let decoder = |config: &mut Value, key: &str, value: Value| config["model"]["decoder"][key] = value;
    let original = config.clone();
    decoder(&mut config, "filename", "../weights.onnx".into());
    let error = load(&config).await;
    assert!(error.contains("model.decoder.filename") && error.contains("genai_config.json"), "{error}");
    config = original.clone();
    decoder(&mut config, "inputs", serde_json::json!({ "input_ids": "ids" }));
    let error = load(&config).await;
    assert!(error.contains("has no input `ids`"), "{error}");
    config = original.clone();
    decoder(&mut config, "inputs", serde_json::json!({ "past_names": "past_%d" }));
    let error = load(&config).await;
    assert!(error.contains("past_names") && error.contains("separate keys and values"), "{error}");
    config = original;
    config["model"].as_object_mut().unwrap().remove("context_length");
    let error = load(&config).await;
    assert!(error.contains("genai_config.json says how long"), "{error}");
}

#[tokio::test]
async fn what_cannot_be_loaded_says_why() {
    let Some(_) = common::library() else { return };
    let load = async |config: &ModelConfig| {
        ternion_backend_onnx::factory().load("m", config, Progress::none()).await.err().unwrap().to_string()
    };
    let error = load(&ModelConfig::for_path(fixtures().join("nano-packed"))).await;
    assert!(error.contains("holds no model") && error.contains("model.onnx"), "{error}");
    assert!(error.contains("`model.safetensors` is for the backends `candle` and `llama-cpp`"), "{error}");
    let error = load(&ModelConfig::for_path(fixtures().join("gguf-ternary/qwen3.gguf"))).await;
    assert!(error.contains("is a GGUF file") && error.contains("`llama-cpp`"), "{error}");

    let mut config = ModelConfig::for_path(fixtures().join("onnx/plain-f32"));
    config.context_length = Some(257);
    let error = load(&config).await;
    assert!(error.contains("context_length: 257 is out of range; at most 256"), "{error}");

    config.context_length = None;
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
