//! What a model continues.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::Message;

/// What the model continues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Prompt {
    /// Text as it is. It is trusted: special tokens in it are control tokens, and the tokenizer adds what it adds
    /// (a leading BOS for most models), as `tokenizer(text)` does in transformers.
    Text(String),
    /// Text of which only some parts are trusted. The parts are encoded as one text, as [`Text`](Self::Text) is, but
    /// special tokens in an untrusted part stay text. So does one that an untrusted part completes.
    Segments(Vec<Segment>),
    /// Token ids as they are; nothing is added.
    Tokens(Vec<u32>),
    /// A conversation, rendered by the model's chat template with the header of the assistant's turn at the end.
    Chat(Vec<Message>),
}

/// A part of a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Segment {
    /// The text.
    pub text: String,
    /// Whether special tokens in it are control tokens.
    #[serde(default)]
    pub trusted: bool,
}

impl Segment {
    /// Text that the host wrote: special tokens in it are control tokens.
    pub fn trusted(text: impl Into<String>) -> Self {
        Self { text: text.into(), trusted: true }
    }

    /// Text from elsewhere, such as a document, a tool or a model: special tokens in it stay text.
    pub fn untrusted(text: impl Into<String>) -> Self {
        Self { text: text.into(), trusted: false }
    }
}

impl Prompt {
    /// Whether there is nothing in it: no text, no tokens, no messages.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Segments(segments) => segments.iter().all(|segment| segment.text.is_empty()),
            Self::Tokens(tokens) => tokens.is_empty(),
            Self::Chat(messages) => messages.is_empty(),
        }
    }

    /// The text of a text prompt; `None` for tokens and conversations.
    pub fn text(&self) -> Option<Cow<'_, str>> {
        match self {
            Self::Text(text) => Some(text.into()),
            Self::Segments(segments) => {
                Some(segments.iter().map(|segment| segment.text.as_str()).collect::<String>().into())
            }
            Self::Tokens(_) | Self::Chat(_) => None,
        }
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(tokens: Vec<u32>) -> Self {
        Self::Tokens(tokens)
    }
}

impl From<Vec<Message>> for Prompt {
    fn from(messages: Vec<Message>) -> Self {
        Self::Chat(messages)
    }
}

impl From<Vec<Segment>> for Prompt {
    fn from(segments: Vec<Segment>) -> Self {
        Self::Segments(segments)
    }
}
