//! The tokens of a GGUF file: their texts, their types, and whether they take the white space beside them.

use serde_json::{Value, json};
use ternion_core::{Error, Result};

use super::file::duplicate;
use super::{File, keys, special};
use crate::json::shorten;

/// The type of a token, as `tokenizer.ggml.token_type` numbers them.
pub(crate) mod token_type {
    pub(crate) const NORMAL: i32 = 1;
    pub(crate) const UNKNOWN: i32 = 2;
    pub(crate) const CONTROL: i32 = 3;
    pub(crate) const USER_DEFINED: i32 = 4;
    pub(crate) const UNUSED: i32 = 5;
    pub(crate) const BYTE: i32 = 6;
}

/// The vocabulary.
pub(super) struct Vocabulary<'a> {
    pub(super) texts: Vec<&'a str>,
    pub(super) types: Vec<i32>,
    strips: Strips,
}

/// Which tokens take the white space beside them. GGUF has no place for that, so llama.cpp goes by names.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Strips {
    None,
    /// Nearly all of Phi-3's take the white space behind them.
    Phi3,
    /// This token takes the white space before it.
    Mask(&'static str),
}

impl Strips {
    fn of(file: &File) -> Result<Self> {
        let name = file.string(keys::NAME)?.unwrap_or_default().to_lowercase();
        let rule = file.string(keys::PRE_TOKENIZER)?.unwrap_or_default();
        Ok(if ["jina-v2-de", "jina-v2-es", "jina-v2-code"].iter().any(|known| rule.contains(known)) {
            Self::Mask("<mask>")
        } else if name.contains("phi-3") || name.contains("phi3") {
            Self::Phi3
        } else if name.contains("modern-bert") {
            Self::Mask("[MASK]")
        } else {
            Self::None
        })
    }

    fn before(self, text: &str) -> bool {
        matches!(self, Self::Mask(mask) if mask == text)
    }

    fn behind(self, text: &str) -> bool {
        self == Self::Phi3 && !matches!(text, "<unk>" | "<s>" | "<|endoftext|>")
    }
}

impl<'a> Vocabulary<'a> {
    /// Reads the tokens. Lists beside theirs may be longer, as in llama.cpp.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where a key is missing or has the wrong type, or two
    /// tokens are the same.
    pub(super) fn read(file: &'a File) -> Result<Self> {
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
        let mut types = match file.array(keys::TOKEN_TYPES)? {
            None => vec![token_type::NORMAL; texts.len()],
            Some(types) if types.len() >= texts.len() => {
                let types =
                    types.as_integers().map(|types| types.map(|n| n as i32).take(texts.len()).collect());
                types.ok_or_else(|| file.invalid(keys::TOKEN_TYPES, "an array of integers"))?
            }
            Some(_) => return Err(file.invalid(keys::TOKEN_TYPES, &format!("{} integers", texts.len()))),
        };
        special::correct_types(file, &texts, &mut types);
        Ok(Self { texts, types, strips: Strips::of(file)? })
    }

    /// Whether a text is searched for this token before it is split.
    pub(super) fn is_added(&self, id: usize) -> bool {
        matches!(self.types[id], token_type::UNKNOWN | token_type::CONTROL | token_type::USER_DEFINED)
    }

    /// Tokens that a text is searched for before all else, in the form of `tokenizer.json`.
    pub(super) fn added(&self) -> Vec<Value> {
        let added = (0..self.texts.len()).filter(|&id| self.is_added(id) && !self.texts[id].is_empty());
        added
            .map(|id| {
                let text = self.texts[id];
                json!({
                    "id": id,
                    "content": text,
                    "single_word": false,
                    "lstrip": self.strips.before(text),
                    "rstrip": self.strips.behind(text),
                    "normalized": false,
                    "special": self.types[id] != token_type::USER_DEFINED
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

    /// The ids of the model itself.
    pub(super) fn model(&self) -> impl Iterator<Item = usize> {
        (0..self.model_len()).filter(|&id| !self.texts[id].is_empty())
    }

    /// All tokens that have a text, with their ids.
    pub(super) fn all(&self) -> Vec<(&'a str, usize)> {
        let tokens = self.texts.iter().enumerate().filter(|(_, text)| !text.is_empty());
        tokens.map(|(id, &text)| (text, id)).collect()
    }
}
