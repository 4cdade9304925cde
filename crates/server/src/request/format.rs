//! What an answer must look like, in the forms that clients use.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;
use ternion::Constraint;

use crate::error::ApiError;

/// `response_format` of OpenAI.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum ResponseFormat {
    /// Any text.
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON that is valid against a schema.
    JsonSchema {
        /// The schema with its name.
        json_schema: NamedSchema,
    },
}

/// A JSON schema with its name.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub(crate) struct NamedSchema {
    /// The schema; without it, any JSON object.
    schema: Option<Value>,
    /// What the schema is called. Has no effect.
    #[expect(dead_code, reason = "named, so that it is not reported as an unknown field")]
    name: Option<String>,
    /// What the schema is for. Has no effect: describe the form of the answer in the messages.
    #[expect(dead_code, reason = "named, so that it is not reported as an unknown field")]
    description: Option<String>,
    /// Has no effect: the schema is always enforced.
    #[expect(dead_code, reason = "named, so that it is not reported as an unknown field")]
    strict: Option<bool>,
}

impl ResponseFormat {
    pub(super) fn into_constraint(self) -> Option<Constraint> {
        match self {
            Self::Text => None,
            Self::JsonObject => Some(Constraint::JsonObject),
            Self::JsonSchema { json_schema } => {
                Some(json_schema.schema.map_or(Constraint::JsonObject, Constraint::JsonSchema))
            }
        }
    }
}

/// `structured_outputs` of vLLM: one of these.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct StructuredOutputs {
    /// A JSON schema, or its text.
    json: Option<Value>,
    /// Any JSON object.
    json_object: Option<bool>,
    /// A regular expression.
    regex: Option<String>,
    /// A list of texts.
    choice: Option<Vec<String>>,
    /// A grammar in the syntax of Lark.
    grammar: Option<String>,
}

impl StructuredOutputs {
    pub(super) fn into_constraint(self) -> Result<Constraint, ApiError> {
        let mut forms = [
            self.json.map(|schema| json_schema("structured_outputs", schema)).transpose()?,
            self.json_object.unwrap_or(false).then_some(Constraint::JsonObject),
            self.regex.map(Constraint::Regex),
            self.choice.map(Constraint::Choice),
            self.grammar.map(Constraint::Lark),
        ]
        .into_iter()
        .flatten();
        match (forms.next(), forms.next()) {
            (Some(form), None) => Ok(form),
            _ => Err(ApiError::field(
                "structured_outputs",
                "exactly one of `json`, `json_object`, `regex`, `choice` and `grammar` expected",
            )),
        }
    }
}

/// A JSON schema that may be given as text.
pub(super) fn json_schema(field: &str, schema: Value) -> Result<Constraint, ApiError> {
    let Value::String(text) = schema else { return Ok(Constraint::JsonSchema(schema)) };
    let schema = serde_json::from_str(&text)
        .map_err(|e| ApiError::field(field, format!("the text of the JSON schema is no JSON: {e}")))?;
    Ok(Constraint::JsonSchema(schema))
}
