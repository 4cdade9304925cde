//! `POST /v1/completions`: the request.

use ternion::{GenerateParams, Prompt};

use super::common::{MAX_CHOICES, request};
use crate::{
    error::ApiError,
    request::{Delivery, Prompts},
};

/// OpenAI's default.
const DEFAULT_MAX_TOKENS: usize = 16;

request! {
    /// Texts to continue.
    CompletionRequest {
        /// A text, a list of texts, a list of token ids or a list of such lists.
        prompt: Option<Prompts>,
        /// Give the prompt back before the answer; with `logprobs` it is scored.
        echo: Option<bool>,
        /// Report the log-probability of each token, and this many of the most probable tokens at its place.
        logprobs: Option<usize>,
        /// Not supported; only the value of `n`.
        best_of: Option<usize>,
        /// Not supported.
        suffix: Option<String>,
        /// Whether the tokenizer adds what it adds to a text, such as a BOS; on by default.
        add_special_tokens: Option<bool>,
        /// Write tokens of log-probabilities as `token_id:N`.
        return_tokens_as_token_ids: Option<bool>,
    }
}

/// A completion request after its checks.
#[derive(Debug)]
pub(crate) struct Completion {
    /// Everything but the prompt.
    pub(crate) params: GenerateParams,
    pub(crate) prompts: Prompts,
    pub(crate) delivery: Delivery,
    pub(crate) echo: bool,
    /// The most probable tokens at each place, where log-probabilities are wanted.
    pub(crate) logprobs: Option<usize>,
    pub(crate) add_special_tokens: bool,
    pub(crate) tokens_as_ids: bool,
    /// Nothing is generated: the prompt is scored alone.
    pub(crate) only_echo: bool,
}

impl CompletionRequest {
    pub(crate) fn check(mut self) -> Result<Completion, ApiError> {
        let common = self.take_common();
        let delivery = common.delivery()?;
        let prompts = self.prompt.ok_or_else(|| ApiError::field("prompt", "is missing"))?;
        let (count, is_empty) = match &prompts {
            Prompts::Texts(texts) => (texts.len(), texts.iter().any(String::is_empty)),
            Prompts::Tokens(lists) => (lists.len(), lists.iter().any(Vec::is_empty)),
        };
        if count == 0 || is_empty {
            return Err(ApiError::field("prompt", "is empty; at least one token expected"));
        }
        if count.saturating_mul(delivery.choices) > MAX_CHOICES {
            let message = format!(
                "{count} prompts with n = {}; at most {MAX_CHOICES} answers expected",
                delivery.choices
            );
            return Err(ApiError::field("prompt", message));
        }
        if let Some(best_of) = self.best_of.filter(|&best_of| best_of != delivery.choices) {
            return Err(ApiError::unsupported(
                "best_of",
                &format!("{best_of} is not supported; the value of `n` expected"),
            ));
        }
        if self.suffix.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::unsupported("suffix", "text after the answer is not supported"));
        }
        let mut params = GenerateParams::new(Prompt::Tokens(Vec::new()));
        common.apply(&mut params)?;
        let echo = self.echo.unwrap_or(false);
        let only_echo = params.max_tokens == Some(0);
        if only_echo && !echo {
            return Err(ApiError::field(
                "max_tokens",
                "0 is out of range without `echo`; at least 1 expected",
            ));
        }
        params.max_tokens = if only_echo { Some(1) } else { params.max_tokens.or(Some(DEFAULT_MAX_TOKENS)) };
        if echo && params.document.is_some() {
            return Err(ApiError::field("document", "cannot be combined with `echo`"));
        }
        params.logprobs = self.logprobs.is_some();
        params.top_logprobs = self.logprobs.unwrap_or(0);
        Ok(Completion {
            params,
            prompts,
            delivery,
            echo,
            logprobs: self.logprobs,
            add_special_tokens: self.add_special_tokens.unwrap_or(true),
            tokens_as_ids: self.return_tokens_as_token_ids.unwrap_or(false),
            only_echo,
        })
    }
}
