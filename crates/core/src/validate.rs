//! Checks of requests. Each error names the field, what was found and what is allowed.

use std::sync::Arc;

use crate::{
    Error, ErrorKind, GenerateRequest, LogitsRequest, ModelInfo, Prompt, Result, Sampling, ScoreRequest,
    blocking::blocking, info::Limits, text::Tokenizer,
};

/// The most entries of [`ScoreRequest::top`].
pub const MAX_TOP: usize = 100;

/// Checks everything about a request but its prompt's tokens. Token ids of `logit_bias` must be below `vocab_size`.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`].
pub fn generate(request: &GenerateRequest, vocab_size: usize) -> Result<()> {
    if request.max_tokens == Some(0) {
        return Err(Error::invalid_request("max_tokens: 0 is out of range; at least 1 expected"));
    }
    if request.stop.iter().any(String::is_empty) {
        return Err(Error::invalid_request("stop: a stop string is empty; at least one character expected"));
    }
    if let Some(token) = request.stop_tokens.iter().find(|&&token| token as usize >= vocab_size) {
        return Err(Error::invalid_request(format!(
            "stop_tokens: token {token} is out of range; ids below {vocab_size} expected"
        )));
    }
    if let Prompt::Text(text) = &request.prompt
        && text.is_empty()
    {
        return Err(Error::invalid_request("prompt: is empty; at least one token expected"));
    }
    // `ContextLayer` removes these fields before it forwards a request.
    if let Some(policy) = request.context_policy.as_ref().filter(|policy| policy.takes_long_prompts()) {
        return Err(Error::unsupported(format!(
            "context_policy: the backend itself has no `{}`; load the model through the registry, or put a ContextLayer around it",
            policy.name()
        )));
    }
    if request.document.is_some() {
        return Err(Error::unsupported(
            "document: load the model through the registry, or put a ContextLayer around the backend",
        ));
    }
    sampling(&request.sampling, vocab_size)
}

/// Checks a request as far as a model's description and its tokenizer tell: the fields, then the prompt's tokens and
/// their number. Without a tokenizer only token prompts and fields are checked. Must be awaited in a tokio runtime.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`], [`ErrorKind::Unsupported`] for what needs a context policy, and
/// [`ErrorKind::ContextOverflow`].
pub async fn request(
    request: &GenerateRequest,
    info: &ModelInfo,
    tokenizer: Option<Arc<Tokenizer>>,
) -> Result<()> {
    let limits = info.limits.clone();
    generate(request, known_vocab_size(&limits))?;
    let checked = move |tokens: &[u32]| {
        self::tokens("prompt", tokens, known_vocab_size(&limits))?;
        // A backend that does not know its context has no limit to check.
        if limits.context_length == 0 { Ok(()) } else { prompt_fits(tokens.len(), limits.context_length) }
    };
    if let Prompt::Tokens(tokens) = &request.prompt {
        return checked(tokens);
    }
    not_empty(&request.prompt)?;
    let Some(tokenizer) = tokenizer else { return Ok(()) };
    let prompt = request.prompt.clone();
    blocking("the prompt's tokenization", move || checked(&encode(&tokenizer, &prompt)?)).await
}

/// The size of the vocabulary; the largest there is where it is not known.
pub(crate) fn known_vocab_size(limits: &Limits) -> usize {
    if limits.vocab_size == 0 { usize::MAX } else { limits.vocab_size }
}

/// Checks that a conversation has a message.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`].
pub fn not_empty(prompt: &Prompt) -> Result<()> {
    match prompt {
        Prompt::Chat(messages) if messages.is_empty() => {
            Err(Error::invalid_request("prompt: no messages; at least one expected"))
        }
        _ => Ok(()),
    }
}

/// The tokens of a prompt, with all that the template and the tokenizer add. May take seconds for megabytes.
///
/// # Errors
/// What the chat template refuses; [`ErrorKind::Unsupported`] for a chat without a template.
pub fn encode(tokenizer: &Tokenizer, prompt: &Prompt) -> Result<Vec<u32>> {
    match prompt {
        Prompt::Text(text) => tokenizer.encode(text, true),
        Prompt::Tokens(tokens) => Ok(tokens.clone()),
        Prompt::Chat(messages) => tokenizer.encode_chat(messages, true),
    }
}

/// Checks the ranges that [`Sampling`] documents.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`].
pub fn sampling(sampling: &Sampling, vocab_size: usize) -> Result<()> {
    check("temperature", sampling.temperature, "a finite number of at least 0", |v| {
        v.is_finite() && v >= 0.0
    })?;
    check("top_p", sampling.top_p, "over 0 and at most 1", |v| v > 0.0 && v <= 1.0)?;
    check("min_p", sampling.min_p, "from 0 to 1", |v| (0.0..=1.0).contains(&v))?;
    let penalty = "a finite number over 0";
    check("repetition_penalty", sampling.repetition_penalty, penalty, |v| v.is_finite() && v > 0.0)?;
    for (field, value) in
        [("presence_penalty", sampling.presence_penalty), ("frequency_penalty", sampling.frequency_penalty)]
    {
        check(field, value, "from -100 to 100", |v| (-100.0..=100.0).contains(&v))?;
    }
    for (&token, &bias) in &sampling.logit_bias {
        if token as usize >= vocab_size {
            return Err(Error::invalid_request(format!(
                "logit_bias: token {token} is out of range; ids below {vocab_size} expected"
            )));
        }
        if bias.is_nan() || bias == f32::INFINITY {
            return Err(Error::invalid_request(format!(
                "logit_bias: {bias} for token {token}; a finite number or -inf expected"
            )));
        }
    }
    Ok(())
}

fn check(field: &str, value: Option<f32>, allowed: &str, ok: impl Fn(f32) -> bool) -> Result<()> {
    match value {
        Some(v) if !ok(v) => {
            Err(Error::invalid_request(format!("{field}: {v} is out of range; {allowed} expected")))
        }
        _ => Ok(()),
    }
}

/// Checks that there are tokens and that the vocabulary has them all.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`].
pub fn tokens(field: &str, tokens: &[u32], vocab_size: usize) -> Result<()> {
    if tokens.is_empty() {
        return Err(Error::invalid_request(format!("{field}: has no tokens; at least 1 expected")));
    }
    match tokens.iter().position(|&t| t as usize >= vocab_size) {
        None => Ok(()),
        Some(i) => Err(Error::invalid_request(format!(
            "{field}: token {} at index {i} is out of range; ids below {vocab_size} expected",
            tokens[i]
        ))),
    }
}

/// Checks that a prompt leaves room for at least one token of answer.
///
/// # Errors
/// [`ErrorKind::ContextOverflow`].
pub fn prompt_fits(length: usize, context_length: usize) -> Result<()> {
    if length < context_length {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::ContextOverflow,
        format!(
            "prompt: {length} tokens; at most {} fit into the context of {context_length} with room for an answer",
            context_length - 1
        ),
    ))
}

/// Checks a request for scores.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`] or [`ErrorKind::ContextOverflow`].
pub fn score(request: &ScoreRequest, limits: &Limits) -> Result<()> {
    tokens("tokens", &request.tokens, limits.vocab_size)?;
    let length = request.tokens.len();
    if length < 2 {
        return Err(Error::invalid_request("tokens: 1 token; at least 2 expected"));
    }
    if request.start == 0 || request.start >= length {
        return Err(Error::invalid_request(format!(
            "start: {} is out of range; from 1 to {} expected for {length} tokens",
            request.start,
            length - 1
        )));
    }
    if request.top > MAX_TOP {
        return Err(Error::invalid_request(format!(
            "top: {} is out of range; at most {MAX_TOP} expected",
            request.top
        )));
    }
    whole_sequence_fits(length, limits)
}

/// Checks a request for logits.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`] or [`ErrorKind::ContextOverflow`].
pub fn logits(request: &LogitsRequest, limits: &Limits) -> Result<()> {
    tokens("tokens", &request.tokens, limits.vocab_size)?;
    let length = request.tokens.len();
    if request.start >= length {
        return Err(Error::invalid_request(format!(
            "start: {} is out of range; below {length} expected",
            request.start
        )));
    }
    whole_sequence_fits(length, limits)
}

fn whole_sequence_fits(length: usize, limits: &Limits) -> Result<()> {
    if length <= limits.context_length {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::ContextOverflow,
        format!("tokens: {length} tokens; at most {} fit into the context", limits.context_length),
    ))
}
