//! The tokenizer as GGUF metadata. What the keys cannot describe is kept whole as `tokenizer.huggingface.json` too.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::{Value, json};
use ternion_core::text::{Pipeline, Tokenizer, TokenizerParts};
use ternion_core::{Error, Result};

use crate::gguf::keys;
use crate::gguf::{Array, File, PreTokenizer, Writer, token_type, tokenizer_parts};
use crate::{Checkpoint, SharedBytes};

/// Sets all keys of the tokenizer and the chat template.
pub(super) fn set(out: &mut Writer, checkpoint: &Checkpoint) -> Result<()> {
    let parts = checkpoint.tokenizer_parts()?;
    let tokenizer =
        Tokenizer::from_parts(parts.clone()).map_err(|e| e.with("folder", checkpoint.folder.display()))?;
    // What the side files say belongs to what is written.
    let is_whole = parts.added_tokens.is_empty() && parts.pipeline == Pipeline::AsWritten;
    let merged = if is_whole { None } else { Some(tokenizer.to_json()?) };
    let json: Value = serde_json::from_slice(merged.as_ref().unwrap_or(&parts.tokenizer_json))
        .map_err(|e| Error::invalid_model("tokenizer.json is damaged").with_source(e))?;
    let pairs = Pairs::new(&json, &tokenizer, &parts, checkpoint)?;
    let whole = !describes(&pairs, &json)?;
    for (key, value) in pairs.0 {
        out.set(key, value);
    }
    if whole {
        out.set(keys::HUGGING_FACE, json.to_string());
    }
    if let Some(template) = parts.chat_template {
        out.set(keys::CHAT_TEMPLATE, template);
    }
    Ok(())
}

/// Keys and values of a vocabulary.
struct Pairs(Vec<(&'static str, crate::gguf::Value)>);

impl Pairs {
    fn new(
        json: &Value,
        tokenizer: &Tokenizer,
        parts: &TokenizerParts,
        checkpoint: &Checkpoint,
    ) -> Result<Self> {
        let mut pairs = Self(Vec::new());
        let model = &json["model"];
        let (tokens, types) = tokens(json, checkpoint.spec.vocab_size);
        let merges = merges(model);
        let rule = PreTokenizer::of(&json["pre_tokenizer"], model["ignore_merges"] == true);
        let pieces = model["byte_fallback"] == true;
        pairs.set(keys::TOKENIZER, if pieces { "llama" } else { "gpt2" });
        pairs.set(keys::TOKENS, Array::strings(tokens.iter().map(String::as_str)));
        pairs.set(keys::TOKEN_TYPES, Array::i32s(&types));
        if pieces {
            pairs.set(keys::SCORES, Array::f32s(&scores(&tokens, &merges)));
            let prefix = json["normalizer"].to_string().contains("\"Prepend\"");
            pairs.set(keys::ADD_SPACE, prefix);
        } else {
            // Where no name fits, the whole tokenizer is kept, and this is the nearest for other programs.
            pairs.set(keys::PRE_TOKENIZER, rule.map_or("llama-bpe", PreTokenizer::name));
            let lines: Vec<String> = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
            pairs.set(keys::MERGES, Array::strings(lines.iter().map(String::as_str)));
        }
        let id = |text: &str| tokens.iter().position(|token| token == text).map(|id| id as u32);
        let bos = tokenizer.bos_id().or(checkpoint.spec.bos);
        let eos = tokenizer.eos_id().or(checkpoint.spec.eos.first().copied());
        let named = |name: &str| parts.special_tokens.get(name).and_then(|text| id(text));
        for (key, value) in [
            (keys::BOS, bos),
            (keys::EOS, eos),
            (keys::EOT, id("<|eot_id|>")),
            (keys::UNK, named("unk_token")),
            (keys::PAD, named("pad_token")),
        ] {
            if let Some(value) = value {
                pairs.set(key, value);
            }
        }
        let (plain, around) = (tokenizer.encode("a", false)?, tokenizer.encode("a", true)?);
        let before = around.len().saturating_sub(plain.len()) > 0;
        pairs.set(keys::ADD_BOS, before && around.first().copied() == bos && plain.first().copied() != bos);
        pairs.set(keys::ADD_EOS, before && around.last().copied() == eos && plain.last().copied() != eos);
        Ok(pairs)
    }

    fn set(&mut self, key: &'static str, value: impl Into<crate::gguf::Value>) {
        self.0.push((key, value.into()));
    }
}

/// All tokens by their ids, and their types. Ids without a token get a name that is not in use.
fn tokens(json: &Value, vocab_size: usize) -> (Vec<String>, Vec<i32>) {
    let mut known: BTreeMap<usize, (&str, i32)> = BTreeMap::new();
    for (text, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        if let Some(id) = id.as_u64() {
            let byte = text.len() == 6 && text.starts_with("<0x") && json["model"]["byte_fallback"] == true;
            known.insert(id as usize, (text, if byte { token_type::BYTE } else { token_type::NORMAL }));
        }
    }
    let unknown = json["model"]["unk_token"].as_str();
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        if let (Some(id), Some(text)) = (token["id"].as_u64(), token["content"].as_str()) {
            let kind = match token["special"] == true {
                _ if unknown == Some(text) => token_type::UNKNOWN,
                true => token_type::CONTROL,
                false => token_type::USER_DEFINED,
            };
            known.insert(id as usize, (text, kind));
        }
    }
    let taken: HashSet<&str> = known.values().map(|(text, _)| *text).collect();
    let mut out = (Vec::new(), Vec::new());
    for id in 0..vocab_size {
        if let Some((text, kind)) = known.get(&id) {
            out.0.push((*text).to_owned());
            out.1.push(*kind);
            continue;
        }
        let mut name = format!("[PAD{id}]");
        while taken.contains(name.as_str()) {
            name.push('_');
        }
        out.0.push(name);
        out.1.push(token_type::UNUSED);
    }
    out
}

/// The merges in either of their forms: `"a b"` and `["a", "b"]`.
fn merges(model: &Value) -> Vec<(&str, &str)> {
    let list = model["merges"].as_array().into_iter().flatten();
    list.filter_map(|merge| match merge {
        Value::String(text) => text.split_once(' '),
        pair => Some((pair[0].as_str()?, pair[1].as_str()?)),
    })
    .collect()
}

/// Scores that put pieces into the order of the merges that make them.
fn scores(tokens: &[String], merges: &[(&str, &str)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    tokens.iter().map(|token| ranks.get(token).map_or(0.0, |&rank| -1.0 - rank as f32)).collect()
}

/// Whether the tokenizer that will be read from these pairs is the one of `json`.
fn describes(pairs: &Pairs, json: &Value) -> Result<bool> {
    let mut writer = Writer::new();
    writer.set(keys::ARCHITECTURE, "bitnet");
    writer.set(keys::WRITER, env!("CARGO_PKG_VERSION"));
    for (key, value) in &pairs.0 {
        writer.set(*key, value.clone());
    }
    let bytes = writer.begin(Vec::new()).and_then(crate::gguf::DataWriter::finish);
    let bytes = bytes.map_err(|e| Error::invalid_model("the tokenizer cannot be written").with_source(e))?;
    let Ok(parts) =
        File::parse(&SharedBytes::from(bytes), "tokenizer").and_then(|file| tokenizer_parts(&file))
    else {
        return Ok(false);
    };
    let read: Value = serde_json::from_slice(&parts.tokenizer_json)
        .map_err(|e| Error::invalid_model("the tokenizer cannot be written").with_source(e))?;
    Ok(essence(&read) == essence(json))
}

/// What of a tokenizer decides about ids and text.
fn essence(json: &Value) -> Value {
    let model = &json["model"];
    let mut vocab: BTreeMap<&str, &Value> =
        model["vocab"].as_object().into_iter().flatten().map(|(k, v)| (k.as_str(), v)).collect();
    let has_normalizer = !json["normalizer"].is_null();
    let mut added: BTreeMap<u64, Value> = BTreeMap::new();
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        if let Some(text) = token["content"].as_str() {
            vocab.insert(text, &token["id"]);
        }
        let flag = |name: &str| token[name] == true;
        let flags = [
            flag("special"),
            flag("single_word"),
            flag("lstrip"),
            flag("rstrip"),
            has_normalizer && flag("normalized"),
        ];
        added.insert(token["id"].as_u64().unwrap_or_default(), json!([token["content"], flags]));
    }
    let flag = |name: &str| model[name] == true;
    let byte_level = json["decoder"].to_string().contains("\"ByteLevel\"");
    json!({
        "type": model["type"],
        "vocab": vocab,
        "merges": merges(model),
        "flags": [flag("ignore_merges"), flag("byte_fallback")],
        "unk": model["unk_token"],
        "added": added,
        "normalizer": json["normalizer"],
        "pre": PreTokenizer::of(&json["pre_tokenizer"], flag("ignore_merges")).map(PreTokenizer::name),
        "no_pre": json["pre_tokenizer"].is_null(),
        "decoder": if byte_level { Value::Null } else { json["decoder"].clone() },
    })
}
