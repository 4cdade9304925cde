//! What an engine needs to know beyond its model.

use std::time::Duration;

use ternion_core::{
    Error, ModelInfo, Result, Sampling,
    answer::{Reasoning, ToolFormat},
    config::ModelConfig,
    text::{TokenName, Tokenizer},
};

use crate::PromptCacheOptions;

const STALL_LIMIT: Duration = Duration::from_secs(30);

/// What an [`Engine`](crate::Engine) needs to know beyond the model itself.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct EngineOptions {
    /// What `info()` returns. The engine fills in the limits and capabilities, all but
    /// [`batch_invariant`](ternion_core::Capabilities::batch_invariant), which is a property of the model's arithmetic.
    pub info: ModelInfo,
    /// Tokens that end an answer according to the model's files, besides the tokenizer's EOS.
    pub eos_tokens: Vec<u32>,
    /// Tokens that end an answer in place of `eos_tokens` and the tokenizer's EOS.
    pub end_tokens: Option<Vec<TokenName>>,
    /// How the model writes calls of tools, before what its chat template says.
    pub tool_format: Option<ToolFormat>,
    /// The tags of the model's thoughts, before those of its chat template.
    pub reasoning: Option<Reasoning>,
    /// Sampling fields that apply where a request leaves them open, before the model's own defaults.
    pub sampling: Sampling,
    /// Requests that may wait for a sequence.
    pub max_queued: usize,
    /// How long nobody may read an answer while it waits for its reader. After that, if the queue is full, the answer ends
    /// with [`Timeout`](ternion_core::ErrorKind::Timeout), so that another request has its place.
    pub stall_limit: Duration,
    /// Bytes of logits that one request may have in memory at a time: scoring computes them in chunks of so many, and a
    /// request for more logits is refused. `None`: chunks of 32 MB, and as many logits as there is memory for.
    pub logits_bytes: Option<u64>,
    /// Where prompts are kept over a restart. `None`: nowhere.
    pub prompt_cache: Option<PromptCacheOptions>,
    /// Whether answers that repeat parts of their prompts are drafted from them. The tokens of an answer are the same with and
    /// without, so this works only where the model is
    /// [`batch_invariant`](ternion_core::Capabilities::batch_invariant) and [can truncate](crate::CausalLm::can_truncate).
    pub prompt_lookup: bool,
}

impl EngineOptions {
    /// Options with a queue of 64, a stall limit of 30 seconds, and no further tokens that end an answer.
    pub fn new(info: ModelInfo) -> Self {
        Self {
            info,
            eos_tokens: Vec::new(),
            end_tokens: None,
            tool_format: None,
            reasoning: None,
            sampling: Sampling::default(),
            max_queued: 64,
            stall_limit: STALL_LIMIT,
            logits_bytes: None,
            prompt_cache: None,
            prompt_lookup: true,
        }
    }

    /// Takes over what a model's configuration says to the engine: its sampling, end tokens, form of answers, queue, stall limit,
    /// prompt cache and prompt lookup.
    pub fn configure(&mut self, config: &ModelConfig) {
        self.sampling = config.sampling.clone();
        self.end_tokens.clone_from(&config.end_tokens);
        self.tool_format = config.tool_format;
        self.reasoning.clone_from(&config.reasoning);
        self.max_queued = config.max_queued.unwrap_or(self.max_queued);
        self.prompt_cache = config.prompt_cache.as_ref().map(PromptCacheOptions::of);
        self.prompt_lookup = config.prompt_lookup.unwrap_or(self.prompt_lookup);
        self.stall_limit = config.stall_limit_ms.map_or(self.stall_limit, Duration::from_millis);
    }

    /// The ids of the tokens that end an answer, in ascending order.
    pub(crate) fn end_tokens(&self, tokenizer: &Tokenizer, vocab_size: usize) -> Result<Vec<u32>> {
        let mut ids = match &self.end_tokens {
            Some(names) => names
                .iter()
                .map(|name| name.resolve(tokenizer, vocab_size))
                .collect::<Result<Vec<u32>>>()
                .map_err(|e| Error::invalid_config(format!("end_tokens: {}", e.message())))?,
            None => self.eos_tokens.iter().copied().chain(tokenizer.eos_id()).collect(),
        };
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }
}
