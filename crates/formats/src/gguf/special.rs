//! The special tokens of a GGUF file: which ids they have, which of them end an answer, and what llama.cpp assumes where
//! the metadata does not say.

use std::collections::HashSet;

use ternion_core::Result;

use super::vocabulary::Vocabulary;
use super::{File, PreTokenizer, keys, token_type};
use crate::json::shorten;

/// Tokens that end an answer wherever a vocabulary has them.
const ENDS: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Tokens for filling in the middle, by the key that names one of them. `true`: the token ends an answer too.
const FILL: [(&str, &[&str], bool); 6] = [
    (
        keys::FIM_PREFIX,
        &[
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ],
        false,
    ),
    (
        keys::FIM_SUFFIX,
        &[
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ],
        false,
    ),
    (
        keys::FIM_MIDDLE,
        &[
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ],
        false,
    ),
    (keys::FIM_PAD, &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"], true),
    (keys::FIM_REPOSITORY, &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"], true),
    (keys::FIM_SEPARATOR, &["<|file_sep|>"], true),
];

/// Parts of an answer in OpenAI's Harmony format, which people are to see.
const VISIBLE: [&str; 4] = ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

/// The ids of the special tokens that the metadata names or llama.cpp assumes.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub(super) struct SpecialIds {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) unk: Option<u32>,
    pub(super) pad: Option<u32>,
}

impl SpecialIds {
    /// Reads the ids for a vocabulary of `count` tokens.
    ///
    /// # Errors
    /// Where an id has the wrong type.
    pub(super) fn read(file: &File, count: usize) -> Result<Self> {
        let assumed = Self::assumed(file)?;
        let id = |key: &str, assumed: Option<u32>| -> Result<Option<u32>> {
            Ok(stated(file, key, count)?.or(assumed.filter(|&id| (id as usize) < count)))
        };
        Ok(Self {
            bos: id(keys::BOS, assumed.bos)?,
            eos: id(keys::EOS, assumed.eos)?,
            unk: id(keys::UNK, assumed.unk)?,
            pad: id(keys::PAD, assumed.pad)?,
        })
    }

    /// What llama.cpp assumes where a key is missing. A file of our own names all that there are.
    fn assumed(file: &File) -> Result<Self> {
        if file.value(keys::WRITER).is_some() {
            return Ok(Self::default());
        }
        Ok(match file.string(keys::TOKENIZER)? {
            Some("llama") => Self { bos: Some(1), eos: Some(2), unk: Some(0), pad: None },
            Some("gpt2") => {
                let lacks_bos = file
                    .string(keys::PRE_TOKENIZER)?
                    .and_then(PreTokenizer::named)
                    .is_some_and(|rule| rule.lacks_bos);
                Self { bos: (!lacks_bos).then_some(11), eos: Some(11), unk: None, pad: None }
            }
            _ => Self::default(),
        })
    }

    /// What is doubtful about the ids that the file does not name: an assumed token that is no control token.
    pub(super) fn warnings(&self, file: &File, vocabulary: &Vocabulary<'_>, adds_bos: bool) -> Vec<String> {
        let doubtful = |key: &str, id: Option<u32>, what: &str| {
            let id = id.filter(|_| stated(file, key, vocabulary.texts.len()).is_ok_and(|id| id.is_none()))?;
            let (text, kind) = (vocabulary.texts[id as usize], vocabulary.types[id as usize]);
            (kind != token_type::CONTROL).then(|| {
                format!(
                    "`{key}` is missing: as in llama.cpp, token {id} {what}, but it is `{}`, which is no control token",
                    shorten(&text)
                )
            })
        };
        let bos = adds_bos
            .then(|| doubtful(keys::BOS, self.bos, "begins a text (the options `add_bos` and `bos` decide)"));
        [bos.flatten(), doubtful(keys::EOS, self.eos, "ends an answer (`end_tokens` of the model decides)")]
            .into_iter()
            .flatten()
            .collect()
    }
}

/// The id that a key states. Shrunken models and some converters (-1 for "none") state ids that the vocabulary of `count`
/// tokens does not have; as in llama.cpp, these count as not stated.
fn stated(file: &File, key: &str, count: usize) -> Result<Option<u32>> {
    match file.value(key).map(super::Value::as_integer) {
        Some(Some(id)) if id < 0 || id >= count as i128 => Ok(None),
        _ => Ok(file.integer(key, 0..=u64::from(u32::MAX))?.map(|id| id as u32)),
    }
}

/// Corrects the types of tokens as llama.cpp does by their names: converters write some control tokens as normal ones.
pub(super) fn correct_types(file: &File, texts: &[&str], types: &mut [i32]) {
    if file.value(keys::WRITER).is_some() {
        return;
    }
    let mut control: HashSet<&str> = ENDS.into();
    for (key, names, _) in FILL {
        if file.value(key).is_none() {
            control.extend(names);
        }
    }
    let mut seen = HashSet::new();
    for (text, kind) in texts.iter().zip(&mut *types) {
        if control.contains(text) {
            seen.insert(*text);
            *kind = token_type::CONTROL;
        } else if VISIBLE.contains(text) {
            *kind = token_type::USER_DEFINED;
        }
    }
    let exceptions = exceptions(|name| seen.contains(name));
    for (name, corrected) in exceptions {
        if let Some(id) = texts.iter().position(|text| *text == name) {
            types[id] = corrected;
        }
    }
}

/// Tokens that end no answer although they are in [`ENDS`], with their types, in a vocabulary that has certain others.
fn exceptions(has: impl Fn(&str) -> bool) -> Vec<(&'static str, i32)> {
    let calls = has("<|call|>") || has("<|calls|>");
    let harmony = calls && (has("<|return|>") || has("<|flush|>"));
    let plain = has("<|tool_response>") || has("<|plamo:eos|>");
    let found = [
        (harmony && has("<|end|>"), ("<|end|>", token_type::USER_DEFINED)),
        (plain && has("</s>"), ("</s>", token_type::NORMAL)),
    ];
    found.into_iter().filter_map(|(is, token)| is.then_some(token)).collect()
}

/// The tokens that end an answer, among the first `vocab_size`: a list where Ternion wrote the file, else those that the
/// metadata names, those that llama.cpp assumes and those that it knows by name.
///
/// # Errors
/// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where a key has the wrong type.
pub fn end_tokens(file: &File, vocab_size: usize) -> Result<Vec<u32>> {
    if let Some(list) = file.array(keys::EOS_LIST)? {
        let ids =
            list.as_integers().map(|ids| ids.filter_map(|id| u32::try_from(id).ok()).collect::<Vec<_>>());
        let mut ids = ids.ok_or_else(|| file.invalid(keys::EOS_LIST, "token ids"))?;
        ids.retain(|&id| (id as usize) < vocab_size);
        return Ok(ids);
    }
    let mut ids: Vec<u32> = SpecialIds::read(file, vocab_size)?.eos.into_iter().collect();
    let mut names: HashSet<&str> = ENDS.into();
    let mut named = vec![keys::EOT, keys::EOM];
    for (key, fill, ends) in FILL {
        match file.value(key) {
            _ if !ends => {}
            Some(_) => named.push(key),
            None => names.extend(fill),
        }
    }
    for key in named {
        ids.extend(stated(file, key, vocab_size)?);
    }
    if let Some(texts) = file.array(keys::TOKENS)?.and_then(|tokens| tokens.as_strings()) {
        let mut found: Vec<(u32, &str)> = Vec::new();
        for (id, text) in texts.take(vocab_size).enumerate() {
            let id = id as u32;
            if names.contains(text) || ids.contains(&id) {
                found.push((id, text));
            }
            if names.contains(text) {
                ids.push(id);
            }
        }
        let exceptions = exceptions(|name| found.iter().any(|(_, text)| *text == name));
        let excepted =
            |id| found.iter().any(|(at, text)| *at == id && exceptions.iter().any(|(name, _)| name == text));
        ids.retain(|&id| !excepted(id));
    }
    let mut seen = HashSet::new();
    ids.retain(|&id| seen.insert(id));
    Ok(ids)
}
