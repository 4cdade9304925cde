//! Tokens as people name them: by id or by text.

use std::{convert::Infallible, fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Error, Result, text::Tokenizer};

/// A token of a vocabulary: its id, or its text as it is written there, such as `<|im_end|>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TokenName {
    /// The token with this id.
    Id(u32),
    /// The token with this text.
    Text(String),
}

impl TokenName {
    /// The id of the token.
    ///
    /// # Errors
    /// [`InvalidRequest`](crate::ErrorKind::InvalidRequest) if there is no such token.
    pub fn resolve(&self, tokenizer: &Tokenizer, vocab_size: usize) -> Result<u32> {
        let id = match self {
            Self::Id(id) => Some(*id),
            Self::Text(text) => tokenizer.token_id(text),
        };
        id.filter(|&id| (id as usize) < vocab_size).ok_or_else(|| {
            let expected = match self {
                Self::Id(_) => format!("an id below {vocab_size}"),
                Self::Text(_) => {
                    "an id, or the text of one token as it is written in the vocabulary,".to_owned()
                }
            };
            Error::invalid_request(format!("the model has no token `{self}`; {expected} expected"))
        })
    }
}

impl FromStr for TokenName {
    type Err = Infallible;

    /// A number is an id, everything else a text.
    fn from_str(text: &str) -> std::result::Result<Self, Infallible> {
        Ok(text.parse().map_or_else(|_| Self::Text(text.to_owned()), Self::Id))
    }
}

impl fmt::Display for TokenName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Text(text) => text.fmt(f),
        }
    }
}
