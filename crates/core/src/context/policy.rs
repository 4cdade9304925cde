//! What is done with an input that does not fit into the context: the configuration.

use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::prompts;
use crate::{Error, Result, text::ChunkKind};

/// What is done with a prompt that leaves no room for its answer. In a configuration it is the table `context_policy` of a
/// model, whose key `kind` chooses one of these; a request can choose another for itself.
///
/// Where the prompt fits, all but `sliding` change nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum ContextPolicy {
    /// It is refused with [`ContextOverflow`](crate::ErrorKind::ContextOverflow).
    Reject,
    /// A part of it is dropped.
    Truncate(Truncate),
    /// The window moves: the first tokens and the most recent ones are kept, in the prompt and while the answer is
    /// generated, which then does not end with the context.
    Sliding(Sliding),
    /// The task is done on each chunk of the long text, then on the answers, until they fit.
    MapReduce(Chunked),
    /// The task is done on the first chunk, and its answer is improved with each further one.
    Refine(Chunked),
}

#[expect(
    clippy::derivable_impls,
    reason = "the derive's attribute would be part of the schema's description"
)]
impl Default for ContextPolicy {
    fn default() -> Self {
        Self::Reject
    }
}

/// [`ContextPolicy::Truncate`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Truncate {
    /// Which part.
    pub drop: DropFrom,
    /// Tokens that are kept free for the answer, at least 1. Left out: the request's `max_tokens`, at most a quarter of the
    /// context.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub reserve: Option<usize>,
    /// The last user message may be cut too. Otherwise a request whose system message and last user message alone do not
    /// fit is refused.
    pub cut_last_message: bool,
}

/// Which part of a conversation or a text is dropped. System messages and the last user message with what follows it are
/// kept; a `document` may be cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DropFrom {
    /// The oldest turns, whole: a user message with all that follows it up to the next one. Of a text or a document its
    /// beginning.
    #[default]
    OldestTurns,
    /// The beginning.
    Head,
    /// The end.
    Tail,
    /// The middle.
    Middle,
}

/// [`ContextPolicy::Sliding`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Sliding {
    /// The first tokens of the prompt, which are always kept. Left out: 4, which models lean on as a place for attention
    /// that has no other. As many as the system message has keep that too.
    pub sinks: usize,
    /// The most recent tokens that are kept when the window moves, at least 1. Left out: half of what the sinks leave.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub recent: Option<usize>,
}

impl Default for Sliding {
    fn default() -> Self {
        Self { sinks: 4, recent: None }
    }
}

impl Sliding {
    /// How many tokens are kept at the beginning and at the end in a context of this length.
    ///
    /// # Errors
    /// [`InvalidConfig`](crate::ErrorKind::InvalidConfig) if they leave no room for another one.
    pub fn kept(&self, context: usize) -> Result<(usize, usize)> {
        let recent = self.recent.unwrap_or_else(|| (context.saturating_sub(self.sinks) / 2).max(1));
        if recent == 0 || self.sinks.saturating_add(recent) >= context {
            return Err(Error::invalid_config(format!(
                "sliding: {} sinks and {recent} recent tokens; at least 1 recent and together fewer than the context of {context} expected",
                self.sinks
            )));
        }
        Ok((self.sinks, recent))
    }
}

/// [`ContextPolicy::MapReduce`] and [`ContextPolicy::Refine`].
///
/// The long text is the request's `document`, else its longest message. The task is the last user message, where that is not
/// the long text itself, under the system message. Other messages are dropped, and reported.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Chunked {
    /// The most tokens of a chunk, at least 1. Left out: as many as fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub chunk_tokens: Option<usize>,
    /// The most tokens that a chunk repeats of the one before. Left out: a sixteenth of a chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlap: Option<usize>,
    /// What kind of text it is.
    pub chunk_kind: ChunkKind,
    /// The most tokens of each answer but the last, at least 1. Left out: the request's `max_tokens`, at most an eighth of
    /// the context.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub answer_tokens: Option<usize>,
    /// Tokens that are kept free for the last answer, at least 1. Left out: the request's `max_tokens`, at most a quarter
    /// of the context.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub reserve: Option<usize>,
    /// The task of a request that has none besides the long text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// The message for a chunk: for each with `map_reduce`, for the first with `refine`. `{text}` stands for the chunk,
    /// `{task}` for the task, `{part}` and `{parts}` for its number and how many there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_prompt: Option<String>,
    /// The message that goes on from there. With `map_reduce`, `{text}` stands for the answers to be made one, in order;
    /// with `refine` for the next chunk, and `{answer}` for the answer so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_prompt: Option<String>,
}

impl ContextPolicy {
    /// What the configuration calls it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Reject => "reject",
            Self::Truncate(_) => "truncate",
            Self::Sliding(_) => "sliding",
            Self::MapReduce(_) => "map_reduce",
            Self::Refine(_) => "refine",
        }
    }

    /// Whether prompts may be longer than the context.
    pub fn takes_long_prompts(&self) -> bool {
        *self != Self::Reject
    }

    /// Checks the ranges of all values, as far as they do not depend on the model.
    ///
    /// # Errors
    /// [`InvalidConfig`](crate::ErrorKind::InvalidConfig) naming the key.
    pub fn validate(&self) -> Result<()> {
        let at_least_1 = |key: &str, value: Option<usize>| match value {
            Some(0) => Err(Error::invalid_config(format!("{key}: 0 is out of range; at least 1 expected"))),
            _ => Ok(()),
        };
        match self {
            Self::Reject => Ok(()),
            Self::Truncate(truncate) => at_least_1("reserve", truncate.reserve),
            Self::Sliding(sliding) => at_least_1("recent", sliding.recent),
            Self::MapReduce(chunked) | Self::Refine(chunked) => {
                at_least_1("chunk_tokens", chunked.chunk_tokens)?;
                at_least_1("answer_tokens", chunked.answer_tokens)?;
                at_least_1("reserve", chunked.reserve)?;
                if let (Some(overlap), Some(tokens)) = (chunked.overlap, chunked.chunk_tokens)
                    && overlap >= tokens
                {
                    return Err(Error::invalid_config(format!(
                        "overlap: {overlap} tokens; fewer than the {tokens} of chunk_tokens expected"
                    )));
                }
                prompts::validate("first_prompt", chunked.first_prompt.as_deref(), &["text"])?;
                let needed: &[_] =
                    if matches!(self, Self::Refine(_)) { &["text", "answer"] } else { &["text"] };
                prompts::validate("next_prompt", chunked.next_prompt.as_deref(), needed)
            }
        }
    }
}

impl FromStr for ContextPolicy {
    type Err = Error;

    /// A policy with its defaults: `reject`, `truncate` (the oldest turns) or `truncate-head`, `-tail`, `-middle`, `sliding`,
    /// `map-reduce`, `refine`.
    fn from_str(text: &str) -> Result<Self> {
        let truncate = |drop| Self::Truncate(Truncate { drop, ..Truncate::default() });
        Ok(match text.replace('_', "-").as_str() {
            "reject" => Self::Reject,
            "truncate" | "truncate-oldest-turns" => truncate(DropFrom::OldestTurns),
            "truncate-head" => truncate(DropFrom::Head),
            "truncate-tail" => truncate(DropFrom::Tail),
            "truncate-middle" => truncate(DropFrom::Middle),
            "sliding" => Self::Sliding(Sliding::default()),
            "map-reduce" => Self::MapReduce(Chunked::default()),
            "refine" => Self::Refine(Chunked::default()),
            _ => {
                return Err(Error::invalid_request(format!(
                    "policy: `{text}`; reject, truncate, truncate-head, truncate-tail, truncate-middle, sliding, map-reduce or refine expected"
                )));
            }
        })
    }
}
