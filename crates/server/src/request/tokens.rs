//! `POST /tokenize` and `/detokenize`, in the forms of vLLM and of llama.cpp.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};
use ternion::{ChatOptions, Message, Tool};

use super::schema;
use crate::error::ApiError;

/// A text or a conversation to turn into tokens.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct TokenizeRequest {
    /// The model, by its name or an alias. Without it, the default model.
    pub(crate) model: Option<String>,
    /// A text (vLLM).
    prompt: Option<String>,
    /// Whether the tokenizer adds what it adds to a text; on by default with `prompt`.
    add_special_tokens: Option<bool>,
    /// Return the tokens as text, too.
    return_token_strs: Option<bool>,
    /// A conversation (vLLM).
    #[schemars(schema_with = "schema::messages")]
    messages: Option<Vec<Message>>,
    /// Whether the prompt ends with the header of the assistant's turn; on by default.
    add_generation_prompt: Option<bool>,
    /// Continue the last message.
    continue_final_message: Option<bool>,
    /// The tools that the template gets.
    #[schemars(schema_with = "schema::tools")]
    tools: Option<Vec<Tool>>,
    /// Further variables of the chat template.
    chat_template_kwargs: Option<Map<String, Value>>,
    /// A text (llama.cpp).
    content: Option<String>,
    /// Whether the tokenizer adds what it adds; off by default with `content`.
    add_special: Option<bool>,
    /// Whether special tokens in `content` are control tokens; on by default.
    parse_special: Option<bool>,
    /// Return each token with its text.
    with_pieces: Option<bool>,
}

/// What is tokenized.
#[derive(Debug)]
pub(crate) enum Input {
    Text { text: String, add_special: bool, trusted: bool },
    Chat { messages: Vec<Message>, options: ChatOptions },
}

impl TokenizeRequest {
    /// Whether tokens are wanted as text: beside the ids (vLLM), with each id (llama.cpp).
    pub(crate) fn wants_text(&self) -> (bool, bool) {
        (self.return_token_strs.unwrap_or(false), self.with_pieces.unwrap_or(false))
    }

    pub(crate) fn into_input(self, most_messages: usize) -> Result<Input, ApiError> {
        match (self.prompt, self.messages, self.content) {
            (Some(text), None, None) => {
                Ok(Input::Text { text, add_special: self.add_special_tokens.unwrap_or(true), trusted: true })
            }
            (None, None, Some(text)) => Ok(Input::Text {
                text,
                add_special: self.add_special.unwrap_or(false),
                trusted: self.parse_special.unwrap_or(true),
            }),
            (None, Some(messages), None) => {
                if messages.is_empty() || messages.len() > most_messages {
                    let message = format!("{} messages; from 1 to {most_messages} expected", messages.len());
                    return Err(ApiError::field("messages", message));
                }
                let mut options = ChatOptions::default().with_tools(self.tools.unwrap_or_default());
                options.template_args = self.chat_template_kwargs.unwrap_or_default();
                options.continue_final_message = self.continue_final_message.unwrap_or(false);
                options.add_generation_prompt =
                    self.add_generation_prompt.unwrap_or(!options.continue_final_message);
                Ok(Input::Chat { messages, options })
            }
            _ => Err(ApiError::field("prompt", "exactly one of `prompt`, `messages` and `content` expected")),
        }
    }
}

/// Tokens to turn into text.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct DetokenizeRequest {
    /// The model, by its name or an alias. Without it, the default model.
    pub(crate) model: Option<String>,
    /// The ids.
    pub(crate) tokens: Option<Vec<u32>>,
}
