//! Whether models that should be the same one are: the same checkpoint in other formats, on other engines, with other
//! options.
//!
//! All get the same [`Questions`], whose token ids come from the first model, the reference. They are asked one model after
//! the other, so that no two have to be in memory at once; what is kept of each is its [`Answers`], whose largest part are
//! the logits (4 bytes for each position and entry of the vocabulary).
//!
//! ```
//! use ternion_conformance::compare::{Answers, Comparison, Inputs, Questions, Tolerances};
//! # use ternion_core::{LlmBackend, Result};
//!
//! # async fn example(safetensors: &dyn LlmBackend, gguf: &dyn LlmBackend) -> Result<bool> {
//! let questions = Questions::for_model(safetensors, &Inputs::default())?;
//! let reference = Answers::of(safetensors, &questions).await?;
//! let other = Answers::of(gguf, &questions).await?;
//! let comparison = Comparison::new(&questions, &reference, &other);
//! let allowed = Tolerances::for_pair(&safetensors.info(), &gguf.info());
//! Ok(comparison.findings(&allowed).iter().all(|finding| finding.passed))
//! # }
//! ```

mod answers;
mod difference;
mod findings;
mod questions;

pub use answers::{Answers, GreedyAnswer};
pub use difference::{
    Agreement, Comparison, GreedyDifference, LogitsDifference, PerplexityDifference, Position,
};
pub use findings::{Finding, Tolerances};
pub use questions::{Inputs, Questions};
