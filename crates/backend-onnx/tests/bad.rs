//! Files of the fast variant that are damaged or do not agree with their configuration.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::path::Path;

use common::{Exported, exported, feed, fixtures, try_open};
use serde_json::Value;
use ternion_backend_onnx::{DecoderOptions, Library};
use ternion_engine::CausalLm;
use ternion_formats::convert::{Options, Target};

fn fast() -> Exported {
    exported(&fixtures().join("nano-packed"), &Options::new(Target::OnnxFast))
}

fn error(library: &Library, path: &Path) -> String {
    let error = try_open(library, path, DecoderOptions::default()).err().expect("refused").to_string();
    assert!(error.contains("model.onnx") && !error.contains('\n'), "{error}");
    error
}

#[test]
fn a_configuration_of_another_model_is_refused() {
    let Some(library) = common::library() else { return };
    for (key, value, words) in [
        ("vocab_size", 321, "the logits have 320 elements, but `vocab_size` in config.json is 321"),
        ("num_hidden_layers", 3, "the graph's attention has 2, but `num_hidden_layers` in config.json is 3"),
        (
            "num_key_value_heads",
            2,
            "the graph's attention has 1, but `num_key_value_heads` in config.json is 2",
        ),
        ("head_dim", 32, "the graph's attention has 64, but `head_dim` in config.json is 32"),
    ] {
        let file = fast();
        let config = file.path.join("config.json");
        let mut facts: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        facts[key] = value.into();
        std::fs::write(&config, facts.to_string()).unwrap();
        let error = error(&library, &file.path);
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn codes_that_stand_for_no_weight_are_refused() {
    let Some(library) = common::library() else { return };
    let file = fast();
    let path = file.path.join("model.onnx.data");
    let mut data = std::fs::read(&path).unwrap();
    // The codes of the last layer's last projection: the last whole page before the end that is not a norm or the head.
    let checkpoint = ternion_formats::Checkpoint::open(fixtures().join("nano-packed")).unwrap();
    let codes = checkpoint.layers[1].down.bytes();
    let at = (0..data.len()).step_by(4096).find(|at| data[*at..].starts_with(codes)).unwrap();
    data[at + 5] |= 0b1100;
    std::fs::write(&path, data).unwrap();
    let error = error(&library, &file.path);
    assert!(error.contains("byte 5 of matrix 1 holds the code 3"), "{error}");
}

#[test]
fn data_that_is_cut_is_refused_before_the_runtime_maps_it() {
    let Some(library) = common::library() else { return };
    let file = fast();
    let path = file.path.join("model.onnx.data");
    let length = std::fs::metadata(&path).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length - 1).unwrap();
    let error = error(&library, &file.path);
    assert!(error.contains(&format!("of a file of {} bytes", length - 1)), "{error}");
}

/// Bytes of the graph itself, one after the other: whatever is wrong, nothing panics and nothing hangs, and what is still
/// a decoder computes.
#[test]
fn a_damaged_graph_is_an_error_or_a_decoder() {
    let Some(library) = common::library() else { return };
    let file = fast();
    let path = file.path.join("model.onnx");
    let good = std::fs::read(&path).unwrap();
    let mut refused = 0;
    for at in (0..good.len()).step_by(good.len() / 150) {
        let mut bytes = good.clone();
        bytes[at] ^= 0x15;
        std::fs::write(&path, &bytes).unwrap();
        match try_open(&library, &file.path, DecoderOptions::default()) {
            Err(_) => refused += 1,
            Ok(mut model) => {
                let sequence = model.new_sequence().unwrap();
                if model.vocab_size() == 320 {
                    let mut logits = Vec::new();
                    let input = ternion_engine::SequenceInput {
                        sequence,
                        tokens: &[1, 2, 3],
                        logits: ternion_engine::LogitsWanted::Last,
                    };
                    if model.forward(&[input], &mut logits).is_ok() {
                        assert_eq!(logits.len(), 320);
                    }
                }
            }
        }
    }
    // Most of the bytes are letters of names, and another letter does no harm where it is another everywhere or nowhere.
    assert!(refused > 40, "only {refused} of 150 were refused");
    std::fs::write(&path, &good).unwrap();
    let mut model = try_open(&library, &file.path, DecoderOptions::default()).unwrap();
    let sequence = model.new_sequence().unwrap();
    feed(&mut model, sequence, &[1, 2, 3]);
}
