//! At, below and over the limits: context, queue.

use std::time::Instant;

use ternion_core::{
    ErrorKind, Event, FinishReason, GenerateRequest, LlmBackend, LogitsRequest, Message, Prompt, Sampling,
    ScoreRequest, context::ContextStep,
};

use crate::{
    Failure, Sentence,
    ask::{RunningRequests, answer, endless, greedy, idle, prompt, soon, start, tokens, too_long},
    check::{checks, patience},
};

checks! { "limits";
    a_prompt_one_below_the_context_has_room_for_one_token, FULL, [Generate, Tokenizer, NoPolicy];
    prompt_and_answer_fill_the_context, FULL, [Generate, Tokenizer, NoPolicy];
    a_prompt_as_long_as_the_context_is_refused, FEWER, [Generate, Tokenizer, NoPolicy];
    texts_that_are_too_long_are_refused, OVERFLOW, [Generate, NoPolicy];
    without_max_tokens_the_context_is_the_limit, UNTIL, [Generate, NoPolicy];
    a_policy_makes_a_longer_prompt_fit, POLICY, [Generate, Chat, Policy];
    a_policy_that_changed_the_prompt_reports_it, REPORT, [Generate, Chat, Policy];
    a_score_may_fill_the_context, SCORE, [Score, Tokenizer];
    logits_may_fill_the_context, LOGITS, [Logits, Tokenizer];
    a_full_queue_refuses_at_once, QUEUE, [Generate, SmallQueue];
    a_queue_has_the_room_that_it_says, ROOM, [Generate, SmallQueue];
    generate_returns_before_the_work, RETURNS, [Generate, SmallQueue];
}

const FULL: Sentence = Sentence::new("FinishReason::ContextFull", "Prompt and answer fill the context.");
const FEWER: Sentence =
    Sentence::new("LlmBackend::generate", "a prompt with at least one token and fewer than context_length.");
const OVERFLOW: Sentence =
    Sentence::new("ErrorKind::ContextOverflow", "The prompt does not fit into the context.");
const POLICY: Sentence = Sentence::new(
    "LlmBackend::generate",
    "A longer one needs a ContextPolicy, of the request or of the model, that makes it fit.",
);
const REPORT: Sentence = Sentence::new(
    "LlmBackend::generate",
    "Where a policy changed the prompt, a ContextReport comes right before it.",
);
const UNTIL: Sentence = Sentence::new(
    "GenerateParams::max_tokens",
    "At least 1; None generates until the model ends or the context is full.",
);
const SCORE: Sentence = Sentence::new(
    "LlmBackend::score",
    "1 <= start < tokens.len() <= context_length, every token below vocab_size, top at most 100.",
);
const LOGITS: Sentence = Sentence::new(
    "LlmBackend::logits",
    "start < tokens.len() <= context_length, every token below vocab_size.",
);
const QUEUE: Sentence = Sentence::new(
    "LlmBackend::generate",
    "A request has its place in the queue from before that, so that a full queue refuses it at once.",
);
const ROOM: Sentence =
    Sentence::new("Limits::max_queued", "Requests that may wait beyond those; one more fails with Busy.");
const RETURNS: Sentence = Sentence::new(
    "LlmBackend::generate",
    "Returns when the prompt's tokens are known and the request is accepted, before the model does any work.",
);

/// One token of answer, whatever was asked for.
///
/// # Errors
/// Another answer, or a refusal.
pub async fn a_prompt_one_below_the_context_has_room_for_one_token(
    model: &dyn LlmBackend,
) -> Result<(), Failure> {
    let context = model.info().limits.context_length;
    let answer = answer(model, greedy(tokens(model, "one below", context - 1, FULL)?, 5), FULL).await?;
    FULL.equal("tokens", answer.tokens.len(), 1)?;
    FULL.equal("usage.prompt_tokens", answer.usage.prompt_tokens, context - 1)?;
    FULL.equal("finish_reason", answer.finish_reason, FinishReason::ContextFull)
}

/// Room for exactly five tokens, of which five or four are asked for.
///
/// # Errors
/// Another number of tokens, or another reason.
pub async fn prompt_and_answer_fill_the_context(model: &dyn LlmBackend) -> Result<(), Failure> {
    let context = model.info().limits.context_length;
    let room = 5.min(context - 1);
    let prompt = tokens(model, "fill", context - room, FULL)?;
    let full = answer(model, endless(prompt.clone()), FULL).await?;
    FULL.equal("tokens", full.tokens.len(), room)?;
    FULL.equal("finish_reason", full.finish_reason, FinishReason::ContextFull)?;
    if room > 1 {
        let less = answer(model, greedy(prompt, room - 1), FULL).await?;
        FULL.equal("tokens", less.tokens.len(), room - 1)?;
        FULL.equal("finish_reason with one token of room", less.finish_reason, FinishReason::MaxTokens)?;
    }
    Ok(())
}

/// Prompts of as many tokens as the context has, and of more.
///
/// # Errors
/// Another result than `ContextOverflow`.
pub async fn a_prompt_as_long_as_the_context_is_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    let context = model.info().limits.context_length;
    for length in [context, context + 1, 2 * context] {
        let prompt = Prompt::Tokens(tokens(model, "too long", length, FEWER)?);
        let result = model.generate(greedy(prompt, 1)).await;
        let found = result.err().map(|e| e.kind());
        let what = format!("a prompt of {length} tokens, context {context}");
        FEWER.equal(what, found, Some(ErrorKind::ContextOverflow))?;
    }
    Ok(())
}

/// A text that does not fit.
///
/// # Errors
/// Another result than `ContextOverflow`.
pub async fn texts_that_are_too_long_are_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    let result = model.generate(greedy(too_long(model), 1)).await;
    OVERFLOW.equal("error", result.err().map(|e| e.kind()), Some(ErrorKind::ContextOverflow))
}

/// A conversation that begins with far too much and ends with a task, which any policy can do something with.
fn long_conversation(model: &dyn LlmBackend) -> GenerateRequest {
    let turns = [
        Message::user(too_long(model)),
        Message::assistant("That is long."),
        Message::user("What is it about?"),
    ];
    let mut request = GenerateRequest::chat(turns).with_max_tokens(4);
    request.params.sampling = Sampling::greedy();
    request
}

/// A conversation beyond the context is answered.
///
/// # Errors
/// A refusal, or an answer that is none.
pub async fn a_policy_makes_a_longer_prompt_fit(model: &dyn LlmBackend) -> Result<(), Failure> {
    let answer = answer(model, long_conversation(model), POLICY).await?;
    let (found, context) = (answer.usage.prompt_tokens, model.info().limits.context_length);
    // The usage of several calls is that of the last one.
    POLICY.require(
        found < context,
        format_args!("{found} prompt tokens"),
        format_args!("fewer than {context}"),
    )
}

/// The event before the last one says what was done, and the collected answer has it.
///
/// # Errors
/// Another event there, or no report.
pub async fn a_policy_that_changed_the_prompt_reports_it(model: &dyn LlmBackend) -> Result<(), Failure> {
    let mut stream =
        model.generate(long_conversation(model)).await.map_err(REPORT.refused("a long conversation"))?;
    let mut last = None;
    while let Some(event) = stream.next().await {
        match event.map_err(REPORT.refused("the stream"))? {
            Event::Done(_) => break,
            event => last = Some(event),
        }
    }
    let found = matches!(last, Some(Event::Context(ContextStep::Report(_))));
    REPORT.require(found, format_args!("{last:?}"), "a report right before the end")
}

/// An answer without a limit of its own ends where the context or the model does.
///
/// # Errors
/// Another end.
pub async fn without_max_tokens_the_context_is_the_limit(model: &dyn LlmBackend) -> Result<(), Failure> {
    let context = model.info().limits.context_length;
    let answer = answer(model, endless(prompt("until")), UNTIL).await?;
    let together = answer.usage.prompt_tokens + answer.usage.completion_tokens;
    match answer.finish_reason {
        FinishReason::ContextFull => UNTIL.equal("tokens together", together, context),
        FinishReason::EndOfSequence => UNTIL.require(
            together <= context,
            format_args!("{together} tokens"),
            format_args!("at most {context}"),
        ),
        other => Err(UNTIL.broken(format_args!("{other:?}"), "ContextFull or EndOfSequence")),
    }
}

/// As many tokens as the context has can be scored, one more cannot.
///
/// # Errors
/// A refusal, or another result than `ContextOverflow`.
pub async fn a_score_may_fill_the_context(model: &dyn LlmBackend) -> Result<(), Failure> {
    let context = model.info().limits.context_length;
    let whole = tokens(model, "score whole", context + 1, SCORE)?;
    let score = model.score(ScoreRequest::new(whole[..context].to_vec(), context - 1)).await;
    let count = score.map_err(SCORE.refused("a score of the whole context"))?.tokens.len();
    SCORE.equal("scores", count, 1)?;
    let found = model.score(ScoreRequest::new(whole, 1)).await.err().map(|e| e.kind());
    SCORE.equal("a score of one token more", found, Some(ErrorKind::ContextOverflow))
}

/// As many tokens as the context has can have logits, one more cannot.
///
/// # Errors
/// A refusal, or another result than `ContextOverflow`.
pub async fn logits_may_fill_the_context(model: &dyn LlmBackend) -> Result<(), Failure> {
    let limits = model.info().limits.clone();
    let context = limits.context_length;
    let whole = tokens(model, "logits whole", context + 1, LOGITS)?;
    let request = LogitsRequest::new(whole[..context].to_vec()).with_start(context - 1);
    let rows = model.logits(request).await.map_err(LOGITS.refused("logits at the end of the context"))?;
    LOGITS.equal("logits", rows.len(), limits.vocab_size)?;
    let found = model.logits(LogitsRequest::new(whole)).await.err().map(|e| e.kind());
    LOGITS.equal("logits of one token more", found, Some(ErrorKind::ContextOverflow))
}

/// Opens requests that are not read until one is refused; says how many were accepted.
pub(crate) async fn fill(
    model: &dyn LlmBackend,
    own: &str,
    sentence: Sentence,
) -> Result<RunningRequests, Failure> {
    idle(model, sentence).await?;
    let limits = model.info().limits.clone();
    let mut held = RunningRequests::default();
    // Those that have ended by themselves give their places back.
    for i in 0..=4 * (limits.max_sequences + limits.max_queued) {
        let asked = Instant::now();
        let request = endless(prompt(&format!("{own} {i}")));
        match model.generate(request.clone()).await {
            Ok(stream) => held.add(request, stream),
            Err(error) => {
                sentence.equal("error", error.kind(), ErrorKind::Busy)?;
                sentence.require(
                    error.is_retryable(),
                    "an error that is not retryable",
                    "a retryable one",
                )?;
                let waited = asked.elapsed();
                sentence.require(
                    waited < patience(),
                    format_args!("a refusal after {waited:?}"),
                    "one at once",
                )?;
                return Ok(held);
            }
        }
    }
    Err(sentence.broken(format_args!("{} requests accepted", held.len()), "Busy"))
}

/// A queue that is full refuses with an error that is worth a retry; when it is empty again, requests are accepted.
///
/// # Errors
/// Another error, or a refusal afterwards.
pub async fn a_full_queue_refuses_at_once(model: &dyn LlmBackend) -> Result<(), Failure> {
    fill(model, "queue", QUEUE).await?.cancel_all(model, QUEUE).await?;
    answer(model, greedy(prompt("after the queue"), 1), QUEUE).await.map(|_| ())
}

/// As many requests are accepted as there are sequences and places in the queue.
///
/// # Errors
/// The number, where it is smaller.
pub async fn a_queue_has_the_room_that_it_says(model: &dyn LlmBackend) -> Result<(), Failure> {
    let limits = model.info().limits.clone();
    let (before, room) = (model.stats().finished, limits.max_sequences + limits.max_queued);
    let held = fill(model, "room", ROOM).await?;
    let finished = model.stats().finished;
    let ended = finished.saturating_sub(before) as usize;
    let accepted = held.len();
    held.cancel_all(model, ROOM).await?;
    ROOM.require(
        accepted >= room,
        format_args!("Busy after {accepted} requests"),
        format_args!("{} sequences and {} in the queue", limits.max_sequences, limits.max_queued),
    )?;
    // Without statistics it is not known whether some of them have ended and made room for others.
    let known = finished > before || accepted == room;
    ROOM.require(
        !known || accepted <= room + ended,
        format_args!("{accepted} requests accepted, of which {ended} have ended"),
        format_args!("at most {room} at the same time"),
    )
}

/// Where all sequences are taken, a request is accepted all the same, and waits.
///
/// # Errors
/// A request that does not come back.
pub async fn generate_returns_before_the_work(model: &dyn LlmBackend) -> Result<(), Failure> {
    let limits = model.info().limits.clone();
    let count = limits.max_sequences + usize::from(limits.max_queued > 0);
    let mut held = RunningRequests::default();
    for i in 0..count {
        let request = endless(prompt(&format!("returns {i}")));
        let stream = soon("generate", RETURNS, start(model, request.clone(), RETURNS)).await??;
        held.add(request, stream);
    }
    held.cancel_all(model, RETURNS).await
}
