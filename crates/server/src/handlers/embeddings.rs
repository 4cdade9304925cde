//! `POST /v1/embeddings`.

use axum::{extract::State, response::Response};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Serialize;
use ternion::Embeddings;

use super::json;
use crate::{
    error::ApiError,
    request::{EmbeddingsRequest, EncodingFormat, JsonBody},
    state::App,
};

pub(crate) async fn post(
    State(app): State<App>,
    JsonBody(body): JsonBody<EmbeddingsRequest>,
) -> Result<Response, ApiError> {
    let asked = body.model.clone();
    let (request, format) = body.check()?;
    let model = app.model(asked.as_deref()).await?;
    let deadline = app.deadline();
    let embed = model.backend.embed(request.with_cancel(app.stopping().child_token()));
    let outcome = match deadline {
        None => embed.await,
        Some((at, limit)) => {
            tokio::time::timeout_at(at, embed).await.map_err(|_| ApiError::deadline(limit))?
        }
    };
    if app.stopping().is_cancelled() && outcome.is_err() {
        return Err(ApiError::shutting_down());
    }
    let embeddings = outcome.map_err(|error| ApiError::of(&error, "input"))?;
    Ok(json(answer(&model.name, &embeddings, format)))
}

#[derive(Serialize)]
struct Answer<'a> {
    object: &'static str,
    data: Vec<Item<'a>>,
    model: &'a str,
    usage: Usage,
}

#[derive(Serialize)]
struct Item<'a> {
    object: &'static str,
    index: usize,
    embedding: Vector<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector<'a> {
    Numbers(&'a [f32]),
    Base64(String),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

fn answer(model: &str, embeddings: &Embeddings, format: EncodingFormat) -> String {
    let vector =
        |values: &'_ [f32]| -> Vec<u8> { values.iter().flat_map(|value| value.to_le_bytes()).collect() };
    let data = embeddings.items.iter().enumerate().map(|(index, item)| Item {
        object: "embedding",
        index,
        embedding: match format {
            EncodingFormat::Float => Vector::Numbers(&item.values),
            EncodingFormat::Base64 => Vector::Base64(STANDARD.encode(vector(&item.values))),
        },
    });
    let tokens = embeddings.usage.prompt_tokens;
    let answer = Answer {
        object: "list",
        data: data.collect(),
        model,
        usage: Usage { prompt_tokens: tokens, total_tokens: tokens },
    };
    // Numbers are finite, which the engine has checked, so nothing of this can fail.
    serde_json::to_string(&answer).unwrap_or_default()
}
