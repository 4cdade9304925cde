//! A call as a JSON object with a name and arguments.

use serde_json::Value;

use super::{
    call::{Names, Step},
    json::{Fed, JsonScanner},
    piece::{CallWriter, Pieces},
};

/// Reads `{"name": ..., "arguments": {...}}`. `parameters` is another name of the arguments. The keys may come in any order;
/// others are skipped.
#[derive(Debug, Clone)]
pub(super) struct ObjectCall {
    at: At,
    scanner: JsonScanner,
    key: String,
    value: String,
    name: Option<String>,
    /// Whether a key has come.
    begun: bool,
    /// The arguments that came before the name.
    early: Option<String>,
    has_arguments: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Open,
    /// A key, or the end of the object if this is the first one.
    Key {
        first: bool,
    },
    InKey,
    Colon,
    Value,
    InValue(Kind),
    Separator,
}

/// What a value is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Name,
    /// Arguments as an object, which go on as they come.
    Arguments,
    /// Arguments as a string of JSON, which some models write.
    ArgumentText,
    Other,
}

impl ObjectCall {
    pub(super) fn new() -> Self {
        Self {
            at: At::Open,
            scanner: JsonScanner::new(),
            key: String::new(),
            value: String::new(),
            name: None,
            begun: false,
            early: None,
            has_arguments: false,
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
        let is_space = matches!(c, ' ' | '\t' | '\n' | '\r');
        match self.at {
            At::InKey => match self.scanner.feed(c, &mut self.key) {
                Fed::More => Step::More,
                Fed::Last => {
                    let Ok(key) = serde_json::from_str(&self.key) else { return Step::Failed };
                    self.key = key;
                    self.at = At::Colon;
                    let first = !std::mem::replace(&mut self.begun, true);
                    if first && !names.may_begin(&self.key) { Step::Failed } else { Step::More }
                }
                Fed::Ended | Fed::Invalid => Step::Failed,
            },
            At::InValue(kind) => self.value(c, kind, names, out, pieces),
            _ if is_space => Step::More,
            At::Open if c == '{' => self.go(At::Key { first: true }),
            At::Key { .. } if c == '"' => {
                self.key.clear();
                self.scanner = JsonScanner::new();
                self.scanner.feed(c, &mut self.key);
                self.go(At::InKey)
            }
            At::Key { first: true } if c == '}' => Step::Failed,
            At::Colon if c == ':' => self.go(At::Value),
            At::Value => {
                let Some(kind) = self.kind(c) else { return Step::Failed };
                self.value.clear();
                self.scanner = JsonScanner::new();
                self.at = At::InValue(kind);
                if kind == Kind::Arguments {
                    self.has_arguments = true;
                    if let Some(name) = &self.name {
                        out.announce(name, pieces);
                    }
                }
                self.value(c, kind, names, out, pieces)
            }
            At::Separator if c == ',' => self.go(At::Key { first: false }),
            At::Separator if c == '}' => self.end(out, pieces),
            _ => Step::Failed,
        }
    }

    fn go(&mut self, at: At) -> Step {
        self.at = at;
        Step::More
    }

    /// What the value that begins with `c` is for; `None` if it cannot be that.
    fn kind(&self, c: char) -> Option<Kind> {
        match self.key.as_str() {
            "name" if self.name.is_none() => (c == '"').then_some(Kind::Name),
            "arguments" | "parameters" if !self.has_arguments => match c {
                '{' => Some(Kind::Arguments),
                '"' => Some(Kind::ArgumentText),
                'n' => Some(Kind::Other),
                _ => None,
            },
            _ => Some(Kind::Other),
        }
    }

    fn value(
        &mut self,
        c: char,
        kind: Kind,
        names: &Names<'_>,
        out: &mut CallWriter,
        pieces: &mut Pieces,
    ) -> Step {
        let before = self.value.len();
        let fed = self.scanner.feed(c, &mut self.value);
        if fed == Fed::Invalid {
            return Step::Failed;
        }
        if kind == Kind::Arguments && out.announced {
            out.arguments(&self.value[before..], pieces);
            self.value.clear();
        }
        if fed == Fed::More {
            return Step::More;
        }
        self.at = At::Separator;
        let value = std::mem::take(&mut self.value);
        match kind {
            Kind::Name => {
                let Ok(name) = serde_json::from_str::<String>(&value) else { return Step::Failed };
                if !names.accept(&name) {
                    return Step::Failed;
                }
                if let Some(early) = self.early.take() {
                    out.announce(&name, pieces);
                    out.arguments(&early, pieces);
                }
                self.name = Some(name);
            }
            Kind::Arguments if !out.announced => self.early = Some(value),
            Kind::ArgumentText => {
                let Ok(Value::String(text)) = serde_json::from_str(&value) else { return Step::Failed };
                let text = if text.trim().is_empty() { "{}".to_owned() } else { text };
                self.has_arguments = true;
                match &self.name {
                    Some(name) => {
                        out.announce(name, pieces);
                        out.arguments(&text, pieces);
                    }
                    None => self.early = Some(text),
                }
            }
            Kind::Arguments | Kind::Other => {}
        }
        if fed == Fed::Ended { self.push(c, names, out, pieces) } else { Step::More }
    }

    fn end(&mut self, out: &mut CallWriter, pieces: &mut Pieces) -> Step {
        if !out.announced {
            // Without arguments nothing has announced it.
            let Some(name) = &self.name else { return Step::Failed };
            out.announce(name, pieces);
            out.arguments("{}", pieces);
        }
        Step::Done
    }
}
