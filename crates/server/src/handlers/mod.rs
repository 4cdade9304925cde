//! One file for each group of paths.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod embeddings;
pub(crate) mod health;
pub(crate) mod models;
pub(crate) mod tokens;

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use std::sync::Arc;
use ternion::text::Tokenizer;

use crate::error::ApiError;

/// JSON text as an answer.
fn json(text: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

/// Runs what may take long, such as the tokenization of megabytes, on a thread for blocking work.
async fn blocking<T: Send + 'static>(
    prompt: &'static str,
    work: impl FnOnce() -> ternion::Result<T> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| ApiError::of(&error, prompt)),
        Err(_) => Err(ApiError::of(&ternion::Error::backend("the work was interrupted"), prompt)),
    }
}

fn tokenizer_of(model: &crate::state::Model) -> Result<Arc<Tokenizer>, ApiError> {
    model.backend.tokenizer().ok_or_else(|| {
        let message = format!("the tokens of the model `{}` are not known on this server", model.name);
        ApiError::unsupported("model", &message)
    })
}
