//! Validation of a model on whatever backend: GSM8K, MMLU and perplexity, on the data sets' own files.
//!
//! Whoever swaps a model, a format or an engine wants to know that the answers are still as good. The tasks are those of
//! lm-evaluation-harness 0.4.13, so that numbers compare with published ones: the same prompts byte for byte, the same
//! draw of the shots, the same tokens scored, the same extraction of answers, the same standard errors.
//!
//! * [`Task`] reads a data set and makes [`Item`]s of it: prompts with what is expected.
//! * [`evaluate`] runs the items on a [`Model`], several at once, and writes a [`Record`] of each as it ends, so that a
//!   killed run goes on where it was.
//! * [`Report`] sums the records up, and [`Comparison`] compares those of two models item by item.
//!
//! What differs from lm-evaluation-harness: a prompt that does not fit into the context gets fewer shots instead of losing
//! its beginning (the records and the report say so), and a sequence that is scored has at most the context's length with
//! its last token, which lm-evaluation-harness does not count (its `max_length` is the context less one).
//!
//! This crate sees only the trait of `ternion-core`, never an engine.
#![forbid(unsafe_code)]

mod compare;
mod data;
mod gsm8k;
mod likelihood;
mod mmlu;
mod model;
mod perplexity;
mod prompt;
mod python_random;
mod records;
mod report;
mod runner;
mod stats;
mod task;

pub use compare::{Agreement, Comparison, Difference, PairedDifference};
pub use mmlu::Category;
pub use model::{Fingerprint, Model};
pub use prompt::{FewShot, Shot};
pub use records::{Header, Outcome, Record};
pub use report::{Metric, Perplexity, Report};
pub use runner::{Evaluation, OnProgress, Progress, RunOptions, evaluate};
pub use task::{DataId, Document, Item, Kind, Settings, Task, TaskId, Work};
