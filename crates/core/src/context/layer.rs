//! A backend with a context policy around it.

use std::{
    fmt,
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
    fit::{Asked, Fitted, Outcome},
    long::Plan,
    parts::with_document,
    run::Run,
};
use crate::{
    BackendWrapper, DoneEvent, Error, ErrorKind, Event, GenerateRequest, GenerateStream, LlmBackend,
    ModelInfo, Prompt, Result, ResultExt, blocking::blocking, text::Tokenizer, validate,
};

/// Applies a [`ContextPolicy`] to every request of a backend, and puts a request's `document` where it belongs. All else
/// is the backend's own: limits are those of its context, which a policy does not make larger. Where the backend is a
/// handle whose model changes, each request is fitted to the model of that moment.
///
/// `map_reduce` and `refine` make several requests of one, in the background: the events of its steps come as
/// [`Event::Context`], with the answer of each part, so that a host has what was done if a later part fails. Such an error
/// names the part. What follows is the last request's answer, with its usage; the report before `Done` has all of them
/// together. Cancelling or dropping the stream cancels all of them.
pub struct ContextLayer {
    inner: Arc<dyn LlmBackend>,
    policy: ContextPolicy,
    max_tokens: Option<usize>,
    /// Bounds how many long prompts are measured at the same time.
    places: Arc<Semaphore>,
}

/// How many long prompts are measured at the same time for a backend that does not say how many requests it takes.
const MEASURED_AT_ONCE: usize = 64;

/// A request that is ready for the backend.
enum Ready {
    /// As one request, with the report of what was dropped.
    Whole(GenerateRequest, Option<ContextReport>),
    Steps(GenerateRequest, Arc<Plan>, Arc<Tokenizer>),
}

/// What is done if too many prompts are being measured.
#[derive(Clone, Copy, PartialEq)]
enum WhenFull {
    Refuse,
    Wait,
}

impl ContextLayer {
    /// `inner` with this policy for the requests that have none of their own.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) where the policy does not go with the context, and
    /// [`Unsupported`](ErrorKind::Unsupported) where the backend has no tokenizer on this side, or no sliding window.
    pub fn new(inner: Arc<dyn LlmBackend>, policy: ContextPolicy) -> Result<Self> {
        let limits = &inner.info().limits;
        let check = || {
            policy.validate()?;
            check(&policy, &inner.info(), inner.tokenizer().is_some())
        };
        check().with("section", "context_policy").with_operation("load")?;
        let places = match limits.max_sequences.saturating_add(limits.max_queued) {
            0 => MEASURED_AT_ONCE,
            requests => requests.min(Semaphore::MAX_PERMITS),
        };
        Ok(Self { inner, policy, max_tokens: None, places: Arc::new(Semaphore::new(places)) })
    }

    /// The same layer with this `max_tokens` for the requests that have none of their own.
    pub fn with_max_tokens(mut self, max_tokens: Option<usize>) -> Self {
        self.max_tokens = max_tokens;
        self
    }

    /// Applies the policy to a request: what both `validate` and `generate` begin with.
    async fn fit(&self, mut request: GenerateRequest, when_full: WhenFull) -> Result<Ready> {
        let (info, tokenizer) = (self.inner.info(), self.inner.tokenizer());
        request.params.max_tokens = request.params.max_tokens.or(self.max_tokens);
        let own = request.params.context_policy.take();
        let policy = own.clone().unwrap_or_else(|| self.policy.clone());
        let checked = policy.validate().and_then(|()| check(&policy, &info, tokenizer.is_some()));
        checked.map_err(|e| match e.kind() {
            // The request is to be changed, not the configuration.
            ErrorKind::InvalidConfig if own.is_some() => {
                Error::invalid_request(format!("context_policy: {}", e.message()))
            }
            _ => e,
        })?;
        let document = request.params.document.take();
        if let Some(document) = &document {
            request.params.prompt = with_document(request.params.prompt, document)?;
        }
        let context = info.limits.context_length;
        // Without a context the backend has no model at the moment: it loads one or says why it cannot.
        if policy == ContextPolicy::Reject || context == 0 {
            return Ok(Ready::Whole(request, None));
        }
        if matches!(policy, ContextPolicy::Sliding(_)) {
            request.params.context_policy = Some(policy);
            return Ok(Ready::Whole(request, None));
        }
        // Before any work on the prompt.
        validate::generate(&request.params, &info)?;
        validate::not_empty(&request.params.prompt)?;
        let tokenizer = tokenizer.ok_or_else(|| no_tokenizer(&info))?;
        let asked = Asked {
            prompt: std::mem::replace(&mut request.params.prompt, Prompt::Tokens(Vec::new())),
            chat: request.params.chat.clone(),
            document: document.map(|d| d.len()),
            policy,
            max_tokens: request.params.max_tokens,
            context,
        };
        let fitted = self.measure(tokenizer, asked, &request, when_full).await?;
        let tokenizer = Arc::clone(fitted.tokenizer());
        let fitted = Arc::unwrap_or_clone(fitted);
        Ok(match fitted.outcome {
            Outcome::Fits => {
                request.params.prompt = fitted.asked.prompt;
                Ready::Whole(request, None)
            }
            Outcome::Truncated(prompt, report) => {
                request.params.prompt = prompt;
                Ready::Whole(request, Some(report))
            }
            Outcome::Steps(plan) => Ready::Steps(request, plan, tokenizer),
        })
    }

    /// Runs what needs the prompt's tokens on a thread for that, unless a check of the same request has done it.
    async fn measure(
        &self,
        tokenizer: Arc<Tokenizer>,
        asked: Asked,
        request: &GenerateRequest,
        when_full: WhenFull,
    ) -> Result<Arc<Fitted>> {
        if let Some(fitted) = request.prepared.fitted().filter(|f| f.answers(&tokenizer, &asked)) {
            return Ok(fitted);
        }
        Handle::try_current()
            .map_err(|e| Error::unsupported("context policies need a tokio runtime").with_source(e))?;
        let places = Arc::clone(&self.places);
        let place = match when_full {
            WhenFull::Refuse => places.try_acquire_owned().map_err(|_| {
                Error::new(ErrorKind::Busy, "too many prompts are being measured; try again later")
            })?,
            WhenFull::Wait => places
                .acquire_owned()
                .await
                .map_err(|e| Error::new(ErrorKind::Closed, "no more prompts are measured").with_source(e))?,
        };
        let prepared = request.prepared.clone();
        let fitted = blocking("the work on the prompt", move || {
            let _place = place;
            Fitted::new(tokenizer, asked, &prepared).map(Arc::new)
        })
        .await?;
        if when_full == WhenFull::Wait {
            request.prepared.keep_fitted(Arc::clone(&fitted));
        }
        Ok(fitted)
    }
}

/// Whether a model can be run with this policy.
fn check(policy: &ContextPolicy, info: &ModelInfo, has_tokenizer: bool) -> Result<()> {
    match policy {
        ContextPolicy::Reject => Ok(()),
        // A handle without a model: its requests are checked when there is one.
        _ if info.limits.context_length == 0 => Ok(()),
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
impl BackendWrapper for ContextLayer {
    fn inner(&self) -> &dyn LlmBackend {
        &*self.inner
    }

    fn info(&self) -> Arc<ModelInfo> {
        let mut info = self.inner.info();
        if self.policy.takes_long_prompts() {
            Arc::make_mut(&mut info).capabilities.long_prompts = true;
        }
        info
    }

    async fn validate(&self, request: &GenerateRequest) -> Result<()> {
        let check = async {
            match self.fit(request.clone(), WhenFull::Wait).await? {
                Ready::Whole(request, _) => self.inner.validate(&request).await,
                Ready::Steps(..) => Ok(()),
            }
        };
        check.await.with_operation("generate")
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        let accepted = Instant::now();
        let generate = async {
            match self.fit(request, WhenFull::Refuse).await? {
                Ready::Whole(request, report) => {
                    let stream = self.inner.generate(request).await?;
                    Ok(match report {
                        Some(report) => {
                            GenerateStream::new(Reported { stream, report: Some(report), done: None })
                        }
                        None => stream,
                    })
                }
                Ready::Steps(request, plan, tokenizer) => {
                    let run = Run { plan, backend: Arc::clone(&self.inner), tokenizer, request, accepted };
                    Ok(run.start())
                }
            }
        };
        generate.await.with_operation("generate")
    }
}

impl fmt::Debug for ContextLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContextLayer")
            .field("policy", &self.policy)
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

/// A stream with a report before its last event.
struct Reported {
    stream: GenerateStream,
    report: Option<ContextReport>,
    done: Option<DoneEvent>,
}

impl Stream for Reported {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(done) = self.done.take() {
            return Poll::Ready(Some(Ok(Event::Done(done))));
        }
        match Pin::new(&mut self.stream).poll_next(cx) {
            Poll::Ready(Some(Ok(Event::Done(done)))) => match self.report.take() {
                Some(mut report) => {
                    report.add(&done.usage);
                    self.done = Some(done);
                    Poll::Ready(Some(Ok(Event::Context(ContextStep::Report(report)))))
                }
                None => Poll::Ready(Some(Ok(Event::Done(done)))),
            },
            event => event,
        }
    }
}
