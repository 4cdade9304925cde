//! Errors in the form of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use ternion::{Error, ErrorKind};

/// What a client gets instead of an answer.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    status: StatusCode,
    body: Body,
    retry_after: Option<Duration>,
    /// Clients of OpenAI repeat a request after a 5xx. `false` tells them that this is of no use.
    may_retry: bool,
}

#[derive(Debug, Clone, Serialize)]
struct Body {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    /// The field of the request that is wrong.
    param: Option<String>,
    /// A string or null: some clients cannot read a number.
    code: Option<&'static str>,
}

/// The JSON document of an error.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorDocument<'a> {
    error: &'a Body,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let kind = match status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        let body = Body { message: message.into(), kind, param: None, code: Some(code) };
        Self { status, body, retry_after: None, may_retry: true }
    }

    /// A 400: the field `param` is wrong. The message does not repeat the name.
    pub(crate) fn field(param: impl Into<String>, message: impl AsRef<str>) -> Self {
        let param = param.into();
        let message = format!("{param}: {}", message.as_ref());
        Self::new(StatusCode::BAD_REQUEST, "invalid_value", message).with_param(param)
    }

    /// A 400 for a field that asks for what this server does not do.
    pub(crate) fn unsupported(param: &str, message: &str) -> Self {
        let mut error = Self::field(param, message);
        error.body.code = Some("unsupported_value");
        error
    }

    pub(crate) fn with_param(mut self, param: impl Into<String>) -> Self {
        self.body.param = Some(param.into());
        self
    }

    pub(crate) fn with_retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    fn not_worth_a_retry(mut self) -> Self {
        self.may_retry = false;
        self
    }

    /// The deadline of a request has passed.
    pub(crate) fn deadline(limit: Duration) -> Self {
        let message = format!(
            "the answer was not complete after {} seconds, the limit of this server",
            limit.as_secs()
        );
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message).not_worth_a_retry()
    }

    /// The server stops before the answer is complete.
    pub(crate) fn shutting_down() -> Self {
        let message = "the server is shutting down";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", message)
            .with_retry_after(Duration::from_secs(5))
    }

    /// An error of a model, for a client. `prompt` is what the request calls the prompt: `messages` or `prompt`.
    pub(crate) fn of(error: &Error, prompt: &str) -> Self {
        match error.kind() {
            ErrorKind::InvalidRequest => Self::of_field(error.message(), prompt, "invalid_value"),
            ErrorKind::ContextOverflow => {
                let message = error.message();
                let message =
                    message.strip_prefix("prompt: ").or(message.strip_prefix("inputs: ")).unwrap_or(message);
                Self::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message).with_param(prompt)
            }
            ErrorKind::Unsupported => Self::of_field(error.message(), prompt, "unsupported_value"),
            ErrorKind::Busy => Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", error.message())
                .with_retry_after(Duration::from_secs(1)),
            ErrorKind::Timeout => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout", error.message()).not_worth_a_retry()
            }
            ErrorKind::ResourceExhausted => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "resource_exhausted", error.message())
                    .with_retry_after(Duration::from_secs(5))
            }
            ErrorKind::Closed | ErrorKind::Cancelled => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "model_unavailable", error.message())
                    .with_retry_after(Duration::from_secs(1))
            }
            // Configuration and files are the operator's. Their paths are in the log and not in the answer.
            ErrorKind::InvalidConfig | ErrorKind::NotFound | ErrorKind::InvalidModel | ErrorKind::Io => {
                let message = "the model cannot be used; the log of the server says why";
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "model_unavailable", message)
                    .with_retry_after(Duration::from_secs(10))
            }
            _ => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", error.message()),
        }
    }

    /// An error whose message begins with the name of a field in the library, which may differ from that of the API.
    fn of_field(message: &str, prompt: &str, code: &'static str) -> Self {
        let is_name = |name: &str| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || matches!(b, b'_' | b'.'))
        };
        let Some((name, rest)) = message.split_once(": ").filter(|(name, _)| is_name(name)) else {
            return Self::new(StatusCode::BAD_REQUEST, code, message);
        };
        let name = match name.strip_prefix("chat.").unwrap_or(name) {
            "prompt" | "tokens" | "inputs" => prompt,
            "constraint" => "response_format",
            "stop_tokens" => "stop_token_ids",
            "template_args" => "chat_template_kwargs",
            "reasoning_budget" => "thinking_token_budget",
            "top" => "logprobs",
            // A completion request has one field for both.
            "top_logprobs" if prompt == "prompt" => "logprobs",
            name => name,
        };
        let mut error = Self::field(name, rest);
        error.body.code = Some(code);
        error
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }

    pub(crate) fn message(&self) -> &str {
        &self.body.message
    }

    pub(crate) fn document(&self) -> ErrorDocument<'_> {
        ErrorDocument { error: &self.body }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.document())).into_response();
        let headers = response.headers_mut();
        if let Some(wait) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)));
        }
        if !self.may_retry {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(error: &Error) -> (u16, serde_json::Value) {
        let error = ApiError::of(error, "messages");
        (error.status.as_u16(), serde_json::to_value(error.document()).unwrap())
    }

    #[test]
    fn a_field_of_the_library_gets_the_name_of_the_api() {
        let (status, body) = json(&Error::invalid_request("stop_tokens: token 9 is out of range"));
        assert_eq!(status, 400);
        assert_eq!(body["error"]["param"], "stop_token_ids");
        assert_eq!(body["error"]["message"], "stop_token_ids: token 9 is out of range");
        let (_, body) = json(&Error::unsupported("constraint: backend `x` cannot constrain answers"));
        assert_eq!(body["error"]["param"], "response_format");
        let (_, body) = json(&Error::invalid_request("chat.tool_choice: no tool has the name `x`"));
        assert_eq!(body["error"]["param"], "tool_choice");
        let (_, body) = json(&Error::invalid_request("The template says: no"));
        assert_eq!(body["error"]["param"], serde_json::Value::Null);
    }

    #[test]
    fn the_kind_of_an_error_decides_the_status() {
        for (kind, status) in [
            (ErrorKind::InvalidRequest, 400),
            (ErrorKind::ContextOverflow, 400),
            (ErrorKind::Busy, 429),
            (ErrorKind::Timeout, 504),
            (ErrorKind::Closed, 503),
            (ErrorKind::Backend, 500),
        ] {
            assert_eq!(json(&Error::new(kind, "x")).0, status, "{kind}");
        }
    }

    #[test]
    fn paths_of_the_server_stay_out_of_answers() {
        let error = Error::io("/secret/model", std::io::Error::from(std::io::ErrorKind::NotFound));
        assert!(!json(&error).1.to_string().contains("secret"));
    }
}
