//! `chat.completion` and `chat.completion.chunk`.

use serde::Serialize;
use ternion::{
    Completion, Event, FinishReason, TextEvent, TokenEvent, ToolCall, ToolCallEvent, context::ContextStep,
};

use super::{
    common::{StopReason, Timings, Totals, UsageBody, finish_reason, finite},
    sse::{Chunks, chunk},
};
use crate::{choices::ChoiceEvent, token_text::TokenTexts};

/// What every document of one answer repeats.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
}

/// One document of an answer: the whole, or a chunk.
#[derive(Serialize)]
pub(super) struct Document<'a, C> {
    pub(super) id: &'a str,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) choices: C,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<UsageBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) timings: Option<Timings>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) context: Option<&'a ternion::context::ContextReport>,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    message: Message,
    logprobs: Option<Logprobs>,
    finish_reason: &'static str,
    stop_reason: Option<StopReason>,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    /// `null` where the answer is calls alone.
    content: Option<String>,
    refusal: Option<()>,
    #[serde(flatten)]
    thought: Option<Thought>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

/// A thought, under the name that most servers give it and under vLLM's newer one.
#[derive(Serialize)]
struct Thought {
    reasoning_content: String,
    reasoning: String,
}

impl Thought {
    fn new(text: String) -> Option<Self> {
        (!text.is_empty()).then(|| Self { reasoning_content: text.clone(), reasoning: text })
    }
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: Delta,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(flatten)]
    thought: Option<Thought>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallDelta; 1]>,
}

/// A piece of a call.
#[derive(Serialize)]
struct CallDelta {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionDelta,
}

#[derive(Serialize)]
struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

impl From<ToolCallEvent> for CallDelta {
    fn from(event: ToolCallEvent) -> Self {
        Self {
            index: event.index,
            kind: event.name.is_some().then_some("function"),
            id: event.id,
            function: FunctionDelta { name: event.name, arguments: event.arguments },
        }
    }
}

#[derive(Debug, Default, Serialize)]
struct Logprobs {
    content: Vec<TokenLogprob>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct TokenLogprob {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<TokenLogprob>>,
}

/// Tokens whose text has not come yet, with what they are shown as.
struct Tokens {
    texts: TokenTexts,
    wanted: bool,
    pending: Vec<TokenEvent>,
}

impl Tokens {
    fn new(texts: TokenTexts, wanted: bool) -> Self {
        Self { texts, wanted, pending: Vec::new() }
    }

    fn push(&mut self, token: TokenEvent) {
        if self.wanted {
            self.pending.push(token);
        }
    }

    /// The log-probabilities of the tokens so far.
    fn take(&mut self) -> Option<Logprobs> {
        self.wanted.then(|| {
            let content = std::mem::take(&mut self.pending);
            Logprobs { content: content.iter().map(|token| self.show(token)).collect(), refusal: None }
        })
    }

    /// Those at the end. The token that ends an answer is no part of it, nor are those of a stop string.
    fn take_last(&mut self, reason: &FinishReason) -> Option<Logprobs> {
        match reason {
            FinishReason::EndOfSequence | FinishReason::StopToken(_) => drop(self.pending.pop()),
            FinishReason::StopString(_) => self.pending.clear(),
            _ => {}
        }
        self.take().filter(|logprobs| !logprobs.content.is_empty())
    }

    fn show(&self, token: &TokenEvent) -> TokenLogprob {
        let one = |id, logprob, top_logprobs| {
            let shown = self.texts.get(id);
            TokenLogprob { token: shown.text, logprob: finite(logprob), bytes: shown.bytes, top_logprobs }
        };
        let top = token.top_logprobs.iter().map(|top| one(top.id, top.logprob, None)).collect();
        one(token.id, token.logprob.unwrap_or(f32::NEG_INFINITY), Some(top))
    }
}

/// Puts whole answers together.
pub(crate) struct Collected {
    choices: Vec<Partial>,
    totals: Totals,
}

struct Partial {
    /// Text, thought and calls.
    answer: Completion,
    logprobs: Vec<TokenLogprob>,
    tokens: Tokens,
    reason: FinishReason,
}

impl Collected {
    pub(crate) fn new(count: usize, texts: &TokenTexts, logprobs: bool) -> Self {
        let one = || Partial {
            answer: Completion::default(),
            logprobs: Vec::new(),
            tokens: Tokens::new(texts.clone(), logprobs),
            reason: FinishReason::default(),
        };
        Self { choices: (0..count).map(|_| one()).collect(), totals: Totals::default() }
    }

    pub(crate) fn event(&mut self, index: usize, event: ChoiceEvent) {
        let ChoiceEvent::Generated(event) = event else { return };
        let choice = &mut self.choices[index];
        match event {
            Event::Context(ContextStep::Report(report)) => self.totals.context = Some(report),
            Event::Token(token) => choice.tokens.push(token),
            Event::Text(_) => {
                choice.answer.add(event);
                choice.logprobs.extend(choice.tokens.take().into_iter().flat_map(|taken| taken.content));
            }
            Event::Done(done) => {
                let last = choice.tokens.take_last(&done.finish_reason);
                choice.logprobs.extend(last.into_iter().flat_map(|taken| taken.content));
                self.totals.add(&done, index == 0);
                choice.reason = done.finish_reason;
            }
            Event::Reasoning(_) | Event::ToolCall(_) => {
                choice.answer.add(event);
            }
            _ => {}
        }
    }

    pub(crate) fn into_json(self, head: &Head) -> String {
        let choices: Vec<Choice> = self
            .choices
            .into_iter()
            .enumerate()
            .map(|(index, choice)| Choice {
                index,
                message: choice.answer.into(),
                logprobs: choice
                    .tokens
                    .wanted
                    .then_some(Logprobs { content: choice.logprobs, refusal: None }),
                finish_reason: finish_reason(&choice.reason),
                stop_reason: StopReason::of(&choice.reason),
            })
            .collect();
        chunk(&Document {
            id: &head.id,
            object: "chat.completion",
            created: head.created,
            model: &head.model,
            choices,
            usage: Some(self.totals.usage),
            timings: self.totals.timings,
            context: self.totals.context.as_ref(),
        })
    }
}

impl From<Completion> for Message {
    fn from(answer: Completion) -> Self {
        let only_calls = answer.text.is_empty() && !answer.tool_calls.is_empty();
        Self {
            role: "assistant",
            content: (!only_calls).then_some(answer.text),
            refusal: None,
            thought: Thought::new(answer.reasoning),
            tool_calls: answer.tool_calls,
        }
    }
}

/// The chunks of a stream.
pub(crate) struct ChatChunks {
    head: Head,
    choices: Vec<Tokens>,
    totals: Totals,
    include_usage: bool,
}

impl ChatChunks {
    pub(crate) fn new(
        head: Head,
        count: usize,
        texts: &TokenTexts,
        logprobs: bool,
        include_usage: bool,
    ) -> Self {
        let choices = (0..count).map(|_| Tokens::new(texts.clone(), logprobs)).collect();
        Self { head, choices, totals: Totals::default(), include_usage }
    }

    fn one(&self, choice: ChunkChoice) -> String {
        self.document([choice], None)
    }

    /// A piece of an answer, with the log-probabilities of the tokens that have come by now.
    fn piece(&mut self, index: usize, delta: Delta) -> Vec<String> {
        let logprobs = self.choices[index].take();
        vec![self.one(ChunkChoice { index, delta, logprobs, finish_reason: None, stop_reason: None })]
    }

    fn document<const N: usize>(&self, choices: [ChunkChoice; N], totals: Option<&Totals>) -> String {
        chunk(&Document {
            id: &self.head.id,
            object: "chat.completion.chunk",
            created: self.head.created,
            model: &self.head.model,
            // Arrays of any length have no serde form.
            choices: &choices[..],
            usage: totals.map(|totals| totals.usage),
            timings: totals.and_then(|totals| totals.timings),
            context: totals.and_then(|totals| totals.context.as_ref()),
        })
    }
}

impl Chunks for ChatChunks {
    fn begin(&mut self) -> Vec<String> {
        let first = |index| {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()), ..Delta::default() };
            self.one(ChunkChoice { index, delta, logprobs: None, finish_reason: None, stop_reason: None })
        };
        (0..self.choices.len()).map(first).collect()
    }

    fn event(&mut self, index: usize, event: ChoiceEvent) -> Vec<String> {
        let ChoiceEvent::Generated(event) = event else { return Vec::new() };
        match event {
            Event::Context(ContextStep::Report(report)) => self.totals.context = Some(report),
            Event::Token(token) => self.choices[index].push(token),
            Event::Text(TextEvent { text, .. }) => {
                return self.piece(index, Delta { content: Some(text), ..Delta::default() });
            }
            Event::Reasoning(TextEvent { text, .. }) => {
                return self.piece(index, Delta { thought: Thought::new(text), ..Delta::default() });
            }
            Event::ToolCall(call) => {
                return self.piece(index, Delta { tool_calls: Some([call.into()]), ..Delta::default() });
            }
            Event::Done(done) => {
                self.totals.add(&done, index == 0);
                let logprobs = self.choices[index].take_last(&done.finish_reason);
                let (reason, stop_reason) =
                    (finish_reason(&done.finish_reason), StopReason::of(&done.finish_reason));
                let delta = Delta::default();
                return vec![self.one(ChunkChoice {
                    index,
                    delta,
                    logprobs,
                    finish_reason: Some(reason),
                    stop_reason,
                })];
            }
            _ => {}
        }
        Vec::new()
    }

    fn end(&mut self) -> Vec<String> {
        if self.include_usage { vec![self.document([], Some(&self.totals))] } else { Vec::new() }
    }
}
