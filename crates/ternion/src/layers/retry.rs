//! Makes a request again that failed in a way which may pass.

use std::{future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use ternion_core::{
    BackendWrapper, EmbedRequest, Embeddings, Error, GenerateRequest, GenerateStream, LlmBackend,
    LogitsRequest, Result, Score, ScoreRequest, config::RetryConfig,
};
use tokio_util::sync::CancellationToken;

use super::{Attempts, Layer, cancelled, start};

/// Makes a request again whose error [is worth a retry](Error::is_retryable), after waits that grow and are partly
/// random.
///
/// An answer is begun again only as long as no token of it was delivered; after that its error is the end. The error of
/// the last attempt is the one that the caller sees, with the number of attempts. It is marked as
/// [retried](Error::is_retried), so that a retry around this one does not multiply the attempts. A request that is
/// cancelled while it waits ends at once.
#[derive(Debug, Clone)]
pub struct RetryLayer {
    attempts: usize,
    min_delay: Duration,
    max_delay: Duration,
}

impl RetryLayer {
    /// At most `attempts` attempts in all, with waits from 0.1 to 5 seconds.
    pub fn new(attempts: usize) -> Self {
        Self { attempts, ..Self::from(&RetryConfig::default()) }
    }

    /// The first wait, and the longest; up to as much again is added at random.
    pub fn with_delays(mut self, min: Duration, max: Duration) -> Self {
        (self.min_delay, self.max_delay) = (min, max);
        self
    }
}

impl From<&RetryConfig> for RetryLayer {
    fn from(config: &RetryConfig) -> Self {
        Self {
            attempts: config.attempts,
            min_delay: Duration::from_millis(config.min_delay_ms),
            max_delay: Duration::from_millis(config.max_delay_ms),
        }
    }
}

impl Layer for RetryLayer {
    fn wrap(&self, inner: Arc<dyn LlmBackend>) -> Arc<dyn LlmBackend> {
        let delays = ExponentialBuilder::new()
            .with_min_delay(self.min_delay)
            .with_max_delay(self.max_delay)
            .with_max_times(self.attempts.saturating_sub(1))
            .with_jitter();
        Arc::new(Retrying { inner, delays })
    }
}

#[derive(Debug)]
struct Retrying {
    inner: Arc<dyn LlmBackend>,
    delays: ExponentialBuilder,
}

impl Retrying {
    fn waits(&self, cancel: &CancellationToken) -> Waits {
        Waits { delays: self.delays.build(), cancel: cancel.clone(), made: 1 }
    }

    async fn repeat<T, F: Future<Output = Result<T>> + Send>(
        &self,
        cancel: &CancellationToken,
        attempt: impl Fn() -> F + Send + Sync,
    ) -> Result<T> {
        let mut waits = self.waits(cancel);
        loop {
            match attempt().await {
                Ok(value) => return Ok(value),
                Err(error) => {
                    if waits.wait(error).await? == Next::Cancelled {
                        return Err(Error::cancelled());
                    }
                }
            }
        }
    }
}

#[async_trait]
impl BackendWrapper for Retrying {
    fn inner(&self) -> &dyn LlmBackend {
        &*self.inner
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        let first = self.inner.generate(request.clone()).await;
        let waits = self.waits(&request.cancel);
        start(Box::new(Generations { inner: Arc::clone(&self.inner), request, waits }), first).await
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        self.repeat(&request.cancel, || self.inner.score(request.clone())).await
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        self.repeat(&request.cancel, || self.inner.logits(request.clone())).await
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings> {
        self.repeat(&request.cancel, || self.inner.embed(request.clone())).await
    }
}

/// The waits between the attempts of one request.
struct Waits {
    delays: ExponentialBackoff,
    cancel: CancellationToken,
    /// Attempts so far.
    made: usize,
}

#[derive(PartialEq)]
enum Next {
    Attempt,
    Cancelled,
}

impl Waits {
    /// Waits for the next attempt, if there is one after `error`.
    async fn wait(&mut self, error: Error) -> Result<Next> {
        let made = self.made;
        let last = |error: Error| if made > 1 { error.with("attempts", made) } else { error };
        if !error.is_retryable() || error.is_retried() {
            return Err(last(error));
        }
        let Some(delay) = self.delays.next() else {
            let error = last(error);
            return Err(if made > 1 { error.into_retried() } else { error });
        };
        self.made += 1;
        tracing::debug!(%error, attempt = self.made, ?delay, "made again");
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Ok(Next::Cancelled),
            () = tokio::time::sleep(delay) => Ok(Next::Attempt),
        }
    }
}

struct Generations {
    inner: Arc<dyn LlmBackend>,
    request: GenerateRequest,
    waits: Waits,
}

#[async_trait]
impl Attempts for Generations {
    async fn again(&mut self, mut error: Error) -> Result<GenerateStream> {
        loop {
            if self.waits.wait(error).await? == Next::Cancelled {
                return Ok(cancelled());
            }
            match self.inner.generate(self.request.clone()).await {
                Ok(stream) => return Ok(stream),
                Err(next) => error = next,
            }
        }
    }
}
