//! Reading the JSON body of a request: bounded in size and time, with the place of what is wrong.

use std::time::Duration;

use axum::{
    body::{Body, to_bytes},
    extract::{FromRequest, Request},
    http::{StatusCode, header},
};
use serde::de::DeserializeOwned;

use crate::{error::ApiError, state::App};

/// Fields of OpenAI's API that change nothing here and that clients send all the time: they are not worth a line in the log.
const HARMLESS: [&str; 9] = [
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "verbosity",
    "skip_special_tokens",
];

/// A body larger than this is parsed on a thread for blocking work.
const LARGE: usize = 256 << 10;

/// The body of a request as a `T`. Unlike axum's `Json` it needs no `content-type`, because many clients leave it out.
pub(crate) struct JsonBody<T>(pub(crate) T);

impl<T: DeserializeOwned + Send + 'static> FromRequest<App> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let limits = app.limits();
        let (parts, body) = request.into_parts();
        let declared =
            parts.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        if declared.is_some_and(|length: u64| length > limits.body as u64) {
            return Err(too_large(limits.body));
        }
        let bytes = read(body, limits.body, limits.body_time).await?;
        if bytes.len() <= LARGE {
            return parse(&bytes).map(JsonBody);
        }
        let parsed = tokio::task::spawn_blocking(move || parse(&bytes)).await;
        parsed.unwrap_or_else(|_| Err(ApiError::field("body", "cannot be read"))).map(JsonBody)
    }
}

async fn read(body: Body, limit: usize, time: Duration) -> Result<bytes::Bytes, ApiError> {
    match tokio::time::timeout(time, to_bytes(body, limit)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if is_length_limit(&error) => Err(too_large(limit)),
        Ok(Err(_)) => Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "incomplete_body",
            "the body of the request is incomplete",
        )),
        Err(_) => {
            let message =
                format!("the body of the request was not complete after {} seconds", time.as_secs());
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message))
        }
    }
}

fn is_length_limit(error: &axum::Error) -> bool {
    std::error::Error::source(error)
        .is_some_and(<dyn std::error::Error>::is::<http_body_util::LengthLimitError>)
}

fn too_large(limit: usize) -> ApiError {
    let message = format!("the body of the request is too large; at most {limit} bytes expected");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}

/// Parses the JSON text of a request. Unknown fields are logged and ignored.
///
/// # Errors
/// A 400 that names the field, what was found and what is expected.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let mut track = serde_path_to_error::Track::new();
    let mut unknown = Vec::new();
    let mut note = |path: serde_ignored::Path<'_>| {
        if unknown.len() < 16 {
            unknown.push(path.to_string());
        }
    };
    let with_path = serde_path_to_error::Deserializer::new(&mut json, &mut track);
    let parsed = T::deserialize(serde_ignored::Deserializer::new(with_path, &mut note));
    let value = parsed.map_err(|error| wrong(&track.path().to_string(), &error, bytes))?;
    json.end().map_err(|error| wrong(".", &error, bytes))?;
    unknown.retain(|path| !HARMLESS.contains(&path.as_str()));
    if !unknown.is_empty() {
        tracing::info!(fields = unknown.join(", "), "unknown fields of a request are ignored");
    }
    Ok(value)
}

fn wrong(path: &str, error: &serde_json::Error, bytes: &[u8]) -> ApiError {
    // Some wrong types are told as syntax errors, too.
    if !error.is_data() && serde_json::from_slice::<serde::de::IgnoredAny>(bytes).is_err() {
        let message = format!("the body of the request is not valid JSON: {error}");
        return ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message);
    }
    if path == "." {
        return ApiError::field("body", error.to_string());
    }
    let top = path.split(['.', '[']).next().unwrap_or(path);
    let what = if error.is_data() { error.to_string() } else { "has a wrong type".to_owned() };
    ApiError::new(StatusCode::BAD_REQUEST, "invalid_value", format!("{path}: {what}")).with_param(top)
}
