//! Weights that are streamed from the disk: the same logits to the last bit, and failures of the disk.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use ternion_backend_candle::{Decoder, DecoderOptions, HeadPrecision};
use ternion_core::{ErrorKind, Result};
use ternion_engine::{CausalLm, ComputeThreads, LogitsWanted, SequenceId, SequenceInput};
use ternion_formats::{Checkpoint, convert};
use ternion_test_support::fixture;

/// A decoder that keeps so many bytes of weights in memory.
fn decoder(path: &Path, resident: Option<u64>, head: HeadPrecision) -> Decoder {
    let checkpoint = match resident {
        Some(_) => Checkpoint::open_within(path, 64 << 20, &mut |_, _| {}).unwrap(),
        None => Checkpoint::open(path).unwrap(),
    };
    let mut options = DecoderOptions::new(&checkpoint.spec);
    options.resident_weights = resident;
    options.head = head;
    Decoder::new(checkpoint, &ComputeThreads::new(2), options).unwrap()
}

fn feed(model: &mut Decoder, id: SequenceId, tokens: &[u32], wanted: LogitsWanted) -> Result<Vec<f32>> {
    let mut logits = Vec::new();
    model.forward(&[SequenceInput::new(id, tokens, wanted)], &mut logits)?;
    Ok(logits)
}

/// Prefill in chunks with and without logits, then a few single tokens.
fn run(model: &mut Decoder) -> Vec<f32> {
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % model.vocab_size() as u32).collect();
    let id = model.new_sequence().unwrap();
    assert!(feed(model, id, &tokens[..17], LogitsWanted::None).unwrap().is_empty());
    assert!(feed(model, id, &tokens[17..20], LogitsWanted::None).unwrap().is_empty());
    let mut logits = feed(model, id, &tokens[20..36], LogitsWanted::From(3)).unwrap();
    for token in 36..40 {
        logits.extend(feed(model, id, &tokens[token..=token], LogitsWanted::Last).unwrap());
    }
    logits
}

#[test]
fn streamed_weights_give_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let gguf = folder.path().join("tiny.gguf");
    let options = convert::Options::new(convert::Target::GgufI2s);
    convert::convert(&Checkpoint::open(fixture("tiny-packed")).unwrap(), &gguf, &options, &mut |_, _| {})
        .unwrap();
    for path in [
        fixture("tiny-packed"),
        fixture("llama-ternary"),
        fixture("1bitllm").join("model.safetensors"),
        fixture("gguf-llama").join("model.gguf"),
        fixture("gguf").join("llama-tq.gguf"),
        gguf,
    ] {
        for head in [HeadPrecision::Exact, HeadPrecision::Int8] {
            let expected = run(&mut decoder(&path, None, head));
            for resident in [0, 20_000, 150_000, u64::MAX] {
                let found = run(&mut decoder(&path, Some(resident), head));
                assert!(found == expected, "{}, {head:?}, {resident} bytes stay", path.display());
            }
        }
    }
}

#[test]
fn a_file_that_is_cut_short_in_mid_stream_fails_the_request_alone() {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("tiny-packed")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let weights = folder.path().join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    let expected = run(&mut decoder(folder.path(), None, HeadPrecision::Exact));

    let mut model = decoder(folder.path(), Some(0), HeadPrecision::Exact);
    let id = model.new_sequence().unwrap();
    let before = feed(&mut model, id, &[1, 2, 3], LogitsWanted::Last).unwrap();
    let mut file = File::options().write(true).open(&weights).unwrap();
    file.set_len(bytes.len() as u64 / 2).unwrap();
    // Each step looks at the file before it uses what was read ahead.
    for _ in 0..3 {
        let error = feed(&mut model, id, &[4, 5], LogitsWanted::Last).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidModel, "{error}");
        assert!(error.to_string().contains("model.safetensors"), "{error}");
        assert_eq!(model.len(id), 3, "nothing of the failed step stays");
    }

    file.write_all(&bytes).unwrap();
    model.truncate(id, 0).unwrap();
    assert!(feed(&mut model, id, &[1, 2, 3], LogitsWanted::Last).unwrap() == before);
    assert!(run(&mut model) == expected, "as if nothing had happened");
}
