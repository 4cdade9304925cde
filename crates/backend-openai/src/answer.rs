//! From the chunks of a response to the events of an answer: tokens, text up to a stop string, the end.

use std::time::{Duration, Instant};

use ternion_core::{
    DoneEvent, Error, Event, FinishReason, PrefillEvent, Result, ServedBy, Timing, TokenEvent, Usage,
    answer::AnswerParser,
    text::{IncrementalDecoder, StopMatcher},
};

use crate::{
    calls::Calls,
    constraint::Kept,
    wire::{Choice, Chunk, Delta, Seen, best},
};

/// What is known of a request before its answer begins.
pub(crate) struct Question {
    pub(crate) accepted: Instant,
    /// Tokens of the prompt, where they are known.
    pub(crate) prompt_tokens: Option<usize>,
    pub(crate) max_tokens: Option<usize>,
    /// 0: not known.
    pub(crate) context_length: usize,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) ignore_eos: bool,
    pub(crate) end_tokens: Vec<u32>,
    pub(crate) logprobs: bool,
    pub(crate) top_logprobs: usize,
    /// Where the text is made of the tokens on this side.
    pub(crate) decoder: Option<IncrementalDecoder>,
    /// Tells thoughts and calls from text, where the server does not.
    pub(crate) parser: AnswerParser,
    /// What the answer must look like.
    pub(crate) kept: Option<Kept>,
    pub(crate) seed: Option<u64>,
    /// Whether the server's count of cached tokens is reported: without the capability there are none.
    pub(crate) prefix_reuse: bool,
    pub(crate) served_by: ServedBy,
}

/// An answer that is being received.
pub(crate) struct Answer {
    question: Question,
    stop: StopMatcher,
    /// When the request was sent.
    sent: Option<Instant>,
    first_token: Option<Instant>,
    /// Tokens whose ids have come.
    seen: usize,
    usage: Usage,
    /// Whether the server counts.
    counted: bool,
    /// Special tokens whose names are text to the parser.
    tags: Vec<String>,
    /// The stop strings within a thought that the server tells from the text.
    stop_in_thought: StopMatcher,
    calls: Calls,
    finish: Option<FinishReason>,
    /// The error of an answer that the server calls complete and that breaks its constraint.
    broken: Option<Error>,
}

impl Answer {
    pub(crate) fn new(mut question: Question) -> Self {
        let stops = std::mem::take(&mut question.stop);
        let tags = question.parser.tags();
        let usage = Usage::new(question.prompt_tokens.unwrap_or(0), 0);
        Self {
            question,
            stop: StopMatcher::new(stops.clone()),
            sent: None,
            first_token: None,
            seen: 0,
            usage,
            counted: false,
            tags,
            stop_in_thought: StopMatcher::new(stops),
            calls: Calls::default(),
            finish: None,
            broken: None,
        }
    }

    pub(crate) fn sent_now(&mut self) {
        self.sent = Some(Instant::now());
    }

    /// Whether the end is certain, without what the server may still send.
    pub(crate) fn ended_here(&self) -> bool {
        self.finish
            .as_ref()
            .is_some_and(|finish| matches!(finish, FinishReason::StopString(_) | FinishReason::StopToken(_)))
    }

    /// Takes a chunk; adds what it means to `events`.
    ///
    /// # Errors
    /// [`Backend`](ternion_core::ErrorKind::Backend) for an end that is none of an answer.
    pub(crate) fn chunk(&mut self, chunk: &Chunk, events: &mut Vec<Event>) -> Result<()> {
        if let Some(timings) = chunk.timings {
            if let Some(computed) = timings.prompt_n {
                let cached = timings.cache_n.unwrap_or(0);
                self.usage.prompt_tokens = computed + cached;
                self.usage.cached_tokens = cached;
            }
            self.usage.completion_tokens = timings.predicted_n.unwrap_or(self.usage.completion_tokens);
            self.counted = true;
        }
        if let Some(usage) = chunk.usage {
            self.usage.prompt_tokens = usage.prompt_tokens.unwrap_or(self.usage.prompt_tokens);
            self.usage.completion_tokens = usage.completion_tokens.unwrap_or(self.usage.completion_tokens);
            if let Some(cached) = usage.prompt_tokens_details.and_then(|details| details.cached_tokens) {
                self.usage.cached_tokens = cached;
            }
            self.counted = true;
        }
        for choice in chunk.choices.iter().flatten().filter(|choice| choice.index.unwrap_or(0) == 0) {
            self.choice(choice, events)?;
        }
        Ok(())
    }

    fn choice(&mut self, choice: &Choice, events: &mut Vec<Event>) -> Result<()> {
        let mut end = None;
        let mut alone = false;
        if let Some(seen) = choice.tokens().filter(|_| self.finish.is_none()) {
            alone = seen.len() == 1;
            for token in seen {
                end = self.token(token, events)?;
                if end.is_some() || self.finish.is_some() {
                    break;
                }
            }
        }
        // The text of a stop token is no part of the answer. Where it comes with that of other tokens it cannot be told apart.
        let stopped = alone && matches!(end, Some(FinishReason::StopToken(_)));
        if self.question.decoder.is_none() && !stopped {
            if let Some(text) = &choice.text {
                self.text(text, events);
            }
            if let Some(delta) = &choice.delta {
                self.delta(delta, events)?;
            }
        }
        self.finish = self.finish.take().or(end);
        if let Some(reason) = choice.finish_reason.as_deref().filter(|_| self.finish.is_none()) {
            self.finish = Some(self.reason(reason)?);
        }
        Ok(())
    }

    /// Takes a token; returns the end of the answer if it is one that ends it.
    fn token(&mut self, seen: Seen, events: &mut Vec<Event>) -> Result<Option<FinishReason>> {
        self.begin(events);
        self.seen += 1;
        let mut token = TokenEvent::new(seen.id);
        if self.question.logprobs {
            token.logprob = seen.logprob;
            token.top_logprobs = best(seen.top, self.question.top_logprobs);
        }
        events.push(token.into());
        let question = &mut self.question;
        if !question.ignore_eos && question.end_tokens.contains(&seen.id) {
            return Ok(Some(FinishReason::EndOfSequence));
        }
        if question.stop_tokens.contains(&seen.id) {
            return Ok(Some(FinishReason::StopToken(seen.id)));
        }
        if let Some(decoder) = &mut question.decoder {
            let wants_names = self.stop.has_stops() || !self.tags.is_empty();
            let name = if wants_names { decoder.special_name(seen.id) } else { None };
            let found = match name {
                Some(name) if self.tags.contains(&name) => self.stop.push(&name),
                Some(name) => self.stop.push_hidden(&name),
                None => self.stop.push(&decoder.push(seen.id)?),
            };
            self.found(found, events);
        }
        Ok(None)
    }

    fn text(&mut self, text: &str, events: &mut Vec<Event>) {
        if text.is_empty() || self.finish.is_some() {
            return;
        }
        self.begin(events);
        let found = self.stop.push(text);
        self.found(found, events);
    }

    fn found(&mut self, (text, stop): (String, Option<String>), events: &mut Vec<Event>) {
        let told = self.question.parser.push(&text);
        self.tell(told, events);
        if let Some(stop) = stop {
            self.finish = Some(FinishReason::StopString(stop));
        }
    }

    fn tell(&mut self, told: Vec<Event>, events: &mut Vec<Event>) {
        if let Some(kept) = &mut self.question.kept {
            for event in &told {
                if let Event::Text(text) = event {
                    kept.push(&text.text);
                }
            }
        }
        events.extend(told);
    }

    fn thought(&mut self, text: &str, events: &mut Vec<Event>) {
        if text.is_empty() || self.finish.is_some() {
            return;
        }
        self.begin(events);
        let (certain, stop) = self.stop_in_thought.push(text);
        events.extend(Some(certain).filter(|text| !text.is_empty()).map(Event::reasoning));
        self.finish = stop.map(FinishReason::StopString);
    }

    /// What was held back of a thought, at its end.
    fn end_thought(&mut self, events: &mut Vec<Event>) {
        let held = self.stop_in_thought.finish();
        events.extend(Some(held).filter(|text| !text.is_empty()).map(Event::reasoning));
    }

    fn delta(&mut self, delta: &Delta, events: &mut Vec<Event>) -> Result<()> {
        if let Some(thought) = delta.reasoning() {
            self.thought(thought, events);
        }
        let content = delta.content();
        let said = [content.as_str(), delta.refusal.as_deref().unwrap_or_default()].concat();
        if !said.is_empty() {
            self.end_thought(events);
            self.text(&said, events);
        }
        if delta.calls() && self.finish.is_none() {
            self.end_thought(events);
            self.begin(events);
            self.calls.push(delta, events)?;
        }
        Ok(())
    }

    /// The first sign of an answer.
    fn begin(&mut self, events: &mut Vec<Event>) {
        if self.first_token.is_none() {
            self.first_token = Some(Instant::now());
            if let Some(total) = self.question.prompt_tokens {
                events.push(Event::Prefill(PrefillEvent::new(total, total)));
            }
        }
    }

    fn reason(&self, reason: &str) -> Result<FinishReason> {
        match reason {
            "stop" | "tool_calls" | "function_call" | "eos" | "end_turn" => Ok(FinishReason::EndOfSequence),
            "length" => {
                let answered = self.seen.max(self.usage.completion_tokens);
                let together = self.usage.prompt_tokens + answered;
                let context = self.question.context_length;
                let asked_for = self.question.max_tokens.is_some_and(|most| answered >= most);
                let full = !asked_for
                    && (self.question.max_tokens.is_none() || (context > 0 && together >= context));
                Ok(if full { FinishReason::ContextFull } else { FinishReason::MaxTokens })
            }
            other => Err(Error::backend(format!("the server ended the answer before its end, as `{other}`"))),
        }
    }

    /// The end after `[DONE]`, or where a stop string or token was found.
    ///
    /// # Errors
    /// [`Backend`](ternion_core::ErrorKind::Backend) for a stream that never said why it ends.
    pub(crate) fn end(&mut self, events: &mut Vec<Event>) -> Result<Usage> {
        let Some(finish) = self.finish.take() else {
            return Err(Error::backend("the stream ended without a `finish_reason`"));
        };
        if !matches!(finish, FinishReason::StopString(_) | FinishReason::StopToken(_)) {
            self.calls.finish(events)?;
        }
        let usage = self.done(finish, events);
        match self.broken.take() {
            Some(error) => {
                // An error stands instead of the last event.
                events.pop();
                Err(error)
            }
            None => Ok(usage),
        }
    }

    /// The end of an answer that its request cancelled.
    pub(crate) fn cancelled(&mut self, events: &mut Vec<Event>) -> Usage {
        self.done(FinishReason::Cancelled, events)
    }

    fn done(&mut self, mut finish: FinishReason, events: &mut Vec<Event>) -> Usage {
        if !matches!(finish, FinishReason::StopString(_)) {
            self.end_thought(events);
            let rest = self.question.decoder.as_mut().and_then(|decoder| decoder.finish().ok());
            let (text, stop) = self.stop.push(&rest.unwrap_or_default());
            let text = if stop.is_none() { text + &self.stop.finish() } else { text };
            let told = self.question.parser.push(&text);
            self.tell(told, events);
        }
        let told = self.question.parser.finish();
        self.tell(told, events);
        let called = !self.calls.is_empty() || self.question.parser.calls() > 0;
        if finish == FinishReason::EndOfSequence && called {
            finish = FinishReason::ToolCalls;
        }
        let complete = match self.question.kept.as_ref().map(|kept| kept.complete(&finish)) {
            Some(Err(error)) => {
                self.broken = Some(error);
                None
            }
            complete => complete.transpose().ok().flatten(),
        };
        // What was seen is what the reader counts; the server may have gone on past a stop string.
        if self.seen > 0 {
            self.usage.completion_tokens = self.seen;
        } else if self.first_token.is_none() && !self.counted {
            self.usage.completion_tokens = 0;
        }
        if !self.question.prefix_reuse {
            self.usage.cached_tokens = 0;
        }
        let now = Instant::now();
        let sent = self.sent.unwrap_or(now);
        let queued = sent.saturating_duration_since(self.question.accepted);
        let first = self.first_token.unwrap_or(now);
        let prefill = first.saturating_duration_since(sent);
        let decode = self.first_token.map_or(Duration::ZERO, |first| now.saturating_duration_since(first));
        let mut timing = Timing::new(queued, prefill, decode);
        timing.first_token =
            self.first_token.map(|first| first.saturating_duration_since(self.question.accepted));
        let done = DoneEvent::new(finish, self.usage, timing)
            .with_seed(self.question.seed)
            .with_constraint_complete(complete)
            .with_served_by(self.question.served_by.clone());
        events.push(done.into());
        self.usage
    }
}
