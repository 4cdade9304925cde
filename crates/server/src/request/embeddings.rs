//! `POST /v1/embeddings`: the request.

use schemars::JsonSchema;
use serde::Deserialize;
use ternion::{EmbedInput, EmbedRequest, InputTruncation};

use super::Prompts;
use crate::error::ApiError;

/// OpenAI's limit.
const MAX_INPUTS: usize = 2048;

/// Texts to make vectors of.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct EmbeddingsRequest {
    /// The model, by its name or an alias. Without it, the default model.
    pub(crate) model: Option<String>,
    /// A text, a list of texts, a list of token ids or a list of such lists.
    input: Option<Prompts>,
    /// How a vector is written: as a list of numbers, or as its 32-bit floats in little-endian order in base64.
    encoding_format: Option<EncodingFormat>,
    /// The length of the vectors, for models that are trained for shorter ones.
    #[schemars(range(min = 1))]
    dimensions: Option<usize>,
    /// What is done with an input that is longer than the model takes: `refuse` it (the default), or leave out its `end` or its
    /// `start`. A field of this server.
    truncation: Option<InputTruncation>,
}

/// How a vector is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EncodingFormat {
    #[default]
    Float,
    Base64,
}

impl EmbeddingsRequest {
    pub(crate) fn check(self) -> Result<(EmbedRequest, EncodingFormat), ApiError> {
        let inputs: Vec<EmbedInput> =
            match self.input.ok_or_else(|| ApiError::field("input", "is missing"))? {
                Prompts::Texts(texts) => texts.into_iter().map(EmbedInput::Text).collect(),
                Prompts::Tokens(lists) => lists.into_iter().map(EmbedInput::Tokens).collect(),
            };
        let is_empty = |input: &EmbedInput| match input {
            EmbedInput::Text(text) => text.is_empty(),
            EmbedInput::Tokens(tokens) => tokens.is_empty(),
            _ => false,
        };
        if inputs.is_empty() || inputs.iter().any(is_empty) {
            return Err(ApiError::field("input", "is empty; at least one token expected"));
        }
        if inputs.len() > MAX_INPUTS {
            let message = format!("{} inputs; at most {MAX_INPUTS} expected", inputs.len());
            return Err(ApiError::field("input", message));
        }
        let mut request = EmbedRequest::new(inputs);
        request.dimensions = self.dimensions;
        request.truncation = self.truncation.unwrap_or_default();
        Ok((request, self.encoding_format.unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &str) -> Result<(EmbedRequest, EncodingFormat), String> {
        let request: EmbeddingsRequest = serde_json::from_str(body).map_err(|error| error.to_string())?;
        request.check().map_err(|error| error.message().to_owned())
    }

    #[test]
    fn all_forms_of_input_are_read() {
        let inputs = |body: &str| check(body).unwrap().0.inputs;
        assert_eq!(inputs(r#"{"input": "a"}"#), ["a".into()]);
        assert_eq!(inputs(r#"{"input": ["a", "b"]}"#), ["a".into(), "b".into()]);
        assert_eq!(inputs(r#"{"input": [1, 2]}"#), [vec![1, 2].into()]);
        assert_eq!(inputs(r#"{"input": [[1], [2]]}"#), [vec![1].into(), vec![2].into()]);
        let (request, format) =
            check(r#"{"input": "a", "encoding_format": "base64", "dimensions": 2, "truncation": "end"}"#)
                .unwrap();
        assert_eq!((request.dimensions, format), (Some(2), EncodingFormat::Base64));
        assert_eq!(request.truncation, InputTruncation::End);
    }

    #[test]
    fn what_is_no_input_is_refused() {
        for body in
            ["{}", r#"{"input": []}"#, r#"{"input": ""}"#, r#"{"input": ["a", ""]}"#, r#"{"input": [[]]}"#]
        {
            assert!(check(body).unwrap_err().starts_with("input: is "), "{body}");
        }
        let many = format!(r#"{{"input": [{}]}}"#, vec![r#""a""#; 2049].join(","));
        assert!(check(&many).unwrap_err().contains("at most 2048"));
        assert!(check(r#"{"input": "a", "encoding_format": "int8"}"#).is_err());
    }
}
