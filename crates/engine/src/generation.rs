//! The state of one generation: the room for its events, its sampler, its text and its end.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering, fence},
    },
    time::{Duration, Instant},
};

use tokio::sync::mpsc::{OwnedPermit, Sender};

use ternion_core::{
    DoneEvent, Event, FinishReason, PrefillEvent, Result, ResultExt, ServedBy, Timing, TokenEvent, Usage,
    context::ContextStep,
    logprob::log_sum_exp,
    text::{IncrementalDecoder, StopMatcher},
};

use crate::{
    LogitsPrecision,
    constraint::{EndTokens, Running},
    draft::DraftSource,
    engine::EVENT_CAPACITY,
    events::Message,
    job::{End, ModelFacts},
    sampler::Sampler,
    scoring::{logprob, top_tokens},
    slots::common_prefix,
    thought::ThoughtBudget,
    window::Window,
};

/// The writing end of a stream of events.
pub(crate) struct EventSender {
    pub(crate) messages: Sender<Result<Message>>,
    /// Set while the job waits for its reader, who then wakes the engine's thread.
    pub(crate) waits: Arc<AtomicBool>,
}

/// What a request says about how its answer ends and what is reported of it.
pub(crate) struct Ending {
    pub(crate) max_tokens: usize,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) ignore_eos: bool,
    /// Special tokens whose names are text to the reading end: the tags of thoughts and calls.
    pub(crate) tags: Vec<String>,
    pub(crate) logprobs: bool,
    pub(crate) top_logprobs: usize,
}

/// What decides on the tokens of an answer besides the sampler.
pub(crate) struct Guides {
    pub(crate) constraint: Option<Running>,
    pub(crate) thought: Option<ThoughtBudget>,
    pub(crate) window: Option<Window>,
    pub(crate) drafts: Option<Box<dyn DraftSource>>,
}

pub(crate) struct Generation {
    sender: EventSender,
    /// Room for the next token's event, taken before the token is computed so that it can always be delivered.
    permit: Option<OwnedPermit<Result<Message>>>,
    /// Room for the end.
    last_permit: Option<OwnedPermit<Result<Message>>>,
    decoder: IncrementalDecoder,
    sampler: Sampler,
    stop: StopMatcher,
    ending: Ending,
    constraint: Option<Running>,
    thought: Option<ThoughtBudget>,
    /// Tokens that come next whatever the logits are. All of them are fed in one pass.
    forced: VecDeque<u32>,
    pub(crate) window: Option<Window>,
    drafts: Option<Box<dyn DraftSource>>,
    pub(crate) prompt_tokens: usize,
    pub(crate) generated: usize,
    /// Tokens of the answer that were not sampled.
    pub(crate) forced_tokens: usize,
    /// Tokens that were drafted and verified.
    pub(crate) drafted_tokens: usize,
    /// Those of them that became part of the answer.
    pub(crate) accepted_tokens: usize,
    /// Tokens of the last step's draft that are part of the answer, and in the KV cache.
    pub(crate) accepted_draft: usize,
    /// Time of the steps that computed the prompt.
    prefill: Duration,
    first_token: Option<Instant>,
    /// Since when the reader has not read, if there is no room.
    stalled_since: Option<Instant>,
    /// Events that the reader had room for when this was last looked at.
    room: usize,
    /// Set by the step that ended the generation.
    finish_reason: Option<FinishReason>,
    served_by: ServedBy,
}

impl Generation {
    pub(crate) fn new(
        sender: EventSender,
        decoder: IncrementalDecoder,
        prompt: &[u32],
        mut sampler: Sampler,
        mut ending: Ending,
        Guides { constraint, mut thought, window, drafts }: Guides,
        served_by: ServedBy,
    ) -> Self {
        sampler.observe_prompt(prompt);
        let last_permit = sender.messages.clone().try_reserve_owned().ok();
        Self {
            sender,
            permit: None,
            last_permit,
            decoder,
            sampler,
            stop: StopMatcher::new(std::mem::take(&mut ending.stop)),
            ending,
            constraint,
            forced: thought.as_mut().map(ThoughtBudget::begin).unwrap_or_default().into(),
            thought,
            window,
            drafts,
            prompt_tokens: prompt.len(),
            generated: 0,
            forced_tokens: 0,
            drafted_tokens: 0,
            accepted_tokens: 0,
            accepted_draft: 0,
            prefill: Duration::ZERO,
            first_token: None,
            stalled_since: None,
            room: 0,
            finish_reason: None,
            served_by,
        }
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        self.sender.messages.is_closed()
    }

    /// Takes room for the next event; `false` if the reader has to read first.
    pub(crate) fn reserve(&mut self) -> bool {
        let reserve = |this: &mut Self| {
            if this.permit.is_none() {
                this.permit = this.sender.messages.clone().try_reserve_owned().ok();
            }
            this.permit.is_some()
        };
        if reserve(self) {
            self.sender.waits.store(false, Ordering::Relaxed);
            self.stalled_since = None;
            return true;
        }
        // The reader makes room and then looks at this, so it is set before the second look.
        self.sender.waits.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let found = reserve(self);
        self.note_reading();
        if found {
            self.sender.waits.store(false, Ordering::Relaxed);
            self.stalled_since = None;
        }
        found
    }

    /// Since when the reader has read nothing, if there is no room for another event.
    pub(crate) fn stalled_since(&self) -> Option<Instant> {
        self.stalled_since
    }

    /// Whether the reader has made so much room that it is worth giving the job a sequence again.
    pub(crate) fn is_read(&mut self) -> bool {
        self.note_reading();
        if self.room < EVENT_CAPACITY / 2 {
            return false;
        }
        self.stalled_since = None;
        true
    }

    /// A reader that reads at all begins a new time of waiting.
    fn note_reading(&mut self) {
        let room = self.sender.messages.capacity();
        if self.stalled_since.is_none() || room > self.room {
            self.stalled_since = Some(Instant::now());
        }
        self.room = room;
    }

    /// Counts a step that computed a part of the prompt.
    pub(crate) fn count_prefill(&mut self, time: Duration) {
        if self.generated == 0 {
            self.prefill += time;
        }
    }

    /// Progress is news, not data: a reader that is behind misses it.
    pub(crate) fn report_prefill(&self, done: usize, total: usize) {
        let _ =
            self.sender.messages.try_send(Ok(Message::Event(Event::Prefill(PrefillEvent::new(done, total)))));
    }

    /// The tokens that may come next, at most `room`, with how probable they are. `None` where a draft is of no use.
    pub(crate) fn draft(&self, room: usize) -> Option<(&[u32], (f64, f64))> {
        let drafts = self.drafts.as_ref()?;
        // The last token of an answer is the model's own.
        let room = room.min(self.ending.max_tokens.saturating_sub(self.generated + 1));
        let draft = drafts.propose(room);
        (!draft.is_empty()).then(|| (draft, drafts.confidence()))
    }

    /// How exact logits must be, so that the most probable token is the right one, and a draw is one from the right candidates.
    pub(crate) fn precision(&self) -> LogitsPrecision {
        let restricted = self.constraint.is_some();
        if self.ending.logprobs { LogitsPrecision::Exact } else { self.sampler.precision(restricted) }
    }

    /// Chooses the next token from the logits after `tokens`, then from those after each token of `draft` as long as the draft is
    /// right, and delivers what was chosen. `true` if the answer ends with it.
    ///
    /// `logits` are `[1 + draft, vocab_size]`.
    pub(crate) fn step(
        &mut self,
        tokens: &mut Vec<u32>,
        draft: &[u32],
        logits: &mut [f32],
        model: &ModelFacts,
    ) -> Result<bool> {
        if self.generated == 0 {
            self.report_prefill(self.prompt_tokens, self.prompt_tokens);
        }
        self.drafted_tokens += draft.len();
        self.accepted_draft = 0;
        let start = tokens.len();
        let mut chosen = Vec::new();
        let moved = loop {
            let row = &mut logits[self.accepted_draft * model.vocab_size..][..model.vocab_size];
            let moved = self.choose(tokens, row, model, &mut chosen)?;
            if moved.is_some() {
                break moved;
            }
            let new = &tokens[start..];
            let accepted = common_prefix(new, draft);
            self.accepted_tokens += accepted - self.accepted_draft;
            self.accepted_draft = accepted;
            if self.finish_reason.is_some() || accepted < new.len() {
                break None;
            }
        };
        if let Some(permit) = self.permit.take() {
            permit.send(Ok(Message::Tokens(chosen)));
        }
        if let Some(step) = moved {
            // The report has it as well.
            let _ = self.sender.messages.try_send(Ok(Message::Event(Event::Context(step))));
        }
        Ok(self.finish_reason.is_some())
    }

    /// Chooses the token after `tokens` by its logits, and takes it into the answer with the tokens that must follow it. Returns
    /// how the window has moved, if it has.
    ///
    /// With log-probabilities each token has logits of its own, since its probability needs those at its place.
    fn choose(
        &mut self,
        tokens: &mut Vec<u32>,
        logits: &mut [f32],
        model: &ModelFacts,
        chosen: &mut Vec<(TokenEvent, String)>,
    ) -> Result<Option<ContextStep>> {
        let computed = tokens.len();
        let raw = self.ending.logprobs.then(|| logits.to_vec());
        let mut next = self.next_forced()?;
        if next.is_none() {
            next = Some(self.sample(logits, model)?);
        }
        while let Some(id) = next {
            let mut token = TokenEvent::new(id);
            if let Some(raw) = &raw {
                let normalizer = log_sum_exp(raw);
                token.logprob = Some(logprob(raw[id as usize], normalizer));
                token.top_logprobs = top_tokens(raw, normalizer, self.ending.top_logprobs);
            }
            tokens.push(id);
            chosen.push((token, self.accept(id, model)?));
            if self.finish_reason.is_none() && tokens.len() >= model.context_length {
                let Some(window) = &mut self.window else {
                    self.finish_reason = Some(FinishReason::ContextFull);
                    break;
                };
                return Ok(Some(window.advance(tokens, computed)));
            }
            next = if self.finish_reason.is_none() && raw.is_none() { self.next_forced()? } else { None };
        }
        Ok(None)
    }

    fn sample(&mut self, logits: &mut [f32], model: &ModelFacts) -> Result<u32> {
        let Self { sampler, constraint, ending, .. } = self;
        let ends = EndTokens { eos: &model.eos, stop: &ending.stop_tokens };
        sampler.sample(logits, |logits| constraint.as_mut().map_or(Ok(()), |c| c.restrict(logits, ends)))
    }

    /// The token that comes next without a choice, if there is one.
    fn next_forced(&mut self) -> Result<Option<u32>> {
        if self.forced.is_empty()
            && let Some(constraint) = &mut self.constraint
        {
            self.forced.extend(constraint.forced());
        }
        let Some(id) = self.forced.pop_front() else { return Ok(None) };
        self.sampler.check_allowed(id)?;
        self.forced_tokens += 1;
        Ok(Some(id))
    }

    /// Takes a token into the answer, which may end with it. Returns the text that is certain with it.
    fn accept(&mut self, id: u32, model: &ModelFacts) -> Result<String> {
        self.first_token.get_or_insert_with(Instant::now);
        self.generated += 1;
        self.sampler.count(id);
        if let Some(drafts) = &mut self.drafts {
            drafts.push(id);
        }
        if !self.ending.ignore_eos && model.eos.contains(&id) {
            self.finish_reason = Some(FinishReason::EndOfSequence);
            return Ok(String::new());
        }
        if self.ending.stop_tokens.contains(&id) {
            self.finish_reason = Some(FinishReason::StopToken(id));
            return Ok(String::new());
        }
        let wants_names = self.stop.has_stops() || self.constraint.is_some() || !self.ending.tags.is_empty();
        let name = if wants_names { self.decoder.special_name(id) } else { None };
        let piece = if name.is_some() { String::new() } else { self.decoder.push(id)? };
        let complete = match &mut self.constraint {
            Some(constraint) => constraint.accept(id, name.as_deref().unwrap_or(&piece))?,
            None => false,
        };
        if let Some(budget) = &mut self.thought {
            self.forced.extend(budget.accept(name.as_deref().unwrap_or(&piece)));
        }
        let (text, stop) = match name {
            Some(name) if self.ending.tags.contains(&name) => self.stop.push(&name),
            Some(name) => self.stop.push_hidden(&name),
            None => self.stop.push(&piece),
        };
        self.finish_reason = if let Some(stop) = stop {
            Some(FinishReason::StopString(stop))
        } else if complete {
            Some(FinishReason::EndOfSequence)
        } else if self.generated >= self.ending.max_tokens {
            Some(FinishReason::MaxTokens)
        } else {
            None
        };
        Ok(text)
    }

    /// Delivers the end of a request that was accepted at this time.
    pub(crate) fn finish(mut self, end: End, usage: Usage, accepted: Instant) {
        let ended = Instant::now();
        let first = self.first_token.unwrap_or(ended);
        let queued = (first - accepted).saturating_sub(self.prefill);
        let mut timing = Timing::new(queued, self.prefill.min(first - accepted), ended - first);
        timing.first_token = self.first_token.map(|t| t - accepted);
        let Some(permit) = self.last_permit.take() else { return };
        let report = self.window.take().and_then(|window| window.report(&usage));
        let message = self.closing_text(end).map(|(finish_reason, text)| {
            // What stands before a stop string need not be complete.
            let whole = !matches!(finish_reason, FinishReason::StopString(_));
            let complete = self.constraint.as_mut().map(|constraint| whole && constraint.is_complete());
            let done = DoneEvent::new(finish_reason, usage, timing)
                .with_seed(self.sampler.seed())
                .with_served_by(self.served_by.clone())
                .with_constraint_complete(complete);
            Message::End(text, report, done)
        });
        permit.send(message.with_operation("generate"));
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
