//! What a host asks of a backend: generation, scoring, logits.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::{
    ChatOptions, Constraint, Message, Prompt, Result, Sampling, context::ContextPolicy, prepared::Prepared,
    text::Tokenizer,
};

/// What is to be generated: everything about a request that can be written down. The serde form leaves out what has
/// its default.
///
/// ```
/// use ternion_core::{GenerateParams, GenerateRequest};
///
/// let params: GenerateParams =
///     serde_json::from_str(r#"{"prompt": {"chat": [{"role": "user", "content": "Hi"}]}, "max_tokens": 20}"#)?;
/// let request = GenerateRequest::from(params);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct GenerateParams {
    /// What to continue.
    pub prompt: Prompt,
    /// What the chat template gets besides the messages of the prompt.
    #[serde(default, skip_serializing_if = "is_default")]
    pub chat: ChatOptions,
    /// At least 1; `None` generates until the model ends or the context is full. With a sliding window, which is never full,
    /// `None` generates as many tokens as the context has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
    /// The answer ends before the one of these that is complete first, of several that end at the same place before
    /// the longest, however the text is cut into tokens. None may be empty.
    ///
    /// Special tokens have no text in the answer, but their names count here: `<|im_end|>` and
    /// `<|im_end|>\n<|im_start|>user` are stop strings like others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// The answer ends with one of these tokens, whatever `ignore_eos` says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop_tokens: Vec<u32>,
    /// Go on past the model's end-of-sequence tokens (for measurements).
    #[serde(default, skip_serializing_if = "is_default")]
    pub ignore_eos: bool,
    /// How the next token is chosen.
    #[serde(default, skip_serializing_if = "is_default")]
    pub sampling: Sampling,
    /// Report with each token its log-probability under the model (before penalties and temperature).
    #[serde(default, skip_serializing_if = "is_default")]
    pub logprobs: bool,
    /// Report with each token this many of the most probable tokens at its place; at most 100. More than 0 needs
    /// `logprobs`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub top_logprobs: usize,
    /// What the answer must look like. Needs the capability [`constraints`](crate::Capabilities::constraints), and cannot be
    /// combined with `ignore_eos`. `stop_tokens` then end the answer only where the constraint is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub constraint: Option<Constraint>,
    /// Where the engine may look for drafts of the answer. This changes the speed of an answer but not its tokens, so
    /// a backend that cannot draft ignores it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub prediction: Prediction,
    /// The most tokens of thought. After that the engine ends the thought, and the model answers. 0 ends a thought at once. Needs
    /// the capability [`reasoning`](crate::Capabilities::reasoning).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_budget: Option<usize>,
    /// What is done if the prompt does not fit into the context. `None`: what the model's configuration says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_policy: Option<ContextPolicy>,
    /// A long text that the prompt is about: it comes before the last user message, or before the text, and is what a policy
    /// cuts first. It is untrusted: special tokens in it stay text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub document: Option<String>,
}

/// Where an engine may look for drafts of an answer, which it then verifies.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Prediction {
    /// Where the engine's configuration says.
    #[default]
    Auto,
    /// No drafts.
    Off,
    /// In this text, which much of the answer is expected to repeat.
    Text(String),
}

impl GenerateParams {
    /// Continue `prompt` with the model's defaults.
    pub fn new(prompt: impl Into<Prompt>) -> Self {
        Self {
            prompt: prompt.into(),
            chat: ChatOptions::default(),
            max_tokens: None,
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            ignore_eos: false,
            sampling: Sampling::default(),
            logprobs: false,
            top_logprobs: 0,
            constraint: None,
            prediction: Prediction::Auto,
            reasoning_budget: None,
            context_policy: None,
            document: None,
        }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A request to continue a prompt: its parameters, and the means to cancel it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct GenerateRequest {
    /// What is to be generated.
    pub params: GenerateParams,
    /// Cancels the request from anywhere; dropping the stream does the same.
    pub cancel: CancellationToken,
    /// What a check of this request has computed.
    pub(crate) prepared: Prepared,
}

impl From<GenerateParams> for GenerateRequest {
    fn from(params: GenerateParams) -> Self {
        Self { params, cancel: CancellationToken::new(), prepared: Prepared::default() }
    }
}

impl GenerateRequest {
    /// Continue `prompt` with the model's defaults.
    pub fn new(prompt: impl Into<Prompt>) -> Self {
        GenerateParams::new(prompt).into()
    }

    /// Answer a conversation.
    pub fn chat(messages: impl IntoIterator<Item = Message>) -> Self {
        Self::new(messages.into_iter().collect::<Vec<_>>())
    }

    /// The tokens of the prompt, with all that the chat template and the tokenizer add. May take seconds for megabytes.
    ///
    /// Every part of a program that needs the tokens calls this. They are computed once: the request and its clones
    /// keep them as long as prompt and tokenizer are the same.
    ///
    /// # Errors
    /// What the chat template refuses; [`Unsupported`](crate::ErrorKind::Unsupported) for a chat without a template.
    pub fn prompt_tokens(&self, tokenizer: &Arc<Tokenizer>) -> Result<Arc<[u32]>> {
        self.prepared.tokens(tokenizer, &self.params.prompt, &self.params.chat)
    }

    /// Whether [`prompt_tokens`](Self::prompt_tokens) takes no time, because the tokens are known.
    pub fn knows_tokens(&self, tokenizer: &Arc<Tokenizer>) -> bool {
        matches!(self.params.prompt, Prompt::Tokens(_))
            || self.prepared.knows_tokens(tokenizer, &self.params.prompt, &self.params.chat)
    }

    /// The same request with these options for the chat template.
    pub fn with_chat_options(mut self, options: ChatOptions) -> Self {
        self.params.chat = options;
        self
    }

    /// The same request with at most `max_tokens` tokens of answer.
    pub fn with_max_tokens(mut self, max_tokens: usize) -> Self {
        self.params.max_tokens = Some(max_tokens);
        self
    }

    /// The same request that ends before one of `stop`.
    pub fn with_stop(mut self, stop: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.params.stop = stop.into_iter().map(Into::into).collect();
        self
    }

    /// The same request that ends with one of the tokens `stop_tokens`.
    pub fn with_stop_tokens(mut self, stop_tokens: impl IntoIterator<Item = u32>) -> Self {
        self.params.stop_tokens = stop_tokens.into_iter().collect();
        self
    }

    /// The same request with this sampling.
    pub fn with_sampling(mut self, sampling: Sampling) -> Self {
        self.params.sampling = sampling;
        self
    }

    /// The same request with log-probabilities.
    pub fn with_logprobs(mut self) -> Self {
        self.params.logprobs = true;
        self
    }

    /// The same request with log-probabilities, also those of the `top` most probable tokens at each place.
    pub fn with_top_logprobs(mut self, top: usize) -> Self {
        self.params.logprobs = true;
        self.params.top_logprobs = top;
        self
    }

    /// The same request for an answer of this form.
    pub fn with_constraint(mut self, constraint: Constraint) -> Self {
        self.params.constraint = Some(constraint);
        self
    }

    /// The same request with at most so many tokens of thought.
    pub fn with_reasoning_budget(mut self, tokens: usize) -> Self {
        self.params.reasoning_budget = Some(tokens);
        self
    }

    /// The same request with this policy for a prompt that does not fit.
    pub fn with_context_policy(mut self, policy: ContextPolicy) -> Self {
        self.params.context_policy = Some(policy);
        self
    }

    /// The same request about a long text.
    pub fn with_document(mut self, text: impl Into<String>) -> Self {
        self.params.document = Some(text.into());
        self
    }

    /// The same request, also ended by `cancel`.
    pub fn with_cancel(mut self, cancel: CancellationToken) -> Self {
        self.cancel = cancel;
        self
    }
}

/// A request for the log-probabilities of given tokens.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ScoreRequest {
    /// The whole sequence, at least 2 tokens and at most the context.
    pub tokens: Vec<u32>,
    /// The first token to score, at least 1: a token is scored given all that stand before it.
    pub start: usize,
    /// Report this many of the most probable tokens at each place; at most 100.
    pub top: usize,
    /// Cancels the request; dropping the future does the same.
    pub cancel: CancellationToken,
}

impl ScoreRequest {
    /// Score `tokens[start..]`.
    pub fn new(tokens: Vec<u32>, start: usize) -> Self {
        Self { tokens, start, top: 0, cancel: CancellationToken::new() }
    }

    /// The same request with the `top` most probable tokens at each place.
    pub fn with_top(mut self, top: usize) -> Self {
        self.top = top;
        self
    }
}

/// A request for the raw logits at the positions `start..` of a sequence.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LogitsRequest {
    /// The whole sequence, at least 1 token and at most the context.
    pub tokens: Vec<u32>,
    /// The first position whose logits are returned.
    pub start: usize,
    /// Cancels the request; dropping the future does the same.
    pub cancel: CancellationToken,
}

impl LogitsRequest {
    /// The logits at every position of `tokens`.
    pub fn new(tokens: Vec<u32>) -> Self {
        Self { tokens, start: 0, cancel: CancellationToken::new() }
    }

    /// The same request from position `start` on.
    pub fn with_start(mut self, start: usize) -> Self {
        self.start = start;
        self
    }
}
