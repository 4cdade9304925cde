//! The text of single tokens, for log-probabilities and `/tokenize`.
//!
//! A token need not be a whole character, and a decoder may strip a space at the start of a text. So a token is decoded after
//! another one, and where that gives no whole character its bytes are taken from the vocabulary.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use ternion::text::Tokenizer;

/// A token as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenText {
    /// Its text; `bytes:\xe2\x82` where it is a part of a character.
    pub(crate) text: String,
    /// Its bytes.
    pub(crate) bytes: Vec<u8>,
}

/// Shows tokens of one tokenizer. Without one, as with some remote models, tokens are shown as `token_id:N`.
#[derive(Clone)]
pub(crate) struct TokenTexts {
    tokenizer: Option<Arc<Tokenizer>>,
    /// A token of plain text and its text.
    anchor: Option<(u32, String)>,
    as_ids: bool,
}

impl TokenTexts {
    pub(crate) fn new(tokenizer: Option<Arc<Tokenizer>>) -> Self {
        let anchor = tokenizer.as_ref().and_then(|tokenizer| {
            let id = *tokenizer.encode_plain("a").ok()?.last()?;
            Some((id, tokenizer.decode(&[id], false).ok()?))
        });
        Self { tokenizer, anchor, as_ids: false }
    }

    /// Shows all tokens as `token_id:N`.
    pub(crate) fn with_ids(mut self, as_ids: bool) -> Self {
        self.as_ids = as_ids;
        self
    }

    /// A token as the API shows it.
    pub(crate) fn get(&self, id: u32) -> TokenText {
        match &self.tokenizer {
            Some(tokenizer) if !self.as_ids => self.known(tokenizer, id),
            _ => plain(by_id(id)),
        }
    }

    fn known(&self, tokenizer: &Tokenizer, id: u32) -> TokenText {
        let Some(name) = tokenizer.token(id) else { return plain(by_id(id)) };
        if tokenizer.is_special(id) {
            return plain(name);
        }
        let text = match &self.anchor {
            Some((anchor, before)) => {
                let both = tokenizer.decode(&[*anchor, id], false).unwrap_or_default();
                both.strip_prefix(before.as_str()).map_or(both.clone(), str::to_owned)
            }
            None => tokenizer.decode(&[id], false).unwrap_or_default(),
        };
        if !text.contains(char::REPLACEMENT_CHARACTER) {
            return plain(text);
        }
        match bytes_of(&name) {
            Some(bytes) if std::str::from_utf8(&bytes).is_err() => {
                let hex = bytes.iter().fold(String::new(), |hex, byte| hex + &format!("\\x{byte:02x}"));
                TokenText { text: format!("bytes:{hex}"), bytes }
            }
            _ => plain(text),
        }
    }
}

/// How a token is shown that has no text.
pub(crate) fn by_id(id: u32) -> String {
    format!("token_id:{id}")
}

fn plain(text: String) -> TokenText {
    let bytes = text.clone().into_bytes();
    TokenText { text, bytes }
}

/// The bytes of a token as a vocabulary writes it: `<0xE2>`, or letters that stand for bytes as in GPT-2.
fn bytes_of(name: &str) -> Option<Vec<u8>> {
    if let Some(hex) = name.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) {
        return u8::from_str_radix(hex, 16).ok().map(|byte| vec![byte]);
    }
    let letters = byte_letters();
    name.chars().map(|letter| letters.get(&letter).copied()).collect()
}

/// The letters of GPT-2's vocabulary: printable bytes stand for themselves, the others for the letters from U+0100 on.
fn byte_letters() -> &'static HashMap<char, u8> {
    static LETTERS: OnceLock<HashMap<char, u8>> = OnceLock::new();
    LETTERS.get_or_init(|| {
        let mut next = 0x100..;
        (0..=u8::MAX)
            .map(|byte| {
                let is_own = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
                let letter = if is_own { u32::from(byte) } else { next.next().unwrap_or_default() };
                (char::from_u32(letter).unwrap_or_default(), byte)
            })
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_from_the_vocabulary() {
        assert_eq!(bytes_of("<0xE2>"), Some(vec![0xE2]));
        assert_eq!(bytes_of("Ġhello"), Some(b" hello".to_vec()));
        assert_eq!(bytes_of("âĤ"), Some(vec![0xE2, 0x82]));
        assert_eq!(bytes_of("▁"), None);
    }

    #[test]
    fn a_tokenizer_that_is_not_known_shows_ids() {
        assert_eq!(TokenTexts::new(None).get(7).text, "token_id:7");
    }
}
