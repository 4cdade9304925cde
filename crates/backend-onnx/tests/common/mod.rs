//! What the tests of this backend share: the native library, exported checkpoints, expected logits.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;
use ternion_backend_onnx::{Decoder, DecoderOptions, Library};
use ternion_core::Result;
use ternion_engine::{CausalLm, ComputeThreads, LogitsWanted, SequenceId, SequenceInput};
use ternion_formats::Checkpoint;
use ternion_formats::convert::{Options, convert};
use ternion_formats::onnx::{Host, Summary};
pub(crate) use ternion_test_support::fixtures;

/// The library, or `None` where there is none and the test is skipped. `cargo xtask test` installs it.
pub(crate) fn library() -> Option<Library> {
    match Library::load(None) {
        Ok(library) => Some(library),
        Err(error) => {
            assert!(std::env::var_os("ORT_DYLIB_PATH").is_none(), "{error}");
            skipped(&error.to_string());
            None
        }
    }
}

/// Says that a test checks nothing here. Not by a macro, whose output the harness keeps: `cargo xtask test` counts these lines.
pub(crate) fn skipped(reason: &str) {
    use std::io::Write;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "skipped: {reason}").unwrap();
}

/// The checkpoints in `fixtures/`, and those in the folder that `TERNION_ORACLE` names.
pub(crate) fn checkpoints() -> Vec<PathBuf> {
    let mut roots = vec![fixtures()];
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

pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) strict: bool,
    /// By transformers, in f32.
    pub(crate) logits: Vec<f32>,
}

pub(crate) fn cases(checkpoint: &Path) -> Vec<Case> {
    let cases = cases_of(checkpoint);
    let golden: Value =
        serde_json::from_slice(&std::fs::read(checkpoint.join("golden.json")).unwrap()).unwrap();
    assert_eq!(cases.len(), golden["cases"].as_array().unwrap().len(), "logits are missing");
    cases
}

/// The cases whose logits are kept.
pub(crate) fn cases_of(checkpoint: &Path) -> Vec<Case> {
    let golden: Value =
        serde_json::from_slice(&std::fs::read(checkpoint.join("golden.json")).unwrap()).unwrap();
    let file = std::fs::read(checkpoint.join("golden.f32.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let cases = golden["cases"].as_array().unwrap().iter();
    cases
        .filter_map(|case| {
            let name = case["name"].as_str().unwrap().to_owned();
            let tensor = tensors.tensor(&format!("{name}.logits")).ok()?;
            let ids = case["input_ids"].as_array().unwrap().iter();
            Some(Case {
                ids: ids.map(|id| id.as_u64().unwrap() as u32).collect(),
                strict: case["strict"] == true,
                logits: tensor
                    .data()
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                    .collect(),
                name,
            })
        })
        .collect()
}

/// An exported checkpoint, in a folder that goes away with it.
pub(crate) struct Exported {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) path: PathBuf,
}

pub(crate) fn exported(checkpoint: &Path, options: &Options) -> Exported {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    convert(&Checkpoint::open(checkpoint).unwrap(), &path, options, &mut |_, _| {})
        .unwrap_or_else(|e| panic!("{}: {e}", checkpoint.display()));
    Exported { folder, path }
}

pub(crate) fn try_open(library: &Library, path: &Path, options: DecoderOptions) -> Result<Decoder> {
    let host = Host::open(path)?;
    Decoder::new(library, &Summary::read(&host.model)?, &host, options)
}

pub(crate) fn open(library: &Library, path: &Path, threads: usize) -> Decoder {
    let mut options = DecoderOptions::default();
    options.threads = ComputeThreads::new(threads);
    try_open(library, path, options).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Appends tokens to a sequence and returns the logits of all of them.
pub(crate) fn feed(model: &mut dyn CausalLm, sequence: SequenceId, tokens: &[u32]) -> Vec<f32> {
    let mut logits = Vec::new();
    let input = SequenceInput::new(sequence, tokens, LogitsWanted::From(0));
    model.forward(&[input], &mut logits).unwrap();
    assert_eq!(logits.len(), tokens.len() * model.vocab_size());
    logits
}

/// The logits of all tokens of a text, on a sequence of its own.
pub(crate) fn whole(model: &mut dyn CausalLm, tokens: &[u32]) -> Vec<f32> {
    let sequence = model.new_sequence().unwrap();
    let logits = feed(model, sequence, tokens);
    model.free(sequence);
    logits
}

pub(crate) fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

pub(crate) fn argmax(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

/// Rows whose largest logit is in the same place.
pub(crate) fn same_argmax(a: &[f32], b: &[f32], vocab: usize) -> usize {
    a.chunks_exact(vocab).zip(b.chunks_exact(vocab)).filter(|(a, b)| argmax(a) == argmax(b)).count()
}
