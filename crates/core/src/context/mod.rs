//! Inputs that are longer than the context: how many tokens everything takes, and what is done where they do not fit.
//!
//! * [`TokenBudget`] says for each message what its text and the chat template take, and what is left for an answer.
//! * [`ContextPolicy`] is the configuration: refuse, cut, let the window slide, or work through the text in chunks.
//! * [`ContextLayer`] applies a policy to all requests of any [`LlmBackend`](crate::LlmBackend). The
//!   [`Registry`](crate::registry::Registry) puts it around every model that it loads. Only `sliding` is the engine's own.
//! * [`ContextStep`] and [`ContextReport`] tell the reader of the answer what was done: nothing is dropped silently.

mod budget;
mod fit;
mod layer;
mod long;
mod parts;
mod policy;
mod prompts;
mod report;
mod run;
mod truncate;

pub use budget::{MessageTokens, TokenBudget};
pub(crate) use fit::Fitted;
pub use layer::ContextLayer;
pub use policy::{Chunked, ContextPolicy, DropFrom, Sliding, Truncate};
pub use report::{ContextReport, ContextStep, Dropped};
