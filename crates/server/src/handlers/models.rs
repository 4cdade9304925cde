//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::{
    extract::{Path, State},
    http::StatusCode,
    response::Response,
};
use serde_json::{Value, json};

use ternion::LlmBackend;

use super::json as document;
use crate::{error::ApiError, state::App};

pub(crate) async fn list(State(app): State<App>) -> Response {
    let mut data: Vec<Value> = Vec::new();
    for (id, name) in names(&app) {
        data.push(describe(&app, &id, &name));
    }
    document(json!({ "object": "list", "data": data }).to_string())
}

pub(crate) async fn get(State(app): State<App>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let Some((id, name)) = names(&app).into_iter().find(|(known, _)| *known == id) else {
        let shown: String = id.chars().take(100).collect();
        let message = format!("no model `{shown}`");
        return Err(ApiError::new(StatusCode::NOT_FOUND, "model_not_found", message).with_param("model"));
    };
    Ok(document(describe(&app, &id, &name).to_string()))
}

/// What clients may ask for, with the model of the configuration that it is: the default one first.
fn names(app: &App) -> Vec<(String, String)> {
    let config = app.models().config();
    let default = config.model(None).ok().map(|(name, _)| name.to_owned());
    let others = config.models.keys().filter(|name| Some(*name) != default.as_ref());
    let own = default.iter().chain(others).map(|name| (name.clone(), name.clone()));
    let aliases = app.options().aliases.iter();
    own.chain(aliases.map(|(alias, name)| (alias.clone(), name.clone()))).collect()
}

/// A model that is not loaded yet tells nothing of itself: to list models loads none.
fn describe(app: &App, id: &str, name: &str) -> Value {
    let mut entry = json!({
        "id": id,
        "object": "model",
        "created": app.created(),
        "owned_by": "ternion",
        "root": name,
        "parent": if id == name { None } else { Some(name) },
    });
    if let Some(model) = app.loaded(name) {
        let info = model.info();
        entry["max_model_len"] = info.limits.context_length.into();
        entry["ternion"] = json!({
            "backend": info.backend,
            "architecture": info.architecture,
            "format": info.format,
            "parameters": info.parameters,
            "capabilities": info.capabilities,
            "embedding": info.embedding,
            "defaults": info.defaults,
        });
    }
    entry
}
