//! The generation engine: makes an [`LlmBackend`] of a [`CausalLm`].
//!
//! The model lives on a thread of its own, which works on all requests together: each step feeds one token of every
//! sequence that is decoding, and chunks of the prompts, which share the rest of the step. Requests come over a queue and
//! events go back over one bounded channel per request, and prompts become tokens on the runtime's threads for blocking
//! work, so nothing here blocks the host's async runtime.
//!
//! # Slow readers
//!
//! A slow reader stops its own sequence only. If others wait for a sequence, its sequence is given to them, and its answer
//! goes on when it has read. If the queue is full, an answer that nobody has read for [`EngineOptions::stall_limit`] ends
//! with [`Timeout`](ErrorKind::Timeout), and its place goes to another request.
//!
//! # Failures
//!
//! A panic of the model ends the request that causes it, and the model serves on. If the model does not work after a
//! panic, the engine closes: running and queued requests fail, and [`LlmBackend::is_closed`] is true.
//!
//! # fork(2)
//!
//! A child process has no copy of the thread. Requests in it fail with [`Closed`](ErrorKind::Closed): load the model after
//! the fork.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    time::Instant,
};

use async_trait::async_trait;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc as channel, oneshot, watch},
};

use ternion_core::{
    CancellationToken, Error, ErrorKind, GenerateRequest, GenerateStream, Limits, LlmBackend, LogitsRequest,
    ModelInfo, Prediction, Result, ResultExt, Sampling, Score, ScoreRequest, ServedBy, Stats, Unloaded,
    answer::{AnswerParser, ToolFormat},
    blocking,
    text::Tokenizer,
    validate,
};

use crate::{
    CausalLm, EngineOptions,
    constraint::{self, Grammars, Running},
    draft::{DraftSource, PromptLookup},
    events::{Events, WakeOnDrop},
    generation::{Ending, EventSender, Generation, Guides},
    job::{Job, Work},
    prompt_cache::{PromptCache, Sessions},
    sampler::Sampler,
    scoring::{Rows, Scoring},
    thought::ThoughtBudget,
    window::Window,
    worker::Worker,
};

/// Events that may wait for a slow reader before its sequence pauses.
pub(crate) const EVENT_CAPACITY: usize = 64;

/// Prompts that are tokenized for checks at the same time.
const CHECKS_AT_ONCE: usize = 8;

/// An [`LlmBackend`] over one [`CausalLm`].
///
/// The model is dropped, on its thread, when the engine and all of its streams are gone.
pub struct Engine {
    info: Arc<ModelInfo>,
    tokenizer: Arc<Tokenizer>,
    grammars: Arc<Grammars>,
    sampling: Sampling,
    logits_bytes: Option<u64>,
    prompt_lookup: bool,
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    process: Process,
    /// Bounds how many prompts are tokenized for checks at the same time.
    checking: Arc<Semaphore>,
    /// `None` without a prompt cache.
    sessions: Option<Sessions>,
    /// Closed when the thread has dropped the model.
    gone: watch::Receiver<()>,
}

/// What is computed of a request before it is queued.
struct Input {
    /// Those of the prompt, which fit into the context.
    tokens: Vec<u32>,
    /// The window that moves over them, if it is one that does.
    window: Option<Window>,
    constraint: Option<Running>,
    /// Drafts the answer.
    drafts: Option<Box<dyn DraftSource>>,
    /// Reads the answer.
    parser: AnswerParser,
}

/// The checks of a request that take long or need its tokens.
struct Checks {
    limits: Limits,
    window: Option<Window>,
    grammars: Arc<Grammars>,
    prompt_lookup: bool,
}

impl Checks {
    fn apply(mut self, request: &GenerateRequest, tokenizer: &Arc<Tokenizer>) -> Result<Input> {
        let mut tokens = request.prompt_tokens(tokenizer)?.to_vec();
        validate::tokens("prompt", &tokens, self.limits.vocab_size)?;
        if let Some(window) = &mut self.window {
            window.fit_prompt(&mut tokens);
        }
        validate::prompt_fits(tokens.len(), self.limits.context_length)?;
        let parser = AnswerParser::for_request(&request.params, tokenizer, &tokens)?;
        let plan = constraint::plan(&request.params, tokenizer, parser.thought(), &self.grammars)?;
        let constraint = plan.map(|(grammar, start)| Running::new(grammar, start, tokenizer));
        let drafts = self.drafts(&request.params.prediction, &tokens, tokenizer)?;
        Ok(Input { tokens, window: self.window, constraint, drafts, parser })
    }
}

impl Checks {
    fn drafts(
        &self,
        prediction: &Prediction,
        prompt: &[u32],
        tokenizer: &Tokenizer,
    ) -> Result<Option<Box<dyn DraftSource>>> {
        if !self.prompt_lookup || *prediction == Prediction::Off {
            return Ok(None);
        }
        let expected = match prediction {
            Prediction::Text(text) => tokenizer.encode(text, false)?,
            _ => Vec::new(),
        };
        Ok(Some(Box::new(PromptLookup::new(&[&expected, prompt]))))
    }
}

/// What reaches the thread.
pub(crate) enum Command {
    /// A request that has been accepted.
    Submit(Box<Job>),
    /// Something may have changed for a job: its reader has read or is gone.
    Wake,
}

/// Counters that both sides see.
#[derive(Default)]
pub(crate) struct Shared {
    /// Requests accepted and not ended.
    pub(crate) accepted: AtomicUsize,
    pub(crate) active: AtomicUsize,
    /// Jobs that nobody has read for so long that others may take their places.
    pub(crate) replaceable: AtomicUsize,
    /// Set when the thread has ended or is about to.
    pub(crate) closed: AtomicBool,
    pub(crate) finished: AtomicU64,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) cached_tokens: AtomicU64,
    pub(crate) completion_tokens: AtomicU64,
}

/// The process in which the engine's thread runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Process(u32);

impl Process {
    pub(crate) fn current() -> Self {
        Self(std::process::id())
    }

    /// Whether this process is another one: a fork of the one that started the engine.
    fn is_another(self) -> bool {
        std::process::id() != self.0
    }

    /// # Errors
    /// [`Closed`](ErrorKind::Closed) in a fork.
    pub(crate) fn check(self) -> Result<()> {
        if self.is_another() {
            let message = "the model was loaded before this process was forked; load it after the fork";
            return Err(Error::new(ErrorKind::Closed, message));
        }
        Ok(())
    }
}

/// What a request gets whose engine is no more.
pub(crate) fn stopped() -> Error {
    Error::new(ErrorKind::Closed, "the engine has stopped; load the model again")
}

/// A place among the accepted requests, given back when the job is dropped, in whatever way it ends, or before it is
/// submitted, when its prompt turns out to be refused.
pub(crate) struct Admission {
    shared: Arc<Shared>,
    submitted: bool,
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.shared.accepted.fetch_sub(1, Ordering::AcqRel);
        if self.submitted {
            self.shared.finished.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Engine {
    /// Starts the thread that owns `model`.
    ///
    /// # Errors
    /// If the model has no room for even one token of prompt and one of answer, if the configured sampling is out
    /// of range, or if no thread can be started.
    pub fn start(
        model: Box<dyn CausalLm>,
        mut tokenizer: Tokenizer,
        mut options: EngineOptions,
    ) -> Result<Self> {
        validate::sampling(&options.sampling, model.vocab_size())
            .with("section", "sampling")
            .with_operation("load")?;
        if model.context_length() < 2 || model.max_sequences() == 0 || model.max_batch_tokens() == 0 {
            return Err(Error::invalid_config(format!(
                "context {} with {} sequences and prefill chunks of {} tokens: at least 2, 1 and 1 expected",
                model.context_length(),
                model.max_sequences(),
                model.max_batch_tokens()
            ))
            .with_operation("load"));
        }
        tokenizer.configure_answers(options.tool_format, options.reasoning.as_ref());
        let answers = tokenizer.answer_format();
        let info = &mut options.info;
        info.limits.context_length = model.context_length();
        info.limits.vocab_size = model.vocab_size();
        info.limits.max_sequences = model.max_sequences();
        info.limits.max_queued = options.max_queued;
        info.capabilities.generate = true;
        info.capabilities.chat = tokenizer.has_chat_template();
        info.capabilities.tool_calls = answers.is_some_and(|format| format.tools != ToolFormat::None);
        info.capabilities.reasoning = answers.is_some_and(|format| format.reasoning.is_some());
        info.capabilities.score = true;
        info.capabilities.logits = true;
        info.capabilities.logprobs = true;
        info.capabilities.seed = true;
        info.capabilities.sliding_window = true;
        info.capabilities.prefix_reuse = model.can_truncate();
        info.defaults = info.defaults.clone().overridden_by(&options.sampling);

        let eos = options.end_tokens(&tokenizer, model.vocab_size()).with_operation("load")?;
        options.info.end_tokens.clone_from(&eos);
        let tokenizer = Arc::new(tokenizer);
        let capabilities = &mut options.info.capabilities;
        capabilities.constraints = Grammars::is_supported(&tokenizer);
        capabilities.required_tool_calls = capabilities.tool_calls && capabilities.constraints;
        let grammars = Grammars::new(Arc::clone(&tokenizer), model.vocab_size(), &eos);

        let prompts =
            options.prompt_cache.as_ref().map(|cache| PromptCache::open(cache, &*model)).transpose();
        let prompts = prompts.with_operation("load")?;
        let sessions = prompts.as_ref().map(PromptCache::sessions);
        let can_draft = options.info.capabilities.batch_invariant && model.can_truncate();
        let prompt_lookup = options.prompt_lookup && can_draft;
        let (commands, inbox) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let room = model.max_sequences().saturating_add(options.max_queued);
        let worker = Worker::new(
            model,
            inbox,
            Arc::clone(&shared),
            eos,
            options.logits_bytes,
            room,
            options.stall_limit,
        )
        .with_prompt_cache(prompts);
        let (alive, gone) = watch::channel(());
        let run = move || {
            worker.run(); // drops the model
            drop(alive);
        };
        std::thread::Builder::new().name("ternion-engine".into()).spawn(run).map_err(|e| {
            Error::new(ErrorKind::ResourceExhausted, "cannot start the engine's thread").with_source(e)
        })?;
        Ok(Self {
            info: Arc::new(options.info),
            tokenizer,
            grammars: Arc::new(grammars),
            sampling: options.sampling,
            logits_bytes: options.logits_bytes,
            prompt_lookup,
            commands,
            shared,
            process: Process::current(),
            checking: Arc::new(Semaphore::new(CHECKS_AT_ONCE)),
            sessions,
            gone,
        })
    }

    /// The checks of a request that need no tokens. Takes the policy out of it, for the engine knows no other than the
    /// window.
    fn check(&self, request: &mut GenerateRequest) -> Result<Checks> {
        let limits = self.info.limits.clone();
        let window = Window::of(request, limits.context_length)?;
        validate::generate(&request.params, &self.info)?;
        let grammars = Arc::clone(&self.grammars);
        Ok(Checks { limits, window, grammars, prompt_lookup: self.prompt_lookup })
    }

    /// What is computed of a request before it is queued, and the permit that `permit` gave.
    ///
    /// A template and a tokenizer may take seconds for megabytes, and so may a grammar, so they run where blocking is allowed.
    /// The permit is taken before and held until they are done, even if nobody waits any more: that bounds how many run.
    async fn input<P: Send + 'static>(
        &self,
        request: GenerateRequest,
        checks: Checks,
        permit: impl Future<Output = Result<P>> + Send,
    ) -> Result<(P, Input)> {
        validate::not_empty(&request.params.prompt)?;
        if !constraint::takes_long(&request.params) && request.knows_tokens(&self.tokenizer) {
            let input = checks.apply(&request, &self.tokenizer)?;
            return Ok((permit.await?, input));
        }
        let runtime = Handle::try_current().map_err(|e| {
            Error::unsupported("text, chats and constraints need a tokio runtime to be awaited in")
                .with_source(e)
        })?;
        let permit = permit.await?;
        let tokenizer = Arc::clone(&self.tokenizer);
        let work = runtime.spawn_blocking(move || {
            let prompt = checks.apply(&request, &tokenizer)?;
            Ok((permit, prompt))
        });
        work.await.unwrap_or_else(|e| Err(blocking::failed("the preparation of the request", e)))
    }

    fn sessions(&self) -> Result<Sessions> {
        self.sessions.clone().ok_or_else(|| {
            Error::unsupported(
                "the model has no prompt cache to keep sessions in; set `prompt_cache` in its configuration",
            )
        })
    }

    fn admit(&self) -> Result<Admission> {
        self.process.check()?;
        let limits = &self.info.limits;
        let replaceable = self.shared.replaceable.load(Ordering::Acquire);
        let room = limits.max_sequences.saturating_add(limits.max_queued).saturating_add(replaceable);
        self.shared
            .accepted
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < room).then_some(n + 1))
            .map(|_| Admission { shared: Arc::clone(&self.shared), submitted: false })
            .map_err(|_| {
                Error::new(ErrorKind::Busy, "the queue is full; try again later")
                    .with("active", limits.max_sequences)
                    .with("queued", limits.max_queued)
            })
    }

    fn submit(&self, mut job: Job) -> Result<()> {
        job.admission.submitted = true;
        self.commands.send(Command::Submit(Box::new(job))).map_err(|_| stopped())
    }

    /// Runs a job whose result comes at once, at its end.
    async fn run<T>(&self, job: Job, result: oneshot::Receiver<Result<T>>) -> Result<T> {
        self.submit(job)?;
        // Dropping this future wakes the engine, which frees the sequence before the job's next chunk.
        let _wake = WakeOnDrop(self.commands.clone());
        result.await.unwrap_or_else(|_| Err(stopped()))
    }
}

#[async_trait]
impl LlmBackend for Engine {
    fn info(&self) -> Arc<ModelInfo> {
        Arc::clone(&self.info)
    }

    fn tokenizer(&self) -> Option<Arc<Tokenizer>> {
        Some(Arc::clone(&self.tokenizer))
    }

    fn stats(&self) -> Stats {
        let s = &*self.shared;
        let active = s.active.load(Ordering::Acquire);
        let mut stats = Stats::default();
        stats.active = active;
        stats.queued = s.accepted.load(Ordering::Acquire).saturating_sub(active);
        stats.finished = s.finished.load(Ordering::Relaxed);
        stats.prompt_tokens = s.prompt_tokens.load(Ordering::Relaxed);
        stats.cached_tokens = s.cached_tokens.load(Ordering::Relaxed);
        stats.completion_tokens = s.completion_tokens.load(Ordering::Relaxed);
        stats
    }

    fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire) || self.process.is_another()
    }

    fn unloaded(&self) -> Unloaded {
        if self.process.is_another() {
            // The engine's thread runs in another process and cannot send the end.
            return Box::pin(std::future::ready(()));
        }
        let mut gone = self.gone.clone();
        Box::pin(async move { while gone.changed().await.is_ok() {} })
    }

    async fn validate(&self, request: &GenerateRequest) -> Result<()> {
        let check = async {
            let mut request = request.clone();
            let checks = self.check(&mut request)?;
            let permit = async {
                Arc::clone(&self.checking).acquire_owned().await.map_err(|e| {
                    Error::new(ErrorKind::Closed, "the engine makes no more checks").with_source(e)
                })
            };
            self.input(request, checks, permit).await.map(drop)
        };
        check.await.with_operation("generate")
    }

    async fn generate(&self, mut request: GenerateRequest) -> Result<GenerateStream> {
        let accepted = Instant::now();
        let start = async {
            let checks = self.check(&mut request)?;
            let sampling = std::mem::take(&mut request.params.sampling).or(&self.sampling);
            // A window never fills the context, so the answer needs a bound of its own.
            let most = if checks.window.is_some() { self.info.limits.context_length } else { usize::MAX };
            let mut ending = Ending {
                max_tokens: request.params.max_tokens.unwrap_or(most),
                stop: std::mem::take(&mut request.params.stop),
                stop_tokens: std::mem::take(&mut request.params.stop_tokens),
                ignore_eos: request.params.ignore_eos,
                tags: Vec::new(),
                logprobs: request.params.logprobs,
                top_logprobs: request.params.top_logprobs,
            };
            let budget = request.params.reasoning_budget;
            let cancel = request.cancel.clone();
            let permit = async { self.admit() };
            let (admission, Input { tokens, window, constraint, drafts, parser }) =
                self.input(request, checks, permit).await?;
            ending.tags = parser.tags();
            let thought = budget.map(|most| ThoughtBudget::new(most, &self.tokenizer, parser.thought()));
            let thought = thought.transpose()?.flatten();
            // A grammar follows the bytes of tokens, and none of them changes because it is the first of the answer.
            let decoder =
                if constraint.is_some() { self.tokenizer.decoder_within() } else { self.tokenizer.decoder() };
            let (messages, reader) = channel::channel(EVENT_CAPACITY);
            let waits = Arc::new(AtomicBool::new(false));
            let generation = Generation::new(
                EventSender { messages, waits: Arc::clone(&waits) },
                decoder,
                &tokens,
                Sampler::new(&sampling, &self.info.defaults),
                ending,
                Guides { constraint, thought, window, drafts },
                ServedBy::from(&*self.info),
            );
            self.submit(Job::new(tokens, Work::Generate(Box::new(generation)), cancel, admission, accepted))?;
            Ok(GenerateStream::new(Events::new(reader, parser, self.commands.clone(), waits, self.process)))
        };
        start.await.with_operation("generate")
    }

    async fn score(&self, mut request: ScoreRequest) -> Result<Score> {
        let accepted = Instant::now();
        let run = async {
            validate::score(&request, &self.info.limits)?;
            let last = request.tokens.pop().expect("invariant: a valid request has at least two tokens");
            let admission = self.admit()?;
            let (sender, result) = oneshot::channel();
            let work = Work::Score(Scoring::new(sender, request.start, last, request.top));
            let job = Job::new(request.tokens, work, request.cancel, admission, accepted);
            let mut score = self.run(job, result).await?;
            score.served_by = Some(ServedBy::from(&*self.info));
            Ok(score)
        };
        run.await.with_operation("score")
    }

    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        let accepted = Instant::now();
        let run = async {
            validate::logits(&request, &self.info.limits)?;
            let rows = (request.tokens.len() - request.start) as u64;
            let wanted = rows.saturating_mul(4 * self.info.limits.vocab_size as u64);
            if let Some(most) = self.logits_bytes.filter(|most| wanted > *most) {
                return Err(Error::new(
                    ErrorKind::ResourceExhausted,
                    format!(
                        "{rows} rows of logits are {wanted} bytes; the memory limit leaves {most} for them"
                    ),
                ));
            }
            let admission = self.admit()?;
            let (sender, result) = oneshot::channel();
            let work = Work::Logits(Rows::new(sender, request.start));
            self.run(Job::new(request.tokens, work, request.cancel, admission, accepted), result).await
        };
        run.await.with_operation("logits")
    }

    async fn save_session(&self, name: &str, tokens: Vec<u32>) -> Result<()> {
        let accepted = Instant::now();
        let run = async {
            let sessions = self.sessions()?;
            let last = tokens.len().saturating_sub(1);
            validate::logits(&LogitsRequest::new(tokens.clone()).with_start(last), &self.info.limits)?;
            let permit = sessions.permit().await?;
            let admission = self.admit()?;
            let (sender, result) = oneshot::channel();
            let (prefix_sender, prefix) = oneshot::channel();
            let work = Work::Logits(Rows::new(sender, last));
            let mut job = Job::new(tokens.clone(), work, CancellationToken::new(), admission, accepted);
            job.prefix = Some(prefix_sender);
            self.run(job, result).await?;
            let prefix = prefix.await.unwrap_or_else(|_| Err(stopped()))?;
            let name = name.to_owned();
            let save = move || {
                let saved = sessions.save(&name, tokens, prefix);
                drop(permit);
                saved
            };
            blocking::blocking("saving the session", save).await
        };
        run.await.with_operation("save_session")
    }

    async fn load_session(&self, name: &str) -> Result<Vec<u32>> {
        let load = async {
            let (sessions, name) = (self.sessions()?, name.to_owned());
            let tokens = blocking::blocking("loading the session", move || sessions.load(&name)).await?;
            validate::tokens("session", &tokens, self.info.limits.vocab_size)?;
            Ok(tokens)
        };
        load.await.with_operation("load_session")
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("info", &self.info).finish_non_exhaustive()
    }
}
