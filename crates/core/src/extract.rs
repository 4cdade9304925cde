//! Answers as values of Rust: a constraint from a type, and the value from the answer.

use schemars::{JsonSchema, SchemaGenerator};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    Completion, Constraint, Content, ContentPart, Error, ErrorKind, FinishReason, GenerateRequest, Message,
    Prompt, Result,
};

impl GenerateRequest {
    /// The same request for JSON from which a `T` can be read, in place of another constraint.
    ///
    /// The model does not see the schema; see [`with_schema_in_prompt`](Self::with_schema_in_prompt).
    pub fn with_schema_of<T: JsonSchema>(self) -> Self {
        let schema = SchemaGenerator::default().into_root_schema_for::<T>();
        self.with_constraint(Constraint::JsonSchema(schema.to_value()))
    }

    /// The same request, whose system message tells the model the JSON schema of the constraint. A conversation without a system
    /// message gets one.
    ///
    /// Prompts that are no conversation, and requests without a JSON schema, stay as they are.
    pub fn with_schema_in_prompt(mut self) -> Self {
        if let (Prompt::Chat(messages), Some(Constraint::JsonSchema(schema))) =
            (&mut self.params.prompt, &self.params.constraint)
        {
            describe(messages, schema);
        }
        self
    }
}

fn describe(messages: &mut Vec<Message>, schema: &Value) {
    let text = format!("Answer with JSON that is valid against this JSON schema:\n{schema}");
    match messages.first_mut().filter(|first| first.role == "system") {
        Some(system) => match &mut system.content {
            Content::Text(content) => {
                content.push_str("\n\n");
                content.push_str(&text);
            }
            Content::Parts(parts) => parts.push(ContentPart::Text { text }),
            content => *content = text.into(),
        },
        None => messages.insert(0, Message::system(text)),
    }
}

impl Completion {
    /// Reads the answer as JSON.
    ///
    /// # Errors
    /// For an answer that was cut off: [`InvalidRequest`](ErrorKind::InvalidRequest) by `max_tokens` or a stop,
    /// [`ContextOverflow`](ErrorKind::ContextOverflow) by a full context, [`Cancelled`](ErrorKind::Cancelled) by the request's
    /// token. For JSON from which no `T` can be read: [`Backend`](ErrorKind::Backend).
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        if self.constraint_complete == Some(false) {
            return Err(self.cut_off());
        }
        let mut json = serde_json::Deserializer::from_str(&self.text);
        serde_path_to_error::deserialize(&mut json).map_err(|e| match self.finish_reason {
            FinishReason::MaxTokens | FinishReason::ContextFull | FinishReason::Cancelled => self.cut_off(),
            _ => Error::backend("the answer cannot be read as the type that was asked for").with_source(e),
        })
    }

    fn cut_off(&self) -> Error {
        let tokens = self.usage.completion_tokens;
        match &self.finish_reason {
            FinishReason::MaxTokens => {
                Error::invalid_request(format!("max_tokens: the answer is cut off after {tokens} tokens"))
            }
            FinishReason::ContextFull => Error::new(
                ErrorKind::ContextOverflow,
                format!("prompt: the answer is cut off after {tokens} tokens, because the context is full"),
            ),
            FinishReason::Cancelled => Error::cancelled(),
            reason => Error::invalid_request(format!(
                "stop: the answer is cut off after {tokens} tokens by {}",
                reason.as_str()
            )),
        }
    }
}
