//! What a host wants around its models: how one takes the place of another, and the layers over each.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How a model whose configuration has changed takes the place of the old one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ReloadConfig {
    /// Whether the old model stays in memory while the new one is loaded.
    pub mode: ReloadMode,
    /// Prompts that a new model has to continue before it takes over. Left out: two short ones; an empty list: it takes
    /// over unchecked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check: Option<Vec<String>>,
    /// Seconds that the check may take, at least 1.
    #[schemars(range(min = 1))]
    pub check_seconds: u64,
    /// With `mode = "unload_then_load"`: seconds in which the requests on the old model may end, at least 1. If they do not, the
    /// old model goes on.
    #[schemars(range(min = 1))]
    pub drain_seconds: u64,
    /// Milliseconds from one look at a watched file to the next, at least 10.
    #[schemars(range(min = 10))]
    pub poll_ms: u64,
}

impl Default for ReloadConfig {
    fn default() -> Self {
        Self {
            mode: ReloadMode::LoadThenSwap,
            check: None,
            check_seconds: 60,
            drain_seconds: 60,
            poll_ms: 500,
        }
    }
}

/// Whether the memory holds the old model and the new one at the same time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ReloadMode {
    /// The new model is loaded while the old one serves: no request waits, and both are in memory for a time.
    #[default]
    #[serde(alias = "beside")]
    LoadThenSwap,
    /// The old model is given up first; requests wait until the new one is there. If it cannot be loaded, the old one
    /// is loaded again.
    #[serde(alias = "after")]
    UnloadThenLoad,
}

/// The layers over one model, from the outside in: tracing, metrics, timeout, retry, limit. One that is left out is
/// not there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct LayersConfig {
    /// A span of `tracing` for each request.
    pub tracing: bool,
    /// Counters and histograms by the facade `metrics`.
    pub metrics: bool,
    /// How long a request may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<TimeoutConfig>,
    /// Whether a request that failed is made again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry: Option<RetryConfig>,
    /// How many requests reach the model at the same time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<LimitConfig>,
}

/// How long a request may take, in milliseconds, each at least 1. What is left out may take as long as it takes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct TimeoutConfig {
    /// From the request to its first token.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub first_token_ms: Option<u64>,
    /// From one token to the next. A reader that is slow does not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub between_tokens_ms: Option<u64>,
    /// From the request to its end, the time of a slow reader included.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub total_ms: Option<u64>,
}

/// How often, and after how long, a request is made again that failed with an error worth a retry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RetryConfig {
    /// How often a request is made in all, at least 1 and at most 100.
    #[schemars(range(min = 1, max = 100))]
    pub attempts: usize,
    /// Milliseconds before the second attempt, at least 1; each further wait is twice as long. Up to as much again is
    /// added at random, so that requests which failed together do not come back together.
    #[schemars(range(min = 1))]
    pub min_delay_ms: u64,
    /// The longest wait without what is added, in milliseconds; not below `min_delay_ms`.
    #[schemars(range(min = 1))]
    pub max_delay_ms: u64,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self { attempts: 3, min_delay_ms: 100, max_delay_ms: 5000 }
    }
}

/// How many requests reach a model at the same time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct LimitConfig {
    /// Requests at the same time, at least 1 and at most 1000000.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub concurrent: usize,
    /// Requests that may wait beyond those, first come first served; one more fails with `busy`.
    pub waiting: usize,
}

impl Default for LimitConfig {
    fn default() -> Self {
        Self { concurrent: 4, waiting: 64 }
    }
}

impl ReloadConfig {
    /// Checks the ranges of all values.
    ///
    /// # Errors
    /// [`InvalidConfig`](crate::ErrorKind::InvalidConfig) naming the key, what was found and what is allowed.
    pub fn validate(&self) -> Result<()> {
        in_range("reload.check_seconds", self.check_seconds, 1, u64::MAX)?;
        in_range("reload.drain_seconds", self.drain_seconds, 1, u64::MAX)?;
        in_range("reload.poll_ms", self.poll_ms, 10, u64::MAX)?;
        if self.check.iter().flatten().any(String::is_empty) {
            return Err(Error::invalid_config("reload.check: a prompt is empty; some text expected"));
        }
        Ok(())
    }
}

impl LayersConfig {
    /// Checks the ranges of all values; `place` is where they lie in the configuration, such as `models.x.layers`.
    ///
    /// # Errors
    /// [`InvalidConfig`](crate::ErrorKind::InvalidConfig) naming the key, what was found and what is allowed.
    pub fn validate(&self, place: &str) -> Result<()> {
        if let Some(timeout) = &self.timeout {
            for (key, value) in [
                ("first_token_ms", timeout.first_token_ms),
                ("between_tokens_ms", timeout.between_tokens_ms),
                ("total_ms", timeout.total_ms),
            ] {
                in_range(&format!("{place}.timeout.{key}"), value.unwrap_or(1), 1, u64::MAX)?;
            }
        }
        if let Some(retry) = &self.retry {
            in_range(&format!("{place}.retry.attempts"), retry.attempts as u64, 1, 100)?;
            in_range(&format!("{place}.retry.min_delay_ms"), retry.min_delay_ms, 1, u64::MAX)?;
            let least = retry.min_delay_ms;
            in_range(&format!("{place}.retry.max_delay_ms"), retry.max_delay_ms, least, u64::MAX)?;
        }
        if let Some(limit) = &self.limit {
            in_range(&format!("{place}.limit.concurrent"), limit.concurrent as u64, 1, 1_000_000)?;
        }
        Ok(())
    }
}

fn in_range(key: &str, value: u64, least: u64, most: u64) -> Result<()> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    let upper = if most < u64::MAX { format!(" and at most {most}") } else { String::new() };
    Err(Error::invalid_config(format!("{key}: {value} is out of range; at least {least}{upper} expected")))
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, Format, ReloadMode};

    #[test]
    fn everything_around_a_model_can_be_set() {
        let text = "[reload]\nmode = \"unload_then_load\"\ncheck = [\"One\"]\n[models.m.layers]\nmetrics = true\n\
                    timeout.total_ms = 5\nretry.attempts = 2\nlimit = { concurrent = 1, waiting = 0 }\n";
        let config = Config::from_str(text, Format::Toml).unwrap();
        assert_eq!(config.reload.mode, ReloadMode::UnloadThenLoad);
        let layers = &config.models["m"].layers;
        assert_eq!(layers.timeout.as_ref().unwrap().total_ms, Some(5));
        assert_eq!(layers.retry.as_ref().unwrap().min_delay_ms, 100);
        assert_eq!(layers.limit.as_ref().unwrap().waiting, 0);
        assert!(layers.metrics && !layers.tracing);
    }

    #[test]
    fn unknown_keys_and_values_out_of_range_are_refused_with_their_place() {
        for (text, expected) in [
            ("[reload]\nmod = \"after\"", "unknown key `reload.mod`; did you mean `mode`?"),
            ("[reload]\nmode = \"later\"", "reload.mode"),
            ("[reload]\npoll_ms = 1", "reload.poll_ms: 1 is out of range; at least 10 expected"),
            ("[reload]\ncheck = [\"\"]", "reload.check: a prompt is empty"),
            (
                "[models.m.layers]\ntimeouts = 5",
                "unknown key `models.m.layers.timeouts`; did you mean `timeout`?",
            ),
            (
                "[models.m.layers.timeout]\ntotal = 5",
                "unknown key `models.m.layers.timeout.total`; known: first_token_ms, between_tokens_ms, total_ms",
            ),
            (
                "[models.m.layers.retry]\nattemps = 5",
                "unknown key `models.m.layers.retry.attemps`; did you mean `attempts`?",
            ),
            (
                "[models.m.layers.retry]\nattempts = 0",
                "models.m.layers.retry.attempts: 0 is out of range; at least 1 and at most 100 expected",
            ),
            ("[models.m.layers.retry]\nmax_delay_ms = 1", "max_delay_ms: 1 is out of range; at least 100"),
            ("[models.m.layers.timeout]\ntotal_ms = 0", "timeout.total_ms: 0 is out of range"),
            ("[models.m.layers.limit]\nconcurrent = 0", "limit.concurrent: 0 is out of range"),
        ] {
            let error = Config::from_str(text, Format::Toml).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
