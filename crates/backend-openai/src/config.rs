//! What the configuration of a model may say to this backend beyond what all backends share.

use std::{path::PathBuf, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use ternion_core::{Error, Result, config::ModelConfig};

/// The table `options` of a model that runs on the backend `openai`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct OpenAiOptions {
    /// The address of the server's API, such as `http://gpu-1:8000/v1`. Without a path, `/v1` is added.
    pub url: String,
    /// The model's name on the server. Left out: the only model that the server lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The environment variable that holds the API key. Left out: no key is sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_env: Option<String>,
    /// Whether a model of `fallback` answers where the server refuses the key (401 and 403). `false`: the request fails, because
    /// a wrong key is a mistake in the configuration, which a fallback would hide. `true`: a key that expires or is withdrawn
    /// is as good as a server that is down.
    pub fall_back_when_denied: bool,
    /// A folder with the model's `tokenizer.json` and the files beside it. A relative path is relative to the working directory.
    /// Left out: tokens are known to the server alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// Where conversations become prompts.
    pub rendering: Rendering,
    /// Which extensions of OpenAI's API the server has.
    pub dialect: Dialect,
    /// Whether the server's abilities are tried when the model is loaded, by some requests of a few tokens. `false`: only
    /// conversations are possible, without log-probabilities and scores.
    pub probe: bool,
    /// Whether token ids are asked for with every answer, where the server can give them. `false` saves llama-server the
    /// log-probabilities that it gives them with.
    pub token_ids: bool,
    /// The model makes embeddings. Left out: it does where the server tells so, as Ternion's does. The server's endpoint
    /// `/v1/embeddings` is then used, and no other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<bool>,
    /// Whether the server makes shorter embeddings where a request asks for them (`dimensions`). Left out: as the server tells, else
    /// not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matryoshka: Option<bool>,
    /// Certificates in PEM form that are trusted besides those of the system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Milliseconds to connect, at least 1.
    #[schemars(range(min = 1))]
    pub connect_timeout_ms: u64,
    /// Milliseconds until the first byte of a response and, after its headers, of its body; at least 1. The server's queue
    /// and the prompt's computation count.
    #[schemars(range(min = 1))]
    pub first_byte_timeout_ms: u64,
    /// Milliseconds from one piece of a response to the next, at least 1. A slow reader does not count.
    #[schemars(range(min = 1))]
    pub idle_timeout_ms: u64,
    /// How a request is made again that failed before the first byte of its answer.
    pub retry: RetryOptions,
}

impl Default for OpenAiOptions {
    fn default() -> Self {
        Self {
            url: String::new(),
            model: None,
            api_key_env: None,
            fall_back_when_denied: false,
            tokenizer: None,
            rendering: Rendering::Auto,
            dialect: Dialect::Auto,
            probe: true,
            token_ids: true,
            embeddings: None,
            matryoshka: None,
            ca_file: None,
            connect_timeout_ms: 5000,
            first_byte_timeout_ms: 120_000,
            idle_timeout_ms: 60_000,
            retry: RetryOptions::default(),
        }
    }
}

/// Where conversations become prompts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Rendering {
    /// On this side, if there is a tokenizer with a chat template and the server takes token ids; else by the server.
    #[default]
    Auto,
    /// By the server's chat template, which also tells reasoning and calls of tools from the content.
    Server,
}

/// Which extensions of OpenAI's API a server has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Dialect {
    /// What the server's list of models tells; `openai` where it tells nothing.
    #[default]
    Auto,
    /// None.
    #[serde(rename = "openai")]
    OpenAi,
    /// Those of vLLM.
    Vllm,
    /// Those of SGLang.
    Sglang,
    /// Those of llama.cpp's `llama-server`.
    LlamaServer,
    /// Those of Ternion's own server.
    Ternion,
}

impl Dialect {
    /// Whether the server takes the sampling parameters that vLLM has added, by vLLM's names.
    pub(crate) fn has_vllm_sampling(self) -> bool {
        matches!(self, Self::Vllm | Self::Sglang | Self::Ternion)
    }

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::OpenAi => "openai",
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::LlamaServer => "llama-server",
            Self::Ternion => "ternion",
        }
    }
}

/// How often, and after how long, a request is made again that failed before the first byte of its answer: after a failed
/// connection, and after the statuses 408, 409, 429 and those from 500 on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RetryOptions {
    /// How often a request is made in all, at least 1 and at most 100.
    #[schemars(range(min = 1, max = 100))]
    pub attempts: usize,
    /// Milliseconds before the second attempt, at least 1; each further wait is twice as long. Up to as much again is added at
    /// random.
    #[schemars(range(min = 1))]
    pub min_delay_ms: u64,
    /// The longest wait without what is added, in milliseconds; not below `min_delay_ms`.
    #[schemars(range(min = 1))]
    pub max_delay_ms: u64,
    /// The longest wait that a server may ask for by `Retry-After`, in milliseconds. If it asks for a longer one, the request
    /// fails at once, so that another model can answer.
    pub max_retry_after_ms: u64,
}

impl Default for RetryOptions {
    fn default() -> Self {
        Self { attempts: 3, min_delay_ms: 250, max_delay_ms: 5000, max_retry_after_ms: 20_000 }
    }
}

impl OpenAiOptions {
    /// Checks all values, and that the configuration has no key that means nothing for a remote model.
    ///
    /// # Errors
    /// [`InvalidConfig`](ternion_core::ErrorKind::InvalidConfig) naming the key.
    pub(crate) fn validate(&self, config: &ModelConfig) -> Result<()> {
        let foreign = [
            (
                "path",
                config.path.is_some(),
                "options.url names the server, and options.tokenizer the tokenizer's folder",
            ),
            ("threads", config.threads.is_some(), "the server has its own"),
            ("pin_threads", !config.pin_threads.is_no(), "the server has its own threads"),
            ("prefill_chunk", config.prefill_chunk.is_some(), "the server has its own"),
            ("prompt_lookup", config.prompt_lookup.is_some(), "the server decides what it drafts"),
            ("mmap", config.mmap.is_some(), "there are no weights on this side"),
            (
                "stall_limit_ms",
                config.stall_limit_ms.is_some(),
                "an answer is read whether its reader reads or not",
            ),
            ("end_tokens", config.end_tokens.is_some(), "the server decides which tokens end an answer"),
        ];
        for (key, set, why) in foreign {
            if set {
                return Err(Error::invalid_config(format!(
                    "{key}: means nothing on the backend `openai`: {why}"
                )));
            }
        }
        if self.url.trim().is_empty() {
            return Err(Error::invalid_config(
                "options.url: is missing; such as \"http://gpu-1:8000/v1\" expected",
            ));
        }
        let retry = &self.retry;
        for (key, value, least) in [
            ("connect_timeout_ms", self.connect_timeout_ms, 1),
            ("first_byte_timeout_ms", self.first_byte_timeout_ms, 1),
            ("idle_timeout_ms", self.idle_timeout_ms, 1),
            ("retry.attempts", retry.attempts as u64, 1),
            ("retry.min_delay_ms", retry.min_delay_ms, 1),
            ("retry.max_delay_ms", retry.max_delay_ms, retry.min_delay_ms),
        ] {
            if value < least {
                let message = format!("options.{key}: {value} is out of range; at least {least} expected");
                return Err(Error::invalid_config(message));
            }
        }
        if retry.attempts > 100 {
            let found = retry.attempts;
            return Err(Error::invalid_config(format!(
                "options.retry.attempts: {found} is out of range; at most 100 expected"
            )));
        }
        Ok(())
    }

    /// The key that the environment holds.
    ///
    /// # Errors
    /// [`InvalidConfig`](ternion_core::ErrorKind::InvalidConfig) naming the variable, without its value.
    pub(crate) fn api_key(&self) -> Result<Option<String>> {
        let Some(variable) = &self.api_key_env else { return Ok(None) };
        let wrong = |what: &str| {
            Err(Error::invalid_config(format!("options.api_key_env: the variable `{variable}` {what}")))
        };
        match std::env::var(variable) {
            Ok(key) if key.trim().is_empty() => wrong("is empty"),
            Ok(key) => Ok(Some(key.trim().to_owned())),
            Err(std::env::VarError::NotPresent) => wrong("is not set"),
            Err(std::env::VarError::NotUnicode(_)) => wrong("is not valid UTF-8"),
        }
    }

    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub(crate) fn first_byte_timeout(&self) -> Duration {
        Duration::from_millis(self.first_byte_timeout_ms)
    }

    pub(crate) fn idle_timeout(&self) -> Duration {
        Duration::from_millis(self.idle_timeout_ms)
    }
}
