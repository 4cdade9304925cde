//! `CausalLm`: all that a local engine implements.
//!
//! It is blocking and knows nothing of text, sampling or async; the [`Engine`](crate::engine::Engine) calls it from
//! one thread, so it needs no locks.

use std::ops::Range;

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

/// How exact rows of logits must be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum LogitsPrecision {
    /// All of them.
    #[default]
    Exact,
    /// The so many largest, in their order. The others are smaller than each of these and nearly exact, always the same for the
    /// same tokens.
    Leading(usize),
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
    /// How exact they must be. A model may always give exact ones.
    pub precision: LogitsPrecision,
}

impl<'a> SequenceInput<'a> {
    /// `tokens` for a sequence, with the exact logits that are wanted of them.
    pub fn new(sequence: SequenceId, tokens: &'a [u32], logits: LogitsWanted) -> Self {
        Self { sequence, tokens, logits, precision: LogitsPrecision::Exact }
    }

    /// The same with logits of this precision.
    pub fn with_precision(mut self, precision: LogitsPrecision) -> Self {
        self.precision = precision;
        self
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

/// How the keys and values of a block of [`BLOCK`](crate::kv::BLOCK) tokens are kept outside of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvForm {
    /// As a block of a [`KvCache`](crate::kv::KvCache).
    Paged {
        /// The shape of the keys and values.
        layout: KvLayout,
        /// How they are stored.
        kv_type: KvType,
    },
    /// As bytes that the engine alone understands.
    Opaque {
        /// How many they are.
        bytes: u64,
    },
}

/// What keys and values depend on beside the tokens that they are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvIdentity {
    /// How they are kept.
    pub form: KvForm,
    /// A hash of all else: weights, arithmetic, rotary embedding. Equal hashes mean the same keys and values, bit for bit.
    pub fingerprint: [u8; 32],
    /// Steps of which prompts are divided into, for an engine whose results depend on it in their last bits; 1 for one whose
    /// results do not. A prompt is kept in multiples of it, so that the rest is divided as it would be without the cache.
    pub unit: usize,
}

impl KvIdentity {
    /// The identity of a model whose keys and values are in a [`KvCache`](crate::kv::KvCache), with this hash of all else.
    pub fn paged(layout: KvLayout, kv_type: KvType, fingerprint: [u8; 32]) -> Self {
        Self { form: KvForm::Paged { layout, kv_type }, fingerprint, unit: 1 }
    }

    /// The identity of a model whose keys and values are so many bytes for each block, with this hash of all else.
    pub fn opaque(bytes: u64, fingerprint: [u8; 32]) -> Self {
        Self { form: KvForm::Opaque { bytes }, fingerprint, unit: 1 }
    }

    /// The same for an engine that divides prompts into steps of so many tokens, and whose results depend on it.
    pub fn with_unit(mut self, tokens: usize) -> Self {
        self.unit = tokens.max(1);
        self
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

    /// The keys and values of some blocks of `sequence`, as far as they are full: block `i` has the tokens from
    /// `i * BLOCK` on.
    ///
    /// # Errors
    /// `Unsupported`, or if the sequence does not exist.
    fn prefix(&mut self, sequence: SequenceId, blocks: Range<usize>) -> Result<KvPrefix> {
        let _ = (sequence, blocks);
        Err(cannot_save())
    }

    /// Makes a new sequence that begins with keys and values that a model with the same [`kv_identity`](Self::kv_identity) has
    /// computed, from the first block on. Those of the form [`Opaque`](KvForm::Opaque) come from a file and are not trusted.
    ///
    /// # Errors
    /// As [`new_sequence`](Self::new_sequence), for bytes that no such model has made, or `Unsupported`.
    fn adopt(&mut self, prefix: KvPrefix) -> Result<SequenceId> {
        let _ = prefix;
        Err(cannot_save())
    }
}

fn cannot_save() -> Error {
    Error::unsupported("the engine cannot save the model's KV cache; leave out `prompt_cache`")
}
