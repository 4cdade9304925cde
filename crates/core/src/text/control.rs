//! Keeps special tokens that are written in untrusted text from becoming control tokens.
//!
//! The template decides where the text of a message lands in the prompt, so it cannot be told afterwards which
//! characters came from a message. Before rendering, a sentinel (a Unicode noncharacter that nothing else in the
//! conversation has) is therefore put into every special token in a message, and at the ends of a message where the
//! template's own text could complete one. A special token in the rendered prompt is genuine if no sentinel is in it.

use std::collections::{HashMap, HashSet};

/// Noncharacters for internal use: never part of text that is meant to be exchanged, and not white space, so that
/// `trim` and the like treat text with and without sentinel alike.
const SENTINELS: std::ops::RangeInclusive<char> = '\u{FDD0}'..='\u{FDEF}';

/// Whether `c` may be a sentinel.
pub(super) fn may_be_sentinel(c: char) -> bool {
    SENTINELS.contains(&c)
}

/// A noncharacter that is in none of `texts`; the first one if all are in use.
pub(super) fn choose_sentinel<'a>(texts: impl Iterator<Item = &'a str> + Clone) -> char {
    let free = |c: &char| texts.clone().all(|text| !text.contains(*c));
    SENTINELS.clone().find(free).unwrap_or(*SENTINELS.start())
}

/// The special tokens of a tokenizer, searchable.
///
/// Comparisons ignore ASCII case, because templates change it (`role | capitalize`).
pub(super) struct ControlTokens {
    forward: Trie,
    /// The same tokens from the last byte to the first, to find their ends at the start of a text.
    backward: Trie,
    longest: usize,
}

impl ControlTokens {
    pub(super) fn new<'a>(contents: impl Iterator<Item = &'a str>) -> Self {
        let mut control = Self { forward: Trie::default(), backward: Trie::default(), longest: 0 };
        for content in contents.filter(|c| !c.is_empty()) {
            control.forward.insert(content.bytes());
            control.backward.insert(content.bytes().rev());
            control.longest = control.longest.max(content.len());
        }
        control
    }

    /// The byte offsets in `text` at which a sentinel must stand, ascending; empty for nearly every text.
    pub(super) fn breaks(&self, text: &str) -> Vec<usize> {
        let bytes = text.as_bytes();
        let trimmed_end = text.trim_end().len();
        let mut breaks = Vec::new();

        // The end of a token that the template might begin. It is looked for behind leading white space, which the
        // template may trim away.
        let start = text.len() - text.trim_start().len();
        let reach = bytes.len().min(start + self.longest);
        if (start + 1..=reach)
            .any(|end| self.backward.walk(bytes[start..end].iter().rev().copied()).consumed_all)
        {
            breaks.push(start);
        }
        for (at, first) in text.char_indices() {
            let walk = self.forward.walk(bytes[at..].iter().copied());
            let second = at + first.len_utf8();
            // The beginning of a token that the template might complete, perhaps after trimming.
            let open_end = walk.consumed_all || (at < trimmed_end && at + walk.depth >= trimmed_end);
            match walk.matched {
                // Nothing fits into a token of one character, so it is enclosed.
                Some(length) if at + length == second => breaks.extend([at, second]),
                Some(_) => breaks.push(second),
                None if open_end => breaks.push(second),
                None => {}
            }
        }
        breaks.sort_unstable();
        breaks.dedup();
        breaks
    }
}

/// `text` with `sentinel` at each of `breaks`. Where the text has the sentinel itself, it is dropped.
pub(super) fn mark(text: &str, breaks: &[usize], sentinel: char) -> String {
    let mut marked = String::with_capacity(text.len() + breaks.len() * sentinel.len_utf8());
    let mut done = 0;
    for &at in breaks {
        marked.extend(text[done..at].chars().filter(|&c| c != sentinel));
        marked.push(sentinel);
        done = at;
    }
    marked.extend(text[done..].chars().filter(|&c| c != sentinel));
    marked
}

#[derive(Default)]
struct Trie {
    /// `(node, byte) -> node`; the root is 0.
    edges: HashMap<(u32, u8), u32>,
    /// The nodes at which a token ends.
    ends: HashSet<u32>,
}

/// How far a text leads into a trie.
struct Walk {
    /// Bytes that are on a path of the trie.
    depth: usize,
    /// All bytes are on the path.
    consumed_all: bool,
    /// Length of the shortest token on the path.
    matched: Option<usize>,
}

impl Trie {
    fn insert(&mut self, bytes: impl Iterator<Item = u8>) {
        let mut node = 0;
        for byte in bytes {
            let next = self.edges.len() as u32 + 1;
            node = *self.edges.entry((node, byte.to_ascii_lowercase())).or_insert(next);
        }
        self.ends.insert(node);
    }

    fn walk(&self, bytes: impl Iterator<Item = u8>) -> Walk {
        let mut walk = Walk { depth: 0, consumed_all: false, matched: None };
        let mut node = 0;
        for byte in bytes {
            match self.edges.get(&(node, byte.to_ascii_lowercase())) {
                Some(&next) => node = next,
                None => return walk,
            }
            walk.depth += 1;
            if walk.matched.is_none() && self.ends.contains(&node) {
                walk.matched = Some(walk.depth);
            }
        }
        walk.consumed_all = true;
        walk
    }
}
