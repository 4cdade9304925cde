//! Messages of a conversation, in the form of OpenAI's chat API.

use std::{borrow::Cow, fmt};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::tool::ToolCall;

/// One message of a conversation. Its serde form is the message object of OpenAI's chat API.
///
/// All text in it is untrusted: special tokens in it are encoded as plain text.
///
/// ```
/// use ternion_core::Message;
///
/// let message: Message = serde_json::from_str(r#"{"role": "user", "content": "Hi"}"#)?;
/// assert_eq!(message, Message::user("Hi"));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "MessageForm")]
#[non_exhaustive]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or another role that the chat template knows.
    pub role: String,
    /// What is said. JSON `null`, or no content at all, is [`Content::Null`].
    pub content: Content,
    /// The name of the speaker, or of the tool whose result this is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The calls of tools that an assistant message makes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// In a message with the role `tool`: the id of the call that this is the result of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// What the model thought before it answered. The JSON key is `reasoning_content`; `reasoning` is read as well.
    #[serde(rename = "reasoning_content", skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
}

/// What is read: the thought may have two names, and clients send back both.
#[derive(Deserialize)]
struct MessageForm {
    role: String,
    #[serde(default)]
    content: Content,
    name: Option<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    tool_calls: Vec<ToolCall>,
    tool_call_id: Option<String>,
    reasoning_content: Option<String>,
    reasoning: Option<String>,
}

impl From<MessageForm> for Message {
    fn from(form: MessageForm) -> Self {
        Self {
            role: form.role,
            content: form.content,
            name: form.name,
            tool_calls: form.tool_calls,
            tool_call_id: form.tool_call_id,
            reasoning: form.reasoning_content.or(form.reasoning),
        }
    }
}

impl Message {
    /// A message of any role.
    pub fn new(role: impl Into<String>, content: impl Into<Content>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            name: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            reasoning: None,
        }
    }

    /// A system message.
    pub fn system(content: impl Into<Content>) -> Self {
        Self::new("system", content)
    }

    /// A user message.
    pub fn user(content: impl Into<Content>) -> Self {
        Self::new("user", content)
    }

    /// An assistant message.
    pub fn assistant(content: impl Into<Content>) -> Self {
        Self::new("assistant", content)
    }

    /// The result of the tool call with the id `tool_call_id`.
    pub fn tool(tool_call_id: impl Into<String>, content: impl Into<Content>) -> Self {
        let mut message = Self::new("tool", content);
        message.tool_call_id = Some(tool_call_id.into());
        message
    }

    /// The same message with the name of its speaker.
    pub fn with_name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The same message with calls of tools.
    pub fn with_tool_calls(mut self, calls: impl IntoIterator<Item = ToolCall>) -> Self {
        self.tool_calls = calls.into_iter().collect();
        self
    }

    /// The same message with what the model thought before it.
    pub fn with_reasoning(mut self, reasoning: impl Into<String>) -> Self {
        self.reasoning = Some(reasoning.into());
        self
    }
}

/// The content of a message. Its serde form is a string, a list of parts, or `null`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Content {
    /// No content, as in an assistant message that only calls tools.
    #[default]
    Null,
    /// Text.
    Text(String),
    /// A list of parts. A chat template that handles lists gets the list; any other template gets the texts, one on
    /// each line.
    Parts(Vec<ContentPart>),
}

/// A part of a message's content. Kinds other than text are refused when they are read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum ContentPart {
    /// `{"type": "text", "text": "..."}`
    Text {
        /// The text.
        text: String,
    },
}

impl ContentPart {
    /// A part with text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text { text: text.into() }
    }
}

impl Content {
    /// The whole text. The texts of parts stand on lines of their own.
    pub fn text(&self) -> Cow<'_, str> {
        match self {
            Self::Null => "".into(),
            Self::Text(text) => text.into(),
            Self::Parts(parts) => {
                let texts = parts.iter().map(|ContentPart::Text { text }| text.as_str());
                texts.collect::<Vec<_>>().join("\n").into()
            }
        }
    }

    /// The whole text, without a copy where it is one already.
    pub fn into_text(self) -> String {
        match self {
            Self::Text(text) => text,
            other => other.text().into_owned(),
        }
    }

    /// Whether there is no text.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Null => true,
            Self::Text(text) => text.is_empty(),
            Self::Parts(parts) => parts.iter().all(|ContentPart::Text { text }| text.is_empty()),
        }
    }

    /// Every piece of text.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = &str> + Clone {
        let (text, parts): (Option<&str>, &[ContentPart]) = match self {
            Self::Null => (None, &[]),
            Self::Text(text) => (Some(text), &[]),
            Self::Parts(parts) => (None, parts),
        };
        text.into_iter().chain(parts.iter().map(|ContentPart::Text { text }| text.as_str()))
    }

    /// The same content with every piece of text changed.
    pub(crate) fn map(&self, change: &mut impl FnMut(&str) -> String) -> Self {
        match self {
            Self::Null => Self::Null,
            Self::Text(text) => Self::Text(change(text)),
            Self::Parts(parts) => Self::Parts(
                parts.iter().map(|ContentPart::Text { text }| ContentPart::text(change(text))).collect(),
            ),
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text())
    }
}

impl From<&str> for Content {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<&String> for Content {
    fn from(text: &String) -> Self {
        Self::Text(text.clone())
    }
}

impl From<String> for Content {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Cow<'_, str>> for Content {
    fn from(text: Cow<'_, str>) -> Self {
        Self::Text(text.into_owned())
    }
}

impl From<Vec<ContentPart>> for Content {
    fn from(parts: Vec<ContentPart>) -> Self {
        Self::Parts(parts)
    }
}

impl PartialEq<str> for Content {
    fn eq(&self, other: &str) -> bool {
        matches!(self, Self::Text(text) if text == other)
    }
}

impl PartialEq<&str> for Content {
    fn eq(&self, other: &&str) -> bool {
        self == *other
    }
}

impl Serialize for Content {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Text(text) => serializer.serialize_str(text),
            Self::Parts(parts) => parts.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a list of parts or null")
            }

            fn visit_unit<E: de::Error>(self) -> Result<Content, E> {
                Ok(Content::Null)
            }

            fn visit_none<E: de::Error>(self) -> Result<Content, E> {
                Ok(Content::Null)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(text.into())
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Content, E> {
                Ok(text.into())
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, parts: A) -> Result<Content, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(parts)).map(Content::Parts)
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

impl<'de> Deserialize<'de> for ContentPart {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Part {
            #[serde(rename = "type")]
            kind: String,
            text: Option<String>,
        }

        let part = Part::deserialize(deserializer)?;
        // `input_text` is the name of the same part in OpenAI's newer Responses API.
        if !matches!(part.kind.as_str(), "text" | "input_text") {
            let kind = part.kind;
            return Err(de::Error::custom(format_args!(
                "a content part of the type `{kind}` is not supported; `text` expected"
            )));
        }
        part.text.map(Self::text).ok_or_else(|| de::Error::missing_field("text"))
    }
}

/// Reads `null` as the empty list.
pub(crate) fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}
