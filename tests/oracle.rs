//! Against transformers: logits, greedy continuations, rendered chats and token ids of every checkpoint in `fixtures/`,
//! and of every one in the folder that `TERNION_ORACLE` names.
//!
//! Each checkpoint's `golden.json` has the cases; `golden.f32.safetensors` has the logits that transformers computed in
//! f32. A case is `strict` where no activation lies near a rounding tie, so that right implementations agree to 1e-3;
//! elsewhere one step of the int8 activation may differ and moves the logits further.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use safetensors::SafeTensors;
use serde_json::Value;
use ternion::{
    GenerateRequest, LlmBackend, LogitsRequest, Message, Sampling,
    config::{Config, ModelConfig},
};

/// What strict cases are held to, absolutely.
const TOLERANCE: f32 = 1e-3;

/// Where a case is not strict, two tokens this close may change places: a numpy forward pass in f32 and one in f64 differ
/// from transformers, and from each other, in up to 7 of 150 places with gaps of up to 0.13.
const CLOSE_CALL: f32 = 0.15;

struct Case {
    name: String,
    ids: Vec<u32>,
    strict: bool,
    logits: Vec<f32>,
    golden: Value,
}

fn checkpoints() -> Vec<PathBuf> {
    let mut roots = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")];
    roots.extend(std::env::var_os("TERNION_ORACLE").map(PathBuf::from));
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

fn cases(checkpoint: &Path) -> Vec<Case> {
    let golden: Value =
        serde_json::from_slice(&std::fs::read(checkpoint.join("golden.json")).unwrap()).unwrap();
    let file = std::fs::read(checkpoint.join("golden.f32.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    golden["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| {
            let name = case["name"].as_str().unwrap().to_owned();
            let tensor = tensors.tensor(&format!("{name}.logits")).unwrap();
            let logits =
                tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            Case {
                ids: ids(&case["input_ids"]),
                strict: case["strict"] == true,
                logits,
                golden: case.clone(),
                name,
            }
        })
        .collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

async fn load(checkpoint: &Path, change: impl FnOnce(&mut ModelConfig)) -> Arc<dyn LlmBackend> {
    let mut config = ModelConfig::for_path(checkpoint);
    change(&mut config);
    ternion::load(&Config::single("model", config), None)
        .await
        .unwrap_or_else(|e| panic!("{}: {e}", checkpoint.display()))
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

fn argmax(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
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
            let mut request = GenerateRequest::new(case.ids.clone())
                .with_max_tokens(expected.len())
                .with_sampling(Sampling::greedy());
            request.ignore_eos = true;
            let answer = model.generate(request).await.unwrap().collect().await.unwrap();
            assert_eq!(answer.tokens, expected, "{} {}", checkpoint.display(), case.name);
        }
    }
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

/// However the prompt comes into the KV cache, the logits are the same to the last bit.
#[tokio::test]
async fn chunks_and_kept_prefixes_change_nothing() {
    for checkpoint in checkpoints() {
        let whole = load(&checkpoint, |c| c.prefill_chunk = Some(4096)).await;
        for case in cases(&checkpoint).iter().filter(|c| c.ids.len() > 8) {
            let expected = whole.logits(LogitsRequest::new(case.ids.clone())).await.unwrap();
            let place = format!("{} {}", checkpoint.display(), case.name);
            for chunk in [1, 3, 64] {
                let model = load(&checkpoint, |c| {
                    c.prefill_chunk = Some(chunk);
                    c.threads = Some(1);
                })
                .await;
                let logits = model.logits(LogitsRequest::new(case.ids.clone())).await.unwrap();
                assert!(logits == expected, "{place}: chunks of {chunk}");
            }
            let model = load(&checkpoint, |c| c.threads = Some(2)).await;
            let half = case.ids.len() / 2;
            let vocab = model.info().limits.vocab_size;
            model.logits(LogitsRequest::new(case.ids[..half].to_vec())).await.unwrap();
            let rest = model.logits(LogitsRequest::new(case.ids.clone()).with_start(half)).await.unwrap();
            assert_eq!(model.stats().cached_tokens, half as u64, "{place}: the prefix was computed again");
            assert!(rest == expected[half * vocab..], "{place}: on a reused prefix");
        }
    }
}
