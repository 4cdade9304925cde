//! One request and the models that may answer it, one after the other.

use std::sync::Arc;

use async_trait::async_trait;
use ternion_core::{
    Error, ErrorKind, GenerateRequest, GenerateStream, LlmBackend, LogitsRequest, Prompt, Result, Score,
    ScoreRequest,
};
use tokio_util::sync::CancellationToken;

use super::{event::ModelEvent, slot::Slot};
use crate::layers::{Attempts, start};

/// Continues the prompt on the first model of `chain` that can.
pub(super) async fn generate(chain: Vec<Arc<Slot>>, request: GenerateRequest) -> Result<GenerateStream> {
    if let [only] = &chain[..] {
        return only.generate(request).await;
    }
    let in_tokens = matches!(request.params.prompt, Prompt::Tokens(_));
    let cursor = FailoverCursor::new(chain, request.cancel.clone(), in_tokens);
    let first = cursor.slot().generate(request.clone()).await;
    start(Box::new(Generations { cursor, request }), first).await
}

/// Checks a request as [`generate`] would judge it: by the first model, and by the next where that one's error falls
/// over.
pub(super) async fn validate(chain: Vec<Arc<Slot>>, request: &GenerateRequest) -> Result<()> {
    let in_tokens = matches!(request.params.prompt, Prompt::Tokens(_));
    let mut cursor = FailoverCursor::new(chain, request.cancel.clone(), in_tokens);
    // No request moves on, so there is nothing to tell.
    cursor.silent = true;
    loop {
        let outcome = match cursor.slot().ready(&request.cancel).await {
            Ok(Some(model)) => model.validate(request).await,
            Ok(None) => return Ok(()),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => return Ok(()),
            Err(error) => cursor.advance(error).await?,
        }
    }
}

/// Scores the tokens on the first model of `chain` that can.
pub(super) async fn score(chain: Vec<Arc<Slot>>, request: ScoreRequest) -> Result<Score> {
    let mut cursor = FailoverCursor::new(chain, request.cancel.clone(), true);
    loop {
        let outcome = match cursor.slot().ready(&request.cancel).await {
            Ok(Some(model)) => model.score(request.clone()).await,
            Ok(None) => Err(given_up()),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(score) => return Ok(score),
            Err(error) => cursor.advance(error).await?,
        }
    }
}

/// The logits of the first model of `chain` that can give them.
pub(super) async fn logits(chain: Vec<Arc<Slot>>, request: LogitsRequest) -> Result<Vec<f32>> {
    let mut cursor = FailoverCursor::new(chain, request.cancel.clone(), true);
    loop {
        let outcome = match cursor.slot().ready(&request.cancel).await {
            Ok(Some(model)) => model.logits(request.clone()).await,
            Ok(None) => Err(given_up()),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(logits) => return Ok(logits),
            Err(error) => cursor.advance(error).await?,
        }
    }
}

struct Generations {
    cursor: FailoverCursor,
    request: GenerateRequest,
}

#[async_trait]
impl Attempts for Generations {
    async fn again(&mut self, mut error: Error) -> Result<GenerateStream> {
        loop {
            self.cursor.advance(error).await?;
            match self.cursor.slot().generate(self.request.clone()).await {
                Ok(stream) => return Ok(stream),
                Err(next) => error = next,
            }
        }
    }
}

/// Where a request is on its way along the chain, and how it failed so far.
struct FailoverCursor {
    /// At least one.
    chain: Vec<Arc<Slot>>,
    at: usize,
    cancel: CancellationToken,
    /// The request holds token ids: only a model with the same vocabulary understands them.
    in_tokens: bool,
    /// Sends no events.
    silent: bool,
    failures: Failures,
}

impl FailoverCursor {
    fn new(chain: Vec<Arc<Slot>>, cancel: CancellationToken, in_tokens: bool) -> Self {
        Self { chain, at: 0, cancel, in_tokens, silent: false, failures: Failures::default() }
    }

    fn slot(&self) -> &Arc<Slot> {
        &self.chain[self.at]
    }

    /// Goes on to the next model after the present one has failed.
    ///
    /// # Errors
    /// That of all failures together if there is no further model, or the last if the request itself is at fault. What a model further back finds wrong with the request is that model's own affair.
    async fn advance(&mut self, mut error: Error) -> Result<()> {
        loop {
            let kind = error.kind();
            if kind == ErrorKind::Cancelled || (self.at == 0 && !kind.should_fail_over()) {
                return Err(error);
            }
            let (from, text) = (self.slot().name.clone(), error.to_string());
            self.failures.push(&from, error);
            let Some(next) = self.chain.get(self.at + 1).cloned() else {
                return self.failures.take();
            };
            self.at += 1;
            if self.in_tokens
                && let Err(unfit) = self.understands(&next).await
            {
                error = unfit;
                continue;
            }
            if !self.silent {
                self.chain[0].events.send(ModelEvent::FellOver {
                    model: self.chain[0].name.clone(),
                    from,
                    to: next.name.clone(),
                    kind,
                    error: text,
                });
            }
            return Ok(());
        }
    }

    /// Whether the tokens of the first model mean the same to `other`; if not, why it cannot be asked.
    async fn understands(&self, other: &Arc<Slot>) -> Result<()> {
        let own = match self.chain[0].serving() {
            Some(model) => model.0.vocabulary().await,
            None => None,
        };
        let other = other.ready(&self.cancel).await?.ok_or_else(given_up)?.0.vocabulary().await;
        if own.is_some() && own == other {
            return Ok(());
        }
        Err(Error::unsupported(
            "the request holds token ids, and this model's vocabulary is another than that of the model that was \
             asked, or one of them is not known",
        ))
    }
}

/// How the models of a chain have failed, in their order.
#[derive(Default)]
pub(super) struct Failures(Vec<(String, Error)>);

impl Failures {
    pub(super) fn push(&mut self, model: &str, error: Error) {
        self.0.push((model.to_owned(), error));
    }

    /// One error of all: the first that is worth a retry, or else the first, which is that of the model that was asked. The
    /// others are its context.
    ///
    /// # Errors
    /// That error, if there is any.
    pub(super) fn take(&mut self) -> Result<()> {
        let chosen = self.0.iter().position(|(_, error)| error.is_retryable()).unwrap_or(0);
        if self.0.is_empty() {
            return Ok(());
        }
        let (_, error) = self.0.remove(chosen);
        let others: Vec<String> =
            self.0.drain(..).map(|(model, error)| format!("{model}: {error}")).collect();
        Err(if others.is_empty() { error } else { error.with("others", others.join("; ")) })
    }
}

pub(super) fn given_up() -> Error {
    Error::cancelled()
}
