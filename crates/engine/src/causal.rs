//! `CausalLm`: all that a local engine implements.
//!
//! It is blocking and knows nothing of text, sampling or async; the [`Engine`](crate::engine::Engine) calls it from
//! one thread, so it needs no locks.

use ternion_core::{Error, Result};

use crate::kv::{KvLayout, KvPrefix, KvType};

/// A sequence of a [`CausalLm`]: an index into its KV cache, chosen by the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u32);

/// Which rows of logits a caller wants of the tokens that it feeds to one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsWanted {
    /// None: the tokens only enter the KV cache.
    None,
    /// Of the last token.
    Last,
    /// Of the tokens from this index of the fed tokens on (0 means all).
    From(usize),
}

/// Tokens to append to one sequence.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct SequenceInput<'a> {
    /// The sequence.
    pub sequence: SequenceId,
    /// The tokens, at least one.
    pub tokens: &'a [u32],
    /// Which logits are wanted.
    pub logits: LogitsWanted,
}

impl<'a> SequenceInput<'a> {
    /// `tokens` for a sequence, with the logits that are wanted of them.
    pub fn new(sequence: SequenceId, tokens: &'a [u32], logits: LogitsWanted) -> Self {
        Self { sequence, tokens, logits }
    }

    /// How many rows of logits this input asks for.
    pub fn rows(&self) -> usize {
        match self.logits {
            LogitsWanted::None => 0,
            LogitsWanted::Last => 1,
            LogitsWanted::From(start) => self.tokens.len().saturating_sub(start),
        }
    }
}

/// What keys and values depend on beside the tokens that they are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvIdentity {
    /// The shape of the keys and values.
    pub layout: KvLayout,
    /// How they are stored.
    pub kv_type: KvType,
    /// A hash of all else: weights, arithmetic, rotary embedding. Equal hashes mean the same keys and values, bit for bit.
    pub fingerprint: [u8; 32],
}

impl KvIdentity {
    /// The identity of a model with this KV cache and this hash of all else.
    pub fn new(layout: KvLayout, kv_type: KvType, fingerprint: [u8; 32]) -> Self {
        Self { layout, kv_type, fingerprint }
    }
}

/// A causal language model with a KV cache for several sequences: tokens in, logits out.
pub trait CausalLm: Send {
    /// Tokens that one sequence may hold.
    fn context_length(&self) -> usize;

    /// Length of a row of logits.
    fn vocab_size(&self) -> usize;

    /// Sequences that may exist at the same time.
    fn max_sequences(&self) -> usize;

    /// The most tokens that one call of [`forward`](Self::forward) should be given, all inputs together: the size of
    /// a prefill chunk, a compromise between speed and how soon a cancellation is seen.
    fn max_batch_tokens(&self) -> usize;

    /// Whether [`truncate`](Self::truncate) works, without which a prefix that prompts have in common is computed anew.
    fn can_truncate(&self) -> bool {
        true
    }

    /// Makes an empty sequence.
    ///
    /// # Errors
    /// [`ResourceExhausted`](ternion_core::ErrorKind::ResourceExhausted) when `max_sequences` exist.
    fn new_sequence(&mut self) -> Result<SequenceId>;

    /// Appends the tokens of each input to its sequence and computes the logits that are wanted.
    ///
    /// # Requires
    /// Each sequence exists and appears in at most one input, each input has at least one token, every token is below
    /// `vocab_size`, no sequence grows beyond `context_length`. An implementation checks this and returns an error.
    ///
    /// # Behavior
    /// `logits` is cleared, then holds the wanted rows `[rows, vocab_size]`, row after row, in the order of the
    /// inputs and of the tokens within each. The logits of a sequence do not depend on how its tokens are divided
    /// over calls, nor on the other sequences of a call, beyond the rounding of float sums in another order; an engine that
    /// can avoids that too.
    ///
    /// # Errors
    /// After an error every sequence of the call has the length that it had before.
    fn forward(&mut self, batch: &[SequenceInput<'_>], logits: &mut Vec<f32>) -> Result<()>;

    /// Tokens in the sequence; 0 for one that does not exist.
    fn len(&self, sequence: SequenceId) -> usize;

    /// Forgets the tokens from index `length` on; nothing happens if there are none.
    ///
    /// # Errors
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported) if the engine cannot; the sequence is then unchanged.
    fn truncate(&mut self, sequence: SequenceId, length: usize) -> Result<()>;

    /// Makes a new sequence that shares the first `length` tokens of `sequence`.
    ///
    /// # Errors
    /// As [`new_sequence`](Self::new_sequence), or `Unsupported`.
    fn fork(&mut self, sequence: SequenceId, length: usize) -> Result<SequenceId>;

    /// Removes the sequence and frees its part of the KV cache. Nothing happens if it does not exist.
    fn free(&mut self, sequence: SequenceId);

    /// What its keys and values depend on, for a model that implements [`prefix`](Self::prefix) and [`adopt`](Self::adopt). May
    /// read parts of the model's files.
    ///
    /// # Errors
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported) where keys and values cannot be saved, which is the default; those of
    /// reading the files.
    fn kv_identity(&self) -> Result<KvIdentity> {
        Err(cannot_save())
    }

    /// The keys and values of the first `length` tokens of `sequence`, as far as they fill whole blocks. Copies nothing.
    ///
    /// # Errors
    /// `Unsupported`, or if the sequence does not exist.
    fn prefix(&self, sequence: SequenceId, length: usize) -> Result<KvPrefix> {
        let _ = (sequence, length);
        Err(cannot_save())
    }

    /// Makes a new sequence that begins with keys and values that a model with the same [`kv_identity`](Self::kv_identity) has
    /// computed.
    ///
    /// # Errors
    /// As [`new_sequence`](Self::new_sequence), or `Unsupported`.
    fn adopt(&mut self, prefix: KvPrefix) -> Result<SequenceId> {
        let _ = prefix;
        Err(cannot_save())
    }
}

fn cannot_save() -> Error {
    Error::unsupported("the engine cannot save the model's KV cache; leave out `prompt_cache`")
}
