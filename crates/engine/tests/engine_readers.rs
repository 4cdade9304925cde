//! Readers that do not read, and requests that come beside long prompts: neither stops the others.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use common::{Toy, VOCAB, greedy, tokens};
use ternion_core::{
    ErrorKind, Event, FinishReason, GenerateRequest, GenerateStream, LlmBackend, LogitsRequest, ScoreRequest,
    TokenEvent,
};
use ternion_engine::Engine;

fn endless(prompt: &[u32], count: usize) -> GenerateRequest {
    let mut request = tokens(prompt).with_max_tokens(count);
    request.params.ignore_eos = true;
    request
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), future).await.unwrap_or_else(|_| panic!("no end: {what}"))
}

/// Streams that nobody reads further than their first event.
async fn unread(engine: &Engine, count: u32) -> Vec<GenerateStream> {
    let mut streams = Vec::new();
    for i in 0..count {
        let mut stream = engine.generate(endless(&[100 + i, 7, 8], 300)).await.unwrap();
        assert!(matches!(stream.next().await, Some(Ok(Event::Prefill(_)))));
        streams.push(stream);
    }
    streams
}

async fn rest(stream: GenerateStream) -> Vec<u32> {
    soon("an answer that was not read", stream.collect()).await.unwrap().tokens
}

#[tokio::test]
async fn answers_that_nobody_reads_stop_nobody_and_lose_nothing() {
    for (max_sequences, can_truncate) in [(1, true), (4, true), (2, false)] {
        let mut toy = Toy::new(VOCAB);
        toy.context = 1000;
        toy.max_sequences = max_sequences;
        toy.can_truncate = can_truncate;
        let probe = Arc::clone(&toy.probe);
        let engine = toy.start();
        let held = unread(&engine, max_sequences as u32 + 2).await;
        for i in 0..3 {
            let prompt = [1 + i, 2, 3];
            let answer = soon("a request beside them", async {
                engine.generate(endless(&prompt, 100)).await.unwrap().collect().await.unwrap()
            });
            assert_eq!(answer.await.tokens, greedy(&prompt, 100), "{max_sequences} sequences");
        }
        let score = soon("a score beside them", engine.score(ScoreRequest::new((0..50).collect(), 1))).await;
        assert_eq!(score.unwrap().tokens.len(), 49);
        let fed = probe.fed.load(Ordering::SeqCst);
        assert!(fed < 2000, "the unread streams went on: {fed} tokens");
        for (i, stream) in held.into_iter().enumerate() {
            assert_eq!(rest(stream).await, greedy(&[100 + i as u32, 7, 8], 300), "{max_sequences} sequences");
        }
        assert!(probe.most_sequences.load(Ordering::SeqCst) <= max_sequences);
        assert_eq!((engine.stats().active, engine.stats().queued), (0, 0));
        assert_eq!(engine.stats().completion_tokens, 300 * (max_sequences as u64 + 2) + 300);
    }
}

/// Both answers come to their end by turns, although the other one always waits for the sequence.
#[tokio::test]
async fn readers_that_are_slow_share_one_sequence() {
    let mut toy = Toy::new(VOCAB);
    toy.context = 1000;
    toy.max_sequences = 1;
    let engine = Arc::new(toy.start());
    let mut readers = Vec::new();
    for i in 0..3_u32 {
        let stream = engine.generate(endless(&[100 + i, 7], 200)).await.unwrap();
        readers.push(tokio::spawn(async move {
            let (mut stream, mut ids) = (stream, Vec::new());
            while let Some(event) = stream.next().await {
                if let Event::Token(TokenEvent { id, .. }) = event.unwrap() {
                    ids.push(id);
                    tokio::time::sleep(Duration::from_millis(3 + u64::from(i))).await;
                }
            }
            ids
        }));
    }
    for (i, reader) in readers.into_iter().enumerate() {
        let ids = soon("a slow reader", reader).await.unwrap();
        assert_eq!(ids, greedy(&[100 + i as u32, 7], 200));
    }
}

#[tokio::test]
async fn parked_answers_end_when_they_are_cancelled_or_dropped() {
    let mut toy = Toy::new(VOCAB);
    toy.context = 1000;
    toy.max_sequences = 1;
    let engine = toy.start();
    let request = endless(&[100, 7, 8], 300);
    let cancel = request.cancel.clone();
    let stalled = engine.generate(request).await.unwrap();
    let dropped = engine.generate(endless(&[101, 7, 8], 300)).await.unwrap();
    soon("a request", async { engine.generate(endless(&[1], 5)).await.unwrap().collect().await.unwrap() })
        .await;
    assert!(engine.stats().queued >= 1, "{:?}", engine.stats());
    cancel.cancel();
    drop(dropped);
    let start = Instant::now();
    while engine.stats().queued + engine.stats().active > 0 {
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", engine.stats());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let end = stalled.collect().await.unwrap();
    assert_eq!(end.finish_reason, FinishReason::Cancelled);
    assert_eq!(end.tokens, greedy(&[100, 7, 8], end.tokens.len()));
}

#[tokio::test]
async fn in_a_full_queue_the_answer_that_is_unread_for_longest_gives_its_place() {
    for max_queued in [0, 2] {
        let mut toy = Toy::new(VOCAB);
        toy.context = 1000;
        toy.max_sequences = 1;
        let engine = toy.start_with(|o| {
            o.max_queued = max_queued;
            o.stall_limit = Duration::from_millis(300);
        });
        let mut held = Vec::new();
        for i in 0..=max_queued as u32 {
            held.push(engine.generate(endless(&[100 + i, 7, 8], 300)).await.unwrap());
        }
        let full = engine.generate(endless(&[1], 5)).await.unwrap_err();
        assert_eq!(full.kind(), ErrorKind::Busy);
        let start = Instant::now();
        let stream = loop {
            match engine.generate(endless(&[1], 5)).await {
                Ok(stream) => break stream,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Busy),
            }
            assert!(start.elapsed() < Duration::from_secs(5));
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        assert!(start.elapsed() > Duration::from_millis(200), "not before the limit");
        assert_eq!(soon("the new request", stream.collect()).await.unwrap().tokens, greedy(&[1], 5));
        let mut ended = 0;
        for stream in held {
            match soon("an unread answer", stream.collect()).await {
                Ok(answer) => assert_eq!(answer.tokens.len(), 300),
                Err(error) => {
                    assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Timeout, false));
                    assert!(error.to_string().contains("nobody has read"), "{error}");
                    ended += 1;
                }
            }
        }
        assert_eq!(ended, 1, "only one place was needed");
    }
}

#[tokio::test]
async fn nobody_loses_an_answer_while_there_is_room() {
    let mut toy = Toy::new(VOCAB);
    toy.context = 1000;
    let engine = toy.start_with(|o| o.stall_limit = Duration::ZERO);
    let held = unread(&engine, 4).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(engine.stats().active, 4, "nobody else needs their sequences");
    for stream in held {
        assert_eq!(rest(stream).await.len(), 300);
    }
}

/// A model on which each token takes a millisecond.
fn slow() -> Toy {
    let mut toy = Toy::new(VOCAB);
    toy.context = 100_000;
    toy.chunk = 64;
    toy.token_time = Duration::from_millis(1);
    toy
}

#[tokio::test]
async fn a_short_request_does_not_wait_for_a_long_prompt() {
    let long: Vec<u32> = (0..1500).map(|i| i % 400).collect();
    for kind in ["generate", "score", "logits"] {
        let engine = Arc::new(slow().start());
        let begun = {
            let (engine, long) = (Arc::clone(&engine), long.clone());
            tokio::spawn(async move {
                match kind {
                    "generate" => {
                        drop(engine.generate(endless(&long, 1)).await.unwrap().collect().await.unwrap());
                    }
                    "score" => drop(engine.score(ScoreRequest::new(long, 1490)).await.unwrap()),
                    _ => drop(engine.logits(LogitsRequest::new(long).with_start(1490)).await.unwrap()),
                }
            })
        };
        tokio::time::sleep(Duration::from_millis(150)).await;
        let start = Instant::now();
        let short = engine.generate(endless(&[401; 20], 1)).await.unwrap().collect().await.unwrap();
        let (all, timing) = (start.elapsed(), short.timing);
        assert!(all < Duration::from_millis(700), "beside a {kind}: {all:?} for 20 tokens");
        assert!(!begun.is_finished(), "the long one takes longer");
        assert!(timing.queued + timing.prefill <= timing.first_token.unwrap());
        assert!(timing.prefill >= Duration::from_millis(20) && timing.prefill < Duration::from_millis(300));
        begun.await.unwrap();
    }
}

/// Also where the short one has most of its prompt in the cache, and where it comes among several long ones.
#[tokio::test]
async fn a_conversation_that_goes_on_does_not_wait_for_long_prompts() {
    let engine = Arc::new(slow().start());
    let first: Vec<u32> = (400..440).collect();
    engine.generate(endless(&first, 1)).await.unwrap().collect().await.unwrap();
    let mut long = Vec::new();
    for i in 0..3 {
        let engine = Arc::clone(&engine);
        let prompt: Vec<u32> = (0..800).map(|n| (n + i * 7) % 399).collect();
        long.push(tokio::spawn(async move {
            let answer = engine.generate(endless(&prompt, 2)).await.unwrap().collect().await.unwrap();
            (answer, prompt)
        }));
    }
    tokio::time::sleep(Duration::from_millis(150)).await;
    let next = [&first[..], &[450, 451, 452, 453]].concat();
    let start = Instant::now();
    let answer = engine.generate(endless(&next, 1)).await.unwrap().collect().await.unwrap();
    assert!(start.elapsed() < Duration::from_millis(700), "{:?}", start.elapsed());
    assert_eq!(answer.tokens, greedy(&next, 1));
    for task in long {
        let (answer, prompt) = task.await.unwrap();
        assert_eq!(answer.tokens, greedy(&prompt, 2));
    }
}

#[tokio::test]
async fn what_a_prompt_waits_for_its_turn_is_no_prefill() {
    let engine = Arc::new(slow().start());
    let ask = |length: u32, first: u32| {
        let engine = Arc::clone(&engine);
        tokio::spawn(async move {
            let prompt: Vec<u32> = (0..length).map(|i| first + i % 100).collect();
            engine.generate(endless(&prompt, 1)).await.unwrap().collect().await.unwrap().timing
        })
    };
    let (a, b) = (ask(600, 100), ask(500, 250));
    let (a, b) = (a.await.unwrap(), b.await.unwrap());
    let (first, second) = if a.first_token < b.first_token { (a, b) } else { (b, a) };
    for timing in [first, second] {
        let sum = timing.queued + timing.prefill;
        assert!(timing.first_token.unwrap().abs_diff(sum) < Duration::from_millis(1), "{timing:?}");
    }
    // Both are computed at the same time, so that the steps of the second are those of the first and its own.
    assert!(first.prefill > Duration::from_millis(500), "{first:?}");
    assert!(second.first_token.unwrap() > Duration::from_secs(1), "{second:?}");
}

/// However many short requests come, a long prompt comes to its end.
#[tokio::test]
async fn a_long_prompt_does_not_starve() {
    let engine = Arc::new(slow().start());
    let prompt: Vec<u32> = (0..600).map(|i| i % 400).collect();
    let long = {
        let engine = Arc::clone(&engine);
        tokio::spawn(async move {
            engine.generate(endless(&prompt, 1)).await.unwrap().collect().await.unwrap();
        })
    };
    let start = Instant::now();
    let mut running = tokio::task::JoinSet::new();
    for i in 0_u32.. {
        if long.is_finished() {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(12), "{i} short requests came before it");
        while running.len() < 3 {
            let engine = Arc::clone(&engine);
            running.spawn(async move {
                let prompt: Vec<u32> = (0..100).map(|n| (n * 3 + i) % 519).collect();
                engine.generate(endless(&prompt, 1)).await.unwrap().collect().await.unwrap();
            });
        }
        running.join_next().await;
    }
    long.await.unwrap();
}

#[tokio::test]
async fn a_shared_first_token_is_not_worth_a_fork() {
    let toy = Toy::new(VOCAB);
    let faults = Arc::clone(&toy.faults);
    let engine = toy.start();
    for i in 1..4_u32 {
        // They all begin with the same token, as all prompts do that begin with a BOS.
        let prompt: Vec<u32> = std::iter::once(5).chain(i * 50..i * 50 + 30).collect();
        let answer = engine.generate(endless(&prompt, 2)).await.unwrap().collect().await.unwrap();
        assert_eq!((answer.usage.cached_tokens, answer.tokens), (0, greedy(&prompt, 2)));
    }
    assert_eq!(faults.forks.load(Ordering::SeqCst), 0);
    let shared: Vec<u32> = std::iter::once(5).chain(50..58).chain([9, 10]).collect();
    let answer = engine.generate(endless(&shared, 2)).await.unwrap().collect().await.unwrap();
    assert_eq!((answer.usage.cached_tokens, answer.tokens), (9, greedy(&shared, 2)));
    assert_eq!(faults.forks.load(Ordering::SeqCst), 1);
}
