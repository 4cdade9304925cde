//! What an answer must look like, and from where on.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What an answer must look like.
///
/// A backend with the capability [`constraints`](crate::Capabilities::constraints) lets the model choose only tokens with
/// which the answer can still become what the constraint describes, and lets the answer end only where it is complete. What a
/// backend cannot enforce it refuses as [`InvalidRequest`](crate::ErrorKind::InvalidRequest), or as
/// [`Unsupported`](crate::ErrorKind::Unsupported) where another backend could: no answer is unconstrained in silence. An answer may still be cut off, by `max_tokens` for example; [`DoneEvent::constraint_complete`] tells that.
///
/// The model does not see the constraint. Describe the form of the answer in the prompt too: otherwise the answer is valid, but
/// what it says may be of little use. [`with_schema_in_prompt`](crate::GenerateRequest::with_schema_in_prompt) does that for a
/// JSON schema.
///
/// [`DoneEvent::constraint_complete`]: crate::DoneEvent::constraint_complete
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Constraint {
    /// JSON that is valid against this JSON schema: an object or a boolean. Properties come in the order of the schema.
    JsonSchema(Value),
    /// Any JSON object.
    JsonObject,
    /// Text that matches this regular expression as a whole, in the syntax of the Rust crate `regex`, without look-around.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Text of this grammar, in the dialect of Lark that [llguidance] reads: `%json { ... }` embeds a JSON schema, and
    /// `<name>` is the special token of that name.
    ///
    /// [llguidance]: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
    Lark(String),
}

/// From where on a constraint holds within an answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConstraintStart {
    /// From the first token on.
    #[default]
    Immediately,
    /// After this text, for example `</think>`. The answer cannot end before the text appears. It ends when the constraint is
    /// complete. One or two line breaks may stand between the text and what is constrained.
    AfterText(String),
    /// After the thought, if the answer begins with one, else from the first token on. The model thinks only if `start` is one token.
    AfterThought {
        /// Begins a thought.
        start: String,
        /// Ends it.
        end: String,
    },
    /// After this text, if it appears. The answer may do without; after the text it ends when the constraint is complete.
    Once(String),
    /// After this text, each time that it appears, for example `<tool_call>`. Outside, the answer is free and may end. When the
    /// constraint allows no further text, the answer is free again until the text appears again. The text that closes the
    /// constrained part belongs to the constraint.
    EachTime(String),
}
