//! The work that the engine's thread does for one request, from its first prompt chunk to its last event.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use ternion_core::{Error, Result, Score, Usage};

use crate::{
    LogitsPrecision, LogitsWanted,
    engine::Admission,
    generation::Generation,
    kv::KvPrefix,
    prompt_cache::Restored,
    scoring::{Rows, Scoring},
};

/// One request on the engine's thread.
pub(crate) struct Job {
    /// All tokens to feed: the prompt, then what is generated. For scores all but the last, which nothing follows.
    pub(crate) tokens: Vec<u32>,
    pub(crate) work: Work,
    cancel: CancellationToken,
    pub(crate) accepted: Instant,
    /// Whether it has had a sequence.
    started: bool,
    /// Prompt tokens that did not have to be computed.
    cached: usize,
    /// Prompt tokens that have been in the KV cache.
    reached: usize,
    /// A step with several sequences, of which this was one, has panicked. Its steps are computed alone from then on.
    pub(crate) alone: bool,
    /// What the prompt cache has of the job's first tokens, until it has a sequence.
    pub(crate) restored: Option<Restored>,
    /// Who wants the keys and values of its tokens, at its end.
    pub(crate) prefix: Option<oneshot::Sender<Result<KvPrefix>>>,
    /// The last token and the draft after it, if the next step verifies one.
    feed: Vec<u32>,
    pub(crate) admission: Admission,
}

/// What the jobs need to know of the model.
pub(crate) struct ModelFacts {
    pub(crate) vocab_size: usize,
    pub(crate) context_length: usize,
    /// The tokens that end an answer.
    pub(crate) eos: Vec<u32>,
}

/// How a job ended.
pub(crate) enum End {
    Finished,
    Cancelled,
    Failed(Error),
}

impl End {
    /// For jobs whose result is one value: there is none of a cancelled one.
    fn into_result(self) -> Result<()> {
        match self {
            Self::Finished => Ok(()),
            Self::Cancelled => Err(Error::cancelled()),
            Self::Failed(error) => Err(error),
        }
    }
}

/// What is wanted of the sequence.
pub(crate) enum Work {
    Generate(Box<Generation>),
    Score(Scoring),
    Logits(Rows),
}

impl Job {
    pub(crate) fn new(
        tokens: Vec<u32>,
        work: Work,
        cancel: CancellationToken,
        admission: Admission,
        accepted: Instant,
    ) -> Self {
        Self {
            tokens,
            work,
            cancel,
            accepted,
            started: false,
            cached: 0,
            reached: 0,
            alone: false,
            restored: None,
            prefix: None,
            feed: Vec::new(),
            admission,
        }
    }

    /// The job has a sequence with its first `cached` tokens, for the first time or again.
    pub(crate) fn start(&mut self, cached: usize, model: &ModelFacts) -> Result<()> {
        if std::mem::replace(&mut self.started, true) {
            return Ok(());
        }
        (self.cached, self.reached) = (cached, cached);
        match &mut self.work {
            Work::Logits(rows) => rows.reserve(self.tokens.len(), model.vocab_size),
            Work::Generate(_) | Work::Score(_) => Ok(()),
        }
    }

    /// The first position whose logits are wanted and not there yet; what lies before it may come from a kept prefix.
    pub(crate) fn first_wanted(&self) -> usize {
        match &self.work {
            Work::Generate(_) => self.tokens.len() - 1,
            Work::Score(scoring) => scoring.next_row(),
            Work::Logits(rows) => rows.next_row,
        }
    }

    /// Whether nobody wants the result any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        match &self.work {
            Work::Generate(g) => g.is_abandoned(),
            Work::Score(s) => s.result.is_closed(),
            Work::Logits(r) => r.result.is_closed(),
        }
    }

    /// Tokens of the draft that the last step accepted into the answer.
    pub(crate) fn accepted_draft(&self) -> usize {
        match &self.work {
            Work::Generate(g) => g.accepted_draft,
            Work::Score(_) | Work::Logits(_) => 0,
        }
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// Whether a step's events can be delivered; if not, the reader has to read first.
    pub(crate) fn has_room(&mut self) -> bool {
        match &mut self.work {
            Work::Generate(g) => g.reserve(),
            Work::Score(_) | Work::Logits(_) => true,
        }
    }

    /// How long its reader has read nothing while there was no room for another event.
    pub(crate) fn stalled_for(&self) -> Option<Duration> {
        match &self.work {
            Work::Generate(g) => g.stalled_since().map(|since| since.elapsed()),
            Work::Score(_) | Work::Logits(_) => None,
        }
    }

    /// Whether the reader of a job without a sequence has read so much that it may go on.
    pub(crate) fn is_read(&mut self) -> bool {
        match &mut self.work {
            Work::Generate(g) => g.is_read(),
            Work::Score(_) | Work::Logits(_) => true,
        }
    }

    /// The next tokens to feed when `length` are in the KV cache, at most `budget`, and the logits that they need, at most
    /// `max_rows`. No tokens if even one would need too many.
    pub(crate) fn next_input(&self, length: usize, budget: usize, max_rows: usize) -> (&[u32], LogitsWanted) {
        let wanted = self.first_wanted();
        let mut end = self.tokens.len().min(length.saturating_add(budget));
        if matches!(self.work, Work::Generate(_)) {
            if !self.feed.is_empty() {
                return (&self.feed, LogitsWanted::From(0));
            }
            let last = end == self.tokens.len();
            return (&self.tokens[length..end], if last { LogitsWanted::Last } else { LogitsWanted::None });
        }
        // Each row of logits is vocab_size floats, so a chunk asks for a bounded number of them.
        end = end.min(length.max(wanted).saturating_add(max_rows));
        let logits =
            if end > wanted { LogitsWanted::From(wanted.saturating_sub(length)) } else { LogitsWanted::None };
        (&self.tokens[length..end], logits)
    }

    /// The draft that the next step may verify, at most `room` tokens: how many tokens there are of it, and how probable they are.
    pub(crate) fn draft(&self, room: usize) -> Option<(usize, (f64, f64))> {
        let Work::Generate(g) = &self.work else { return None };
        g.draft(room).map(|(draft, confidence)| (draft.len(), confidence))
    }

    /// Lets the next step verify `length` tokens of the draft after the last token.
    pub(crate) fn set_draft(&mut self, length: usize) {
        self.feed.clear();
        let Work::Generate(g) = &self.work else { return };
        if let (Some((draft, _)), Some(&last)) = (g.draft(length), self.tokens.last()) {
            self.feed.push(last);
            self.feed.extend_from_slice(draft);
        }
    }

    /// Lets the next step verify nothing.
    pub(crate) fn clear_draft(&mut self) {
        self.feed.clear();
    }

    /// The draft that the next step verifies, or the last step has.
    pub(crate) fn drafted(&self) -> &[u32] {
        self.feed.get(1..).unwrap_or_default()
    }

    /// How exact the logits of its next step must be.
    pub(crate) fn precision(&self) -> LogitsPrecision {
        match &self.work {
            Work::Generate(g) => g.precision(),
            Work::Score(_) | Work::Logits(_) => LogitsPrecision::Exact,
        }
    }

    /// The tokens at the beginning of the KV cache that are still those of the job, once after the window has moved.
    pub(crate) fn take_rewind(&mut self) -> Option<usize> {
        match &mut self.work {
            Work::Generate(g) => g.window.as_mut()?.take_rewind(),
            Work::Score(_) | Work::Logits(_) => None,
        }
    }

    /// Takes the logits of a step of this `time`, after which `length` of the job's tokens are in the KV cache, and after them the
    /// draft. `true` when the job is finished.
    pub(crate) fn advance(
        &mut self,
        length: usize,
        logits: &mut [f32],
        model: &ModelFacts,
        time: Duration,
    ) -> Result<bool> {
        let total = self.tokens.len();
        let is_news = length > self.reached;
        self.reached = self.reached.max(length.min(self.prompt_tokens()));
        match &mut self.work {
            Work::Generate(g) => {
                g.count_prefill(time);
                if length == total {
                    let draft = self.feed.get(1..).unwrap_or_default();
                    return g.step(&mut self.tokens, draft, logits, model);
                }
                // Reports no progress for tokens that are computed again.
                if g.generated == 0 && is_news {
                    g.report_prefill(length, total);
                }
                return Ok(false);
            }
            Work::Score(s) => s.take(&self.tokens, logits, model.vocab_size)?,
            Work::Logits(r) => r.take(logits, model.vocab_size),
        }
        Ok(length == total)
    }

    /// Ends the job: delivers its result, its error, or that it was cancelled.
    pub(crate) fn finish(self, end: End) {
        let usage = self.usage();
        // The place is free before the reader knows of the end, so that its next request is not refused.
        drop(self.admission);
        match self.work {
            Work::Generate(g) => g.finish(end, usage, self.accepted),
            Work::Score(s) => {
                // The send fails only if the reader is gone.
                let _ = s.result.send(end.into_result().map(|()| Score::new(s.scores)));
            }
            Work::Logits(r) => {
                let _ = r.result.send(end.into_result().map(|()| r.rows));
            }
        }
    }

    /// Prompt tokens that were computed, without what had to be computed again.
    pub(crate) fn computed_prompt(&self) -> usize {
        self.reached - self.cached
    }

    fn prompt_tokens(&self) -> usize {
        match &self.work {
            Work::Generate(g) => g.prompt_tokens,
            Work::Score(_) | Work::Logits(_) => self.tokens.len(),
        }
    }

    /// Prompt tokens that were fed in steps as large as they may be: a step that gives many rows of logits is shorter.
    pub(crate) fn plain_prompt(&self) -> usize {
        match &self.work {
            Work::Generate(g) => g.prompt_tokens,
            Work::Logits(_) if self.prefix.is_some() => self.tokens.len(),
            Work::Score(_) | Work::Logits(_) => 0,
        }
    }

    /// What the job has used so far.
    pub(crate) fn usage(&self) -> Usage {
        let usage = match &self.work {
            Work::Generate(g) => Usage::new(g.prompt_tokens, g.generated)
                .with_forced_tokens(g.forced_tokens)
                .with_drafts(g.drafted_tokens, g.accepted_tokens),
            Work::Score(_) | Work::Logits(_) => Usage::new(self.tokens.len(), 0),
        };
        usage.with_cached_tokens(self.cached)
    }
}
