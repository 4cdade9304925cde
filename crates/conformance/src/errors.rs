//! What is refused: each field of a request beyond its range, with an error that names it.

use ternion_core::{
    Error, ErrorKind, GenerateRequest, LlmBackend, LogitsRequest, Message, Prompt, Sampling, ScoreRequest,
};

use crate::{
    Failure, Sentence,
    ask::{SHORT, answer, greedy, idle, prompt, tokens, too_long},
    check::checks,
};

checks! { "errors";
    max_tokens_of_0_are_refused, HERE, [Generate];
    empty_stop_strings_are_refused, REQUIRES, [Generate];
    empty_prompts_are_refused, REQUIRES, [Generate];
    empty_conversations_are_refused, REQUIRES, [Generate, Chat];
    empty_token_prompts_are_refused, REQUIRES, [Generate, Tokenizer];
    sampling_out_of_range_is_refused, OUTSIDE, [Generate];
    tokens_beyond_the_vocabulary_are_refused, VOCABULARY, [Generate, Tokenizer];
    biases_beyond_the_vocabulary_are_refused, OUTSIDE, [Generate, Tokenizer];
    bad_score_requests_are_refused, SCORE, [Score, Tokenizer];
    bad_logits_requests_are_refused, LOGITS, [Logits, Tokenizer];
    errors_name_their_operation, OPERATION, [Generate];
    a_refusal_leaves_nothing_behind, BEHIND, [Generate];
}

const REQUIRES: Sentence = Sentence::new(
    "LlmBackend::generate",
    "max_tokens at least 1, every field of Sampling in its range, no empty stop string, a prompt with at least one \
     token and fewer than context_length.",
);
const HERE: Sentence = Sentence::new(
    "LlmBackend::generate",
    "Here: InvalidRequest naming the field and its range, ContextOverflow, Busy when the queue is full, Closed.",
);
const OUTSIDE: Sentence = Sentence::new(
    "Sampling",
    "The ranges stand at the fields, and a value outside is an error that names them.",
);
const VOCABULARY: Sentence =
    Sentence::new("ErrorKind::InvalidRequest", "A field of a request is out of its range.");
const SCORE: Sentence = Sentence::new(
    "LlmBackend::score",
    "1 <= start < tokens.len() <= context_length, every token below vocab_size, top at most 100.",
);
const LOGITS: Sentence = Sentence::new(
    "LlmBackend::logits",
    "start < tokens.len() <= context_length, every token below vocab_size.",
);
const OPERATION: Sentence =
    Sentence::new("Error::operation", "The operation that failed, such as load or generate");
const BEHIND: Sentence =
    Sentence::new("Stats::active", "Requests that are being worked on; each holds one sequence.");

/// Nothing if it is an `InvalidRequest` that names the field.
fn names<T>(
    result: Result<T, Error>,
    field: &str,
    what: impl std::fmt::Display,
    sentence: Sentence,
) -> Result<(), Failure> {
    match result {
        Ok(_) => Err(sentence.broken(format_args!("{what}: accepted"), "InvalidRequest")),
        Err(error) => {
            sentence.equal(format_args!("error for {what}"), error.kind(), ErrorKind::InvalidRequest)?;
            let line = error.to_string();
            let named = line.contains(field) && !line.contains('\n');
            sentence.require(
                named,
                format_args!("error for {what}: `{line}`"),
                format_args!("a line that names `{field}`"),
            )
        }
    }
}

/// An answer of no tokens.
///
/// # Errors
/// What came instead of the refusal.
pub async fn max_tokens_of_0_are_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    names(model.generate(greedy(prompt("none"), 0)).await, "max_tokens", "max_tokens 0", HERE)
}

/// A stop string of no characters, alone and among others.
///
/// # Errors
/// What came instead of the refusal.
pub async fn empty_stop_strings_are_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    for stop in [vec![""], vec!["a", ""]] {
        let request = greedy(prompt("stop"), 1).with_stop(stop.clone());
        names(model.generate(request).await, "stop", format_args!("stop {stop:?}"), REQUIRES)?;
    }
    Ok(())
}

/// A text without a character.
///
/// # Errors
/// What came instead of the refusal.
pub async fn empty_prompts_are_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    names(model.generate(greedy("", 1)).await, "prompt", "an empty text", REQUIRES)
}

/// A conversation without a message.
///
/// # Errors
/// What came instead of the refusal.
pub async fn empty_conversations_are_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    let none: Vec<Message> = Vec::new();
    names(model.generate(greedy(none, 1)).await, "prompt", "no messages", REQUIRES)
}

/// A prompt without a token.
///
/// # Errors
/// What came instead of the refusal.
pub async fn empty_token_prompts_are_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    let none: Vec<u32> = Vec::new();
    names(model.generate(greedy(none, 1)).await, "prompt", "no tokens", REQUIRES)
}

/// Each number of [`Sampling`] beyond each end of its range, and what is no number.
///
/// # Errors
/// What came instead of the refusal.
pub async fn sampling_out_of_range_is_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    type Field = fn(&mut Sampling) -> &mut Option<f32>;
    let fields: [(&str, Field, &[f32]); 6] = [
        ("temperature", |s| &mut s.temperature, &[-0.1, f32::INFINITY]),
        ("top_p", |s| &mut s.top_p, &[0.0, -0.5, 1.001]),
        ("min_p", |s| &mut s.min_p, &[-0.001, 1.001]),
        ("repetition_penalty", |s| &mut s.repetition_penalty, &[0.0, -1.0, f32::INFINITY]),
        ("presence_penalty", |s| &mut s.presence_penalty, &[-100.1, 100.1]),
        ("frequency_penalty", |s| &mut s.frequency_penalty, &[-100.1, 100.1]),
    ];
    for (name, field, outside) in fields {
        for value in outside.iter().copied().chain([f32::NAN]) {
            let mut sampling = Sampling::greedy();
            *field(&mut sampling) = Some(value);
            let request = greedy(prompt("range"), 1).with_sampling(sampling);
            names(model.generate(request).await, name, format_args!("{name} {value}"), OUTSIDE)?;
        }
    }
    for value in [f32::NAN, f32::INFINITY] {
        let mut request = greedy(prompt("range"), 1);
        request.params.sampling.logit_bias.insert(0, value);
        names(model.generate(request).await, "logit_bias", format_args!("logit_bias {value}"), OUTSIDE)?;
    }
    Ok(())
}

/// A prompt with a token that the vocabulary does not have.
///
/// # Errors
/// What came instead of the refusal.
pub async fn tokens_beyond_the_vocabulary_are_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    let vocab = model.info().limits.vocab_size as u32;
    for token in [vocab, u32::MAX] {
        let prompt = Prompt::Tokens(vec![0, token, 0]);
        let result = model.generate(greedy(prompt, 1)).await;
        names(result, "prompt", format_args!("token {token} of {vocab}"), VOCABULARY)?;
    }
    let last = answer(model, greedy(vec![vocab - 1], 1), VOCABULARY).await?;
    VOCABULARY.equal("usage.prompt_tokens of the last token", last.usage.prompt_tokens, 1)
}

/// A bias for a token that the vocabulary does not have.
///
/// # Errors
/// What came instead of the refusal.
pub async fn biases_beyond_the_vocabulary_are_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    let vocab = model.info().limits.vocab_size as u32;
    for token in [vocab, u32::MAX] {
        let mut request = greedy(prompt("bias"), 1);
        request.params.sampling.logit_bias.insert(token, 1.0);
        names(
            model.generate(request).await,
            "logit_bias",
            format_args!("a bias for token {token}"),
            OUTSIDE,
        )?;
    }
    Ok(())
}

/// Scores of nothing, of unknown tokens, from an impossible start, with too many alternatives.
///
/// # Errors
/// What came instead of the refusal.
pub async fn bad_score_requests_are_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    let vocab = model.info().limits.vocab_size as u32;
    let four = tokens(model, "bad score", 4, SCORE)?;
    for (request, field, what) in [
        (ScoreRequest::new(vec![], 1), "tokens", "no tokens"),
        (ScoreRequest::new(vec![0], 1), "tokens", "one token"),
        (ScoreRequest::new(vec![0, vocab], 1), "tokens", "a token beyond the vocabulary"),
        (ScoreRequest::new(four.clone(), 0), "start", "start 0"),
        (ScoreRequest::new(four.clone(), 4), "start", "start at the end"),
        (ScoreRequest::new(four.clone(), usize::MAX), "start", "start far behind the end"),
        (ScoreRequest::new(four, 1).with_top(101), "top", "top 101"),
    ] {
        names(model.score(request).await, field, format_args!("a score with {what}"), SCORE)?;
    }
    Ok(())
}

/// Logits of nothing, of unknown tokens, from an impossible start.
///
/// # Errors
/// What came instead of the refusal.
pub async fn bad_logits_requests_are_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    let vocab = model.info().limits.vocab_size as u32;
    let four = tokens(model, "bad logits", 4, LOGITS)?;
    for (request, field, what) in [
        (LogitsRequest::new(vec![]), "tokens", "no tokens"),
        (LogitsRequest::new(vec![vocab]), "tokens", "a token beyond the vocabulary"),
        (LogitsRequest::new(four.clone()).with_start(4), "start", "start at the end"),
        (LogitsRequest::new(four).with_start(usize::MAX), "start", "start far behind the end"),
    ] {
        names(model.logits(request).await, field, format_args!("logits with {what}"), LOGITS)?;
    }
    Ok(())
}

/// An error of `generate` says that it is one.
///
/// # Errors
/// The other name.
pub async fn errors_name_their_operation(model: &dyn LlmBackend) -> Result<(), Failure> {
    match model.generate(greedy("", 1)).await {
        Ok(_) => Err(OPERATION.broken("an empty prompt: accepted", "an error")),
        Err(error) => OPERATION.equal("operation", error.operation(), "generate"),
    }
}

/// After refusals nothing is active, and as many requests as before are accepted.
///
/// # Errors
/// What is in use.
pub async fn a_refusal_leaves_nothing_behind(model: &dyn LlmBackend) -> Result<(), Failure> {
    let limits = model.info().limits.clone();
    let places = limits.max_sequences.saturating_add(limits.max_queued);
    let mut bad: Vec<GenerateRequest> = vec![greedy("", 1)];
    if !model.info().capabilities.long_prompts {
        bad.push(greedy(too_long(model), 1));
    }
    for _ in 0..places.min(70) {
        for request in &bad {
            if model.generate(request.clone()).await.is_ok() {
                return Err(BEHIND.broken("a bad request: accepted", "an error"));
            }
        }
    }
    idle(model, BEHIND).await?;
    answer(model, greedy(prompt("nothing behind"), SHORT), BEHIND).await.map(|_| ())
}
