//! One request and the models that may answer it, one after the other.

use std::sync::Arc;

use async_trait::async_trait;
use ternion_core::{
    Error, ErrorKind, GenerateRequest, GenerateStream, LlmBackend, LogitsRequest, Prompt, Result, Score,
    ScoreRequest,
};
use tokio_util::sync::CancellationToken;

use super::{event::ModelEvent, slot::Slot};
use crate::layers::{Attempts, cancelled, start};

/// Continues the prompt on the first model of `chain` that can.
pub(super) async fn generate(chain: Vec<Arc<Slot>>, request: GenerateRequest) -> Result<GenerateStream> {
    if let [only] = &chain[..] {
        return only.generate(request).await;
    }
    let in_tokens = matches!(request.prompt, Prompt::Tokens(_));
    let course = Course::new(chain, request.cancel.clone(), in_tokens);
    let first = course.slot().generate(request.clone()).await;
    start(Box::new(Generations { course, request }), first).await
}

/// Scores the tokens on the first model of `chain` that can.
pub(super) async fn score(chain: Vec<Arc<Slot>>, request: ScoreRequest) -> Result<Score> {
    let mut course = Course::new(chain, request.cancel.clone(), true);
    loop {
        let outcome = match course.slot().ready(&request.cancel).await {
            Ok(Some(model)) => model.score(request.clone()).await,
            Ok(None) => Err(given_up()),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(score) => return Ok(score),
            Err(error) => course.go_on(error).await?,
        }
    }
}

/// The logits of the first model of `chain` that can give them.
pub(super) async fn logits(chain: Vec<Arc<Slot>>, request: LogitsRequest) -> Result<Vec<f32>> {
    let mut course = Course::new(chain, request.cancel.clone(), true);
    loop {
        let outcome = match course.slot().ready(&request.cancel).await {
            Ok(Some(model)) => model.logits(request.clone()).await,
            Ok(None) => Err(given_up()),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(logits) => return Ok(logits),
            Err(error) => course.go_on(error).await?,
        }
    }
}

struct Generations {
    course: Course,
    request: GenerateRequest,
}

#[async_trait]
impl Attempts for Generations {
    async fn again(&mut self, mut error: Error) -> Result<GenerateStream> {
        loop {
            if error.kind().falls_over() && self.request.cancel.is_cancelled() {
                return Ok(cancelled());
            }
            self.course.go_on(error).await?;
            match self.course.slot().generate(self.request.clone()).await {
                Ok(stream) => return Ok(stream),
                Err(next) => error = next,
            }
        }
    }
}

/// Where a request is on its way along the chain, and how it failed so far.
struct Course {
    /// At least one.
    chain: Vec<Arc<Slot>>,
    at: usize,
    cancel: CancellationToken,
    /// The request holds token ids: only a model with the same vocabulary understands them.
    in_tokens: bool,
    /// The error of the first model, which is the one that the caller asked.
    first: Option<Error>,
    others: Vec<String>,
}

impl Course {
    fn new(chain: Vec<Arc<Slot>>, cancel: CancellationToken, in_tokens: bool) -> Self {
        Self { chain, at: 0, cancel, in_tokens, first: None, others: Vec::new() }
    }

    fn slot(&self) -> &Arc<Slot> {
        &self.chain[self.at]
    }

    /// Goes on to the next model after the present one has failed.
    ///
    /// # Errors
    /// That of the first model, with those of the others: if there is no further one, or if the request itself is at
    /// fault. What a model further back finds wrong with the request is that model's own affair.
    async fn go_on(&mut self, mut error: Error) -> Result<()> {
        loop {
            let kind = error.kind();
            if kind == ErrorKind::Cancelled || (self.at == 0 && !kind.falls_over()) {
                return Err(error);
            }
            let (from, text) = (self.slot().name.clone(), error.to_string());
            match &self.first {
                None => self.first = Some(error),
                Some(_) => self.others.push(format!("{from}: {text}")),
            }
            let Some(next) = self.chain.get(self.at + 1).cloned() else {
                let first = self.first.take().unwrap_or_else(|| Error::new(kind, text));
                let others = self.others.join("; ");
                return Err(if others.is_empty() { first } else { first.with("fallback", others) });
            };
            self.at += 1;
            if self.in_tokens
                && let Err(unfit) = self.understands(&next).await
            {
                error = unfit;
                continue;
            }
            self.chain[0].events.send(ModelEvent::FellOver {
                model: self.chain[0].name.clone(),
                from,
                to: next.name.clone(),
                kind,
                error: text,
            });
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

pub(super) fn given_up() -> Error {
    Error::new(ErrorKind::Cancelled, "the request was cancelled")
}
