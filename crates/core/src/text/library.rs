//! Tokenizers of the tokenizers crate from JSON.
//!
//! That crate's code to read a tokenizer is large and generic, so that each reader and each type of model would have it compiled
//! again, here. `Tokenizer::from_str` is compiled once, there, and nearly everything is read by it. Only BPE models, which have hundreds
//! of thousands of texts, are read directly: `from_str` reads a model into values of JSON first, because its type may come last.

use std::collections::HashMap;

use serde_json::value::RawValue;
use tokenizers::{
    AddedToken, DecoderWrapper, PreTokenizerWrapper, Tokenizer, TokenizerBuilder, models::bpe::BPE,
};

use super::{
    tokenizer::unreadable,
    vocabulary::{Inner, VocabularyModel},
};
use crate::Result;

/// What a `tokenizer.json` describes. `model` is the type of its model.
pub(super) fn read(json: &[u8], model: Option<&str>) -> Result<Inner> {
    let text = std::str::from_utf8(json).map_err(unreadable)?;
    // What cannot be read directly is read, or refused, as the tokenizers crate does it.
    let direct = if model == Some("BPE") { with_bpe(text) } else { None };
    let library = direct.map_or_else(|| text.parse().map_err(unreadable), Ok)?;
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

/// A tokenizer whose model is BPE; `None` where a part cannot be read.
fn with_bpe(text: &str) -> Option<Tokenizer> {
    let mut parts: HashMap<String, &RawValue> = serde_json::from_str(text).ok()?;
    let model: BPE = serde_json::from_str(parts.remove("model")?.get()).ok()?;
    let added = parts.remove("added_tokens").map(|added| serde_json::from_str(added.get()));
    let added: Vec<AddedToken> = added.transpose().ok()?.unwrap_or_default();
    let parts: Vec<(&str, &str)> = parts.iter().map(|(key, part)| (key.as_str(), part.get())).collect();
    let mut library = of_parts(&parts).ok()?;
    library.with_model(model);
    library.add_tokens(added).ok()?;
    Some(library)
}

/// A tokenizer that has these parts and knows no token. `parts` are keys of a `tokenizer.json` with their values.
pub(super) fn of_parts(parts: &[(&str, &str)]) -> Result<Tokenizer> {
    let mut json = String::from("{");
    for (key, part) in parts {
        json.extend([&serde_json::json!(key).to_string(), ":", part, ","]);
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// All parts of a tokenizer, as JSON.
    fn written(tokenizer: &Tokenizer) -> String {
        tokenizer.to_string(false).unwrap()
    }

    #[test]
    fn bpe_that_is_read_directly_is_what_the_crate_reads() {
        let fixtures = ternion_test_support::fixture("");
        let folders = ["nano-packed", "ternion-tiny", "llama-ternary", "gguf-llama", "1bitllm"];
        let dense = ["llama", "mistral", "phi3", "qwen2", "qwen3", "gemma2", "gemma3"];
        let folders =
            folders.map(ToOwned::to_owned).into_iter().chain(dense.map(|name| format!("dense/{name}")));
        let mut direct = 0;
        for folder in folders {
            let text = fs::read_to_string(fixtures.join(&folder).join("tokenizer.json")).unwrap();
            let expected: Tokenizer = text.parse().unwrap();
            let is_bpe = matches!(expected.get_model(), tokenizers::ModelWrapper::BPE(_));
            if is_bpe {
                assert_eq!(written(&with_bpe(&text).unwrap()), written(&expected), "{folder}");
                direct += 1;
            }
        }
        assert!(direct >= 5, "{direct}");
    }

    #[test]
    fn merges_as_texts_and_all_settings_are_read() {
        let text = r#"{
            "padding": null, "version": "1.0", "added_tokens": [{"id": 4, "content": "<s>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "normalizer": {"type": "NFC"},
            "model": {"unk_token": "a", "fuse_unk": true, "byte_fallback": true, "ignore_merges": true, "dropout": null,
                "continuing_subword_prefix": "", "end_of_word_suffix": "", "vocab": {"a": 0, "b": 1, "ab": 2, "ab b": 3},
                "merges": ["a b"], "type": "BPE"}
        }"#;
        assert_eq!(written(&with_bpe(text).unwrap()), written(&text.parse().unwrap()));
        for (from, to) in [("\"a b\"", "\"a c\""), ("\"vocab\"", "\"words\""), ("\"1.0\"", "\"2.0\"")] {
            let text = text.replace(from, to);
            assert!(with_bpe(&text).is_none() && text.parse::<Tokenizer>().is_err(), "{to}");
            assert!(read(text.as_bytes(), Some("BPE")).is_err(), "{to}");
        }
    }
}
