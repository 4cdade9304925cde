//! What a host sees of a model, and what all backends share.
//!
//! * [`LlmBackend`] is the trait that hosts program against: async, object-safe, used as `Arc<dyn LlmBackend>`.
//!   [`BackendWrapper`] is the base of backends that wrap another one.
//! * [`GenerateRequest`], [`Event`], [`Error`] and [`Capabilities`] are what goes in and what comes out.
//! * [`validate`] holds the checks of requests.
//! * [`answer`] tells thoughts and calls of tools from the text of an answer.
//! * [`text`] holds the preprocessing: tokenizer, token counting, chat templates, incremental detokenizing, stop strings.
//! * [`context`] is what is done with inputs that are longer than the context.
//! * [`config`] and [`registry`] turn a configuration file into a backend.
//! * [`MemoryPlan`] says what a model takes in memory, before it takes it.
//! * [`embed`] holds requests for embeddings and what a model says of them.
//! * [`mod@file`] reads small files within a bound; [`blocking`] runs long work where blocking is allowed.
//! * [`echo`] is a backend without a model, for the tests of hosts.
//!
//! A host with only remote models needs nothing else. What makes an `LlmBackend` of a local model is in the crate
//! `ternion-engine`. This crate has no native dependency and no unsafe code.
#![forbid(unsafe_code)]

pub mod answer;
mod backend;
pub mod blocking;
pub mod config;
mod constraint;
pub mod context;
pub mod echo;
pub mod embed;
mod error;
mod event;
mod extract;
pub mod file;
mod info;
pub mod logprob;
mod memory;
mod message;
mod panics;
mod prepared;
mod prompt;
pub mod registry;
mod request;
mod sampling;
mod schema;
pub mod text;
mod tool;
pub mod validate;
mod wrapper;

pub use backend::{LlmBackend, LlmBackendExt, Unloaded};
pub use constraint::{Constraint, ConstraintStart};
pub use embed::{EmbedInput, EmbedRequest, Embedding, EmbeddingInfo, Embeddings, InputTruncation, Pooling};
pub use error::{Error, ErrorKind, Result, ResultExt};
pub use event::{
    Completion, DoneEvent, Event, FinishReason, GenerateStream, PrefillEvent, Score, ServedBy, TextEvent,
    TextStream, Timing, TokenEvent, TokenLogprob, TokenScore, ToolCallEvent, Usage,
};
pub use info::{Capabilities, Limits, ModelInfo, SamplingDefaults, Stats};
pub use memory::{MemoryPart, MemoryPlan, ProcessMemory};
pub use message::{Content, ContentPart, Message};
pub use panics::catch_panic;
pub use prompt::{Prompt, Segment};
pub use request::{GenerateParams, GenerateRequest, LogitsRequest, Prediction, ScoreRequest};
pub use sampling::Sampling;
pub use tool::{ChatOptions, Tool, ToolCall, ToolChoice};
pub use wrapper::BackendWrapper;

/// For implementations of [`LlmBackend`] and [`BackendWrapper`].
pub use async_trait::async_trait;
/// Cancels a request: [`GenerateRequest::cancel`].
pub use tokio_util::sync::CancellationToken;
