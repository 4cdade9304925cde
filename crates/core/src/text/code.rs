//! Where program text is best cut, whatever its language.
//!
//! Grammars for each language (tree-sitter) are native code of a megabyte each, which this crate does not link. What nearly
//! all languages share is looked at instead: blank lines and indentation. A chunk is filled with lines, and ends behind its first
//! third before the line that begins the outermost block. A line that is too long for a chunk is cut as text.

use std::ops::Range;

use super::{
    ChunkOptions, Tokenizer,
    chunk::{self, ChunkKind},
};
use crate::Result;

/// Columns that a tab counts for.
const TAB: usize = 4;

struct Line {
    range: Range<usize>,
    /// Tokens of this line alone, its end included.
    tokens: usize,
    /// How bad a place its beginning is to cut at.
    rank: usize,
}

/// The ranges of `text`, in order and without gaps.
pub(super) fn ranges(tokenizer: &Tokenizer, text: &str, options: &ChunkOptions) -> Result<Vec<Range<usize>>> {
    let lines = lines(tokenizer, text)?;
    let count = |range: Range<usize>| Ok::<_, crate::Error>(tokenizer.encode_plain(&text[range])?.len());
    let mut ranges: Vec<Range<usize>> = Vec::new();
    // Lines that are done, and the line that the next chunk begins with, which may come again as overlap.
    let (mut done, mut first) = (0, 0);
    while done < lines.len() {
        let start = lines[first].range.start;
        // Lines merge to fewer tokens than their sum, rarely to more.
        let mut last = first;
        let mut sum = 0;
        while let Some(line) = lines.get(last)
            && sum + line.tokens <= options.max_tokens
        {
            sum += line.tokens;
            last += 1;
        }
        while last > first && count(start..lines[last - 1].range.end)? > options.max_tokens {
            last -= 1;
        }
        if last <= done && first < done {
            first = done; // no room for anything new behind the overlap
            continue;
        }
        if last == first {
            let line = lines[first].range.clone();
            let text_options = options.clone().with_kind(ChunkKind::Text);
            let pieces = chunk::ranges(tokenizer, &text[line.clone()], &text_options)?;
            ranges.extend(pieces.into_iter().map(|p| line.start + p.start..line.start + p.end));
            (done, first) = (first + 1, first + 1);
            continue;
        }
        if last < lines.len() {
            last = best_cut(&lines, done.max(first), last, start);
        }
        ranges.push(start..lines[last - 1].range.end);
        (done, first) = (last, last);
        while first > 0
            && lines[first - 1].range.start > start
            && done < lines.len()
            && count(lines[first - 1].range.start..lines[done - 1].range.end)? <= options.overlap
        {
            first -= 1;
        }
    }
    Ok(ranges)
}

/// The line to end a chunk before, of those behind `done` up to `last`.
fn best_cut(lines: &[Line], done: usize, last: usize, start: usize) -> usize {
    let third = start + (lines[last - 1].range.end - start) / 3;
    let candidates = (done + 1..=last).filter(|&i| i == last || lines[i].range.start >= third);
    // The latest of equals.
    candidates.min_by_key(|&i| (lines[i].rank, std::cmp::Reverse(i))).unwrap_or(last)
}

fn lines(tokenizer: &Tokenizer, text: &str) -> Result<Vec<Line>> {
    let mut at = 0;
    let mut after_blank = false;
    let line = |line: &str| {
        let range = at..at + line.len();
        at = range.end;
        let indentation: usize = line
            .chars()
            .take_while(|c| matches!(c, ' ' | '\t'))
            .map(|c| if c == '\t' { TAB } else { 1 })
            .sum();
        let content = line.trim();
        // The end of a block belongs to it, and so do the blank lines behind it.
        let closes = content.starts_with(['}', ')', ']']) || content == "end";
        let rank = if content.is_empty() {
            usize::MAX
        } else {
            4 * indentation + 2 * usize::from(closes) + usize::from(!after_blank)
        };
        after_blank = content.is_empty();
        Ok(Line { range, tokens: tokenizer.encode_plain(line)?.len(), rank })
    };
    text.split_inclusive('\n').map(line).collect()
}
