//! What every [`CausalLm`](crate::CausalLm) checks of a batch before it computes it, so that all refuse alike.

use crate::{SequenceId, SequenceInput};
use ternion_core::{Error, ErrorKind, Result};

/// One sequence's part of a batch.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Span {
    /// The sequence.
    pub sequence: SequenceId,
    /// Its first token in the batch.
    pub start: usize,
    /// How many tokens there are.
    pub count: usize,
    /// Tokens in the KV cache before.
    pub past: usize,
}

/// Checks what [`CausalLm::forward`](crate::CausalLm::forward) requires of a batch, and says where each sequence's tokens
/// lie in it. `length` is that of a sequence, if it exists.
///
/// # Errors
/// [`ContextOverflow`](ErrorKind::ContextOverflow) where a sequence would grow beyond `context`,
/// [`Backend`](ErrorKind::Backend) for the rest, which a caller gets wrong.
pub fn spans(
    batch: &[SequenceInput<'_>],
    length: impl Fn(SequenceId) -> Option<usize>,
    context: usize,
    vocab_size: usize,
) -> Result<Vec<Span>> {
    let mut spans: Vec<Span> = Vec::with_capacity(batch.len());
    let mut start = 0;
    for input in batch {
        let sequence = input.sequence;
        let past = length(sequence).ok_or_else(|| no_such(sequence))?;
        let count = input.tokens.len();
        if count == 0 || spans.iter().any(|s| s.sequence == sequence) {
            return Err(Error::backend(format!(
                "sequence {} is in the batch twice or without tokens",
                sequence.0
            )));
        }
        if past + count > context {
            return Err(Error::new(
                ErrorKind::ContextOverflow,
                format!("{past} tokens and {count} more; at most {context} fit into the context"),
            ));
        }
        if let Some(token) = input.tokens.iter().find(|&&t| t as usize >= vocab_size) {
            return Err(Error::backend(format!("token {token} is not below {vocab_size}")));
        }
        spans.push(Span { sequence, start, count, past });
        start += count;
    }
    Ok(spans)
}

/// The error about a sequence that does not exist.
pub fn no_such(sequence: SequenceId) -> Error {
    Error::backend(format!("sequence {} does not exist", sequence.0))
}

/// Checks that one more sequence than the `used` may exist.
///
/// # Errors
/// [`ResourceExhausted`](ErrorKind::ResourceExhausted) where all `most` are in use.
pub fn room_for_one(used: usize, most: usize) -> Result<()> {
    if used < most {
        return Ok(());
    }
    Err(Error::new(ErrorKind::ResourceExhausted, format!("all {most} sequences are in use")))
}
