//! Work that takes long, on the runtime's threads for blocking work.

use tokio::task::JoinError;

use crate::{Error, ErrorKind, Result};

/// Runs `work` where blocking is allowed; `what` names it in errors. Must be awaited in a tokio runtime.
///
/// # Errors
/// What `work` returns; [`Backend`](ErrorKind::Backend) if it panics, and [`Closed`](ErrorKind::Closed) if the runtime
/// shuts down before it runs.
pub async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(failed(what, e)))
}

/// The error of a task that did not end by itself.
pub fn failed(what: &'static str, error: JoinError) -> Error {
    let (kind, how) = if error.is_panic() {
        (ErrorKind::Backend, "panicked")
    } else {
        (ErrorKind::Closed, "was interrupted")
    };
    Error::new(kind, format!("{what} {how}")).with_source(error)
}
