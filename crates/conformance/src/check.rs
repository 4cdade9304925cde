//! What a check is: a sentence of the contract, what it needs of a backend, and the function that tries it.

use std::{fmt, future::Future, pin::Pin, time::Duration};

use ternion_core::{Error, ErrorKind, LlmBackend};

/// How long a backend may take to notice what it should notice within a token or a chunk.
const SOON: Duration = Duration::from_secs(10);

/// How long one check may take. A backend that hangs has failed.
pub(crate) const TIME_LIMIT: Duration = Duration::from_secs(120);

/// How many prompts are tried where rounding may make a difference.
const ATTEMPTS: usize = 8;

tokio::task_local! {
    /// Which of these attempts runs; prompts differ by it.
    static ATTEMPT: usize;

    /// See [`patience`].
    static PATIENCE: Duration;
}

/// The number of the attempt that runs, from 0; 0 for a function that is called by itself.
pub(crate) fn attempt() -> usize {
    ATTEMPT.try_with(|attempt| *attempt).unwrap_or(0)
}

/// How long a backend may take to notice what it should notice within a token or a chunk.
pub(crate) fn patience() -> Duration {
    PATIENCE.try_with(|patience| *patience).unwrap_or(SOON)
}

/// What is added to that for each request that the backend works on at the same time: a check may open as many.
const FOR_EACH: Duration = Duration::from_millis(200);

/// A token that ends an answer of this model.
pub(crate) fn end_token(model: &dyn LlmBackend) -> Option<u32> {
    model.info().end_tokens.first().copied().or_else(|| model.tokenizer()?.eos_id())
}

/// The most requests that checks open at the same time, to fill a queue or all sequences.
const MOST_REQUESTS: usize = 512;

/// A sentence of the contract, which the documentation of [`LlmBackend`] and of the types that it takes and gives states in
/// full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sentence {
    /// The item that states it, such as `LlmBackend::generate`. This name is stable.
    pub place: &'static str,
    /// What is demanded, in short. The words may differ from those of the documentation.
    pub text: &'static str,
}

impl Sentence {
    pub(crate) const fn new(place: &'static str, text: &'static str) -> Self {
        Self { place, text }
    }

    /// The failure that `found` is where `expected` was.
    pub(crate) fn broken(self, found: impl fmt::Display, expected: impl fmt::Display) -> Failure {
        Failure {
            sentence: self,
            found: found.to_string(),
            expected: expected.to_string(),
            unsupported: None,
        }
    }

    /// Nothing if `condition` holds.
    pub(crate) fn require(
        self,
        condition: bool,
        found: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Result<(), Failure> {
        if condition { Ok(()) } else { Err(self.broken(found, expected)) }
    }

    /// Nothing if both are equal; `what` names them.
    pub(crate) fn equal<T: PartialEq + fmt::Debug>(
        self,
        what: impl fmt::Display,
        found: T,
        expected: T,
    ) -> Result<(), Failure> {
        if found == expected {
            return Ok(());
        }
        Err(self.broken(format_args!("{what}: {found:?}"), format_args!("{expected:?}")))
    }

    /// The failure that a call which had to work gave an error.
    pub(crate) fn refused(self, what: impl fmt::Display) -> impl FnOnce(Error) -> Failure {
        move |error| {
            let unsupported = (error.kind() == ErrorKind::Unsupported).then(|| error.message().to_owned());
            let failure = self.broken(format_args!("{what}: the error `{error}`"), "success");
            Failure { unsupported, ..failure }
        }
    }
}

impl fmt::Display for Sentence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: \"{}\"", self.place, self.text)
    }
}

/// A sentence of the contract that a backend does not keep.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failure {
    /// The sentence.
    pub sentence: Sentence,
    /// What the backend did.
    pub found: String,
    /// What it should have done.
    pub expected: String,
    /// What the backend says where it has refused a request as `Unsupported`.
    pub(crate) unsupported: Option<String>,
}

impl fmt::Display for Failure {
    /// One line: `found X; Y expected. LlmBackend::generate: "the sentence"`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "found {}; {} expected. {}", self.found, self.expected, self.sentence)
    }
}

impl std::error::Error for Failure {}

/// What a check needs of a backend; without it, the check does not apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    Generate,
    Chat,
    Score,
    Logits,
    Embed,
    Logprobs,
    Seed,
    PrefixReuse,
    Constraints,
    RequiredCalls,
    NoRequiredCalls,
    /// The context has room for the description of a tool, which small vocabularies cut into many tokens.
    LongContext,
    NoChat,
    NoScore,
    NoLogits,
    NoLogprobs,
    NoConstraints,
    /// Prompts that are too long are made to fit.
    Policy,
    NoPolicy,
    /// Token ids are known on this side, so that prompts can be tokens.
    Tokenizer,
    NoTokenizer,
    /// A token that ends an answer is known on this side.
    EndOfSequence,
    /// The tokenizer names a token that begins a sequence.
    BeginningOfSequence,
    /// So few sequences and places in the queue that a check can take them all.
    SmallQueue,
    /// So few sequences that a check can take them all.
    FewSequences,
}

/// Tokens of a context that the description of a tool and a call fit into.
const LONG_CONTEXT: usize = 1024;

impl Need {
    /// Why the backend does not have it.
    fn missing(self, model: &dyn LlmBackend) -> Option<String> {
        let info = model.info();
        let (can, limits) = (&info.capabilities, &info.limits);
        let places = limits.max_sequences.saturating_add(limits.max_queued);
        let (has, reason) = match self {
            Self::Generate => (can.generate, "the backend does not generate"),
            Self::Chat => (can.chat, "there is no chat template"),
            Self::Score => (can.score, "the backend does not score"),
            Self::Logits => (can.logits, "the backend does not give logits"),
            Self::Embed => (can.embed, "the model makes no embeddings"),
            Self::Logprobs => (can.logprobs, "the backend does not report log-probabilities"),
            Self::Seed => (can.seed, "the backend does not keep to seeds"),
            Self::PrefixReuse => (can.prefix_reuse, "the backend does not reuse prefixes"),
            Self::Constraints => (can.constraints, "the backend cannot constrain answers"),
            Self::NoConstraints => (!can.constraints, "the backend constrains answers"),
            Self::RequiredCalls => (can.required_tool_calls, "calls of tools cannot be required"),
            Self::NoRequiredCalls => (!can.required_tool_calls, "calls of tools can be required"),
            Self::LongContext => {
                let found = limits.context_length;
                return (1..LONG_CONTEXT)
                    .contains(&found)
                    .then(|| format!("the context has {found} tokens; {LONG_CONTEXT} are needed"));
            }
            Self::NoChat => (!can.chat, "there is a chat template"),
            Self::NoScore => (!can.score, "the backend scores"),
            Self::NoLogits => (!can.logits, "the backend gives logits"),
            Self::NoLogprobs => (!can.logprobs, "the backend reports log-probabilities"),
            Self::Policy => (can.long_prompts, "there is no context policy"),
            Self::NoPolicy => (!can.long_prompts, "a context policy makes longer prompts fit"),
            Self::Tokenizer => (model.tokenizer().is_some(), "tokens are not known on this side"),
            Self::NoTokenizer => (model.tokenizer().is_none(), "tokens are known on this side"),
            Self::EndOfSequence => {
                let known = model.tokenizer().is_some() && end_token(model).is_some();
                (known, "no token that ends a sequence is known on this side")
            }
            Self::BeginningOfSequence => {
                let bos = model.tokenizer().and_then(|t| t.bos_id());
                (bos.is_some(), "no token that begins a sequence is known on this side")
            }
            Self::SmallQueue => {
                let small = (1..=MOST_REQUESTS).contains(&places);
                return (!small)
                    .then(|| format!("{places} requests fill the queue; at most {MOST_REQUESTS} are tried"));
            }
            Self::FewSequences => {
                let (found, few) = (limits.max_sequences, 1..=MOST_REQUESTS);
                return (!few.contains(&found))
                    .then(|| format!("there are {found} sequences; at most {MOST_REQUESTS} are tried"));
            }
        };
        (!has).then(|| reason.to_owned())
    }
}

pub(crate) type Running<'a> = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>>;

/// One check: a public function of this crate with the sentence that it is about.
#[derive(Clone, Copy)]
pub struct Check {
    /// Module and function: `streaming::the_last_event_is_done`.
    pub name: &'static str,
    /// The sentence of the contract.
    pub sentence: Sentence,
    pub(crate) needs: &'static [Need],
    pub(crate) marks: &'static [&'static str],
    pub(crate) function: for<'a> fn(&'a dyn LlmBackend) -> Running<'a>,
}

impl Check {
    /// Why the check does not apply to this backend: a capability that it does not have. `None`: it applies.
    pub fn skipped(&self, model: &dyn LlmBackend) -> Option<String> {
        self.needs.iter().find_map(|need| need.missing(model))
    }

    /// Tries the backend, whether the check applies or not. Nothing else may use the model meanwhile: checks look at
    /// its statistics and fill its queue.
    ///
    /// A backend that is not [`batch_invariant`](ternion_core::Capabilities::batch_invariant) may answer the same request
    /// differently where two tokens are almost equally probable. A check that compares answers is then tried with up to eight
    /// different prompts, until one passes: rounding spares most of them, a mistake none.
    ///
    /// Must be awaited in a tokio runtime with its timer enabled.
    ///
    /// # Errors
    /// The sentence that is broken, with what was found and expected; a check that takes longer than two minutes, and 0.2 s more for each request
    /// that the backend works on at the same time, is broken too.
    pub async fn run(&self, model: &dyn LlmBackend) -> Result<(), Failure> {
        let rounding = self.is("rounding") && !model.info().capabilities.batch_invariant;
        let attempts = if rounding { ATTEMPTS } else { 1 };
        let tries = async {
            let mut outcome = Ok(());
            for attempt in 0..attempts {
                outcome = ATTEMPT.scope(attempt, (self.function)(model)).await;
                if outcome.is_ok() {
                    break;
                }
            }
            outcome
        };
        let requests = model.info().limits.max_sequences.min(MOST_REQUESTS);
        let more = FOR_EACH * requests as u32;
        let limit = TIME_LIMIT + more;
        match tokio::time::timeout(limit, PATIENCE.scope(SOON + more, tries)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(self.sentence.broken(format_args!("no end after {limit:?}"), "an end")),
        }
    }

    fn is(&self, mark: &str) -> bool {
        self.marks.contains(&mark)
    }

    /// [`run`](Self::run) if the check applies. One that goes to the ends of ranges does not apply to a backend that refuses
    /// those as [`Unsupported`](ternion_core::ErrorKind::Unsupported).
    pub async fn outcome(&self, model: &dyn LlmBackend) -> Outcome {
        match self.skipped(model) {
            Some(reason) => Outcome::Skipped(reason),
            None => match self.run(model).await {
                Ok(()) => Outcome::Passed,
                Err(Failure { unsupported: Some(reason), .. }) if self.is("ranges") => {
                    Outcome::Skipped(format!("the backend is narrower: {reason}"))
                }
                Err(failure) => Outcome::Failed(failure),
            },
        }
    }
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Check")
            .field("name", &self.name)
            .field("sentence", &self.sentence)
            .finish_non_exhaustive()
    }
}

/// How a check ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The backend keeps the sentence.
    Passed,
    /// It does not.
    Failed(Failure),
    /// The check does not apply, for this reason.
    Skipped(String),
}

/// A list of checks: each with its function's name, its sentence and its needs. `rounding` marks one that compares answers
/// or probabilities of several calls, so that rounding may show; `ranges` one that goes to the ends of ranges, or joins
/// fields, where a server behind a remote backend may be narrower, so that a refusal as `Unsupported` is no mistake.
macro_rules! checks {
    ($module:literal; $($function:ident, $sentence:ident, [$($need:ident),*] $(, $mark:ident)*;)*) => {
        pub(crate) const CHECKS: &[$crate::Check] = &[$($crate::Check {
            name: concat!($module, "::", stringify!($function)),
            sentence: $sentence,
            needs: &[$($crate::check::Need::$need),*],
            marks: &[$(stringify!($mark)),*],
            function: |model| Box::pin($function(model)),
        }),*];
    };
}
pub(crate) use checks;
