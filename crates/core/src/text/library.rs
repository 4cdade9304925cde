//! Tokenizers of the tokenizers crate from JSON.
//!
//! That crate's code to read a tokenizer is large and generic, so that each reader and each type of model would have it compiled
//! again, here. `Tokenizer::from_str` is compiled once, there, and everything is read by it.

use tokenizers::{DecoderWrapper, PreTokenizerWrapper, Tokenizer, TokenizerBuilder};

use super::{
    tokenizer::unreadable,
    vocabulary::{Inner, VocabularyModel},
};
use crate::Result;

/// What a `tokenizer.json` describes.
pub(super) fn read(json: &[u8]) -> Result<Inner> {
    let library: Tokenizer = std::str::from_utf8(json).map_err(unreadable)?.parse().map_err(unreadable)?;
    let builder = TokenizerBuilder::new()
        .with_normalizer(library.get_normalizer().cloned())
        .with_pre_tokenizer(library.get_pre_tokenizer().cloned())
        .with_post_processor(library.get_post_processor().cloned())
        .with_decoder(library.get_decoder().cloned())
        .with_added_vocabulary(library.get_added_vocabulary().clone())
        .with_truncation(library.get_truncation().cloned())
        .with_padding(library.get_padding().cloned());
    builder.with_model(VocabularyModel::Library(library)).build().map_err(unreadable)
}

/// A tokenizer that has these parts and knows no token. `parts` are keys of a `tokenizer.json` with their values.
pub(super) fn of_parts(parts: &[(&str, &str)]) -> Result<Tokenizer> {
    let mut json = String::from("{");
    for (key, part) in parts {
        json.extend(["\"", key, "\":", part, ","]);
    }
    json.push_str(r#""model":{"type":"WordLevel","vocab":{},"unk_token":""}}"#);
    json.parse().map_err(unreadable)
}

pub(super) fn pre_tokenizer(json: &serde_json::Value) -> Result<Option<PreTokenizerWrapper>> {
    Ok(of_parts(&[("pre_tokenizer", &json.to_string())])?.get_pre_tokenizer().cloned())
}

pub(super) fn decoder(json: &serde_json::Value) -> Result<Option<DecoderWrapper>> {
    Ok(of_parts(&[("decoder", &json.to_string())])?.get_decoder().cloned())
}
