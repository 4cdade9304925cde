//! What a failed exchange with a server becomes: an error whose kind says who can do something about it.
//!
//! | from the server | kind | made again |
//! | --- | --- | --- |
//! | no connection, a connection that breaks | `Backend` | yes |
//! | 408, 504, nothing within a timeout | `Timeout` | yes |
//! | 429, 503 | `Busy` | yes |
//! | 429 for a quota that is used up | `ResourceExhausted` | no |
//! | 409, other statuses from 500 on | `Backend` | yes |
//! | 400 and others about the length of the prompt | `ContextOverflow` | no |
//! | 400, 422 about a value of the sampling or of log-probabilities | `Unsupported` | no |
//! | 400, 413, 422 | `InvalidRequest` | no |
//! | 401, 403 | `InvalidConfig`; `Backend` with `fall_back_when_denied` | no |
//! | 404 | `NotFound` | no |
//! | 405, 501 | `Unsupported` | no |
//! | HTML or another type where an answer is expected | `Backend` | no |

use std::time::Duration;

use reqwest::{StatusCode, header::HeaderMap};
use serde_json::Value;
use ternion_core::{Error, ErrorKind};

/// Characters of a server's message that an error keeps.
const MAX_MESSAGE: usize = 500;

/// A failed attempt.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: Error,
    /// Whether the same request may be made again, as long as nothing of its answer has come.
    pub(crate) again: bool,
    /// How long the server asks to wait before that.
    pub(crate) retry_after: Option<Duration>,
}

impl Failure {
    /// A failure that another attempt would not change.
    pub(crate) fn lasting(error: Error) -> Self {
        Self { error, again: false, retry_after: None }
    }

    /// A failure that may pass.
    pub(crate) fn passing(error: Error) -> Self {
        Self { error: error.with_retryable(true), again: true, retry_after: None }
    }

    /// The failure that a response with this status stands for.
    pub(crate) fn of_status(status: StatusCode, headers: &HeaderMap, body: &str) -> Self {
        let told = Told::read(body);
        let kind = told.kind(status);
        let passes = match status.as_u16() {
            408 | 409 => true,
            429 => kind == ErrorKind::Busy,
            501 => false,
            code => code >= 500,
        } && kind != ErrorKind::ContextOverflow;
        let asked_not_to = headers.get("x-should-retry").is_some_and(|value| value == "false");
        let request =
            headers.get("x-request-id").and_then(|id| id.to_str().ok()).filter(|id| id.len() <= 100);
        let again = passes && !asked_not_to;
        let mut error = Error::new(kind, told.line(status)).with_retryable(again);
        if let Some(id) = request {
            error = error.with("request", id);
        }
        Self { error, again, retry_after: retry_after(headers) }
    }

    /// The same as one after which a fallback goes on, if the server has refused the key.
    pub(crate) fn falling_over(self) -> Self {
        if self.error.kind() != ErrorKind::InvalidConfig {
            return self;
        }
        let error = Error::backend(self.error.message()).with_retryable(false);
        Self { error, ..self }
    }

    /// The failure of sending a request or of reading a response.
    pub(crate) fn of_transport(error: reqwest::Error) -> Self {
        let error = error.without_url();
        let (kind, what) = if error.is_timeout() {
            (ErrorKind::Timeout, "no connection within the timeout")
        } else if error.is_connect() {
            (ErrorKind::Backend, "cannot connect to the server")
        } else if error.is_body() || error.is_decode() {
            (ErrorKind::Backend, "the connection broke while the response was read")
        } else {
            (ErrorKind::Backend, "the request could not be sent")
        };
        Self::passing(Error::new(kind, what).with_source(causes(&error)))
    }
}

/// The innermost causes of an error in one line: the outer ones say only that something failed.
fn causes(error: &reqwest::Error) -> String {
    let mut causes = Vec::new();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        causes.push(cause.to_string());
        source = cause.source();
    }
    causes.dedup();
    let last = causes.len().saturating_sub(2);
    if causes.is_empty() { error.to_string() } else { causes[last..].join(": ") }
}

/// The error object that stands in a stream instead of a chunk.
pub(crate) fn in_stream(error: &Value) -> Error {
    let told = Told::of_object(error);
    let status = told.code.as_deref().and_then(|code| code.parse().ok()).unwrap_or(500);
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let kind = told.kind(status);
    let text = if told.message.is_empty() { shortened(&error.to_string()) } else { told.message };
    let retryable = matches!(kind, ErrorKind::Busy | ErrorKind::Timeout) || status.as_u16() >= 500;
    Error::new(kind, format!("the server ended the answer with an error: {text}")).with_retryable(retryable)
}

/// What a server tells of an error, in whatever form.
#[derive(Debug, Default)]
struct Told {
    message: String,
    /// `type` and `code`, and the field `param`.
    kind: Option<String>,
    code: Option<String>,
    param: Option<String>,
    html: bool,
}

impl Told {
    /// Reads OpenAI's form, vLLM's older one, FastAPI's `detail`, HTML and plain text.
    fn read(body: &str) -> Self {
        let start = body.trim_start();
        if let Ok(value) = serde_json::from_str::<Value>(start) {
            if let Some(error) = value.get("error") {
                return Self::of_object(error);
            }
            if let Some(detail) = value.get("detail") {
                return Self { message: details(detail), ..Self::default() };
            }
            if value.is_object() {
                return Self::of_object(&value);
            }
        }
        let html = start.get(..100.min(start.len())).unwrap_or(start).to_ascii_lowercase();
        let html = html.starts_with("<!doctype") || html.starts_with("<html");
        let message = if html { title(start) } else { start.to_owned() };
        Self { message: shortened(&message), html, ..Self::default() }
    }

    fn of_object(error: &Value) -> Self {
        if let Some(text) = error.as_str() {
            return Self { message: shortened(text), ..Self::default() };
        }
        // vLLM's codes are numbers, OpenAI's are texts.
        let word = |key: &str| match error.get(key) {
            Some(Value::String(text)) if !text.is_empty() => Some(shortened(text)),
            Some(Value::Number(number)) => Some(number.to_string()),
            _ => None,
        };
        let message = match error.get("message") {
            Some(Value::String(text)) => shortened(text),
            Some(Value::Null) | None => String::new(),
            Some(other) => shortened(&other.to_string()),
        };
        Self { message, kind: word("type"), code: word("code"), param: word("param"), html: false }
    }

    fn kind(&self, status: StatusCode) -> ErrorKind {
        let says = |words: &str| self.kind.as_deref() == Some(words) || self.code.as_deref() == Some(words);
        if matches!(status.as_u16(), 400 | 413 | 422 | 500) && self.is_about_the_context() {
            return ErrorKind::ContextOverflow;
        }
        if matches!(status.as_u16(), 400 | 422) && self.is_about_a_range() {
            return ErrorKind::Unsupported;
        }
        match status.as_u16() {
            401 | 403 => ErrorKind::InvalidConfig,
            404 if says("model_not_supported") => ErrorKind::Unsupported,
            404 => ErrorKind::NotFound,
            402 => ErrorKind::ResourceExhausted,
            405 | 501 => ErrorKind::Unsupported,
            408 | 504 => ErrorKind::Timeout,
            429 if says("insufficient_quota") => ErrorKind::ResourceExhausted,
            429 | 503 => ErrorKind::Busy,
            400..=499 if status != StatusCode::CONFLICT => ErrorKind::InvalidRequest,
            _ => ErrorKind::Backend,
        }
    }

    fn is_about_the_context(&self) -> bool {
        let named = [&self.kind, &self.code].into_iter().flatten();
        let known = ["context_length_exceeded", "exceed_context_size_error"];
        if named.into_iter().any(|name| known.contains(&name.as_str())) {
            return true;
        }
        let text = self.message.to_ascii_lowercase();
        let phrases = [
            "maximum context length",
            "maximum model length",
            "max_model_len",
            "available context size",
            "context length exceeded",
            "longer than the maximum",
            "exceeds the context",
        ];
        phrases.iter().any(|phrase| text.contains(phrase))
    }

    /// Whether the server has a narrower range for a value. Requests are checked before they are sent, so a value that it
    /// refuses is one that another backend takes.
    fn is_about_a_range(&self) -> bool {
        const FIELDS: [&str; 9] = [
            "frequency_penalty",
            "logit_bias",
            "logprobs",
            "presence_penalty",
            "prompt_logprobs",
            "repetition_penalty",
            "temperature",
            "top_k",
            "top_logprobs",
        ];
        if let Some(param) = &self.param {
            return FIELDS.contains(&param.as_str());
        }
        let text = self.message.to_ascii_lowercase();
        FIELDS.iter().any(|field| text.contains(field))
    }

    fn line(&self, status: StatusCode) -> String {
        let name = status.canonical_reason().unwrap_or("unknown status");
        let mut line = format!("the server answered {} {name}", status.as_u16());
        if self.html {
            line += ", as an HTML page that a proxy or another service may have made";
        }
        if let Some(param) = &self.param {
            line += &format!(", about `{param}`");
        }
        if !self.message.is_empty() {
            line += ": ";
            line += &self.message;
        }
        line
    }
}

/// FastAPI's `detail`: a text, or a list of what is wrong with which field.
fn details(detail: &Value) -> String {
    let Some(all) = detail.as_array() else {
        return shortened(detail.as_str().unwrap_or(&detail.to_string()));
    };
    let one = |item: &Value| {
        let place: Vec<String> = item
            .get("loc")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .map(|part| part.as_str().map_or_else(|| part.to_string(), str::to_owned))
            .filter(|part| part != "body")
            .collect();
        let message = item.get("msg").and_then(Value::as_str).unwrap_or_default();
        format!("{}: {message}", place.join("."))
    };
    shortened(&all.iter().map(one).collect::<Vec<_>>().join("; "))
}

fn title(html: &str) -> String {
    let lower = html.to_ascii_lowercase();
    let Some(start) = lower.find("<title>").map(|at| at + "<title>".len()) else { return String::new() };
    let Some(end) = lower[start..].find("</title>") else { return String::new() };
    html.get(start..start + end).unwrap_or_default().to_owned()
}

/// One line of a bounded length.
pub(crate) fn shortened(text: &str) -> String {
    let mut line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = line.char_indices().nth(MAX_MESSAGE) {
        line.truncate(end);
        line.push('…');
    }
    line
}

/// `Retry-After` in seconds, or `retry-after-ms`. A date is not read: clocks differ.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let number = |name: &str| headers.get(name)?.to_str().ok()?.trim().parse::<f64>().ok();
    let seconds = number("retry-after-ms").map(|ms| ms / 1000.0).or_else(|| number("retry-after"))?;
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(status: u16, body: &str) -> (ErrorKind, bool, String) {
        let failure = Failure::of_status(StatusCode::from_u16(status).unwrap(), &HeaderMap::new(), body);
        (failure.error.kind(), failure.again, failure.error.message().to_owned())
    }

    #[test]
    fn the_forms_of_servers_become_kinds() {
        use ErrorKind::{Backend, Busy, ContextOverflow, InvalidConfig, InvalidRequest, NotFound, Timeout};
        let openai = |code: &str| {
            format!(r#"{{"error": {{"message": "m", "type": "t", "param": null, "code": {code}}}}}"#)
        };
        for (status, body, expected, again) in [
            (401, openai("\"invalid_api_key\""), InvalidConfig, false),
            (404, openai("\"model_not_found\""), NotFound, false),
            (429, openai("null"), Busy, true),
            (429, openai("\"insufficient_quota\""), ErrorKind::ResourceExhausted, false),
            (400, openai("\"context_length_exceeded\""), ContextOverflow, false),
            (400, openai("400"), InvalidRequest, false),
            (408, String::new(), Timeout, true),
            (500, openai("500"), Backend, true),
            (501, String::new(), ErrorKind::Unsupported, false),
            (502, "<html><head><title>502 Bad Gateway</title></head></html>".to_owned(), Backend, true),
            (503, openai("503"), Busy, true),
            // vLLM, before 0.9 without the outer object.
            (
                400,
                r#"{"object": "error", "message": "This model's maximum context length is 64 tokens.", "type": "BadRequestError", "param": null, "code": 400}"#.to_owned(),
                ContextOverflow,
                false,
            ),
            // llama-server.
            (
                400,
                r#"{"error":{"code":400,"message":"request (600 tokens) exceeds","type":"exceed_context_size_error","n_ctx":512}}"#.to_owned(),
                ContextOverflow,
                false,
            ),
            (422, r#"{"detail": [{"loc": ["body", "top_p"], "msg": "too large"}]}"#.to_owned(), InvalidRequest, false),
            // Ranges of vLLM and OpenAI that are narrower than ours.
            (
                400,
                r#"{"error": {"message": "presence_penalty must be in [-2, 2], got 100.0.", "type": "BadRequestError", "param": null, "code": 400}}"#.to_owned(),
                ErrorKind::Unsupported,
                false,
            ),
            (
                400,
                r#"{"error": {"message": "Requested sample logprobs of 50, which is greater than max allowed: 20", "type": "BadRequestError", "param": null, "code": 400}}"#.to_owned(),
                ErrorKind::Unsupported,
                false,
            ),
            (
                400,
                r#"{"error": {"message": "Invalid value", "type": "invalid_request_error", "param": "top_logprobs", "code": "decimal_above_max_value"}}"#.to_owned(),
                ErrorKind::Unsupported,
                false,
            ),
        ] {
            let (found, retried, message) = kind(status, &body);
            assert_eq!((found, retried), (expected, again), "{status} {body}: {message}");
        }
    }

    #[test]
    fn messages_are_one_line_with_what_the_server_says() {
        let (_, _, message) = kind(422, r#"{"detail": [{"loc": ["body", "top_p"], "msg": "too\nlarge"}]}"#);
        assert_eq!(message, "the server answered 422 Unprocessable Entity: top_p: too large");
        let (_, _, message) = kind(502, "<!DOCTYPE html>\n<html><title>Bad gateway</title>");
        assert!(message.contains("HTML page") && message.ends_with(": Bad gateway"), "{message}");
        let (_, _, message) = kind(400, &"ü".repeat(100_000));
        assert!(message.chars().count() < 600);
    }

    #[test]
    fn a_wait_is_read_from_both_headers() {
        let headers = |name: &'static str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(headers("retry-after", "2"), Some(Duration::from_secs(2)));
        assert_eq!(headers("retry-after-ms", "150"), Some(Duration::from_millis(150)));
        for bad in ["-1", "soon", "NaN", "1e300", "Wed, 21 Oct 2026 07:28:00 GMT"] {
            assert_eq!(headers("retry-after", bad), None, "{bad}");
        }
    }
}
