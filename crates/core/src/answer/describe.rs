//! Tools in the text of messages, for chat templates that do not print them.

use crate::{Content, Message, Tool, ToolCall};

const DESCRIPTION: &str = include_str!("description.txt");

/// The conversation with these tools described at the end of the system message, and with calls and their results as text.
pub(crate) fn described(messages: &[Message], tools: &[Tool]) -> Vec<Message> {
    let mut described: Vec<Message> = Vec::with_capacity(messages.len() + 1);
    let mut after_result = false;
    for (at, message) in messages.iter().enumerate() {
        let is_result = message.role == "tool";
        if is_result {
            let text = result(message, &messages[..at]);
            match described.last_mut().filter(|_| after_result) {
                // Many templates take no two user messages in a row.
                Some(last) => add(last, &text),
                None => described.push(Message::user(text)),
            }
        } else {
            let mut message = message.clone();
            for call in std::mem::take(&mut message.tool_calls) {
                add(&mut message, &line(&call));
            }
            described.push(message);
        }
        after_result = is_result;
    }
    if !tools.is_empty() {
        let text = description(tools);
        match described.first_mut().filter(|first| first.role == "system") {
            Some(first) => add(first, &format!("\n{text}")),
            None => described.insert(0, Message::system(text)),
        }
    }
    described
}

fn description(tools: &[Tool]) -> String {
    let functions: Vec<String> =
        tools.iter().filter_map(|tool| tool.as_json().get("function")).map(ToString::to_string).collect();
    DESCRIPTION.trim_end().replace("FUNCTIONS", &functions.join("\n"))
}

/// A call in the form of `ToolFormat::Json`.
fn line(call: &ToolCall) -> String {
    format!("{{\"name\": {}, \"arguments\": {}}}", serde_json::json!(call.name), call.parsed_arguments())
}

fn result(message: &Message, before: &[Message]) -> String {
    let calls = before.iter().rev().flat_map(|message| &message.tool_calls);
    let called = message.tool_call_id.as_ref().and_then(|id| {
        calls.filter(|call| call.id.as_ref() == Some(id)).map(|call| call.name.as_str()).next()
    });
    let name = message.name.as_deref().or(called).unwrap_or("the function");
    format!("Result of {name}:\n{}", message.content.text())
}

/// Adds a line to a message.
fn add(message: &mut Message, text: &str) {
    let before = std::mem::take(&mut message.content).into_text();
    let separator = if before.is_empty() { "" } else { "\n" };
    message.content = Content::Text(format!("{before}{separator}{text}"));
}
