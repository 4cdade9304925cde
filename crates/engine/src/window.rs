//! A window that moves over prompt and answer, so that an answer may go on past the context.
//!
//! When the window is full, the first tokens (the "sinks" of StreamingLLM, arXiv:2309.17453, which models give the attention
//! that has no other place) and the most recent ones are kept, and the keys and values of the recent ones are computed anew
//! at the positions that they have now. Shifting what is in the KV cache would be cheaper, but is not the same: those
//! values were computed with the dropped tokens in sight, and every engine would need to turn its keys by the rotary
//! embedding. This way the model sees exactly what a new request with the kept tokens would show it, on every engine. By
//! default half of the window is kept, so each generated token costs about one more computed token, in batches of a prefill.

use ternion_core::{
    GenerateRequest, Result, Usage,
    context::{ContextPolicy, ContextReport, ContextStep, Dropped},
};

use crate::slots::common_prefix;

pub(crate) struct Window {
    /// Tokens at the beginning that are kept.
    sinks: usize,
    /// Tokens at the end that are kept.
    recent: usize,
    context: usize,
    /// Tokens in the KV cache that stay, after a move that the model does not know of yet.
    rewind: Option<usize>,
    report: ContextReport,
}

impl Window {
    /// The window that a request asks for; its policy is taken out, for this is all that an engine knows to do.
    ///
    /// # Errors
    /// If what is kept leaves no room.
    pub(crate) fn of(request: &mut GenerateRequest, context: usize) -> Result<Option<Self>> {
        let Some(ContextPolicy::Sliding(sliding)) = &request.params.context_policy else { return Ok(None) };
        let (sinks, recent) = sliding.kept(context)?;
        request.params.context_policy = None;
        let report = ContextReport::new("sliding", 0, context - 1);
        Ok(Some(Self { sinks, recent, context, rewind: None, report }))
    }

    /// Drops what the window would have moved past, if the prompt does not fit.
    pub(crate) fn fit_prompt(&mut self, tokens: &mut Vec<u32>) {
        self.report.prompt_tokens = tokens.len();
        if tokens.len() < self.context {
            return;
        }
        let (start, end) = (self.sinks, tokens.len() - self.recent);
        tokens.drain(start..end);
        self.report.dropped.push(Dropped::new(None, start, end, end - start));
    }

    /// Moves over `tokens`, which fill the context. The first `computed` of them are in the KV cache, the others are new.
    pub(crate) fn advance(&mut self, tokens: &mut Vec<u32>, computed: usize) -> ContextStep {
        let before = tokens.clone();
        tokens.drain(self.sinks..before.len() - self.recent);
        // What the model holds of this by chance, as in repeated text, need not be computed again.
        let same = common_prefix(&before, tokens).min(tokens.len() - 1).min(computed);
        self.rewind = Some(same);
        let dropped = before.len() - tokens.len();
        self.report.window_moves += 1;
        self.report.window_dropped_tokens += dropped;
        let new = before.len() - computed;
        self.report.recomputed_tokens += tokens.len().saturating_sub(new + same);
        ContextStep::WindowMoved { dropped, kept: tokens.len() }
    }

    pub(crate) fn take_rewind(&mut self) -> Option<usize> {
        self.rewind.take()
    }

    /// What it did, if it did anything.
    pub(crate) fn report(mut self, usage: &Usage) -> Option<ContextStep> {
        let moved = self.report.window_moves > 0 || !self.report.dropped.is_empty();
        self.report.add(usage);
        moved.then_some(ContextStep::Report(self.report))
    }
}
