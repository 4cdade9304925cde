//! The answers of one request: one or several generations, merged into one stream of events.

use std::{sync::Arc, time::Duration};

use futures_util::{
    FutureExt, Stream, StreamExt,
    stream::{self, BoxStream},
};
use ternion::{
    DoneEvent, Error, ErrorKind, Event, FinishReason, GenerateRequest, LlmBackend, Score, ScoreRequest,
    Timing, Usage,
};

use crate::{error::ApiError, state::App};

/// How long an answer waits for its place while another of the same request is under way.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// What one answer takes.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) generate: GenerateRequest,
    /// The prompt is scored before.
    pub(crate) score: Option<ScoreRequest>,
    /// Nothing is generated; the number of tokens of the prompt.
    pub(crate) echo_only: Option<usize>,
}

impl Job {
    pub(crate) fn new(generate: GenerateRequest) -> Self {
        Self { generate, score: None, echo_only: None }
    }
}

/// Something that happened to an answer.
#[derive(Debug)]
pub(crate) enum ChoiceEvent {
    /// The prompt's scores.
    Scored(Score),
    /// An event of the generation.
    Generated(Event),
}

/// What a request gets.
#[derive(Debug)]
pub(crate) enum Item {
    /// An event of the answer with this index.
    Event(usize, ChoiceEvent),
    /// The end of all answers.
    End,
    /// The end, by an error.
    Error(ApiError),
}

type Events = BoxStream<'static, Result<ChoiceEvent, Error>>;

/// Starts the answers. What is wrong with the request is an error here, before anything is sent.
///
/// The first answer has a place in the queue when this returns. The others follow as places come free, as many at a time as
/// the model computes. Dropping the stream cancels all of them.
pub(crate) async fn start(
    app: &App,
    backend: Arc<dyn LlmBackend>,
    jobs: Vec<Job>,
    prompt: &'static str,
) -> Result<impl Stream<Item = Item> + Send + use<>, ApiError> {
    let to_api = move |error: Error| ApiError::of(&error, prompt);
    let deadline = app.deadline();
    let stopping = app.stopping().clone();
    let begin = async {
        // A wrong prompt in the middle of a list is found before the others cost anything.
        for job in jobs.iter().skip(1).filter(|job| job.echo_only.is_none()) {
            backend.validate(&job.generate).await?;
        }
        let mut jobs = jobs.into_iter();
        let first = match jobs.next() {
            Some(job) => run(Arc::clone(&backend), job).await?,
            None => stream::empty().boxed(),
        };
        Ok((first, jobs))
    };
    let (first, rest) = tokio::select! {
        biased;
        () = stopping.cancelled() => return Err(ApiError::shutting_down()),
        error = expired(deadline) => return Err(error),
        begun = begin => begun.map_err(to_api)?,
    };

    let at_once = backend.info().limits.max_sequences.max(1);
    let rest = rest.map(move |job| later(Arc::clone(&backend), job));
    let answers = std::iter::once(first).chain(rest).enumerate();
    let merged = stream::iter(answers.map(|(index, events)| events.map(move |event| (index, event)).boxed()))
        .flatten_unordered(at_once);
    let end = async move {
        tokio::select! {
            biased;
            () = stopping.cancelled_owned() => ApiError::shutting_down(),
            error = expired(deadline) => error,
        }
    };
    let end = stream::once(end).map(Item::Error);
    let items = merged
        .map(move |(index, event)| match event {
            Ok(event) => Item::Event(index, event),
            Err(error) => {
                tracing::warn!(%error, "an answer has failed");
                Item::Error(to_api(error))
            }
        })
        .chain(stream::once(std::future::ready(Item::End)));
    Ok(until_end(stream::select_with_strategy(end, items, |(): &mut ()| stream::PollNext::Left)))
}

/// The items up to the end or an error, which is the last.
fn until_end(items: impl Stream<Item = Item> + Send + 'static) -> impl Stream<Item = Item> + Send {
    stream::unfold(Some(items.boxed()), |items| async move {
        let mut items = items?;
        let item = items.next().await?;
        let rest = matches!(item, Item::Event(..)).then_some(items);
        Some((item, rest))
    })
}

async fn expired(deadline: Option<(tokio::time::Instant, Duration)>) -> ApiError {
    match deadline {
        Some((at, limit)) => {
            tokio::time::sleep_until(at).await;
            ApiError::deadline(limit)
        }
        None => std::future::pending().await,
    }
}

/// Starts one answer.
async fn run(backend: Arc<dyn LlmBackend>, job: Job) -> Result<Events, Error> {
    let before = match job.score {
        Some(score) => {
            if job.echo_only.is_none() {
                // What is wrong with the request is cheaper to find than the scores.
                backend.validate(&job.generate).await?;
            }
            Some(Ok(ChoiceEvent::Scored(backend.score(score).await?)))
        }
        None => None,
    };
    let after = match job.echo_only {
        Some(prompt_tokens) => {
            let usage = Usage::new(prompt_tokens, 0);
            let done = DoneEvent::new(FinishReason::MaxTokens, usage, Timing::default());
            stream::once(std::future::ready(Ok(ChoiceEvent::Generated(done.into())))).boxed()
        }
        None => generated(backend.generate(job.generate).await?),
    };
    Ok(stream::iter(before).chain(after).boxed())
}

/// An answer that begins when it is polled. A full queue delays it: another answer of the same request has a place, so that there
/// is progress.
fn later(backend: Arc<dyn LlmBackend>, job: Job) -> Events {
    let begin = async move {
        loop {
            match run(Arc::clone(&backend), job.clone()).await {
                Err(error) if error.kind() == ErrorKind::Busy => tokio::time::sleep(RETRY_PAUSE).await,
                Ok(events) => return events,
                Err(error) => return stream::once(std::future::ready(Err(error))).boxed(),
            }
        }
    };
    begin.flatten_stream().boxed()
}

/// The events of a generation, with an error where it ends without its last event.
fn generated(events: ternion::GenerateStream) -> Events {
    stream::unfold(Some(events), |events| async move {
        let mut events = events?;
        match events.next().await {
            Some(Ok(event)) => {
                let rest = (!matches!(event, Event::Done(_))).then_some(events);
                Some((Ok(ChoiceEvent::Generated(event)), rest))
            }
            Some(Err(error)) => Some((Err(error), None)),
            None => {
                let message = "the backend stopped before the answer ended";
                Some((Err(Error::new(ErrorKind::Closed, message)), None))
            }
        }
    })
    .boxed()
}
