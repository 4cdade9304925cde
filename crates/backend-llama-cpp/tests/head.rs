//! The certified head: its leading logits are those of the exact head.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use ternion_backend_llama_cpp::{HeadKind, LlamaCpp, ModelOptions};
use ternion_engine::{CausalLm, ComputeThreads, LogitsPrecision, LogitsWanted, SequenceInput};
use ternion_formats::Checkpoint;

fn open(name: &str, head: HeadKind) -> LlamaCpp {
    let mut options = ModelOptions::default();
    options.llama_cpp.head = head;
    options.threads = ComputeThreads::new(2);
    options.context_length = Some(64);
    options.max_sequences = 2;
    LlamaCpp::new(&Checkpoint::open(ternion_test_support::fixture(name)).unwrap(), &options).unwrap()
}

/// Logits of all tokens of two texts, computed together, each with its precision.
fn logits(model: &mut LlamaCpp, texts: &[(Vec<u32>, LogitsPrecision)]) -> Vec<f32> {
    let sequences: Vec<_> = texts.iter().map(|_| model.new_sequence().unwrap()).collect();
    let inputs = sequences.iter().zip(texts).map(|(sequence, (tokens, precision))| {
        SequenceInput::new(*sequence, tokens, LogitsWanted::From(0)).with_precision(*precision)
    });
    let mut logits = Vec::new();
    model.forward(&inputs.collect::<Vec<_>>(), &mut logits).unwrap();
    for sequence in sequences {
        model.free(sequence);
    }
    logits
}

/// The indices of the `count` largest, of equals the first.
fn largest(row: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|a, b| row[*b].total_cmp(&row[*a]).then(a.cmp(b)));
    order.truncate(count);
    order
}

fn text(seed: u32) -> Vec<u32> {
    (0..20).map(|i| (seed * 31 + i * i * 17) % 490).collect()
}

#[test]
fn leading_logits_are_those_of_the_exact_head() {
    for name in ["tiny-packed", "llama-ternary", "ternion-tiny"] {
        let mut exact = open(name, HeadKind::Exact);
        let mut certified = open(name, HeadKind::Certified);
        let vocab = exact.vocab_size();
        let all = [(text(1), LogitsPrecision::Exact), (text(2), LogitsPrecision::Exact)];
        let expected = logits(&mut exact, &all);
        assert!(logits(&mut certified, &all) == expected, "{name}: exact logits");
        for count in [1, 10] {
            let leading = LogitsPrecision::Leading(count);
            let found = logits(&mut certified, &[(text(1), leading), (text(2), leading)]);
            assert!(found != expected, "{name}: no logit came from the copy");
            for (found, expected) in found.chunks(vocab).zip(expected.chunks(vocab)) {
                let order = largest(expected, count);
                assert_eq!(largest(found, count), order, "{name}");
                assert!(order.iter().all(|id| found[*id] == expected[*id]), "{name}");
            }
        }
    }
}

/// Rows of one call that must be exact are, beside others that need not be.
#[test]
fn each_text_has_its_own_precision() {
    let mut exact = open("tiny-packed", HeadKind::Exact);
    let mut certified = open("tiny-packed", HeadKind::Certified);
    let texts = [(text(1), LogitsPrecision::Leading(1)), (text(2), LogitsPrecision::Exact)];
    let found = logits(&mut certified, &texts);
    // One after the other, as texts of different precision are computed: llama.cpp's additions depend on what it computes together.
    let mut expected = Vec::new();
    for (tokens, _) in &texts {
        let sequence = exact.new_sequence().unwrap();
        let mut rows = Vec::new();
        exact.forward(&[SequenceInput::new(sequence, tokens, LogitsWanted::From(0))], &mut rows).unwrap();
        expected.append(&mut rows);
    }
    let second = texts[0].0.len() * exact.vocab_size();
    assert!(found[..second] != expected[..second], "no logit came from the copy");
    assert!(found[second..] == expected[second..], "exact logits");
}
