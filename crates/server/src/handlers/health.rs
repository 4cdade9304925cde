//! `GET /health` and `GET /ready`: alive, and able to answer.

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::json;

use crate::{error::ApiError, state::App};

/// The process runs and its tasks are served.
pub(crate) async fn health() -> Response {
    Json(json!({ "status": "ok" })).into_response()
}

/// The default model is loaded and works, and the server accepts requests. A load balancer asks this.
pub(crate) async fn ready(State(app): State<App>) -> Response {
    if app.is_draining() {
        return ApiError::shutting_down().into_response();
    }
    match app.ready().await {
        Ok(model) => Json(json!({ "status": "ready", "model": model })).into_response(),
        Err(reason) => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", reason)
            .with_retry_after(std::time::Duration::from_secs(2))
            .into_response(),
    }
}
