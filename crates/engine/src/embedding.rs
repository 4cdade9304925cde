//! The engine of models that make embeddings: an [`LlmBackend`] of an [`EmbeddingModel`].
//!
//! The model lives on a thread of its own. A step computes some inputs of one request; requests take turns, so that one with
//! many inputs does not hold up the others.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering, mpsc},
};

use async_trait::async_trait;
use ternion_core::{
    CancellationToken, EmbedInput, EmbedRequest, Embedding, EmbeddingInfo, Embeddings, Error, ErrorKind,
    GenerateRequest, GenerateStream, InputTruncation, LlmBackend, ModelInfo, Result, ResultExt, ServedBy,
    Stats, Unloaded, blocking, catch_panic, embed, text::Tokenizer, validate,
};
use tokio::sync::{Semaphore, oneshot, watch};

use crate::engine::{Process, Shared, stopped};

/// Requests that are tokenized at the same time.
const TOKENIZED_AT_ONCE: usize = 8;

/// A model that makes one vector of a sequence of tokens. Blocking; the [`EmbeddingEngine`] calls it from one thread.
pub trait EmbeddingModel: Send {
    /// The most tokens of one input, at least 1.
    fn context_length(&self) -> usize;

    /// Token ids are below this.
    fn vocab_size(&self) -> usize;

    /// The most tokens of one call of [`pool`](Self::pool), all inputs together; one input may always have
    /// `context_length`.
    fn max_batch_tokens(&self) -> usize;

    /// The most inputs of one call of [`pool`](Self::pool), at least 1.
    fn max_batch_inputs(&self) -> usize;

    /// For each input what pooling makes of its hidden states, not normalised, in their order.
    ///
    /// # Requires
    /// At least one input; each has 1 to `context_length` tokens, all below `vocab_size`. An implementation checks what it
    /// relies on.
    ///
    /// # Errors
    /// Those of the engine. The next call does not see a failed one.
    fn pool(&mut self, inputs: &[&[u32]]) -> Result<Vec<Vec<f32>>>;
}

/// An [`LlmBackend`] over one [`EmbeddingModel`]. It has [`embed`](LlmBackend::embed) and generates nothing.
///
/// The model is dropped, on its thread, when the engine is gone.
pub struct EmbeddingEngine {
    info: Arc<ModelInfo>,
    embedding: EmbeddingInfo,
    tokenizer: Arc<Tokenizer>,
    jobs: mpsc::Sender<Job>,
    shared: Arc<Shared>,
    process: Process,
    tokenizing: Arc<Semaphore>,
    gone: watch::Receiver<()>,
}

/// The inputs of a request that are not computed yet, and the vectors of the others.
struct Job {
    inputs: VecDeque<Prepared>,
    done: Vec<Embedding>,
    dimensions: Option<usize>,
    cancel: CancellationToken,
    result: oneshot::Sender<Result<Vec<Embedding>>>,
    admission: Admission,
}

struct Prepared {
    tokens: Vec<u32>,
    truncated: bool,
}

/// A place among the accepted requests.
struct Admission(Arc<Shared>);

impl Drop for Admission {
    fn drop(&mut self) {
        self.0.accepted.fetch_sub(1, Ordering::AcqRel);
    }
}

impl EmbeddingEngine {
    /// Starts the thread that owns `model`. `info` describes the model; the engine fills in the limits and capabilities.
    /// `max_queued` requests may wait.
    ///
    /// # Errors
    /// If the model takes no token, or if no thread can be started.
    pub fn start(
        model: Box<dyn EmbeddingModel>,
        tokenizer: Tokenizer,
        mut info: ModelInfo,
        embedding: EmbeddingInfo,
        max_queued: usize,
    ) -> Result<Self> {
        if model.context_length() == 0 || model.max_batch_inputs() == 0 {
            let message = "a model for embeddings that takes no tokens; at least 1 expected";
            return Err(Error::invalid_config(message).with_operation("load"));
        }
        info.limits.context_length = model.context_length();
        info.limits.vocab_size = model.vocab_size();
        info.limits.max_sequences = model.max_batch_inputs();
        info.limits.max_queued = max_queued;
        info.capabilities.generate = false;
        info.capabilities.embed = true;
        info.embedding = Some(embedding.clone());
        let shared = Arc::new(Shared::default());
        let (jobs, inbox) = mpsc::channel();
        let (alive, gone) = watch::channel(());
        let worker = Worker {
            sizes: (model.max_batch_tokens(), model.max_batch_inputs()),
            model,
            embedding: embedding.clone(),
            shared: Arc::clone(&shared),
        };
        let run = move || {
            worker.run(&inbox); // drops the model
            drop(alive);
        };
        std::thread::Builder::new().name("ternion-embedding".into()).spawn(run).map_err(|e| {
            Error::new(ErrorKind::ResourceExhausted, "cannot start the engine's thread").with_source(e)
        })?;
        Ok(Self {
            info: Arc::new(info),
            embedding,
            tokenizer: Arc::new(tokenizer),
            jobs,
            shared,
            process: Process::current(),
            tokenizing: Arc::new(Semaphore::new(TOKENIZED_AT_ONCE)),
            gone,
        })
    }

    fn admit(&self) -> Result<Admission> {
        self.process.check()?;
        let limits = &self.info.limits;
        let room = limits.max_queued.saturating_add(1);
        let accepted = &self.shared.accepted;
        accepted
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < room).then_some(n + 1))
            .map(|_| Admission(Arc::clone(&self.shared)))
            .map_err(|_| {
                let message = "the queue is full; try again later";
                Error::new(ErrorKind::Busy, message).with("queued", limits.max_queued)
            })
    }

    async fn run(&self, request: EmbedRequest) -> Result<Embeddings> {
        embed::check(&request, &self.info)?;
        self.embedding.check_dimensions(request.dimensions)?;
        let admission = self.admit()?;
        let EmbedRequest { inputs, truncation, dimensions, cancel, .. } = request;
        let permit = Arc::clone(&self.tokenizing).acquire_owned().await.map_err(|_| stopped())?;
        let (tokenizer, limits) = (Arc::clone(&self.tokenizer), self.info.limits.clone());
        let prepare = move || {
            let _permit = permit;
            let prepared = inputs.into_iter().enumerate().map(|(index, input)| {
                prepare(input, &tokenizer, limits.context_length, truncation)
                    .and_then(|prepared| {
                        validate::tokens("inputs", &prepared.tokens, limits.vocab_size).map(|()| prepared)
                    })
                    .with("input", index)
            });
            prepared.collect::<Result<VecDeque<Prepared>>>()
        };
        let inputs = blocking::blocking("the preparation of the request", prepare).await?;
        let (result, answer) = oneshot::channel();
        let job =
            Job { done: Vec::with_capacity(inputs.len()), inputs, dimensions, cancel, result, admission };
        self.jobs.send(job).map_err(|_| stopped())?;
        let items = answer.await.unwrap_or_else(|_| Err(stopped()))?;
        Ok(Embeddings::new(items).with_served_by(ServedBy::from(&*self.info)))
    }
}

/// The tokens of an input, cut where it is too long and may be.
fn prepare(
    input: EmbedInput,
    tokenizer: &Tokenizer,
    most: usize,
    truncation: InputTruncation,
) -> Result<Prepared> {
    let (before, mut tokens, after) = match input {
        EmbedInput::Text(text) => {
            let (before, after) = tokenizer.added_around();
            (before, tokenizer.encode_plain(&text)?, after)
        }
        EmbedInput::Tokens(tokens) => (&[][..], tokens, &[][..]),
        _ => return Err(Error::unsupported("inputs: an unknown kind of input")),
    };
    let around = before.len() + after.len();
    if around + tokens.len() == 0 {
        return Err(Error::invalid_request("inputs: the text has no token"));
    }
    let over = (around + tokens.len()).saturating_sub(most);
    let kept = tokens.len().saturating_sub(over);
    match truncation {
        _ if over == 0 => {}
        InputTruncation::End if kept > 0 => tokens.truncate(kept),
        InputTruncation::Start if kept > 0 => drop(tokens.drain(..over)),
        _ => {
            let message = format!(
                "inputs: {} tokens, and the model takes {most}; a shorter text, or a truncation, expected",
                around + tokens.len()
            );
            return Err(Error::new(ErrorKind::ContextOverflow, message));
        }
    }
    Ok(Prepared { tokens: [before, &tokens, after].concat(), truncated: over > 0 })
}

/// What runs on the thread.
struct Worker {
    model: Box<dyn EmbeddingModel>,
    embedding: EmbeddingInfo,
    /// Tokens and inputs of one step.
    sizes: (usize, usize),
    shared: Arc<Shared>,
}

impl Worker {
    fn run(mut self, inbox: &mpsc::Receiver<Job>) {
        let mut jobs = VecDeque::new();
        loop {
            if jobs.is_empty() {
                match inbox.recv() {
                    Ok(job) => jobs.push_back(job),
                    Err(_) => break,
                }
            }
            jobs.extend(inbox.try_iter());
            let Some(mut job) = jobs.pop_front() else { continue };
            if job.result.is_closed() {
                continue;
            }
            self.shared.active.store(1, Ordering::Release);
            let outcome =
                if job.cancel.is_cancelled() { Err(Error::cancelled()) } else { self.step(&mut job) };
            self.shared.active.store(0, Ordering::Release);
            match outcome {
                Ok(()) if !job.inputs.is_empty() => jobs.push_back(job),
                outcome => {
                    let Job { done, result, admission, .. } = job;
                    self.shared.finished.fetch_add(1, Ordering::Relaxed);
                    drop(admission); // before the answer, so that the next request finds its place
                    // The send fails only if nobody waits any more.
                    let _ = result.send(outcome.map(|()| done));
                }
            }
        }
        self.shared.closed.store(true, Ordering::Release);
    }

    /// Computes the next inputs of a job.
    fn step(&mut self, job: &mut Job) -> Result<()> {
        let (most_tokens, most_inputs) = self.sizes;
        let (mut count, mut tokens) = (0, 0);
        for input in job.inputs.iter().take(most_inputs) {
            if count > 0 && tokens + input.tokens.len() > most_tokens {
                break;
            }
            (count, tokens) = (count + 1, tokens + input.tokens.len());
        }
        let group: Vec<Prepared> = job.inputs.drain(..count).collect();
        let inputs: Vec<&[u32]> = group.iter().map(|input| &*input.tokens).collect();
        let pooled = catch_panic(|| self.model.pool(&inputs))
            .unwrap_or_else(|panic| Err(Error::backend(format!("the engine panicked: {panic}"))))?;
        let is_right = |values: &Vec<f32>| {
            (self.embedding.dimensions == 0 || values.len() == self.embedding.dimensions)
                && values.iter().all(|value| value.is_finite())
        };
        if pooled.len() != count || !pooled.iter().all(is_right) {
            return Err(Error::backend(
                "the model gave vectors of a wrong length or with values that are no numbers",
            ));
        }
        self.shared.prompt_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
        for (input, pooled) in group.iter().zip(pooled) {
            let values = self.embedding.finish(pooled, job.dimensions);
            job.done.push(Embedding::new(values, input.tokens.len()).with_truncated(input.truncated));
        }
        Ok(())
    }
}

#[async_trait]
impl LlmBackend for EmbeddingEngine {
    fn info(&self) -> Arc<ModelInfo> {
        Arc::clone(&self.info)
    }

    fn tokenizer(&self) -> Option<Arc<Tokenizer>> {
        Some(Arc::clone(&self.tokenizer))
    }

    fn stats(&self) -> Stats {
        let active = self.shared.active.load(Ordering::Acquire);
        let mut stats = Stats::default();
        stats.active = active;
        stats.queued = self.shared.accepted.load(Ordering::Acquire).saturating_sub(active);
        stats.finished = self.shared.finished.load(Ordering::Relaxed);
        stats.prompt_tokens = self.shared.prompt_tokens.load(Ordering::Relaxed);
        stats
    }

    fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire) || self.process.check().is_err()
    }

    fn unloaded(&self) -> Unloaded {
        if self.process.check().is_err() {
            return Box::pin(std::future::ready(()));
        }
        let mut gone = self.gone.clone();
        Box::pin(async move { while gone.changed().await.is_ok() {} })
    }

    async fn validate(&self, request: &GenerateRequest) -> Result<()> {
        let _ = request;
        Err(embed::no_generation(&self.info))
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        drop(request);
        Err(embed::no_generation(&self.info))
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings> {
        let cancel = request.cancel.clone();
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(Error::cancelled()),
            outcome = self.run(request) => outcome,
        }
        .with_operation("embed")
    }
}

impl std::fmt::Debug for EmbeddingEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddingEngine").field("info", &self.info).finish_non_exhaustive()
    }
}
