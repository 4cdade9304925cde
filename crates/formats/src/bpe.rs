//! The JSON of a BPE tokenizer, as the tokenizers crate reads it.

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

/// The part `model`. Serialised from the texts where they lie: a [`Value`] would copy hundreds of thousands of them.
///
/// `M` is a merge: two tokens, or one text with a space between them.
#[derive(Debug, Serialize)]
pub(crate) struct Model<'a, M> {
    r#type: &'static str,
    dropout: Option<f32>,
    /// What stands for characters that the vocabulary does not have.
    pub(crate) unk_token: Option<&'a str>,
    continuing_subword_prefix: Option<&'a str>,
    end_of_word_suffix: Option<&'a str>,
    /// Several of those in a row become one.
    pub(crate) fuse_unk: bool,
    /// Characters that the vocabulary does not have become tokens of their bytes.
    pub(crate) byte_fallback: bool,
    /// A word that is a token is that token, whatever the merges say.
    pub(crate) ignore_merges: bool,
    #[serde(serialize_with = "as_map")]
    vocab: Vec<(&'a str, usize)>,
    merges: Vec<M>,
}

impl<'a, M: Serialize> Model<'a, M> {
    /// A model of these tokens, each with its id, and merges, the first before the others.
    pub(crate) fn new(vocab: Vec<(&'a str, usize)>, merges: Vec<M>) -> Self {
        Self {
            r#type: "BPE",
            dropout: None,
            unk_token: None,
            continuing_subword_prefix: None,
            end_of_word_suffix: None,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: false,
            vocab,
            merges,
        }
    }
}

fn as_map<S: Serializer>(vocab: &[(&str, usize)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(vocab.iter().copied())
}

/// The part `decoder` of byte-level BPE.
pub(crate) fn byte_level_decoder() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true})
}
