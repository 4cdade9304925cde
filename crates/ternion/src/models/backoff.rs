//! How long a model that has failed is left alone before a request may load it again.

use std::time::Duration;

const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

/// A model that has run for so long before it stopped counts as one that works.
const STABLE: Duration = Duration::from_secs(60);

/// Failures in a row.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    /// Attempts to load it.
    failures: u32,
    /// Models that were loaded and stopped soon after.
    stops: u32,
}

impl Backoff {
    /// The wait after an attempt to load has failed: one second, then twice as long each time, up to a minute.
    pub(super) fn after_failure(&mut self) -> Duration {
        self.failures = self.failures.saturating_add(1);
        delay(self.failures)
    }

    /// The wait after a model has stopped that was loaded `age` ago: none the first time, then as after failures.
    pub(super) fn after_stop(&mut self, age: Duration) -> Duration {
        if age >= STABLE {
            self.stops = 0;
        }
        self.stops = self.stops.saturating_add(1);
        if self.stops == 1 { Duration::ZERO } else { delay(self.stops - 1) }
    }

    /// A model was loaded.
    pub(super) fn loaded(&mut self) {
        self.failures = 0;
    }
}

fn delay(failures: u32) -> Duration {
    FIRST.saturating_mul(1 << (failures - 1).min(16)).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_begin_anew() {
        let mut backoff = Backoff::default();
        let seconds: Vec<u64> = (0..8).map(|_| backoff.after_failure().as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60]);
        backoff.loaded();
        assert_eq!(backoff.after_failure().as_secs(), 1);

        let soon = Duration::from_secs(3);
        let seconds: Vec<u64> = (0..4).map(|_| backoff.after_stop(soon).as_secs()).collect();
        assert_eq!(seconds, [0, 1, 2, 4]);
        backoff.loaded();
        assert_eq!(backoff.after_stop(soon).as_secs(), 8, "it is loaded and stops again and again");
        assert_eq!(backoff.after_stop(STABLE).as_secs(), 0);
    }
}
