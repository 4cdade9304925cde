//! `POST /v1/chat/completions`.

use axum::{extract::State, response::Response};
use futures_util::StreamExt;
use ternion::GenerateRequest;

use super::json;
use crate::{
    choices::{self, Item, Job},
    error::ApiError,
    reply::{
        chat::{ChatChunks, Collected, Head},
        common::{new_id, now},
        sse,
    },
    request::{ChatRequest, JsonBody},
    state::App,
    token_text::TokenTexts,
};

pub(crate) async fn post(
    State(app): State<App>,
    JsonBody(body): JsonBody<ChatRequest>,
) -> Result<Response, ApiError> {
    let as_ids = body.tokens_as_ids();
    let (params, delivery) = body.into_params(app.limits().messages)?;
    let model = app.model(delivery.model.as_deref()).await?;
    let logprobs = params.logprobs;
    let needs_text = logprobs && !as_ids;
    let texts = TokenTexts::new(if needs_text { model.backend.tokenizer() } else { None });
    let request = GenerateRequest::from(params);
    let count = delivery.choices;
    let jobs = (0..count).map(|index| Job::new(seeded(&request, index))).collect();
    let head = Head { id: new_id("chatcmpl"), created: now(), model: model.name };
    let items = choices::start(&app, model.backend, jobs, "messages").await?;
    if delivery.stream {
        let chunks = ChatChunks::new(head, count, &texts, logprobs, delivery.include_usage);
        return Ok(sse::respond(items, chunks));
    }
    let mut answers = Collected::new(count, &texts, logprobs);
    let mut items = std::pin::pin!(items);
    while let Some(item) = items.next().await {
        match item {
            Item::Event(index, event) => answers.event(index, event),
            Item::End => break,
            Item::Error(error) => return Err(error),
        }
    }
    Ok(json(answers.into_json(&head)))
}

/// The request for one of several answers: each draws with a seed of its own.
pub(super) fn seeded(request: &GenerateRequest, index: usize) -> GenerateRequest {
    let mut request = request.clone();
    let seed = &mut request.params.sampling.seed;
    *seed = seed.map(|seed| seed.wrapping_add(index as u64));
    request
}
