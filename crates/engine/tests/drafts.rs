//! Prompt lookup: drafts make answers faster and change nothing of them.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use common::{Toy, VOCAB, tokens};
use ternion_core::{
    Completion, GenerateRequest, LlmBackend, Prediction, Sampling, Usage, context::ContextPolicy,
};
use ternion_engine::{Engine, EngineOptions};

/// A model whose answers repeat themselves: it sees two tokens and knows thirty.
fn repetitive() -> Toy {
    let mut toy = Toy::new(30);
    toy.order = 2;
    toy.context = 600;
    toy.chunk = 32;
    // A step with several tokens takes hardly longer than one with one.
    toy.delay = Duration::from_micros(200);
    toy
}

fn options(lookup: bool) -> impl FnOnce(&mut EngineOptions) {
    move |options| {
        options.info.capabilities.batch_invariant = true;
        options.prompt_lookup = lookup;
    }
}

fn long(prompt: &[u32], count: usize) -> GenerateRequest {
    let mut request = tokens(prompt).with_max_tokens(count);
    request.params.ignore_eos = true;
    request
}

/// All of an answer but its times and the counts of drafts.
fn facts(answer: &Completion) -> String {
    let mut usage = answer.usage;
    (usage.drafted_tokens, usage.accepted_tokens) = (0, 0);
    format!("{:?}", (&answer.text, &answer.tokens, &answer.logprobs, &answer.finish_reason, usage))
}

async fn ask(engine: &Engine, request: GenerateRequest) -> Completion {
    engine.generate(request).await.unwrap().collect().await.unwrap()
}

#[tokio::test]
async fn an_answer_that_copies_its_prompt_takes_a_fraction_of_the_steps() {
    let prompt: Vec<u32> = (0..200).map(|i| 100 + (i * 37) % 300).collect();
    let run = async |lookup, prediction: Prediction| {
        let mut toy = Toy::scripted(VOCAB, prompt.len(), &prompt[50..150]);
        toy.context = 600;
        toy.delay = Duration::from_millis(1);
        let probe = Arc::clone(&toy.probe);
        let engine = toy.start_with(options(lookup));
        let mut request = long(&prompt, 100);
        request.params.prediction = prediction;
        let answer = ask(&engine, request).await;
        assert_eq!(answer.tokens, prompt[50..150]);
        (probe.calls.load(Ordering::SeqCst) - prompt.len().div_ceil(8), answer.usage)
    };
    let (plain, usage) = run(false, Prediction::Auto).await;
    assert_eq!((plain, usage.drafted_tokens), (99, 0));
    let (off, usage) = run(true, Prediction::Off).await;
    assert_eq!((off, usage.drafted_tokens), (99, 0));
    let (steps, usage) = run(true, Prediction::Auto).await;
    let Usage { drafted_tokens, accepted_tokens, .. } = usage;
    // 40 steps on an idle machine. How long drafts are depends on what steps have cost.
    assert!(steps < 80 && accepted_tokens > 20, "{steps} steps, {usage:?}");
    assert!(drafted_tokens >= accepted_tokens && drafted_tokens < accepted_tokens + 20, "{usage:?}");
}

#[tokio::test]
async fn a_text_that_the_answer_repeats_is_searched_too() {
    let text = "the quick brown fox jumps over the lazy dog and then sleeps under the old tree by the river";
    let script = common::tokenizer().encode(text, false).unwrap();
    let prompt = [300, 301, 302];
    let mut toy = Toy::scripted(VOCAB, prompt.len(), &script);
    toy.delay = Duration::from_millis(1);
    let engine = toy.start_with(options(true));
    let mut request = long(&prompt, script.len().min(50));
    let answer = ask(&engine, request.clone()).await;
    assert_eq!(answer.usage.accepted_tokens, 0);
    request.params.prediction = Prediction::Text(text.to_owned());
    let predicted = ask(&engine, request).await;
    assert_eq!(predicted.tokens, answer.tokens);
    assert!(predicted.usage.accepted_tokens > 3, "{:?}", predicted.usage);
}

#[tokio::test]
async fn nothing_is_drafted_where_nothing_repeats() {
    let mut toy = Toy::new(VOCAB);
    toy.context = 600;
    let answer = ask(&toy.start_with(options(true)), long(&[300, 301, 302], 300)).await;
    assert_eq!((answer.tokens.len(), answer.usage.drafted_tokens), (300, 0));
}

/// Requests of all kinds.
fn requests() -> Vec<GenerateRequest> {
    let prompts = [vec![1, 2, 3], (0..25).collect::<Vec<u32>>(), vec![7; 40]];
    let mut requests = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        requests.push(long(prompt, 150));
        for seed in 0..6 {
            let mut sampling = Sampling::default().with_seed(seed).with_temperature(0.2 + 0.2 * seed as f32);
            if seed % 2 == 1 {
                sampling = sampling.with_top_k(3).with_repetition_penalty(1.1).with_frequency_penalty(0.02);
            }
            let mut request = long(prompt, 100 + i).with_sampling(sampling);
            request.params.logprobs = seed % 3 == 0;
            request.params.top_logprobs = if seed == 3 { 4 } else { 0 };
            if seed == 4 {
                request.params.stop_tokens = vec![11];
            }
            if seed == 5 {
                request.params.stop = vec!["!\"".to_owned(), "%&".to_owned()];
            }
            requests.push(request);
        }
        // The context ends the answer.
        requests.push(long(prompt, 10_000));
        requests.push(long(prompt, 1500).with_context_policy("sliding".parse::<ContextPolicy>().unwrap()));
    }
    requests
}

#[tokio::test]
async fn answers_are_the_same_with_drafts_and_without() {
    let (plain, drafting) = (repetitive().start_with(options(false)), repetitive().start_with(options(true)));
    let (mut drafted, mut accepted) = (0, 0);
    for (i, request) in requests().into_iter().enumerate() {
        let (plain, drafting) = (ask(&plain, request.clone()).await, ask(&drafting, request).await);
        assert_eq!(facts(&drafting), facts(&plain), "request {i}");
        drafted += drafting.usage.drafted_tokens;
        accepted += drafting.usage.accepted_tokens;
    }
    assert!(accepted > 200 && drafted > accepted, "{accepted} of {drafted}");
}

#[tokio::test]
async fn answers_are_the_same_in_batches_and_with_little_memory() {
    let alone = repetitive().start_with(options(false));
    let mut toy = repetitive();
    toy.memory = 1300;
    toy.delay = Duration::from_millis(1);
    let together = Arc::new(toy.start_with(options(true)));
    let requests: Vec<_> =
        requests().into_iter().filter(|request| request.params.max_tokens.unwrap() < 200).collect();
    let running: Vec<_> = requests
        .iter()
        .cloned()
        .map(|request| {
            let together = Arc::clone(&together);
            tokio::spawn(async move { ask(&together, request).await })
        })
        .collect();
    let mut accepted = 0;
    for (request, answer) in requests.into_iter().zip(running) {
        let (answer, expected) = (answer.await.unwrap(), ask(&alone, request).await);
        assert_eq!(
            (answer.tokens, answer.logprobs, answer.finish_reason),
            (expected.tokens, expected.logprobs, expected.finish_reason)
        );
        accepted += answer.usage.accepted_tokens;
    }
    assert!(accepted > 20, "{accepted}");
}

#[cfg(feature = "constraints")]
#[tokio::test]
async fn constraints_decide_on_drafts_too() {
    // The script repeats an object; the grammar forces parts of it and forbids what does not belong.
    let text =
        "[{\"name\": \"aaaa\", \"n\": 1}, {\"name\": \"aaaa\", \"n\": 1}, {\"name\": \"aaaa\", \"n\": 1}]";
    let tokenizer = common::tokenizer();
    let (script, prompt) =
        (tokenizer.encode(text, false).unwrap(), tokenizer.encode(&text.repeat(2), false).unwrap());
    let constraints = [
        ternion_core::Constraint::JsonObject,
        ternion_core::Constraint::Regex("[a-z \\[\\]{}:,\"0-9]*".to_owned()),
        ternion_core::Constraint::Regex("\\[(\\{\"name\": \"a+\", \"n\": 1\\},? ?)+\\]".to_owned()),
    ];
    for constraint in constraints {
        let mut answers = Vec::new();
        for lookup in [false, true] {
            let mut toy = Toy::scripted(VOCAB, prompt.len(), &script);
            toy.context = 1000;
            let engine = toy.start_with(|o| {
                options(lookup)(o);
                o.eos_tokens = vec![256];
            });
            let request = tokens(&prompt).with_constraint(constraint.clone()).with_max_tokens(120);
            answers.push(ask(&engine, request).await);
        }
        assert_eq!(facts(&answers[1]), facts(&answers[0]));
        assert!(
            answers[1].usage.drafted_tokens > 0 || answers[1].usage.forced_tokens > 60,
            "{:?}",
            answers[1].usage
        );
    }
}

#[tokio::test]
async fn engines_that_could_not_keep_the_tokens_the_same_draft_nothing() {
    for (invariant, can_truncate) in [(false, true), (true, false)] {
        let mut toy = repetitive();
        toy.can_truncate = can_truncate;
        let engine = toy.start_with(|options| options.info.capabilities.batch_invariant = invariant);
        let answer = ask(&engine, long(&[1, 2, 3], 100)).await;
        assert_eq!(answer.usage.drafted_tokens, 0);
    }
}

#[tokio::test]
async fn an_answer_survives_a_failure_to_take_a_draft_back() {
    let toy = repetitive();
    let faults = Arc::clone(&toy.faults);
    let engine = toy.start_with(options(true));
    // The first call that truncates is one after a draft that was wrong.
    *faults.once.lock().unwrap() = Some("truncate");
    let plain = repetitive().start_with(options(false));
    for (i, request) in requests().into_iter().enumerate() {
        let (answer, expected) = (ask(&engine, request.clone()).await, ask(&plain, request).await);
        assert_eq!(facts(&answer), facts(&expected), "request {i}");
    }
    assert!(faults.once.lock().unwrap().is_none());
}
