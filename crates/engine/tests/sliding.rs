//! The engine's sliding window over a toy model: what it keeps, what it says, and that it disturbs nobody.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::sync::Arc;

use common::{Toy, VOCAB, greedy, tokens};
use ternion_core::{
    DoneEvent, ErrorKind, Event, FinishReason, LlmBackend, TokenEvent,
    context::{ContextPolicy, ContextStep, Sliding},
};

const PROMPT: [u32; 5] = [300, 301, 302, 303, 304];

fn sliding(sinks: usize, recent: Option<usize>) -> ContextPolicy {
    let mut sliding = Sliding::default();
    (sliding.sinks, sliding.recent) = (sinks, recent);
    ContextPolicy::Sliding(sliding)
}

/// What greedy decoding must give in a window of 64 tokens, as new requests with the kept tokens would.
fn greedy_in_window(prompt: &[u32], count: usize, sinks: usize, recent: usize) -> Vec<u32> {
    let mut window = prompt.to_vec();
    if window.len() >= 64 {
        window.drain(sinks..window.len() - recent);
    }
    let mut answer = Vec::new();
    while answer.len() < count {
        let next = greedy(&window, 1)[0];
        answer.push(next);
        window.push(next);
        if window.len() == 64 {
            window.drain(sinks..64 - recent);
        }
    }
    answer
}

#[tokio::test]
async fn a_sliding_window_goes_on_past_the_context_as_new_requests_would() {
    for (sinks, recent, length) in
        [(4, None, 5), (4, None, 63), (0, Some(63), 10), (7, Some(1), 64), (4, Some(20), 500)]
    {
        for can_truncate in [true, false] {
            let mut toy = Toy::new(VOCAB);
            toy.can_truncate = can_truncate;
            let prompt: Vec<u32> = (0..length).map(|i| (i * 7) % VOCAB as u32).collect();
            let mut request =
                tokens(&prompt).with_max_tokens(300).with_context_policy(sliding(sinks, recent));
            request.params.ignore_eos = true;
            let mut stream = toy.start().generate(request).await.unwrap();
            let (mut ids, mut moves, mut report) = (Vec::new(), 0, None);
            let end = loop {
                match stream.next().await.unwrap().unwrap() {
                    Event::Token(TokenEvent { id, .. }) => ids.push(id),
                    Event::Context(ContextStep::WindowMoved { kept, .. }) => {
                        assert_eq!(kept, sinks + recent.unwrap_or(30));
                        moves += 1;
                    }
                    Event::Context(ContextStep::Report(r)) => report = Some(r),
                    Event::Done(DoneEvent { finish_reason, .. }) => break finish_reason,
                    Event::Text(_) => {}
                    Event::Prefill(_) => assert!(ids.is_empty(), "only of the prompt"),
                    other => panic!("unexpected {other:?}"),
                }
            };
            assert_eq!(end, FinishReason::MaxTokens);
            let recent = recent.unwrap_or(30);
            assert_eq!(ids, greedy_in_window(&prompt, 300, sinks, recent), "{sinks} {recent} {length}");
            let report = report.unwrap();
            // A reader that is behind misses news, not the report.
            assert!(moves > 0 && moves <= report.window_moves && report.policy == "sliding");
            assert_eq!(report.window_dropped_tokens, report.window_moves * (64 - sinks - recent));
            let kept_prompt = if length < 64 { length as usize } else { sinks + recent };
            assert_eq!(report.dropped_tokens(), length as usize - kept_prompt);
            assert_eq!((report.prompt_tokens, report.total_prompt_tokens), (length as usize, kept_prompt));
            // All that was ever seen is in the window or was dropped.
            assert!(kept_prompt + 300 - report.window_dropped_tokens <= 64);
        }
    }
}

#[tokio::test]
async fn without_max_tokens_a_window_gives_as_many_tokens_as_the_context_has() {
    for length in [5, 63, 200] {
        let prompt: Vec<u32> = (0..length).map(|i| (i * 7) % VOCAB as u32).collect();
        let mut request = tokens(&prompt).with_context_policy(sliding(4, None));
        request.params.ignore_eos = true;
        let answer = Toy::new(VOCAB).start().generate(request).await.unwrap().collect().await.unwrap();
        assert_eq!(answer.finish_reason, FinishReason::MaxTokens);
        assert_eq!(answer.tokens, greedy_in_window(&prompt, 64, 4, 30));
    }
}

#[tokio::test]
async fn a_window_that_moves_disturbs_nobody_and_reports_nothing_if_it_need_not_move() {
    let engine = Arc::new(Toy::new(VOCAB).start());
    let mut tasks = Vec::new();
    for i in 0..4_u32 {
        let engine = Arc::clone(&engine);
        tasks.push(tokio::spawn(async move {
            let prompt: Vec<u32> = (i * 10..i * 10 + 20).collect();
            let mut request = tokens(&prompt).with_max_tokens(if i % 2 == 0 { 200 } else { 20 });
            request.params.context_policy = Some(sliding(4, None));
            request.params.ignore_eos = true;
            (prompt, engine.generate(request).await.unwrap().collect().await.unwrap())
        }));
    }
    for (i, task) in tasks.into_iter().enumerate() {
        let (prompt, answer) = task.await.unwrap();
        assert_eq!(answer.tokens, greedy_in_window(&prompt, answer.tokens.len(), 4, 30));
        assert_eq!(answer.context.is_some(), i % 2 == 0);
    }
    assert_eq!(engine.stats().prompt_tokens, 80);

    let request = tokens(&PROMPT).with_context_policy(sliding(40, Some(24)));
    assert!(
        engine
            .generate(request)
            .await
            .unwrap_err()
            .to_string()
            .contains("together fewer than the context of 64")
    );
    let request = tokens(&PROMPT).with_context_policy("truncate".parse().unwrap());
    assert_eq!(engine.generate(request).await.unwrap_err().kind(), ErrorKind::Unsupported);
    let request = tokens(&PROMPT).with_document("long");
    assert_eq!(engine.generate(request).await.unwrap_err().kind(), ErrorKind::Unsupported);
}
