//! The certified head: its leading logits are those of the exact head.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use common::{cases, checkpoints, exported, try_open, whole};
use ternion_backend_onnx::{Decoder, DecoderOptions, HeadKind};
use ternion_core::ErrorKind;
use ternion_engine::{CausalLm, ComputeThreads, LogitsPrecision, LogitsWanted, SequenceInput};
use ternion_formats::convert::{Options, Target};

fn options(head: HeadKind) -> DecoderOptions {
    let mut options = DecoderOptions::default();
    (options.threads, options.head) = (ComputeThreads::new(2), head);
    options
}

fn leading(model: &mut Decoder, tokens: &[u32], count: usize) -> Vec<f32> {
    let sequence = model.new_sequence().unwrap();
    let input = SequenceInput::new(sequence, tokens, LogitsWanted::From(0));
    let mut logits = Vec::new();
    model.forward(&[input.with_precision(LogitsPrecision::Leading(count))], &mut logits).unwrap();
    model.free(sequence);
    logits
}

/// The indices of the `count` largest, of equals the first.
fn largest(row: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|a, b| row[*b].total_cmp(&row[*a]).then(a.cmp(b)));
    order.truncate(count);
    order
}

#[test]
fn leading_logits_are_those_of_the_exact_head() {
    let Some(library) = common::library() else { return };
    let mut rounded = 0;
    for folder in checkpoints() {
        let file = exported(&folder, &Options::new(Target::OnnxFast));
        let mut exact = try_open(&library, &file.path, options(HeadKind::Exact)).unwrap();
        let mut certified = try_open(&library, &file.path, options(HeadKind::Certified)).unwrap();
        let vocab = exact.vocab_size();
        for case in cases(&folder).iter().take(4) {
            let place = format!("{} {}", folder.display(), case.name);
            let expected = whole(&mut exact, &case.ids);
            assert!(whole(&mut certified, &case.ids) == expected, "{place}: exact logits");
            assert!(leading(&mut exact, &case.ids, 3) == expected, "{place}: a head without a copy");
            for count in [1, 10] {
                let found = leading(&mut certified, &case.ids, count);
                rounded += found.iter().zip(&expected).filter(|(a, b)| a != b).count();
                for (found, expected) in found.chunks(vocab).zip(expected.chunks(vocab)) {
                    let order = largest(expected, count);
                    assert_eq!(largest(found, count), order, "{place}");
                    assert!(order.iter().all(|id| found[*id] == expected[*id]), "{place}");
                }
            }
        }
    }
    assert!(rounded > 0, "no logit came from a copy");
}

#[test]
fn models_that_compute_their_own_logits_refuse_a_head() {
    let Some(library) = common::library() else { return };
    let portable = exported(&ternion_test_support::fixture("tiny-packed"), &Options::new(Target::Onnx));
    let Err(error) = try_open(&library, &portable.path, options(HeadKind::Certified)) else {
        panic!("a portable model has a certified head");
    };
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.to_string().contains("options.head"), "{error}");
}
