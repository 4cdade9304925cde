//! Chat templates: Jinja as transformers compiles it, run by minijinja within limits.
//!
//! A template is a program from a model's repository, so it gets no loader, a budget of work (which bounds its time and
//! its memory), a bound on its output and a stack of its own. What minijinja does outside of the budget is brought into
//! it by [`guard`](super::guard).

use std::{collections::BTreeMap, fmt};

use minijinja::{
    AutoEscape, Environment, ErrorKind as JinjaErrorKind, State, Value, machinery, syntax::SyntaxConfig,
};

use super::{guard, python};
use crate::{Error, Message, Result, ResultExt};

const NAME: &str = "chat_template";

/// Real templates have up to some 30 KB. The parser's recursion, and so its stack, is bounded by the length.
const MAX_SOURCE_BYTES: usize = 64 << 10;

/// Instructions, or 64 bytes of data each: far more than any real template needs for a short conversation.
const BASE_FUEL: u64 = 500_000;
/// What each message and each of its bytes adds to the budget. A loop of a real template takes some 100 instructions
/// per message, but some search all messages for each message.
const FUEL_PER_MESSAGE: u64 = 2_000;
const FUEL_PER_BYTE: u64 = 1;

/// Address space for parsing and for dropping nested values, both of which recurse as deep as a template likes: over
/// twice what the worst template within the limits takes. Only what is touched becomes memory.
const STACK_BYTES: usize = 256 << 20;

const BASE_OUTPUT_BYTES: usize = 4 << 20;
const OUTPUT_PER_BYTE: usize = 8;

/// A compiled chat template with the special tokens that it may name.
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
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
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.map_err(|e| Error::invalid_model(e.to_string()))?;
        environment.set_syntax(syntax.clone());
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        python::install(&mut environment);
        guard::install(&mut environment);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        let environment = on_deep_stack(move || {
            let source = without_generation_tags(source);
            let source = guard::without_constant_products(&source, &syntax).into_owned();
            environment
                .add_template_owned(NAME, source)
                .map_err(|e| Error::invalid_model(format!("chat template: {}", one_line(&e))))?;
            Ok(environment)
        })?;
        Ok(Self { environment, source: source.to_owned(), special_tokens })
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
        on_deep_stack(|| self.render_here(messages, add_generation_prompt)).during("render chat")
    }

    fn render_here(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let bytes = messages.iter().map(|m| m.role.len() + m.content.len()).sum::<usize>();
        let mut environment = self.environment.clone();
        let fuel = BASE_FUEL + FUEL_PER_MESSAGE * messages.len() as u64 + FUEL_PER_BYTE * bytes as u64;
        environment.set_fuel(Some(fuel));
        let template = environment.get_template(NAME).map_err(|e| render_error(&e, messages, fuel))?;

        let message =
            |m: &Message| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]);
        let mut context = vec![
            ("messages", messages.iter().map(message).collect::<Vec<_>>().into()),
            ("add_generation_prompt", add_generation_prompt.into()),
            // Templates ask `tools is not none`.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        context
            .extend(self.special_tokens.iter().map(|(name, token)| (name.as_str(), token.as_str().into())));

        let mut prompt = String::new();
        run(&environment, &template, Value::from_pairs(context), &mut prompt)
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

/// Evaluates a template under guard.
fn run<'env>(
    environment: &'env Environment<'env>,
    template: &minijinja::Template<'env, 'env>,
    context: Value,
    prompt: &mut String,
) -> Result<(), minijinja::Error> {
    let compiled = machinery::get_compiled_template(template);
    let instructions = guard::rewrite(&compiled.instructions)?;
    let blocks = compiled.blocks.iter().map(|(name, block)| Ok((*name, guard::rewrite(block)?)));
    let blocks = blocks.collect::<Result<BTreeMap<_, _>, minijinja::Error>>()?;
    let mut output = machinery::make_string_output(prompt);
    machinery::eval(environment, &instructions, context, &blocks, &mut output, AutoEscape::None).map(drop)
}

/// What `raise_exception` was given; kept as the source of the engine's error, to be found again.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(state: &State, message: Value) -> Result<Value, minijinja::Error> {
    guard::walk(state, &message)?;
    let message = message.to_string();
    Err(minijinja::Error::new(JinjaErrorKind::InvalidOperation, "raise_exception")
        .with_source(Raised(message)))
}

/// Local time, as `datetime.now().strftime(format)` gives it.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    jiff::fmt::strtime::format(format, &jiff::ZonedDateTime::now()).map_err(|e| {
        minijinja::Error::new(JinjaErrorKind::InvalidOperation, format!("strftime_now({format:?})"))
            .with_source(e)
    })
}

fn render_error(error: &minijinja::Error, messages: &[Message], fuel: u64) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if let Some(Raised(message)) = inner.downcast_ref() {
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

/// Runs `work` on a thread with a large stack, so that a template cannot overflow it.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("chat-template".to_owned())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|e| {
                let message =
                    format!("no thread with a stack of {} MiB for the chat template", STACK_BYTES >> 20);
                Error::new(crate::ErrorKind::ResourceExhausted, message).with_source(e)
            })?;
        thread
            .join()
            .unwrap_or_else(|_| Err(Error::invalid_model("chat template: the template engine panicked")))
    })
}

fn one_line(error: &minijinja::Error) -> String {
    error.to_string().lines().collect::<Vec<_>>().join(" ")
}

/// `{% generation %}` only marks what an assistant said, for training. A `with` block without variables does the same
/// to the output: nothing, in a scope of its own.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        result.push_str(before);
        rest = tag;
        let inner = tag.trim_start_matches(['-', '+']);
        let sign = &tag[..(tag.len() - inner.len()).min(1)];
        let inner = tag[sign.len()..].trim_start();
        for (name, block) in [("endgeneration", "endwith"), ("generation", "with")] {
            let Some(end) = inner.strip_prefix(name) else { continue };
            let end = end.trim_start();
            if end.starts_with("%}") || end.starts_with("-%}") || end.starts_with("+%}") {
                result.push_str(sign);
                result.push(' ');
                result.push_str(block);
                result.push(' ');
                rest = end;
            }
            break;
        }
    }
    result.push_str(rest);
    result
}
