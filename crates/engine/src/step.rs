//! One step: which sequences it feeds, the call of the model, and what becomes of the logits.

use std::time::{Duration, Instant};

use ternion_core::{Error, ErrorKind, Result, catch_panic};

use crate::{
    CausalLm, SequenceInput,
    draft::{MAX_DRAFT, worthwhile},
    job::End,
    shares::{Waiting, divide},
    worker::{Active, Worker},
};

/// What a step has fed to an active job.
struct Fed {
    index: usize,
    tokens: usize,
    /// Rows of logits.
    rows: usize,
}

impl Fed {
    /// Whether it is the next token of an answer, and nothing of a prompt.
    fn decodes(&self, active: &Active) -> bool {
        self.tokens == 1 + active.job.drafted().len()
    }
}

/// The outcome of a call of the model, with the time that it took.
type Forwarded = Result<(Vec<Fed>, Duration)>;

impl Worker {
    /// Computes one step for the jobs that can go on; `false` if there are none.
    pub(crate) fn step(&mut self) -> bool {
        let plan = self.plan();
        if plan.is_empty() {
            return false;
        }
        self.steps = self.steps.wrapping_add(1);
        let mut finished = match self.forward(&plan) {
            Ok(fed) => self.hand_out(&fed),
            Err(error) if !self.are_intact(&plan) => {
                if let [(i, _)] = plan[..] {
                    vec![(i, End::Failed(error))]
                } else {
                    self.begin_again(plan.into_iter().map(|(i, _)| i).collect());
                    Vec::new()
                }
            }
            // One sequence's failure must not end the others: find it by running each alone.
            Err(_) => plan.into_iter().flat_map(|share| self.step_alone(share)).collect(),
        };
        // From the back, so that the indices before stay valid.
        finished.sort_by_key(|(i, _)| std::cmp::Reverse(*i));
        for (i, end) in finished {
            self.end(i, end);
        }
        true
    }

    /// The jobs of the next step with the most tokens that each may feed: one token of all that are decoding, and what is
    /// left of the step divided among the prompts.
    fn plan(&mut self) -> Vec<(usize, usize)> {
        let budget = self.model.max_batch_tokens();
        let (mut decoding, mut prompts, mut alone) = (Vec::new(), Vec::new(), Vec::new());
        for (index, active) in self.active.iter_mut().enumerate() {
            if !active.job.has_room() {
                continue;
            }
            let remaining = active.remaining();
            if active.job.alone {
                alone.push((index, budget));
            } else if remaining == 1 {
                decoding.push((index, 1));
            } else {
                prompts.push(Waiting { index, remaining, accepted: active.job.accepted });
            }
        }
        let together = usize::from(!(decoding.is_empty() && prompts.is_empty()));
        if !alone.is_empty() {
            // Takes turns with the others.
            let turn = self.steps % (alone.len() + together);
            if let Some(share) = alone.get(turn) {
                return vec![*share];
            }
        }
        let fed = self.plan_drafts(&mut decoding, budget);
        // At least one token, so that prompts go on beside as many decoding sequences as a step has tokens.
        let left = budget.saturating_sub(fed).max(1);
        decoding.extend(divide(prompts, left, self.steps));
        decoding
    }

    /// Adds drafts to the shares of jobs that decode, as long as they promise more tokens per second. Returns the tokens that the
    /// step has then.
    fn plan_drafts(&mut self, decoding: &mut [(usize, usize)], budget: usize) -> usize {
        let cost = self.step_cost.line();
        let mut rows = self.max_rows.min(budget).saturating_sub(decoding.len());
        let (mut tokens, mut gain) = (decoding.len() as f64, decoding.len() as f64);
        let mut fed = decoding.len();
        for (index, share) in decoding {
            let active = &mut self.active[*index];
            let room = self.facts.context_length.saturating_sub(active.length + 1).min(rows).min(MAX_DRAFT);
            let length = active.job.draft(room).map_or(0, |(length, confidence)| {
                worthwhile(confidence, length, cost, &mut tokens, &mut gain)
            });
            active.job.set_draft(length);
            let length = active.job.drafted().len();
            (*share, rows, fed) = (1 + length, rows - length, fed + length);
        }
        fed
    }

    /// Whether the model holds of these jobs what it held before a step that failed.
    fn are_intact(&self, plan: &[(usize, usize)]) -> bool {
        let mut active = plan.iter().map(|&(i, _)| &self.active[i]);
        !self.model.has_panicked() && active.all(|active| self.model.len(active.sequence) == active.length)
    }

    /// A step for one job, after making all the room that idle sequences take.
    fn step_alone(&mut self, share: (usize, usize)) -> Vec<(usize, End)> {
        // It may be the draft for which there is no room.
        self.active[share.0].job.clear_draft();
        let mut outcome = self.forward(&[share]);
        while matches!(&outcome, Err(e) if e.kind() == ErrorKind::ResourceExhausted)
            && self.are_intact(&[share])
            && self.slots.evict(&mut self.model)
        {
            outcome = self.forward(&[share]);
        }
        match outcome {
            Ok(fed) => self.hand_out(&fed),
            Err(error) => vec![(share.0, End::Failed(error))],
        }
    }

    /// Feeds the next tokens of these jobs, of each at most as many as its share.
    fn forward(&mut self, plan: &[(usize, usize)]) -> Forwarded {
        let mut rows = self.max_rows;
        let mut batch = Vec::with_capacity(plan.len());
        let mut fed = Vec::with_capacity(plan.len());
        for &(index, share) in plan {
            let active = &self.active[index];
            let (tokens, logits) = active.job.next_input(active.length, share, rows);
            if tokens.is_empty() {
                // The other jobs take all rows of this step. The first job always gets at least one.
                continue;
            }
            let input =
                SequenceInput::new(active.sequence, tokens, logits).with_precision(active.job.precision());
            if share > 1 {
                rows = rows.saturating_sub(input.rows());
            }
            fed.push(Fed { index, tokens: tokens.len(), rows: input.rows() });
            batch.push(input);
        }
        self.logits.clear();
        let start = Instant::now();
        self.model.forward(&batch, &mut self.logits)?;
        let time = start.elapsed();
        if fed.iter().all(|f| f.decodes(&self.active[f.index])) {
            self.step_cost.observe(fed.iter().map(|f| f.tokens).sum(), time);
        }
        let expected = fed.iter().map(|f| f.rows).sum::<usize>() * self.facts.vocab_size;
        if self.logits.len() == expected {
            Ok((fed, time))
        } else {
            let found = self.logits.len();
            Err(Error::backend(format!("the model returned {found} logits; {expected} expected")))
        }
    }

    /// Gives each job its rows. Returns the jobs that ended.
    fn hand_out(&mut self, (fed, time): &(Vec<Fed>, Duration)) -> Vec<(usize, End)> {
        let mut ended = Vec::new();
        let mut rest = &mut self.logits[..];
        for &Fed { index, tokens, rows } in fed {
            let active = &mut self.active[index];
            let start = active.length;
            let drafted = active.job.drafted().len();
            active.length += tokens - drafted;
            self.slots.appended(active.sequence, &active.job.tokens[start..active.length]);
            let (own, others) = std::mem::take(&mut rest).split_at_mut(rows * self.facts.vocab_size);
            rest = others;
            let advanced = catch_panic(|| active.job.advance(active.length, own, &self.facts, *time))
                .unwrap_or_else(|panic| {
                    Err(Error::backend(format!("the choice of a token panicked: {panic}")))
                })
                .and_then(|finished| {
                    if drafted > 0 {
                        let accepted = active.job.accepted_draft();
                        self.slots.appended(active.sequence, &active.job.drafted()[..accepted]);
                        active.length += accepted;
                        active.job.clear_draft();
                        if accepted < drafted {
                            (active.sequence, active.length) =
                                self.slots.rewind(&mut self.model, active.sequence, active.length)?;
                        }
                    }
                    if let Some(kept) = active.job.take_rewind() {
                        (active.sequence, active.length) =
                            self.slots.rewind(&mut self.model, active.sequence, kept)?;
                    }
                    Ok(finished)
                });
            match advanced {
                Ok(false) => {}
                Ok(true) => ended.push((index, End::Finished)),
                Err(error) => ended.push((index, End::Failed(error))),
            }
        }
        ended
    }
}
