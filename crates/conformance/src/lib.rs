//! The contract of [`LlmBackend`], sentence by sentence, as functions that try a backend.
//!
//! Each check is a plain public async function on `&dyn LlmBackend`; it names the item of the contract that it is
//! about, and its [`Failure`] says what the backend did instead. Backends that cannot do something say so in their
//! [`Capabilities`](ternion_core::Capabilities), and the checks that need it are skipped with that reason.
//!
//! # Testing a backend
//!
//! One file in the backend's crate, `tests/conformance.rs`:
//!
//! ```no_run
//! use std::{process::ExitCode, sync::Arc};
//!
//! use ternion_core::{LlmBackend, Result, echo::{Echo, EchoOptions}};
//!
//! fn main() -> ExitCode {
//!     ternion_conformance::run("mine", load)
//! }
//!
//! /// A small model with a small context and a short queue: the checks fill both.
//! async fn load() -> Result<Arc<dyn LlmBackend>> {
//!     Ok(Arc::new(Echo::new("model", EchoOptions::default())))
//! }
//! ```
//!
//! and in its `Cargo.toml`:
//!
//! ```toml
//! [dev-dependencies]
//! ternion-conformance = "0.1"
//!
//! [[test]]
//! name = "conformance"
//! harness = false
//! ```
//!
//! `cargo test --test conformance` then runs all checks; a part of a name selects some, as in
//! `cargo test --test conformance -- stopping`. [`Suite`] runs several backends in one program and compares them with
//! [`Reference`]s, numbers that another implementation computed: only those tell a model that is wrong from one that is right.
//!
//! # What the model should be like
//!
//! Small, because some hundred requests are made, with a context of some hundred tokens and a few places in its queue, because
//! the checks fill both. The weights may be random. Nothing else may use the model meanwhile.
//!
//! # Comparing models
//!
//! [`compare`] tells how far models are apart that should be the same one, in other formats or on other engines.
//!
//! # In a test of one's own
//!
//! ```
//! # use ternion_core::echo::{Echo, EchoOptions};
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! let model = Echo::new("model", EchoOptions::default());
//! ternion_conformance::streaming::events_come_in_order(&model).await?;
//! for check in ternion_conformance::checks(&model) {
//!     check.run(&model).await.map_err(|failure| format!("{}: {failure}", check.name))?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod ask;
pub mod cancellation;
pub mod chat;
mod check;
pub mod compare;
pub mod concurrency;
pub mod constraints;
pub mod drawing;
pub mod embeddings;
pub mod errors;
pub mod facts;
pub mod failing;
pub mod limits;
mod reference;
mod runner;
pub mod sampling;
pub mod scoring;
pub mod sessions;
pub mod stopping;
pub mod streaming;
pub mod tools;
pub mod validation;

pub use check::{Check, Failure, Outcome, Sentence};
pub use reference::{Aspect, Reference, Row};
pub use runner::{Suite, run};

use ternion_core::LlmBackend;

/// All checks, module by module.
pub fn all() -> impl Iterator<Item = &'static Check> {
    [
        facts::CHECKS,
        streaming::CHECKS,
        chat::CHECKS,
        sampling::CHECKS,
        drawing::CHECKS,
        stopping::CHECKS,
        scoring::CHECKS,
        limits::CHECKS,
        cancellation::CHECKS,
        concurrency::CHECKS,
        errors::CHECKS,
        validation::CHECKS,
        constraints::CHECKS,
        tools::CHECKS,
        sessions::CHECKS,
        embeddings::CHECKS,
    ]
    .into_iter()
    .flatten()
}

/// The checks that apply to a backend.
pub fn checks(model: &dyn LlmBackend) -> Vec<Check> {
    all().filter(|check| check.skipped(model).is_none()).copied().collect()
}

/// Every check with how it ended on this backend, one after the other. Must be awaited in a tokio runtime with its timer
/// enabled, while nothing else uses the model.
pub async fn outcomes(model: &dyn LlmBackend) -> Vec<(Check, Outcome)> {
    let mut outcomes = Vec::new();
    for check in all() {
        outcomes.push((*check, check.outcome(model).await));
    }
    outcomes
}
