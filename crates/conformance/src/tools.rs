//! Calls of tools: those that are required, and what is refused.

use serde_json::{Value, json};
use ternion_core::{
    ChatOptions, ErrorKind, Event, FinishReason, GenerateRequest, LlmBackend, Message, Tool, ToolChoice,
};

use crate::{
    Failure, Sentence,
    ask::{drawn, events, prompt},
    check::checks,
};

checks! { "tools";
    a_required_call_comes_in_pieces, PIECES, [Generate, Chat, RequiredCalls, LongContext];
    wrong_tools_are_refused, WRONG, [Generate, Chat];
    no_required_calls_without_the_capability, NONE, [Generate, Chat, NoRequiredCalls];
}

const PIECES: Sentence = Sentence::new(
    "ToolCallEvent",
    "The beginning of a call, which has an id and a name, or the next piece of its arguments.",
);
const WRONG: Sentence = Sentence::new(
    "LlmBackend::validate",
    "Makes the checks that generate makes of the request, in the same order.",
);
const NONE: Sentence = Sentence::new(
    "Capabilities::required_tool_calls",
    "What a backend cannot do it refuses as Unsupported rather than leaving it out.",
);

fn request(own: &str, options: ChatOptions) -> GenerateRequest {
    GenerateRequest::chat([Message::user(prompt(own))]).with_chat_options(options).with_sampling(drawn(None))
}

fn digit() -> Tool {
    let parameters = json!({
        "type": "object",
        "properties": { "digit": { "type": "integer", "minimum": 0, "maximum": 9 } },
        "required": ["digit"],
        "additionalProperties": false,
    });
    Tool::function("show", "Shows a digit.", parameters)
}

/// One call of one function.
///
/// # Errors
/// Events that make no call, or a call that is not valid.
pub async fn a_required_call_comes_in_pieces(model: &dyn LlmBackend) -> Result<(), Failure> {
    let options = ChatOptions::default().with_tools([digit()]).without_parallel_tool_calls();
    let options = options.with_tool_choice(ToolChoice::Function("show".to_owned()));
    let events = events(model, request("call", options), PIECES).await?;
    let mut arguments = None;
    for event in &events {
        match (event, &mut arguments) {
            (Event::ToolCall(call), None) => {
                let begins = call.index == 0 && call.id.is_some() && call.name.as_deref() == Some("show");
                PIECES.require(begins, format_args!("{call:?}"), "the beginning of a call of `show`")?;
                arguments = Some(call.arguments.clone());
            }
            (Event::ToolCall(call), Some(arguments)) => {
                let goes_on = call.index == 0 && call.id.is_none() && call.name.is_none();
                PIECES.require(goes_on, format_args!("{call:?}"), "arguments of the first call")?;
                arguments.push_str(&call.arguments);
            }
            (Event::Done(done), _) => {
                PIECES.equal("finish_reason", &done.finish_reason, &FinishReason::ToolCalls)?;
            }
            _ => {}
        }
    }
    let arguments = arguments.ok_or_else(|| PIECES.broken("no call", "one"))?;
    let found: Option<Value> = serde_json::from_str(&arguments).ok();
    let digit = found.as_ref().and_then(|found| found["digit"].as_u64());
    PIECES.require(digit.is_some_and(|digit| digit < 10), arguments, "a digit")
}

/// Two tools of one name, a name that is none, and a result that belongs to no call.
///
/// # Errors
/// What came instead of the refusal.
pub async fn wrong_tools_are_refused(model: &dyn LlmBackend) -> Result<(), Failure> {
    let with = |tools: Vec<Tool>| request("wrong", ChatOptions::default().with_tools(tools));
    let unnamed = Tool::function("two words", "", json!({}));
    let unknown = [Message::user(prompt("wrong")), Message::tool("x", "y")];
    for (what, request) in [
        ("two tools of one name", with(vec![digit(), digit()])),
        ("a name with a space", with(vec![unnamed])),
        ("a result of no call", GenerateRequest::chat(unknown)),
    ] {
        match model.validate(&request).await {
            Ok(()) => return Err(WRONG.broken(format_args!("{what}: accepted"), "InvalidRequest")),
            Err(error) => {
                WRONG.equal(format_args!("error for {what}"), error.kind(), ErrorKind::InvalidRequest)?;
            }
        }
    }
    Ok(())
}

/// A required call, of a backend that cannot enforce it.
///
/// # Errors
/// What came instead of the refusal.
pub async fn no_required_calls_without_the_capability(model: &dyn LlmBackend) -> Result<(), Failure> {
    let options = ChatOptions::default().with_tools([digit()]).with_tool_choice(ToolChoice::Required);
    match model.generate(request("none", options)).await {
        Ok(_) => Err(NONE.broken("an answer", "Unsupported")),
        Err(error) => NONE.equal("error", error.kind(), ErrorKind::Unsupported),
    }
}
