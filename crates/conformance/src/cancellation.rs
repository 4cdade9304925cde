//! Cancelling, by token and by dropping: the work ends and the sequence is free again.

use futures_util::future::join_all;
use std::{future::Future, pin::Pin, task::Poll};

use ternion_core::{
    DoneEvent, ErrorKind, Event, FinishReason, GenerateRequest, GenerateStream, LlmBackend, LogitsRequest,
    ScoreRequest,
};

use crate::{
    Failure, Sentence,
    ask::{
        RunningRequests, SHORT, answer, endless, first_token, greedy, idle, prompt, reason, soon, start,
        tokens,
    },
    check::checks,
};

checks! { "cancellation";
    the_token_ends_prefill, DONE, [Generate];
    the_token_ends_decoding, DONE, [Generate];
    a_cancelled_token_ends_the_request_at_once, DONE, [Generate];
    dropping_the_stream_in_prefill_frees_the_sequence, DROP, [Generate, FewSequences];
    dropping_the_stream_in_decoding_frees_the_sequence, DROP, [Generate, FewSequences];
    cancelling_frees_the_sequence, DROP, [Generate, FewSequences];
    dropping_the_future_gives_the_request_up, FUTURE, [Generate, FewSequences];
    a_cancelled_answer_keeps_what_it_has, DONE, [Generate];
    a_cancelled_score_says_so, SCORE, [Score, Tokenizer];
    cancelled_logits_say_so, LOGITS, [Logits, Tokenizer];
    dropping_a_score_frees_the_sequence, SCORE, [Score, Tokenizer, Generate, FewSequences];
}

const DROP: Sentence = Sentence::new(
    "LlmBackend::generate",
    "Dropping the stream, or cancelling the request's token, ends the work within one token or one prefill chunk \
     and frees the sequence.",
);
const DONE: Sentence = Sentence::new(
    "LlmBackend::generate",
    "With the token, the stream still ends with Done and FinishReason::Cancelled.",
);
const FUTURE: Sentence = Sentence::new(
    "LlmBackend::generate",
    "Dropping the future gives the request up; the tokenizer may go on in the background.",
);
const SCORE: Sentence = Sentence::new(
    "LlmBackend::score",
    "Dropping the future or cancelling the token; the latter gives Cancelled.",
);
const LOGITS: Sentence = Sentence::new("LlmBackend::logits", "As score.");

/// A prompt that takes some time.
fn long(model: &dyn LlmBackend, own: &str) -> String {
    let words = (model.info().limits.context_length / 200).clamp(1, 8);
    (0..words).map(|i| prompt(&format!("{own} {i}"))).collect::<Vec<_>>().join(" ")
}

/// Whether all sequences can be used at the same time: one token of each of as many requests as there are sequences,
/// none of which is let go before all have it.
async fn all_sequences_are_free(
    model: &dyn LlmBackend,
    own: &str,
    sentence: Sentence,
) -> Result<(), Failure> {
    idle(model, sentence).await?;
    let count = model.info().limits.max_sequences;
    let one = async |i: usize| -> Result<(GenerateRequest, GenerateStream), Failure> {
        let request = endless(prompt(&format!("{own} after {i}")));
        let mut stream = start(model, request.clone(), sentence).await?;
        first_token(&mut stream, sentence).await?;
        Ok((request, stream))
    };
    let mut all: Vec<Pin<Box<dyn Future<Output = _> + Send + '_>>> = Vec::new();
    for i in 0..count {
        all.push(Box::pin(one(i)));
    }
    let mut held = RunningRequests::default();
    for opened in soon(&format!("a token of each of {count} requests"), sentence, join_all(all)).await? {
        let (request, stream) = opened?;
        held.add(request, stream);
    }
    held.cancel_all(model, sentence).await
}

/// Cancelled before anything has come.
///
/// # Errors
/// Another end than `Cancelled`, or none soon.
pub async fn the_token_ends_prefill(model: &dyn LlmBackend) -> Result<(), Failure> {
    let request = endless(long(model, "prefill cancelled"));
    let cancel = request.cancel.clone();
    let stream = start(model, request, DONE).await?;
    cancel.cancel();
    DONE.equal("finish_reason", reason(stream, DONE).await?, FinishReason::Cancelled)
}

/// Cancelled after some tokens.
///
/// # Errors
/// Another end than `Cancelled`, or none soon.
pub async fn the_token_ends_decoding(model: &dyn LlmBackend) -> Result<(), Failure> {
    let request = endless(prompt("decoding cancelled"));
    let cancel = request.cancel.clone();
    let mut stream = start(model, request, DONE).await?;
    first_token(&mut stream, DONE).await?;
    first_token(&mut stream, DONE).await?;
    cancel.cancel();
    DONE.equal("finish_reason", reason(stream, DONE).await?, FinishReason::Cancelled)
}

/// Cancelled before it is asked.
///
/// # Errors
/// Another end than `Cancelled`, or tokens.
pub async fn a_cancelled_token_ends_the_request_at_once(model: &dyn LlmBackend) -> Result<(), Failure> {
    let request = greedy(prompt("cancelled before"), SHORT);
    request.cancel.cancel();
    let answer = soon("the answer", DONE, answer(model, request, DONE)).await??;
    DONE.equal("finish_reason", answer.finish_reason, FinishReason::Cancelled)?;
    DONE.require(answer.tokens.len() <= 1, format_args!("{} tokens", answer.tokens.len()), "at most one")
}

/// Dropped before anything has come.
///
/// # Errors
/// A sequence that stays in use.
pub async fn dropping_the_stream_in_prefill_frees_the_sequence(
    model: &dyn LlmBackend,
) -> Result<(), Failure> {
    for i in 0..3 {
        drop(start(model, endless(long(model, &format!("prefill dropped {i}"))), DROP).await?);
    }
    all_sequences_are_free(model, "prefill dropped", DROP).await
}

/// Dropped after some tokens.
///
/// # Errors
/// A sequence that stays in use.
pub async fn dropping_the_stream_in_decoding_frees_the_sequence(
    model: &dyn LlmBackend,
) -> Result<(), Failure> {
    for i in 0..3 {
        let mut stream = start(model, endless(prompt(&format!("decoding dropped {i}"))), DROP).await?;
        first_token(&mut stream, DROP).await?;
    }
    all_sequences_are_free(model, "decoding dropped", DROP).await
}

/// Cancelled by the token while the stream is kept and not read.
///
/// # Errors
/// A sequence that stays in use.
pub async fn cancelling_frees_the_sequence(model: &dyn LlmBackend) -> Result<(), Failure> {
    let mut kept = Vec::new();
    for i in 0..3 {
        let request = endless(prompt(&format!("kept {i}")));
        let cancel = request.cancel.clone();
        let mut stream = start(model, request, DROP).await?;
        first_token(&mut stream, DROP).await?;
        cancel.cancel();
        kept.push(stream);
    }
    // What is read to its end has ended, also where the work is done by the reader.
    for stream in kept {
        DROP.equal("finish_reason", reason(stream, DROP).await?, FinishReason::Cancelled)?;
    }
    all_sequences_are_free(model, "kept", DROP).await
}

/// Polled once and dropped.
///
/// # Errors
/// A sequence that stays in use.
pub async fn dropping_the_future_gives_the_request_up(model: &dyn LlmBackend) -> Result<(), Failure> {
    for i in 0..3 {
        let mut future = model.generate(endless(prompt(&format!("future {i}"))));
        std::future::poll_fn(|cx| {
            let _ = future.as_mut().poll(cx);
            Poll::Ready(())
        })
        .await;
    }
    all_sequences_are_free(model, "future", FUTURE).await
}

/// What had come before the cancellation adds up as in any other answer.
///
/// # Errors
/// What does not.
pub async fn a_cancelled_answer_keeps_what_it_has(model: &dyn LlmBackend) -> Result<(), Failure> {
    let request: GenerateRequest = endless(prompt("what it has"));
    let cancel = request.cancel.clone();
    let mut stream = start(model, request, DONE).await?;
    let (mut tokens, mut ended) = (0, None);
    while let Some(event) = soon("an event", DONE, stream.next()).await? {
        match event.map_err(DONE.refused("the stream"))? {
            Event::Token(_) => {
                tokens += 1;
                if tokens == 3 {
                    cancel.cancel();
                }
            }
            Event::Done(DoneEvent { usage, .. }) => ended = Some(usage.completion_tokens),
            _ => {}
        }
    }
    DONE.equal("usage.completion_tokens", ended, Some(tokens))
}

/// A score whose token is cancelled.
///
/// # Errors
/// Another result than the error `Cancelled`.
pub async fn a_cancelled_score_says_so(model: &dyn LlmBackend) -> Result<(), Failure> {
    let request = ScoreRequest::new(tokens(model, "score cancelled", 32, SCORE)?, 1);
    request.cancel.cancel();
    let result = soon("score", SCORE, model.score(request)).await?;
    SCORE.equal("error", result.err().map(|e| e.kind()), Some(ErrorKind::Cancelled))
}

/// Logits whose token is cancelled.
///
/// # Errors
/// Another result than the error `Cancelled`.
pub async fn cancelled_logits_say_so(model: &dyn LlmBackend) -> Result<(), Failure> {
    let request = LogitsRequest::new(tokens(model, "logits cancelled", 32, LOGITS)?);
    request.cancel.cancel();
    let result = soon("logits", LOGITS, model.logits(request)).await?;
    LOGITS.equal("error", result.err().map(|e| e.kind()), Some(ErrorKind::Cancelled))
}

/// A score that is dropped after its first poll.
///
/// # Errors
/// A sequence that stays in use.
pub async fn dropping_a_score_frees_the_sequence(model: &dyn LlmBackend) -> Result<(), Failure> {
    for i in 0..3 {
        let tokens = tokens(model, &format!("score dropped {i}"), 64, SCORE)?;
        let mut future = model.score(ScoreRequest::new(tokens, 1));
        std::future::poll_fn(|cx| {
            let _ = future.as_mut().poll(cx);
            Poll::Ready(())
        })
        .await;
    }
    all_sequences_are_free(model, "score dropped", SCORE).await
}
