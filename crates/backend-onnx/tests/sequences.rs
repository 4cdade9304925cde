//! However tokens come into a sequence, and whatever other sequences there are, the logits are the same.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use common::{cases, checkpoints, exported, feed, fixtures, largest_difference, open, whole};
use ternion_backend_onnx::Decoder;
use ternion_core::ErrorKind;
use ternion_engine::{CausalLm, LogitsWanted, SequenceInput};
use ternion_formats::convert::{Options, Target};

/// The fast variant computes each token alike whatever is computed with it. ONNX Runtime does not promise that: products
/// of one row and of several go different ways, which differ in the last bits.
fn tolerance(model: &Decoder) -> f32 {
    if model.is_fast() { 0.0 } else { 1e-4 }
}

#[test]
fn chunks_and_kept_prefixes_change_nothing() {
    let Some(library) = common::library() else { return };
    for folder in checkpoints() {
        for variant in [Target::OnnxFast, Target::Onnx] {
            let file = exported(&folder, &Options::new(variant));
            let mut model = open(&library, &file.path, 2);
            let mut single = open(&library, &file.path, 1);
            let (vocab, tolerance) = (model.vocab_size(), tolerance(&model));
            for case in cases(&folder).iter().filter(|case| case.strict && case.ids.len() > 8) {
                let expected = whole(&mut model, &case.ids);
                let place = format!("{} {} {variant:?}", folder.display(), case.name);
                for chunk in [1, 3, 7] {
                    let sequence = single.new_sequence().unwrap();
                    let mut logits = Vec::new();
                    for tokens in case.ids.chunks(chunk) {
                        logits.extend(feed(&mut single, sequence, tokens));
                    }
                    assert_eq!(single.len(sequence), case.ids.len());
                    let difference = largest_difference(&logits, &expected);
                    assert!(difference <= tolerance, "{place}: chunks of {chunk}: {difference}");
                    // What was there is cut, and the rest computed again.
                    let half = case.ids.len() / 2;
                    single.truncate(sequence, half).unwrap();
                    let fork = single.fork(sequence, half).unwrap();
                    let rest = feed(&mut single, sequence, &case.ids[half..]);
                    let difference = largest_difference(&rest, &expected[half * vocab..]);
                    assert!(difference <= tolerance, "{place}: on a reused prefix: {difference}");
                    single.free(sequence);
                    let rest = feed(&mut single, fork, &case.ids[half..]);
                    let difference = largest_difference(&rest, &expected[half * vocab..]);
                    assert!(difference <= tolerance, "{place}: on a fork: {difference}");
                    single.free(fork);
                }
            }
        }
    }
}

#[test]
fn sequences_side_by_side_do_not_disturb_each_other() {
    let Some(library) = common::library() else { return };
    let folder = fixtures().join("tiny-packed");
    for variant in [Target::OnnxFast, Target::Onnx] {
        let file = exported(&folder, &Options::new(variant));
        let mut model = open(&library, &file.path, 2);
        let (vocab, tolerance) = (model.vocab_size(), tolerance(&model));
        let cases = cases(&folder);
        let strict: Vec<_> = cases.iter().filter(|c| c.strict && c.ids.len() >= 20).take(3).collect();
        let alone: Vec<_> = strict.iter().map(|case| whole(&mut model, &case.ids)).collect();
        let sequences: Vec<_> = strict.iter().map(|_| model.new_sequence().unwrap()).collect();
        let mut logits = Vec::new();
        for step in 0..5 {
            // Parts of different lengths, and different wishes.
            let wishes = [LogitsWanted::From(0), LogitsWanted::Last, LogitsWanted::None];
            let bounds = |i: usize| (step * (i + 2), (step + 1) * (i + 2));
            let batch: Vec<_> = (0..3)
                .map(|i| {
                    SequenceInput::new(
                        sequences[i],
                        &strict[i].ids[bounds(i).0..bounds(i).1],
                        wishes[(step + i) % 3],
                    )
                })
                .collect();
            model.forward(&batch, &mut logits).unwrap();
            let mut given = logits.chunks_exact(vocab);
            for (i, input) in batch.iter().enumerate() {
                for row in bounds(i).1 - input.rows()..bounds(i).1 {
                    let expected = &alone[i][row * vocab..(row + 1) * vocab];
                    let difference = largest_difference(given.next().unwrap(), expected);
                    assert!(difference <= tolerance, "{variant:?}, step {step}, sequence {i}: {difference}");
                }
            }
            assert!(given.next().is_none());
        }
    }
}

#[test]
fn a_batch_that_is_refused_changes_nothing() {
    let Some(library) = common::library() else { return };
    for variant in [Target::OnnxFast, Target::Onnx] {
        let file = exported(&fixtures().join("nano-packed"), &Options::new(variant));
        let mut model = open(&library, &file.path, 1);
        let (a, b) = (model.new_sequence().unwrap(), model.new_sequence().unwrap());
        feed(&mut model, a, &[1, 2, 3]);
        let next = feed(&mut model, a, &[4]);
        model.truncate(a, 3).unwrap();
        let vocab = model.vocab_size() as u32;
        let mut logits = Vec::new();
        let input = |sequence, tokens| SequenceInput::new(sequence, tokens, LogitsWanted::Last);
        let (good, bad, none) = ([4u32], [vocab], []);
        for batch in [
            vec![input(a, &good[..]), input(b, &bad[..])],
            vec![input(a, &good[..]), input(a, &good[..])],
            vec![input(b, &none[..])],
        ] {
            assert!(model.forward(&batch, &mut logits).is_err(), "{variant:?}");
            assert_eq!((model.len(a), model.len(b)), (3, 0), "{variant:?}");
        }
        let long = vec![1; model.context_length()];
        let error = model.forward(&[input(a, &long)], &mut logits).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ContextOverflow);
        assert_eq!(feed(&mut model, a, &[4]), next, "{variant:?}");

        let more: Vec<_> = std::iter::from_fn(|| model.new_sequence().ok()).collect();
        assert_eq!(more.len() + 2, model.max_sequences());
        assert_eq!(model.fork(a, 1).unwrap_err().kind(), ErrorKind::ResourceExhausted);
        model.free(more[0]);
        assert!(model.new_sequence().is_ok());
    }
}
