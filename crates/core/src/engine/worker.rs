//! The engine's thread: admits jobs, builds batches, runs the model and hands out the logits.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering, mpsc},
    time::Duration,
};

use super::{
    Command, Shared,
    job::{End, Job, ModelFacts},
    slots::Slots,
};
use crate::{CausalLm, Error, ErrorKind, Result, SequenceId, SequenceInput};

/// Bytes of logits that one chunk of a scoring may ask for, where nothing else is said.
const LOGITS_BYTES: usize = 32 << 20;

/// How often jobs that wait for their reader are looked at, to see that they were cancelled by their token.
const STALLED_POLL: Duration = Duration::from_millis(20);

pub(super) struct Worker {
    model: Box<dyn CausalLm>,
    facts: ModelFacts,
    inbox: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
    slots: Slots,
    queue: VecDeque<Box<Job>>,
    active: Vec<Active>,
    logits: Vec<f32>,
    /// Rows of logits that one chunk of a scoring may ask for.
    max_rows: usize,
}

/// A job with its sequence.
struct Active {
    job: Box<Job>,
    sequence: SequenceId,
    /// Tokens in the KV cache.
    length: usize,
}

impl Active {
    fn remaining(&self) -> usize {
        self.job.tokens.len() - self.length
    }
}

impl Worker {
    pub(super) fn new(
        model: Box<dyn CausalLm>,
        inbox: mpsc::Receiver<Command>,
        shared: Arc<Shared>,
        eos: Vec<u32>,
        logits_bytes: Option<u64>,
    ) -> Self {
        let facts =
            ModelFacts { vocab_size: model.vocab_size(), context_length: model.context_length(), eos };
        let bytes = logits_bytes.map_or(LOGITS_BYTES, |bytes| LOGITS_BYTES.min(bytes as usize));
        let max_rows = (bytes / 4 / facts.vocab_size.max(1)).max(1);
        Self {
            model,
            facts,
            inbox,
            shared,
            slots: Slots::default(),
            queue: VecDeque::new(),
            active: Vec::new(),
            logits: Vec::new(),
            max_rows,
        }
    }

    /// Works until the engine and all streams are gone.
    pub(super) fn run(mut self) {
        let mut connected = true;
        let mut ready = Vec::new();
        while connected || !self.queue.is_empty() || !self.active.is_empty() {
            connected = self.receive(!ready.is_empty());
            self.sweep();
            self.admit();
            ready = self.ready();
            if !ready.is_empty() {
                self.step(&ready);
            }
        }
    }

    /// Takes what is in the inbox; waits for something only if there is nothing to do. `false` if nothing can come.
    fn receive(&mut self, working: bool) -> bool {
        if !working {
            let command = if self.active.is_empty() && self.queue.is_empty() {
                self.inbox.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected)
            } else {
                self.inbox.recv_timeout(STALLED_POLL)
            };
            match command {
                Ok(command) => self.take(command),
                Err(mpsc::RecvTimeoutError::Timeout) => return true,
                Err(mpsc::RecvTimeoutError::Disconnected) => return false,
            }
        }
        loop {
            match self.inbox.try_recv() {
                Ok(command) => self.take(command),
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit(job) => self.queue.push_back(job),
            Command::Wake => {}
        }
    }

    /// Ends the jobs that nobody wants any more.
    fn sweep(&mut self) {
        let mut i = 0;
        while i < self.queue.len() {
            let job = &self.queue[i];
            if (job.is_abandoned() || job.is_cancelled())
                && let Some(job) = self.queue.remove(i)
            {
                job.finish(End::Cancelled);
            } else {
                i += 1;
            }
        }
        for i in (0..self.active.len()).rev() {
            let job = &self.active[i].job;
            if job.is_abandoned() || job.is_cancelled() {
                self.end(i, End::Cancelled);
            }
        }
    }

    /// Gives waiting jobs a sequence, first come first served.
    fn admit(&mut self) {
        while self.active.len() < self.model.max_sequences()
            && let Some(mut job) = self.queue.pop_front()
        {
            match self.slots.acquire(&mut *self.model, &job.tokens, job.first_wanted()) {
                Ok((sequence, cached)) => match job.start(cached, &self.facts) {
                    Ok(()) => self.active.push(Active { job, sequence, length: cached }),
                    Err(error) => {
                        self.slots.release(sequence);
                        job.finish(End::Failed(error));
                    }
                },
                Err(error) => {
                    job.finish(End::Failed(error));
                }
            }
        }
        self.shared.active.store(self.active.len(), Ordering::Release);
    }

    /// The jobs that can go on, by index: all that are decoding, and the first that has a prompt to compute.
    fn ready(&mut self) -> Vec<usize> {
        // Readers look at this flag after they have made room, so it is set before the room is looked for.
        self.shared.stalled.store(1, Ordering::SeqCst);
        let mut ready = Vec::new();
        let mut stalled = 0;
        let mut prompt = None;
        for (i, active) in self.active.iter_mut().enumerate() {
            if !active.job.has_room() {
                stalled += 1;
            } else if active.remaining() == 1 {
                ready.push(i);
            } else if prompt.is_none() {
                prompt = Some(i);
            }
        }
        self.shared.stalled.store(stalled, Ordering::SeqCst);
        ready.extend(prompt); // last, so that it can fill what is left of the batch
        ready
    }

    /// One call of the model for these jobs.
    fn step(&mut self, ready: &[usize]) {
        let mut finished = match self.forward(ready) {
            Ok(fed) => self.hand_out(&fed),
            // One sequence's failure must not end the others: find it by running each alone.
            Err(_) => ready.iter().flat_map(|&i| self.step_alone(i)).collect(),
        };
        // From the back, so that the indices before stay valid.
        finished.sort_by_key(|(i, _)| std::cmp::Reverse(*i));
        for (i, end) in finished {
            self.end(i, end);
        }
    }

    /// A step for one job, after making all the room that idle sequences take.
    fn step_alone(&mut self, i: usize) -> Vec<(usize, End)> {
        let mut outcome = self.forward(&[i]);
        while matches!(&outcome, Err(e) if e.kind() == ErrorKind::ResourceExhausted)
            && self.slots.evict(&mut *self.model)
        {
            outcome = self.forward(&[i]);
        }
        match outcome {
            Ok(fed) => self.hand_out(&fed),
            Err(error) => vec![(i, End::Failed(error))],
        }
    }

    /// Feeds the next tokens of these jobs. Returns for each its index, how many tokens and how many rows of logits.
    fn forward(&mut self, ready: &[usize]) -> Result<Vec<(usize, usize, usize)>> {
        let mut budget = self.model.max_batch_tokens().max(ready.len());
        let mut batch = Vec::with_capacity(ready.len());
        let mut fed = Vec::with_capacity(ready.len());
        for (n, &i) in ready.iter().enumerate() {
            let active = &self.active[i];
            let left_for_this = budget - (ready.len() - n - 1);
            let (tokens, logits) = active.job.next_input(active.length, left_for_this, self.max_rows);
            let input = SequenceInput { sequence: active.sequence, tokens, logits };
            budget -= tokens.len();
            fed.push((i, tokens.len(), input.rows()));
            batch.push(input);
        }
        self.logits.clear();
        self.model.forward(&batch, &mut self.logits)?;
        let expected = fed.iter().map(|f| f.2).sum::<usize>() * self.facts.vocab_size;
        if self.logits.len() == expected {
            Ok(fed)
        } else {
            let found = self.logits.len();
            Err(Error::backend(format!("the model returned {found} logits; {expected} expected")))
        }
    }

    /// Gives each job its rows. Returns the jobs that ended.
    fn hand_out(&mut self, fed: &[(usize, usize, usize)]) -> Vec<(usize, End)> {
        let mut ended = Vec::new();
        let mut rest = &mut self.logits[..];
        for &(i, tokens, rows) in fed {
            let active = &mut self.active[i];
            let start = active.length;
            active.length += tokens;
            self.slots.appended(active.sequence, &active.job.tokens[start..active.length]);
            let (own, others) = std::mem::take(&mut rest).split_at_mut(rows * self.facts.vocab_size);
            rest = others;
            let advanced = active.job.advance(active.length, own, &self.facts).and_then(|finished| {
                if let Some(kept) = active.job.take_rewind() {
                    (active.sequence, active.length) =
                        self.slots.rewind(&mut *self.model, active.sequence, kept)?;
                }
                Ok(finished)
            });
            match advanced {
                Ok(false) => {}
                Ok(true) => ended.push((i, End::Finished)),
                Err(error) => ended.push((i, End::Failed(error))),
            }
        }
        ended
    }

    /// Takes the job out and keeps its sequence for later requests.
    fn end(&mut self, i: usize, end: End) {
        let Active { job, sequence, length } = self.active.remove(i);
        self.slots.release(sequence);
        self.shared.active.store(self.active.len(), Ordering::Release);
        // Counted before the reader knows of the end, so that it finds its request in the statistics.
        let usage = job.usage();
        self.shared.prompt_tokens.fetch_add(job.computed_prompt(length) as u64, Ordering::Relaxed);
        self.shared.cached_tokens.fetch_add(usage.cached_tokens as u64, Ordering::Relaxed);
        self.shared.generated_tokens.fetch_add(usage.generated_tokens as u64, Ordering::Relaxed);
        job.finish(end);
    }
}
