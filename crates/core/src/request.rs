//! What a host asks of a backend: generation, scoring, logits.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::{context::ContextPolicy, prepared::Prepared, text::Tokenizer};

/// One message of a conversation. The text is untrusted: special tokens in it are encoded as plain text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`, or what else the model's template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of any role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    /// A system message.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// A user message.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// An assistant message.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }
}

/// What the model continues.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prompt {
    /// Text as it is. It is trusted: special tokens in it are control tokens, and the tokenizer adds what it adds
    /// (a leading BOS for most models), as `tokenizer(text)` does in transformers.
    Text(String),
    /// Token ids as they are; nothing is added.
    Tokens(Vec<u32>),
    /// A conversation, rendered by the model's chat template with the header of the assistant's turn at the end.
    Chat(Vec<Message>),
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(tokens: Vec<u32>) -> Self {
        Self::Tokens(tokens)
    }
}

impl From<Vec<Message>> for Prompt {
    fn from(messages: Vec<Message>) -> Self {
        Self::Chat(messages)
    }
}

/// How the next token is chosen. A field that is `None` takes the model's own default
/// ([`SamplingDefaults`](crate::SamplingDefaults)).
///
/// The order is: logit bias, repetition/presence/frequency penalties, temperature, top-k, top-p, min-p, draw.
///
/// The ranges stand at the fields, and a value outside is an error that names them. All values within work together:
/// a logit that bias or penalties would carry out of the range of f32 becomes its largest or smallest number.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Finite and at least 0; 0 takes the most probable token.
    pub temperature: Option<f32>,
    /// Keep the `top_k` most probable tokens; 0 keeps all.
    pub top_k: Option<usize>,
    /// Over 0 and at most 1; 1 keeps all.
    pub top_p: Option<f32>,
    /// From 0 to 1; 0 keeps all.
    pub min_p: Option<f32>,
    /// Finite and over 0; 1 changes nothing. Counts prompt and answer.
    pub repetition_penalty: Option<f32>,
    /// Subtracted once from the logit of each token that the answer has; from -100 to 100, default 0.
    pub presence_penalty: Option<f32>,
    /// Subtracted for each occurrence of a token in the answer; from -100 to 100, default 0.
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of these token ids; finite, or `-inf`, which forbids a token. Files and variables cannot
    /// say `-inf`; there a bias of -1e30 does the same.
    pub logit_bias: BTreeMap<u32, f32>,
    /// The same seed with the same prompt gives the same tokens, whatever else runs (but for rounding, where the backend is
    /// not [`batch_invariant`](crate::Capabilities::batch_invariant)). `None` draws a seed, which the final event reports. A
    /// drawn seed is below 2^53, so that every JSON reader holds it.
    pub seed: Option<u64>,
}

impl Sampling {
    /// Always the most probable token, without penalties, whatever the configuration's and the model's defaults are.
    ///
    /// The configuration's biases still apply: they say what the model may answer, not how a token is chosen. A bias
    /// of 0 in [`logit_bias`](Self::logit_bias) takes one of them away.
    pub fn greedy() -> Self {
        Self {
            temperature: Some(0.0),
            repetition_penalty: Some(1.0),
            presence_penalty: Some(0.0),
            frequency_penalty: Some(0.0),
            ..Self::default()
        }
    }
}

impl Sampling {
    /// Takes the fields that are open here from `other`. The biases of both apply; for the same token these win.
    pub fn or(mut self, other: &Sampling) -> Sampling {
        self.temperature = self.temperature.or(other.temperature);
        self.top_k = self.top_k.or(other.top_k);
        self.top_p = self.top_p.or(other.top_p);
        self.min_p = self.min_p.or(other.min_p);
        self.repetition_penalty = self.repetition_penalty.or(other.repetition_penalty);
        self.presence_penalty = self.presence_penalty.or(other.presence_penalty);
        self.frequency_penalty = self.frequency_penalty.or(other.frequency_penalty);
        self.seed = self.seed.or(other.seed);
        for (&token, &bias) in &other.logit_bias {
            self.logit_bias.entry(token).or_insert(bias);
        }
        self
    }
}

/// A request to continue a prompt.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct GenerateRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// At least 1; `None` generates until the model ends or the context is full. With a sliding window, which is never full,
    /// `None` generates as many tokens as the context has.
    pub max_tokens: Option<usize>,
    /// The answer ends before the one of these that is complete first, of several that end at the same place before
    /// the longest, however the text is cut into tokens. None may be empty.
    ///
    /// Special tokens have no text in the answer, but their names count here: `<|im_end|>` and
    /// `<|im_end|>\n<|im_start|>user` are stop strings like others.
    pub stop: Vec<String>,
    /// The answer ends with one of these tokens, whatever `ignore_eos` says.
    pub stop_tokens: Vec<u32>,
    /// Go on past the model's end-of-sequence tokens (for measurements).
    pub ignore_eos: bool,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Report with each token its log-probability under the model (before penalties and temperature).
    pub logprobs: bool,
    /// What is done if the prompt does not fit into the context. `None`: what the model's configuration says.
    pub context_policy: Option<ContextPolicy>,
    /// A long text that the prompt is about: it comes before the last user message, or before the text, and is what a policy
    /// cuts first.
    pub document: Option<String>,
    /// Cancels the request from anywhere; dropping the stream does the same.
    pub cancel: CancellationToken,
    /// What a check of this request has computed.
    pub(crate) prepared: Prepared,
}

impl GenerateRequest {
    /// Continue `prompt` with the model's defaults.
    pub fn new(prompt: impl Into<Prompt>) -> Self {
        Self {
            prompt: prompt.into(),
            max_tokens: None,
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            ignore_eos: false,
            sampling: Sampling::default(),
            logprobs: false,
            context_policy: None,
            document: None,
            cancel: CancellationToken::new(),
            prepared: Prepared::default(),
        }
    }

    /// The tokens of the prompt, if a check of this request or of a clone of it has computed them with `tokenizer`.
    pub fn checked_tokens(&self, tokenizer: &Arc<Tokenizer>) -> Option<Vec<u32>> {
        self.prepared.tokens(tokenizer, &self.prompt)
    }

    /// A function that keeps the tokens of the prompt for the call that follows a check; clones of the request share
    /// them.
    pub fn keep_tokens(&self, tokenizer: &Arc<Tokenizer>) -> impl FnOnce(Vec<u32>) + Send + use<> {
        let (prepared, prompt, tokenizer) =
            (self.prepared.clone(), self.prompt.clone(), Arc::clone(tokenizer));
        move |tokens| prepared.keep_tokens(&tokenizer, prompt, tokens)
    }

    /// Answer a conversation.
    pub fn chat(messages: impl IntoIterator<Item = Message>) -> Self {
        Self::new(messages.into_iter().collect::<Vec<_>>())
    }

    /// The same request with at most `max_tokens` tokens of answer.
    pub fn with_max_tokens(mut self, max_tokens: usize) -> Self {
        self.max_tokens = Some(max_tokens);
        self
    }

    /// The same request that ends before one of `stop`.
    pub fn with_stop(mut self, stop: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.stop = stop.into_iter().map(Into::into).collect();
        self
    }

    /// The same request that ends with one of the tokens `stop_tokens`.
    pub fn with_stop_tokens(mut self, stop_tokens: impl IntoIterator<Item = u32>) -> Self {
        self.stop_tokens = stop_tokens.into_iter().collect();
        self
    }

    /// The same request with this sampling.
    pub fn with_sampling(mut self, sampling: Sampling) -> Self {
        self.sampling = sampling;
        self
    }

    /// The same request with log-probabilities.
    pub fn with_logprobs(mut self) -> Self {
        self.logprobs = true;
        self
    }

    /// The same request with this policy for a prompt that does not fit.
    pub fn with_context_policy(mut self, policy: ContextPolicy) -> Self {
        self.context_policy = Some(policy);
        self
    }

    /// The same request about a long text.
    pub fn with_document(mut self, text: impl Into<String>) -> Self {
        self.document = Some(text.into());
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
