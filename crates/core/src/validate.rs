//! Checks of requests. Each error names the field, what was found and what is allowed.

use std::sync::Arc;

use crate::{
    ChatOptions, Constraint, Error, ErrorKind, GenerateParams, GenerateRequest, LogitsRequest, Message,
    ModelInfo, Prompt, Result, Sampling, ScoreRequest, Tool, ToolChoice, blocking::blocking, info::Limits,
    text::Tokenizer,
};

/// The most entries of [`ScoreRequest::top`].
pub const MAX_TOP: usize = 100;

/// Checks everything about a request but its prompt's tokens. Token ids of `logit_bias` must be below the vocabulary's
/// size, where `info` tells it.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`]; [`ErrorKind::Unsupported`] for what the capabilities do not have.
pub fn generate(params: &GenerateParams, info: &ModelInfo) -> Result<()> {
    let vocab_size = known_vocab_size(&info.limits);
    if params.max_tokens == Some(0) {
        return Err(Error::invalid_request("max_tokens: 0 is out of range; at least 1 expected"));
    }
    if params.stop.iter().any(String::is_empty) {
        return Err(Error::invalid_request("stop: a stop string is empty; at least one character expected"));
    }
    if let Some(token) = params.stop_tokens.iter().find(|&&token| token as usize >= vocab_size) {
        return Err(Error::invalid_request(format!(
            "stop_tokens: token {token} is out of range; ids below {vocab_size} expected"
        )));
    }
    if matches!(params.prompt, Prompt::Text(_) | Prompt::Segments(_)) && params.prompt.is_empty() {
        return Err(Error::invalid_request("prompt: is empty; at least one token expected"));
    }
    if params.top_logprobs > MAX_TOP {
        return Err(Error::invalid_request(format!(
            "top_logprobs: {} is out of range; at most {MAX_TOP} expected",
            params.top_logprobs
        )));
    }
    if params.top_logprobs > 0 && !params.logprobs {
        return Err(Error::invalid_request("top_logprobs: needs `logprobs`, which is off"));
    }
    if let Some(form) = &params.constraint {
        constraint(form, params.ignore_eos, info)?;
    }
    if params.reasoning_budget.is_some() && !info.capabilities.reasoning {
        return Err(Error::unsupported(format!(
            "reasoning_budget: backend `{}` does not tell the thoughts of this model",
            info.backend
        )));
    }
    chat(params, info)?;
    // `ContextLayer` removes these fields before it forwards a request.
    if let Some(policy) = params.context_policy.as_ref().filter(|policy| policy.takes_long_prompts()) {
        return Err(Error::unsupported(format!(
            "context_policy: the backend itself has no `{}`; load the model through the registry, or put a ContextLayer around it",
            policy.name()
        )));
    }
    if params.document.is_some() {
        return Err(Error::unsupported(
            "document: load the model through the registry, or put a ContextLayer around the backend",
        ));
    }
    sampling(&params.sampling, vocab_size)
}

/// Checks what can be told of a constraint without a tokenizer.
fn constraint(constraint: &Constraint, ignore_eos: bool, info: &ModelInfo) -> Result<()> {
    if !info.capabilities.constraints {
        return Err(Error::unsupported(format!(
            "constraint: backend `{}` cannot constrain answers",
            info.backend
        )));
    }
    if ignore_eos {
        return Err(Error::invalid_request(
            "ignore_eos: cannot be combined with a constraint, whose answer ends where it is complete",
        ));
    }
    match constraint {
        Constraint::JsonSchema(schema) if !(schema.is_object() || schema.is_boolean()) => {
            Err(Error::invalid_request("constraint: the JSON schema is neither an object nor a boolean"))
        }
        Constraint::Choice(texts) if texts.is_empty() => {
            Err(Error::invalid_request("constraint: the choice has no texts; at least one expected"))
        }
        _ => Ok(()),
    }
}

/// Checks the options for the chat template, and the messages as far as no template is needed.
fn chat(params: &GenerateParams, info: &ModelInfo) -> Result<()> {
    let options = &params.chat;
    let Prompt::Chat(messages) = &params.prompt else {
        let default = ChatOptions::default();
        return if *options == default {
            Ok(())
        } else {
            Err(Error::invalid_request(
                "chat: the prompt is no chat, so there is no template that could use these options",
            ))
        };
    };
    if let Some(message) = messages.iter().find(|message| message.role.is_empty()) {
        let text: String = message.content.text().chars().take(40).collect();
        return Err(Error::invalid_request(format!("messages: the message `{text}` has no role")));
    }
    if options.continue_final_message
        && messages.last().is_some_and(|last| last.content.text().trim().is_empty())
    {
        return Err(Error::invalid_request(
            "chat.continue_final_message: the last message has no text that could be continued",
        ));
    }
    results(messages)?;
    if let Some(tool) = options.tools.iter().find(|tool| !is_function_name(tool.name())) {
        let name: String = tool.name().chars().take(MAX_NAME).collect();
        return Err(Error::invalid_request(format!(
            "chat.tools: `{name}` is no name of a function; 1 to {MAX_NAME} letters, digits and `_-.:/` expected"
        )));
    }
    let mut names: Vec<&str> = options.tools.iter().map(Tool::name).collect();
    names.sort_unstable();
    if let Some((name, _)) = names.iter().zip(&names[1.min(names.len())..]).find(|(a, b)| a == b) {
        return Err(Error::invalid_request(format!("chat.tools: two tools have the name `{name}`")));
    }
    let chosen = match &options.tool_choice {
        ToolChoice::Auto | ToolChoice::None => return Ok(()),
        ToolChoice::Required => None,
        ToolChoice::Function(name) => Some(name),
    };
    if let Some(name) = chosen.filter(|name| names.binary_search(&name.as_str()).is_err()) {
        return Err(Error::invalid_request(format!("chat.tool_choice: no tool has the name `{name}`")));
    }
    if options.tools.is_empty() {
        return Err(Error::invalid_request("chat.tool_choice: a call is required, but there are no tools"));
    }
    if !info.capabilities.required_tool_calls {
        return Err(Error::unsupported(format!(
            "chat.tool_choice: backend `{}` cannot require a call; `auto` or `none` expected",
            info.backend
        )));
    }
    Ok(())
}

/// The longest name of a function.
const MAX_NAME: usize = 128;

fn is_function_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.:/".contains(&b))
}

/// Checks that each result of a tool belongs to a call before it.
fn results(messages: &[Message]) -> Result<()> {
    let mut calls: Vec<Option<&str>> = Vec::new();
    for message in messages {
        calls.extend(message.tool_calls.iter().map(|call| call.id.as_deref()));
        if message.role != "tool" {
            continue;
        }
        let id = message.tool_call_id.as_deref();
        // A call or a result without an id belongs to any.
        let is_known =
            if id.is_none() { !calls.is_empty() } else { calls.contains(&id) || calls.contains(&None) };
        if !is_known {
            let result =
                id.map_or("a result".to_owned(), |id| format!("the result with the `tool_call_id` `{id}`"));
            return Err(Error::invalid_request(format!("messages: {result} belongs to no call before it")));
        }
    }
    Ok(())
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
    generate(&request.params, info)?;
    let checked = move |tokens: &[u32]| {
        self::tokens("prompt", tokens, known_vocab_size(&limits))?;
        // A backend that does not know its context has no limit to check.
        if limits.context_length == 0 { Ok(()) } else { prompt_fits(tokens.len(), limits.context_length) }
    };
    if let Prompt::Tokens(tokens) = &request.params.prompt {
        return checked(tokens);
    }
    not_empty(&request.params.prompt)?;
    let Some(tokenizer) = tokenizer else { return Ok(()) };
    if request.knows_tokens(&tokenizer) {
        return checked(&request.prompt_tokens(&tokenizer)?);
    }
    let request = request.clone();
    blocking("the prompt's tokenization", move || checked(&request.prompt_tokens(&tokenizer)?)).await
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
