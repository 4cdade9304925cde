//! The tokenizer out of GGUF metadata, as the parts that [`Tokenizer`](ternion_core::text::Tokenizer) is built from: a
//! `tokenizer.json` is put together from vocabulary, merges and token types.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value, json};
use ternion_core::text::TokenizerParts;
use ternion_core::{Error, Result};

use super::file::duplicate;
use super::{File, PreTokenizer, keys};
use crate::json::shorten;
use crate::synth::CHAT_TEMPLATE;

/// The type of a token, as `tokenizer.ggml.token_type` numbers them.
pub(crate) mod token_type {
    pub(crate) const NORMAL: i32 = 1;
    pub(crate) const UNKNOWN: i32 = 2;
    pub(crate) const CONTROL: i32 = 3;
    pub(crate) const USER_DEFINED: i32 = 4;
    pub(crate) const UNUSED: i32 = 5;
    pub(crate) const BYTE: i32 = 6;
}

/// Bytes of the longest piece of a SentencePiece vocabulary; the library itself stops at 16 characters unless told.
const MAX_PIECE: usize = 256;
const SPACE: &str = "\u{2581}";

/// The tokenizer that a file's metadata describes.
///
/// # Errors
/// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where keys are missing or contradict each other,
/// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for a tokenizer that is not implemented.
pub fn tokenizer_parts(file: &File) -> Result<TokenizerParts> {
    let tokens = Tokens::read(file)?;
    let model =
        file.string(keys::TOKENIZER)?.ok_or_else(|| file.invalid(keys::TOKENIZER, "`gpt2` or `llama`"))?;
    let special_tokens = special_tokens(file, &tokens)?;
    let json = match (file.string(keys::HUGGING_FACE)?, model) {
        // It says itself what it adds.
        (Some(json), _) => json.as_bytes().to_vec(),
        (None, "gpt2") => {
            let rule = pre_tokenizer(file)?;
            let mut json = byte_level(file, &tokens, rule)?;
            json["post_processor"] = post_processor(file, &tokens, rule.adds_bos)?;
            json.to_string().into_bytes()
        }
        (None, "llama") => {
            let mut json = sentence_piece(file, &tokens)?;
            json["post_processor"] = post_processor(file, &tokens, true)?;
            json.to_string().into_bytes()
        }
        _ => return Err(file.unsupported(keys::TOKENIZER, "gpt2, llama")),
    };
    let mut parts = TokenizerParts::new(json);
    parts.special_tokens = special_tokens;
    parts.chat_template = chat_template(file)?;
    Ok(parts)
}

/// The vocabulary.
struct Tokens<'a> {
    texts: Vec<&'a str>,
    types: Vec<i32>,
}

impl<'a> Tokens<'a> {
    fn read(file: &'a File) -> Result<Self> {
        let list = file.array(keys::TOKENS)?.and_then(|tokens| tokens.as_strings());
        let texts: Vec<&str> =
            list.ok_or_else(|| file.invalid(keys::TOKENS, "an array of strings"))?.collect();
        if let Some((id, text)) = duplicate(texts.iter().copied()) {
            return Err(Error::invalid_model(format!(
                "token {id} of `{}` is `{}`, which another token is too",
                keys::TOKENS,
                shorten(&text)
            ))
            .with("file", file.path().display()));
        }
        let types = match file.array(keys::TOKEN_TYPES)? {
            None => vec![token_type::NORMAL; texts.len()],
            Some(types) if types.len() == texts.len() => {
                let types = types.as_integers().map(|types| types.map(|n| n as i32).collect());
                types.ok_or_else(|| file.invalid(keys::TOKEN_TYPES, "an array of integers"))?
            }
            Some(_) => return Err(file.invalid(keys::TOKEN_TYPES, &format!("{} integers", texts.len()))),
        };
        Ok(Self { texts, types })
    }

    fn is_added(&self, id: usize) -> bool {
        matches!(self.types[id], token_type::CONTROL | token_type::USER_DEFINED)
    }

    /// Tokens that a text is searched for before all else, in the form of `tokenizer.json`.
    fn added(&self) -> Vec<Value> {
        let added = (0..self.texts.len()).filter(|&id| self.is_added(id) && !self.texts[id].is_empty());
        added
            .map(|id| {
                json!({
                    "id": id,
                    "content": self.texts[id],
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": false,
                    "normalized": false,
                    "special": self.types[id] == token_type::CONTROL
                })
            })
            .collect()
    }

    /// How many tokens the model itself has. Added tokens behind it are kept apart, as in the files of transformers, so
    /// that text can never become one of them; they take the next ids in their order, which only works if they follow
    /// each other. Unused ids at the very end have no text at all.
    fn model_len(&self) -> usize {
        let count = self.texts.len();
        let unused = (0..count).rev().take_while(|&id| self.types[id] == token_type::UNUSED).count();
        let end = count - unused;
        (0..end).rev().take_while(|&id| self.is_added(id) && !self.texts[id].is_empty()).last().unwrap_or(end)
    }

    fn vocab(&self) -> Map<String, Value> {
        let tokens = self.texts[..self.model_len()].iter().enumerate().filter(|(_, text)| !text.is_empty());
        tokens.map(|(id, &text)| (text.to_owned(), id.into())).collect()
    }
}

fn pre_tokenizer(file: &File) -> Result<&'static PreTokenizer> {
    let name = match file.string(keys::PRE_TOKENIZER)? {
        Some(name) => name,
        // The converter of the official BitNet files did not know the key.
        None if file.architecture()?.starts_with("bitnet") => "llama-bpe",
        None => {
            let expected = format!("one of {}", PreTokenizer::names());
            return Err(file.invalid(keys::PRE_TOKENIZER, &expected));
        }
    };
    PreTokenizer::named(name).ok_or_else(|| file.unsupported(keys::PRE_TOKENIZER, &PreTokenizer::names()))
}

/// Byte-level BPE.
fn byte_level(file: &File, tokens: &Tokens<'_>, rule: &PreTokenizer) -> Result<Value> {
    let list = file.array(keys::MERGES)?.and_then(|merges| merges.as_strings());
    let list = list.ok_or_else(|| file.invalid(keys::MERGES, "an array of strings"))?;
    let mut vocab = tokens.vocab();
    let ids: HashMap<&str, usize> = tokens.texts.iter().enumerate().map(|(id, &text)| (text, id)).collect();
    let mut merges = Vec::new();
    for (index, merge) in list.enumerate() {
        let parts = merge.split_once(' ').filter(|(_, right)| !right.contains(' '));
        let Some((left, right)) = parts else {
            return Err(Error::invalid_model(format!(
                "merge {index} of `{}` is `{}`, expected two tokens with a space between",
                keys::MERGES,
                shorten(&merge)
            ))
            .with("file", file.path().display()));
        };
        // Added tokens may be results of merges too.
        let result = format!("{left}{right}");
        for token in [left, right, &result] {
            match ids.get(token) {
                Some(&id) if vocab.contains_key(token) || tokens.is_added(id) => {
                    vocab.entry(token.to_owned()).or_insert_with(|| id.into());
                }
                _ => {
                    return Err(Error::invalid_model(format!(
                        "merge {index} of `{}` needs the token `{}`, which the vocabulary does not have",
                        keys::MERGES,
                        shorten(&token)
                    ))
                    .with("file", file.path().display()));
                }
            }
        }
        merges.push(json!([left, right]));
    }
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": tokens.added(),
        "normalizer": null,
        "pre_tokenizer": rule.json(),
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": rule.ignore_merges,
            "vocab": vocab,
            "merges": merges
        }
    }))
}

/// SentencePiece's BPE. It has scores instead of merges: of all neighbours whose union is a piece, those with the best
/// score are joined first. So each way to make a piece of two others is a merge, in the order of the pieces' scores.
fn sentence_piece(file: &File, tokens: &Tokens<'_>) -> Result<Value> {
    let scores: Vec<f64> = match file.array(keys::SCORES)? {
        Some(scores) if scores.len() == tokens.texts.len() => {
            scores.as_floats().ok_or_else(|| file.invalid(keys::SCORES, "an array of floats"))?.collect()
        }
        _ => return Err(file.invalid(keys::SCORES, &format!("{} floats", tokens.texts.len()))),
    };
    let ids: HashMap<&str, usize> = tokens.texts.iter().enumerate().map(|(id, &text)| (text, id)).collect();
    let mut merges: Vec<(f64, usize, usize)> = Vec::new();
    let mut splits: Vec<(usize, usize)> = Vec::new();
    for (id, &piece) in tokens.texts.iter().enumerate() {
        if tokens.types[id] != token_type::NORMAL {
            continue;
        }
        if piece.len() > MAX_PIECE {
            return Err(Error::invalid_model(format!(
                "token {id} of `{}` has {} bytes, expected at most {MAX_PIECE}",
                keys::TOKENS,
                piece.len()
            ))
            .with("file", file.path().display()));
        }
        splits.clear();
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                splits.push((left, right));
            }
        }
        splits.sort_unstable();
        merges.extend(splits.iter().map(|&(left, right)| (scores[id], left, right)));
    }
    // Stable: pieces of the same score in the order of their ids.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    let merges: Vec<Value> =
        merges.into_iter().map(|(_, left, right)| json!([tokens.texts[left], tokens.texts[right]])).collect();
    let vocab: Map<String, Value> = tokens
        .texts
        .iter()
        .enumerate()
        .filter(|(_, text)| !text.is_empty())
        .map(|(id, &text)| (text.to_owned(), id.into()))
        .collect();
    let unknown = file.integer(keys::UNK, 0..=u64::from(u32::MAX))?.unwrap_or(0) as usize;
    let prefix = file.boolean(keys::ADD_SPACE)?.unwrap_or(true);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": tokens.added(),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": tokens.texts.get(unknown),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": tokens.texts.contains(&"<0x0A>"),
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges
        }
    }))
}

/// Adds BOS and EOS around a text where the file wants them and has them.
fn post_processor(file: &File, tokens: &Tokens<'_>, adds_bos: bool) -> Result<Value> {
    let token = |flag: &str, default: bool, key: &str| -> Result<Option<(u64, &str)>> {
        if !file.boolean(flag)?.unwrap_or(default) {
            return Ok(None);
        }
        let id = file.integer(key, 0..=u64::from(u32::MAX))?;
        Ok(id.and_then(|id| tokens.texts.get(id as usize).map(|&text| (id, text))))
    };
    let bos = token(keys::ADD_BOS, adds_bos, keys::BOS)?;
    let eos = token(keys::ADD_EOS, false, keys::EOS)?;
    if bos.is_none() && eos.is_none() {
        return Ok(Value::Null);
    }
    let around = |name: &str, type_id: u8| -> Vec<Value> {
        let special = |token: (u64, &str)| json!({"SpecialToken": {"id": token.1, "type_id": type_id}});
        let text = json!({"Sequence": {"id": name, "type_id": type_id}});
        bos.map(special).into_iter().chain([text]).chain(eos.map(special)).collect()
    };
    let special: Map<String, Value> = bos
        .into_iter()
        .chain(eos)
        .map(|(id, text)| (text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    let pair = [around("A", 0), around("B", 1)].concat();
    Ok(json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": pair,
        "special_tokens": special
    }))
}

fn special_tokens(file: &File, tokens: &Tokens<'_>) -> Result<BTreeMap<String, String>> {
    let mut named = BTreeMap::new();
    for (name, key) in [
        ("bos_token", keys::BOS),
        ("eos_token", keys::EOS),
        ("unk_token", keys::UNK),
        ("pad_token", keys::PAD),
    ] {
        let Some(id) = file.integer(key, 0..=u64::from(u32::MAX))? else { continue };
        match tokens.texts.get(id as usize) {
            Some(text) => named.insert(name.to_owned(), (*text).to_owned()),
            None => return Err(file.invalid(key, &format!("an id below {}", tokens.texts.len()))),
        };
    }
    Ok(named)
}

/// The chat template. Official BitNet files hold Llama 3's, which the model was not trained with.
fn chat_template(file: &File) -> Result<Option<String>> {
    let embedded = file.string(keys::CHAT_TEMPLATE)?;
    let is_official =
        matches!(file.architecture()?, "bitnet-b1.58" | "bitnet-25") && file.value(keys::WRITER).is_none();
    if is_official && embedded.is_none_or(|template| template.contains("<|start_header_id|>")) {
        return Ok(Some(CHAT_TEMPLATE.to_owned()));
    }
    Ok(embedded.map(str::to_owned))
}
