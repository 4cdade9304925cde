//! `echo`: a backend without a model, for the tests of hosts.
//!
//! It answers a conversation with its last user message, word by word, and is held to the same contract as the real
//! ones: the same checks of requests, the same events, cancellation, stop strings and limits. Delays and failures can be
//! configured, so that a host can test how it behaves when a model is slow or breaks. With `tool_format` and `reasoning` in the
//! model's configuration, a reply in that form becomes thoughts and calls of tools.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures_core::Stream;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::{
    DoneEvent, Error, ErrorKind, Event, FinishReason, GenerateRequest, GenerateStream, LlmBackend, ModelInfo,
    PrefillEvent, Prompt, Result, ResultExt, Score, ScoreRequest, ServedBy, Stats, Timing, TokenEvent, Usage,
    answer::{AnswerFormat, AnswerParser, Thought, ToolFormat},
    config::ModelConfig,
    registry::{BackendFactory, Progress},
    text::StopMatcher,
    validate,
};

/// The table `options` of a model that runs on the backend `echo`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct EchoOptions {
    /// Milliseconds before each word. With any, the stream must be read in a tokio runtime with its timer enabled;
    /// elsewhere it panics.
    pub delay_ms: u64,
    /// Answer this to everything.
    pub reply: Option<String>,
    /// Fail with an error of this kind.
    pub fail: Option<ErrorKind>,
    /// Fail in the stream after so many words. Left out: when the request is made.
    pub fail_after: Option<usize>,
}

/// Makes [`Echo`]s for the backend `echo`.
#[derive(Debug, Clone, Copy, Default)]
pub struct EchoFactory;

#[async_trait]
impl BackendFactory for EchoFactory {
    fn name(&self) -> &'static str {
        "echo"
    }

    fn description(&self) -> &'static str {
        "no model: repeats what it is told, for tests"
    }

    fn options_schema(&self) -> Option<serde_json::Value> {
        Some(schemars::schema_for!(EchoOptions).to_value())
    }

    async fn load(
        &self,
        name: &str,
        config: &ModelConfig,
        _progress: Progress,
    ) -> Result<Arc<dyn LlmBackend>> {
        let mut echo = Echo::new(name, config.parse_options()?);
        echo.answers = echo.answers.configured(config.tool_format, config.reasoning.as_ref());
        echo.info.capabilities.tool_calls = echo.answers.tools != ToolFormat::None;
        echo.info.capabilities.reasoning = echo.answers.reasoning.is_some();
        let limits = &mut echo.info.limits;
        limits.context_length = config.context_length.unwrap_or(limits.context_length);
        limits.max_sequences = config.max_sequences.unwrap_or(limits.max_sequences);
        limits.max_queued = config.max_queued.unwrap_or(limits.max_queued);
        Ok(Arc::new(echo))
    }
}

/// A backend that repeats what it is told. A word with the white space before it counts as a token.
#[derive(Debug)]
pub struct Echo {
    info: ModelInfo,
    options: EchoOptions,
    answers: AnswerFormat,
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    active: AtomicUsize,
    finished: AtomicU64,
    prompt_tokens: AtomicU64,
    completion_tokens: AtomicU64,
}

impl Echo {
    /// An echo called `name` with a context of 4096 words.
    pub fn new(name: &str, options: EchoOptions) -> Self {
        let mut info = ModelInfo::new(name, "echo");
        "echo".clone_into(&mut info.architecture);
        "none".clone_into(&mut info.format);
        info.limits.context_length = 4096;
        info.limits.max_sequences = 4;
        info.limits.max_queued = 64;
        info.capabilities.generate = true;
        info.capabilities.chat = true;
        info.capabilities.seed = true;
        info.capabilities.batch_invariant = true;
        Self { info, options, answers: AnswerFormat::default(), counters: Arc::default() }
    }

    /// Checks a request; returns how many words its prompt has.
    fn check(&self, request: &GenerateRequest) -> Result<usize> {
        validate::generate(&request.params, &self.info)?;
        if request.params.logprobs {
            return Err(Error::unsupported("logprobs: the backend `echo` has no probabilities"));
        }
        if !request.params.stop_tokens.is_empty() {
            return Err(Error::unsupported("stop_tokens: the backend `echo` has no tokens"));
        }
        validate::not_empty(&request.params.prompt)?;
        let prompt = match &request.params.prompt {
            Prompt::Text(_) | Prompt::Segments(_) => {
                words(&request.params.prompt.text().unwrap_or_default()).count()
            }
            Prompt::Tokens(_) => {
                return Err(Error::unsupported(
                    "prompt: the backend `echo` has no tokens; text or a chat expected",
                ));
            }
            Prompt::Chat(messages) => messages.iter().map(|m| words(&m.content.text()).count()).sum(),
        };
        validate::prompt_fits(prompt, self.info.limits.context_length)?;
        Ok(prompt)
    }

    fn start(&self, request: GenerateRequest) -> Result<EchoStream> {
        let accepted = Instant::now();
        let prompt = self.check(&request)?;
        if request.params.reasoning_budget.is_some() {
            return Err(Error::unsupported("reasoning_budget: the backend `echo` has no tokens of thought"));
        }
        let parser = match &request.params.prompt {
            Prompt::Chat(_) => {
                let tools = request.params.chat.offered_tools();
                AnswerParser::new(&self.answers, tools, Thought::Possible)
            }
            _ => AnswerParser::plain(),
        };
        let last = match request.params.prompt {
            Prompt::Chat(messages) => {
                let last = messages.into_iter().rfind(|m| m.role == "user");
                last.map(|m| m.content.into_text()).unwrap_or_default()
            }
            prompt => prompt.text().unwrap_or_default().into_owned(),
        };
        let fail = self
            .options
            .fail
            .map(|kind| Error::new(kind, "configured to fail").with("model", &self.info.name));
        let (fail_now, fail_later) = match self.options.fail_after {
            None => (fail, None),
            Some(after) => (None, fail.map(|error| (after, error))),
        };
        if let Some(error) = fail_now {
            return Err(error);
        }
        let place = Place::take(&self.counters, &self.info)?;
        self.counters.prompt_tokens.fetch_add(prompt as u64, Ordering::Relaxed);
        let reply = self.options.reply.as_deref().unwrap_or(&last);
        Ok(EchoStream {
            pieces: words(reply).map(str::to_owned).collect::<Vec<_>>().into_iter(),
            stop: StopMatcher::new(request.params.stop),
            parser,
            room: self.info.limits.context_length - prompt,
            max_tokens: request.params.max_tokens.unwrap_or(usize::MAX),
            delay: Duration::from_millis(self.options.delay_ms),
            sleep: None,
            cancelled: Box::pin(request.cancel.cancelled_owned()),
            fail: fail_later,
            accepted,
            first_token: None,
            usage: Usage { prompt_tokens: prompt, ..Usage::default() },
            announced: false,
            events: VecDeque::new(),
            finish_reason: None,
            place: Some(place),
            served_by: ServedBy::from(&self.info),
        })
    }
}

#[async_trait]
impl LlmBackend for Echo {
    fn info(&self) -> Arc<ModelInfo> {
        Arc::new(self.info.clone())
    }

    fn stats(&self) -> Stats {
        Stats {
            active: self.counters.active.load(Ordering::Acquire),
            finished: self.counters.finished.load(Ordering::Relaxed),
            prompt_tokens: self.counters.prompt_tokens.load(Ordering::Relaxed),
            completion_tokens: self.counters.completion_tokens.load(Ordering::Relaxed),
            ..Stats::default()
        }
    }

    async fn validate(&self, request: &GenerateRequest) -> Result<()> {
        self.check(request).map(drop).with_operation("generate")
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        self.start(request).map(GenerateStream::new).with_operation("generate")
    }

    async fn score(&self, _request: ScoreRequest) -> Result<Score> {
        Err(Error::unsupported("the backend `echo` has no probabilities").with_operation("score"))
    }
}

/// Each word with the white space before it; what stands after the last word belongs to it.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let start = rest.find(|c: char| !c.is_whitespace())?;
        let end = rest[start..].find(char::is_whitespace).map_or(rest.len(), |n| start + n);
        let end = if rest[end..].trim().is_empty() { rest.len() } else { end };
        let (word, tail) = rest.split_at(end);
        rest = tail;
        Some(word)
    })
}

/// One of the requests that are accepted at the same time.
struct Place(Arc<Counters>);

impl Place {
    fn take(counters: &Arc<Counters>, info: &ModelInfo) -> Result<Self> {
        let room = info.limits.max_sequences.saturating_add(info.limits.max_queued);
        counters
            .active
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < room).then_some(n + 1))
            .map(|_| Self(Arc::clone(counters)))
            .map_err(|_| Error::new(ErrorKind::Busy, format!("all {room} places are taken; try again later")))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::AcqRel);
        self.0.finished.fetch_add(1, Ordering::Relaxed);
    }
}

struct EchoStream {
    pieces: std::vec::IntoIter<String>,
    stop: StopMatcher,
    parser: AnswerParser,
    /// Words that the context still holds.
    room: usize,
    max_tokens: usize,
    delay: Duration,
    sleep: Option<Pin<Box<tokio::time::Sleep>>>,
    cancelled: Pin<Box<WaitForCancellationFutureOwned>>,
    fail: Option<(usize, Error)>,
    accepted: Instant,
    first_token: Option<Duration>,
    usage: Usage,
    announced: bool,
    /// What is certain and is sent next.
    events: VecDeque<Event>,
    /// Set by the word that ended the answer.
    finish_reason: Option<FinishReason>,
    /// `None` after the end of the work.
    place: Option<Place>,
    served_by: ServedBy,
}

impl EchoStream {
    /// The end of the answer: the text that was held back, if there is any, then the last event.
    fn end(&mut self, mut finish_reason: FinishReason) -> Option<Event> {
        self.place = None;
        if !matches!(finish_reason, FinishReason::StopString(_)) {
            let held = self.stop.finish();
            self.events.extend(self.parser.push(&held));
        }
        self.events.extend(self.parser.finish());
        if finish_reason == FinishReason::EndOfSequence && self.parser.calls() > 0 {
            finish_reason = FinishReason::ToolCalls;
        }
        let decode =
            self.first_token.map_or(Duration::ZERO, |first| self.accepted.elapsed().saturating_sub(first));
        let timing = Timing { decode, first_token: self.first_token, ..Timing::default() };
        let done = DoneEvent::new(finish_reason, self.usage, timing).with_served_by(self.served_by.clone());
        self.events.push_back(done.into());
        self.events.pop_front()
    }

    /// The event of a word. Its text, if any is certain, comes after it.
    fn token(&mut self, piece: &str) -> Event {
        let id = self.usage.completion_tokens as u32;
        self.usage.completion_tokens += 1;
        if let Some(place) = &self.place {
            place.0.completion_tokens.fetch_add(1, Ordering::Relaxed);
        }
        self.first_token.get_or_insert_with(|| self.accepted.elapsed());
        let (text, stop) = self.stop.push(piece);
        self.finish_reason = if let Some(stop) = stop {
            Some(FinishReason::StopString(stop))
        } else if self.usage.completion_tokens >= self.max_tokens {
            Some(FinishReason::MaxTokens)
        } else if self.usage.completion_tokens >= self.room {
            Some(FinishReason::ContextFull)
        } else {
            None
        };
        self.events.extend(self.parser.push(&text));
        TokenEvent::new(id).into()
    }
}

impl Stream for EchoStream {
    type Item = Result<Event>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if let Some(event) = this.events.pop_front() {
            return Poll::Ready(Some(Ok(event)));
        }
        if this.place.is_none() {
            return Poll::Ready(None);
        }
        if let Some(reason) = this.finish_reason.take() {
            return Poll::Ready(this.end(reason).map(Ok));
        }
        if this.cancelled.as_mut().poll(cx).is_ready() {
            return Poll::Ready(this.end(FinishReason::Cancelled).map(Ok));
        }
        if !this.announced {
            this.announced = true;
            let total = this.usage.prompt_tokens;
            return Poll::Ready(Some(Ok(Event::Prefill(PrefillEvent::new(total, total)))));
        }
        if let Some((_, error)) = this.fail.take_if(|(after, _)| *after <= this.usage.completion_tokens) {
            this.place = None;
            return Poll::Ready(Some(Err(error.with_operation("generate"))));
        }
        if this.pieces.as_slice().is_empty() {
            return Poll::Ready(this.end(FinishReason::EndOfSequence).map(Ok));
        }
        if !this.delay.is_zero() {
            let sleep = this.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(this.delay)));
            ready!(sleep.as_mut().poll(cx));
            this.sleep = None;
        }
        let piece = this.pieces.next().unwrap_or_default();
        Poll::Ready(Some(Ok(this.token(&piece))))
    }
}
