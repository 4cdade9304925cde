//! What was done to an input that did not fit: told in steps while it happens, and as a whole at the end.

use serde::{Deserialize, Serialize};

use crate::{Usage, text::Chunk};

/// News about an input that did not fit, as [`Event::Context`](crate::Event::Context) brings them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
#[non_exhaustive]
pub enum ContextStep {
    /// Work on a part begins.
    PartStarted {
        /// 0: the chunks of the text; from 1 on: rounds that make fewer answers of the answers.
        round: usize,
        /// The part, from 0 on.
        part: usize,
        /// How many there are in this round.
        parts: usize,
    },
    /// A part is done. Parts of one round may end in any order.
    PartDone {
        /// As in `PartStarted`.
        round: usize,
        /// The part, from 0 on.
        part: usize,
        /// How many there are in this round.
        parts: usize,
        /// Its answer, which a host keeps that wants to lose nothing if a later part fails.
        answer: String,
        /// What its request used.
        #[serde(default)]
        usage: Usage,
    },
    /// The window has moved. A reader that is behind misses this, not the report.
    WindowMoved {
        /// Tokens that the model no longer sees.
        dropped: usize,
        /// Tokens that it still sees, and that have been computed anew at their new positions.
        kept: usize,
    },
    /// All that was done, once, right before [`Event::Done`](crate::Event::Done). There is none where everything fitted.
    Report(ContextReport),
}

/// What was done to fit an input into the context.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ContextReport {
    /// The policy, as the configuration calls it.
    pub policy: String,
    /// Tokens of the prompt as it was asked for.
    pub prompt_tokens: usize,
    /// The most that it may have had.
    pub prompt_limit: usize,
    /// Parts of the input that the model has not seen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dropped: Vec<Dropped>,
    /// The chunks of the long text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chunks: Vec<Chunk>,
    /// For each round that made fewer answers of the answers, how many went in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub merged: Vec<usize>,
    /// Requests that it took, the last one included.
    pub calls: usize,
    /// Prompt tokens of all of them, ...
    pub total_prompt_tokens: usize,
    /// ... those of them that were cached, ...
    pub total_cached_tokens: usize,
    /// ... and generated tokens.
    pub total_completion_tokens: usize,
    /// Answers to parts that had to be cut, because their text takes more tokens than they were generated with.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub answers_cut: usize,
    /// How often the window moved.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub window_moves: usize,
    /// Tokens that left the window, of prompt and answer.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub window_dropped_tokens: usize,
    /// Tokens that were computed anew because the window moved.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub recomputed_tokens: usize,
}

/// A part of the input that was dropped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Dropped {
    /// The message that it is of, from 0 on. `None` for a text and for the request's `document`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<usize>,
    /// The first byte that is missing; for token prompts, the first token.
    pub start: usize,
    /// The byte, or token, behind the last.
    pub end: usize,
    /// How many tokens it was.
    pub tokens: usize,
}

impl Dropped {
    /// The part from `start` to `end` of a message, or of the document where `message` is `None`.
    pub fn new(message: Option<usize>, start: usize, end: usize, tokens: usize) -> Self {
        Self { message, start, end, tokens }
    }
}

impl ContextReport {
    /// An empty report.
    pub fn new(policy: &str, prompt_tokens: usize, prompt_limit: usize) -> Self {
        Self { policy: policy.to_owned(), prompt_tokens, prompt_limit, ..Self::default() }
    }

    /// Adds what one request used.
    pub fn add(&mut self, usage: &crate::Usage) {
        self.calls += 1;
        self.total_prompt_tokens += usage.prompt_tokens;
        self.total_cached_tokens += usage.cached_tokens;
        self.total_completion_tokens += usage.completion_tokens;
    }

    /// Tokens that were dropped of the input.
    pub fn dropped_tokens(&self) -> usize {
        self.dropped.iter().map(|d| d.tokens).sum()
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(n: &usize) -> bool {
    *n == 0
}
