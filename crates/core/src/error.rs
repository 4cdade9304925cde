//! One error type for the whole workspace: what kind of failure it is, which operation failed, on what, and why.
//!
//! A host decides by [`ErrorKind`] (and [`Error::is_retryable`]); a person reads the one line that `Display` prints.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The result of every fallible function of the workspace.
pub type Result<T, E = Error> = std::result::Result<T, E>;

type Source = Box<dyn std::error::Error + Send + Sync + 'static>;

/// What kind of failure an [`Error`] is, with what a caller can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// A field of a request is out of its range. Change the request.
    InvalidRequest,
    /// The configuration cannot be read or names something that does not exist. Correct the file or the environment.
    InvalidConfig,
    /// No file is at the path that was named. Correct the path or fetch the model.
    NotFound,
    /// A model file is damaged or contradicts itself. Fetch it again; if that does not help, the file is wrong.
    InvalidModel,
    /// The input is well-formed but asks for something that is not implemented or not compiled in.
    Unsupported,
    /// The prompt does not fit into the context. Shorten it or raise the context in the configuration.
    ContextOverflow,
    /// Memory or another resource is exhausted. Lower the context or the number of sequences.
    ResourceExhausted,
    /// The queue is full at the moment. Try again later.
    Busy,
    /// The answer took longer than the host allows. Try again later, or allow more.
    Timeout,
    /// The caller cancelled the request.
    Cancelled,
    /// The backend has been shut down or its thread has died. Load it again.
    Closed,
    /// The engine failed while it computed.
    Backend,
    /// Reading or writing a file failed.
    Io,
}

impl ErrorKind {
    /// A stable, lower-case name, for logs and for JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::InvalidConfig => "invalid_config",
            Self::NotFound => "not_found",
            Self::InvalidModel => "invalid_model",
            Self::Unsupported => "unsupported",
            Self::ContextOverflow => "context_overflow",
            Self::ResourceExhausted => "resource_exhausted",
            Self::Busy => "busy",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
            Self::Closed => "closed",
            Self::Backend => "backend",
            Self::Io => "io",
        }
    }

    /// Whether another model may succeed where one failed in this way: what a fallback goes on after.
    ///
    /// True for what lies in the model, its files or its engine (`NotFound`, `InvalidModel`, `Unsupported`,
    /// `ResourceExhausted`, `Busy`, `Timeout`, `Closed`, `Backend`, `Io`); false for what lies in the request, in the
    /// configuration or with the caller (`InvalidRequest`, `ContextOverflow`, `InvalidConfig`, `Cancelled`).
    pub fn should_fail_over(self) -> bool {
        match self {
            Self::InvalidRequest | Self::ContextOverflow | Self::InvalidConfig | Self::Cancelled => false,
            Self::NotFound
            | Self::InvalidModel
            | Self::Unsupported
            | Self::ResourceExhausted
            | Self::Busy
            | Self::Timeout
            | Self::Closed
            | Self::Backend
            | Self::Io => true,
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What went wrong: a kind, the operation, a message, `key=value` context and the underlying error.
///
/// It is one pointer wide, so that `Result`s stay small.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    operation: &'static str,
    message: String,
    context: Vec<(&'static str, String)>,
    source: Option<Source>,
    retryable: bool,
    retried: bool,
}

impl Error {
    /// An error of `kind` with a message that says what was found and what was expected.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            operation: "",
            message: message.into(),
            context: Vec::new(),
            source: None,
            retryable: matches!(kind, ErrorKind::Busy | ErrorKind::Timeout),
            retried: false,
        }))
    }

    /// An [`ErrorKind::InvalidRequest`] error.
    pub fn invalid_request(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidRequest, message)
    }

    /// An [`ErrorKind::InvalidConfig`] error.
    pub fn invalid_config(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidConfig, message)
    }

    /// An [`ErrorKind::InvalidModel`] error.
    pub fn invalid_model(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidModel, message)
    }

    /// An [`ErrorKind::Unsupported`] error.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// An [`ErrorKind::Backend`] error.
    pub fn backend(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Backend, message)
    }

    /// The [`ErrorKind::Cancelled`] error of a request whose token was cancelled.
    pub fn cancelled() -> Self {
        Self::new(ErrorKind::Cancelled, "the request was cancelled")
    }

    /// An error of reading or writing `path`: [`ErrorKind::NotFound`] where nothing is there, else [`ErrorKind::Io`].
    pub fn io(path: impl AsRef<std::path::Path>, source: std::io::Error) -> Self {
        let kind =
            if source.kind() == std::io::ErrorKind::NotFound { ErrorKind::NotFound } else { ErrorKind::Io };
        let message = if kind == ErrorKind::NotFound { "no such file" } else { "cannot be read or written" };
        Self::new(kind, message).with("path", path.as_ref().display()).with_source(source)
    }

    /// The same error, naming the operation that failed. An inner operation that is already named stays.
    pub fn with_operation(mut self, operation: &'static str) -> Self {
        if self.0.operation.is_empty() {
            self.0.operation = operation;
        }
        self
    }

    /// The same error with one more piece of context, such as `("tensor", name)`. A key that is set already stays.
    pub fn with(mut self, key: &'static str, value: impl fmt::Display) -> Self {
        if !self.0.context.iter().any(|(k, _)| *k == key) {
            self.0.context.push((key, value.to_string()));
        }
        self
    }

    /// The same error with the error that caused it.
    pub fn with_source(mut self, source: impl Into<Source>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The same error, marked as worth (or not worth) a retry of the same call.
    pub fn with_retryable(mut self, retryable: bool) -> Self {
        self.0.retryable = retryable;
        self
    }

    /// The same error, marked as one that did not pass although the call was made again. Whoever retries a call marks the
    /// error of the last attempt, so that a retry around it does not multiply the attempts.
    pub fn into_retried(mut self) -> Self {
        self.0.retried = true;
        self
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The operation that failed, such as `load` or `generate`; empty where it was not named.
    pub fn operation(&self) -> &'static str {
        self.0.operation
    }

    /// The message alone, without operation, context and source.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The `key=value` context in the order in which it was added, innermost first.
    pub fn context(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.context.iter().map(|(k, v)| (*k, v.as_str()))
    }

    /// Whether the same call may succeed later without any change.
    pub fn is_retryable(&self) -> bool {
        self.0.retryable
    }

    /// Whether the call has been retried already, without success: another retry at once is of no use.
    pub fn is_retried(&self) -> bool {
        self.0.retried
    }
}

impl fmt::Display for Error {
    /// One line: `operation: message (key: value, key: value): source`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        if !inner.operation.is_empty() {
            write!(f, "{}: ", inner.operation)?;
        }
        f.write_str(&inner.message)?;
        for (i, (key, value)) in inner.context.iter().enumerate() {
            write!(f, "{}{key}: {value}", if i == 0 { " (" } else { ", " })?;
        }
        if !inner.context.is_empty() {
            f.write_str(")")?;
        }
        if let Some(source) = &inner.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("operation", &self.0.operation)
            .field("message", &self.0.message)
            .field("context", &self.0.context)
            .field("source", &self.0.source)
            .field("retryable", &self.0.retryable)
            .field("retried", &self.0.retried)
            .finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|s| s.as_ref() as _)
    }
}

/// Adds operation and context to the error of a `Result` in passing.
pub trait ResultExt<T> {
    /// [`Error::with_operation`] on the error.
    ///
    /// # Errors
    /// The error that was there.
    fn with_operation(self, operation: &'static str) -> Result<T>;
    /// [`Error::with`] on the error.
    ///
    /// # Errors
    /// The error that was there.
    fn with(self, key: &'static str, value: impl fmt::Display) -> Result<T>;
}

impl<T> ResultExt<T> for Result<T> {
    fn with_operation(self, operation: &'static str) -> Result<T> {
        self.map_err(|e| e.with_operation(operation))
    }

    fn with(self, key: &'static str, value: impl fmt::Display) -> Result<T> {
        self.map_err(|e| e.with(key, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_is_one_line_with_everything() {
        let error = Error::invalid_model("scale is 0, expected a positive number")
            .with("tensor", "q_proj.weight_scale")
            .with("file", "model.safetensors")
            .with("file", "another") // the innermost context wins
            .with_operation("load")
            .with_operation("outer")
            .with_source(std::io::Error::other("cause"));
        assert_eq!(
            error.to_string(),
            "load: scale is 0, expected a positive number (tensor: q_proj.weight_scale, file: model.safetensors): cause"
        );
        assert_eq!(error.kind(), ErrorKind::InvalidModel);
        assert!(!error.is_retryable());
        assert!(std::error::Error::source(&error).is_some());
    }

    #[test]
    fn only_what_passes_by_itself_is_worth_a_retry_by_default() {
        assert!(Error::new(ErrorKind::Busy, "queue full").is_retryable());
        assert!(Error::new(ErrorKind::Timeout, "too slow").is_retryable());
        assert!(!Error::backend("x").is_retryable());
        assert!(Error::backend("x").with_retryable(true).is_retryable());
        let busy = Error::new(ErrorKind::Busy, "queue full");
        assert!(!busy.is_retried());
        let retried = busy.into_retried().with_operation("generate");
        assert!(retried.is_retryable() && retried.is_retried());
    }

    #[test]
    fn a_missing_file_is_told_from_an_unreadable_one() {
        let missing = Error::io("/x", std::io::Error::from(std::io::ErrorKind::NotFound));
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        assert!(missing.to_string().contains("/x"));
        assert_eq!(
            Error::io("/x", std::io::Error::from(std::io::ErrorKind::PermissionDenied)).kind(),
            ErrorKind::Io
        );
    }
}
