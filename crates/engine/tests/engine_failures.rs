//! The engine over a model that panics: what fails, what goes on, and when the engine closes.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use common::{Toy, VOCAB, greedy, hashed_logits, tokens};
use ternion_core::{
    Completion, ErrorKind, GenerateRequest, LlmBackend, LogitsRequest, Result, ScoreRequest,
    logprob::log_softmax_at,
};
use ternion_engine::Engine;

const PROMPT: [u32; 5] = [300, 301, 302, 303, 304];

fn endless(prompt: &[u32], count: usize) -> GenerateRequest {
    let mut request = tokens(prompt).with_max_tokens(count);
    request.params.ignore_eos = true;
    request
}

async fn ask(engine: &Engine, prompt: &[u32], count: usize) -> Result<Completion> {
    engine.generate(endless(prompt, count)).await?.collect().await
}

/// The engine answers as it did before, and has nothing left of earlier requests.
async fn serves_on(engine: &Engine, what: &str) {
    for prompt in [&PROMPT[..], &[1, 2, 3], &[1, 2, 3, 4, 5, 6]] {
        assert_eq!(ask(engine, prompt, 6).await.unwrap().tokens, greedy(prompt, 6), "{what}");
    }
    assert!(!engine.is_closed(), "{what}");
    let stats = engine.stats();
    assert_eq!((stats.active, stats.queued), (0, 0), "{what}");
}

#[tokio::test]
async fn a_panic_ends_the_request_that_causes_it() {
    let mut toy = Toy::new(VOCAB);
    toy.panic_token = Some(13);
    let engine = toy.start();
    for _ in 0..5 {
        let error = ask(&engine, &[1, 13], 3).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Backend);
        assert!(
            error.to_string().contains("the engine panicked")
                && error.to_string().contains("bug with one token")
        );
        assert!(!error.is_retryable());
        serves_on(&engine, "after a request with the token").await;
    }
    let error = engine.score(ScoreRequest::new(vec![1, 2, 13, 4], 1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Backend, "{error}");
    let error = engine.logits(LogitsRequest::new(vec![13])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Backend, "{error}");
    serves_on(&engine, "after a score and logits").await;
    assert_eq!(engine.stats().finished, 5 + 5 * 3 + 2 + 3);
}

/// The model has fed a part of the batch when it panics, so that what it holds is not what it held before.
#[tokio::test]
async fn requests_beside_one_that_panics_are_answered_as_alone() {
    for delay in [0, 1, 3] {
        let mut toy = Toy::new(VOCAB);
        toy.panic_token = Some(13);
        toy.delay = Duration::from_millis(1);
        let engine = Arc::new(toy.start());
        let long: Vec<u32> = (100..150).collect();
        let scored: Vec<u32> = (200..240).collect();
        let spawn = |prompt: Vec<u32>, count| {
            let engine = Arc::clone(&engine);
            tokio::spawn(async move { ask(&engine, &prompt, count).await })
        };
        let decoding = spawn(PROMPT.to_vec(), 40);
        let prompt = spawn(long.clone(), 8);
        let score = {
            let (engine, scored) = (Arc::clone(&engine), scored.clone());
            tokio::spawn(async move { engine.score(ScoreRequest::new(scored, 3)).await })
        };
        tokio::time::sleep(Duration::from_millis(delay)).await;
        let bad = spawn(vec![1, 2, 13], 5);
        assert_eq!(bad.await.unwrap().unwrap_err().kind(), ErrorKind::Backend);
        assert_eq!(decoding.await.unwrap().unwrap().tokens, greedy(&PROMPT, 40));
        assert_eq!(prompt.await.unwrap().unwrap().tokens, greedy(&long, 8));
        let expected: Vec<f32> = (3..40)
            .map(|i| log_softmax_at(&hashed_logits(&scored[..i], VOCAB), scored[i] as usize))
            .collect();
        let score = score.await.unwrap().unwrap();
        assert_eq!(score.tokens.iter().map(|t| t.logprob).collect::<Vec<_>>(), expected);
        serves_on(&engine, "after a batch").await;
    }
}

#[tokio::test]
async fn a_panic_in_any_method_leaves_a_model_that_serves() {
    for method in ["forward", "new_sequence", "truncate", "fork", "free"] {
        let mut toy = Toy::new(VOCAB);
        toy.max_sequences = 2;
        let faults = Arc::clone(&toy.faults);
        let engine = toy.start();
        let prompt: Vec<u32> = (100..120).collect();
        ask(&engine, &prompt, 3).await.unwrap();
        *faults.once.lock().unwrap() = Some(method);
        // A fork of the first, a continuation of it, and prompts for which another has to go.
        let mut prompts = vec![[&prompt[..6], &[7, 8]].concat(), prompt[..12].to_vec()];
        prompts.extend([vec![1], vec![2, 3], vec![4, 5]]);
        let mut failed = 0;
        for prompt in &prompts {
            match ask(&engine, prompt, 4).await {
                Ok(answer) => assert_eq!(answer.tokens, greedy(prompt, 4), "{method}"),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Backend, "{method}: {error}");
                    failed += 1;
                }
            }
        }
        assert!(faults.once.lock().unwrap().is_none(), "{method} was never called");
        assert!(failed <= 1, "{method}: {failed} requests failed");
        serves_on(&engine, method).await;
    }
}

#[tokio::test]
async fn a_window_moves_on_although_truncate_panics() {
    let toy = Toy::new(VOCAB);
    let faults = Arc::clone(&toy.faults);
    let engine = toy.start();
    let mut request = endless(&PROMPT, 100);
    request.params.context_policy = Some("sliding".parse().unwrap());
    let expected = engine.generate(request.clone()).await.unwrap().collect().await.unwrap();
    *faults.once.lock().unwrap() = Some("truncate");
    let mut other = endless(&[9, 8, 7], 100);
    other.params.context_policy = Some("sliding".parse().unwrap());
    engine.generate(other).await.unwrap().collect().await.unwrap();
    assert!(faults.once.lock().unwrap().is_none());
    let again = engine.generate(request).await.unwrap().collect().await.unwrap();
    assert_eq!(again.tokens, expected.tokens);
    serves_on(&engine, "a window").await;
}

#[tokio::test]
async fn a_model_that_no_longer_works_closes_the_engine() {
    let mut toy = Toy::new(VOCAB);
    toy.max_sequences = 1;
    toy.delay = Duration::from_millis(1);
    let (faults, probe) = (Arc::clone(&toy.faults), Arc::clone(&toy.probe));
    let engine = toy.start();
    let running = engine.generate(endless(&PROMPT, 50)).await.unwrap();
    let queued = engine.generate(endless(&[1, 2, 3], 5)).await.unwrap();
    assert!(!engine.is_closed());
    faults.broken.store(true, Ordering::SeqCst);
    let error = running.collect().await.unwrap_err();
    assert!(error.to_string().contains("broken for good"), "{error}");
    let error = queued.collect().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    assert!(error.to_string().contains("load the model again"), "{error}");
    assert!(error.to_string().contains("broken for good"), "{error}");
    assert!(engine.is_closed());
    let stats = engine.stats();
    assert_eq!((stats.active, stats.queued), (0, 0));
    for _ in 0..2 {
        assert_eq!(ask(&engine, &PROMPT, 1).await.unwrap_err().kind(), ErrorKind::Closed);
    }
    let error = engine.score(ScoreRequest::new(vec![1, 2], 1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    // The memory is free although the engine is still there.
    tokio::time::timeout(Duration::from_secs(5), engine.unloaded()).await.unwrap();
    assert_eq!(probe.alive.load(Ordering::SeqCst), 0);
    assert_eq!((engine.stats().active, engine.stats().queued), (0, 0));
}

#[tokio::test]
async fn an_open_engine_is_not_closed_and_a_failed_sequence_is_no_prefix() {
    let mut toy = Toy::new(VOCAB);
    toy.poison = Some(13);
    let engine = toy.start();
    let begun: Vec<u32> = (100..116).collect();
    let error = ask(&engine, &[&begun[..], &[13]].concat(), 2).await.unwrap_err();
    assert_eq!(error.to_string(), "generate: poisoned");
    let answer = ask(&engine, &begun, 4).await.unwrap();
    assert_eq!((answer.usage.cached_tokens, answer.tokens), (0, greedy(&begun, 4)));
    assert!(!engine.is_closed());
}

#[tokio::test]
async fn a_model_that_fails_at_random_never_answers_wrongly() {
    let mut toy = Toy::new(VOCAB);
    toy.max_sequences = 3;
    let faults = Arc::clone(&toy.faults);
    let engine = Arc::new(toy.start());
    let start = Instant::now();
    let mut running = Vec::new();
    for i in 0..40_u32 {
        let engine = Arc::clone(&engine);
        running.push(tokio::spawn(async move {
            let prompt: Vec<u32> = (0..10 + i % 7).map(|n| 50 + (i % 3) + n).collect();
            (ask(&engine, &prompt, 12).await, prompt)
        }));
        let method = ["forward", "fork", "truncate", "free", "new_sequence"][i as usize % 5];
        *faults.once.lock().unwrap() = Some(method);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    *faults.once.lock().unwrap() = None;
    let mut answered = 0;
    for task in running {
        if let (Ok(answer), prompt) = task.await.unwrap() {
            assert_eq!(answer.tokens, greedy(&prompt, 12));
            answered += 1;
        }
    }
    assert!(answered > 0 && start.elapsed() < Duration::from_secs(30), "{answered} answers");
    if !engine.is_closed() {
        serves_on(&engine, "after random panics").await;
    }
}
