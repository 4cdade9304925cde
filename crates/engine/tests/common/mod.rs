//! A model without weights for the tests of the engine: its logits are a hash of all tokens before, so any mistake
//! with the KV cache shows in the output.
#![allow(dead_code, reason = "each file of tests uses its part")]

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use ternion_core::{
    Error, ErrorKind, GenerateRequest, ModelInfo, Result, Sampling,
    text::{Tokenizer, TokenizerParts},
};
use ternion_engine::{CausalLm, Engine, EngineOptions, SequenceId, SequenceInput};
pub(crate) use ternion_test_support::fixture;

pub(crate) const VOCAB: usize = 520;

/// A greedy request.
pub(crate) fn tokens(prompt: &[u32]) -> GenerateRequest {
    GenerateRequest::new(prompt.to_vec()).with_sampling(Sampling::greedy())
}

/// What greedy decoding must give, computed without the engine.
pub(crate) fn greedy(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut all = prompt.to_vec();
    for _ in 0..count {
        let logits = hashed_logits(&all, VOCAB);
        let best = (0..VOCAB).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap();
        all.push(best as u32);
    }
    all.split_off(prompt.len())
}

/// What the toy model did, seen from outside.
#[derive(Default)]
pub(crate) struct Probe {
    pub(crate) fed: AtomicUsize,
    pub(crate) calls: AtomicUsize,
    pub(crate) largest_batch: AtomicUsize,
    pub(crate) most_sequences: AtomicUsize,
    pub(crate) alive: AtomicUsize,
}

/// Faults that a test switches on while the toy runs.
#[derive(Default)]
pub(crate) struct Faults {
    /// The next call of this method panics.
    pub(crate) once: Mutex<Option<&'static str>>,
    /// Every call of `forward` panics from now on.
    pub(crate) broken: AtomicBool,
    /// Forks that were made.
    pub(crate) forks: AtomicUsize,
}

impl Faults {
    fn check(&self, method: &'static str) {
        let hit = self.once.lock().unwrap().take_if(|next| *next == method).is_some();
        assert!(!hit, "a bug in {method}");
    }
}

pub(crate) struct Toy {
    pub(crate) vocab: usize,
    pub(crate) context: usize,
    pub(crate) max_sequences: usize,
    pub(crate) chunk: usize,
    pub(crate) delay: Duration,
    /// Tokens to say, one after the other, whatever the prompt; empty for hashed logits.
    pub(crate) script: Vec<u32>,
    pub(crate) prompt_length: usize,
    /// Fails on sequences that contain this token.
    pub(crate) poison: Option<u32>,
    /// Panics on sequences that contain this token, after it has fed what stands before it.
    pub(crate) panic_token: Option<u32>,
    /// Time that each fed token takes.
    pub(crate) token_time: Duration,
    pub(crate) faults: Arc<Faults>,
    pub(crate) can_fork: bool,
    pub(crate) can_truncate: bool,
    /// Tokens that all sequences may hold together.
    pub(crate) memory: usize,
    /// The most tokens before that the logits depend on. A small number makes answers that repeat themselves.
    pub(crate) order: usize,
    pub(crate) probe: Arc<Probe>,
    sequences: HashMap<SequenceId, Vec<u32>>,
    next: u32,
}

impl Toy {
    pub(crate) fn new(vocab: usize) -> Self {
        let probe = Arc::new(Probe::default());
        probe.alive.store(1, Ordering::SeqCst);
        Self {
            vocab,
            context: 64,
            max_sequences: 4,
            chunk: 8,
            delay: Duration::ZERO,
            script: Vec::new(),
            prompt_length: 0,
            poison: None,
            panic_token: None,
            token_time: Duration::ZERO,
            faults: Arc::default(),
            can_fork: true,
            can_truncate: true,
            memory: usize::MAX,
            order: usize::MAX,
            probe,
            sequences: HashMap::new(),
            next: 0,
        }
    }

    /// A toy that answers a prompt of `prompt_length` tokens with `script`.
    pub(crate) fn scripted(vocab: usize, prompt_length: usize, script: &[u32]) -> Self {
        let mut toy = Self::new(vocab);
        toy.script = script.to_vec();
        toy.prompt_length = prompt_length;
        toy
    }

    pub(crate) fn start(self) -> Engine {
        self.start_with(|_| {})
    }

    pub(crate) fn start_with(self, change: impl FnOnce(&mut EngineOptions)) -> Engine {
        let mut options = EngineOptions::new(ModelInfo::new("toy", "test"));
        change(&mut options);
        Engine::start(Box::new(self), tokenizer(), options).expect("a toy starts")
    }
}

impl Drop for Toy {
    fn drop(&mut self) {
        self.probe.alive.store(0, Ordering::SeqCst);
    }
}

/// The logits that a toy gives after `tokens`.
pub(crate) fn hashed_logits(tokens: &[u32], vocab: usize) -> Vec<f32> {
    let mut state = tokens.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, &t| {
        (h ^ u64::from(t)).wrapping_mul(0x0100_0000_01b3).rotate_left(17)
    });
    (0..vocab)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1 << 24) as f32) * 6.0 - 3.0
        })
        .collect()
}

impl CausalLm for Toy {
    fn context_length(&self) -> usize {
        self.context
    }

    fn vocab_size(&self) -> usize {
        self.vocab
    }

    fn max_sequences(&self) -> usize {
        self.max_sequences
    }

    fn max_batch_tokens(&self) -> usize {
        self.chunk
    }

    fn can_truncate(&self) -> bool {
        self.can_truncate
    }

    fn new_sequence(&mut self) -> Result<SequenceId> {
        self.faults.check("new_sequence");
        assert!(self.sequences.len() < self.max_sequences, "the engine asked for too many sequences");
        let id = SequenceId(self.next);
        self.next += 1;
        self.sequences.insert(id, Vec::new());
        self.probe.most_sequences.fetch_max(self.sequences.len(), Ordering::SeqCst);
        Ok(id)
    }

    fn forward(&mut self, batch: &[SequenceInput<'_>], logits: &mut Vec<f32>) -> Result<()> {
        std::thread::sleep(self.delay);
        self.faults.check("forward");
        assert!(!self.faults.broken.load(Ordering::SeqCst), "broken for good");
        let count: usize = batch.iter().map(|b| b.tokens.len()).sum();
        std::thread::sleep(self.token_time * count as u32);
        let held: usize = self.sequences.values().map(Vec::len).sum();
        if held + count > self.memory {
            return Err(Error::new(ErrorKind::ResourceExhausted, "toy memory is full"));
        }
        if let Some(poison) = self.poison
            && batch.iter().any(|b| b.tokens.contains(&poison))
        {
            return Err(Error::backend("poisoned"));
        }
        self.probe.calls.fetch_add(1, Ordering::SeqCst);
        self.probe.fed.fetch_add(count, Ordering::SeqCst);
        self.probe.largest_batch.fetch_max(batch.len(), Ordering::SeqCst);
        logits.clear();
        for input in batch {
            let sequence = self.sequences.get_mut(&input.sequence).expect("the sequence exists");
            assert!(!input.tokens.is_empty() && sequence.len() + input.tokens.len() <= self.context);
            let first = input.tokens.len() - input.rows();
            for (i, &token) in input.tokens.iter().enumerate() {
                assert_ne!(self.panic_token, Some(token), "a bug with one token");
                sequence.push(token);
                if i >= first {
                    let seen = &sequence[sequence.len().saturating_sub(self.order)..];
                    let mut row = hashed_logits(seen, self.vocab);
                    if let Some(at) = (sequence.len()).checked_sub(self.prompt_length)
                        && let Some(&say) = self.script.get(at)
                    {
                        row[say as usize] = 50.0;
                    }
                    logits.extend(row);
                }
            }
        }
        Ok(())
    }

    fn len(&self, sequence: SequenceId) -> usize {
        self.sequences.get(&sequence).map_or(0, Vec::len)
    }

    fn truncate(&mut self, sequence: SequenceId, length: usize) -> Result<()> {
        self.faults.check("truncate");
        if !self.can_truncate {
            return Err(Error::unsupported("no truncation"));
        }
        if let Some(tokens) = self.sequences.get_mut(&sequence) {
            tokens.truncate(length);
        }
        Ok(())
    }

    fn fork(&mut self, sequence: SequenceId, length: usize) -> Result<SequenceId> {
        if !self.can_fork {
            return Err(Error::unsupported("no forks"));
        }
        self.faults.check("fork");
        self.faults.forks.fetch_add(1, Ordering::SeqCst);
        let tokens = self.sequences[&sequence][..length].to_vec();
        let id = self.new_sequence()?;
        self.sequences.insert(id, tokens);
        Ok(id)
    }

    fn free(&mut self, sequence: SequenceId) {
        self.faults.check("free");
        self.sequences.remove(&sequence);
    }
}

/// A byte-level BPE tokenizer with a chat template.
pub(crate) fn tokenizer() -> Tokenizer {
    Tokenizer::from_parts(TokenizerParts::from_folder(fixture("nano-packed")).expect("the fixture"))
        .expect("valid")
}
