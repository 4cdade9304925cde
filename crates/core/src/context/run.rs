//! Carries out the plan for a long text: its steps as requests to the backend, those that do not depend on each other side by
//! side, and the last one streamed as the answer.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_core::Stream;
use tokio::{
    sync::mpsc::{Receiver, Sender, channel},
    task::JoinSet,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    ContextStep,
    long::{Plan, Way},
};
use crate::{
    Completion, DoneEvent, Error, ErrorKind, Event, FinishReason, GenerateRequest, GenerateStream,
    LlmBackend, Prompt, Result, ResultExt, Timing, ToolChoice, Usage, blocking::blocking, text::Tokenizer,
};

/// Events that may wait for a slow reader.
const EVENT_CAPACITY: usize = 64;

/// Waits of a step that finds the backend's queue full while none of the run's own steps is at work: each twice as long as
/// the one before, half a minute in all.
const BUSY_WAITS: u32 = 12;
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// What ends a run before its last event.
enum Stop {
    /// Nobody reads any more.
    Gone,
    Cancelled,
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        if error.kind() == ErrorKind::Cancelled { Self::Cancelled } else { Self::Failed(error) }
    }
}

/// A plan under way.
pub(super) struct Run {
    pub(super) plan: Arc<Plan>,
    pub(super) backend: Arc<dyn LlmBackend>,
    pub(super) tokenizer: Arc<Tokenizer>,
    /// The request as it was asked for; its prompt is replaced by that of the last step.
    pub(super) request: GenerateRequest,
    pub(super) accepted: Instant,
}

impl Run {
    /// Starts it on the current runtime.
    pub(super) fn start(mut self) -> GenerateStream {
        let (events, reader) = channel(EVENT_CAPACITY);
        let cancel = self.request.cancel.child_token();
        self.request.cancel = cancel.clone();
        let guard = cancel.clone().drop_guard();
        tokio::spawn(async move {
            let mut steps = Steps { report: self.plan.report.clone(), events, cancel, run: self };
            let end = match steps.all().await {
                Ok(()) | Err(Stop::Gone) => return,
                Err(Stop::Failed(error)) => Err(error.with_operation("generate")),
                Err(Stop::Cancelled) => {
                    // Nobody may read it.
                    let _ = steps.emit(ContextStep::Report(steps.report.clone())).await;
                    let timing = Timing { queued: steps.run.accepted.elapsed(), ..Timing::default() };
                    Ok(DoneEvent::new(FinishReason::Cancelled, Usage::default(), timing).into())
                }
            };
            let _ = steps.events.send(end).await;
        });
        GenerateStream::new(Events { reader, guard: Some(guard) })
    }
}

struct Steps {
    run: Run,
    report: super::ContextReport,
    events: Sender<Result<Event>>,
    cancel: CancellationToken,
}

impl Steps {
    async fn all(&mut self) -> Result<(), Stop> {
        let plan = Arc::clone(&self.run.plan);
        let last = match plan.way {
            _ if plan.chunks.len() <= 1 => plan.chunk_prompt(0, ""),
            Way::Refine => self.refine(&plan).await?,
            Way::MapReduce => self.map_reduce(&plan).await?,
        };
        self.answer(last).await
    }

    /// One answer after the other; returns the prompt of the last step.
    async fn refine(&mut self, plan: &Plan) -> Result<Prompt, Stop> {
        let mut answer = String::new();
        let parts = plan.chunks.len();
        for part in 0..parts - 1 {
            let prompt = plan.chunk_prompt(part, &answer);
            let answers = self.round(0, part, parts, vec![prompt]).await?;
            answer = answers.into_iter().next().unwrap_or_default();
        }
        Ok(plan.chunk_prompt(parts - 1, &answer))
    }

    /// An answer for each chunk, then for groups of answers until there is one group; returns its prompt.
    async fn map_reduce(&mut self, plan: &Arc<Plan>) -> Result<Prompt, Stop> {
        let mut prompts: Vec<Prompt> =
            (0..plan.chunks.len()).map(|part| plan.chunk_prompt(part, "")).collect();
        for round in 0.. {
            let parts = prompts.len();
            let mut answers = self.round(round, 0, parts, prompts).await?;
            answers.retain(|answer| !answer.trim().is_empty());
            if answers.is_empty() {
                return Err(Error::backend(format!("none of the {parts} parts was given an answer")).into());
            }
            self.report.merged.push(answers.len());
            let (plan, tokenizer) = (Arc::clone(plan), Arc::clone(&self.run.tokenizer));
            let combine = move || plan.combine(&tokenizer, &answers);
            prompts = blocking("the work on the answers", combine).await?;
            if prompts.len() == 1 {
                break;
            }
        }
        Ok(prompts.swap_remove(0))
    }

    /// The answers to these prompts, as many at once as the backend works on. `first` is the number of the first of `parts`.
    async fn round(
        &mut self,
        round: usize,
        first: usize,
        parts: usize,
        prompts: Vec<Prompt>,
    ) -> Result<Vec<String>, Stop> {
        let most = self.run.backend.info().limits.max_sequences.max(1);
        let mut at_once = most;
        let mut backoff = BusyBackoff::default();
        let mut answers = vec![String::new(); prompts.len()];
        let mut started = vec![false; prompts.len()];
        let mut waiting: VecDeque<usize> = (0..prompts.len()).collect();
        let mut working = JoinSet::new();
        while !waiting.is_empty() || !working.is_empty() {
            while working.len() < at_once
                && let Some(i) = waiting.pop_front()
            {
                if !std::mem::replace(&mut started[i], true) {
                    self.emit(ContextStep::PartStarted { round, part: first + i, parts }).await?;
                }
                let request = self.step(prompts[i].clone());
                let backend = Arc::clone(&self.run.backend);
                working.spawn(async move {
                    let answer = async { backend.generate(request).await?.collect().await };
                    (i, answer.await)
                });
            }
            let Some(done) = working.join_next().await else { break };
            let (i, answer) =
                done.map_err(|e| Stop::Failed(Error::backend("a step was given up").with_source(e)))?;
            match answer {
                // Others fill the queue. Steps of this run that end make room; without any, only time does.
                Err(e) if e.kind() == ErrorKind::Busy => {
                    waiting.push_front(i);
                    at_once = working.len().max(1);
                    if working.is_empty() {
                        let waited = backoff.wait(e, &self.cancel).await;
                        waited.map_err(|stop| match stop {
                            Stop::Failed(e) => Stop::Failed(self.of_part(e, round, first + i, parts)),
                            stop => stop,
                        })?;
                    }
                }
                Err(e) if e.kind() == ErrorKind::Cancelled => return Err(Stop::Cancelled),
                Err(e) => return Err(Stop::Failed(self.of_part(e, round, first + i, parts))),
                Ok(answer) => {
                    at_once = most.min(at_once + 1);
                    backoff = BusyBackoff::default();
                    let usage = answer.usage;
                    answers[i] = self.keep(answer).await?;
                    let answer = answers[i].clone();
                    self.emit(ContextStep::PartDone { round, part: first + i, parts, answer, usage }).await?;
                }
            }
        }
        Ok(answers)
    }

    /// A request for an answer that only the next step reads.
    fn step(&self, prompt: Prompt) -> GenerateRequest {
        let mut request = GenerateRequest::new(prompt)
            .with_max_tokens(self.run.plan.answer_tokens)
            .with_cancel(self.cancel.clone());
        let (params, asked) = (&mut request.params, &self.run.request.params);
        params.sampling.clone_from(&asked.sampling);
        params.ignore_eos = asked.ignore_eos;
        params.stop_tokens.clone_from(&asked.stop_tokens);
        if matches!(params.prompt, Prompt::Chat(_)) {
            params.chat.clone_from(&asked.chat);
            // Only the last answer reaches the host, who runs the tools.
            params.chat.tool_choice = ToolChoice::None;
        }
        request
    }

    async fn keep(&mut self, answer: Completion) -> Result<String, Stop> {
        self.report.add(&answer.usage);
        if answer.finish_reason == FinishReason::Cancelled {
            return Err(Stop::Cancelled);
        }
        let (plan, tokenizer) = (Arc::clone(&self.run.plan), Arc::clone(&self.run.tokenizer));
        let within = move || plan.within(&tokenizer, answer.text);
        let (answer, cut) = blocking("the work on an answer", within).await?;
        self.report.answers_cut += usize::from(cut);
        Ok(answer)
    }

    fn of_part(&self, error: Error, round: usize, part: usize, parts: usize) -> Error {
        let error = error.with("part", format!("{} of {parts}", part + 1));
        match self.run.plan.chunks.get(part) {
            Some(chunk) if round == 0 => error.with("bytes", format!("{}..{}", chunk.start, chunk.end)),
            _ => error.with("round", round),
        }
    }

    /// Streams the answer to the last prompt.
    async fn answer(&mut self, prompt: Prompt) -> Result<(), Stop> {
        let mut request = self.run.request.clone();
        request.params.prompt = prompt;
        let before = self.run.accepted.elapsed();
        let mut backoff = BusyBackoff::default();
        // Whether the reader has seen anything of the answer; it cannot begin again after that.
        let mut begun = false;
        'attempts: loop {
            let mut stream = match self.run.backend.generate(request.clone()).await {
                Ok(stream) => stream,
                Err(e) if e.kind() == ErrorKind::Busy => {
                    backoff.wait(e, &self.cancel).await?;
                    continue;
                }
                Err(e) => return Err(e.into()),
            };
            while let Some(event) = stream.next().await {
                let mut event = match event {
                    Ok(event) => event,
                    Err(e) if e.kind() == ErrorKind::Busy && !begun => {
                        backoff.wait(e, &self.cancel).await?;
                        continue 'attempts;
                    }
                    Err(e) => return Err(e.into()),
                };
                begun = true;
                if let Event::Done(DoneEvent { usage, timing, .. }) = &mut event {
                    // The times count from the request that the host made.
                    timing.queued += before;
                    timing.first_token = timing.first_token.map(|t| t + before);
                    self.report.add(usage);
                    self.emit(ContextStep::Report(self.report.clone())).await?;
                }
                self.events.send(Ok(event)).await.map_err(|_| Stop::Gone)?;
            }
            return Ok(());
        }
    }

    async fn emit(&self, step: ContextStep) -> Result<(), Stop> {
        self.events.send(Ok(Event::Context(step))).await.map_err(|_| Stop::Gone)
    }
}

/// How often a step has found the queue full in a row.
#[derive(Default)]
struct BusyBackoff(u32);

impl BusyBackoff {
    /// Waits before the step is tried again, or fails with the error that it had.
    async fn wait(&mut self, error: Error, cancel: &CancellationToken) -> Result<(), Stop> {
        if self.0 == BUSY_WAITS {
            return Err(Stop::Failed(error.into_retried()));
        }
        if error.is_retried() {
            return Err(Stop::Failed(error));
        }
        let delay = FIRST_WAIT.saturating_mul(1 << self.0).min(LONGEST_WAIT);
        self.0 += 1;
        cancel.run_until_cancelled(tokio::time::sleep(delay)).await.ok_or(Stop::Cancelled)
    }
}

/// The reading end. Dropping it cancels all steps.
struct Events {
    reader: Receiver<Result<Event>>,
    /// `None` after the end.
    guard: Option<DropGuard>,
}

impl Stream for Events {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.guard.is_none() {
            return Poll::Ready(None);
        }
        let event = match self.reader.poll_recv(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(event)) => event,
            Poll::Ready(None) => {
                // Only a panic ends the task without a last event.
                Err(Error::backend("the steps stopped before the answer ended")).with_operation("generate")
            }
        };
        if matches!(event, Err(_) | Ok(Event::Done(_))) {
            // Nothing is left to be cancelled.
            self.guard.take().map(DropGuard::disarm);
        }
        Poll::Ready(Some(event))
    }
}
