//! A call in the XML of Qwen 3.5: `<function=NAME><parameter=KEY>VALUE</parameter></function>`.

use serde_json::Value;

use super::{
    call::{Names, Step},
    json::{Fed, JsonScanner},
    piece::{CallWriter, Pieces},
};
use crate::Tool;

const FUNCTION: &str = "<function=";
const PARAMETER: &str = "<parameter=";
const VALUE_END: &str = "</parameter>";
const FUNCTION_END: &str = "</function>";

/// The longest name of a function or of a parameter.
const MAX_NAME: usize = 256;

/// Reads a call. Values are typed by the tool's schema: text becomes a JSON string as it comes, other values when they are
/// whole.
#[derive(Debug, Clone)]
pub(super) struct XmlCall {
    at: At,
    /// A tag or a name that is not whole yet, or the end of a value that may be a tag.
    held: String,
    name: String,
    key: String,
    value: String,
    /// Follows a value that may be JSON, whose strings may have a closing tag in them.
    scanner: Option<JsonScanner>,
    parameters: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Function,
    Name,
    /// The next parameter, or the end of the function.
    Tag,
    Key,
    /// Text that goes on as it comes; `begun` after its first character.
    Text {
        begun: bool,
    },
    Typed,
}

impl XmlCall {
    pub(super) fn new() -> Self {
        Self {
            at: At::Function,
            held: String::new(),
            name: String::new(),
            key: String::new(),
            value: String::new(),
            scanner: None,
            parameters: 0,
        }
    }

    /// Takes the next character, which is in the writer's raw text already.
    pub(super) fn push(
        &mut self,
        c: char,
        names: &Names<'_>,
        out: &mut CallWriter,
        pieces: &mut Pieces,
    ) -> Step {
        match self.at {
            At::Function | At::Tag if self.held.is_empty() && c.is_whitespace() => Step::More,
            At::Function => self.tag(c, &[(FUNCTION, At::Name)]),
            At::Tag => {
                self.held.push(c);
                if self.held == FUNCTION_END {
                    out.arguments(if self.parameters == 0 { "{}" } else { "}" }, pieces);
                    return Step::Done;
                }
                if FUNCTION_END.starts_with(&self.held) {
                    return Step::More;
                }
                self.held.pop();
                self.tag(c, &[(PARAMETER, At::Key)])
            }
            At::Name => self.named(c, |this, name| {
                if !names.accept(&name) {
                    return Step::Failed;
                }
                out.announce(&name, pieces);
                this.name = name;
                this.at = At::Tag;
                Step::More
            }),
            At::Key => self.named(c, |this, key| {
                let separator = if this.parameters == 0 { "{" } else { ", " };
                out.arguments(&format!("{separator}{}: ", Value::from(key.as_str())), pieces);
                this.parameters += 1;
                this.key = key;
                let takes_text = names.tool(&this.name).is_none_or(|tool| tool.takes_text(&this.key));
                this.at = if takes_text {
                    out.arguments("\"", pieces);
                    At::Text { begun: false }
                } else {
                    this.scanner = Some(JsonScanner::new());
                    At::Typed
                };
                Step::More
            }),
            At::Text { begun } => {
                self.at = At::Text { begun: true };
                // The line break behind the tag is no part of the value.
                if begun || c != '\n' {
                    self.text(c, out, pieces);
                }
                Step::More
            }
            At::Typed => {
                self.value.push(c);
                let mut scanned = String::new();
                if self.scanner.as_mut().is_some_and(|scanner| scanner.feed(c, &mut scanned) != Fed::More) {
                    self.scanner = None;
                }
                if self.scanner.as_ref().is_some_and(JsonScanner::is_in_text) {
                    return Step::More;
                }
                if let Some(value) = self.value.strip_suffix(VALUE_END) {
                    out.arguments(&typed(names.tool(&self.name), &self.key, value), pieces);
                    self.value.clear();
                    self.at = At::Tag;
                }
                Step::More
            }
        }
    }

    /// What was held back of a value that ends with the answer.
    pub(super) fn finish(&mut self, out: &mut CallWriter, pieces: &mut Pieces) {
        match self.at {
            At::Text { .. } => out.arguments(&escaped(&std::mem::take(&mut self.held)), pieces),
            At::Typed => out.arguments(&std::mem::take(&mut self.value), pieces),
            _ => {}
        }
    }

    /// Takes a character of one of these tags, each of which leads to another state.
    fn tag(&mut self, c: char, tags: &[(&str, At)]) -> Step {
        self.held.push(c);
        if let Some((_, at)) = tags.iter().find(|(tag, _)| *tag == self.held) {
            self.held.clear();
            self.at = *at;
            return Step::More;
        }
        if tags.iter().any(|(tag, _)| tag.starts_with(&self.held)) { Step::More } else { Step::Failed }
    }

    /// Takes a character of a name, which ends with `>`.
    fn named(&mut self, c: char, mut done: impl FnMut(&mut Self, String) -> Step) -> Step {
        if c == '>' {
            let name = std::mem::take(&mut self.held);
            return if name.is_empty() { Step::Failed } else { done(self, name) };
        }
        self.held.push(c);
        if self.held.len() > MAX_NAME || c.is_control() || c == '<' { Step::Failed } else { Step::More }
    }

    /// Takes a character of a text, which ends before its closing tag and the line break before that.
    fn text(&mut self, c: char, out: &mut CallWriter, pieces: &mut Pieces) {
        self.held.push(c);
        loop {
            let tag = self.held.strip_prefix('\n').unwrap_or(&self.held);
            if tag == VALUE_END {
                self.held.clear();
                out.arguments("\"", pieces);
                self.at = At::Tag;
                return;
            }
            if VALUE_END.starts_with(tag) {
                return;
            }
            let first = self.held.remove(0);
            out.arguments(&escaped(first.encode_utf8(&mut [0; 4])), pieces);
        }
    }
}

/// Text as JSON has it between quotes.
fn escaped(text: &str) -> String {
    let quoted = Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

/// A whole value as JSON of the type that its schema asks for; text where it is none.
fn typed(tool: Option<&Tool>, key: &str, value: &str) -> String {
    let text = value.strip_prefix('\n').unwrap_or(value);
    let text = text.strip_suffix('\n').unwrap_or(text);
    let json = match text.trim() {
        "True" => "true",
        "False" => "false",
        "None" => "null",
        other => other,
    };
    let allowed: Vec<&str> = match tool.and_then(|tool| tool.parameter(key)?.get("type")) {
        Some(Value::String(kind)) => vec![kind],
        Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let fits = |value: &Value| {
        let kind = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(_) => "number",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        let is_integer = || value.is_number() && allowed.contains(&"integer");
        allowed.is_empty() || allowed.contains(&kind) || is_integer()
    };
    match serde_json::from_str::<Value>(json) {
        Ok(value) if fits(&value) => json.to_owned(),
        _ => Value::from(text).to_string(),
    }
}
