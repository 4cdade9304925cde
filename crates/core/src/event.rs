//! What comes back: the stream of events of a generation, and the results of scoring.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures_core::Stream;
use serde::{Deserialize, Serialize};

use crate::{
    Error, ErrorKind, ModelInfo, Result,
    context::{ContextReport, ContextStep},
};

/// One event of a generation. Any number of `Prefill`, any number of `Token`, one `Done`. Where the input did not fit, any
/// number of `Context` among them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// A part of the prompt has been computed.
    Prefill {
        /// Prompt tokens in the KV cache by now.
        done: usize,
        /// Prompt tokens in all.
        total: usize,
    },
    /// Something is done because the input does not fit into the context.
    Context {
        /// What.
        step: ContextStep,
    },
    /// The model chose a token.
    Token {
        /// Its id.
        id: u32,
        /// The text that is certain by now. Empty while a character or a possible stop string is incomplete; the
        /// pieces of all tokens together are the answer.
        text: String,
        /// The natural logarithm of its probability under the model, if it was asked for.
        #[serde(skip_serializing_if = "Option::is_none")]
        logprob: Option<f32>,
    },
    /// The end.
    Done {
        /// Why.
        finish_reason: FinishReason,
        /// Text that was held back and is certain now.
        text: String,
        /// Tokens used.
        usage: Usage,
        /// Times taken.
        timing: Timing,
        /// The seed that the tokens were drawn with; `None` if they were not drawn (greedy).
        #[serde(skip_serializing_if = "Option::is_none")]
        seed: Option<u64>,
        /// Which model answered, where several may: behind a fallback or a handle whose model is swapped.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        served_by: Option<ServedBy>,
    },
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FinishReason {
    /// The model chose an end-of-sequence token. It is counted in the usage but is no part of the answer.
    EndOfSequence,
    /// This stop string appeared; it and what follows are no part of the answer.
    StopString(String),
    /// The model chose this token, one of the request's stop tokens. It is counted in the usage but is no part of the answer.
    StopToken(u32),
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
    /// Tokens generated, an end-of-sequence or stop token included.
    pub generated_tokens: usize,
}

impl Usage {
    /// The counts of a request that took nothing from the KV cache.
    pub fn new(prompt_tokens: usize, generated_tokens: usize) -> Self {
        Self { prompt_tokens, cached_tokens: 0, generated_tokens }
    }

    /// The same counts, with `cached_tokens` of the prompt taken from the KV cache.
    pub fn with_cached_tokens(mut self, cached_tokens: usize) -> Self {
        self.cached_tokens = cached_tokens;
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
        rate(usage.generated_tokens.saturating_sub(1), self.decode)
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

    /// The next event; `None` after the end. Cancel-safe: no event is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<Result<Event>> {
        std::future::poll_fn(|cx| self.inner.as_mut().poll_next(cx)).await
    }

    /// Waits for the end and puts the answer together.
    ///
    /// # Errors
    /// The first error of the stream; [`ErrorKind::Closed`] if it ends without `Done`.
    pub async fn collect(mut self) -> Result<Completion> {
        let mut answer = String::new();
        let mut tokens = Vec::new();
        let mut logprobs = Vec::new();
        let mut context = None;
        while let Some(event) = self.next().await {
            match event? {
                Event::Context { step: ContextStep::Report(report) } => context = Some(report),
                Event::Prefill { .. } | Event::Context { .. } => {}
                Event::Token { id, text, logprob } => {
                    answer.push_str(&text);
                    tokens.push(id);
                    logprobs.extend(logprob);
                }
                Event::Done { finish_reason, text, usage, timing, seed, served_by } => {
                    answer.push_str(&text);
                    return Ok(Completion {
                        text: answer,
                        tokens,
                        logprobs,
                        finish_reason,
                        usage,
                        timing,
                        seed,
                        context,
                        served_by,
                    });
                }
            }
        }
        Err(Error::new(ErrorKind::Closed, "the backend stopped before the answer ended").during("generate"))
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

/// A whole answer, as [`GenerateStream::collect`] returns it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Completion {
    /// The text, without stop strings and end-of-sequence tokens.
    pub text: String,
    /// The token ids, an end-of-sequence or stop token included.
    pub tokens: Vec<u32>,
    /// The log-probability of each token, if they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub logprobs: Vec<f32>,
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
pub struct TokenScore {
    /// The token.
    pub id: u32,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// How many tokens are more probable; 0 means that greedy decoding would choose it.
    pub rank: usize,
    /// The most probable tokens with their log-probabilities, best first, as many as were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub top: Vec<(u32, f32)>,
}
