//! When a request is made again, and after how long.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use ternion_core::Error;

use crate::{config::RetryOptions, failure::Failure};

/// The waits between the attempts of one request.
#[derive(Debug)]
pub(crate) struct Waits {
    delays: ExponentialBackoff,
    max_retry_after: Duration,
    /// Attempts so far.
    made: usize,
}

impl Waits {
    pub(crate) fn new(options: &RetryOptions) -> Self {
        let delays = ExponentialBuilder::new()
            .with_min_delay(Duration::from_millis(options.min_delay_ms))
            .with_max_delay(Duration::from_millis(options.max_delay_ms))
            .with_max_times(options.attempts.saturating_sub(1))
            .with_jitter()
            .build();
        Self { delays, max_retry_after: Duration::from_millis(options.max_retry_after_ms), made: 1 }
    }

    /// How long to wait before the next attempt.
    ///
    /// # Errors
    /// That of the failure, if it is the last one. A server that asks for a longer wait than is allowed is not asked again.
    pub(crate) fn next(&mut self, failure: Failure) -> Result<Duration, Error> {
        let Failure { error, again, retry_after } = failure;
        let made = self.made;
        let last = |error: Error| if made > 1 { error.with("attempts", made) } else { error };
        if !again {
            return Err(last(error));
        }
        if let Some(wait) = retry_after.filter(|wait| *wait > self.max_retry_after) {
            // Marked as retried: a retry around this one would come too early as well.
            return Err(last(error.with("retry after", format_args!("{} s", wait.as_secs()))).into_retried());
        }
        let Some(delay) = self.delays.next() else {
            let error = last(error);
            return Err(if made > 1 { error.into_retried() } else { error });
        };
        self.made += 1;
        let delay = retry_after.unwrap_or(delay);
        tracing::debug!(%error, attempt = self.made, ?delay, "made again");
        Ok(delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(attempts: usize) -> Waits {
        let options = RetryOptions { attempts, min_delay_ms: 10, max_delay_ms: 20, max_retry_after_ms: 1000 };
        Waits::new(&options)
    }

    fn failure(retry_after: Option<u64>) -> Failure {
        Failure {
            retry_after: retry_after.map(Duration::from_millis),
            ..Failure::passing(Error::backend("x"))
        }
    }

    #[test]
    fn attempts_are_counted_and_the_last_error_is_marked() {
        let mut waits = waits(3);
        for _ in 0..2 {
            let delay = waits.next(failure(None)).unwrap();
            assert!((10..=40).contains(&delay.as_millis()), "{delay:?}");
        }
        let error = waits.next(failure(None)).unwrap_err();
        assert!(error.is_retried() && error.to_string().contains("attempts: 3"), "{error}");
        let error = self::waits(1).next(failure(None)).unwrap_err();
        assert!(!error.is_retried());
    }

    #[test]
    fn a_server_is_obeyed_within_bounds() {
        assert_eq!(waits(2).next(failure(Some(700))).unwrap(), Duration::from_millis(700));
        let error = waits(2).next(failure(Some(5000))).unwrap_err();
        assert!(error.is_retried() && error.to_string().contains("retry after: 5 s"), "{error}");
        let lasting = Failure::lasting(Error::invalid_request("x"));
        assert!(!waits(2).next(lasting).unwrap_err().is_retried());
    }
}
