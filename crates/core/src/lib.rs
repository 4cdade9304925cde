//! What a host sees of a model, and what all backends share.
//!
//! * [`LlmBackend`] is the trait that hosts program against: async, object-safe, used as `Arc<dyn LlmBackend>`.
//!   [`BackendWrapper`] is the base of backends that wrap another one.
//! * [`GenerateRequest`], [`Event`], [`Error`] and [`Capabilities`] are what goes in and what comes out.
//! * [`validate`] holds the checks of requests.
//! * [`text`] holds the preprocessing: tokenizer, token counting, chat templates, incremental detokenizing, stop strings.
//! * [`context`] is what is done with inputs that are longer than the context.
//! * [`config`] and [`registry`] turn a configuration file into a backend.
//! * [`MemoryPlan`] says what a model takes in memory, before it takes it.
//! * [`mod@file`] reads small files within a bound; [`blocking`] runs long work where blocking is allowed.
//! * [`echo`] is a backend without a model, for the tests of hosts.
//!
//! A host with only remote models needs nothing else. What makes an `LlmBackend` of a local model is in the crate
//! `ternion-engine`. This crate has no native dependency and no unsafe code.
#![forbid(unsafe_code)]

mod backend;
pub mod blocking;
pub mod config;
pub mod context;
pub mod echo;
mod error;
mod event;
pub mod file;
mod info;
pub mod logprob;
mod memory;
mod panics;
mod prepared;
pub mod registry;
mod request;
pub mod text;
pub mod validate;
mod wrapper;

pub use backend::{LlmBackend, LlmBackendExt, Unloaded};
pub use error::{Error, ErrorKind, Result, ResultExt};
pub use event::{
    Completion, Event, FinishReason, GenerateStream, Score, ServedBy, Timing, TokenScore, Usage,
};
pub use info::{Capabilities, Limits, ModelInfo, SamplingDefaults, Stats};
pub use memory::{MemoryPart, MemoryPlan, ProcessMemory};
pub use panics::catch_panic;
pub use request::{GenerateRequest, LogitsRequest, Message, Prompt, Sampling, ScoreRequest};
pub use wrapper::BackendWrapper;
