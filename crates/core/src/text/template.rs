//! Chat templates, rendered as transformers renders them, within limits.
//!
//! A template is a program from a model's repository, so it gets no loader, a budget of work (which bounds its time and
//! its memory) and a bound on its output. It is compiled once, when the tokenizer is loaded. A render needs no more
//! stack than any other call, because [`jinja`](super::jinja) bounds how deeply calls and values are nested.

use std::{collections::BTreeMap, panic::AssertUnwindSafe};

use minijinja::{Environment, ErrorKind as JinjaErrorKind, Value};

use super::{
    chat::ChatInput,
    jinja::{self, Program, dict_of, from_json, list_of},
};
use crate::{ChatOptions, Content, ContentPart, Error, Message, Result, ResultExt, Tool, ToolCall};

/// Real templates have up to some 30 KB.
const MAX_SOURCE_BYTES: usize = 64 << 10;

/// Instructions, or 64 bytes of data each: far more than any real template needs for a short conversation.
const BASE_FUEL: u64 = 500_000;
/// What each message and each of its bytes adds to the budget. A loop of a real template takes some 100 instructions
/// per message, but some search all messages for each message.
const FUEL_PER_MESSAGE: u64 = 2_000;
const FUEL_PER_BYTE: u64 = 1;

const BASE_OUTPUT_BYTES: usize = 4 << 20;
const OUTPUT_PER_BYTE: usize = 8;

/// A compiled chat template with the special tokens that it may name.
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    program: Program,
    source: String,
    special_tokens: BTreeMap<String, String>,
    /// It prints a list of text parts as it prints the text itself.
    takes_parts: bool,
}

impl ChatTemplate {
    /// # Errors
    /// [`InvalidModel`](crate::ErrorKind::InvalidModel) where the source is not valid Jinja.
    pub(super) fn new(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(Error::invalid_model(format!(
                "chat template: has {} bytes, expected at most {MAX_SOURCE_BYTES}",
                source.len()
            )));
        }
        let program = Program::new(source)
            .map_err(|e| Error::invalid_model(format!("chat template: {}", one_line(&e))))?;
        let environment = jinja::environment();
        let mut template =
            Self { environment, program, source: source.to_owned(), special_tokens, takes_parts: true };
        template.takes_parts = template.prints_parts();
        Ok(template)
    }

    /// What it was compiled from.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// All text that a rendered chat may have besides the messages.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> + Clone {
        std::iter::once(self.source.as_str()).chain(self.special_tokens.values().map(String::as_str))
    }

    /// Whether a message with a list of parts is printed as one with text. Many templates take only strings, and would
    /// print the list itself.
    fn prints_parts(&self) -> bool {
        let rendered = |content: Content| {
            let messages = [Message::user(content)];
            self.render(&ChatInput::new(&messages, &ChatOptions::default())).ok()
        };
        let parts = rendered(vec![ContentPart::text("x")].into());
        parts.is_some() && parts == rendered("x".into())
    }

    /// Whether the prompt has the tools that a conversation is given.
    pub(super) fn prints_tools(&self) -> bool {
        const NAME: &str = "ternion_sample_tool";
        let messages = [Message::user("x")];
        let tool = Tool::function(NAME, "x", serde_json::json!({"type": "object", "properties": {}}));
        let options = ChatOptions::default().with_tools([tool]);
        // A template that fails here is one that does something with them.
        self.render(&ChatInput::new(&messages, &options)).map_or(true, |prompt| prompt.contains(NAME))
    }

    /// # Errors
    /// [`InvalidRequest`](crate::ErrorKind::InvalidRequest) with the template's own words where it refuses the
    /// messages, [`Unsupported`](crate::ErrorKind::Unsupported) where it uses what minijinja does not have,
    /// [`InvalidModel`](crate::ErrorKind::InvalidModel) where it fails or exceeds a limit.
    pub(super) fn render(&self, input: &ChatInput<'_>) -> Result<String> {
        let render = || self.render_unguarded(input);
        std::panic::catch_unwind(AssertUnwindSafe(render))
            .unwrap_or_else(|_| Err(Error::invalid_model("chat template: the template engine panicked")))
            .with_operation("render chat")
    }

    /// A message as the template sees it: OpenAI's JSON, with the arguments of tool calls parsed.
    fn message(&self, message: &Message, arguments: &[serde_json::Value]) -> Result<Value> {
        let content = match &message.content {
            Content::Null => Value::from(()),
            Content::Parts(parts) if self.takes_parts => {
                let part = |ContentPart::Text { text }: &ContentPart| {
                    dict_of(vec![("type", "text".into()), ("text", text.as_str().into())])
                };
                list_of(parts.iter().map(part).collect())
            }
            content => content.text().into(),
        };
        let mut pairs = vec![("role", message.role.as_str().into()), ("content", content)];
        let optional = [
            ("name", &message.name),
            ("tool_call_id", &message.tool_call_id),
            ("reasoning_content", &message.reasoning),
        ];
        for (key, text) in optional {
            pairs.extend(text.as_deref().map(|text| (key, Value::from(text))));
        }
        if !message.tool_calls.is_empty() {
            let calls = message.tool_calls.iter().zip(arguments);
            let calls = calls.map(|(call, arguments)| tool_call(call, arguments)).collect::<Result<_>>()?;
            pairs.push(("tool_calls", list_of(calls)));
        }
        Ok(dict_of(pairs))
    }

    fn render_unguarded(&self, input: &ChatInput<'_>) -> Result<String> {
        let messages = &*input.messages;
        let bytes = input.texts().into_iter().map(str::len).sum::<usize>();
        let fuel = BASE_FUEL + FUEL_PER_MESSAGE * messages.len() as u64 + FUEL_PER_BYTE * bytes as u64;
        // A copy shares all but the fuel.
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));

        let mut context = BTreeMap::new();
        // Templates ask `tools is not none`.
        context.extend([("tools", Value::from(())), ("documents", Value::from(()))]);
        context
            .extend(self.special_tokens.iter().map(|(name, token)| (name.as_str(), token.as_str().into())));
        for (name, value) in input.args.iter() {
            context.insert(name, json("chat.template_args", value)?);
        }
        if !input.tools.is_empty() {
            let tools = input.tools.iter().map(|tool| {
                let pairs = tool.iter().map(|(key, value)| Ok((key.as_str(), json("chat.tools", value)?)));
                pairs.collect::<Result<Vec<_>>>().map(dict_of)
            });
            context.insert("tools", list_of(tools.collect::<Result<_>>()?));
        }
        let list = messages.iter().zip(&input.arguments);
        let list =
            list.map(|(message, arguments)| self.message(message, arguments)).collect::<Result<_>>()?;
        context.insert("messages", list_of(list));
        context.insert("add_generation_prompt", input.add_generation_prompt.into());

        let mut prompt = String::new();
        self.program
            .run(&environment, Value::from_pairs(context), &mut prompt)
            .map_err(|e| render_error(&e, messages, fuel))?;
        // Fuel has bounded it to a few times as much.
        let limit = BASE_OUTPUT_BYTES + OUTPUT_PER_BYTE * bytes;
        if prompt.len() > limit {
            return Err(Error::invalid_model(format!(
                "chat template: the prompt has {} bytes, far more than its messages; expected at most {limit}",
                prompt.len()
            )));
        }
        Ok(prompt)
    }
}

/// A value from a request as templates see it.
fn json(field: &str, value: &serde_json::Value) -> Result<Value> {
    from_json(value).map_err(|e| Error::invalid_request(format!("{field}: {}", one_line(&e))))
}

fn tool_call(call: &ToolCall, arguments: &serde_json::Value) -> Result<Value> {
    let arguments = json("messages: tool_calls", arguments)?;
    let function = dict_of(vec![("name", call.name.as_str().into()), ("arguments", arguments)]);
    let id = call.id.as_deref().map(|id| ("id", id.into()));
    Ok(dict_of(id.into_iter().chain([("type", "function".into()), ("function", function)]).collect()))
}

fn render_error(error: &minijinja::Error, messages: &[Message], fuel: u64) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if let Some(jinja::Raised(message)) = inner.downcast_ref() {
            return Error::invalid_request(format!("messages: the chat template refuses them: {message}"));
        }
        cause = inner.source();
    }
    let text = format!("chat template: {}", one_line(error));
    match error.kind() {
        JinjaErrorKind::OutOfFuel => {
            Error::invalid_model(format!("chat template: does not end within {fuel} steps"))
        }
        JinjaErrorKind::UnknownFilter
        | JinjaErrorKind::UnknownFunction
        | JinjaErrorKind::UnknownMethod
        | JinjaErrorKind::UnknownTest
        | JinjaErrorKind::TemplateNotFound => Error::unsupported(text),
        _ if messages.is_empty() => {
            Error::invalid_request("messages: there are none, and the chat template needs some")
        }
        _ => Error::invalid_model(text),
    }
}

fn one_line(error: &minijinja::Error) -> String {
    error.to_string().lines().collect::<Vec<_>>().join(" ")
}
