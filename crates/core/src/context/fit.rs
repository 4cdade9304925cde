//! What a context policy makes of a request's prompt, before any request to the backend.

use std::sync::Arc;

use super::{ContextPolicy, ContextReport, Truncate, budget::answer_room, long::Plan, truncate::truncate};
use crate::{ChatOptions, Prompt, Result, prepared::Prepared, text::Tokenizer};

/// What the result depends on.
#[derive(Clone, PartialEq)]
pub(super) struct Asked {
    pub(super) prompt: Prompt,
    pub(super) chat: ChatOptions,
    /// Bytes of the document, which stand at the beginning of the text or of the last user message.
    pub(super) document: Option<usize>,
    /// One that needs the tokens of the prompt: not `reject` and not `sliding`.
    pub(super) policy: ContextPolicy,
    pub(super) max_tokens: Option<usize>,
    pub(super) context: usize,
}

/// The result.
#[derive(Clone)]
pub(super) enum Outcome {
    /// The prompt fits as it is.
    Fits,
    /// This shorter prompt fits.
    Truncated(Prompt, ContextReport),
    /// The text is worked through in steps.
    Steps(Arc<Plan>),
}

/// What was asked and what came of it.
#[derive(Clone)]
pub(crate) struct Fitted {
    tokenizer: Arc<Tokenizer>,
    pub(super) asked: Asked,
    pub(super) outcome: Outcome,
}

impl Fitted {
    /// Counts the prompt's tokens and shortens or plans where they are too many. May take seconds.
    ///
    /// # Errors
    /// Those of the tokenizer and the template; [`ContextOverflow`](crate::ErrorKind::ContextOverflow) where the policy
    /// cannot help.
    pub(super) fn new(tokenizer: Arc<Tokenizer>, asked: Asked, prepared: &Prepared) -> Result<Self> {
        let Asked { prompt, chat, document, policy, max_tokens, context } = &asked;
        let reserve = match policy {
            ContextPolicy::Truncate(Truncate { reserve, .. }) => *reserve,
            ContextPolicy::MapReduce(chunked) | ContextPolicy::Refine(chunked) => chunked.reserve,
            ContextPolicy::Reject | ContextPolicy::Sliding(_) => None,
        };
        let limit = context - answer_room(reserve, *max_tokens, *context, 4)?;
        let count = prepared.tokens(&tokenizer, prompt, chat)?.len();
        let outcome = if count <= limit {
            Outcome::Fits
        } else if let ContextPolicy::Truncate(policy) = policy {
            let (prompt, dropped) = truncate(&tokenizer, prompt.clone(), chat, *document, policy, limit)?;
            let mut report = ContextReport::new("truncate", count, limit);
            report.dropped = dropped;
            Outcome::Truncated(prompt, report)
        } else {
            Outcome::Steps(Arc::new(Plan::make(&tokenizer, &asked, count)?))
        };
        Ok(Self { tokenizer, asked, outcome })
    }

    /// Whether this is the answer to `asked`.
    pub(super) fn answers(&self, tokenizer: &Arc<Tokenizer>, asked: &Asked) -> bool {
        Arc::ptr_eq(&self.tokenizer, tokenizer) && self.asked == *asked
    }

    pub(super) fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }
}
