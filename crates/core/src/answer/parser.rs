//! From the text of an answer to its thought, its words and its calls of tools.

use crate::{ChatOptions, Event, GenerateParams, Prompt, Result, Tool, text::Tokenizer};

use super::{
    AnswerFormat, ReasoningTags, ToolFormat,
    call::{Call, Step},
    piece::{Meaning, Piece, Pieces},
};

/// Tokens at the end of a prompt that show whether it begins a thought.
const TAIL_TOKENS: usize = 32;

/// Whether the prompt has begun a thought that the answer continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Thought {
    /// The prompt ends within a thought.
    Open,
    /// The answer may begin with a thought.
    Possible,
    /// The prompt ends after a thought, which may be empty: thinking is switched off.
    Closed,
}

/// Reads an answer as it comes: the thought, the text, and calls of tools.
///
/// Text that may be the beginning of a tag is held back. A call is announced when its name is whole, and its arguments
/// follow as they come. What turns out to be no call is text, so nothing is lost. The events do not depend on how the answer is
/// cut into pieces.
///
/// ```
/// use ternion_core::{Event, answer::{AnswerFormat, AnswerParser, ReasoningTags, Thought}};
///
/// let mut format = AnswerFormat::default();
/// format.reasoning = Some(ReasoningTags::new("<think>", "</think>"));
/// let mut parser = AnswerParser::new(&format, &[], Thought::Possible);
/// assert_eq!(parser.push("<think>Two and two. </thi"), [Event::reasoning("Two and two.")]);
/// assert_eq!(parser.push("nk> Four"), [Event::text("Four")]);
/// assert_eq!(parser.finish(), []);
/// ```
#[derive(Debug, Clone)]
pub struct AnswerParser {
    reasoning: Option<ReasoningTags>,
    thought: Thought,
    format: ToolFormat,
    tools: Vec<Tool>,
    state: State,
    /// White space that may stand beside a tag.
    space: String,
    /// What may be the beginning of a tag.
    tag: String,
    pieces: Pieces,
    /// Calls so far.
    calls: usize,
    /// Whether there was any text.
    said: bool,
}

#[derive(Debug, Clone)]
enum State {
    /// The rest is text.
    Plain,
    /// The answer has not begun.
    Begin,
    /// A thought has begun and nothing of it has come.
    ThoughtBegin,
    Thought,
    /// The thought has ended and nothing of the answer has come.
    AfterThought,
    Text,
    Call(Box<Call>),
    AfterCall,
}

/// What is held of an answer.
enum Found {
    /// A tag of a thought.
    Tag {
        is_end: bool,
    },
    /// What may be the beginning of a tag.
    Beginning,
    Nothing,
}

impl AnswerParser {
    /// A parser for answers in this form, of a model that was given these tools.
    pub fn new(format: &AnswerFormat, tools: &[Tool], thought: Thought) -> Self {
        let tool_format = if tools.is_empty() { ToolFormat::None } else { format.tools };
        let reasoning = format.reasoning.clone().filter(|_| thought != Thought::Closed);
        let state = match thought {
            Thought::Open if reasoning.is_some() => State::ThoughtBegin,
            _ if reasoning.is_none() && tool_format == ToolFormat::None => State::Plain,
            _ => State::Begin,
        };
        Self {
            reasoning,
            thought,
            format: tool_format,
            tools: if tool_format == ToolFormat::None { Vec::new() } else { tools.to_vec() },
            state,
            space: String::new(),
            tag: String::new(),
            pieces: Pieces::default(),
            calls: 0,
            said: false,
        }
    }

    /// A parser for which everything is text.
    pub fn plain() -> Self {
        Self::new(&AnswerFormat::default(), &[], Thought::Closed)
    }

    /// The parser for the answer to a request whose prompt has these tokens. Only answers to conversations have a form: to
    /// any other prompt all is text.
    ///
    /// # Errors
    /// Those of [`Tokenizer::decode`].
    pub fn for_request(params: &GenerateParams, tokenizer: &Tokenizer, tokens: &[u32]) -> Result<Self> {
        let Some(format) = tokenizer.answer_format() else { return Ok(Self::plain()) };
        let thought = match &params.prompt {
            Prompt::Chat(messages) if params.chat.continue_final_message => {
                let text = messages.last().map(|last| last.content.text());
                format.thought_within(&text.unwrap_or_default())
            }
            Prompt::Chat(_) => {
                let tail = &tokens[tokens.len().saturating_sub(TAIL_TOKENS)..];
                format.thought(&tokenizer.decode(tail, false)?)
            }
            _ => return Ok(Self::plain()),
        };
        Ok(Self::new(format, params.chat.offered_tools(), thought))
    }

    /// The tags that this parser looks for. A tag that is a special token has no text otherwise: it must be pushed by its
    /// name.
    pub fn tags(&self) -> Vec<String> {
        let reasoning = self.reasoning.iter().flat_map(|tags| [tags.start.clone(), tags.end.clone()]);
        reasoning.chain(self.format.tags().iter().map(|tag| (*tag).to_owned())).collect()
    }

    /// What the prompt says about the thought before the answer.
    pub fn thought(&self) -> Thought {
        self.thought
    }

    /// Whether everything is text.
    pub fn is_plain(&self) -> bool {
        self.reasoning.is_none() && self.format == ToolFormat::None
    }

    /// Calls that have been announced.
    pub fn calls(&self) -> usize {
        match &self.state {
            State::Call(call) => call.out.index + usize::from(call.out.announced),
            _ => self.calls,
        }
    }

    /// Takes the next piece of the answer; returns what is certain with it.
    pub fn push(&mut self, text: &str) -> Vec<Event> {
        if matches!(self.state, State::Plain) {
            return Some(text).filter(|text| !text.is_empty()).map(Event::text).into_iter().collect();
        }
        events(self.pieces(text))
    }

    /// What was held back, at the end of the answer.
    pub fn finish(&mut self) -> Vec<Event> {
        events(self.last_pieces())
    }

    pub(super) fn pieces(&mut self, text: &str) -> Vec<Piece> {
        text.chars().for_each(|c| self.take(c));
        self.pieces.take()
    }

    pub(super) fn last_pieces(&mut self) -> Vec<Piece> {
        let (space, tag) = (std::mem::take(&mut self.space), std::mem::take(&mut self.tag));
        let (of_space, of_tag) = match std::mem::replace(&mut self.state, State::Plain) {
            State::Begin | State::Text | State::Plain => (Meaning::Text, Meaning::Text),
            State::ThoughtBegin => (Meaning::Syntax, Meaning::Reasoning),
            State::Thought => (Meaning::Reasoning, Meaning::Reasoning),
            State::AfterThought | State::AfterCall => (Meaning::Syntax, Meaning::Text),
            State::Call(mut call) => {
                call.finish(&mut self.pieces);
                // Of a call that was announced only a closing tag can be missing.
                let rest = if call.out.announced { Meaning::Syntax } else { Meaning::Text };
                self.calls = call.out.index + usize::from(call.out.announced);
                self.pieces.add_text(&call.out.raw, rest);
                (Meaning::Text, Meaning::Text)
            }
        };
        self.pieces.add_text(&space, of_space);
        self.pieces.add_text(&tag, of_tag);
        self.pieces.take()
    }

    fn take(&mut self, c: char) {
        match &mut self.state {
            State::Plain => return self.text(c.encode_utf8(&mut [0; 4])),
            State::Call(call) => {
                let step = call.push(c, &self.tools, &mut self.pieces);
                return self.called(step);
            }
            _ => {}
        }
        if self.tag.is_empty() && c.is_whitespace() {
            self.space.push(c);
            return;
        }
        self.tag.push(c);
        if self.opens_call() {
            let opening = std::mem::take(&mut self.space) + &std::mem::take(&mut self.tag);
            return self.open(&opening);
        }
        match self.found() {
            Found::Tag { is_end } => self.turn(is_end),
            Found::Beginning => {}
            Found::Nothing => self.miss(),
        }
    }

    /// What `tag` is by now.
    fn found(&self) -> Found {
        let tags = self.reasoning_tags().into_iter().flatten();
        if let Some((_, is_end)) = tags.clone().find(|(tag, _)| *tag == self.tag) {
            return Found::Tag { is_end };
        }
        let mut all = tags.map(|(tag, _)| tag).chain(self.opening());
        if all.any(|tag| tag.starts_with(&self.tag)) { Found::Beginning } else { Found::Nothing }
    }

    /// The tags of thoughts that may come now, and whether each is the end.
    fn reasoning_tags(&self) -> [Option<(&str, bool)>; 2] {
        let Some(tags) = &self.reasoning else { return [None, None] };
        let (start, end) = (Some((tags.start.as_str(), false)), Some((tags.end.as_str(), true)));
        match self.state {
            State::Begin => [start, None],
            // Some models repeat the tag that the prompt ends with.
            State::ThoughtBegin => [start, end],
            State::Thought => [None, end],
            _ => [None, None],
        }
    }

    /// The tag of a call that may come now.
    fn opening(&self) -> Option<&'static str> {
        match self.state {
            State::Begin | State::AfterThought | State::Text | State::AfterCall => self.format.opening(),
            _ => None,
        }
    }

    /// Whether `tag` begins a call.
    fn opens_call(&self) -> bool {
        self.opening().is_some_and(|tag| tag == self.tag) || (self.tag == "{" && self.may_be_bare())
    }

    fn may_be_bare(&self) -> bool {
        self.format.is_bare() && matches!(self.state, State::Begin | State::AfterThought | State::AfterCall)
    }

    /// Begins to read a call.
    fn open(&mut self, opening: &str) {
        let bare = opening.ends_with('{');
        let (before, first) = opening.split_at(opening.len() - usize::from(bare));
        self.state = State::Call(Box::new(Call::new(self.format, self.calls, before, bare)));
        first.chars().for_each(|c| self.take(c));
    }

    fn called(&mut self, step: Step) {
        let State::Call(call) = &mut self.state else { return };
        match step {
            Step::More => {}
            Step::Done => {
                call.out.end(&mut self.pieces);
                self.calls = call.out.index;
                self.state = State::AfterCall;
            }
            Step::Failed => {
                let raw = std::mem::take(&mut call.out.raw);
                self.calls = call.out.index + usize::from(call.out.announced);
                self.state = State::Text;
                // The first character, or the opening tag, is text for certain. Behind it another call may begin.
                let space = raw.len() - raw.trim_start().len();
                let opening = self.format.opening().filter(|tag| raw[space..].starts_with(tag));
                let first = raw[space..].chars().next().map_or(0, char::len_utf8);
                let certain = space + opening.map_or(first, str::len);
                self.text(&raw[..certain]);
                raw[certain..].chars().for_each(|c| self.take(c));
            }
        }
    }

    /// Takes a tag of a thought.
    fn turn(&mut self, is_end: bool) {
        let syntax = std::mem::take(&mut self.space) + &std::mem::take(&mut self.tag);
        self.pieces.add_text(&syntax, Meaning::Syntax);
        self.state = if is_end { State::AfterThought } else { State::ThoughtBegin };
    }

    /// The state for text in which only calls are looked for.
    fn in_text(&self) -> State {
        if self.format == ToolFormat::None { State::Plain } else { State::Text }
    }

    fn text(&mut self, text: &str) {
        self.said |= !text.is_empty();
        self.pieces.add_text(text, Meaning::Text);
    }

    /// What was held is no tag.
    fn miss(&mut self) {
        let (space, held) = (std::mem::take(&mut self.space), std::mem::take(&mut self.tag));
        let next = match self.state {
            State::ThoughtBegin => {
                self.pieces.add_text(&space, Meaning::Syntax);
                State::Thought
            }
            State::Thought => {
                self.pieces.add_text(&space, Meaning::Reasoning);
                State::Thought
            }
            State::AfterCall if self.format.is_bare() && held == ";" => {
                self.pieces.add_text(&(space + &held), Meaning::Syntax);
                return;
            }
            State::AfterThought => {
                self.pieces.add_text(&space, Meaning::Syntax);
                self.in_text()
            }
            // White space between a call and the first text separates nothing.
            State::AfterCall if !self.said => {
                self.pieces.add_text(&space, Meaning::Syntax);
                self.in_text()
            }
            _ => {
                self.text(&space);
                self.in_text()
            }
        };
        self.state = next;
        // Behind its first character another tag may begin.
        let first = held.chars().next().map_or(0, char::len_utf8);
        match self.state {
            State::Thought => self.pieces.add_text(&held[..first], Meaning::Reasoning),
            _ => self.text(&held[..first]),
        }
        held[first..].chars().for_each(|c| self.take(c));
    }
}

fn events(pieces: Vec<Piece>) -> Vec<Event> {
    pieces.into_iter().filter_map(Piece::into_event).collect()
}

impl AnswerFormat {
    /// What the end of a prompt says about the thought before the answer.
    pub fn thought(&self, prompt_end: &str) -> Thought {
        let end = prompt_end.trim_end();
        match &self.reasoning {
            None => Thought::Closed,
            Some(tags) if end.ends_with(&tags.start) => Thought::Open,
            Some(tags) if end.ends_with(&tags.end) => Thought::Closed,
            Some(_) => Thought::Possible,
        }
    }

    /// What the beginning of an answer says about the thought in it.
    fn thought_within(&self, answer: &str) -> Thought {
        let Some(tags) = &self.reasoning else { return Thought::Closed };
        let open = answer.rfind(&tags.start) > answer.rfind(&tags.end);
        if open { Thought::Open } else { Thought::Closed }
    }
}

impl ChatOptions {
    /// Whether the answer may have calls of tools.
    pub fn offers_tools(&self) -> bool {
        !self.offered_tools().is_empty()
    }
}
