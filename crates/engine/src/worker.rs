//! The engine's thread: takes requests, gives them sequences, and ends them. What one step computes is in
//! [`step`](crate::step).

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering, mpsc},
    time::Duration,
};

use ternion_core::{Error, ErrorKind};

use crate::{
    CausalLm, SequenceId,
    draft::StepCost,
    engine::{Command, Shared, stopped},
    guard::Guarded,
    job::{End, Job, ModelFacts},
    kv::BLOCK,
    prompt_cache::{Loaded, PromptCache},
    slots::Slots,
};

/// Bytes of logits that one step may ask for, where nothing else is said.
const LOGITS_BYTES: usize = 32 << 20;

/// How often jobs that wait for their reader are looked at, to see that they were cancelled by their token.
const STALLED_POLL: Duration = Duration::from_millis(20);

/// How long a job waits for its reader before another request gets its sequence. A reader that is only a little behind
/// keeps it.
const PARK_AFTER: Duration = Duration::from_millis(100);

pub(crate) struct Worker {
    /// First, since fields are dropped in this order: the engine is closed before a reader sees that its job is gone.
    closing: Closing,
    pub(crate) model: Guarded,
    pub(crate) facts: ModelFacts,
    inbox: mpsc::Receiver<Command>,
    prompts: Option<PromptCache>,
    /// Jobs that wait for what the prompt cache has of them, with their tickets.
    restoring: Vec<(u64, Job)>,
    pub(crate) slots: Slots,
    /// Jobs that wait for a sequence.
    pub(crate) queue: VecDeque<Job>,
    pub(crate) active: Vec<Active>,
    /// Jobs whose readers do not read, and whose sequences others needed.
    parked: Vec<Job>,
    pub(crate) logits: Vec<f32>,
    /// Rows of logits that one step may ask for.
    pub(crate) max_rows: usize,
    /// Steps so far.
    pub(crate) steps: usize,
    /// What steps of decoding cost.
    pub(crate) step_cost: StepCost,
    /// Requests that are accepted at the same time.
    room: usize,
    stall_limit: Duration,
}

/// A job with its sequence.
pub(crate) struct Active {
    pub(crate) job: Job,
    pub(crate) sequence: SequenceId,
    /// Tokens in the KV cache.
    pub(crate) length: usize,
}

impl Active {
    pub(crate) fn remaining(&self) -> usize {
        self.job.tokens.len() - self.length
    }
}

/// Marks the engine as closed when its thread ends, in whatever way.
struct Closing(Arc<Shared>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.active.store(0, Ordering::Release);
        self.0.closed.store(true, Ordering::Release);
    }
}

impl Worker {
    pub(crate) fn new(
        model: Box<dyn CausalLm>,
        inbox: mpsc::Receiver<Command>,
        shared: Arc<Shared>,
        eos: Vec<u32>,
        logits_bytes: Option<u64>,
        room: usize,
        stall_limit: Duration,
    ) -> Self {
        let model = Guarded::new(model);
        let facts =
            ModelFacts { vocab_size: model.vocab_size(), context_length: model.context_length(), eos };
        let bytes = logits_bytes.map_or(LOGITS_BYTES, |bytes| LOGITS_BYTES.min(bytes as usize));
        let max_rows = (bytes / 4 / facts.vocab_size.max(1)).max(1);
        Self {
            closing: Closing(shared),
            model,
            facts,
            inbox,
            prompts: None,
            restoring: Vec::new(),
            slots: Slots::default(),
            queue: VecDeque::new(),
            active: Vec::new(),
            parked: Vec::new(),
            logits: Vec::new(),
            max_rows,
            steps: 0,
            step_cost: StepCost::default(),
            room,
            stall_limit,
        }
    }

    /// The same with a prompt cache.
    pub(crate) fn with_prompt_cache(mut self, prompts: Option<PromptCache>) -> Self {
        self.prompts = prompts;
        self
    }

    fn shared(&self) -> &Shared {
        &self.closing.0
    }

    /// Works until the engine and all streams are gone, or the model no longer works.
    pub(crate) fn run(mut self) {
        let mut connected = true;
        let mut working = false;
        while connected || self.has_jobs() {
            connected = self.receive(working);
            self.restore();
            self.sweep();
            self.park();
            self.admit();
            working = self.step();
            // Where all sequences are in use, this waits until one of them is free.
            if self.model.has_panicked()
                && self.slots.make_room(&mut self.model).is_ok()
                && let Err(error) = self.model.check()
            {
                return self.close(&error);
            }
        }
    }

    fn has_jobs(&self) -> bool {
        !(self.queue.is_empty()
            && self.active.is_empty()
            && self.parked.is_empty()
            && self.restoring.is_empty())
    }

    /// Takes what is in the inbox; waits for something only if there is nothing to do. `false` if nothing can come.
    fn receive(&mut self, working: bool) -> bool {
        if !working {
            let command = if self.has_jobs() {
                self.inbox.recv_timeout(STALLED_POLL)
            } else {
                self.inbox.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected)
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
            Command::Submit(job) => {
                let ticket = self.prompts.as_mut().and_then(|prompts| {
                    let have = self.slots.longest_common(&job.tokens);
                    prompts.request(&job.tokens, job.first_wanted(), have)
                });
                match ticket {
                    Some(ticket) => self.restoring.push((ticket, *job)),
                    None => self.queue.push_back(*job),
                }
            }
            Command::Wake => {}
        }
    }

    /// Queues the jobs for which the prompt cache has been read.
    fn restore(&mut self) {
        while let Some(Loaded { ticket, restored }) = self.prompts.as_mut().and_then(PromptCache::loaded) {
            // Where it was cancelled meanwhile, it is there no more.
            if let Some(i) = self.restoring.iter().position(|(waiting, _)| *waiting == ticket) {
                let (_, mut job) = self.restoring.remove(i);
                job.restored = restored;
                self.queue.push_back(job);
            }
        }
    }

    /// Ends the jobs that nobody wants any more, and those whose reader has read nothing for too long if their places are
    /// needed.
    fn sweep(&mut self) {
        let unwanted = |job: &Job| job.is_abandoned() || job.is_cancelled();
        for i in (0..self.queue.len()).rev() {
            if unwanted(&self.queue[i])
                && let Some(job) = self.queue.remove(i)
            {
                self.finish(job, End::Cancelled);
            }
        }
        for i in (0..self.restoring.len()).rev() {
            if unwanted(&self.restoring[i].1) {
                let (_, job) = self.restoring.remove(i);
                self.finish(job, End::Cancelled);
            }
        }
        for i in (0..self.parked.len()).rev() {
            if unwanted(&self.parked[i]) {
                let job = self.parked.remove(i);
                self.finish(job, End::Cancelled);
            }
        }
        for i in (0..self.active.len()).rev() {
            if unwanted(&self.active[i].job) {
                self.end(i, End::Cancelled);
            }
        }
        self.end_stalled();
    }

    /// Says how many jobs would give their places in the queue to others, and ends as many as others have taken.
    fn end_stalled(&mut self) {
        loop {
            let active = self.active.iter().map(|active| &active.job).enumerate();
            let parked = self.parked.iter().enumerate();
            let stalled: Vec<(Duration, bool, usize)> = active
                .map(|(i, job)| (job, true, i))
                .chain(parked.map(|(i, job)| (job, false, i)))
                .filter_map(|(job, is_active, i)| Some((job.stalled_for()?, is_active, i)))
                .filter(|(time, ..)| *time >= self.stall_limit)
                .collect();
            self.shared().replaceable.store(stalled.len(), Ordering::Release);
            if self.shared().accepted.load(Ordering::Acquire) <= self.room {
                return;
            }
            let Some((time, is_active, i)) = stalled.into_iter().max() else { return };
            let message = "nobody has read the answer, and other requests need its place";
            let error =
                Error::new(ErrorKind::Timeout, message).with_retryable(false).with("seconds", time.as_secs());
            if is_active {
                self.end(i, End::Failed(error));
            } else {
                let job = self.parked.remove(i);
                self.finish(job, End::Failed(error));
            }
        }
    }

    /// Takes sequences from jobs that wait for their readers if others wait for a sequence, and lets jobs without a
    /// sequence wait in turn when their readers have read.
    fn park(&mut self) {
        for i in (0..self.parked.len()).rev() {
            if self.parked[i].is_read() {
                // Queued last, so that slow readers do not delay waiting requests.
                self.queue.push_back(self.parked.remove(i));
            }
        }
        while self.active.len() + self.queue.len() > self.model.max_sequences() {
            let stalled = self.active.iter().enumerate();
            let stalled = stalled
                .filter_map(|(i, active)| Some((active.job.stalled_for()?, i)))
                .filter(|(time, _)| *time >= PARK_AFTER);
            let Some((_, i)) = stalled.max() else { return };
            let Active { job, sequence, .. } = self.active.remove(i);
            // Its tokens stay in the KV cache until their place is needed.
            self.slots.release(sequence);
            self.parked.push(job);
        }
    }

    /// Gives waiting jobs a sequence, first come first served.
    fn admit(&mut self) {
        while self.active.len() < self.model.max_sequences()
            && let Some(mut job) = self.queue.pop_front()
        {
            if let Some(restored) = job.restored.take()
                && let Err(error) = self.slots.adopt(&mut self.model, restored.prefix, &job.tokens)
            {
                tracing::warn!(%error, "the prompt is computed: what the prompt cache has of it cannot be used");
            }
            match self.slots.acquire(&mut self.model, &job.tokens, job.first_wanted()) {
                Ok((sequence, cached)) => match job.start(cached, &self.facts) {
                    Ok(()) => self.active.push(Active { job, sequence, length: cached }),
                    Err(error) => {
                        self.slots.release(sequence);
                        self.finish(job, End::Failed(error));
                    }
                },
                Err(error) => self.finish(job, End::Failed(error)),
            }
        }
        self.shared().active.store(self.active.len(), Ordering::Release);
    }

    /// Takes the job out and keeps its sequence for later requests, unless it has failed.
    pub(crate) fn end(&mut self, i: usize, end: End) {
        let Active { mut job, sequence, .. } = self.active.remove(i);
        if matches!(end, End::Failed(_)) {
            self.slots.discard(&mut self.model, sequence);
        } else {
            if let Some(prompts) = &mut self.prompts {
                let tokens = self.slots.tokens(sequence);
                let keep = prompts.keepable(tokens.len(), job.plain_prompt(), job.usage().cached_tokens);
                match job.prefix.take() {
                    // The send fails only if the reader is gone.
                    Some(sender) => drop(sender.send(self.model.prefix(sequence, 0..keep / BLOCK))),
                    None => prompts.save(&mut self.model, sequence, &tokens[..keep]),
                }
            }
            self.slots.release(sequence);
        }
        self.finish(job, end);
    }

    fn finish(&self, job: Job, end: End) {
        // Counted before the reader knows of the end, so that it finds its request in the statistics.
        let (shared, usage) = (self.shared(), job.usage());
        shared.active.store(self.active.len(), Ordering::Release);
        shared.prompt_tokens.fetch_add(job.computed_prompt() as u64, Ordering::Relaxed);
        shared.cached_tokens.fetch_add(usage.cached_tokens as u64, Ordering::Relaxed);
        shared.completion_tokens.fetch_add(usage.completion_tokens as u64, Ordering::Relaxed);
        job.finish(end);
    }

    /// Takes jobs out whose step has panicked. What the model holds of them cannot be trusted, so they begin again, each
    /// alone: then it shows which of them is at fault.
    pub(crate) fn begin_again(&mut self, mut indices: Vec<usize>) {
        // From the back, so that the indices before stay valid and the jobs keep their order in the queue.
        indices.sort_unstable_by_key(|i| std::cmp::Reverse(*i));
        for i in indices {
            let Active { mut job, sequence, .. } = self.active.remove(i);
            self.slots.discard(&mut self.model, sequence);
            job.clear_draft();
            job.alone = true;
            self.queue.push_front(job);
        }
    }

    /// Ends all jobs, those that are still on their way included.
    fn close(mut self, reason: &Error) {
        self.shared().closed.store(true, Ordering::Release);
        while let Ok(command) = self.inbox.try_recv() {
            self.take(command);
        }
        let active = std::mem::take(&mut self.active).into_iter().map(|active| active.job);
        let restoring = std::mem::take(&mut self.restoring).into_iter().map(|(_, job)| job);
        let jobs: Vec<Job> =
            active.chain(self.parked.drain(..)).chain(restoring).chain(self.queue.drain(..)).collect();
        for job in jobs {
            self.finish(job, End::Failed(stopped().with("reason", reason)));
        }
    }
}
