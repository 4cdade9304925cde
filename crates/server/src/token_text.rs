//! The text of single tokens, for log-probabilities and `/tokenize`.

use std::sync::Arc;

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
    as_ids: bool,
}

impl TokenTexts {
    pub(crate) fn new(tokenizer: Option<Arc<Tokenizer>>) -> Self {
        Self { tokenizer, as_ids: false }
    }

    /// Shows all tokens as `token_id:N`.
    pub(crate) fn with_ids(mut self, as_ids: bool) -> Self {
        self.as_ids = as_ids;
        self
    }

    /// A token as the API shows it.
    pub(crate) fn get(&self, id: u32) -> TokenText {
        let tokenizer = self.tokenizer.as_ref().filter(|_| !self.as_ids);
        let Some(bytes) = tokenizer.and_then(|tokenizer| bytes_of(tokenizer, id)) else {
            let text = by_id(id);
            return TokenText { bytes: text.clone().into_bytes(), text };
        };
        let text = std::str::from_utf8(&bytes).map_or_else(|_| escaped(&bytes), str::to_owned);
        TokenText { text, bytes }
    }
}

/// How a token is shown that has no text.
pub(crate) fn by_id(id: u32) -> String {
    format!("token_id:{id}")
}

/// The bytes of a token within a text. Special tokens, and words that the decoder puts spaces between, are shown as the
/// vocabulary writes them.
fn bytes_of(tokenizer: &Tokenizer, id: u32) -> Option<Vec<u8>> {
    let name = tokenizer.token(id)?;
    Some(tokenizer.token_bytes(id).unwrap_or_else(|| name.into_bytes()))
}

/// How a token is shown that is a part of a character.
fn escaped(bytes: &[u8]) -> String {
    bytes.iter().fold("bytes:".to_owned(), |text, byte| text + &format!("\\x{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_character_is_shown_as_bytes() {
        assert_eq!(escaped(&[0xE2, 0x82]), "bytes:\\xe2\\x82");
    }

    #[test]
    fn a_tokenizer_that_is_not_known_shows_ids() {
        assert_eq!(TokenTexts::new(None).get(7).text, "token_id:7");
    }
}
