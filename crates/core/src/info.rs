//! What a backend tells about itself: the model, its limits and what can be asked of it.

use serde::{Deserialize, Serialize};

use crate::{EmbeddingInfo, MemoryPlan, Sampling};

/// What a loaded model is and can do. Constant for the life of a backend (a wrapper that swaps models returns a new one).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ModelInfo {
    /// The model's name: what the configuration calls it, else the name of its folder or file.
    pub name: String,
    /// The backend that runs it, by its registry name (`candle`, `echo`, ...).
    pub backend: String,
    /// The architecture, as the checkpoint names it (`bitnet`, `llama`, ...).
    pub architecture: String,
    /// The format that it was loaded from (`safetensors (packed)`, ...).
    pub format: String,
    /// Number of parameters, ternary and dense together; 0 where unknown.
    pub parameters: u64,
    /// Bytes of weights that are resident or mapped; 0 where unknown.
    pub weight_bytes: u64,
    /// What it takes in memory, as it was planned before it was loaded; `None` where the backend makes no plan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryPlan>,
    /// Upper bounds.
    pub limits: Limits,
    /// What can be asked of this backend.
    pub capabilities: Capabilities,
    /// How it makes embeddings; `None` for a model that makes none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding: Option<EmbeddingInfo>,
    /// The tokens that end an answer, in ascending order; empty where they are not known on this side.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub end_tokens: Vec<u32>,
    /// The sampling that applies where a request leaves a field open.
    pub defaults: SamplingDefaults,
}

impl ModelInfo {
    /// A description with empty limits and the capability to generate, to be filled in.
    pub fn new(name: impl Into<String>, backend: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            backend: backend.into(),
            architecture: String::new(),
            format: String::new(),
            parameters: 0,
            weight_bytes: 0,
            memory: None,
            limits: Limits::default(),
            capabilities: Capabilities { generate: true, ..Capabilities::default() },
            embedding: None,
            end_tokens: Vec::new(),
            defaults: SamplingDefaults::default(),
        }
    }
}

/// Upper bounds of a loaded model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Limits {
    /// Tokens that prompt and answer of one sequence may have together.
    pub context_length: usize,
    /// Entries of the vocabulary, which is the length of a row of logits.
    pub vocab_size: usize,
    /// Sequences that are worked on at the same time.
    pub max_sequences: usize,
    /// Requests that may wait beyond those; one more fails with [`Busy`](crate::ErrorKind::Busy).
    pub max_queued: usize,
}

/// What can be asked of a backend. Flat, so that hosts and test suites can choose by a field. What a backend cannot do it
/// refuses as [`Unsupported`](crate::ErrorKind::Unsupported) rather than leaving it out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Capabilities {
    /// `generate` works. Every backend generates or makes embeddings.
    pub generate: bool,
    /// A chat prompt works (there is a chat template).
    pub chat: bool,
    /// `score` works.
    pub score: bool,
    /// `logits` works.
    pub logits: bool,
    /// `embed` works.
    #[serde(default)]
    pub embed: bool,
    /// Generated tokens can carry their log-probability.
    pub logprobs: bool,
    /// The answer can be made to follow a [`Constraint`](crate::Constraint).
    #[serde(default)]
    pub constraints: bool,
    /// Calls of tools are told from the text of an answer. Without it the chat template still gets the tools, and a call
    /// comes as text.
    #[serde(default)]
    pub tool_calls: bool,
    /// A call can be required, of any tool or of one by its name.
    #[serde(default)]
    pub required_tool_calls: bool,
    /// Thoughts are told from the text of an answer.
    #[serde(default)]
    pub reasoning: bool,
    /// The same seed gives the same tokens.
    pub seed: bool,
    /// Prompts may be longer than the context: a context policy other than `reject` is configured.
    pub long_prompts: bool,
    /// The context policy `sliding` works.
    pub sliding_window: bool,
    /// A common prefix of successive requests is computed once. It shows in the time and the usage, and in nothing else but
    /// rounding.
    pub prefix_reuse: bool,
    /// Results do not depend, to the last bit, on what else runs, on how a prompt is divided, and on what is kept of earlier
    /// ones. Without it they differ by the rounding of float sums in another order, which can change a token where two are
    /// almost equally probable, and with it all that follow.
    #[serde(default)]
    pub batch_invariant: bool,
}

/// The sampling that a model's own `generation_config.json` asks for; what it leaves open is neutral.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SamplingDefaults {
    /// 0 takes the most probable token (greedy).
    pub temperature: f32,
    /// Keep the `top_k` most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of tokens whose probabilities sum to at least `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least `min_p` times as probable as the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Divide positive and multiply negative logits of tokens already seen; 1 changes nothing.
    pub repetition_penalty: f32,
}

impl Default for SamplingDefaults {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

impl SamplingDefaults {
    /// These defaults with the fields that `sampling` sets.
    pub fn overridden_by(self, sampling: &Sampling) -> Self {
        Self {
            temperature: sampling.temperature.unwrap_or(self.temperature),
            top_k: sampling.top_k.unwrap_or(self.top_k),
            top_p: sampling.top_p.unwrap_or(self.top_p),
            min_p: sampling.min_p.unwrap_or(self.min_p),
            repetition_penalty: sampling.repetition_penalty.unwrap_or(self.repetition_penalty),
        }
    }
}

/// What a backend is doing at the moment, and what it has done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Stats {
    /// Requests that are being worked on; each holds one sequence.
    pub active: usize,
    /// Requests that wait for a sequence.
    pub queued: usize,
    /// Requests that have ended since the model was loaded, in whatever way.
    pub finished: u64,
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Prompt tokens that were taken from a kept prefix instead of being computed.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
}
