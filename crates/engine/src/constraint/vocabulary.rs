//! The model's vocabulary as the grammars see it: the bytes of each token.

use std::sync::Arc;

use llguidance::toktrie::{INVALID_TOKEN, TokRxInfo, TokTrie, TokenizerEnv};
use ternion_core::text::Tokenizer;

/// The bytes of all tokens, and the tokenizer that says which tokens a text becomes.
pub(super) struct Vocabulary {
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
    /// Tokens of one or two line feeds.
    line_breaks: Vec<u32>,
}

impl Vocabulary {
    /// The vocabulary of a model with `vocab_size` logits. Ids that the tokenizer does not have are in no grammar.
    pub(super) fn new(tokenizer: Arc<Tokenizer>, vocab_size: usize, end_tokens: &[u32]) -> Self {
        let words: Vec<Vec<u8>> = (0..vocab_size as u32).map(|id| word(&tokenizer, id, end_tokens)).collect();
        let ends: Vec<u32> = end_tokens.iter().copied().filter(|&id| (id as usize) < vocab_size).collect();
        let end = ends.first().copied().unwrap_or(INVALID_TOKEN);
        let mut trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, end), &words);
        if ends.len() > 1 {
            trie = trie.with_eos_tokens(&ends);
        }
        let line_breaks = [&b"\n"[..], b"\n\n"].iter().filter_map(|bytes| trie.token_id(bytes)).collect();
        Self { tokenizer, trie, line_breaks }
    }

    pub(super) fn line_breaks(&self) -> &[u32] {
        &self.line_breaks
    }

    /// The tokens that begin with `text` and go on.
    pub(super) fn tokens_beyond(&self, text: &str) -> Vec<u32> {
        let mut found = Vec::new();
        let mut nodes: Vec<_> =
            self.trie.child_at_bytes(self.trie.root(), text.as_bytes()).into_iter().collect();
        while let Some(node) = nodes.pop() {
            for child in self.trie.node_children(node) {
                found.extend(child.token_id());
                nodes.push(child);
            }
        }
        found
    }

    /// The tokens that the tokenizer makes of a text within another text; `None` where they stand for other bytes.
    fn encode(&self, text: &str) -> Option<Vec<u32>> {
        let is_exact = |ids: &[u32]| {
            ids.iter().all(|&id| (id as usize) < self.trie.vocab_size())
                && ids.iter().flat_map(|&id| self.trie.token(id)).eq(text.as_bytes())
        };
        let ids = self.tokenizer.encode_within(text).ok()?;
        if is_exact(&ids) {
            return Some(ids);
        }
        // A tokenizer may put a space before every text. Then the tokens are those after a line feed and its space.
        let ids = self.tokenizer.encode_within(&format!("\n{text}")).ok()?;
        (1..=ids.len().min(3)).find(|&at| is_exact(&ids[at..])).map(|at| ids[at..].to_vec())
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        let ids = std::str::from_utf8(bytes).ok().and_then(|text| self.encode(text));
        ids.unwrap_or_else(|| self.trie.greedy_tokenize(bytes))
    }
}

/// The bytes of a token, or its name behind the marker of special tokens. A grammar allows a special token only where it names it.
fn word(tokenizer: &Tokenizer, id: u32, end_tokens: &[u32]) -> Vec<u8> {
    let Some(name) = tokenizer.token(id).filter(|name| !name.is_empty()) else { return Vec::new() };
    // Tags such as `<tool_call>` have a text, but stand for it only where a template puts them.
    let is_tag = || tokenizer.is_added(id) && name.starts_with('<') && name.ends_with('>');
    if tokenizer.is_special(id) || end_tokens.contains(&id) || is_tag() {
        return [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat();
    }
    tokenizer.token_bytes(id).unwrap_or_default()
}
