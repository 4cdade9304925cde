//! Embeddings: a vector of a text, by a model that is made for it.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::{Error, ModelInfo, Result, ServedBy, Usage};

/// A request for the embeddings of texts.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct EmbedRequest {
    /// The texts, at least one.
    pub inputs: Vec<EmbedInput>,
    /// What is done with an input that is longer than the model takes.
    pub truncation: InputTruncation,
    /// The length of the vectors, for models that are trained for shorter ones, see [`EmbeddingInfo::shortened`]. `None`: the
    /// model's own.
    pub dimensions: Option<usize>,
    /// Cancels the request; dropping the future does the same.
    pub cancel: CancellationToken,
}

impl EmbedRequest {
    /// The embeddings of these inputs.
    pub fn new<I: Into<EmbedInput>>(inputs: impl IntoIterator<Item = I>) -> Self {
        Self {
            inputs: inputs.into_iter().map(Into::into).collect(),
            truncation: InputTruncation::default(),
            dimensions: None,
            cancel: CancellationToken::new(),
        }
    }

    /// The same request with this policy for inputs that are too long.
    pub fn with_truncation(mut self, truncation: InputTruncation) -> Self {
        self.truncation = truncation;
        self
    }

    /// The same request for vectors of this length.
    pub fn with_dimensions(mut self, dimensions: usize) -> Self {
        self.dimensions = Some(dimensions);
        self
    }

    /// The same request, also ended by `cancel`.
    pub fn with_cancel(mut self, cancel: CancellationToken) -> Self {
        self.cancel = cancel;
        self
    }
}

/// One input.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum EmbedInput {
    /// A text. The tokenizer puts around it what the model was trained with, such as an EOS. Special tokens in it are text. A
    /// model that wants an instruction before a query gets it as a part of the text.
    Text(String),
    /// Token ids as they go into the model, with nothing put around them.
    Tokens(Vec<u32>),
}

impl From<&str> for EmbedInput {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for EmbedInput {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<u32>> for EmbedInput {
    fn from(tokens: Vec<u32>) -> Self {
        Self::Tokens(tokens)
    }
}

/// What is done with an input that is longer than the model takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum InputTruncation {
    /// The request fails with [`ContextOverflow`](crate::ErrorKind::ContextOverflow).
    #[default]
    Refuse,
    /// The end of the text is left out, as sentence-transformers does it. What the tokenizer puts around a text stays.
    End,
    /// The beginning of the text is left out.
    Start,
}

/// The embedding of one input.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Embedding {
    /// The vector.
    pub values: Vec<f32>,
    /// Tokens of the input, with those that the tokenizer put around it.
    pub tokens: usize,
    /// A part of the input was left out.
    pub truncated: bool,
}

impl Embedding {
    /// The vector of an input of so many tokens.
    pub fn new(values: Vec<f32>, tokens: usize) -> Self {
        Self { values, tokens, truncated: false }
    }

    /// The same vector, of an input that was cut or not.
    pub fn with_truncated(mut self, truncated: bool) -> Self {
        self.truncated = truncated;
        self
    }
}

/// The embeddings of all inputs of a request, in their order.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Embeddings {
    /// One for each input.
    pub items: Vec<Embedding>,
    /// The tokens of all inputs.
    pub usage: Usage,
    /// Who made them.
    pub served_by: Option<ServedBy>,
}

impl Embeddings {
    /// These embeddings, with the sum of their tokens.
    pub fn new(items: Vec<Embedding>) -> Self {
        let usage = Usage::new(items.iter().map(|item| item.tokens).sum(), 0);
        Self { items, usage, served_by: None }
    }

    /// The same embeddings, made by this model.
    pub fn with_served_by(mut self, served_by: ServedBy) -> Self {
        self.served_by = Some(served_by);
        self
    }
}

/// How a model makes embeddings, as its files say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct EmbeddingInfo {
    /// The length of a vector; 0 where it is not known on this side.
    pub dimensions: usize,
    /// How the hidden states of all tokens become one vector.
    pub pooling: Pooling,
    /// Vectors have the length 1 (by the Euclidean norm), so that their product is the cosine.
    pub normalized: bool,
    /// The shorter lengths that the model is trained for (Matryoshka), of which the first values of a vector are an embedding
    /// too. `None`: none; an empty list: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shortened: Option<Vec<usize>>,
}

impl EmbeddingInfo {
    /// Vectors of one length.
    pub fn new(dimensions: usize, pooling: Pooling, normalized: bool) -> Self {
        Self { dimensions, pooling, normalized, shortened: None }
    }

    /// The same, with shorter vectors of these lengths; an empty list stands for any.
    pub fn with_shortened(mut self, lengths: Option<Vec<usize>>) -> Self {
        self.shortened = lengths;
        self
    }

    /// Checks the length that a request asks for.
    ///
    /// # Errors
    /// [`InvalidRequest`](crate::ErrorKind::InvalidRequest) for a length out of range,
    /// [`Unsupported`](crate::ErrorKind::Unsupported) where the model has vectors of one length alone.
    pub fn check_dimensions(&self, wanted: Option<usize>) -> Result<()> {
        let Some(wanted) = wanted.filter(|wanted| *wanted != self.dimensions) else { return Ok(()) };
        let out_of_range = |expected: String| {
            Err(Error::invalid_request(format!("dimensions: {wanted} is out of range; {expected} expected")))
        };
        if wanted == 0 || (self.dimensions > 0 && wanted > self.dimensions) {
            return out_of_range(format!("1 to {}", self.dimensions));
        }
        match &self.shortened {
            None => Err(Error::unsupported(format!(
                "dimensions: the model has vectors of {} values, and is not known to be trained for shorter ones",
                self.dimensions
            ))),
            Some(lengths) if lengths.is_empty() || lengths.contains(&wanted) => Ok(()),
            Some(lengths) => {
                let lengths: Vec<String> = lengths.iter().map(ToString::to_string).collect();
                out_of_range(format!("one of {}", lengths.join(", ")))
            }
        }
    }

    /// A vector as a request wants it: the first `dimensions` values of what pooling gives, of the length 1 where the model's
    /// are.
    pub fn finish(&self, mut pooled: Vec<f32>, dimensions: Option<usize>) -> Vec<f32> {
        pooled.truncate(dimensions.unwrap_or(usize::MAX));
        if self.normalized {
            let norm = pooled.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
            if norm > 0.0 {
                for x in &mut pooled {
                    *x = (f64::from(*x) / norm) as f32;
                }
            }
        }
        pooled
    }
}

/// How the hidden states of all tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The first one.
    Cls,
    /// The last one.
    Last,
    /// Not known on this side: a remote model's.
    Unknown,
}

impl Pooling {
    /// Its name in configurations.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Cls => "cls",
            Self::Last => "last",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Pooling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Checks a request against what the model is: that it makes embeddings, that there are inputs, and the length.
///
/// # Errors
/// [`Unsupported`](crate::ErrorKind::Unsupported), [`InvalidRequest`](crate::ErrorKind::InvalidRequest).
pub fn check(request: &EmbedRequest, info: &ModelInfo) -> Result<()> {
    let Some(embedding) = info.embedding.as_ref().filter(|_| info.capabilities.embed) else {
        return Err(no_embeddings(info));
    };
    if request.inputs.is_empty() {
        return Err(Error::invalid_request("inputs: there is none; at least one expected"));
    }
    let is_empty = |input: &EmbedInput| match input {
        EmbedInput::Text(text) => text.is_empty(),
        EmbedInput::Tokens(tokens) => tokens.is_empty(),
    };
    if let Some(index) = request.inputs.iter().position(is_empty) {
        return Err(Error::invalid_request(format!("inputs: input {index} is empty")));
    }
    embedding.check_dimensions(request.dimensions)
}

/// The error of a model that makes no embeddings.
/// What a model for embeddings answers to a request to generate.
pub fn no_generation(info: &ModelInfo) -> Error {
    Error::unsupported(format!("the model `{}` makes embeddings and generates no text", info.name))
        .with_operation("generate")
}

pub(crate) fn no_embeddings(info: &ModelInfo) -> Error {
    Error::unsupported(format!(
        "the model `{}` on the backend `{}` makes no embeddings; one that is made for it expected",
        info.name, info.backend
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn dimensions_are_those_that_a_model_is_trained_for() {
        let one = EmbeddingInfo::new(8, Pooling::Mean, true);
        assert!(one.check_dimensions(None).is_ok() && one.check_dimensions(Some(8)).is_ok());
        assert_eq!(one.check_dimensions(Some(4)).unwrap_err().kind(), ErrorKind::Unsupported);
        let some = one.clone().with_shortened(Some(vec![2, 4]));
        assert!(some.check_dimensions(Some(4)).is_ok());
        let error = some.check_dimensions(Some(3)).unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidRequest && error.to_string().contains("one of 2, 4"));
        let any = one.with_shortened(Some(Vec::new()));
        assert!(any.check_dimensions(Some(3)).is_ok());
        for wrong in [0, 9] {
            assert_eq!(any.check_dimensions(Some(wrong)).unwrap_err().kind(), ErrorKind::InvalidRequest);
        }
    }

    #[test]
    fn shortened_vectors_have_the_length_one_again() {
        let info = EmbeddingInfo::new(3, Pooling::Last, true).with_shortened(Some(Vec::new()));
        assert_eq!(info.finish(vec![3.0, 4.0, 12.0], Some(2)), [0.6, 0.8]);
        assert_eq!(info.finish(vec![0.0, 0.0, 0.0], None), [0.0; 3]);
        let raw = EmbeddingInfo::new(2, Pooling::Last, false);
        assert_eq!(raw.finish(vec![3.0, 4.0], None), [3.0, 4.0]);
    }
}
