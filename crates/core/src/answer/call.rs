//! The calls behind an opening tag, in any of the forms.

use super::{
    ToolFormat,
    json::{Fed, JsonScanner},
    object::ObjectCall,
    piece::{CallWriter, Pieces},
    xml::XmlCall,
};
use crate::Tool;

const CLOSING: &str = "</tool_call>";
const ARGUMENTS: &str = "[ARGS]";
const CALL_ID: &str = "[CALL_ID]";

/// The longest name with an id behind it.
const MAX_NAME: usize = 256;

/// What a character means for a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    More,
    /// The call is whole with this character.
    Done,
    /// This is no call, or one that is damaged.
    Failed,
}

/// The functions that may be called.
#[derive(Debug, Clone, Copy)]
pub(super) struct Names<'a> {
    tools: &'a [Tool],
    /// Only functions that exist count, since nothing else tells a call from text.
    bare: bool,
}

impl<'a> Names<'a> {
    pub(super) fn accept(&self, name: &str) -> bool {
        !name.is_empty() && (!self.bare || self.tool(name).is_some())
    }

    /// Whether a call may begin with this key. An answer in JSON that is no call is told early by its first key.
    pub(super) fn may_begin(&self, key: &str) -> bool {
        !self.bare || matches!(key, "name" | "type" | "id")
    }

    pub(super) fn tool(&self, name: &str) -> Option<&'a Tool> {
        self.tools.iter().find(|tool| tool.name() == name)
    }
}

/// Reads what follows an opening tag, or an answer that may be a call from its first character.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) out: CallWriter,
    bare: bool,
    stage: Stage,
}

#[derive(Debug, Clone)]
enum Stage {
    Object {
        call: ObjectCall,
        after: After,
    },
    /// The closing tag as far as it has come.
    Close(String),
    /// What stands between the calls of a list.
    Between,
    /// Mistral: a list, or a name.
    Mistral,
    /// A name, with an id behind it in some versions.
    Name(String),
    Arguments {
        name: String,
        scanner: JsonScanner,
    },
    Xml(XmlCall),
}

/// What follows an object.
#[derive(Debug, Clone, Copy)]
enum After {
    Nothing,
    Close,
    List,
}

impl Call {
    /// `opening` is what was taken of the answer for it.
    pub(super) fn new(format: ToolFormat, index: usize, opening: &str, bare: bool) -> Self {
        let object = |after| Stage::Object { call: ObjectCall::new(), after };
        let stage = match format {
            ToolFormat::Hermes => object(After::Close),
            ToolFormat::QwenXml => Stage::Xml(XmlCall::new()),
            ToolFormat::Mistral => Stage::Mistral,
            ToolFormat::Llama3 | ToolFormat::Json | ToolFormat::None => object(After::Nothing),
        };
        Self { out: CallWriter::new(index, opening), bare, stage }
    }

    pub(super) fn push(&mut self, c: char, tools: &[Tool], pieces: &mut Pieces) -> Step {
        self.out.raw.push(c);
        let names = Names { tools, bare: self.bare };
        match &mut self.stage {
            Stage::Object { call, after } => {
                let step = call.push(c, &names, &mut self.out, pieces);
                match (step, *after) {
                    (Step::Done, After::Close) => self.go(Stage::Close(String::new())),
                    (Step::Done, After::List) => self.go(Stage::Between),
                    (step, _) => step,
                }
            }
            Stage::Close(tag) => {
                if tag.is_empty() && c.is_whitespace() {
                    return Step::More;
                }
                tag.push(c);
                match tag {
                    tag if tag == CLOSING => Step::Done,
                    tag if CLOSING.starts_with(tag.as_str()) => Step::More,
                    _ => Step::Failed,
                }
            }
            Stage::Xml(call) => match call.push(c, &names, &mut self.out, pieces) {
                Step::Done => self.go(Stage::Close(String::new())),
                step => step,
            },
            Stage::Arguments { .. } if self.out.announced || !c.is_whitespace() => self.argument(c, pieces),
            _ if c.is_whitespace() => Step::More,
            Stage::Between if c == ',' => {
                self.out.end(pieces);
                self.go(Stage::Object { call: ObjectCall::new(), after: After::List })
            }
            Stage::Between => {
                if c == ']' {
                    Step::Done
                } else {
                    Step::Failed
                }
            }
            Stage::Mistral if c == '[' => {
                self.go(Stage::Object { call: ObjectCall::new(), after: After::List })
            }
            Stage::Mistral => {
                self.stage = Stage::Name(String::new());
                self.name(c, &names, pieces)
            }
            Stage::Name(_) => self.name(c, &names, pieces),
            Stage::Arguments { .. } => Step::Failed,
        }
    }

    fn go(&mut self, stage: Stage) -> Step {
        self.stage = stage;
        Step::More
    }

    /// Takes a character of Mistral's `NAME[ARGS]`, `NAME[CALL_ID]ID[ARGS]` or `NAME` before `{`.
    fn name(&mut self, c: char, names: &Names<'_>, pieces: &mut Pieces) -> Step {
        let Stage::Name(text) = &mut self.stage else { return Step::Failed };
        if c != '{' {
            text.push(c);
            let allowed = c.is_alphanumeric() || "_-./:[]".contains(c);
            if !allowed || text.len() > MAX_NAME {
                return Step::Failed;
            }
            if !text.ends_with(ARGUMENTS) {
                return Step::More;
            }
        }
        let head = text.strip_suffix(ARGUMENTS).unwrap_or(text);
        let name = head.split_once(CALL_ID).map_or(head, |(name, _)| name).to_owned();
        if !names.accept(&name) || name.contains(['[', ']']) {
            return Step::Failed;
        }
        self.stage = Stage::Arguments { name, scanner: JsonScanner::new() };
        if c == '{' { self.argument(c, pieces) } else { Step::More }
    }

    /// Takes a character of Mistral's arguments.
    fn argument(&mut self, c: char, pieces: &mut Pieces) -> Step {
        let Stage::Arguments { name, scanner } = &mut self.stage else { return Step::Failed };
        if !self.out.announced {
            if c != '{' {
                return Step::Failed;
            }
            self.out.announce(name, pieces);
        }
        let mut delta = String::new();
        let fed = scanner.feed(c, &mut delta);
        self.out.arguments(&delta, pieces);
        match fed {
            Fed::More => Step::More,
            Fed::Last => Step::Done,
            Fed::Ended | Fed::Invalid => Step::Failed,
        }
    }

    /// The end of the answer. What was taken and is no call is left in the writer.
    pub(super) fn finish(&mut self, pieces: &mut Pieces) {
        if let Stage::Xml(call) = &mut self.stage {
            call.finish(&mut self.out, pieces);
        }
    }
}
