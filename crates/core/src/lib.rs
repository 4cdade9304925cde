//! The heart of Ternion: what a host sees of a model, and everything that all engines share.
//!
//! * [`LlmBackend`] is the trait that hosts program against: async, object-safe, used as `Arc<dyn LlmBackend>`.
//! * [`CausalLm`] is what a local engine implements: sequences with a KV cache, tokens in, logits out.
//! * [`Engine`](engine::Engine) owns one `CausalLm` on a thread of its own and makes an `LlmBackend` of it. Templates,
//!   tokenizing, batching, prefix reuse, sampling, stop strings and streaming are written once, here, so that engines
//!   can differ in their logits and in nothing else.
//! * [`text`] holds the preprocessing: tokenizer, token counting, chat templates, incremental detokenizing.
//! * [`context`] is what is done with inputs that are longer than the context.
//! * [`config`] and [`registry`] turn a configuration file into a backend.
//! * [`batch`] holds the checks that every engine makes of a batch.
//! * [`kv`] is a paged KV cache for engines that keep keys and values themselves.
//! * [`MemoryPlan`] says what a model takes in memory, before it takes it.
//! * [`mod@file`] reads small files within a bound.
//! * [`echo`] is a backend without a model, for the tests of hosts.
//!
//! This crate has no native dependency and no unsafe code.
#![forbid(unsafe_code)]

mod backend;
pub mod batch;
mod blocking;
mod causal;
pub mod config;
pub mod context;
pub mod echo;
pub mod engine;
mod error;
mod event;
pub mod file;
mod info;
pub mod kv;
mod memory;
mod panics;
mod prepared;
pub mod registry;
mod request;
pub mod text;
mod wrapper;

pub use backend::{LlmBackend, LlmBackendExt, Unloaded};
pub use causal::{CausalLm, LogitsWanted, SequenceId, SequenceInput};
pub use error::{Error, ErrorKind, Result, ResultExt};
pub use event::{
    Completion, Event, FinishReason, GenerateStream, Score, ServedBy, Timing, TokenScore, Usage,
};
pub use info::{Capabilities, Limits, ModelInfo, SamplingDefaults, Stats};
pub use memory::{MemoryPart, MemoryPlan, ProcessMemory};
pub use panics::catch_panic;
pub use request::{GenerateRequest, LogitsRequest, Message, Prompt, Sampling, ScoreRequest};
pub use wrapper::BackendWrapper;
