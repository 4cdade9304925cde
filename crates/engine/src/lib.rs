//! What makes an [`LlmBackend`](ternion_core::LlmBackend) of a local model.
//!
//! * [`CausalLm`] is what a local engine implements: sequences with a KV cache, tokens in, logits out.
//! * [`Engine`] owns one `CausalLm` on a thread of its own. Batching, prefix reuse, sampling, stop strings and streaming
//!   are written once, here, so that engines differ in their logits and in nothing else.
//! * [`EmbeddingEngine`] does the same for an [`EmbeddingModel`]: tokens in, one vector out.
//! * [`batch`] holds the checks that every `CausalLm` makes of a batch.
//! * Prompt lookup drafts what an answer repeats, and one pass verifies a draft ([`EngineOptions::prompt_lookup`]).
//! * A prompt cache on the disk ([`EngineOptions::prompt_cache`]) keeps the KV cache of prompts over a restart.
//! * [`kv`] is a paged KV cache for engines that keep keys and values themselves.
#![forbid(unsafe_code)]

pub mod batch;
mod causal;
mod constraint;
mod draft;
mod embedding;
mod engine;
mod events;
mod generation;
mod guard;
mod job;
pub mod kv;
mod options;
mod prompt_cache;
mod sampler;
mod scoring;
mod shares;
mod slots;
mod step;
mod thought;
mod threads;
mod window;
mod worker;

pub use causal::{CausalLm, KvForm, KvIdentity, LogitsPrecision, LogitsWanted, SequenceId, SequenceInput};
pub use embedding::{EmbeddingEngine, EmbeddingModel};
pub use engine::Engine;
pub use options::EngineOptions;
pub use prompt_cache::PromptCacheOptions;
pub use threads::ComputeThreads;
