//! A backend with a context policy around it.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use async_trait::async_trait;
use futures_core::Stream;
use tokio::{runtime::Handle, sync::Semaphore};

use super::{
    ContextPolicy, ContextReport, ContextStep, Truncate,
    budget::answer_room,
    long::{Plan, Planned},
    parts::{count, with_document},
    run::{Run, blocking},
    truncate::truncate,
};
use crate::{
    Error, ErrorKind, Event, GenerateRequest, GenerateStream, LlmBackend, LogitsRequest, ModelInfo, Prompt,
    Result, ResultExt, Score, ScoreRequest, Stats, Unloaded, text::Tokenizer, validate,
};

/// Applies a [`ContextPolicy`] to every request of a backend, and puts a request's `document` where it belongs. All else
/// is the backend's own: limits are those of its context, which a policy does not make larger.
///
/// `map_reduce` and `refine` make several requests of one, in the background: the events of its steps come as
/// [`Event::Context`], with the answer of each part, so that a host has what was done if a later part fails. Such an error
/// names the part. What follows is the last request's answer, with its usage; the report before `Done` has all of them
/// together. Cancelling or dropping the stream cancels all of them.
pub struct ContextLayer {
    inner: Arc<dyn LlmBackend>,
    policy: ContextPolicy,
    info: Arc<ModelInfo>,
    /// Bounds how many long prompts are measured at the same time.
    places: Arc<Semaphore>,
}

impl ContextLayer {
    /// `inner` with this policy for the requests that have none of their own.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) where the policy does not go with the context, and
    /// [`Unsupported`](ErrorKind::Unsupported) where the backend has no tokenizer on this side, or no sliding window.
    pub fn new(inner: Arc<dyn LlmBackend>, policy: ContextPolicy) -> Result<Self> {
        let mut info = (*inner.info()).clone();
        let check = || {
            policy.validate()?;
            check(&policy, &info, inner.tokenizer().is_some())
        };
        check().with("section", "context_policy").during("load")?;
        info.capabilities.long_prompts = policy.takes_long_prompts();
        let places =
            info.limits.max_sequences.saturating_add(info.limits.max_queued).clamp(1, Semaphore::MAX_PERMITS);
        Ok(Self { inner, policy, info: Arc::new(info), places: Arc::new(Semaphore::new(places)) })
    }

    /// Runs what needs the prompt's tokens on a thread for that.
    async fn prepare<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Tokenizer) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let tokenizer = self.tokenizer_for_policy()?;
        Handle::try_current()
            .map_err(|e| Error::unsupported("context policies need a tokio runtime").with_source(e))?;
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            Error::new(ErrorKind::Busy, "too many prompts are being measured; try again later")
        })?;
        blocking(move || {
            let _place = place;
            work(&tokenizer)
        })
        .await
    }

    fn tokenizer_for_policy(&self) -> Result<Arc<Tokenizer>> {
        self.inner.tokenizer().ok_or_else(|| no_tokenizer(&self.info))
    }

    async fn truncated(
        &self,
        mut request: GenerateRequest,
        document: Option<usize>,
        policy: Truncate,
    ) -> Result<GenerateStream> {
        let context = self.info.limits.context_length;
        let limit = context - answer_room(policy.reserve, request.max_tokens, context, 4)?;
        let prompt = std::mem::replace(&mut request.prompt, Prompt::Tokens(Vec::new()));
        let work = move |tokenizer: &Tokenizer| {
            let tokens = count(tokenizer, &prompt)?;
            if tokens <= limit {
                return Ok((prompt, None));
            }
            let (prompt, dropped) = truncate(tokenizer, prompt, document, &policy, limit)?;
            let mut report = ContextReport::new("truncate", tokens, limit);
            report.dropped = dropped;
            Ok((prompt, Some(report)))
        };
        let (prompt, report) = self.prepare(work).await?;
        request.prompt = prompt;
        let stream = self.inner.generate(request).await?;
        Ok(match report {
            Some(report) => GenerateStream::new(Reported { stream, report: Some(report), done: None }),
            None => stream,
        })
    }

    async fn in_steps(
        &self,
        mut request: GenerateRequest,
        document: Option<usize>,
        policy: ContextPolicy,
    ) -> Result<GenerateStream> {
        let accepted = Instant::now();
        let context = self.info.limits.context_length;
        let max_tokens = request.max_tokens;
        let prompt = std::mem::replace(&mut request.prompt, Prompt::Tokens(Vec::new()));
        let plan = self
            .prepare(move |tokenizer| Plan::make(tokenizer, prompt, document, &policy, max_tokens, context))
            .await?;
        match plan {
            Planned::Fits(prompt) => {
                request.prompt = prompt;
                self.inner.generate(request).await
            }
            Planned::Long(plan) => {
                let run = Run {
                    plan: Arc::from(plan),
                    backend: Arc::clone(&self.inner),
                    tokenizer: self.tokenizer_for_policy()?,
                    request,
                    accepted,
                };
                Ok(run.start())
            }
        }
    }
}

/// Whether a model can be run with this policy.
fn check(policy: &ContextPolicy, info: &ModelInfo, has_tokenizer: bool) -> Result<()> {
    match policy {
        ContextPolicy::Reject => Ok(()),
        ContextPolicy::Sliding(_) if !info.capabilities.sliding_window => {
            Err(Error::unsupported(format!("backend `{}` has no sliding window", info.backend)))
        }
        ContextPolicy::Sliding(sliding) => sliding.kept(info.limits.context_length).map(drop),
        _ if !has_tokenizer => Err(no_tokenizer(info)),
        ContextPolicy::Truncate(Truncate { reserve, .. }) => {
            answer_room(*reserve, None, info.limits.context_length, 4).map(drop)
        }
        ContextPolicy::MapReduce(chunked) | ContextPolicy::Refine(chunked) => {
            answer_room(chunked.reserve, None, info.limits.context_length, 4)?;
            answer_room(chunked.answer_tokens, None, info.limits.context_length, 8).map(drop)
        }
    }
}

fn no_tokenizer(info: &ModelInfo) -> Error {
    Error::unsupported(format!(
        "backend `{}` has no tokenizer on this side, which context policies count with",
        info.backend
    ))
}

#[async_trait]
impl LlmBackend for ContextLayer {
    fn info(&self) -> Arc<ModelInfo> {
        Arc::clone(&self.info)
    }

    fn tokenizer(&self) -> Option<Arc<Tokenizer>> {
        self.inner.tokenizer()
    }

    fn stats(&self) -> Stats {
        self.inner.stats()
    }

    fn unloaded(&self) -> Unloaded {
        self.inner.unloaded()
    }

    async fn generate(&self, mut request: GenerateRequest) -> Result<GenerateStream> {
        let generate = async {
            let own = request.context_policy.take();
            let policy = match &own {
                Some(policy) => {
                    // Out of a request, so it is the request that is to be changed.
                    let checked = policy
                        .validate()
                        .and_then(|()| check(policy, &self.info, self.tokenizer().is_some()));
                    checked.map_err(|e| match e.kind() {
                        ErrorKind::InvalidConfig => {
                            Error::invalid_request(format!("context_policy: {}", e.message()))
                        }
                        _ => e,
                    })?;
                    policy.clone()
                }
                None => self.policy.clone(),
            };
            let document = request.document.take();
            if let Some(document) = &document {
                request.prompt = with_document(request.prompt, document)?;
            }
            let document = document.map(|d| d.len());
            match policy {
                ContextPolicy::Reject => self.inner.generate(request).await,
                ContextPolicy::Sliding(sliding) => {
                    request.context_policy = Some(ContextPolicy::Sliding(sliding));
                    self.inner.generate(request).await
                }
                policy => {
                    // Before any work on the prompt.
                    let vocab_size = self.info.limits.vocab_size;
                    validate::generate(&request, if vocab_size == 0 { usize::MAX } else { vocab_size })?;
                    match policy {
                        ContextPolicy::Truncate(policy) => self.truncated(request, document, policy).await,
                        policy => self.in_steps(request, document, policy).await,
                    }
                }
            }
        };
        generate.await.during("generate")
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        self.inner.score(request).await
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        self.inner.logits(request).await
    }
}

impl std::fmt::Debug for ContextLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ContextLayer")
            .field("policy", &self.policy)
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

/// A stream with a report before its last event.
struct Reported {
    stream: GenerateStream,
    report: Option<ContextReport>,
    done: Option<Event>,
}

impl Stream for Reported {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(done) = self.done.take() {
            return Poll::Ready(Some(Ok(done)));
        }
        match Pin::new(&mut self.stream).poll_next(cx) {
            Poll::Ready(Some(Ok(done @ Event::Done { .. }))) => match self.report.take() {
                Some(mut report) => {
                    if let Event::Done { usage, .. } = &done {
                        report.add(usage);
                    }
                    self.done = Some(done);
                    Poll::Ready(Some(Ok(Event::Context { step: ContextStep::Report(report) })))
                }
                None => Poll::Ready(Some(Ok(done))),
            },
            event => event,
        }
    }
}
