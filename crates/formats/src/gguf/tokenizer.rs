//! The tokenizer out of GGUF metadata, as the parts that [`Tokenizer`](ternion_core::text::Tokenizer) is built from: a
//! `tokenizer.json` is put together from vocabulary, merges and token types.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;
use serde_json::{Map, Value, json};
use ternion_core::text::TokenizerParts;
use ternion_core::{Error, Result};

use super::special::SpecialIds;
use super::vocabulary::Vocabulary;
use super::{File, PreTokenizer, keys, pre_tokenizer, token_type};
use crate::CheckpointOptions;
use crate::bpe;
use crate::json::shorten;
use crate::synth::CHAT_TEMPLATE;

/// Bytes of the longest piece of a SentencePiece vocabulary; the library itself stops at 16 characters unless told.
const MAX_PIECE: usize = 256;
const SPACE: &str = "\u{2581}";

/// The tokenizer that a file's metadata describes.
///
/// # Errors
/// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where keys are missing or contradict each other,
/// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for a tokenizer that is not implemented.
pub fn tokenizer_parts(file: &File) -> Result<TokenizerParts> {
    tokenizer_parts_as(file, &CheckpointOptions::default())
}

/// Whether a text is split by a rule that `tokenizer.ggml.pre` or an option names.
pub(crate) fn names_rule(file: &File) -> bool {
    file.value(keys::HUGGING_FACE).is_none() && matches!(file.string(keys::TOKENIZER), Ok(Some("gpt2")))
}

/// Whether nothing says by which rule a text is split: neither the file, nor an option, nor what is known of the official BitNet
/// files. The rule is then llama.cpp's `default`.
///
/// # Errors
/// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where a key has the wrong type.
pub fn splits_by_default(file: &File, options: &CheckpointOptions) -> Result<bool> {
    let says = options.pre_tokenizer.is_some() || !names_rule(file);
    Ok(!says && stated_rule(file)? == pre_tokenizer::DEFAULT)
}

/// [`tokenizer_parts`] of a file whose facts are partly set by hand.
pub(crate) fn tokenizer_parts_as(file: &File, options: &CheckpointOptions) -> Result<TokenizerParts> {
    let vocabulary = Vocabulary::read(file)?;
    let model =
        file.string(keys::TOKENIZER)?.ok_or_else(|| file.invalid(keys::TOKENIZER, "`gpt2` or `llama`"))?;
    let ids = SpecialIds::read(file, vocabulary.texts.len())?;
    let mut warnings = Vec::new();
    let mut doubts = Vec::new();
    let mut around = |adds_bos: bool| {
        let adds_bos = file.boolean(keys::ADD_BOS)?.unwrap_or(adds_bos);
        let bos_is_set = options.bos.is_some() || options.add_bos.is_some();
        doubts.extend(ids.warnings(file, &vocabulary, adds_bos && !bos_is_set));
        post_processor(file, &vocabulary, ids, adds_bos)
    };
    let json = match (file.string(keys::HUGGING_FACE)?, model) {
        // It says itself what it adds.
        (Some(json), _) => json.as_bytes().to_vec(),
        (None, "gpt2") => {
            let rule = pre_tokenizer(file, options, &mut warnings)?;
            let mut json = byte_level(file, &vocabulary, rule)?;
            json.post_processor = around(rule.adds_bos)?;
            json.to_bytes()?
        }
        (None, "llama") => {
            let mut json = sentence_piece(file, &vocabulary, ids)?;
            json.post_processor = around(true)?;
            json.to_bytes()?
        }
        (None, other) => {
            return Err(Error::unsupported(format!(
                "`{}` is \"{}\", a kind of tokenizer that is not supported (gpt2 and llama are); a `tokenizer.json` of \
                 the model in the file's folder is used instead",
                keys::TOKENIZER,
                shorten(&other)
            ))
            .with("file", file.path().display()));
        }
    };
    let mut parts = TokenizerParts::new(json);
    parts.special_tokens = special_tokens(&vocabulary, ids);
    parts.chat_template = chat_template(file)?;
    warnings.extend(doubts);
    parts.warnings = warnings;
    Ok(parts)
}

/// The rule that the file names, or else the one that llama.cpp takes.
fn pre_tokenizer(
    file: &File,
    options: &CheckpointOptions,
    warnings: &mut Vec<String>,
) -> Result<&'static PreTokenizer> {
    if let Some(name) = &options.pre_tokenizer {
        return PreTokenizer::named(name).ok_or_else(|| {
            Error::invalid_config(format!("pre_tokenizer: `{}` is no rule that is known", shorten(name)))
        });
    }
    let name = stated_rule(file)?;
    if name == pre_tokenizer::DEFAULT && file.string(keys::PRE_TOKENIZER)?.is_none_or(str::is_empty) {
        warnings.push(format!(
            "`{}` is missing: text is split by the rule `{name}`, as in llama.cpp, which may not be the model's own; the \
             option `pre_tokenizer` decides",
            keys::PRE_TOKENIZER,
        ));
    }
    PreTokenizer::named(name).ok_or_else(|| {
        Error::unsupported(format!(
            "`{}` is \"{}\", a rule that is not known; the option `pre_tokenizer` names another, and a `tokenizer.json` of \
             the model in the file's folder is used instead",
            keys::PRE_TOKENIZER,
            shorten(&name)
        ))
        .with("file", file.path().display())
    })
}

/// The rule that the file names, or the one for files that name none.
fn stated_rule(file: &File) -> Result<&str> {
    Ok(match file.string(keys::PRE_TOKENIZER)? {
        Some(name) if !name.is_empty() => name,
        // The converter of the official BitNet files did not know the key.
        _ if file.architecture()?.starts_with("bitnet") => "llama-bpe",
        _ => pre_tokenizer::DEFAULT,
    })
}

/// A `tokenizer.json`.
#[derive(Serialize)]
struct TokenizerJson<'a> {
    version: &'static str,
    truncation: Value,
    padding: Value,
    added_tokens: Vec<Value>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: bpe::Model<'a, (&'a str, &'a str)>,
}

impl<'a> TokenizerJson<'a> {
    fn new(tokens: &Vocabulary<'_>, decoder: Value, model: bpe::Model<'a, (&'a str, &'a str)>) -> Self {
        Self {
            version: "1.0",
            truncation: Value::Null,
            padding: Value::Null,
            added_tokens: tokens.added(),
            normalizer: Value::Null,
            pre_tokenizer: Value::Null,
            post_processor: Value::Null,
            decoder,
            model,
        }
    }

    fn to_bytes(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self)
            .map_err(|error| Error::backend("cannot write the tokenizer as JSON").with_source(error))
    }
}

/// Byte-level BPE.
fn byte_level<'a>(file: &'a File, tokens: &Vocabulary<'a>, rule: &PreTokenizer) -> Result<TokenizerJson<'a>> {
    let list = file.array(keys::MERGES)?.and_then(|merges| merges.as_strings());
    // Kimi K2's tokenizer has ranks of tokens and no merges.
    let has_none = rule.name() == "kimi-k2" && file.value(keys::MERGES).is_none();
    let missing = || file.invalid(keys::MERGES, "an array of strings");
    let list = if has_none { None } else { Some(list.ok_or_else(missing)?) };
    let mut is_used = vec![false; tokens.texts.len()];
    tokens.model().for_each(|id| is_used[id] = true);
    let ids: HashMap<&str, usize> = tokens.texts.iter().enumerate().map(|(id, &text)| (text, id)).collect();
    let mut result = String::new();
    let mut merges = Vec::new();
    for (index, merge) in list.into_iter().flatten().enumerate() {
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
        result.clear();
        result.extend([left, right]);
        for token in [left, right, &result] {
            match ids.get(token) {
                Some(&id) if is_used[id] => {}
                Some(&id) if tokens.is_added(id) => is_used[id] = true,
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
        merges.push((left, right));
    }
    let used = (0..tokens.texts.len()).filter(|id| is_used[*id]);
    let vocab = used.map(|id| (tokens.texts[id], id)).collect();
    let mut model = bpe::Model::new(vocab, merges);
    model.ignore_merges = rule.ignore_merges;
    let mut json = TokenizerJson::new(tokens, bpe::byte_level_decoder(), model);
    json.pre_tokenizer = rule.json();
    Ok(json)
}

/// SentencePiece's BPE. It has scores instead of merges: of all neighbours whose union is a piece, those with the best
/// score are joined first. So each way to make a piece of two others is a merge, in the order of the pieces' scores.
fn sentence_piece<'a>(file: &File, tokens: &Vocabulary<'a>, ids: SpecialIds) -> Result<TokenizerJson<'a>> {
    let scores: Vec<f64> = match file.array(keys::SCORES)? {
        Some(scores) if scores.len() >= tokens.texts.len() => {
            let invalid = || file.invalid(keys::SCORES, "an array of numbers");
            match (scores.as_floats(), scores.as_integers()) {
                (Some(floats), _) => floats.collect(),
                (None, integers) => integers.ok_or_else(invalid)?.map(|n| n as f64).collect(),
            }
        }
        _ => return Err(file.invalid(keys::SCORES, &format!("{} floats", tokens.texts.len()))),
    };
    let known: HashMap<&str, usize> = tokens.texts.iter().enumerate().map(|(id, &text)| (text, id)).collect();
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
            if let (Some(&left), Some(&right)) = (known.get(left), known.get(right)) {
                splits.push((left, right));
            }
        }
        splits.sort_unstable();
        merges.extend(splits.iter().map(|&(left, right)| (scores[id], left, right)));
    }
    // Stable: pieces of the same score in the order of their ids.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    let merges =
        merges.into_iter().map(|(_, left, right)| (tokens.texts[left], tokens.texts[right])).collect();
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
    let mut model = bpe::Model::new(tokens.all(), merges);
    model.unk_token = ids.unk.map(|id| tokens.texts[id as usize]);
    model.fuse_unk = true;
    model.byte_fallback = tokens.texts.contains(&"<0x0A>");
    let mut json = TokenizerJson::new(tokens, json!({"type": "Sequence", "decoders": decoders}), model);
    json.normalizer = json!({"type": "Sequence", "normalizers": normalizers});
    Ok(json)
}

/// Adds BOS and EOS around a text where the file wants them and has them.
fn post_processor(file: &File, tokens: &Vocabulary<'_>, ids: SpecialIds, adds_bos: bool) -> Result<Value> {
    let adds_eos = file.boolean(keys::ADD_EOS)?.unwrap_or(false);
    let token =
        |wanted: bool, id: Option<u32>| id.filter(|_| wanted).map(|id| (id, tokens.texts[id as usize]));
    let (bos, eos) = (token(adds_bos, ids.bos), token(adds_eos, ids.eos));
    if bos.is_none() && eos.is_none() {
        return Ok(Value::Null);
    }
    let around = |name: &str, type_id: u8| -> Vec<Value> {
        let special = |token: (u32, &str)| json!({"SpecialToken": {"id": token.1, "type_id": type_id}});
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

fn special_tokens(tokens: &Vocabulary<'_>, ids: SpecialIds) -> BTreeMap<String, String> {
    let named =
        [("bos_token", ids.bos), ("eos_token", ids.eos), ("unk_token", ids.unk), ("pad_token", ids.pad)];
    let texts = named.into_iter().filter_map(|(name, id)| Some((name, tokens.texts[id? as usize])));
    texts.map(|(name, text)| (name.to_owned(), text.to_owned())).collect()
}

/// The chat template. Official BitNet files hold Llama 3's, which the model was not trained with; theirs is given instead.
///
/// # Errors
/// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where its key has another type.
pub fn chat_template(file: &File) -> Result<Option<String>> {
    let embedded = file.string(keys::CHAT_TEMPLATE)?;
    let is_official =
        matches!(file.architecture()?, "bitnet-b1.58" | "bitnet-25") && file.value(keys::WRITER).is_none();
    if is_official && embedded.is_none_or(|template| template.contains("<|start_header_id|>")) {
        return Ok(Some(CHAT_TEMPLATE.to_owned()));
    }
    Ok(embedded.map(str::to_owned))
}
