//! The work that the engine's thread does for one request, from its first prompt chunk to its last event.

use std::time::Instant;

use tokio::sync::{
    mpsc::{OwnedPermit, Sender},
    oneshot,
};
use tokio_util::sync::CancellationToken;

use super::{
    Admission,
    sampler::{Sampler, argmax, check_finite, log_softmax_at, log_sum_exp},
    stop::StopMatcher,
    window::Window,
};
use crate::{
    Error, ErrorKind, Event, FinishReason, LogitsWanted, Result, ResultExt, Score, ServedBy, Timing,
    TokenScore, Usage, text::IncrementalDecoder,
};

/// One request on the engine's thread.
pub(super) struct Job {
    /// All tokens to feed: the prompt, then what is generated. For scores all but the last, which nothing follows.
    pub(super) tokens: Vec<u32>,
    pub(super) work: Work,
    cancel: CancellationToken,
    accepted: Instant,
    /// `None` while it waits for a sequence.
    started: Option<Instant>,
    /// Prompt tokens that did not have to be computed.
    cached: usize,
    pub(super) admission: Admission,
}

/// What the jobs need to know of the model.
pub(super) struct ModelFacts {
    pub(super) vocab_size: usize,
    pub(super) context_length: usize,
    /// The tokens that end an answer.
    pub(super) eos: Vec<u32>,
}

/// How a job ended.
pub(super) enum End {
    Finished,
    Cancelled,
    Failed(Error),
}

impl End {
    /// For jobs whose result is one value: there is none of a cancelled one.
    fn into_result(self) -> Result<()> {
        match self {
            Self::Finished => Ok(()),
            Self::Cancelled => Err(Error::new(ErrorKind::Cancelled, "the request was cancelled")),
            Self::Failed(error) => Err(error),
        }
    }
}

/// What is wanted of the sequence.
pub(super) enum Work {
    Generate(Box<Generation>),
    Score(Scoring),
    Logits(Rows),
}

impl Job {
    pub(super) fn new(
        tokens: Vec<u32>,
        work: Work,
        cancel: CancellationToken,
        admission: Admission,
        accepted: Instant,
    ) -> Self {
        Self { tokens, work, cancel, accepted, started: None, cached: 0, admission }
    }

    /// Work begins, with the first `cached` tokens in the KV cache already.
    pub(super) fn start(&mut self, cached: usize, model: &ModelFacts) -> Result<()> {
        self.started = Some(Instant::now());
        self.cached = cached;
        match &mut self.work {
            Work::Logits(rows) => rows.reserve(self.tokens.len(), model.vocab_size),
            Work::Generate(_) | Work::Score(_) => Ok(()),
        }
    }

    /// The first position whose logits are wanted; what lies before it may come from a kept prefix.
    pub(super) fn first_wanted(&self) -> usize {
        match &self.work {
            Work::Generate(_) => self.tokens.len() - 1,
            Work::Score(scoring) => scoring.start - 1,
            Work::Logits(rows) => rows.start,
        }
    }

    /// Whether nobody wants the result any more.
    pub(super) fn is_abandoned(&self) -> bool {
        match &self.work {
            Work::Generate(g) => g.events.is_closed(),
            Work::Score(s) => s.result.is_closed(),
            Work::Logits(r) => r.result.is_closed(),
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// Whether a step's events can be delivered; if not, the reader has to read first.
    pub(super) fn has_room(&mut self) -> bool {
        match &mut self.work {
            Work::Generate(g) => g.reserve(),
            Work::Score(_) | Work::Logits(_) => true,
        }
    }

    /// The next tokens to feed when `length` are in the KV cache, at most `budget`, and the logits that they need.
    pub(super) fn next_input(&self, length: usize, budget: usize, max_rows: usize) -> (&[u32], LogitsWanted) {
        let wanted = self.first_wanted();
        let mut end = self.tokens.len().min(length.saturating_add(budget));
        if matches!(self.work, Work::Generate(_)) {
            let last = end == self.tokens.len();
            return (&self.tokens[length..end], if last { LogitsWanted::Last } else { LogitsWanted::None });
        }
        // Each row of logits is vocab_size floats, so a chunk asks for a bounded number of them.
        end = end.min(length.max(wanted).saturating_add(max_rows));
        let logits =
            if end > wanted { LogitsWanted::From(wanted.saturating_sub(length)) } else { LogitsWanted::None };
        (&self.tokens[length..end], logits)
    }

    /// The tokens at the beginning of the KV cache that are still those of the job, once after the window has moved.
    pub(super) fn take_rewind(&mut self) -> Option<usize> {
        match &mut self.work {
            Work::Generate(g) => g.window.as_mut()?.take_rewind(),
            Work::Score(_) | Work::Logits(_) => None,
        }
    }

    /// Takes the logits of a step after which `length` tokens are in the KV cache. `true` when the job is finished.
    pub(super) fn advance(&mut self, length: usize, logits: &mut [f32], model: &ModelFacts) -> Result<bool> {
        let total = self.tokens.len();
        match &mut self.work {
            Work::Generate(g) if length < total => {
                // Later it is the window that is computed anew.
                if g.generated == 0 {
                    g.report_prefill(length, total);
                }
                return Ok(false);
            }
            Work::Generate(g) => return g.step(&mut self.tokens, logits, model),
            Work::Score(s) => s.take(&self.tokens, logits, model.vocab_size)?,
            Work::Logits(r) => r.rows.extend_from_slice(logits),
        }
        Ok(length == total)
    }

    /// Ends the job: delivers its result, its error, or that it was cancelled.
    pub(super) fn finish(self, end: End) {
        let usage = self.usage();
        // The place is free before the reader knows of the end, so that its next request is not refused.
        drop(self.admission);
        match self.work {
            Work::Generate(mut g) => {
                let ended = Instant::now();
                let started = self.started.unwrap_or(ended);
                let first = g.first_token.unwrap_or(ended);
                let timing = Timing {
                    queued: started - self.accepted,
                    prefill: first - started,
                    decode: ended - first,
                    first_token: g.first_token.map(|t| t - self.accepted),
                };
                g.deliver_end(end, usage, timing);
            }
            Work::Score(s) => {
                // A reader that has gone away needs no result.
                let _ = s.result.send(end.into_result().map(|()| Score::new(s.scores)));
            }
            Work::Logits(r) => {
                let _ = r.result.send(end.into_result().map(|()| r.rows));
            }
        }
    }

    /// Prompt tokens that were computed when `length` tokens are in the KV cache.
    pub(super) fn computed_prompt(&self, length: usize) -> usize {
        let computed = match &self.work {
            // The window may have moved since.
            Work::Generate(g) if g.generated > 0 => g.prompt_tokens,
            _ => self.prompt_tokens().min(length),
        };
        computed.saturating_sub(self.cached)
    }

    fn prompt_tokens(&self) -> usize {
        match &self.work {
            Work::Generate(g) => g.prompt_tokens,
            Work::Score(_) | Work::Logits(_) => self.tokens.len(),
        }
    }

    /// What the job has used so far.
    pub(super) fn usage(&self) -> Usage {
        let generated_tokens = match &self.work {
            Work::Generate(g) => g.generated,
            Work::Score(_) | Work::Logits(_) => 0,
        };
        Usage { prompt_tokens: self.prompt_tokens(), cached_tokens: self.cached, generated_tokens }
    }
}

/// The state of one generation.
pub(super) struct Generation {
    events: Sender<Result<Event>>,
    /// Room for the next token's event, taken before the token is computed so that it can always be delivered.
    permit: Option<OwnedPermit<Result<Event>>>,
    /// Room for the report of the window.
    report_permit: Option<OwnedPermit<Result<Event>>>,
    /// Room for the end.
    last_permit: Option<OwnedPermit<Result<Event>>>,
    decoder: IncrementalDecoder,
    sampler: Sampler,
    stop: StopMatcher,
    max_tokens: usize,
    ignore_eos: bool,
    logprobs: bool,
    window: Option<Window>,
    prompt_tokens: usize,
    generated: usize,
    first_token: Option<Instant>,
    /// Set by the step that ended the generation.
    finish_reason: Option<FinishReason>,
    served_by: ServedBy,
}

impl Generation {
    #[expect(clippy::too_many_arguments, reason = "called once, with the fields of a request")]
    pub(super) fn new(
        events: Sender<Result<Event>>,
        decoder: IncrementalDecoder,
        prompt: &[u32],
        mut sampler: Sampler,
        max_tokens: usize,
        stop: Vec<String>,
        ignore_eos: bool,
        logprobs: bool,
        window: Option<Window>,
        served_by: ServedBy,
    ) -> Self {
        sampler.observe_prompt(prompt);
        let reserve = || events.clone().try_reserve_owned().ok();
        let (last_permit, report_permit) = (reserve(), window.as_ref().and_then(|_| reserve()));
        Self {
            events,
            permit: None,
            report_permit,
            last_permit,
            decoder,
            sampler,
            stop: StopMatcher::new(stop),
            max_tokens,
            ignore_eos,
            logprobs,
            window,
            prompt_tokens: prompt.len(),
            generated: 0,
            first_token: None,
            finish_reason: None,
            served_by,
        }
    }

    fn reserve(&mut self) -> bool {
        if self.permit.is_none() {
            self.permit = self.events.clone().try_reserve_owned().ok();
        }
        self.permit.is_some()
    }

    /// Progress is news, not data: a reader that is behind misses it.
    fn report_prefill(&self, done: usize, total: usize) {
        let _ = self.events.try_send(Ok(Event::Prefill { done, total }));
    }

    fn step(&mut self, tokens: &mut Vec<u32>, logits: &mut [f32], model: &ModelFacts) -> Result<bool> {
        if self.generated == 0 {
            self.report_prefill(self.prompt_tokens, self.prompt_tokens);
        }
        let raw = self.logprobs.then(|| logits.to_vec());
        let id = self.sampler.sample(logits)?;
        let logprob = raw.map(|raw| log_softmax_at(&raw, id as usize));
        self.first_token.get_or_insert_with(Instant::now);
        self.generated += 1;
        tokens.push(id);

        let mut text = String::new();
        let mut moved = None;
        if !self.ignore_eos && model.eos.contains(&id) {
            self.finish_reason = Some(FinishReason::EndOfSequence);
        } else {
            let (certain, stop) = self.stop.push(&self.decoder.push(id)?);
            text = certain;
            self.finish_reason = if let Some(stop) = stop {
                Some(FinishReason::StopString(stop))
            } else if self.generated >= self.max_tokens {
                Some(FinishReason::MaxTokens)
            } else if tokens.len() >= model.context_length {
                moved = self.window.as_mut().map(|window| window.advance(tokens));
                if moved.is_some() { None } else { Some(FinishReason::ContextFull) }
            } else {
                None
            };
        }
        if let Some(permit) = self.permit.take() {
            permit.send(Ok(Event::Token { id, text, logprob }));
        }
        if let Some(step) = moved {
            // The report has it as well.
            let _ = self.events.try_send(Ok(Event::Context { step }));
        }
        Ok(self.finish_reason.is_some())
    }

    fn deliver_end(&mut self, end: End, usage: Usage, timing: Timing) {
        let Some(permit) = self.last_permit.take() else { return };
        let report = self.window.take().and_then(|window| window.report(&usage));
        if let (Some(step), Some(permit)) = (report, self.report_permit.take()) {
            permit.send(Ok(Event::Context { step }));
        }
        let event = self.closing_text(end).map(|(finish_reason, text)| {
            let seed = self.sampler.seed();
            let served_by = Some(self.served_by.clone());
            Event::Done { finish_reason, text, usage, timing, seed, served_by }
        });
        permit.send(event.during("generate"));
    }

    /// Why it ended, and the text that was held back.
    fn closing_text(&mut self, end: End) -> Result<(FinishReason, String)> {
        let reason = match end {
            End::Failed(error) => return Err(error),
            End::Cancelled => FinishReason::Cancelled,
            End::Finished => self.finish_reason.take().unwrap_or(FinishReason::Cancelled),
        };
        if matches!(reason, FinishReason::StopString(_)) {
            return Ok((reason, String::new()));
        }
        // The last bytes may complete a stop string after which no token comes. It is cut off here as well, but whoever
        // cancelled is told so.
        match self.stop.push(&self.decoder.finish()?) {
            (text, Some(stop)) if reason != FinishReason::Cancelled => {
                Ok((FinishReason::StopString(stop), text))
            }
            (text, Some(_)) => Ok((reason, text)),
            (text, None) => Ok((reason, text + &self.stop.finish())),
        }
    }
}

/// The state of one scoring.
pub(super) struct Scoring {
    result: oneshot::Sender<Result<Score>>,
    start: usize,
    /// The last token, which is scored but not fed.
    last: u32,
    top: usize,
    scores: Vec<TokenScore>,
}

impl Scoring {
    pub(super) fn new(result: oneshot::Sender<Result<Score>>, start: usize, last: u32, top: usize) -> Self {
        Self { result, start, last, top, scores: Vec::new() }
    }

    /// Scores as many tokens as there are rows; `tokens` are those that are fed.
    fn take(&mut self, tokens: &[u32], logits: &[f32], vocab_size: usize) -> Result<()> {
        for row in logits.chunks_exact(vocab_size) {
            let id = tokens.get(self.start + self.scores.len()).copied().unwrap_or(self.last);
            check_finite(row)?;
            self.scores.push(score_token(row, id, self.top));
        }
        Ok(())
    }
}

fn score_token(row: &[f32], id: u32, top: usize) -> TokenScore {
    let normalizer = log_sum_exp(row);
    let logprob = |logit: f32| (f64::from(logit) - normalizer) as f32;
    let own = row[id as usize];
    let rank = row.iter().enumerate().filter(|&(i, &l)| l > own || (l == own && (i as u32) < id)).count();
    let mut best: Vec<u32> = Vec::new();
    if top == 1 {
        best.extend(argmax(row));
    } else if top > 1 {
        best = (0..row.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
        if top < best.len() {
            best.select_nth_unstable_by(top, by_logit);
            best.truncate(top);
        }
        best.sort_unstable_by(by_logit);
    }
    let top = best.into_iter().map(|i| (i, logprob(row[i as usize]))).collect();
    TokenScore { id, logprob: logprob(own), rank, top }
}

/// The rows of logits that were asked for, as they come.
pub(super) struct Rows {
    result: oneshot::Sender<Result<Vec<f32>>>,
    start: usize,
    rows: Vec<f32>,
}

impl Rows {
    pub(super) fn new(result: oneshot::Sender<Result<Vec<f32>>>, start: usize) -> Self {
        Self { result, start, rows: Vec::new() }
    }

    /// Takes the memory of all rows at once: a vector that grows would abort the process where there is none, and
    /// would hold everything twice on the way.
    fn reserve(&mut self, length: usize, vocab_size: usize) -> Result<()> {
        let count = length - self.start;
        self.rows.try_reserve_exact(count.saturating_mul(vocab_size)).map_err(|e| {
            let message = format!("no memory for {count} rows of {vocab_size} logits; ask for fewer");
            Error::new(ErrorKind::ResourceExhausted, message).with_source(e)
        })
    }
}
