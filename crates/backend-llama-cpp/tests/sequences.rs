//! The sequences of a model: side by side, cut, forked, full, and used wrongly.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use ternion_backend_llama_cpp::{KvType, LlamaCpp, ModelOptions};
use ternion_core::ErrorKind;
use ternion_engine::{CausalLm, ComputeThreads, LogitsWanted, SequenceId, SequenceInput};
use ternion_formats::Checkpoint;

/// How far two rows of logits may be apart, see [`distance`]. The order of additions in attention depends on how tokens are
/// divided over calls; that moves an activation by a millionth, and one that lies as near to a rounding tie of the int8
/// quantisation goes to the other side, which moves a row by up to some hundredths. Another text's row is 0.5 or more away.
const TOLERANCE: f32 = 0.1;

fn open(change: impl FnOnce(&mut ModelOptions)) -> LlamaCpp {
    let path = ternion_test_support::fixture("tiny-packed");
    let mut options = ModelOptions::default();
    options.llama_cpp.kv_type = Some(KvType::F32);
    options.threads = ComputeThreads::new(1); // tests run side by side
    options.context_length = Some(128);
    options.max_sequences = 3;
    options.prefill_chunk = 16;
    change(&mut options);
    LlamaCpp::new(&Checkpoint::open(path).unwrap(), &options).unwrap()
}

fn model() -> LlamaCpp {
    open(|_| {})
}

fn prompt(seed: u32, length: u32) -> Vec<u32> {
    (0..length).map(|i| (seed * 31 + i * 17) % 490).collect()
}

fn feed(model: &mut LlamaCpp, sequence: SequenceId, tokens: &[u32]) -> Vec<f32> {
    let mut logits = Vec::new();
    model.forward(&[SequenceInput::new(sequence, tokens, LogitsWanted::Last)], &mut logits).unwrap();
    assert_eq!(logits.len(), model.vocab_size());
    logits
}

/// The logits after `tokens` in a model that has computed nothing else.
fn alone(tokens: &[u32]) -> Vec<f32> {
    let mut model = model();
    let sequence = model.new_sequence().unwrap();
    feed(&mut model, sequence, tokens)
}

/// The root mean square of the difference, relative to that of the rows.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let square = |x: f32, y: f32| (x - y) * (x - y);
    let difference: f32 = a.iter().zip(b).map(|(x, y)| square(*x, *y)).sum();
    (difference / a.iter().map(|x| x * x).sum::<f32>()).sqrt()
}

#[track_caller]
fn assert_close(a: &[f32], b: &[f32]) {
    let distance = distance(a, b);
    println!("distance {distance:.1e}");
    assert!(distance <= TOLERANCE, "{distance}");
}

#[test]
fn rows_of_other_texts_are_far_apart() {
    let rows = [prompt(1, 20), prompt(2, 20), prompt(1, 19), prompt(1, 21)].map(|tokens| alone(&tokens));
    for (i, a) in rows.iter().enumerate() {
        for b in &rows[..i] {
            assert!(distance(a, b) > 5.0 * TOLERANCE, "{}", distance(a, b));
        }
    }
}

#[test]
fn sequences_of_one_call_are_as_alone() {
    let prompts = [prompt(1, 20), prompt(2, 5), prompt(3, 11)];
    let mut model = open(|o| o.threads = ComputeThreads::new(2));
    let sequences = prompts.each_ref().map(|_| model.new_sequence().unwrap());
    let batch: Vec<SequenceInput<'_>> = prompts
        .iter()
        .zip(sequences)
        .map(|(tokens, sequence)| SequenceInput::new(sequence, tokens, LogitsWanted::Last))
        .collect();
    let mut logits = Vec::new();
    model.forward(&batch, &mut logits).unwrap();
    for ((prompt, ours), sequence) in prompts.iter().zip(logits.chunks(model.vocab_size())).zip(sequences) {
        assert_close(ours, &alone(prompt));
        assert_eq!(model.len(sequence), prompt.len());
    }
}

#[test]
fn rows_are_those_that_were_asked_for() {
    let tokens = prompt(4, 40);
    let mut model = model();
    let rows = |model: &mut LlamaCpp, wanted| {
        let sequence = model.new_sequence().unwrap();
        let mut logits = Vec::new();
        model.forward(&[SequenceInput::new(sequence, &tokens, wanted)], &mut logits).unwrap();
        model.free(sequence);
        logits
    };
    let vocab = model.vocab_size();
    let all = rows(&mut model, LogitsWanted::From(0));
    assert_eq!(all.len(), 40 * vocab);
    assert_close(&rows(&mut model, LogitsWanted::From(33)), &all[33 * vocab..]);
    assert_close(&rows(&mut model, LogitsWanted::Last), &all[39 * vocab..]);
    assert!(rows(&mut model, LogitsWanted::None).is_empty());
}

#[test]
fn a_cut_sequence_goes_on_where_it_was_cut() {
    let (first, second) = (prompt(5, 30), prompt(6, 9));
    let mut model = model();
    let sequence = model.new_sequence().unwrap();
    feed(&mut model, sequence, &first);
    model.truncate(sequence, 12).unwrap();
    assert_eq!(model.len(sequence), 12);
    let logits = feed(&mut model, sequence, &second);
    assert_close(&logits, &alone(&[&first[..12], &second].concat()));
    model.truncate(sequence, 100).unwrap();
    assert_eq!(model.len(sequence), 21);
    model.truncate(sequence, 0).unwrap();
    assert_close(&feed(&mut model, sequence, &second), &alone(&second));
}

#[test]
fn a_fork_and_its_source_go_different_ways() {
    let (start, one, other) = (prompt(7, 25), prompt(8, 6), prompt(9, 6));
    let mut model = model();
    let source = model.new_sequence().unwrap();
    feed(&mut model, source, &start);
    let fork = model.fork(source, 20).unwrap();
    assert_eq!((model.len(source), model.len(fork)), (25, 20));
    assert_close(&feed(&mut model, source, &one), &alone(&[&start[..], &one].concat()));
    assert_close(&feed(&mut model, fork, &other), &alone(&[&start[..20], &other].concat()));
    model.free(source);
    assert_eq!((model.len(source), model.len(fork)), (0, 26));
    assert_close(&feed(&mut model, fork, &one), &alone(&[&start[..20], &other, &one].concat()));
}

#[test]
fn a_full_cache_is_an_error_that_leaves_everything_as_it_was() {
    // llama.cpp rounds the cache up to 256 tokens.
    let mut model = open(|o| (o.context_length, o.llama_cpp.cache_tokens) = (Some(256), Some(256)));
    let (a, b) = (model.new_sequence().unwrap(), model.new_sequence().unwrap());
    feed(&mut model, a, &prompt(1, 200));
    feed(&mut model, b, &prompt(2, 40));
    let tokens = prompt(3, 50);
    let mut logits = vec![1.0];
    let input = SequenceInput::new(b, &tokens, LogitsWanted::Last);
    let error = model.forward(&[input], &mut logits).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
    assert!(logits.is_empty());
    assert_eq!((model.len(a), model.len(b)), (200, 40));
    model.free(a);
    assert_close(&feed(&mut model, b, &tokens), &alone(&[prompt(2, 40), tokens.clone()].concat()));
}

#[test]
fn what_is_out_of_range_is_an_error() {
    let mut model = model();
    let sequence = model.new_sequence().unwrap();
    let mut logits = Vec::new();
    let mut refused = |sequence, tokens: &[u32]| {
        let input = SequenceInput::new(sequence, tokens, LogitsWanted::Last);
        model.forward(&[input], &mut logits).unwrap_err()
    };
    assert!(refused(sequence, &[]).to_string().contains("without tokens"));
    assert!(refused(sequence, &[512]).to_string().contains("token 512 is not below 512"));
    assert!(refused(sequence, &[u32::MAX]).to_string().contains("is not below"));
    assert!(refused(SequenceId(2), &[1]).to_string().contains("does not exist"));
    assert!(refused(SequenceId(u32::MAX), &[1]).to_string().contains("does not exist"));
    assert_eq!(refused(sequence, &[1; 129]).kind(), ErrorKind::ContextOverflow);

    let input = SequenceInput::new(sequence, &[1], LogitsWanted::None);
    assert!(model.forward(&[input, input], &mut logits).unwrap_err().to_string().contains("twice"));
    assert!(model.fork(SequenceId(9), 0).is_err());
    model.truncate(SequenceId(9), 0).unwrap();
    model.free(SequenceId(9));
    model.new_sequence().unwrap();
    model.fork(sequence, 0).unwrap();
    assert_eq!(model.new_sequence().unwrap_err().kind(), ErrorKind::ResourceExhausted);
    assert_eq!(model.len(sequence), 0);
}

#[test]
fn attention_of_either_kind_gives_the_same() {
    let (tokens, more) = (prompt(3, 40), prompt(4, 20));
    for flash in [true, false] {
        for kv_type in [KvType::F32, KvType::F16] {
            let mut model = open(|o| {
                o.llama_cpp.flash_attention = Some(flash);
                o.llama_cpp.kv_type = Some(kv_type);
            });
            let sequence = model.new_sequence().unwrap();
            println!("{flash} {kv_type:?}");
            assert_close(&feed(&mut model, sequence, &tokens), &alone(&tokens));
            assert_close(&feed(&mut model, sequence, &more), &alone(&[&tokens[..], &more].concat()));
        }
    }
}

/// Sequences whose tokens lie in cells that others have left, behind and before their own.
#[test]
fn sequences_may_lie_in_pieces() {
    let mut model = open(|o| (o.context_length, o.llama_cpp.cache_tokens) = (Some(256), Some(256)));
    let [a, b, c] = [(); 3].map(|()| model.new_sequence().unwrap());
    feed(&mut model, a, &prompt(1, 90));
    feed(&mut model, b, &prompt(2, 60));
    feed(&mut model, c, &prompt(3, 50));
    model.free(a);
    let (tokens, more) = (prompt(4, 60), prompt(5, 30));
    assert_close(&feed(&mut model, b, &tokens), &alone(&[prompt(2, 60), tokens].concat()));
    assert_close(&feed(&mut model, c, &more), &alone(&[prompt(3, 50), more].concat()));
}
