//! A request's prompt taken apart: where its document lies, and where in a text it may be cut.

use std::ops::Range;

use crate::{
    Content, Error, Message, Prompt, Result, Segment,
    text::{Tokenizer, boundary_after, boundary_before, is_boundary},
};

/// Between a document and the task that follows it.
const BETWEEN: &str = "\n\n";

/// Puts the document before the last user message, or before the text. It is untrusted there.
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
        Prompt::Text(_) | Prompt::Segments(_) => {
            let task = segments(prompt);
            let mut all = vec![Segment::untrusted(document)];
            if task.iter().any(|segment| !segment.text.is_empty()) {
                all.push(Segment::trusted(BETWEEN));
                all.extend(task);
            }
            Ok(Prompt::Segments(all))
        }
        Prompt::Chat(mut messages) => {
            match messages.iter_mut().rfind(|m| m.role == "user") {
                Some(last) => last.content = Content::Text(join(&last.content.text())),
                None => messages.push(Message::user(document)),
            }
            Ok(Prompt::Chat(messages))
        }
        Prompt::Tokens(_) => {
            Err(Error::invalid_request("document: the prompt is tokens; text or a chat expected"))
        }
    }
}

/// The segments of a text prompt. Other prompts have none.
pub(super) fn segments(prompt: Prompt) -> Vec<Segment> {
    match prompt {
        Prompt::Text(text) => vec![Segment::trusted(text)],
        Prompt::Segments(segments) => segments,
        Prompt::Tokens(_) | Prompt::Chat(_) => Vec::new(),
    }
}

/// The prompt of segments.
pub(super) fn prompt_of(mut segments: Vec<Segment>) -> Prompt {
    match &mut segments[..] {
        [only] if only.trusted => Prompt::Text(std::mem::take(&mut only.text)),
        _ => Prompt::Segments(segments),
    }
}

/// The whole text of segments.
pub(super) fn text_of(segments: &[Segment]) -> String {
    segments.iter().map(|segment| segment.text.as_str()).collect()
}

/// The segments without these bytes of their whole text.
pub(super) fn without(segments: &[Segment], cut: &Range<usize>) -> Vec<Segment> {
    let mut start = 0;
    let mut kept = Vec::with_capacity(segments.len());
    for segment in segments {
        let within = |at: usize| at.clamp(start, start + segment.text.len()) - start;
        let text = [&segment.text[..within(cut.start)], &segment.text[within(cut.end)..]].concat();
        start += segment.text.len();
        kept.push(Segment { text, trusted: segment.trusted });
    }
    kept
}

/// A part of a text that may be cut, with its tokens.
pub(super) struct Piece {
    /// Its bytes in the text.
    bytes: Range<usize>,
    /// The bytes of its tokens in the text.
    tokens: Vec<Range<usize>>,
}

impl Piece {
    /// The bytes of an untrusted text.
    pub(super) fn new(tokenizer: &Tokenizer, text: &str, bytes: Range<usize>) -> Result<Self> {
        let spans = tokenizer.token_spans(&text[bytes.clone()], false)?;
        let tokens = spans.into_iter().map(|s| s.start + bytes.start..s.end + bytes.start).collect();
        Ok(Self { bytes, tokens })
    }

    /// The first `length` bytes of the whole text of segments.
    pub(super) fn of_segments(tokenizer: &Tokenizer, segments: &[Segment], length: usize) -> Result<Self> {
        let mut tokens = Vec::new();
        let mut start = 0;
        for Segment { text, trusted } in segments {
            let end = text.len().min(length - start);
            let spans = tokenizer.token_spans(&text[..end], *trusted)?;
            tokens.extend(spans.into_iter().map(|s| s.start + start..s.end + start));
            start += end;
        }
        Ok(Self { bytes: 0..length, tokens })
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
