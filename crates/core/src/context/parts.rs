//! A request's prompt taken apart: where its document lies, and where in a text it may be cut.

use std::ops::Range;

use crate::{
    Error, Message, Prompt, Result,
    text::{Tokenizer, boundary_after, boundary_before, is_boundary},
};

/// Between a document and the task that follows it.
const BETWEEN: &str = "\n\n";

/// Puts the document before the last user message, or before the text.
///
/// # Errors
/// [`InvalidRequest`](crate::ErrorKind::InvalidRequest) for a prompt of tokens, and for an empty document.
pub(super) fn with_document(prompt: Prompt, document: &str) -> Result<Prompt> {
    if document.is_empty() {
        return Err(Error::invalid_request("document: is empty; at least one character expected"));
    }
    let join = |task: &str| match task {
        "" => document.to_owned(),
        task => [document, BETWEEN, task].concat(),
    };
    match prompt {
        Prompt::Text(task) => Ok(Prompt::Text(join(&task))),
        Prompt::Chat(mut messages) => {
            match messages.iter_mut().rfind(|m| m.role == "user") {
                Some(last) => last.content = join(&last.content),
                None => messages.push(Message::user(document)),
            }
            Ok(Prompt::Chat(messages))
        }
        Prompt::Tokens(_) => {
            Err(Error::invalid_request("document: the prompt is tokens; text or a chat expected"))
        }
    }
}

/// How many tokens a prompt is.
///
/// # Errors
/// Those of the tokenizer and of the chat template.
pub(super) fn count(tokenizer: &Tokenizer, prompt: &Prompt) -> Result<usize> {
    match prompt {
        Prompt::Text(text) => Ok(tokenizer.encode(text, true)?.len()),
        Prompt::Tokens(tokens) => Ok(tokens.len()),
        Prompt::Chat(messages) => tokenizer.count_chat(messages),
    }
}

/// A part of a text that may be cut, with its tokens.
pub(super) struct Piece {
    /// Its bytes in the text.
    bytes: Range<usize>,
    /// The bytes of its tokens in the text.
    tokens: Vec<Range<usize>>,
}

impl Piece {
    /// The bytes of `text`, whose special tokens count where it is trusted.
    pub(super) fn new(tokenizer: &Tokenizer, text: &str, bytes: Range<usize>, trusted: bool) -> Result<Self> {
        let spans = tokenizer.token_spans(&text[bytes.clone()], trusted)?;
        let tokens = spans.into_iter().map(|s| s.start + bytes.start..s.end + bytes.start).collect();
        Ok(Self { bytes, tokens })
    }

    /// How many tokens it has.
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether `cut` is all of it.
    pub(super) fn is_all(&self, cut: &Range<usize>) -> bool {
        *cut == self.bytes
    }

    /// The bytes to drop for these tokens to be gone: no character is divided, so there may be some more.
    pub(super) fn cut(&self, text: &str, tokens: Range<usize>) -> Range<usize> {
        if tokens.is_empty() {
            return self.bytes.start..self.bytes.start;
        }
        let start = self.tokens.get(tokens.start).map_or(self.bytes.end, |t| t.start);
        let start = if tokens.start == 0 { self.bytes.start } else { start };
        let end = self.tokens.get(tokens.end).map_or(self.bytes.end, |t| t.start);
        let start = if is_boundary(text, start) { start } else { boundary_before(text, start) };
        let end = if is_boundary(text, end) { end } else { boundary_after(text, end) };
        start.max(self.bytes.start)..end.min(self.bytes.end)
    }

    /// How many tokens lie in these bytes.
    pub(super) fn tokens_in(&self, bytes: &Range<usize>) -> usize {
        self.tokens.iter().filter(|t| t.start >= bytes.start && t.end <= bytes.end).count()
    }
}

/// Whether the text of `tokens[..at]` ends where a character ends.
pub(super) fn is_token_boundary(tokenizer: &Tokenizer, tokens: &[u32], at: usize) -> Result<bool> {
    // A character has at most four bytes, so no more tokens than that.
    let from = at.saturating_sub(4);
    let to = (at + 4).min(tokens.len());
    let broken = |ids: &[u32]| -> Result<usize> {
        Ok(tokenizer.decode(ids, false)?.matches(char::REPLACEMENT_CHARACTER).count())
    };
    Ok(broken(&tokens[from..at])? + broken(&tokens[at..to])? <= broken(&tokens[from..to])?)
}
