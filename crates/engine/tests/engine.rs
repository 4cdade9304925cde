//! The engine over a toy model: streaming, sampling, stopping, cancelling, batching, prefix reuse, errors.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::{
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use common::{Toy, VOCAB, greedy, hashed_logits, tokenizer, tokens};
use ternion_core::{
    DoneEvent, ErrorKind, Event, FinishReason, GenerateRequest, LlmBackend, LlmBackendExt, LogitsRequest,
    Message, ModelInfo, PrefillEvent, Prompt, Sampling, ScoreRequest, TextEvent, logprob::log_softmax_at,
    text::TokenName,
};
use ternion_engine::{Engine, EngineOptions};
use tokio_util::sync::CancellationToken;

const PROMPT: [u32; 5] = [300, 301, 302, 303, 304];

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(5), "waited too long for: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn greedy_tokens_are_those_of_the_model_whatever_the_chunk() {
    let prompt: Vec<u32> = (100..130).collect();
    for chunk in [1, 3, 64] {
        let mut toy = Toy::new(VOCAB);
        toy.chunk = chunk;
        let mut request = tokens(&prompt).with_max_tokens(10);
        request.params.ignore_eos = true;
        let answer = toy.start().generate(request).await.unwrap().collect().await.unwrap();
        assert_eq!(answer.tokens, greedy(&prompt, 10), "chunk {chunk}");
        assert_eq!(answer.finish_reason, FinishReason::MaxTokens);
        assert_eq!((answer.usage.prompt_tokens, answer.usage.completion_tokens), (30, 10));
        assert_eq!(answer.seed, None);
    }
}

#[tokio::test]
async fn events_come_in_order_and_make_up_the_answer() {
    let text = "déjà vu 🎉 ok";
    let script = tokenizer().encode(text, false).unwrap();
    let toy = Toy::scripted(VOCAB, PROMPT.len(), &script);
    let mut stream = toy
        .start()
        .generate(tokens(&PROMPT).with_max_tokens(script.len()).with_top_logprobs(3))
        .await
        .unwrap();
    let (mut answer, mut ids, mut prefill, mut done) = (String::new(), Vec::new(), 0, false);
    while let Some(event) = stream.next().await {
        assert!(!done, "nothing comes after the end");
        match event.unwrap() {
            Event::Prefill(PrefillEvent { done, total, .. }) => {
                assert!(ids.is_empty() && done > prefill && total == PROMPT.len());
                prefill = done;
            }
            Event::Token(token) => {
                assert!(token.logprob.is_some_and(|l| l <= 0.0));
                assert_eq!(token.top_logprobs.len(), 3);
                assert_eq!(token.top_logprobs[0].id, token.id, "the script's tokens are the most probable");
                assert_eq!(Some(token.top_logprobs[0].logprob), token.logprob);
                assert!(token.top_logprobs[1].logprob >= token.top_logprobs[2].logprob);
                ids.push(token.id);
            }
            Event::Text(TextEvent { text, .. }) => {
                assert!(!text.is_empty() && !text.contains('\u{FFFD}'), "a character was split");
                answer.push_str(&text);
            }
            Event::Done(DoneEvent { finish_reason, usage, timing, .. }) => {
                assert_eq!(finish_reason, FinishReason::MaxTokens);
                assert_eq!(usage.completion_tokens, ids.len());
                assert!(timing.first_token.is_some());
                done = true;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert!(done);
    assert_eq!((answer.as_str(), ids), (text, script));
    assert_eq!(prefill, PROMPT.len());
}

#[tokio::test]
async fn stop_strings_lie_across_tokens_and_are_cut_off() {
    let script = tokenizer().encode("one two three four", false).unwrap();
    let toy = Toy::scripted(VOCAB, PROMPT.len(), &script);
    let request = tokens(&PROMPT).with_max_tokens(50).with_stop(["o th", "never"]);
    let answer = toy.start().generate(request).await.unwrap().collect().await.unwrap();
    assert_eq!(answer.text, "one tw");
    assert_eq!(answer.finish_reason, FinishReason::StopString("o th".into()));
    assert!(answer.tokens.len() < script.len(), "it stops at once");
}

#[tokio::test]
async fn an_end_of_sequence_token_ends_the_answer_without_text() {
    let tokenizer = tokenizer();
    let mut script = tokenizer.encode("yes", false).unwrap();
    script.push(511);
    let start = || Toy::scripted(VOCAB, PROMPT.len(), &script).start_with(|o| o.eos_tokens = vec![511]);
    let answer = start().generate(tokens(&PROMPT)).await.unwrap().collect().await.unwrap();
    assert_eq!((answer.text.as_str(), answer.finish_reason), ("yes", FinishReason::EndOfSequence));
    assert_eq!(answer.tokens, script);

    let mut request = tokens(&PROMPT).with_max_tokens(script.len() + 2);
    request.params.ignore_eos = true;
    let answer = start().generate(request).await.unwrap().collect().await.unwrap();
    assert_eq!(answer.finish_reason, FinishReason::MaxTokens);
}

#[tokio::test]
async fn a_stop_token_ends_the_answer_without_text() {
    let tokenizer = tokenizer();
    let mut script = tokenizer.encode("yes", false).unwrap();
    script.extend([511, 7]);
    let answer = async |request: GenerateRequest, eos: Vec<u32>| {
        let engine = Toy::scripted(VOCAB, PROMPT.len(), &script).start_with(|o| o.eos_tokens = eos);
        engine.generate(request).await.unwrap().collect().await.unwrap()
    };
    let request = tokens(&PROMPT).with_max_tokens(20).with_stop_tokens([4, 511]);
    for ignore_eos in [false, true] {
        let mut request = request.clone();
        request.params.ignore_eos = ignore_eos;
        let stopped = answer(request, Vec::new()).await;
        assert_eq!((stopped.text.as_str(), stopped.finish_reason), ("yes", FinishReason::StopToken(511)));
        assert_eq!(stopped.tokens, script[..script.len() - 1]);
    }
    // A token that ends every answer of the model does that first.
    assert_eq!(answer(request, vec![511]).await.finish_reason, FinishReason::EndOfSequence);
    let unknown = tokens(&PROMPT).with_stop_tokens([VOCAB as u32]);
    let error = Toy::new(VOCAB).start().generate(unknown).await.unwrap_err();
    assert!(error.to_string().contains("stop_tokens: token 520"), "{error}");
}

#[tokio::test]
async fn configured_end_tokens_take_the_place_of_those_of_the_files() {
    let tokenizer = tokenizer();
    let eos = tokenizer.eos_id().unwrap();
    let name = tokenizer.token(eos).unwrap();
    let yes = tokenizer.encode("yes", false).unwrap();
    let script = [&yes[..], &[7, eos]].concat();
    let start = |names: Option<Vec<TokenName>>| {
        Toy::scripted(VOCAB, PROMPT.len(), &script).start_with(|o| {
            o.eos_tokens = vec![7];
            o.end_tokens = names;
        })
    };
    let ended_by = |id: u32| script.iter().position(|token| *token == id).unwrap() + 1;
    for (names, ids, length) in [
        (None, vec![7.min(eos), 7.max(eos)], ended_by(7)),
        (Some(vec![TokenName::Text(name.clone())]), vec![eos], ended_by(eos)),
        (Some(vec![TokenName::Id(7)]), vec![7], ended_by(7)),
        (Some(vec!["7".parse().unwrap(), name.parse().unwrap()]), vec![7.min(eos), 7.max(eos)], ended_by(7)),
        (Some(Vec::new()), Vec::new(), script.len() + 3),
    ] {
        let engine = start(names.clone());
        assert_eq!(engine.info().end_tokens, ids, "{names:?}");
        let request = tokens(&PROMPT).with_max_tokens(script.len() + 3);
        let answer = engine.generate(request).await.unwrap().collect().await.unwrap();
        assert_eq!(answer.tokens.len(), length, "{names:?}");
    }
    for (name, expected) in [("<|nothing|>", "no token `<|nothing|>`"), ("520", "no token `520`")] {
        let mut options = EngineOptions::new(ModelInfo::new("toy", "test"));
        options.end_tokens = Some(vec![name.parse().unwrap()]);
        let error = Engine::start(Box::new(Toy::new(VOCAB)), common::tokenizer(), options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(error.to_string().contains("end_tokens") && error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test]
async fn names_of_special_tokens_are_stop_strings() {
    let tokenizer = tokenizer();
    let special = tokenizer.eos_id().unwrap();
    let name = tokenizer.token(special).unwrap();
    let (yes, no) = (tokenizer.encode("yes", false).unwrap(), tokenizer.encode(" no", false).unwrap());
    let script = [&yes[..], &[special], &no].concat();
    for (stop, text) in [
        (name.clone(), "yes"),
        (format!("{name} n"), "yes"),
        (format!("s{name}"), "ye"),
        (" no".to_owned(), "yes"),
    ] {
        let engine = Toy::scripted(VOCAB, PROMPT.len(), &script).start();
        let mut request = tokens(&PROMPT).with_max_tokens(script.len()).with_stop([stop.as_str()]);
        request.params.ignore_eos = true;
        let mut stream = engine.generate(request).await.unwrap();
        let mut answer = String::new();
        let end = loop {
            match stream.next().await.unwrap().unwrap() {
                Event::Text(piece) => answer.push_str(&piece.text),
                Event::Done(done) => break done.finish_reason,
                _ => {}
            }
        };
        assert_eq!((answer.as_str(), end), (text, FinishReason::StopString(stop)));
    }
    let engine = Toy::scripted(VOCAB, PROMPT.len(), &script).start();
    let mut request = tokens(&PROMPT).with_max_tokens(script.len()).with_stop(["never"]);
    request.params.ignore_eos = true;
    assert_eq!(engine.generate(request).await.unwrap().collect().await.unwrap().text, "yes no");
}

#[tokio::test]
async fn the_context_ends_the_answer() {
    let mut toy = Toy::new(VOCAB);
    toy.context = 12;
    let mut request = tokens(&PROMPT);
    request.params.ignore_eos = true;
    let answer = toy.start().generate(request).await.unwrap().collect().await.unwrap();
    assert_eq!(answer.finish_reason, FinishReason::ContextFull);
    assert_eq!(answer.tokens.len(), 12 - PROMPT.len());
}

#[tokio::test]
async fn a_seed_gives_the_same_tokens_alone_and_in_company() {
    let sampled = |seed| {
        let mut request = GenerateRequest::new(PROMPT.to_vec())
            .with_max_tokens(20)
            .with_sampling(Sampling::default().with_temperature(0.9).with_top_p(0.95).with_seed(seed));
        request.params.ignore_eos = true;
        request
    };
    let alone = Toy::new(VOCAB).start().generate(sampled(42)).await.unwrap().collect().await.unwrap();
    assert_eq!(alone.seed, Some(42));

    let toy = Toy::new(VOCAB);
    let probe = Arc::clone(&toy.probe);
    let engine = toy.start();
    let mut streams = Vec::new();
    for seed in [1, 42, 3, 4] {
        streams.push(engine.generate(sampled(seed)).await.unwrap());
    }
    let mut answers = Vec::new();
    for stream in streams {
        answers.push(tokio::spawn(stream.collect()));
    }
    let mut all = Vec::new();
    for answer in answers {
        all.push(answer.await.unwrap().unwrap());
    }
    assert_eq!(all[1].tokens, alone.tokens);
    assert_ne!(all[0].tokens, alone.tokens);
    assert!(probe.largest_batch.load(Ordering::SeqCst) >= 2, "they ran together");
}

#[tokio::test]
async fn greedy_ignores_the_configured_penalties_but_not_the_biases() {
    let configured = Sampling::default()
        .with_temperature(1.0)
        .with_repetition_penalty(2.0)
        .with_presence_penalty(50.0)
        .with_frequency_penalty(50.0);
    // The same token again and again, which every penalty would end.
    let script = [5; 4];
    let engine = Toy::scripted(VOCAB, PROMPT.len(), &script).start_with(|o| o.sampling = configured.clone());
    let mut request = tokens(&PROMPT).with_max_tokens(script.len());
    request.params.ignore_eos = true;
    let answer = engine.generate(request.clone()).await.unwrap().collect().await.unwrap();
    assert_eq!(answer.tokens, script);

    let forbidden = configured.with_logit_bias(5, f32::NEG_INFINITY);
    let engine = Toy::scripted(VOCAB, PROMPT.len(), &script).start_with(|o| o.sampling = forbidden);
    let answer = engine.generate(request.clone()).await.unwrap().collect().await.unwrap();
    assert!(!answer.tokens.contains(&5));
    request.params.sampling.logit_bias.insert(5, 0.0);
    let answer = engine.generate(request).await.unwrap().collect().await.unwrap();
    assert_eq!(answer.tokens, script);
}

#[tokio::test]
async fn score_gives_the_log_probabilities_of_the_raw_logits() {
    let sequence: Vec<u32> = (10..40).collect();
    let engine = Toy::new(VOCAB).start();
    for start in [1, 7, 29] {
        let score = engine.score(ScoreRequest::new(sequence.clone(), start).with_top(3)).await.unwrap();
        assert_eq!(score.tokens.len(), sequence.len() - start);
        for (i, token) in score.tokens.iter().enumerate() {
            let logits = hashed_logits(&sequence[..start + i], VOCAB);
            assert_eq!(token.id, sequence[start + i]);
            assert_eq!(token.logprob, log_softmax_at(&logits, token.id as usize));
            assert_eq!(token.rank, logits.iter().filter(|&&l| l > logits[token.id as usize]).count());
            assert_eq!(token.top.len(), 3);
            assert!(token.top[0].logprob >= token.top[1].logprob);
        }
    }
    let rows = engine.logits(LogitsRequest::new(sequence.clone()).with_start(4)).await.unwrap();
    let expected: Vec<f32> = (5..=30).flat_map(|n| hashed_logits(&sequence[..n], VOCAB)).collect();
    assert_eq!(rows, expected);
}

#[tokio::test]
async fn score_computes_nothing_that_scores_nothing() {
    for chunk in [1, 4, 64] {
        let mut toy = Toy::new(VOCAB);
        toy.chunk = chunk;
        let probe = Arc::clone(&toy.probe);
        let engine = toy.start();
        for sequence in [vec![10, 11], (20..36).collect()] {
            let before = probe.fed.load(Ordering::SeqCst);
            let last = sequence.len() - 1;
            let score = engine.score(ScoreRequest::new(sequence.clone(), last)).await.unwrap();
            assert_eq!(probe.fed.load(Ordering::SeqCst) - before, last, "chunk {chunk}");
            let logits = hashed_logits(&sequence[..last], VOCAB);
            let expected = log_softmax_at(&logits, sequence[last] as usize);
            assert_eq!(score.tokens.iter().map(|t| t.logprob).collect::<Vec<_>>(), [expected]);
        }
    }
}

#[tokio::test]
async fn generated_logprobs_equal_scored_ones() {
    let engine = Toy::new(VOCAB).start();
    let sampling = Sampling::default().with_temperature(0.7).with_repetition_penalty(1.3).with_seed(5);
    let mut request = tokens(&PROMPT).with_max_tokens(8).with_sampling(sampling).with_logprobs();
    request.params.ignore_eos = true;
    let answer = engine.generate(request).await.unwrap().collect().await.unwrap();
    let whole = [&PROMPT[..], &answer.tokens].concat();
    let score = engine.score(ScoreRequest::new(whole, PROMPT.len())).await.unwrap();
    assert_eq!(answer.logprobs, score.tokens.iter().map(|t| t.logprob).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_common_prefix_is_computed_once() {
    for can_fork in [true, false] {
        let mut toy = Toy::new(VOCAB);
        toy.can_fork = can_fork;
        let engine = toy.start();
        let first: Vec<u32> = (100..120).collect();
        let answer =
            engine.generate(tokens(&first).with_max_tokens(5)).await.unwrap().collect().await.unwrap();
        assert_eq!(answer.usage.cached_tokens, 0);

        // The conversation goes on: everything but the last generated token is in the cache.
        let mut next = [&first[..], &answer.tokens].concat();
        next.extend([200, 201]);
        let kept = next.len() - 3;
        let mut request = tokens(&next).with_max_tokens(4);
        request.params.ignore_eos = true;
        let second = engine.generate(request).await.unwrap().collect().await.unwrap();
        assert_eq!(second.usage.cached_tokens, kept);
        assert_eq!(second.tokens, greedy(&next, 4));

        // Another conversation with the same beginning, then the whole first prompt again.
        let other = [&first[..6], &[400, 401, 402]].concat();
        let mut request = tokens(&other).with_max_tokens(4);
        request.params.ignore_eos = true;
        let third = engine.generate(request).await.unwrap().collect().await.unwrap();
        assert_eq!(third.usage.cached_tokens, if can_fork { 6 } else { 0 });
        assert_eq!(third.tokens, greedy(&other, 4));

        let again =
            engine.generate(tokens(&first).with_max_tokens(1)).await.unwrap().collect().await.unwrap();
        assert_eq!(again.usage.cached_tokens, first.len() - 1, "the last token is always computed");
        assert_eq!(again.tokens, greedy(&first, 1));
    }
}

#[tokio::test]
async fn a_new_prompt_takes_the_place_of_the_oldest_one_whatever_it_begins_with() {
    let mut toy = Toy::new(VOCAB);
    toy.max_sequences = 2;
    let engine = toy.start();
    let cached = async |prompt: &[u32]| {
        let stream = engine.generate(tokens(prompt).with_max_tokens(1)).await.unwrap();
        let answer = stream.collect().await.unwrap();
        assert_eq!(answer.tokens, greedy(prompt, 1));
        answer.usage.cached_tokens
    };
    // They all begin with the same token, as all prompts do that begin with a BOS.
    let prompts: Vec<Vec<u32>> =
        (1..4).map(|n| std::iter::once(100).chain(n * 20..n * 20 + 20).collect()).collect();
    // The third is computed in the place of the first, which keeps that token.
    for (i, prompt) in prompts.iter().enumerate() {
        assert_eq!(cached(prompt).await, usize::from(i == 2));
    }
    assert_eq!(cached(&prompts[1]).await, 20, "all but the last token");
    assert_eq!(cached(&prompts[2]).await, 20);
    assert_eq!(cached(&prompts[0]).await, 1, "it was the oldest");
}

#[tokio::test]
async fn dropping_the_stream_frees_the_sequence() {
    let mut toy = Toy::new(VOCAB);
    toy.context = 100_000;
    toy.max_sequences = 1;
    toy.delay = Duration::from_millis(1);
    let engine = toy.start();
    let mut request = tokens(&PROMPT);
    request.params.ignore_eos = true;
    let mut stream = engine.generate(request.clone()).await.unwrap();
    while !matches!(stream.next().await, Some(Ok(Event::Token(_)))) {}
    assert_eq!(engine.stats().active, 1);
    drop(stream);
    until("the sequence to be free", || engine.stats().active == 0).await;

    // Also when the reader never reads, so that the job is stalled.
    let stream = engine.generate(request).await.unwrap();
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert_eq!(engine.stats().active, 1);
    drop(stream);
    until("the stalled sequence to be free", || engine.stats().active == 0).await;
    assert_eq!(
        engine
            .generate(tokens(&PROMPT).with_max_tokens(1))
            .await
            .unwrap()
            .collect()
            .await
            .unwrap()
            .tokens
            .len(),
        1
    );
}

#[tokio::test]
async fn a_cancel_token_ends_prefill_decode_and_waiting() {
    let mut toy = Toy::new(VOCAB);
    toy.context = 100_000;
    toy.max_sequences = 1;
    toy.chunk = 1;
    toy.delay = Duration::from_millis(2);
    let probe = Arc::clone(&toy.probe);
    let engine = toy.start();

    // In prefill.
    let cancel = CancellationToken::new();
    let long: Vec<u32> = (0..5000).map(|i| i % 500).collect();
    let stream = engine.generate(tokens(&long).with_cancel(cancel.clone())).await.unwrap();
    // Waiting behind it.
    let waiting_cancel = CancellationToken::new();
    let waiting = engine.generate(tokens(&PROMPT).with_cancel(waiting_cancel.clone())).await.unwrap();
    until("the work to begin", || probe.fed.load(Ordering::SeqCst) > 3).await;
    assert_eq!((engine.stats().active, engine.stats().queued), (1, 1));
    waiting_cancel.cancel();
    let answer = waiting.collect().await.unwrap();
    assert_eq!((answer.finish_reason, answer.tokens.len()), (FinishReason::Cancelled, 0));
    assert!(answer.timing.queued >= Duration::from_millis(2), "it has only waited: {:?}", answer.timing);
    assert_eq!(answer.timing.prefill, Duration::ZERO);
    cancel.cancel();
    let answer = stream.collect().await.unwrap();
    assert_eq!((answer.finish_reason, answer.tokens.len()), (FinishReason::Cancelled, 0));
    assert!(probe.fed.load(Ordering::SeqCst) < 4000);

    // While decoding: what was generated is kept.
    let cancel = CancellationToken::new();
    let mut request = tokens(&PROMPT).with_cancel(cancel.clone());
    request.params.ignore_eos = true;
    let mut stream = engine.generate(request).await.unwrap();
    while !matches!(stream.next().await, Some(Ok(Event::Token(_)))) {}
    cancel.cancel();
    assert_eq!(stream.collect().await.unwrap().finish_reason, FinishReason::Cancelled);
    until("the engine to be idle", || engine.stats().active == 0).await;

    // A scoring whose future is dropped, and one whose token is cancelled.
    let mut request = ScoreRequest::new(long.clone(), 1);
    let scoring = tokio::time::timeout(Duration::from_millis(30), engine.score(request.clone())).await;
    assert!(scoring.is_err(), "it takes longer than that");
    until("the scoring to be freed", || engine.stats().active == 0).await;
    request.cancel.cancel();
    request.tokens.truncate(50);
    assert_eq!(engine.score(request).await.unwrap_err().kind(), ErrorKind::Cancelled);
}

#[tokio::test]
async fn a_cancelled_answer_says_so_whatever_its_last_bytes_become() {
    // Of a character of four bytes only a part comes; as text, that is the stop string.
    let script = tokenizer().encode("🎉", false).unwrap();
    assert_eq!(script.len(), 4, "one token for each byte");
    let mut toy = Toy::scripted(VOCAB, PROMPT.len(), &script[..3]);
    toy.delay = Duration::from_millis(100);
    let cancel = CancellationToken::new();
    let request = tokens(&PROMPT).with_stop(["\u{FFFD}"]).with_cancel(cancel.clone());
    let mut stream = toy.start().generate(request).await.unwrap();
    while !matches!(stream.next().await, Some(Ok(Event::Token(_)))) {}
    cancel.cancel();
    let answer = stream.collect().await.unwrap();
    assert_eq!((answer.finish_reason, answer.text.as_str()), (FinishReason::Cancelled, ""));
}

#[tokio::test]
async fn a_slow_reader_stops_only_itself() {
    let mut toy = Toy::new(VOCAB);
    toy.context = 2000;
    let probe = Arc::clone(&toy.probe);
    let engine = toy.start();
    let mut request = tokens(&PROMPT).with_max_tokens(500);
    request.params.ignore_eos = true;
    let slow = engine.generate(request.clone()).await.unwrap();
    let fast = engine.generate(request).await.unwrap().collect().await.unwrap();
    assert_eq!(fast.tokens.len(), 500);
    let fed = probe.fed.load(Ordering::SeqCst);
    assert!(fed < 700, "the unread stream went on: {fed} tokens");
    let slow = slow.collect().await.unwrap();
    assert_eq!(slow.tokens, fast.tokens, "it loses nothing");
}

#[tokio::test]
async fn a_full_queue_is_busy_and_worth_a_retry() {
    let mut toy = Toy::new(VOCAB);
    toy.max_sequences = 1;
    toy.delay = Duration::from_millis(1);
    let engine = toy.start_with(|o| o.max_queued = 1);
    let first = engine.generate(tokens(&PROMPT).with_max_tokens(20)).await.unwrap();
    let second = engine.generate(tokens(&PROMPT).with_max_tokens(1)).await.unwrap();
    let third = engine.generate(tokens(&PROMPT)).await.unwrap_err();
    assert_eq!((third.kind(), third.is_retryable()), (ErrorKind::Busy, true));
    first.collect().await.unwrap();
    second.collect().await.unwrap();
    engine.generate(tokens(&PROMPT).with_max_tokens(1)).await.unwrap().collect().await.unwrap();
}

#[tokio::test]
async fn a_failure_ends_only_the_sequence_that_failed() {
    let mut toy = Toy::new(VOCAB);
    toy.poison = Some(13);
    toy.delay = Duration::from_millis(1);
    let engine = toy.start();
    let mut request = tokens(&PROMPT).with_max_tokens(30);
    request.params.ignore_eos = true;
    let good = engine.generate(request).await.unwrap();
    let bad = engine.generate(tokens(&[1, 2, 13])).await.unwrap();
    let error = bad.collect().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Backend);
    assert_eq!(error.to_string(), "generate: poisoned");
    assert_eq!(good.collect().await.unwrap().tokens, greedy(&PROMPT, 30));
}

#[tokio::test]
async fn memory_is_made_by_forgetting_idle_sequences() {
    let mut toy = Toy::new(VOCAB);
    toy.memory = 40;
    let engine = toy.start();
    for start in [0, 100, 200, 300] {
        let prompt: Vec<u32> = (start..start + 25).collect();
        let answer =
            engine.generate(tokens(&prompt).with_max_tokens(2)).await.unwrap().collect().await.unwrap();
        assert_eq!(answer.tokens, greedy(&prompt, 2));
    }
    let long: Vec<u32> = (0..45).collect();
    let error = engine.generate(tokens(&long)).await.unwrap().collect().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
}

#[tokio::test]
async fn logits_that_no_memory_holds_are_an_error() {
    let mut toy = Toy::new(usize::MAX / 16);
    toy.max_sequences = 1;
    let engine = toy.start();
    for _ in 0..2 {
        let error = engine.logits(LogitsRequest::new(PROMPT.to_vec()).with_start(1)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
        assert!(error.message().contains("4 rows"), "{error}");
    }
    // Its sequence is free again.
    assert_eq!((engine.stats().active, engine.stats().queued), (0, 0));
}

#[tokio::test]
async fn the_model_goes_with_the_last_stream() {
    let toy = Toy::new(VOCAB);
    let probe = Arc::clone(&toy.probe);
    let engine = toy.start();
    let stream = engine.generate(tokens(&PROMPT).with_max_tokens(3)).await.unwrap();
    drop(engine);
    assert_eq!(stream.collect().await.unwrap().tokens.len(), 3, "a stream outlives its engine");
    until("the model to be dropped", || probe.alive.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn requests_out_of_range_name_the_field() {
    let engine = Toy::new(VOCAB).start();
    let sampling = |s: Sampling| GenerateRequest::new("hi").with_sampling(s);
    let nan = f32::NAN;
    let cases = [
        (GenerateRequest::new(""), "prompt"),
        (GenerateRequest::new(Vec::<u32>::new()), "prompt"),
        (GenerateRequest::new(Vec::<Message>::new()), "prompt"),
        (GenerateRequest::new(vec![520]), "prompt: token 520"),
        (GenerateRequest::new("hi").with_max_tokens(0), "max_tokens"),
        (GenerateRequest::new("hi").with_stop([""]), "stop"),
        (sampling(Sampling::default().with_temperature(nan)), "temperature"),
        (sampling(Sampling::default().with_temperature(-0.1)), "temperature"),
        (sampling(Sampling::default().with_temperature(f32::INFINITY)), "temperature"),
        (sampling(Sampling::default().with_top_p(0.0)), "top_p"),
        (sampling(Sampling::default().with_top_p(1.01)), "top_p"),
        (sampling(Sampling::default().with_min_p(-0.01)), "min_p"),
        (sampling(Sampling::default().with_repetition_penalty(0.0)), "repetition_penalty"),
        (sampling(Sampling::default().with_presence_penalty(nan)), "presence_penalty"),
        (sampling(Sampling::default().with_frequency_penalty(101.0)), "frequency_penalty"),
        (sampling(Sampling::default().with_logit_bias(9999, 0.0)), "logit_bias"),
        (sampling(Sampling::default().with_logit_bias(1, nan)), "logit_bias"),
    ];
    for (request, field) in cases {
        let error = engine.generate(request).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{error}");
        assert!(error.message().starts_with(field), "`{error}` should name {field}");
        assert!(error.message().contains("expected"), "`{error}` should say what is allowed");
    }
    let fits: Vec<u32> = (0..63).collect();
    let answer = engine.generate(tokens(&fits)).await.unwrap().collect().await.unwrap();
    assert_eq!(answer.tokens.len(), 1, "a prompt one below the context leaves room for one token");
    for length in [64, 65, 1000] {
        let long: Vec<u32> = (0..length).map(|i| i % 500).collect();
        let error = engine.generate(GenerateRequest::new(Prompt::Tokens(long))).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ContextOverflow);
        assert!(error.message().contains(&length.to_string()) && error.message().contains("63"), "{error}");
    }
    for (request, field) in [
        (ScoreRequest::new(vec![], 1), "tokens"),
        (ScoreRequest::new(vec![1], 1), "tokens"),
        (ScoreRequest::new(vec![1, 2], 0), "start"),
        (ScoreRequest::new(vec![1, 2], 2), "start"),
        (ScoreRequest::new(vec![1, 2], 1).with_top(101), "top"),
    ] {
        let error = engine.score(request).await.unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidRequest && error.message().starts_with(field), "{error}");
    }
    assert_eq!(engine.stats().active, 0);
}

#[tokio::test]
async fn a_long_prompt_does_not_hold_up_the_runtime() {
    let mut toy = Toy::new(VOCAB);
    toy.max_sequences = 1;
    let engine = toy.start_with(|o| o.max_queued = 0);
    let long = "word and number ".repeat(20_000);
    for prompt in [Prompt::from(long.clone()), Prompt::from(vec![Message::user(long)])] {
        // The runtime has one thread, so this task runs only while `generate` waits.
        let others = tokio::spawn(async {});
        let error = engine.generate(GenerateRequest::new(prompt)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ContextOverflow);
        assert!(others.is_finished(), "the thread was held");
    }
    let stats = engine.stats();
    assert_eq!((stats.queued, stats.finished), (0, 0), "refused requests are not among the accepted ones");
}

#[tokio::test]
async fn prompts_are_prepared_only_for_requests_that_have_a_place() {
    let mut toy = Toy::new(VOCAB);
    toy.max_sequences = 1;
    toy.delay = Duration::from_millis(1);
    let engine = toy.start_with(|o| o.max_queued = 0);
    let running = engine.generate(tokens(&PROMPT).with_max_tokens(20)).await.unwrap();
    let too_long = GenerateRequest::new("word and number ".repeat(1000));
    assert_eq!(engine.generate(too_long.clone()).await.unwrap_err().kind(), ErrorKind::Busy);
    running.collect().await.unwrap();
    for _ in 0..3 {
        let error = engine.generate(too_long.clone()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ContextOverflow, "the place is given back");
    }
}

#[test]
fn text_without_a_runtime_is_an_error() {
    let engine = Toy::new(VOCAB).start();
    let mut context = Context::from_waker(Waker::noop());
    let mut future = engine.generate(GenerateRequest::new("hi"));
    let Poll::Ready(Err(error)) = future.as_mut().poll(&mut context) else { panic!("it needs a runtime") };
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("tokio runtime"), "{error}");
}

#[tokio::test]
async fn chat_goes_through_the_template_and_counts_match() {
    let engine = Toy::new(VOCAB).start();
    let messages = vec![Message::system("Be brief."), Message::user("Hi")];
    let answer = engine
        .generate(GenerateRequest::chat(messages.clone()).with_max_tokens(1))
        .await
        .unwrap()
        .collect()
        .await
        .unwrap();
    assert_eq!(answer.usage.prompt_tokens, engine.count_chat_tokens(&messages).unwrap());
    assert!(engine.count_tokens("Hi").unwrap() < answer.usage.prompt_tokens);
    assert!(engine.info().capabilities.chat);
}
