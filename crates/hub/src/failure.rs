//! What a failed exchange with the hub becomes: an error that says who can do something about it, and whether the request is worth
//! another attempt.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use reqwest::{StatusCode, header::HeaderMap};
use ternion_core::{Error, ErrorKind, Result};

/// A server that asks to wait longer than this is not waited for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Characters of a server's message that an error keeps.
const MAX_MESSAGE: usize = 300;

/// A failed attempt.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: Error,
    /// Whether another attempt may succeed.
    pub(crate) again: bool,
    /// How long the server asks to wait before that.
    pub(crate) wait: Option<Duration>,
}

impl Failure {
    pub(crate) fn lasting(error: Error) -> Self {
        Self { error, again: false, wait: None }
    }

    pub(crate) fn passing(error: Error) -> Self {
        Self { error: error.with_retryable(true), again: true, wait: None }
    }

    /// The failure of sending a request or of reading its response.
    pub(crate) fn of_transport(error: reqwest::Error) -> Self {
        let error = error.without_url();
        let (kind, what) = if error.is_timeout() {
            (ErrorKind::Timeout, "the hub does not answer in time")
        } else if error.is_connect() {
            (ErrorKind::Io, "the hub cannot be reached")
        } else if error.is_redirect() {
            return Self::lasting(Error::new(ErrorKind::Io, "the hub redirects in circles"));
        } else {
            (ErrorKind::Io, "the connection to the hub broke")
        };
        // The outer errors say only that something failed.
        let mut cause: &dyn std::error::Error = &error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        let cause = cause.to_string();
        Self::passing(Error::new(kind, what).with_source(cause))
    }

    /// The failure that a response stands for. `has_token`: the request had one.
    pub(crate) fn of_response(status: StatusCode, headers: &HeaderMap, has_token: bool) -> Self {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let (code, said) = (text("x-error-code"), shortened(text("x-error-message")));
        let lasting = |kind, message: &str| Self::lasting(Error::new(kind, message));
        match (code, status.as_u16()) {
            ("GatedRepo", _) if has_token => lasting(
                ErrorKind::InvalidConfig,
                "the repository is gated and the token gives no access; accept its conditions on the hub with the token's \
                 account",
            ),
            ("GatedRepo", _) => lasting(
                ErrorKind::InvalidConfig,
                "the repository is gated; accept its conditions on the hub, and set HF_TOKEN to a token of that account",
            ),
            ("RevisionNotFound", _) => lasting(ErrorKind::NotFound, "the repository has no such revision"),
            ("EntryNotFound", _) => lasting(ErrorKind::NotFound, "the repository has no such file"),
            ("DisabledRepo", _) => lasting(ErrorKind::NotFound, "the hub has disabled the repository"),
            // The hub does not tell whether a repository is private to those who may not see it.
            ("RepoNotFound", _) | (_, 401) if has_token => lasting(
                ErrorKind::NotFound,
                "no such repository, or the token (HF_TOKEN) gives no access to it",
            ),
            ("RepoNotFound", _) | (_, 401) => lasting(
                ErrorKind::NotFound,
                "no such repository; if it is private, set HF_TOKEN to a token that gives access",
            ),
            (_, 403) => lasting(ErrorKind::InvalidConfig, &joined("the hub refuses access", &said)),
            (_, 404) => {
                lasting(ErrorKind::NotFound, &joined("the hub has no such repository or file", &said))
            }
            (_, 429) => Self {
                wait: retry_after(headers),
                ..Self::passing(Error::new(ErrorKind::Busy, "the hub limits the rate of requests"))
            },
            (_, 408 | 500..) => Self {
                wait: retry_after(headers),
                ..Self::passing(Error::new(
                    ErrorKind::Io,
                    joined(&format!("the hub answers {status}"), &said),
                ))
            },
            _ => lasting(ErrorKind::Io, &joined(&format!("the hub answers {status}"), &said)),
        }
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get("retry-after")?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

fn joined(what: &str, said: &str) -> String {
    if said.is_empty() { what.to_owned() } else { format!("{what}: {said}") }
}

fn shortened(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_MESSAGE).collect()
}

/// The waits between the attempts of one request.
pub(crate) struct Waits(ExponentialBackoff);

impl Waits {
    /// Waits between so many attempts.
    pub(crate) fn new(attempts: usize) -> Self {
        let delays = ExponentialBuilder::new()
            .with_min_delay(Duration::from_millis(250))
            .with_max_delay(Duration::from_secs(8))
            .with_max_times(attempts.saturating_sub(1))
            .with_jitter();
        Self(delays.build())
    }

    /// Waits before the next attempt.
    ///
    /// # Errors
    /// That of the failure, if it is the last one.
    pub(crate) async fn after(&mut self, failure: Failure) -> Result<()> {
        if !failure.again || failure.wait.is_some_and(|wait| wait > LONGEST_WAIT) {
            return Err(failure.error);
        }
        let Some(delay) = self.0.next() else { return Err(failure.error.into_retried()) };
        let delay = failure.wait.unwrap_or(delay);
        tracing::debug!(error = %failure.error, ?delay, "made again");
        tokio::time::sleep(delay).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn of(status: u16, headers: &[(&'static str, &'static str)], has_token: bool) -> Failure {
        let headers =
            headers.iter().map(|(k, v)| (k.parse().unwrap(), HeaderValue::from_static(v))).collect();
        Failure::of_response(StatusCode::from_u16(status).unwrap(), &headers, has_token)
    }

    #[test]
    fn errors_say_what_to_do() {
        let gated = of(401, &[("x-error-code", "GatedRepo")], false);
        assert!(gated.error.to_string().contains("set HF_TOKEN"), "{}", gated.error);
        let no_access = of(403, &[("x-error-code", "GatedRepo")], true);
        assert!(no_access.error.to_string().contains("accept its conditions"), "{}", no_access.error);
        let missing = of(404, &[("x-error-code", "RevisionNotFound")], false);
        assert_eq!(missing.error.kind(), ErrorKind::NotFound);
        assert!(!missing.again);
        assert_eq!(of(401, &[], true).error.kind(), ErrorKind::NotFound);
        let said = of(403, &[("x-error-message", "no\tway")], false);
        assert!(said.error.to_string().ends_with("refuses access: no way"), "{}", said.error);
    }

    #[test]
    fn what_passes_is_tried_again() {
        let busy = of(429, &[("retry-after", "3")], false);
        assert_eq!((busy.again, busy.wait), (true, Some(Duration::from_secs(3))));
        assert!(of(502, &[], false).again);
        assert!(!of(418, &[], false).again);
    }
}
