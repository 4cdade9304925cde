//! Damaged and lying safetensors files: an error that says where, and never a panic or a large allocation.
#![allow(clippy::unwrap_used, reason = "a failure in a helper fails its test, as it should")]

mod common;

use std::fs;

use common::{Model, assert_says, container, fixture, open_error, with_header};
use proptest::prelude::*;
use ternion_core::ErrorKind::InvalidModel;
use ternion_formats::Checkpoint;

/// The error of a checkpoint whose weights are these bytes.
#[track_caller]
fn opened(bytes: &[u8]) -> ternion_core::Error {
    let folder = Model::fixture("nano-packed").write();
    fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    open_error(folder.path())
}

/// The error of a file with this header and 16 bytes of data.
#[track_caller]
fn header(text: &str) -> ternion_core::Error {
    opened(&with_header(text.as_bytes(), &[0; 16]))
}

#[test]
fn the_length_of_the_header() {
    assert_says(&opened(b""), InvalidModel, &["model.safetensors", "empty"]);
    assert_says(&opened(b"1234567"), InvalidModel, &["model.safetensors", "7 bytes"]);
    assert_says(&opened(&[0; 8]), InvalidModel, &["model.safetensors", "`{`"]);
    assert_says(&opened(&[9, 0, 0, 0, 0, 0, 0, 0, b'{']), InvalidModel, &["length is 9", "has 1 bytes"]);
    assert_says(&opened(&[0xff; 64]), InvalidModel, &["length is 18446744073709551615", "at most"]);
    let mut huge = vec![0; 64];
    huge[..8].copy_from_slice(&50_000_000u64.to_le_bytes());
    assert_says(&opened(&huge), InvalidModel, &["length is 50000000", "at most 16777216"]);
}

#[test]
fn a_header_that_is_no_json_object() {
    for text in ["{", "{}}", "{} x", "{\"a\"}", "{\"\u{1}"] {
        assert_says(&header(text), InvalidModel, &["model.safetensors", "not a JSON object"]);
    }
    assert_says(&opened(&with_header(b"{\"\xff\": 1}", &[])), InvalidModel, &["model.safetensors"]);
    assert_says(&header("[]"), InvalidModel, &["does not begin with `{`"]);
    assert_says(&header(&format!("{{\"a\": {}", "[".repeat(100_000))), InvalidModel, &["recursion limit"]);
    assert_says(&header(r#"{"__metadata__": {"a": 1}}"#), InvalidModel, &["__metadata__", "strings"]);
}

#[test]
fn an_entry_that_is_wrong_by_itself() {
    let entry = |text: &str| header(&format!("{{\"some.tensor\": {text}}}"));
    for (text, parts) in [
        (r#"{"dtype": "F32", "shape": [4]}"#, ["missing field", "data_offsets"]),
        (r#"{"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}"#, ["F33", "expected one that"]),
        (r#"{"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}"#, ["[-4]", "expected"]),
        (r#"{"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}"#, ["[16, 0]", "end not before"]),
        (r#"{"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}"#, ["12 bytes", "expected 16"]),
        (r#"{"dtype": "F32", "shape": [4], "data_offsets": [0]}"#, ["[0]", "data_offsets"]),
        (r#"{"dtype": "F32", "shape": [4], "data_offsets": [0, 16], "x": 1}"#, ["unknown field", "`x`"]),
        (r#"{"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}"#, ["F4", "[1]"]),
        (
            r#"{"dtype": "U8", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}"#,
            ["overflows", "4294967296"],
        ),
        (
            r#"{"dtype": "F64", "shape": [2305843009213693952], "data_offsets": [0, 0]}"#,
            ["overflows", "product"],
        ),
        ("7", ["the entry is 7", "dtype, shape and data_offsets"]),
    ] {
        let mut parts = parts.to_vec();
        parts.extend(["some.tensor", "model.safetensors"]);
        assert_says(&entry(text), InvalidModel, &parts);
    }
}

#[test]
fn ranges_that_are_wrong_together() {
    let pair = |a: [u64; 2], b: [u64; 2]| {
        let entry = |[begin, end]: [u64; 2]| {
            format!(r#"{{"dtype": "U8", "shape": [{}], "data_offsets": [{begin}, {end}]}}"#, end - begin)
        };
        header(&format!("{{\"a\": {}, \"b\": {}}}", entry(a), entry(b)))
    };
    assert_says(&pair([0, 8], [9, 16]), InvalidModel, &["tensor: b", "a gap", "expected 8"]);
    assert_says(&pair([0, 8], [7, 16]), InvalidModel, &["tensor: b", "an overlap", "expected 8"]);
    assert_says(&pair([0, 8], [0, 16]), InvalidModel, &["tensor: b", "an overlap"]);
    assert_says(&pair([1, 8], [8, 16]), InvalidModel, &["tensor: a", "a gap", "expected 0"]);
    assert_says(&pair([0, 8], [8, 17]), InvalidModel, &["tensor: b", "end at 17", "16 bytes"]);
    assert_says(&pair([0, 8], [8, 15]), InvalidModel, &["cover 15 bytes", "16 bytes"]);
    assert_says(&pair([0, 8], [8, 1 << 60]), InvalidModel, &["tensor: b", "end at 1152921504606846976"]);
}

#[test]
fn a_name_that_occurs_twice() {
    let entry = r#"{"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}"#;
    let again = r#"{"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}"#;
    assert_says(&header(&format!("{{\"a\": {entry}, \"a\": {again}}}")), InvalidModel, &["`a` occurs twice"]);
    // The same name in other letters of JSON.
    assert_says(
        &header(&format!("{{\"a\": {entry}, \"\\u0061\": {again}}}")),
        InvalidModel,
        &["`a` occurs twice"],
    );
}

#[test]
fn truncated_and_extended_files() {
    let whole = fs::read(fixture("nano-packed").join("model.safetensors")).unwrap();
    for cut in [whole.len() - 1, whole.len() / 2, 4000, 3000, 9] {
        assert_says(&opened(&whole[..cut]), InvalidModel, &["model.safetensors", "bytes"]);
    }
    let mut longer = whole;
    longer.push(0);
    assert_says(&opened(&longer), InvalidModel, &["model.safetensors", "cover"]);
}

#[test]
fn a_long_value_is_cut_in_the_message() {
    let error = header(&format!(r#"{{"a": "{}"}}"#, "x".repeat(100_000)));
    assert_says(&error, InvalidModel, &["the entry is \"xxx", "..."]);
}

/// A whole checkpoint whose file begins with a valid header, of which some bytes are replaced.
fn mutated(changes: &[(usize, u8)], length: usize) -> Vec<u8> {
    let mut bytes = container(&Model::fixture("nano-packed").tensors);
    let header = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    for &(at, byte) in changes {
        bytes[at % header] = byte;
    }
    bytes.truncate(length);
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_are_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert_eq!(opened(&bytes).kind(), InvalidModel);
    }

    #[test]
    fn random_json_is_an_error(text in r#"\{("[a-c]": ?(\{"dtype": ?"(U8|F16|X)", ?"shape": ?\[[0-9, ]{0,24}\], ?"data_offsets": ?\[[0-9]{1,20}, ?[0-9]{1,20}\]\}|[0-9]),?){0,3}\}"#) {
        prop_assert_eq!(header(&text).kind(), InvalidModel);
    }

    /// Whether it opens or not: it ends without a panic, and an error is one line that names the file.
    #[test]
    fn mutated_files_open_or_fail_with_a_line(
        changes in prop::collection::vec((any::<usize>(), any::<u8>()), 1..6),
        length in prop_oneof![Just(usize::MAX), 0..170_000usize],
    ) {
        let folder = Model::fixture("nano-packed").write();
        fs::write(folder.path().join("model.safetensors"), mutated(&changes, length)).unwrap();
        if let Err(error) = Checkpoint::open(folder.path()) {
            let line = error.to_string();
            prop_assert!(line.contains("model.safetensors") && !line.contains('\n'), "{}", line);
        }
    }
}
