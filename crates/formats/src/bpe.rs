//! The JSON of a BPE tokenizer, as the tokenizers crate reads it.

use serde_json::{Value, json};

/// What distinguishes the models that are written.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct BpeOptions<'a> {
    /// What stands for characters that the vocabulary does not have.
    pub(crate) unk_token: Option<&'a str>,
    /// Several of those in a row become one.
    pub(crate) fuse_unk: bool,
    /// Characters that the vocabulary does not have become tokens of their bytes.
    pub(crate) byte_fallback: bool,
    /// A word that is a token is that token, whatever the merges say.
    pub(crate) ignore_merges: bool,
}

/// The part `model`.
pub(crate) fn model(vocab: Value, merges: Value, options: BpeOptions<'_>) -> Value {
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": options.unk_token,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": options.fuse_unk,
        "byte_fallback": options.byte_fallback,
        "ignore_merges": options.ignore_merges,
        "vocab": vocab,
        "merges": merges
    })
}

/// The part `decoder` of byte-level BPE.
pub(crate) fn byte_level_decoder() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true})
}
