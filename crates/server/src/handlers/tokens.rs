//! `POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`, in the forms of vLLM and of llama.cpp.

use axum::{
    extract::{Query, State},
    response::Response,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{blocking, json as document, tokenizer_of};
use crate::{
    error::ApiError,
    request::{DetokenizeRequest, Input, JsonBody, TokenizeRequest},
    state::App,
    token_text::TokenTexts,
};

pub(crate) async fn tokenize(
    State(app): State<App>,
    JsonBody(body): JsonBody<TokenizeRequest>,
) -> Result<Response, ApiError> {
    let model = app.model(body.model.as_deref()).await?;
    let (wants_strs, wants_pieces) = body.wants_text();
    let input = body.into_input(app.limits().messages)?;
    let prompt = if matches!(input, Input::Chat { .. }) { "messages" } else { "prompt" };
    let tokenizer = tokenizer_of(&model)?;
    let texts = TokenTexts::new(Some(tokenizer.clone()));
    let tokens = blocking(prompt, move || match input {
        Input::Text { text, add_special, trusted: true } => tokenizer.encode(&text, add_special),
        Input::Text { text, add_special, trusted: false } => {
            let (before, after) = if add_special { tokenizer.added_around() } else { Default::default() };
            Ok([before, &tokenizer.encode_plain(&text)?, after].concat())
        }
        Input::Chat { messages, options } => tokenizer.encode_chat_with(&messages, &options),
    })
    .await?;
    let context = model.backend.info().limits.context_length;
    let strs = wants_strs.then(|| tokens.iter().map(|&id| texts.get(id).text).collect::<Vec<_>>());
    let count = tokens.len();
    let tokens = if wants_pieces {
        json!(tokens.iter().map(|&id| piece(&texts, id)).collect::<Vec<_>>())
    } else {
        json!(tokens)
    };
    let answer = json!({ "count": count, "max_model_len": context, "tokens": tokens, "token_strs": strs });
    Ok(document(answer.to_string()))
}

/// A token with its text, or with its bytes where they are no text, as llama.cpp shows it.
fn piece(texts: &TokenTexts, id: u32) -> Value {
    let shown = texts.get(id);
    match String::from_utf8(shown.bytes) {
        Ok(text) => json!({ "id": id, "piece": text }),
        Err(error) => json!({ "id": id, "piece": error.into_bytes() }),
    }
}

pub(crate) async fn detokenize(
    State(app): State<App>,
    JsonBody(body): JsonBody<DetokenizeRequest>,
) -> Result<Response, ApiError> {
    let tokens = body.tokens.ok_or_else(|| ApiError::field("tokens", "is missing"))?;
    let model = app.model(body.model.as_deref()).await?;
    let tokenizer = tokenizer_of(&model)?;
    if let Some(id) = tokens.iter().find(|&&id| tokenizer.token(id).is_none()) {
        return Err(ApiError::field("tokens", format!("the model has no token {id}")));
    }
    let text = blocking("tokens", move || tokenizer.decode(&tokens, false)).await?;
    // `prompt` is vLLM's name for it and `content` llama.cpp's.
    Ok(document(json!({ "prompt": text, "content": text }).to_string()))
}

/// The parameters of a request without a body.
#[derive(Debug, Deserialize)]
pub(crate) struct ModelQuery {
    model: Option<String>,
}

pub(crate) async fn info(
    State(app): State<App>,
    Query(query): Query<ModelQuery>,
) -> Result<Response, ApiError> {
    let model = app.model(query.model.as_deref()).await?;
    let tokenizer = tokenizer_of(&model)?;
    let info = model.backend.info();
    let name = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
    let end = tokenizer.eos_id().or(info.end_tokens.first().copied());
    let answer = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model": model.name,
        "vocab_size": tokenizer.vocab_size(),
        "model_max_length": info.limits.context_length,
        "bos_token": name(tokenizer.bos_id()),
        "eos_token": name(end),
        "bos_token_id": tokenizer.bos_id(),
        "eos_token_id": end,
        "end_tokens": info.end_tokens.iter().filter_map(|&id| tokenizer.token(id)).collect::<Vec<_>>(),
        "add_bos_token": !tokenizer.added_around().0.is_empty(),
        "has_chat_template": tokenizer.has_chat_template(),
        "chat_template": tokenizer.chat_template(),
    });
    Ok(document(answer.to_string()))
}
