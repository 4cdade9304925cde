//! Files of the fast variant that are damaged or do not agree with their configuration.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::path::Path;

use common::{Exported, exported, feed, fixtures, try_open};
use serde_json::Value;
use ternion_backend_onnx::{DecoderOptions, Library};
use ternion_engine::{CausalLm, ComputeThreads};
use ternion_formats::convert::{Options, Target};

fn fast() -> Exported {
    exported(&fixtures().join("nano-packed"), &Options::new(Target::OnnxFast))
}

fn grouped() -> Exported {
    exported(&fixtures().join("qwen3-ternary/ptq1_0.gguf"), &Options::new(Target::OnnxFast))
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
    let codes = checkpoint.layers[1].down.bytes().unwrap();
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
                    let input = ternion_engine::SequenceInput::new(
                        sequence,
                        &[1, 2, 3],
                        ternion_engine::LogitsWanted::Last,
                    );
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

/// A field of a protobuf message: its number, its wire type and its bytes without number and length.
type Field = (u64, u8, Vec<u8>);

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 127 {
        bytes.push(value as u8 & 127 | 128);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn fields(mut bytes: &[u8]) -> Vec<Field> {
    fn read(bytes: &mut &[u8]) -> u64 {
        let end = bytes.iter().position(|b| *b < 128).unwrap() + 1;
        let (number, rest) = bytes.split_at(end);
        *bytes = rest;
        number.iter().rev().fold(0, |value, b| value << 7 | u64::from(b & 127))
    }
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = read(&mut bytes);
        let value = match key & 7 {
            0 => varint(read(&mut bytes)),
            kind => {
                let length = [0, 8, read_length(kind, &mut bytes, read), 0, 0, 4][kind as usize];
                let (value, rest) = bytes.split_at(length);
                bytes = rest;
                value.to_vec()
            }
        };
        found.push((key >> 3, (key & 7) as u8, value));
    }
    found
}

fn read_length(kind: u64, bytes: &mut &[u8], read: fn(&mut &[u8]) -> u64) -> usize {
    if kind == 2 { read(bytes) as usize } else { 0 }
}

fn message(fields: &[Field]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, kind, value) in fields {
        bytes.extend(varint(number << 3 | u64::from(*kind)));
        if *kind == 2 {
            bytes.extend(varint(value.len() as u64));
        }
        bytes.extend(value);
    }
    bytes
}

/// The file with the attribute `name` of the last node of the operator `operator` changed by `change`, or without it.
fn with_attribute(good: &[u8], operator: &str, name: &str, change: Option<&dyn Fn(&mut Field)>) -> Vec<u8> {
    let mut model = fields(good);
    let graph = &mut model.iter_mut().find(|f| f.0 == 7).unwrap().2;
    let mut parts = fields(graph);
    let is = |node: &[u8]| fields(node).iter().any(|f| f.0 == 4 && f.2 == operator.as_bytes());
    let has = |attribute: &[u8]| fields(attribute).iter().any(|f| f.0 == 1 && f.2 == name.as_bytes());
    let node = parts
        .iter_mut()
        .rev()
        .find(|f| f.0 == 1 && is(&f.2) && fields(&f.2).iter().any(|f| f.0 == 5 && has(&f.2)));
    let node = &mut node.unwrap_or_else(|| panic!("{operator} {name}")).2;
    let mut node_fields = fields(node);
    match change {
        None => node_fields.retain(|f| f.0 != 5 || !has(&f.2)),
        Some(change) => {
            let attribute = &mut node_fields.iter_mut().find(|f| f.0 == 5 && has(&f.2)).unwrap().2;
            let mut values = fields(attribute);
            // Fields 2, 3, 4 and 7 are a float, an integer, a string and floats.
            values.iter_mut().filter(|f| [2, 3, 4, 7].contains(&f.0)).for_each(change);
            *attribute = message(&values);
        }
    }
    *node = message(&node_fields);
    *graph = message(&parts);
    message(&model)
}

/// Asserts that a graph is refused by an error that names the operator and the attribute.
fn assert_refused(
    library: &Library,
    path: &Path,
    graph: Vec<u8>,
    (operator, name): (&str, &str),
    what: &str,
) {
    std::fs::write(path.join("model.onnx"), graph).unwrap();
    for threads in [1, 3] {
        let mut options = DecoderOptions::default();
        options.threads = ComputeThreads::new(threads);
        let outcome = try_open(library, path, options).and_then(|mut model| {
            // An attribute that only some inputs need is missed when it is needed.
            let sequence = model.new_sequence()?;
            let input =
                ternion_engine::SequenceInput::new(sequence, &[1], ternion_engine::LogitsWanted::Last);
            model.forward(&[input], &mut Vec::new())
        });
        let error = outcome.err().unwrap_or_else(|| panic!("{operator} {name} {what}: accepted"));
        let said = error.to_string();
        assert!(said.contains(operator) && said.contains(&format!("`{name}`")), "{what}: {said}");
    }
}

/// The same for the operators on weights with a scale for each group of a row.
#[test]
fn attributes_of_grouped_weights_are_bounded() {
    let Some(library) = common::library() else { return };
    let file = grouped();
    let good = std::fs::read(file.path.join("model.onnx")).unwrap();
    let refused = |operator: &str, name: &str, change: Option<&dyn Fn(&mut Field)>, what: &str| {
        let graph = with_attribute(&good, operator, name, change);
        assert_refused(&library, &file.path, graph, (operator, name), what);
    };
    for value in [i64::MAX, i64::MIN, -1, 0, 3, 4] {
        let set = |field: &mut Field| field.2 = varint(value as u64);
        for operator in ["GroupedLinear", "GroupedEmbedding"] {
            refused(operator, "bits", Some(&set), &value.to_string());
        }
        if value != 3 {
            refused("GroupedLinear", "matrices", Some(&set), &value.to_string());
        }
    }
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let set = |field: &mut Field| field.2 = value.to_le_bytes().to_vec();
        let places = [("GroupedLinear", "epsilon"), ("CachedAttention", "epsilon"), ("Rotations", "factor")];
        for (operator, name) in places {
            refused(operator, name, Some(&set), &value.to_string());
        }
    }
    for (operator, name) in [
        ("GroupedLinear", "bits"),
        ("GroupedEmbedding", "bits"),
        ("GroupedLinear", "matrices"),
        ("GroupedLinear", "epsilon"),
        ("CachedAttention", "epsilon"),
    ] {
        refused(operator, name, None, "left out");
    }
}

/// Codes and scales as for every other form: a code 3, and scales that are no number, infinite or negative zero.
#[test]
fn grouped_weights_that_stand_for_nothing_are_refused() {
    let Some(library) = common::library() else { return };
    let checkpoint = ternion_formats::Checkpoint::open(fixtures().join("qwen3-ternary/ptq1_0.gguf")).unwrap();
    let ternion_formats::Weights::Grouped(matrix) = &checkpoint.layers[1].down.weights else { panic!() };
    let codes: Vec<u8> =
        (0..matrix.rows()).flat_map(|row| matrix.words(row)).flat_map(u32::to_le_bytes).collect();
    let scales =
        (0..matrix.rows()).flat_map(|row| (0..matrix.cols() / matrix.group()).map(move |g| (row, g)));
    let scales: Vec<u8> =
        scales.flat_map(|(row, g)| half::f16::from_f32(matrix.scale(row, g)).to_le_bytes()).collect();
    let groups = matrix.cols() / matrix.group();
    let place = format!("row 2, group {}", groups - 1);
    let changes: [(&[u8], usize, u16, &str); 4] = [
        (&codes, 3 * matrix.cols() / 4 - 2, 0x00ff, "row 2 holds the code 3"),
        (&scales, (3 * groups - 1) * 2, 0x7e00, &format!("{place}: the scale is NaN")),
        (&scales, (3 * groups - 1) * 2, 0xfc00, &format!("{place}: the scale is -inf")),
        (&scales, (3 * groups - 1) * 2, 0x8000, &format!("{place}: the scale is -0.0")),
    ];
    for (part, at, value, words) in changes {
        let file = grouped();
        let path = file.path.join("model.onnx.data");
        let mut data = std::fs::read(&path).unwrap();
        let start = (0..data.len()).step_by(4096).find(|at| data[*at..].starts_with(part)).unwrap();
        data[start + at..start + at + 2].copy_from_slice(&value.to_le_bytes());
        std::fs::write(&path, data).unwrap();
        let error = error(&library, &file.path);
        assert!(error.contains(words) && error.contains("GroupedLinear"), "{error}");
    }
}

/// Every attribute of every operator with values that overflow, that are no numbers, or that are nothing: an error that
/// names both, whatever the arithmetic of the build.
#[test]
fn every_attribute_is_bounded() {
    let Some(library) = common::library() else { return };
    let file = fast();
    let path = file.path.join("model.onnx");
    let good = std::fs::read(&path).unwrap();
    assert_eq!(message(&fields(&good)), good, "the file as it is");
    let refused = |bytes: Vec<u8>, operator: &str, name: &str, what: &str| {
        assert_refused(&library, &file.path, bytes, (operator, name), what);
    };
    let integers = [288_230_376_151_711_748, i64::MAX, i64::MIN, -1, 1 << 21, 1 << 32, 0];
    for name in ["layer", "heads", "kv_heads", "head_dim"] {
        for value in integers {
            let set = |field: &mut Field| field.2 = varint(value as u64);
            let what = format!("{value}");
            refused(
                with_attribute(&good, "CachedAttention", name, Some(&set)),
                "CachedAttention",
                name,
                &what,
            );
        }
    }
    let floats = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0];
    for operator in ["TernaryLinear", "DenseLinear"] {
        for value in floats {
            let set = |field: &mut Field| field.2 = value.to_le_bytes().to_vec();
            refused(with_attribute(&good, operator, "epsilon", Some(&set)), operator, "epsilon", "a float");
        }
    }
    for value in [f32::NAN, f32::INFINITY, 0.0] {
        // Packed or one by one.
        let set = |field: &mut Field| field.2[..4].copy_from_slice(&value.to_le_bytes());
        refused(
            with_attribute(&good, "TernaryLinear", "scales", Some(&set)),
            "TernaryLinear",
            "scales",
            "a float",
        );
    }
    for (operator, name) in [("TernaryLinear", "layout"), ("GatedUnit", "activation")] {
        let set = |field: &mut Field| field.2 = b"other".to_vec();
        refused(with_attribute(&good, operator, name, Some(&set)), operator, name, "a string");
    }
    for (operator, name) in [
        ("CachedAttention", "heads"),
        ("CachedAttention", "kv_heads"),
        ("CachedAttention", "head_dim"),
        ("CachedAttention", "layer"),
        ("TernaryLinear", "scales"),
        ("TernaryLinear", "layout"),
        ("TernaryLinear", "epsilon"),
        ("DenseLinear", "epsilon"),
        ("GatedUnit", "activation"),
    ] {
        refused(with_attribute(&good, operator, name, None), operator, name, "left out");
    }
    std::fs::write(&path, &good).unwrap();
    let mut model = try_open(&library, &file.path, DecoderOptions::default()).unwrap();
    let sequence = model.new_sequence().unwrap();
    feed(&mut model, sequence, &[1, 2, 3]);
}
