//! The generation engine: makes an [`LlmBackend`] of a [`CausalLm`].
//!
//! The model lives on a thread of its own, which works on all requests together: each step feeds one token of every
//! sequence that is decoding and one chunk of one prompt. Requests come over a queue and events go back over one
//! bounded channel per request, and prompts become tokens on the runtime's threads for blocking work, so nothing here
//! blocks the host's async runtime, and a slow reader stops only its own sequence.

mod job;
mod sampler;
mod slots;
mod stop;
pub mod validate;
mod window;
mod worker;

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    task::{Context, Poll},
    time::Instant,
};

use async_trait::async_trait;
use futures_core::Stream;
use tokio::{
    runtime::Handle,
    sync::{mpsc as channel, oneshot, watch},
};

use crate::{
    CausalLm, Error, ErrorKind, Event, GenerateRequest, GenerateStream, LlmBackend, LogitsRequest, ModelInfo,
    Prompt, Result, ResultExt, Sampling, Score, ScoreRequest, ServedBy, Stats, Unloaded, text::Tokenizer,
};
use job::{Job, Work};
use window::Window;

pub use sampler::log_softmax_at;
pub(crate) use stop::StopMatcher;

/// Events that may wait for a slow reader before its sequence pauses.
const EVENT_CAPACITY: usize = 64;

/// What an [`Engine`] needs to know beyond the model itself.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct EngineOptions {
    /// What `info()` returns. The engine fills in the limits and capabilities, all but
    /// [`batch_invariant`](crate::Capabilities::batch_invariant), which is a property of the model's arithmetic.
    pub info: ModelInfo,
    /// Tokens that end an answer, besides the tokenizer's EOS.
    pub eos_tokens: Vec<u32>,
    /// Sampling fields that apply where a request leaves them open, before the model's own defaults.
    pub sampling: Sampling,
    /// Requests that may wait for a sequence.
    pub max_queued: usize,
    /// Bytes of logits that one request may have in memory at a time: scoring computes them in chunks of so many, and a
    /// request for more logits is refused. `None`: chunks of 32 MB, and as many logits as there is memory for.
    pub logits_bytes: Option<u64>,
}

impl EngineOptions {
    /// Options with a queue of 64 and no further tokens that end an answer.
    pub fn new(info: ModelInfo) -> Self {
        Self {
            info,
            eos_tokens: Vec::new(),
            sampling: Sampling::default(),
            max_queued: 64,
            logits_bytes: None,
        }
    }
}

/// An [`LlmBackend`] over one [`CausalLm`].
///
/// The model is dropped, on its thread, when the engine and all of its streams are gone.
pub struct Engine {
    info: Arc<ModelInfo>,
    tokenizer: Arc<Tokenizer>,
    sampling: Sampling,
    logits_bytes: Option<u64>,
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    /// Closed when the thread has dropped the model.
    gone: watch::Receiver<()>,
}

/// A prompt's tokens that fit into the context, and the window that moves over them if it is one that does.
type Prepared = (Vec<u32>, Option<Window>);

/// What reaches the thread.
enum Command {
    /// A request that has been accepted.
    Submit(Box<Job>),
    /// Something may have changed for a job: its reader has read or is gone.
    Wake,
}

/// Counters that both sides see.
#[derive(Default)]
struct Shared {
    /// Requests accepted and not ended.
    accepted: AtomicUsize,
    active: AtomicUsize,
    /// Jobs that wait for their reader; while there are any, readers wake the thread.
    stalled: AtomicUsize,
    finished: AtomicU64,
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    generated_tokens: AtomicU64,
}

/// A place among the accepted requests, given back when the job is dropped, in whatever way it ends, or before it is
/// submitted, when its prompt turns out to be refused.
struct Admission {
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
    pub fn start(model: Box<dyn CausalLm>, tokenizer: Tokenizer, mut options: EngineOptions) -> Result<Self> {
        validate::sampling(&options.sampling, model.vocab_size())
            .with("section", "sampling")
            .during("load")?;
        if model.context_length() < 2 || model.max_sequences() == 0 || model.max_batch_tokens() == 0 {
            return Err(Error::invalid_config(format!(
                "context {} with {} sequences and prefill chunks of {} tokens: at least 2, 1 and 1 expected",
                model.context_length(),
                model.max_sequences(),
                model.max_batch_tokens()
            ))
            .during("load"));
        }
        let info = &mut options.info;
        info.limits.context_length = model.context_length();
        info.limits.vocab_size = model.vocab_size();
        info.limits.max_sequences = model.max_sequences();
        info.limits.max_queued = options.max_queued;
        info.capabilities.generate = true;
        info.capabilities.chat = tokenizer.has_chat_template();
        info.capabilities.score = true;
        info.capabilities.logits = true;
        info.capabilities.logprobs = true;
        info.capabilities.seed = true;
        info.capabilities.sliding_window = true;
        info.capabilities.prefix_reuse = true;
        info.defaults = info.defaults.clone().overridden_by(&options.sampling);

        let mut eos = options.eos_tokens;
        eos.extend(tokenizer.eos_id());
        eos.sort_unstable();
        eos.dedup();

        let (commands, inbox) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let worker = worker::Worker::new(model, inbox, Arc::clone(&shared), eos, options.logits_bytes);
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
            tokenizer: Arc::new(tokenizer),
            sampling: options.sampling,
            logits_bytes: options.logits_bytes,
            commands,
            shared,
            gone,
        })
    }

    /// The tokens of a prompt, which fit into the context, with the place that its request keeps meanwhile.
    ///
    /// A template and a tokenizer may take seconds for megabytes, so they run where blocking is allowed. The place is
    /// taken before and held until they are done, even if nobody waits any more: that bounds how many run.
    async fn prepare(&self, prompt: Prompt, window: Option<Window>) -> Result<(Admission, Prepared)> {
        let limits = self.info.limits.clone();
        let checked = move |mut tokens: Vec<u32>| -> Result<Prepared> {
            validate::tokens("prompt", &tokens, limits.vocab_size)?;
            let mut window = window;
            if let Some(window) = &mut window {
                window.fit_prompt(&mut tokens);
            }
            validate::prompt_fits(tokens.len(), limits.context_length)?;
            Ok((tokens, window))
        };
        if let Prompt::Tokens(tokens) = prompt {
            let tokens = checked(tokens)?;
            return Ok((self.admit()?, tokens));
        }
        if matches!(&prompt, Prompt::Chat(messages) if messages.is_empty()) {
            return Err(Error::invalid_request("prompt: no messages; at least one expected"));
        }
        let runtime = Handle::try_current().map_err(|e| {
            Error::unsupported("text and chats need a tokio runtime to be awaited in").with_source(e)
        })?;
        let admission = self.admit()?;
        let tokenizer = Arc::clone(&self.tokenizer);
        let prepared = runtime.spawn_blocking(move || {
            let tokens = match prompt {
                Prompt::Text(text) => tokenizer.encode(&text, true)?,
                Prompt::Tokens(tokens) => tokens,
                Prompt::Chat(messages) => tokenizer.encode_chat(&messages, true)?,
            };
            Ok((admission, checked(tokens)?))
        });
        prepared.await.unwrap_or_else(|e| {
            Err(Error::new(ErrorKind::Closed, "the prompt's tokens were given up").with_source(e))
        })
    }

    fn admit(&self) -> Result<Admission> {
        let limits = &self.info.limits;
        let room = limits.max_sequences.saturating_add(limits.max_queued);
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
        self.commands
            .send(Command::Submit(Box::new(job)))
            .map_err(|_| Error::new(ErrorKind::Closed, "the engine's thread has stopped"))
    }

    /// Runs a job whose result comes at once, at its end.
    async fn run<T>(&self, job: Job, result: oneshot::Receiver<Result<T>>) -> Result<T> {
        self.submit(job)?;
        // Dropping this future must free the sequence soon, not only at the job's next chunk.
        let _wake = WakeOnDrop(self.commands.clone());
        result.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::Closed, "the engine's thread has stopped")))
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
        Stats {
            active,
            queued: s.accepted.load(Ordering::Acquire).saturating_sub(active),
            finished: s.finished.load(Ordering::Relaxed),
            prompt_tokens: s.prompt_tokens.load(Ordering::Relaxed),
            cached_tokens: s.cached_tokens.load(Ordering::Relaxed),
            generated_tokens: s.generated_tokens.load(Ordering::Relaxed),
        }
    }

    fn unloaded(&self) -> Unloaded {
        let mut gone = self.gone.clone();
        Box::pin(async move { while gone.changed().await.is_ok() {} })
    }

    async fn generate(&self, mut request: GenerateRequest) -> Result<GenerateStream> {
        let accepted = Instant::now();
        let start = async {
            let window = Window::of(&mut request, self.info.limits.context_length)?;
            validate::generate(&request, self.info.limits.vocab_size)?;
            let (admission, (tokens, window)) = self.prepare(request.prompt, window).await?;
            let sampling = request.sampling.or(&self.sampling);
            let (sender, events) = channel::channel(EVENT_CAPACITY);
            let generation = job::Generation::new(
                sender,
                self.tokenizer.decoder(),
                &tokens,
                sampler::Sampler::new(&sampling, &self.info.defaults),
                request.max_tokens.unwrap_or(usize::MAX),
                request.stop,
                request.ignore_eos,
                request.logprobs,
                window,
                ServedBy::from(&*self.info),
            );
            self.submit(Job::new(
                tokens,
                Work::Generate(Box::new(generation)),
                request.cancel,
                admission,
                accepted,
            ))?;
            let commands = Some(self.commands.clone());
            Ok(GenerateStream::new(Events { events, commands, shared: Arc::clone(&self.shared) }))
        };
        start.await.during("generate")
    }

    async fn score(&self, mut request: ScoreRequest) -> Result<Score> {
        let accepted = Instant::now();
        let run = async {
            validate::score(&request, &self.info.limits)?;
            let last = request.tokens.pop().expect("invariant: a valid request has at least two tokens");
            let admission = self.admit()?;
            let (sender, result) = oneshot::channel();
            let work = Work::Score(job::Scoring::new(sender, request.start, last, request.top));
            let job = Job::new(request.tokens, work, request.cancel, admission, accepted);
            let score = self.run(job, result).await?;
            Ok(Score { served_by: Some(ServedBy::from(&*self.info)), ..score })
        };
        run.await.during("score")
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
            let work = Work::Logits(job::Rows::new(sender, request.start));
            self.run(Job::new(request.tokens, work, request.cancel, admission, accepted), result).await
        };
        run.await.during("logits")
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("info", &self.info).finish_non_exhaustive()
    }
}

struct WakeOnDrop(mpsc::Sender<Command>);

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        // A thread that is gone has nothing to be woken for.
        let _ = self.0.send(Command::Wake);
    }
}

/// The reading end of one generation.
struct Events {
    events: channel::Receiver<Result<Event>>,
    /// Given up at the end, so that a finished stream does not keep the model alive.
    commands: Option<mpsc::Sender<Command>>,
    shared: Arc<Shared>,
}

impl Events {
    fn wake(&self) {
        if let Some(commands) = &self.commands {
            let _ = commands.send(Command::Wake);
        }
    }
}

impl Stream for Events {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.commands.is_none() {
            return Poll::Ready(None);
        }
        match self.events.poll_recv(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(event)) => {
                if matches!(event, Err(_) | Ok(Event::Done { .. })) {
                    self.commands = None;
                } else if self.shared.stalled.load(Ordering::Acquire) > 0 {
                    self.wake();
                }
                Poll::Ready(Some(event))
            }
            Poll::Ready(None) => {
                self.commands = None;
                let error =
                    Error::new(ErrorKind::Closed, "the engine's thread has stopped").during("generate");
                Poll::Ready(Some(Err(error)))
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.events.close();
        self.wake();
    }
}
