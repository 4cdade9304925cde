//! Chat templates, rendered as transformers renders them, within limits.
//!
//! A template is a program from a model's repository, so it gets no loader, a budget of work (which bounds its time and
//! its memory) and a bound on its output. It is compiled once, when the tokenizer is loaded. A render needs no more
//! stack than any other call, because [`jinja`](super::jinja) bounds how deeply calls and values are nested.

use std::{collections::BTreeMap, panic::AssertUnwindSafe};

use minijinja::{Environment, ErrorKind as JinjaErrorKind, Value};

use super::jinja::{self, Dict, Program};
use crate::{Error, Message, Result, ResultExt};

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
        Ok(Self { environment: jinja::environment(), program, source: source.to_owned(), special_tokens })
    }

    /// All text that a rendered chat may have besides the messages.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> + Clone {
        std::iter::once(self.source.as_str()).chain(self.special_tokens.values().map(String::as_str))
    }

    /// # Errors
    /// [`InvalidRequest`](crate::ErrorKind::InvalidRequest) with the template's own words where it refuses the
    /// messages, [`Unsupported`](crate::ErrorKind::Unsupported) where it uses what minijinja does not have,
    /// [`InvalidModel`](crate::ErrorKind::InvalidModel) where it fails or exceeds a limit.
    pub(super) fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let render = || self.render_unguarded(messages, add_generation_prompt);
        std::panic::catch_unwind(AssertUnwindSafe(render))
            .unwrap_or_else(|_| Err(Error::invalid_model("chat template: the template engine panicked")))
            .during("render chat")
    }

    fn render_unguarded(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let bytes = messages.iter().map(|m| m.role.len() + m.content.len()).sum::<usize>();
        let fuel = BASE_FUEL + FUEL_PER_MESSAGE * messages.len() as u64 + FUEL_PER_BYTE * bytes as u64;
        // A copy shares all but the fuel.
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));

        let message = |m: &Message| Dict::of_texts([("role", &*m.role), ("content", &*m.content)]);
        let mut context = vec![
            ("messages", jinja::list_of(messages.iter().map(message).collect())),
            ("add_generation_prompt", add_generation_prompt.into()),
            // Templates ask `tools is not none`.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        context
            .extend(self.special_tokens.iter().map(|(name, token)| (name.as_str(), token.as_str().into())));

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
