//! What comes back: the stream of events of a generation, and the results of scoring.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_core::Stream;
use serde::{Deserialize, Serialize};

use crate::{
    Content, Error, ErrorKind, Message, ModelInfo, Result, ToolCall,
    context::{ContextReport, ContextStep},
};

/// One event of a generation.
///
/// The order is: any number of [`Prefill`](Self::Prefill), then any number of [`Token`](Self::Token),
/// [`Reasoning`](Self::Reasoning), [`Text`](Self::Text) and [`ToolCall`](Self::ToolCall), then one [`Done`](Self::Done).
/// [`Context`](Self::Context) may stand anywhere among them. The text of all `Text` events together is the answer, so that the
/// shortest loop that prints it is:
///
/// ```no_run
/// # async fn f(mut stream: ternion_core::GenerateStream) -> ternion_core::Result<()> {
/// use ternion_core::Event;
///
/// while let Some(event) = stream.next().await {
///     if let Event::Text(event) = event? {
///         print!("{}", event.text);
///     }
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// A part of the prompt has been computed.
    Prefill(PrefillEvent),
    /// Something is done because the input does not fit into the context.
    Context(ContextStep),
    /// The model chose a token. A backend that does not see tokens sends only `Text`.
    Token(TokenEvent),
    /// A piece of what the model thinks before it answers, without the tags around it. It is no part of the answer.
    Reasoning(TextEvent),
    /// A piece of the answer. It comes when it is certain: not while a character, a possible stop string or a possible
    /// tag is incomplete.
    Text(TextEvent),
    /// A call of a tool begins or goes on.
    ToolCall(ToolCallEvent),
    /// The end.
    Done(DoneEvent),
}

impl Event {
    /// A piece of the answer.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(TextEvent::new(text))
    }

    /// A piece of a thought.
    pub fn reasoning(text: impl Into<String>) -> Self {
        Self::Reasoning(TextEvent::new(text))
    }

    /// Whether this is the first sign of an answer rather than of work on the prompt.
    pub fn is_answer(&self) -> bool {
        matches!(self, Self::Token(_) | Self::Reasoning(_) | Self::Text(_) | Self::ToolCall(_))
    }
}

/// [`Event::Prefill`]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PrefillEvent {
    /// Prompt tokens in the KV cache by now.
    pub done: usize,
    /// Prompt tokens in all.
    pub total: usize,
}

impl PrefillEvent {
    /// `done` of `total` prompt tokens are in the KV cache.
    pub fn new(done: usize, total: usize) -> Self {
        Self { done, total }
    }
}

/// [`Event::Token`]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TokenEvent {
    /// The token's id.
    pub id: u32,
    /// The natural logarithm of its probability under the model, if it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob: Option<f32>,
    /// The most probable tokens at this place, best first, as many as were asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top_logprobs: Vec<TokenLogprob>,
}

impl TokenEvent {
    /// A token without probabilities.
    pub fn new(id: u32) -> Self {
        Self { id, logprob: None, top_logprobs: Vec::new() }
    }

    /// The same token with its log-probability.
    pub fn with_logprob(mut self, logprob: f32) -> Self {
        self.logprob = Some(logprob);
        self
    }

    /// The same token with the most probable tokens at its place, best first.
    pub fn with_top_logprobs(mut self, top: Vec<TokenLogprob>) -> Self {
        self.top_logprobs = top;
        self
    }
}

/// A token and the natural logarithm of its probability.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TokenLogprob {
    /// The token's id.
    pub id: u32,
    /// The natural logarithm of its probability under the model.
    pub logprob: f32,
}

impl TokenLogprob {
    /// A token with its log-probability.
    pub fn new(id: u32, logprob: f32) -> Self {
        Self { id, logprob }
    }
}

/// [`Event::Text`] and [`Event::Reasoning`]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TextEvent {
    /// The next piece. Never empty.
    pub text: String,
}

impl TextEvent {
    /// A piece of text.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into() }
    }
}

/// [`Event::ToolCall`]: the beginning of a call, which has an id and a name, or the next piece of its arguments.
///
/// The pieces of one call come one after the other, and no other call begins before the last of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ToolCallEvent {
    /// The number of the call in this answer, from 0.
    pub index: usize,
    /// Identifies the call in the conversation; `None` but at the beginning. Unique in this process unless it is of a remote
    /// model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The whole name of the function; `None` but at the beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The next piece of the arguments, which are JSON when they are whole. Empty at the beginning.
    #[serde(default)]
    pub arguments: String,
}

impl ToolCallEvent {
    /// The beginning of a call.
    pub fn start(index: usize, id: impl Into<String>, name: impl Into<String>) -> Self {
        Self { index, id: Some(id.into()), name: Some(name.into()), arguments: String::new() }
    }

    /// The next piece of a call's arguments.
    pub fn arguments(index: usize, arguments: impl Into<String>) -> Self {
        Self { index, id: None, name: None, arguments: arguments.into() }
    }
}

/// [`Event::Done`]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DoneEvent {
    /// Why the answer ended.
    pub finish_reason: FinishReason,
    /// Tokens used.
    pub usage: Usage,
    /// Times taken.
    pub timing: Timing,
    /// The seed that the tokens were drawn with; `None` if they were not drawn (greedy).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Which model answered, where several may: behind a fallback or a handle whose model is swapped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub served_by: Option<ServedBy>,
    /// Whether the answer is complete under the constraint of the request. `Some(false)` for an answer that was cut off, by
    /// `max_tokens`, a full context, a stop string or a cancellation. `None` without a constraint, and where it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub constraint_complete: Option<bool>,
}

impl DoneEvent {
    /// The end of an answer, for this reason.
    pub fn new(finish_reason: FinishReason, usage: Usage, timing: Timing) -> Self {
        Self { finish_reason, usage, timing, seed: None, served_by: None, constraint_complete: None }
    }

    /// The same end of an answer whose tokens were drawn with this seed.
    pub fn with_seed(mut self, seed: Option<u64>) -> Self {
        self.seed = seed;
        self
    }

    /// The same end of an answer by this model.
    pub fn with_served_by(mut self, served_by: ServedBy) -> Self {
        self.served_by = Some(served_by);
        self
    }

    /// The same end of an answer with a constraint, which is complete or not.
    pub fn with_constraint_complete(mut self, complete: Option<bool>) -> Self {
        self.constraint_complete = complete;
        self
    }
}

impl From<DoneEvent> for Event {
    fn from(event: DoneEvent) -> Self {
        Self::Done(event)
    }
}

impl From<ToolCallEvent> for Event {
    fn from(event: ToolCallEvent) -> Self {
        Self::ToolCall(event)
    }
}

impl From<TokenEvent> for Event {
    fn from(event: TokenEvent) -> Self {
        Self::Token(event)
    }
}

/// Which model gave an answer. The backend that computes it says so, and wrappers pass it on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ServedBy {
    /// The model's name, as [`ModelInfo::name`].
    pub model: String,
    /// The backend that runs it, as [`ModelInfo::backend`].
    pub backend: String,
}

impl From<&ModelInfo> for ServedBy {
    fn from(info: &ModelInfo) -> Self {
        Self { model: info.name.clone(), backend: info.backend.clone() }
    }
}

impl std::fmt::Display for ServedBy {
    /// `model on backend`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} on {}", self.model, self.backend)
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FinishReason {
    /// The model chose an end-of-sequence token. It is counted in the usage but is no part of the answer. Or the constraint of
    /// the request allows no further token.
    #[default]
    EndOfSequence,
    /// This stop string appeared; it and what follows are no part of the answer.
    StopString(String),
    /// The model chose this token, one of the request's stop tokens. It is counted in the usage but is no part of the answer.
    StopToken(u32),
    /// The model has called tools and waits for their results. It chose an end-of-sequence token, as for
    /// [`EndOfSequence`](Self::EndOfSequence).
    ToolCalls,
    /// `max_tokens` were generated.
    MaxTokens,
    /// Prompt and answer fill the context. Never with a sliding window.
    ContextFull,
    /// The request was cancelled by its token.
    Cancelled,
}

impl FinishReason {
    /// A stable, lower-case name, for logs and metrics, without the stop string or token.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::EndOfSequence => "end_of_sequence",
            Self::StopString(_) => "stop_string",
            Self::StopToken(_) => "stop_token",
            Self::ToolCalls => "tool_calls",
            Self::MaxTokens => "max_tokens",
            Self::ContextFull => "context_full",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Tokens used by one request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that were already in the KV cache.
    pub cached_tokens: usize,
    /// Tokens of the answer, an end-of-sequence or stop token included.
    pub completion_tokens: usize,
    /// Those of them that the model did not choose: the constraint allowed no other, or the thought was over its budget.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub forced_tokens: usize,
    /// Tokens that were drafted and verified.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub drafted_tokens: usize,
    /// Those of them that became part of the answer.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub accepted_tokens: usize,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl Usage {
    /// The counts of a request that took nothing from the KV cache.
    pub fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self { prompt_tokens, completion_tokens, ..Self::default() }
    }

    /// The same counts, with `cached_tokens` of the prompt taken from the KV cache.
    pub fn with_cached_tokens(mut self, cached_tokens: usize) -> Self {
        self.cached_tokens = cached_tokens;
        self
    }

    /// The same counts, with `forced_tokens` of the answer that the model did not choose.
    pub fn with_forced_tokens(mut self, forced_tokens: usize) -> Self {
        self.forced_tokens = forced_tokens;
        self
    }

    /// The same counts, with `drafted` tokens that were drafted, of which `accepted` became part of the answer.
    pub fn with_drafts(mut self, drafted: usize, accepted: usize) -> Self {
        (self.drafted_tokens, self.accepted_tokens) = (drafted, accepted);
        self
    }
}

/// Where the time of one request went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Timing {
    /// What the request has waited for others until its first token: for a sequence, and for its turn among the prompts
    /// that are computed at the same time.
    pub queued: Duration,
    /// The steps that computed the prompt. A step may have computed parts of other prompts as well.
    pub prefill: Duration,
    /// From the first token to the end. That includes what the answer has waited for its reader.
    pub decode: Duration,
    /// From the request to the first generated token; `None` if there was none.
    pub first_token: Option<Duration>,
}

impl Timing {
    /// The three phases of a request that generated no token.
    pub fn new(queued: Duration, prefill: Duration, decode: Duration) -> Self {
        Self { queued, prefill, decode, first_token: None }
    }

    /// The same times, with the first token after `first_token`, counted from the request.
    pub fn with_first_token(mut self, first_token: Duration) -> Self {
        self.first_token = Some(first_token);
        self
    }

    /// Computed prompt tokens per second; `None` when none were computed.
    pub fn prefill_rate(&self, usage: &Usage) -> Option<f64> {
        rate(usage.prompt_tokens.saturating_sub(usage.cached_tokens), self.prefill)
    }

    /// Generated tokens per second. The first token comes out of prefill, so it is not counted; `None` below two.
    pub fn decode_rate(&self, usage: &Usage) -> Option<f64> {
        rate(usage.completion_tokens.saturating_sub(1), self.decode)
    }
}

fn rate(count: usize, time: Duration) -> Option<f64> {
    (count > 0 && !time.is_zero()).then(|| count as f64 / time.as_secs_f64())
}

/// The events of one generation. Dropping it cancels the generation and frees its sequence.
///
/// Ends after [`Event::Done`] or after an error. It is a [`Stream`], and [`next`](Self::next) and
/// [`collect`](Self::collect) work without any helper crate.
pub struct GenerateStream {
    inner: Pin<Box<dyn Stream<Item = Result<Event>> + Send>>,
}

impl GenerateStream {
    /// A stream of `events`, which must end with `Done` or an error and must cancel when dropped.
    pub fn new(events: impl Stream<Item = Result<Event>> + Send + 'static) -> Self {
        Self { inner: Box::pin(events) }
    }

    /// A stream of events that are known already, for backends without work to do and for tests.
    pub fn from_events<I>(events: I) -> Self
    where
        I: IntoIterator<Item = Result<Event>>,
        I::IntoIter: Send + 'static,
    {
        Self::new(futures_util::stream::iter(events))
    }

    /// The next event; `None` after the end. Cancel-safe: no event is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<Result<Event>> {
        std::future::poll_fn(|cx| self.inner.as_mut().poll_next(cx)).await
    }

    /// Just the text of the answer, piece by piece. What else happens is left out, but for errors.
    pub fn text(self) -> TextStream {
        TextStream { events: self }
    }

    /// Waits for the end and puts the answer together.
    ///
    /// # Errors
    /// The first error of the stream; [`ErrorKind::Closed`] if it ends without `Done`.
    pub async fn collect(mut self) -> Result<Completion> {
        let mut completion = Completion::default();
        while let Some(event) = self.next().await {
            if completion.add(event?) {
                return Ok(completion);
            }
        }
        Err(Error::new(ErrorKind::Closed, "the backend stopped before the answer ended")
            .with_operation("generate"))
    }
}

impl Stream for GenerateStream {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inner.as_mut().poll_next(cx)
    }
}

impl std::fmt::Debug for GenerateStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GenerateStream")
    }
}

/// The text of an answer, as [`GenerateStream::text`] returns it. Dropping it cancels the generation.
#[derive(Debug)]
pub struct TextStream {
    events: GenerateStream,
}

impl TextStream {
    /// The next piece of the answer; `None` after the end. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<String>> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }
}

impl Stream for TextStream {
    type Item = Result<String>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            match ready!(Pin::new(&mut self.events).poll_next(cx)) {
                Some(Ok(Event::Text(event))) => return Poll::Ready(Some(Ok(event.text))),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
    }
}

/// A whole answer, as [`GenerateStream::collect`] returns it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Completion {
    /// The text, without stop strings, end-of-sequence tokens, thoughts and calls.
    pub text: String,
    /// What the model thought before it answered, without the tags around it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// The calls of tools. Arguments need not be valid JSON: an answer may end within a call, and what a model writes without a
    /// grammar may be anything.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// The token ids, an end-of-sequence or stop token included.
    pub tokens: Vec<u32>,
    /// The log-probability of each token, if they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub logprobs: Vec<f32>,
    /// The most probable tokens at the place of each token, if they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub top_logprobs: Vec<Vec<TokenLogprob>>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens used.
    pub usage: Usage,
    /// Times taken.
    pub timing: Timing,
    /// The seed that the tokens were drawn with.
    pub seed: Option<u64>,
    /// What was done to fit the input into the context; `None` where it fitted.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub context: Option<ContextReport>,
    /// Which model answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub served_by: Option<ServedBy>,
    /// Whether the answer is complete under the constraint of the request; see [`DoneEvent::constraint_complete`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub constraint_complete: Option<bool>,
}

impl Completion {
    /// Adds the next event of its stream; `true` if that was the last one.
    pub fn add(&mut self, event: Event) -> bool {
        match event {
            Event::Context(ContextStep::Report(report)) => self.context = Some(report),
            Event::Prefill(_) | Event::Context(_) => {}
            Event::Token(token) => {
                self.tokens.push(token.id);
                self.logprobs.extend(token.logprob);
                if !token.top_logprobs.is_empty() {
                    self.top_logprobs.push(token.top_logprobs);
                }
            }
            Event::Reasoning(thought) => self.reasoning.push_str(&thought.text),
            Event::Text(text) => self.text.push_str(&text.text),
            Event::ToolCall(call) => self.add_call(call),
            Event::Done(done) => {
                (self.finish_reason, self.usage, self.timing) = (done.finish_reason, done.usage, done.timing);
                (self.seed, self.served_by) = (done.seed, done.served_by);
                self.constraint_complete = done.constraint_complete;
                return true;
            }
        }
        false
    }

    fn add_call(&mut self, event: ToolCallEvent) {
        match (event.name, self.tool_calls.get_mut(event.index)) {
            (None, Some(call)) => call.arguments.push_str(&event.arguments),
            (Some(name), _) => {
                let mut call = ToolCall::new(event.id.unwrap_or_default(), name, event.arguments);
                call.id = call.id.filter(|id| !id.is_empty());
                self.tool_calls.push(call);
            }
            (None, None) => {}
        }
    }
}

impl From<Completion> for Message {
    /// The answer as a message of the assistant, for the next request of the conversation.
    fn from(completion: Completion) -> Self {
        let content = match completion.text {
            text if text.is_empty() && !completion.tool_calls.is_empty() => Content::Null,
            text => text.into(),
        };
        let mut message = Self::assistant(content).with_tool_calls(completion.tool_calls);
        message.reasoning = Some(completion.reasoning).filter(|reasoning| !reasoning.is_empty());
        message
    }
}

/// The scores of a [`ScoreRequest`](crate::ScoreRequest), one for each token from `start` on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Score {
    /// In the order of the tokens.
    pub tokens: Vec<TokenScore>,
    /// Which model gave them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub served_by: Option<ServedBy>,
}

impl Score {
    /// The scores in this order.
    pub fn new(tokens: Vec<TokenScore>) -> Self {
        Self { tokens, served_by: None }
    }

    /// The log-probability of all the scored tokens together.
    pub fn total(&self) -> f64 {
        self.tokens.iter().map(|t| f64::from(t.logprob)).sum()
    }
}

/// How probable the model finds one token, given those before it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TokenScore {
    /// The token.
    pub id: u32,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// How many tokens are more probable; 0 means that greedy decoding would choose it.
    pub rank: usize,
    /// The most probable tokens at this place, best first, as many as were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub top: Vec<TokenLogprob>,
}

impl TokenScore {
    /// The score of one token, without the most probable ones.
    pub fn new(id: u32, logprob: f32, rank: usize) -> Self {
        Self { id, logprob, rank, top: Vec::new() }
    }

    /// The same score with the most probable tokens, best first.
    pub fn with_top(mut self, top: Vec<TokenLogprob>) -> Self {
        self.top = top;
        self
    }
}
