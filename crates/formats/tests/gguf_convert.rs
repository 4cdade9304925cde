//! Conversions: trits and scales come out bit by bit as they went in, whatever the way.
#![allow(clippy::unwrap_used, reason = "a failure in a helper fails its test, as it should")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{assert_says, fixture};
use ternion_core::ErrorKind::{InvalidModel, InvalidRequest};
use ternion_core::{Message, Result};
use ternion_formats::convert::{Embedding, Options, Target, convert};
use ternion_formats::synth::{self, Shape};
use ternion_formats::{Checkpoint, Table, Weights, gguf};

const FIXTURES: [&str; 5] = ["nano-packed", "nano-master", "tiny-packed", "llama-ternary", "1bitllm"];
const GGUF: [Target; 3] = [Target::GgufI2s, Target::GgufTq1, Target::GgufTq2];

fn to(checkpoint: &Checkpoint, out: &Path, target: Target, embedding: Option<Embedding>) -> Result<()> {
    let mut options = Options::new(target);
    options.embedding = embedding;
    convert(checkpoint, out, &options, &mut |_, _| {}).map(drop)
}

fn converted(checkpoint: &Checkpoint, folder: &Path, target: Target) -> Checkpoint {
    let out = folder.join(match target {
        Target::Safetensors => "folder".to_owned(),
        other => format!("{other}.gguf"),
    });
    to(checkpoint, &out, target, None).unwrap();
    Checkpoint::open(&out).unwrap()
}

/// Trits and scale of each projection, or its values.
fn projections(checkpoint: &Checkpoint) -> Vec<(String, Vec<i8>, f32)> {
    let linears = checkpoint.layers.iter().flat_map(ternion_formats::LayerTensors::linears);
    linears
        .map(|linear| match &linear.weights {
            Weights::Ternary(tensor) => (linear.name.clone(), common::trits(tensor), tensor.scale),
            _ => panic!("{} is dense", linear.name),
        })
        .collect()
}

#[track_caller]
fn assert_same(a: &Checkpoint, b: &Checkpoint) {
    assert_eq!(projections(a), projections(b));
    assert_eq!(a.embed.to_f32(), b.embed.to_f32());
    assert_eq!(a.head.as_ref().map(Table::to_f32), b.head.as_ref().map(Table::to_f32));
    assert_eq!(a.final_norm, b.final_norm);
    for (a, b) in a.layers.iter().zip(&b.layers) {
        assert!(a.norms().eq(b.norms()));
    }
    let (mut s, t) = (a.spec.clone(), &b.spec);
    s.architecture.clone_from(&t.architecture);
    s.quantization.clone_from(&t.quantization);
    s.tied = t.tied;
    assert_eq!(s, *t);
    assert_eq!(a.sampling, b.sampling);
    let (a, b) = (a.tokenizer().unwrap(), b.tokenizer().unwrap());
    let messages = [Message::new("system", "Be brief."), Message::new("user", "2 + 2? <|eot_id|> é 日本 🙂")];
    assert_eq!(a.encode_chat(&messages, true).unwrap(), b.encode_chat(&messages, true).unwrap());
    assert_eq!((a.bos_id(), a.eos_id()), (b.bos_id(), b.eos_id()));
}

#[test]
fn every_fixture_goes_through_every_format_and_back() {
    for name in FIXTURES {
        let folder = tempfile::tempdir().unwrap();
        let original = Checkpoint::open(fixture(name)).unwrap();
        let narrow = !original.spec.hidden_size.is_multiple_of(256);
        let mut current = converted(&original, folder.path(), Target::GgufI2s);
        assert_same(&original, &current);
        assert!(current.format.contains("I2_S"), "{}", current.format);
        if !narrow {
            for target in [Target::GgufTq2, Target::GgufTq1] {
                current = converted(&current, folder.path(), target);
                assert_same(&original, &current);
            }
        }
        current = converted(&current, folder.path(), Target::Safetensors);
        assert_same(&original, &current);
        assert!(current.format.contains("packed"), "{}", current.format);
        for file in fs::read_dir(folder.path()).unwrap() {
            let name = file.unwrap().file_name().to_string_lossy().into_owned();
            assert!(!name.contains("partial"), "{name} is left");
        }
    }
}

#[test]
fn rows_that_do_not_fit_a_block_are_named() {
    let original = Checkpoint::open(fixture("nano-packed")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (target, kind) in [(Target::GgufTq1, "TQ1_0"), (Target::GgufTq2, "TQ2_0")] {
        let out = folder.path().join("x.gguf");
        let error = to(&original, &out, target, None).unwrap_err();
        assert_says(&error, InvalidModel, &["blk.0.attn_q.weight", "128 elements", "multiple of 256", kind]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is written");
    }
}

#[test]
fn the_embedding_takes_the_type_that_is_asked_for() {
    let original = Checkpoint::open(fixture("tiny-packed")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let values = original.embed.to_f32();
    let norm = values.iter().map(|x| x * x).sum::<f32>();
    for (name, embedding) in Embedding::ALL {
        let out = folder.path().join(format!("{name}.gguf"));
        to(&original, &out, Target::GgufI2s, Some(embedding)).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        let square: f32 = values.iter().zip(checkpoint.embed.to_f32()).map(|(a, b)| (a - b) * (a - b)).sum();
        let bound = match embedding {
            Embedding::F32 | Embedding::Bf16 => 0.0,
            Embedding::F16 => 1e-4,
            Embedding::Q8_0 => 6e-3,
            _ => 2e-2,
        };
        let error = (square / norm).sqrt();
        assert!(error <= bound, "{name}: {error}");
        // Kept, it is the same bytes, whatever else changes.
        let again = folder.path().join(format!("{name}-tq2.gguf"));
        to(&checkpoint, &again, Target::GgufTq2, None).unwrap();
        let (a, b) = (gguf::File::open(&out).unwrap(), gguf::File::open(&again).unwrap());
        let bytes = |file: &gguf::File| file.data(file.tensor("token_embd.weight").unwrap()).to_vec();
        assert_eq!(bytes(&a), bytes(&b), "{name}");
        if matches!(embedding, Embedding::Q8_0 | Embedding::Q6K) {
            let error =
                to(&original, &folder.path().join("f"), Target::Safetensors, Some(embedding)).unwrap_err();
            assert_says(&error, InvalidRequest, &["safetensors cannot hold", "f32, f16 or bf16"]);
        }
    }
    let nano = Checkpoint::open(fixture("nano-packed")).unwrap();
    let error = to(&nano, &folder.path().join("x.gguf"), Target::GgufI2s, Some(Embedding::Q6K)).unwrap_err();
    assert_says(&error, InvalidModel, &["token_embd.weight", "multiple of 256", "Q6_K"]);
}

#[test]
fn nothing_is_replaced_unasked() {
    let original = Checkpoint::open(fixture("nano-packed")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.gguf");
    fs::write(&file, "mine").unwrap();
    let error = to(&original, &file, Target::GgufI2s, None).unwrap_err();
    assert_says(&error, InvalidRequest, &["exists", "x.gguf"]);
    assert_eq!(fs::read(&file).unwrap(), b"mine");

    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("photo"), "mine").unwrap();
    let mut options = Options::new(Target::Safetensors);
    options.overwrite = true;
    let error = convert(&original, &other, &options, &mut |_, _| {}).unwrap_err();
    assert_says(&error, InvalidRequest, &["no checkpoint"]);
    assert!(other.join("photo").exists());

    let checkpoint = folder.path().join("checkpoint");
    for _ in 0..2 {
        convert(&original, &checkpoint, &options, &mut |_, _| {}).unwrap();
    }
    assert_same(&original, &Checkpoint::open(&checkpoint).unwrap());
    options.target = Target::GgufI2s;
    convert(&original, &file, &options, &mut |_, _| {}).unwrap();
    assert_same(&original, &Checkpoint::open(&file).unwrap());
    let left: Vec<PathBuf> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[test]
fn progress_reaches_the_sum() {
    let original = Checkpoint::open(fixture("tiny-packed")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for target in GGUF.into_iter().chain([Target::Safetensors]) {
        let mut seen = Vec::new();
        let out = folder.path().join(target.to_string());
        convert(&original, &out, &Options::new(target), &mut |done, total| seen.push((done, total))).unwrap();
        let total = seen[0].1;
        assert!(seen.is_sorted() && seen.iter().all(|(_, t)| *t == total) && total > 0);
        assert_eq!(seen.last().unwrap().0, total, "{target}");
    }
}

/// It stays in the file, and is decoded where floats are needed.
#[test]
fn a_large_quantised_embedding_stays_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let mut shape = Shape::named("nano").unwrap();
    shape.vocab_size = 40_001;
    synth::write(&folder.path().join("model"), &shape, 5, &mut |_, _| {}).unwrap();
    let original = Checkpoint::open(folder.path().join("model")).unwrap();
    let out = folder.path().join("x.gguf");
    to(&original, &out, Target::GgufI2s, Some(Embedding::Q8_0)).unwrap();
    let values = original.embed.to_f32();
    let mut bytes = vec![0; values.len() / 32 * 34];
    let mut expected = vec![0.0; values.len()];
    gguf::encode(gguf::TensorType::Q8_0, &values, &mut bytes).unwrap();
    gguf::decode(gguf::TensorType::Q8_0, &bytes, &mut expected).unwrap();
    let read = Checkpoint::open(&out).unwrap();
    assert!(read.embed.to_f32() == expected);
    assert!(read.embed.is_mapped() && read.embed.size() == values.len() / 32 * 34);
    // The norms.
    assert!(read.report().owned_bytes < 10_000);
}

#[test]
fn a_tokenizer_that_no_name_describes_is_kept_whole() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    fs::create_dir(&source).unwrap();
    for file in fs::read_dir(fixture("nano-packed")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), source.join(file.file_name())).unwrap();
    }
    let path = source.join("tokenizer.json");
    let changed = fs::read_to_string(&path).unwrap().replace("{1,3}", "{1,2}");
    fs::write(&path, changed).unwrap();
    let original = Checkpoint::open(&source).unwrap();
    let out = folder.path().join("x.gguf");
    to(&original, &out, Target::GgufI2s, None).unwrap();
    let file = gguf::File::open(&out).unwrap();
    assert!(file.string("tokenizer.huggingface.json").unwrap().is_some());
    assert_same(&original, &Checkpoint::open(&out).unwrap());
    let ids = |checkpoint: &Checkpoint| checkpoint.tokenizer().unwrap().encode("12345 67", true).unwrap();
    assert_eq!(ids(&original), ids(&Checkpoint::open(&out).unwrap()));
}

#[test]
fn a_file_that_has_become_shorter_gives_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let original = Checkpoint::open(fixture("tiny-packed")).unwrap();
    let path = folder.path().join("x.gguf");
    to(&original, &path, Target::GgufTq2, None).unwrap();
    let file = gguf::File::open(&path).unwrap();
    let tensor = file.tensors().last().unwrap();
    let mut bytes = vec![0; tensor.bytes as usize];
    file.read(tensor, 0, &mut bytes).unwrap();
    assert_eq!(bytes[..], file.data(tensor)[..]);
    assert!(file.read(tensor, 1, &mut bytes).unwrap_err().to_string().contains("output_norm.weight"));
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let error = file.read(tensor, 0, &mut bytes).unwrap_err();
    assert_says(&error, ternion_core::ErrorKind::Io, &["x.gguf", "output_norm.weight"]);
}
