//! Against transformers: logits, greedy continuations, rendered chats and token ids of every checkpoint in `fixtures/`,
//! and of every one in the folder that `TERNION_ORACLE` names.
//!
//! Each checkpoint's `golden.json` has the cases; `golden.f32.safetensors` has the logits that transformers computed in
//! f32. A case is `strict` where no activation lies near a rounding tie, so that right implementations agree to 1e-3;
//! elsewhere one step of the int8 activation may differ and moves the logits further.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "oracle/cases.rs"]
mod cases;

use std::{path::Path, sync::Arc};

use cases::{Case, argmax, cases, checkpoints, ids, largest_difference};
use ternion::{
    GenerateRequest, LlmBackend, LogitsRequest, Message, Sampling,
    config::{Config, ModelConfig},
};

/// What strict cases are held to, absolutely.
const TOLERANCE: f32 = 1e-3;

/// Where a case is not strict, two tokens this close may change places: a numpy forward pass in f32 and one in f64 differ
/// from transformers, and from each other, in up to 7 of 150 places with gaps of up to 0.13.
const CLOSE_CALL: f32 = 0.15;

async fn load(checkpoint: &Path, change: impl FnOnce(&mut ModelConfig)) -> Arc<dyn LlmBackend> {
    let mut config = ModelConfig::for_path(checkpoint);
    change(&mut config);
    ternion::load(&Config::single("model", config), None)
        .await
        .unwrap_or_else(|e| panic!("{}: {e}", checkpoint.display()))
}

#[tokio::test]
async fn logits_are_those_of_transformers() {
    let mut strict = 0;
    for checkpoint in checkpoints() {
        let model = load(&checkpoint, |_| {}).await;
        let vocab = model.info().limits.vocab_size;
        for case in cases(&checkpoint) {
            let logits = model.logits(LogitsRequest::new(case.ids.clone())).await.unwrap();
            let difference = largest_difference(&logits, &case.logits);
            let rows = logits.chunks_exact(vocab).zip(case.logits.chunks_exact(vocab));
            let close_calls: Vec<f32> = rows
                .filter(|(ours, theirs)| argmax(ours) != argmax(theirs))
                .map(|(ours, theirs)| theirs[argmax(theirs)] - theirs[argmax(ours)])
                .collect();
            let same_argmax = case.ids.len() - close_calls.len();
            let place = format!("{} {}", checkpoint.display(), case.name);
            println!("{place}: difference {difference:.2e}, argmax {same_argmax}/{}", case.ids.len());
            if case.strict {
                strict += 1;
                assert!(difference <= TOLERANCE, "{place}: {difference}");
                assert!(close_calls.is_empty(), "{place}: the most probable token differs");
            }
            assert!(close_calls.iter().all(|gap| *gap < CLOSE_CALL), "{place}: {close_calls:?}");
            assert!(20 * same_argmax >= 19 * case.ids.len(), "{place}: argmax {same_argmax}");
        }
    }
    assert!(strict >= 30, "only {strict} strict cases");
}

#[tokio::test]
async fn greedy_continuations_are_those_of_transformers() {
    for checkpoint in checkpoints() {
        let model = load(&checkpoint, |_| {}).await;
        for case in cases(&checkpoint).iter().filter(|c| c.strict && c.golden["greedy_strict"] == true) {
            let expected = ids(&case.golden["greedy_f32"]);
            let found = greedy(&*model, case, expected.len()).await;
            assert_eq!(found, expected, "{} {}", checkpoint.display(), case.name);
        }
    }
}

async fn greedy(model: &dyn LlmBackend, case: &Case, count: usize) -> Vec<u32> {
    let mut request =
        GenerateRequest::new(case.ids.clone()).with_max_tokens(count).with_sampling(Sampling::greedy());
    request.params.ignore_eos = true;
    model.generate(request).await.unwrap().collect().await.unwrap().tokens
}

#[tokio::test]
async fn prompts_are_those_of_transformers() {
    let mut chats = 0;
    for checkpoint in checkpoints() {
        let model = load(&checkpoint, |_| {}).await;
        let tokenizer = model.tokenizer().unwrap();
        for case in cases(&checkpoint) {
            let place = format!("{} {}", checkpoint.display(), case.name);
            if let Some(messages) = case.golden.get("messages") {
                let messages: Vec<Message> = serde_json::from_value(messages.clone()).unwrap();
                assert_eq!(tokenizer.encode_chat(&messages, true).unwrap(), case.ids, "{place}");
                if let Some(rendered) = case.golden["rendered"].as_str() {
                    assert_eq!(tokenizer.render_chat(&messages, true).unwrap(), rendered, "{place}");
                }
                chats += 1;
            } else if case.name == "natural" {
                let text = case.golden["text"].as_str().unwrap();
                assert_eq!(tokenizer.encode(text, true).unwrap(), case.ids, "{place}");
            }
        }
    }
    assert!(chats >= 10, "only {chats} chats");
}

/// The sum over the places of the KL divergence of what a model says from what it says with keys and values in f32.
fn divergence(exact: &[f32], found: &[f32], vocab: usize) -> f64 {
    let log_softmax = |row: &[f32]| -> Vec<f64> {
        let most = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
        let total: f64 = row.iter().map(|x| f64::from(x - most).exp()).sum();
        row.iter().map(|x| f64::from(x - most) - total.ln()).collect()
    };
    let rows = exact.chunks_exact(vocab).zip(found.chunks_exact(vocab));
    let divergences = rows.map(|(exact, found)| {
        let (p, q) = (log_softmax(exact), log_softmax(found));
        p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
    });
    divergences.sum()
}

/// Keys and values as integer sums are those in floats: logits are the same to the last bit.
#[tokio::test]
async fn exact_keys_and_values_lose_nothing() {
    for checkpoint in checkpoints() {
        let load = async |kv_type: &str| {
            let set = |c: &mut ModelConfig| {
                c.options.insert("kv_type".to_owned(), kv_type.into());
            };
            load(&checkpoint, set).await
        };
        let (floats, sums) = (load("f32").await, load("exact").await);
        for case in cases(&checkpoint) {
            let request = LogitsRequest::new(case.ids.clone());
            let expected = floats.logits(request.clone()).await.unwrap();
            let found = sums.logits(request).await.unwrap();
            let same = expected.iter().zip(&found).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{} {}", checkpoint.display(), case.name);
        }
    }
}

/// Keys and values in fewer bits: what is rounded may put an activation on the other side of a rounding tie, so that
/// logits move as they do between any two implementations where a case is not strict, and an answer may go another way.
#[tokio::test]
async fn keys_and_values_in_fewer_bits_are_close() {
    for (kv_type, bounds) in [("f16", Bounds::F16), ("int8", Bounds::INT8)] {
        let (mut best, mut places, mut sum) = (0, 0, 0.0);
        let (mut answers, mut same) = (0, 0);
        for checkpoint in checkpoints() {
            let exact = load(&checkpoint, |_| {}).await;
            let model = load(&checkpoint, |c| {
                c.options.insert("kv_type".to_owned(), kv_type.into());
            })
            .await;
            let vocab = model.info().limits.vocab_size;
            for case in cases(&checkpoint) {
                let request = LogitsRequest::new(case.ids.clone());
                let exact = exact.logits(request.clone()).await.unwrap();
                let found = model.logits(request).await.unwrap();
                assert!(exact != found, "{kv_type} changes nothing: is it used?");
                let rows = exact.chunks_exact(vocab).zip(found.chunks_exact(vocab));
                best += rows.filter(|(a, b)| argmax(a) == argmax(b)).count();
                places += case.ids.len();
                sum += divergence(&exact, &found, vocab);
                if case.strict && case.golden["greedy_strict"] == true {
                    let expected = ids(&case.golden["greedy_f32"]);
                    answers += 1;
                    same += usize::from(greedy(&*model, &case, expected.len()).await == expected);
                }
            }
        }
        let mean = sum / places as f64;
        println!("{kv_type}: KL {mean:.1e}, best token {best} of {places}, answers {same} of {answers}");
        assert!(mean < bounds.divergence, "{kv_type}: {mean}");
        assert!(best as f64 > bounds.best * places as f64, "{kv_type}: {best} of {places}");
        assert!(same as f64 > bounds.answers * answers as f64, "{kv_type}: {same} of {answers}");
    }
}

/// What was measured, and a little more: f16 1.6e-3, 3916 of 4028 places, 59 of 75 answers; int8 3.6e-3, 3827 and 48.
struct Bounds {
    /// KL divergence, the mean over all places.
    divergence: f64,
    /// Part of the places with the same most probable token.
    best: f64,
    /// Part of the greedy answers that are the same.
    answers: f64,
}

impl Bounds {
    const F16: Self = Self { divergence: 2e-3, best: 0.965, answers: 0.75 };
    const INT8: Self = Self { divergence: 4.5e-3, best: 0.94, answers: 0.58 };
}

/// A head of fewer bits: the leading logits are computed again from the original weights, so no greedy answer changes, and
/// the rest is close.
#[tokio::test]
async fn heads_of_fewer_bits_give_the_same_greedy_answers() {
    // KL divergences: what was measured (1.8e-5 and 2.0e-3), and a little more.
    for (head, bound) in [("int8", 4e-5), ("int4", 4e-3)] {
        let (mut places, mut sum, mut answers) = (0, 0.0, 0);
        for checkpoint in checkpoints() {
            let exact = load(&checkpoint, |_| {}).await;
            let model = load(&checkpoint, |c| {
                c.options.insert("head".to_owned(), head.into());
            })
            .await;
            let vocab = model.info().limits.vocab_size;
            for case in cases(&checkpoint) {
                let place = format!("{} {} {head}", checkpoint.display(), case.name);
                let request = LogitsRequest::new(case.ids.clone());
                let expected = exact.logits(request.clone()).await.unwrap();
                let found = model.logits(request).await.unwrap();
                assert!(expected != found, "{head} changes nothing: is it used?");
                for (expected, found) in expected.chunks_exact(vocab).zip(found.chunks_exact(vocab)) {
                    let best = argmax(expected);
                    assert_eq!((argmax(found), found[best]), (best, expected[best]), "{place}");
                }
                places += case.ids.len();
                sum += divergence(&expected, &found, vocab);
                if let Some(continuation) = case.golden.get("greedy_f32") {
                    let count = ids(continuation).len();
                    answers += 1;
                    let expected = greedy(&*exact, &case, count).await;
                    assert_eq!(greedy(&*model, &case, count).await, expected, "{place}");
                }
            }
        }
        let mean = sum / places as f64;
        println!("{head}: KL {mean:.1e} over {places} places, {answers} answers the same");
        assert!(mean < bound, "{head}: {mean}");
        assert!(answers >= 20, "only {answers} answers");
    }
}

/// However the prompt comes into the KV cache, the logits are the same to the last bit.
#[tokio::test]
async fn chunks_and_kept_prefixes_change_nothing() {
    for kv_type in ["f32", "exact", "f16", "int8"] {
        chunks_change_nothing(kv_type).await;
    }
}

async fn chunks_change_nothing(kv_type: &str) {
    for checkpoint in checkpoints() {
        let load = async |change: &dyn Fn(&mut ModelConfig)| {
            let kept = |c: &mut ModelConfig| {
                c.options.insert("kv_type".to_owned(), kv_type.into());
                change(c);
            };
            load(&checkpoint, kept).await
        };
        let whole = load(&|c| c.prefill_chunk = Some(4096)).await;
        for case in cases(&checkpoint).iter().filter(|c| c.ids.len() > 8) {
            let expected = whole.logits(LogitsRequest::new(case.ids.clone())).await.unwrap();
            let place = format!("{} {} {kv_type}", checkpoint.display(), case.name);
            for chunk in [1, 3, 64] {
                let model = load(&|c| {
                    c.prefill_chunk = Some(chunk);
                    c.threads = Some(1);
                })
                .await;
                let logits = model.logits(LogitsRequest::new(case.ids.clone())).await.unwrap();
                assert!(logits == expected, "{place}: chunks of {chunk}");
            }
            let model = load(&|c| c.threads = Some(2)).await;
            let half = case.ids.len() / 2;
            let vocab = model.info().limits.vocab_size;
            model.logits(LogitsRequest::new(case.ids[..half].to_vec())).await.unwrap();
            let rest = model.logits(LogitsRequest::new(case.ids.clone()).with_start(half)).await.unwrap();
            assert_eq!(model.stats().cached_tokens, half as u64, "{place}: the prefix was computed again");
            assert!(rest == expected[half * vocab..], "{place}: on a reused prefix");
        }
    }
}
