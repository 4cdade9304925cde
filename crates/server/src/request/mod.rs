//! The requests of OpenAI's API, and what they become: [`GenerateParams`](ternion::GenerateParams).
//!
//! Every field is optional and may be `null`. Unknown fields are ignored, unknown values of known fields are an error.

mod body;
mod chat;
mod common;
mod completion;
mod embeddings;
mod format;
mod prompt;
mod schema;
mod tokens;

pub(crate) use body::JsonBody;
pub(crate) use chat::ChatRequest;
pub(crate) use common::Delivery;
pub(crate) use completion::{Completion, CompletionRequest};
pub(crate) use embeddings::{EmbeddingsRequest, EncodingFormat};
pub(crate) use prompt::Prompts;
pub(crate) use tokens::{DetokenizeRequest, Input, TokenizeRequest};

/// Reads bytes as each kind of request and makes all checks that need no model.
pub(crate) fn check(bytes: &[u8]) {
    let _ = body::parse::<ChatRequest>(bytes).and_then(|request| request.into_params(4096));
    let _ = body::parse::<CompletionRequest>(bytes).and_then(CompletionRequest::check);
    let _ = body::parse::<TokenizeRequest>(bytes).and_then(|request| request.into_input(4096));
    let _ = body::parse::<DetokenizeRequest>(bytes);
    let _ = body::parse::<EmbeddingsRequest>(bytes).and_then(EmbeddingsRequest::check);
}
