//! Cuts a text into chunks of a bounded number of tokens, at the best boundaries that there are.
//!
//! The boundaries are those of the `text-splitter` crate (paragraphs, sentences, words; Markdown's blocks), or for code
//! those of [`code`](super::code). White space is not trimmed, so that the chunks cover the text exactly. Sizes are exact
//! counts of the model's tokenizer for each chunk on its own, because tokens merge differently at a new border.
//!
//! `text-splitter` looks at all that remains for every chunk. So it is given a window of the text at a time, the last chunk
//! of which is cut anew as the first of the next window: time then grows with the length of the text alone.

use std::{cell::RefCell, ops::Range};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use text_splitter::{ChunkConfig, ChunkSizer, MarkdownSplitter, TextSplitter};
use unicode_segmentation::{GraphemeCursor, UnicodeSegmentation};

use super::{Tokenizer, code};
use crate::{Error, Result, ResultExt};

/// Bytes that are looked at together, for each token of a chunk: some four chunks of prose. More for Markdown, whose blocks
/// are known from their beginning on.
const TEXT_WINDOW: usize = 16;
const MARKDOWN_WINDOW: usize = 64;
const LEAST_WINDOW: usize = 2 << 10;
/// Bytes for each token of a chunk of which twice the tokens are looked for before all of a longer text is counted.
const PROBE: usize = 8;
/// How many sentences, and how many words, are tried as the beginning of an overlap.
const TRIES: usize = 3;

/// What kind of text it is, which says where it is best cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ChunkKind {
    /// Paragraphs, lines, sentences, words.
    #[default]
    Text,
    /// Headings, blocks, list items, then as text.
    Markdown,
    /// Program text of any language: blank lines, then lines with the least indentation, then as text.
    Code,
}

impl std::str::FromStr for ChunkKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "text" => Ok(Self::Text),
            "markdown" => Ok(Self::Markdown),
            "code" => Ok(Self::Code),
            _ => Err(Error::invalid_request(format!("kind: `{text}`; text, markdown or code expected"))),
        }
    }
}

/// How a text is cut.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ChunkOptions {
    /// The most tokens of a chunk, at least 1.
    pub max_tokens: usize,
    /// The most tokens of a chunk's beginning that repeat the end of the one before; fewer than `max_tokens`. There may be
    /// fewer, or none where no boundary is near enough.
    pub overlap: usize,
    /// Where it is best cut.
    pub kind: ChunkKind,
}

impl ChunkOptions {
    /// Chunks of plain text of at most `max_tokens`, without overlap.
    pub fn new(max_tokens: usize) -> Self {
        Self { max_tokens, overlap: 0, kind: ChunkKind::Text }
    }

    /// The same with this overlap.
    pub fn with_overlap(mut self, tokens: usize) -> Self {
        self.overlap = tokens;
        self
    }

    /// The same for this kind of text.
    pub fn with_kind(mut self, kind: ChunkKind) -> Self {
        self.kind = kind;
        self
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`InvalidRequest`](crate::ErrorKind::InvalidRequest).
    pub fn validate(&self) -> Result<()> {
        if self.max_tokens == 0 {
            return Err(Error::invalid_request("max_tokens: 0 is out of range; at least 1 expected"));
        }
        if self.overlap >= self.max_tokens {
            return Err(Error::invalid_request(format!(
                "overlap: {} tokens; fewer than the {} of a chunk expected",
                self.overlap, self.max_tokens
            )));
        }
        Ok(())
    }
}

/// A chunk: a part of a text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Chunk {
    /// Its first byte.
    pub start: usize,
    /// The byte behind its last.
    pub end: usize,
    /// Bytes at its beginning that the chunk before has too.
    pub overlap: usize,
    /// Its tokens, counted as [`Tokenizer::encode_plain`] does.
    pub tokens: usize,
}

impl Chunk {
    /// The chunk of `text`.
    pub fn of<'a>(&self, text: &'a str) -> &'a str {
        text.get(self.start..self.end).unwrap_or_default()
    }
}

/// Cuts `text`.
///
/// The chunks come in order. Each begins where the one before ends, or before that by its overlap, so that together they
/// are the whole text. None has more than `max_tokens`, and none ends inside a character; a sequence of characters that is
/// seen as one (a grapheme cluster) is only divided where it alone exceeds the limit. An empty text has no chunks.
///
/// # Errors
/// [`InvalidRequest`](crate::ErrorKind::InvalidRequest) for options out of range, and where a single character has more
/// tokens than a chunk may have.
pub fn chunks(tokenizer: &Tokenizer, text: &str, options: &ChunkOptions) -> Result<Vec<Chunk>> {
    let cut = || {
        options.validate()?;
        let ranges = match options.kind {
            ChunkKind::Code => code::ranges(tokenizer, text, options)?,
            _ => ranges(tokenizer, text, options)?,
        };
        measured(tokenizer, text, ranges, options)
    };
    cut().with_operation("chunk")
}

/// The chunks of these ranges. White space alone is not worth a chunk: it goes to the one before or behind, if there is room.
fn measured(
    tokenizer: &Tokenizer,
    text: &str,
    ranges: Vec<Range<usize>>,
    options: &ChunkOptions,
) -> Result<Vec<Chunk>> {
    let count = |range: Range<usize>| tokenizer.encode_plain(&text[range]).map(|ids| ids.len());
    let mut chunks: Vec<Chunk> = Vec::with_capacity(ranges.len());
    let mut ranges = ranges.into_iter().peekable();
    while let Some(range) = ranges.next() {
        let covered = chunks.last().map_or(0, |c| c.end);
        if text[covered..range.end].trim().is_empty() {
            if let Some(last) = chunks.last_mut() {
                let tokens = count(last.start..range.end)?;
                if tokens <= options.max_tokens {
                    (last.end, last.tokens) = (range.end, tokens);
                    continue;
                }
            }
            if let Some(next) = ranges.peek_mut()
                && count(covered..next.end)? <= options.max_tokens
            {
                next.start = next.start.min(covered);
                continue;
            }
        }
        let tokens = count(range.clone())?;
        if tokens > options.max_tokens {
            return Err(too_large(text, range.start, tokens, options));
        }
        chunks.push(Chunk { start: range.start, end: range.end, overlap: covered - range.start, tokens });
    }
    Ok(chunks)
}

/// The ranges of `text` by the boundaries of text or Markdown, in order and without gaps.
pub(super) fn ranges(tokenizer: &Tokenizer, text: &str, options: &ChunkOptions) -> Result<Vec<Range<usize>>> {
    let per_token = if options.kind == ChunkKind::Markdown { MARKDOWN_WINDOW } else { TEXT_WINDOW };
    let least = options.max_tokens.saturating_mul(per_token).max(LEAST_WINDOW);
    let mut ranges = Vec::new();
    let (mut start, mut window) = (0, least);
    while start < text.len() {
        let end = char_boundary(text, start.saturating_add(window));
        let mut pieces = split(tokenizer, &text[start..end], options)?;
        let mut next = end;
        if end < text.len() {
            // The last piece ends where the window happens to; it is cut anew as the first of the next one.
            match pieces.pop() {
                Some(last) if last.start > 0 && !pieces.is_empty() => next = start + last.start,
                _ => {
                    window = window.saturating_mul(2);
                    continue;
                }
            }
        }
        for piece in pieces {
            let piece = start + piece.start..start + piece.end;
            match undivided(tokenizer, text, &piece, options)? {
                Some(end) => {
                    push(text, &mut ranges, piece.start..end);
                    next = end;
                    break;
                }
                None => push(text, &mut ranges, piece),
            }
        }
        (start, window) = (next, least);
    }
    for i in (1..ranges.len()).rev() {
        ranges[i].start = overlap_start(tokenizer, text, &ranges[i - 1], &ranges[i], options)?;
    }
    Ok(ranges)
}

/// Where a chunk begins that repeats the end of the one before: at the first sentence that is within the overlap, else at the
/// first word. The splitter's own overlap takes whole sections of the level that it cuts at, mostly paragraphs, of which
/// none may be short enough.
fn overlap_start(
    tokenizer: &Tokenizer,
    text: &str,
    previous: &Range<usize>,
    range: &Range<usize>,
    options: &ChunkOptions,
) -> Result<usize> {
    let count = |range: Range<usize>| tokenizer.encode_plain(&text[range]).map(|ids| ids.len());
    let reach = options.overlap.saturating_mul(PROBE).max(64);
    let from = char_boundary(text, previous.start.max(range.start.saturating_sub(reach)));
    let before = &text[from..range.start];
    if options.overlap == 0 || before.trim().is_empty() {
        return Ok(range.start);
    }
    let spans = tokenizer.token_spans(before, false)?;
    let first = spans.get(spans.len().saturating_sub(options.overlap)).map_or(0, |span| span.start);
    // What is behind a cut made for speed is no beginning.
    let begins = |at: &usize| *at >= first && (*at > 0 || from == previous.start);
    let sentences = before.split_sentence_bound_indices().map(|(at, _)| at).filter(begins);
    let words = before.split_word_bound_indices().filter(|(_, word)| !word.trim().is_empty());
    let words = words.map(|(at, _)| at).filter(begins);
    for at in sentences.take(TRIES).chain(words.take(TRIES)).map(|at| from + at) {
        if !is_boundary(text, at) {
            continue; // flags pair up from the beginning of their row, which may lie before
        }
        if count(at..range.start)? <= options.overlap && count(at..range.end)? <= options.max_tokens {
            return Ok(at);
        }
    }
    Ok(range.start)
}

/// Where a piece is to end instead, if it ends inside a grapheme cluster that need not be divided. Words and sentences never
/// do, but Markdown's blocks may end between CR and LF.
fn undivided(
    tokenizer: &Tokenizer,
    text: &str,
    piece: &Range<usize>,
    options: &ChunkOptions,
) -> Result<Option<usize>> {
    if is_boundary(text, piece.end) {
        return Ok(None);
    }
    let before = boundary_before(text, piece.end);
    if before > piece.start {
        return Ok(Some(before));
    }
    let after = boundary_after(text, piece.end);
    let fits = tokenizer.encode_plain(&text[before..after])?.len() <= options.max_tokens;
    Ok((fits && before == piece.start).then_some(after))
}

/// Adds a range, unless it brings nothing new. Its overlap begins at a boundary.
fn push(text: &str, ranges: &mut Vec<Range<usize>>, range: Range<usize>) {
    let covered = ranges.last().map_or(0, |r| r.end);
    if range.end > covered {
        let start =
            if is_boundary(text, range.start) { range.start } else { boundary_after(text, range.start) };
        ranges.push(start.min(covered)..range.end);
    }
}

/// Whether a grapheme cluster, which a reader sees as one character, ends at `at`.
pub(crate) fn is_boundary(text: &str, at: usize) -> bool {
    text.is_char_boundary(at)
        && GraphemeCursor::new(at, text.len(), true).is_boundary(text, 0).unwrap_or(true)
}

/// The last boundary of grapheme clusters before `at`.
pub(crate) fn boundary_before(text: &str, at: usize) -> usize {
    let at = (0..=at.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    GraphemeCursor::new(at, text.len(), true).prev_boundary(text, 0).ok().flatten().unwrap_or(0)
}

/// The first boundary of grapheme clusters behind `at`.
pub(crate) fn boundary_after(text: &str, at: usize) -> usize {
    let at = char_boundary(text, at);
    GraphemeCursor::new(at, text.len(), true).next_boundary(text, 0).ok().flatten().unwrap_or(text.len())
}

/// What `text-splitter` makes of a text.
fn split(tokenizer: &Tokenizer, text: &str, options: &ChunkOptions) -> Result<Vec<Range<usize>>> {
    let sizer = Sizer { tokenizer, max_tokens: options.max_tokens, error: RefCell::new(None) };
    let capacity = options.max_tokens.saturating_sub(options.overlap).max(1);
    let config = ChunkConfig::new(capacity).with_sizer(&sizer).with_trim(false);
    let range = |(start, piece): (usize, &str)| start..start + piece.len();
    let pieces = if options.kind == ChunkKind::Markdown {
        MarkdownSplitter::new(config).chunk_indices(text).map(range).collect()
    } else {
        TextSplitter::new(config).chunk_indices(text).map(range).collect()
    };
    sizer.error.into_inner().map_or(Ok(pieces), Err)
}

/// Counts tokens for `text-splitter`, which cannot take an error: it is kept, and everything fits from then on.
struct Sizer<'a> {
    tokenizer: &'a Tokenizer,
    max_tokens: usize,
    error: RefCell<Option<Error>>,
}

impl ChunkSizer for Sizer<'_> {
    fn size(&self, chunk: &str) -> usize {
        let mut error = self.error.borrow_mut();
        if error.is_some() {
            return 0;
        }
        // Whatever is far too long need not be counted to its end.
        let probe = char_boundary(chunk, self.max_tokens.saturating_mul(PROBE).max(64));
        let count = |text: &str| self.tokenizer.encode_plain(text).map(|ids| ids.len());
        let counted = count(&chunk[..probe]).and_then(|n| match n {
            _ if probe == chunk.len() => Ok(n),
            n if n > self.max_tokens.saturating_mul(2) => Ok(n),
            _ => count(chunk),
        });
        match counted {
            Ok(n) => n,
            Err(e) => {
                *error = Some(e);
                0
            }
        }
    }
}

/// The first boundary between characters at `at` or behind it.
fn char_boundary(text: &str, at: usize) -> usize {
    (at..text.len()).find(|&i| text.is_char_boundary(i)).unwrap_or(text.len())
}

fn too_large(text: &str, at: usize, tokens: usize, options: &ChunkOptions) -> Error {
    let character = text[at..].chars().next().unwrap_or_default();
    Error::invalid_request(format!(
        "max_tokens: {} cannot hold the character {character:?} at byte {at}, which is {tokens} tokens",
        options.max_tokens
    ))
}
