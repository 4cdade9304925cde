//! What is in an answer besides text: the thought before it, and calls of tools.
//!
//! Models write both as text between tags of their own. [`AnswerFormat`] says which; it is found from the chat template.
//! [`AnswerParser`] turns the text of an answer into [`Event::Reasoning`](crate::Event::Reasoning),
//! [`Event::Text`](crate::Event::Text) and [`Event::ToolCall`](crate::Event::ToolCall).
//!
//! # Models without a form of their own
//!
//! Where a chat template does not print tools, as that of BitNet b1.58 2B4T, they are described at the end of the system
//! message, in this text:
//!
//! ```text
#![doc = include_str!("description.txt")]
//! ```
//!
//! Calls in earlier answers are written in the same form, and results of tools become user messages that begin with
//! `Result of NAME:`.

mod call;
mod describe;
mod format;
mod id;
mod json;
mod object;
mod parser;
mod piece;
#[cfg(test)]
mod tests;
mod xml;

pub(crate) use describe::described;
pub use format::{AnswerFormat, Reasoning, ReasoningTags, ToolFormat};
pub use id::call_id;
pub use parser::{AnswerParser, Thought};
