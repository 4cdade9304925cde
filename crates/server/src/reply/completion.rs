//! `text_completion`, whole and in chunks.

use serde::Serialize;
use serde_json::{Map, Value};
use ternion::{Event, FinishReason, Score, TextEvent, TokenEvent, TokenLogprob, context::ContextStep};

use super::{
    chat::{Document, Head},
    common::{StopReason, Totals, finish_reason, finite},
    sse::{Chunks, chunk},
};
use crate::{
    choices::ChoiceEvent,
    token_text::{TokenTexts, by_id},
};

#[derive(Serialize)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
}

/// The four lists of OpenAI's older API, one entry for each token. The token that ends an answer is among them: harnesses count on
/// one entry more than the prompt has tokens.
#[derive(Debug, Default, Serialize)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f64>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
}

impl Logprobs {
    fn append(&mut self, mut other: Self) {
        self.tokens.append(&mut other.tokens);
        self.token_logprobs.append(&mut other.token_logprobs);
        self.top_logprobs.append(&mut other.top_logprobs);
        self.text_offset.append(&mut other.text_offset);
    }
}

/// What is given back before an answer.
#[derive(Debug, Clone)]
pub(crate) struct Echo {
    pub(crate) text: String,
    /// The prompt's tokens, where they are scored.
    pub(crate) tokens: Vec<u32>,
}

/// How answers are shown.
#[derive(Clone)]
pub(crate) struct Style {
    pub(crate) texts: TokenTexts,
    /// Whether there are log-probabilities.
    pub(crate) logprobs: bool,
    /// Answers to each prompt.
    pub(crate) per_prompt: usize,
    /// For each prompt what is given back; empty without `echo`.
    pub(crate) echo: Vec<Echo>,
}

/// One answer as it comes.
struct Partial {
    style: Style,
    index: usize,
    logprobs: Logprobs,
    /// Tokens whose text has not come yet.
    pending: Vec<TokenEvent>,
    /// Characters of all tokens so far.
    offset: usize,
    echoed: bool,
    scored: bool,
}

impl Partial {
    fn all(style: &Style, count: usize) -> Vec<Self> {
        let one = |index| Self {
            style: style.clone(),
            index,
            logprobs: Logprobs::default(),
            pending: Vec::new(),
            offset: 0,
            echoed: false,
            scored: false,
        };
        (0..count).map(one).collect()
    }

    /// The prompt, the first time that this is called.
    fn echo(&mut self) -> String {
        let echo = self.style.echo.get(self.index / self.style.per_prompt).map(|echo| echo.text.clone());
        if std::mem::replace(&mut self.echoed, true) { String::new() } else { echo.unwrap_or_default() }
    }

    fn score(&mut self, score: &Score) {
        self.first();
        for token in &score.tokens {
            self.entry(token.id, Some(token.logprob), &token.top);
        }
    }

    /// The entry of the prompt's first token: nothing stands before it, so it has no probability.
    fn first(&mut self) {
        let echo = self.style.echo.get(self.index / self.style.per_prompt);
        let first = echo.and_then(|echo| echo.tokens.first().copied());
        if let Some(first) = first.filter(|_| !std::mem::replace(&mut self.scored, true)) {
            self.entry(first, None, &[]);
        }
    }

    /// One entry of the lists.
    fn entry(&mut self, id: u32, logprob: Option<f32>, top: &[TokenLogprob]) {
        let text = self.style.texts.get(id).text;
        let chars = text.chars().count();
        let lists = &mut self.logprobs;
        let top = logprob.map(|own| {
            let mut map = Map::new();
            let all = top.iter().map(|top| (top.id, top.logprob));
            // The token itself is always there, so that a reader sees by the largest whether it is the most probable one.
            let own = std::iter::once((id, own)).filter(|_| top.iter().all(|top| top.id != id));
            for (id, logprob) in all.chain(own) {
                let text = self.style.texts.get(id).text;
                let key = if map.contains_key(&text) { by_id(id) } else { text };
                map.insert(key, finite(logprob).into());
            }
            map
        });
        lists.tokens.push(text);
        lists.token_logprobs.push(logprob.map(finite));
        lists.top_logprobs.push(top);
        lists.text_offset.push(self.offset);
        self.offset += chars;
    }

    fn push(&mut self, token: TokenEvent) {
        if self.style.logprobs {
            self.pending.push(token);
        }
    }

    /// The lists since the last time.
    fn take(&mut self) -> Option<Logprobs> {
        if !self.style.logprobs {
            return None;
        }
        self.first();
        for token in std::mem::take(&mut self.pending) {
            self.entry(token.id, token.logprob, &token.top_logprobs);
        }
        Some(std::mem::take(&mut self.logprobs))
    }

    /// Those at the end. Tokens of a stop string are no part of the answer.
    fn take_last(&mut self, reason: &FinishReason) -> Option<Logprobs> {
        if matches!(reason, FinishReason::StopString(_)) {
            self.pending.clear();
        }
        self.take()
    }
}

/// Puts whole answers together.
pub(crate) struct Collected {
    choices: Vec<(Partial, Choice)>,
    totals: Totals,
}

impl Collected {
    pub(crate) fn new(style: &Style, count: usize) -> Self {
        let empty = |index| Choice {
            index,
            text: String::new(),
            logprobs: style.logprobs.then(Logprobs::default),
            finish_reason: None,
            stop_reason: None,
        };
        let choices =
            Partial::all(style, count).into_iter().enumerate().map(|(i, partial)| (partial, empty(i)));
        Self { choices: choices.collect(), totals: Totals::default() }
    }

    pub(crate) fn event(&mut self, index: usize, event: ChoiceEvent) {
        let (partial, choice) = &mut self.choices[index];
        let mut append = |logprobs: Option<Logprobs>| {
            if let (Some(all), Some(more)) = (&mut choice.logprobs, logprobs) {
                all.append(more);
            }
        };
        match event {
            ChoiceEvent::Scored(score) => partial.score(&score),
            ChoiceEvent::Generated(Event::Context(ContextStep::Report(report))) => {
                self.totals.context = Some(report);
            }
            ChoiceEvent::Generated(Event::Token(token)) => partial.push(token),
            ChoiceEvent::Generated(Event::Text(TextEvent { text, .. })) => {
                append(partial.take());
                choice.text.push_str(&partial.echo());
                choice.text.push_str(&text);
            }
            ChoiceEvent::Generated(Event::Done(done)) => {
                append(partial.take_last(&done.finish_reason));
                choice.text.push_str(&partial.echo());
                self.totals.add(&done, index.is_multiple_of(partial.style.per_prompt));
                choice.finish_reason = Some(finish_reason(&done.finish_reason));
                choice.stop_reason = StopReason::of(&done.finish_reason);
            }
            ChoiceEvent::Generated(_) => {}
        }
    }

    pub(crate) fn into_json(self, head: &Head) -> String {
        chunk(&Document {
            id: &head.id,
            object: "text_completion",
            created: head.created,
            model: &head.model,
            choices: self.choices.into_iter().map(|(_, choice)| choice).collect::<Vec<Choice>>(),
            usage: Some(self.totals.usage),
            timings: self.totals.timings,
            context: self.totals.context.as_ref(),
        })
    }
}

/// The chunks of a stream.
pub(crate) struct CompletionChunks {
    head: Head,
    choices: Vec<Partial>,
    totals: Totals,
    include_usage: bool,
}

impl CompletionChunks {
    pub(crate) fn new(head: Head, style: &Style, count: usize, include_usage: bool) -> Self {
        Self { head, choices: Partial::all(style, count), totals: Totals::default(), include_usage }
    }

    fn document(&self, choices: Vec<Choice>, totals: Option<&Totals>) -> String {
        chunk(&Document {
            id: &self.head.id,
            object: "text_completion",
            created: self.head.created,
            model: &self.head.model,
            choices,
            usage: totals.map(|totals| totals.usage),
            timings: totals.and_then(|totals| totals.timings),
            context: totals.and_then(|totals| totals.context.as_ref()),
        })
    }
}

impl Chunks for CompletionChunks {
    fn begin(&mut self) -> Vec<String> {
        Vec::new()
    }

    fn event(&mut self, index: usize, event: ChoiceEvent) -> Vec<String> {
        let partial = &mut self.choices[index];
        let mut choice =
            Choice { index, text: String::new(), logprobs: None, finish_reason: None, stop_reason: None };
        match event {
            ChoiceEvent::Scored(score) => {
                partial.score(&score);
                return Vec::new();
            }
            ChoiceEvent::Generated(Event::Token(token)) => {
                partial.push(token);
                return Vec::new();
            }
            ChoiceEvent::Generated(Event::Text(TextEvent { text, .. })) => {
                choice.logprobs = partial.take();
                choice.text = partial.echo() + &text;
            }
            ChoiceEvent::Generated(Event::Done(done)) => {
                choice.logprobs = partial.take_last(&done.finish_reason);
                choice.text = partial.echo();
                choice.finish_reason = Some(finish_reason(&done.finish_reason));
                choice.stop_reason = StopReason::of(&done.finish_reason);
                self.totals.add(&done, index.is_multiple_of(partial.style.per_prompt));
            }
            ChoiceEvent::Generated(Event::Context(ContextStep::Report(report))) => {
                self.totals.context = Some(report);
                return Vec::new();
            }
            ChoiceEvent::Generated(_) => return Vec::new(),
        }
        vec![self.document(vec![choice], None)]
    }

    fn end(&mut self) -> Vec<String> {
        if self.include_usage { vec![self.document(Vec::new(), Some(&self.totals))] } else { Vec::new() }
    }
}
