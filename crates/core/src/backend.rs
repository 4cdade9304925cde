//! `LlmBackend`: all that a host sees of a model.

use std::{fmt, future::Future, pin::Pin, sync::Arc};

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use crate::{
    Completion, EmbedRequest, Embeddings, Error, GenerateRequest, GenerateStream, LogitsRequest, Message,
    ModelInfo, Result, ResultExt, Score, ScoreRequest, Stats, embed, text::Tokenizer, validate,
};

/// What [`LlmBackend::unloaded`] returns.
pub type Unloaded = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A language model that a host can talk to, whatever runs it. Used as `Arc<dyn LlmBackend>`; cheap to share, and
/// all methods may be called at the same time from many tasks. The futures and streams need a tokio runtime, which
/// none of them blocks.
///
/// A backend writes [`info`](Self::info) and [`generate`](Self::generate); all other methods have a default. A type that
/// wraps another backend implements [`BackendWrapper`](crate::BackendWrapper) instead, which forwards every method.
#[async_trait]
pub trait LlmBackend: Send + Sync {
    /// What the model is, its limits and its capabilities.
    ///
    /// # Behavior
    /// Never blocks. The same value on every call, except for a wrapper that has swapped its model.
    fn info(&self) -> Arc<ModelInfo>;

    /// The model's tokenizer with its chat template, for exact counts.
    ///
    /// # Behavior
    /// Never blocks. `None` where the tokens are not known on this side (a remote model).
    fn tokenizer(&self) -> Option<Arc<Tokenizer>> {
        None
    }

    /// What the backend is doing at the moment. Never blocks; all zero where it is not known.
    fn stats(&self) -> Stats {
        Stats::default()
    }

    /// Whether the backend has stopped for good, for example because its thread has died.
    ///
    /// # Behavior
    /// Never blocks. A closed backend fails every request with [`Closed`](crate::ErrorKind::Closed) and has to be loaded
    /// again.
    fn is_closed(&self) -> bool {
        false
    }

    /// A future that ends when the memory of the model is free: some time after the backend and all of its streams
    /// are dropped. It keeps nothing alive itself, and may be awaited after the backend is gone.
    ///
    /// # Behavior
    /// Ends at once for a backend that holds no memory worth waiting for. A wrapper returns that of what it wraps.
    fn unloaded(&self) -> Unloaded {
        Box::pin(std::future::ready(()))
    }

    /// Checks a request without starting it.
    ///
    /// # Behavior
    /// Makes the checks that [`generate`](Self::generate) makes of the request, in the same order. What the backend is
    /// doing at the moment does not matter: a full queue refuses nothing here. A layer that lets a request wait calls this
    /// first, so that a request is judged in the same way whether it has to wait or not.
    ///
    /// The default checks the fields and, where there is a tokenizer, the length of the prompt. A backend that checks
    /// more, or that accepts more, overrides it.
    ///
    /// # Errors
    /// Those of [`generate`](Self::generate) for this request, but for the ones that come from the load of the backend.
    ///
    /// # Cancellation
    /// Dropping the future.
    async fn validate(&self, request: &GenerateRequest) -> Result<()> {
        validate::request(request, &self.info(), self.tokenizer()).await.with_operation("generate")
    }

    /// Continues a prompt as a stream of events.
    ///
    /// # Requires
    /// `max_tokens` at least 1, every field of [`Sampling`](crate::Sampling) in its range, no empty stop string, a
    /// prompt with at least one token and fewer than `context_length`. A longer one needs a
    /// [`ContextPolicy`](crate::context::ContextPolicy), of the request or of the model, that makes it fit.
    ///
    /// # Behavior
    /// Returns when the prompt's tokens are known and the request is accepted, before the model does any work. Must be
    /// awaited in a tokio runtime: template and tokenizer run on its threads for blocking work. A request has its
    /// place in the queue from before that, so that a full queue refuses it at once.
    ///
    /// The events come in order; the last is [`Event::Done`](crate::Event::Done). Where a policy changed the prompt, a
    /// [`ContextReport`](crate::context::ContextReport) comes right before it. A slow reader slows its own generation down and nobody else's.
    ///
    /// # Errors
    /// Here: [`InvalidRequest`](crate::ErrorKind::InvalidRequest) naming the field and its range,
    /// [`ContextOverflow`](crate::ErrorKind::ContextOverflow), [`Busy`](crate::ErrorKind::Busy) when the queue is
    /// full, [`Closed`](crate::ErrorKind::Closed). In the stream: failures of the engine, after which it ends.
    ///
    /// # Cancellation
    /// Dropping the stream, or cancelling the request's token, ends the work within one token or one prefill chunk
    /// and frees the sequence. Dropping the future gives the request up; the tokenizer may go on in the background. With the token, the stream still ends with `Done` and
    /// [`FinishReason::Cancelled`](crate::FinishReason::Cancelled).
    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream>;

    /// The log-probabilities of given tokens.
    ///
    /// # Requires
    /// `1 <= start < tokens.len() <= context_length`, every token below `vocab_size`, `top` at most 100.
    ///
    /// # Behavior
    /// One [`TokenScore`](crate::TokenScore) for each of `tokens[start..]`, from the model's raw logits: the same
    /// numbers, but for the rounding of float sums in another order, that `generate` reports as `logprob` for the same
    /// tokens.
    ///
    /// # Errors
    /// As [`generate`](Self::generate); [`Unsupported`](crate::ErrorKind::Unsupported) without the capability.
    ///
    /// # Cancellation
    /// Dropping the future or cancelling the token; the latter gives [`Cancelled`](crate::ErrorKind::Cancelled).
    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        drop(request);
        Err(Error::unsupported(format!("backend `{}` does not score", self.info().backend))
            .with_operation("score"))
    }

    /// The raw logits at the positions from `start` on, `[tokens.len() - start, vocab_size]` row after row.
    ///
    /// # Requires
    /// `start < tokens.len() <= context_length`, every token below `vocab_size`.
    ///
    /// # Behavior
    /// For checks and measurements: a row has `vocab_size` floats. Backends that cannot see logits do not have it.
    ///
    /// # Errors
    /// As [`score`](Self::score); [`ResourceExhausted`](crate::ErrorKind::ResourceExhausted) where there is no memory
    /// for so many rows.
    ///
    /// # Cancellation
    /// As [`score`](Self::score).
    async fn logits(&self, request: LogitsRequest) -> Result<Vec<f32>> {
        drop(request);
        Err(Error::unsupported(format!("backend `{}` does not give logits", self.info().backend))
            .with_operation("logits"))
    }

    /// The embeddings of texts, by a model that is made for it.
    ///
    /// # Requires
    /// At least one input, none of them empty, every token below `vocab_size`; a length that
    /// [`EmbeddingInfo`](crate::EmbeddingInfo) has.
    ///
    /// # Behavior
    /// One [`Embedding`](crate::Embedding) for each input, in their order. Pooling and normalisation are those of the model's
    /// files, which [`ModelInfo::embedding`](crate::ModelInfo::embedding) tells. An input's vector does not depend on the others of its request,
    /// beyond the rounding of float sums in another order. An input that is longer than `context_length` is refused or cut,
    /// as the request's [`InputTruncation`](crate::InputTruncation) says, and one that was cut is marked.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) without the capability, and for a length that the model has not;
    /// [`InvalidRequest`](crate::ErrorKind::InvalidRequest) naming the field;
    /// [`ContextOverflow`](crate::ErrorKind::ContextOverflow) for an input that is too long and must not be cut;
    /// [`Busy`](crate::ErrorKind::Busy) when the queue is full, [`Closed`](crate::ErrorKind::Closed).
    ///
    /// # Cancellation
    /// As [`score`](Self::score), seen between two steps, each of which computes some inputs.
    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings> {
        drop(request);
        Err(embed::no_embeddings(&self.info()).with_operation("embed"))
    }

    /// Keeps tokens under a name in the model's prompt cache, with their keys and values, so that
    /// [`load_session`](Self::load_session) finds them after a restart.
    ///
    /// # Requires
    /// At least one token and no more than `context_length`, every token below `vocab_size`; a name of letters, digits, `-`, `_`
    /// and `.`.
    ///
    /// # Behavior
    /// Computes what is not in the KV cache yet, and returns when all is on the disk. A session of the same name is replaced.
    /// Keys and values make room for others as everything in the cache does; what is missing later is computed again.
    ///
    /// # Errors
    /// As [`score`](Self::score); [`Unsupported`](crate::ErrorKind::Unsupported) without a prompt cache,
    /// [`Io`](crate::ErrorKind::Io) where the disk cannot be written to.
    ///
    /// # Cancellation
    /// Dropping the future; the writing may go on.
    async fn save_session(&self, name: &str, tokens: Vec<u32>) -> Result<()> {
        let _ = (name, tokens);
        Err(no_sessions(&self.info().backend).with_operation("save_session"))
    }

    /// The tokens of a session that [`save_session`](Self::save_session) has kept. A request that begins with them finds their keys
    /// and values.
    ///
    /// # Errors
    /// [`NotFound`](crate::ErrorKind::NotFound) where there is no such session of this model,
    /// [`InvalidRequest`](crate::ErrorKind::InvalidRequest) for a name that cannot be one, [`Io`](crate::ErrorKind::Io) where its
    /// file is damaged, [`Unsupported`](crate::ErrorKind::Unsupported) without a prompt cache.
    ///
    /// # Cancellation
    /// Dropping the future.
    async fn load_session(&self, name: &str) -> Result<Vec<u32>> {
        let _ = name;
        Err(no_sessions(&self.info().backend).with_operation("load_session"))
    }
}

fn no_sessions(backend: &str) -> Error {
    Error::unsupported(format!("backend `{backend}` keeps no sessions, or the model has no `prompt_cache`"))
}

/// Shows the model's name and its backend.
impl fmt::Debug for dyn LlmBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let info = self.info();
        f.debug_struct("LlmBackend")
            .field("model", &info.name)
            .field("backend", &info.backend)
            .finish_non_exhaustive()
    }
}

/// Conveniences on every [`LlmBackend`], written in terms of its methods.
#[async_trait]
pub trait LlmBackendExt: LlmBackend {
    /// Answers a conversation and waits for the whole answer.
    ///
    /// # Errors
    /// As [`LlmBackend::generate`].
    async fn chat(&self, messages: Vec<Message>) -> Result<Completion> {
        self.generate(GenerateRequest::chat(messages)).await?.collect().await
    }

    /// Continues a text and waits for the whole continuation of at most `max_tokens` tokens.
    ///
    /// # Errors
    /// As [`LlmBackend::generate`].
    async fn complete(&self, text: &str, max_tokens: usize) -> Result<Completion> {
        self.generate(GenerateRequest::new(text).with_max_tokens(max_tokens)).await?.collect().await
    }

    /// Answers with a value: generates JSON under the schema of `T`, and reads a `T` from it. Needs the capability
    /// [`constraints`](crate::Capabilities::constraints).
    ///
    /// ```no_run
    /// # async fn f(backend: &dyn ternion_core::LlmBackend) -> ternion_core::Result<()> {
    /// use ternion_core::{GenerateRequest, LlmBackendExt, Message};
    ///
    /// #[derive(serde::Deserialize, schemars::JsonSchema)]
    /// struct City {
    ///     name: String,
    ///     inhabitants: u32,
    /// }
    ///
    /// let question = GenerateRequest::chat([Message::user("What is the capital of Norway?")]);
    /// // The model sees the schema only if it is told.
    /// let question = question.with_schema_of::<City>().with_schema_in_prompt();
    /// let city: City = backend.extract(question).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`LlmBackend::generate`] and [`Completion::parse`].
    async fn extract<T>(&self, request: GenerateRequest) -> Result<T>
    where
        T: DeserializeOwned + JsonSchema,
    {
        let answer = self.generate(request.with_schema_of::<T>()).await?.collect().await?;
        answer.parse().with_operation("extract")
    }

    /// How many tokens `text` is, without any that the tokenizer would add around it.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) if the tokenizer is not known.
    fn count_tokens(&self, text: &str) -> Result<usize> {
        required_tokenizer(self.tokenizer(), "count_tokens")?.count(text)
    }

    /// How many tokens a conversation is as a prompt, with all that the chat template and the tokenizer add.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) if tokenizer or template are not known, and what the template
    /// refuses.
    fn count_chat_tokens(&self, messages: &[Message]) -> Result<usize> {
        required_tokenizer(self.tokenizer(), "count_chat_tokens")?.count_chat(messages)
    }
}

impl<B: LlmBackend + ?Sized> LlmBackendExt for B {}

fn required_tokenizer(tokenizer: Option<Arc<Tokenizer>>, operation: &'static str) -> Result<Arc<Tokenizer>> {
    tokenizer.ok_or_else(|| {
        Error::unsupported("this backend has no tokenizer on this side").with_operation(operation)
    })
}
