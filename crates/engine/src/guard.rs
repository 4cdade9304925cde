//! A model whose panics are errors, so that a bug in an engine ends one request and not the thread of all requests.

use std::ops::Range;

use ternion_core::{Error, ErrorKind, Result, catch_panic};

use crate::{CausalLm, LogitsWanted, SequenceId, SequenceInput, causal::KvIdentity, kv::KvPrefix};

/// Calls a [`CausalLm`] and turns its panics into errors.
pub(crate) struct Guarded {
    model: Box<dyn CausalLm>,
    context_length: usize,
    vocab_size: usize,
    max_sequences: usize,
    max_batch_tokens: usize,
    /// There was a panic, and [`check`](Self::check) has not been called since.
    panicked: bool,
}

impl Guarded {
    pub(crate) fn new(model: Box<dyn CausalLm>) -> Self {
        Self {
            context_length: model.context_length(),
            vocab_size: model.vocab_size(),
            max_sequences: model.max_sequences(),
            max_batch_tokens: model.max_batch_tokens(),
            model,
            panicked: false,
        }
    }

    /// Whether there was a panic since the last [`check`](Self::check).
    pub(crate) fn has_panicked(&self) -> bool {
        self.panicked
    }

    /// Finds out whether the model still works after a panic: a new sequence is fed one token and freed. There must be
    /// room for one more sequence.
    ///
    /// # Errors
    /// Why the model's state cannot be trusted.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.panicked = false;
        let sequence = self.new_sequence()?;
        let input = SequenceInput::new(sequence, &[0], LogitsWanted::Last);
        let mut logits = Vec::new();
        let fed = self.forward(&[input], &mut logits);
        self.free(sequence);
        match fed {
            // Without memory for one more token it may still serve the sequences that it has.
            Err(error) if self.panicked || error.kind() != ErrorKind::ResourceExhausted => Err(error),
            Ok(()) if logits.len() != self.vocab_size => {
                Err(Error::backend(format!("{} logits; {} expected", logits.len(), self.vocab_size)))
            }
            _ if self.panicked => Err(Error::backend("a sequence cannot be freed")),
            _ => Ok(()),
        }
    }

    fn call<T>(&mut self, name: &'static str, call: impl FnOnce(&mut dyn CausalLm) -> T) -> Result<T> {
        catch_panic(|| call(&mut *self.model)).map_err(|message| {
            self.panicked = true;
            Error::backend(format!("the engine panicked: {message}")).with("call", name)
        })
    }
}

impl CausalLm for Guarded {
    fn context_length(&self) -> usize {
        self.context_length
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_sequences(&self) -> usize {
        self.max_sequences
    }

    fn max_batch_tokens(&self) -> usize {
        self.max_batch_tokens
    }

    fn new_sequence(&mut self) -> Result<SequenceId> {
        self.call("new_sequence", |model| model.new_sequence())?
    }

    fn forward(&mut self, batch: &[SequenceInput<'_>], logits: &mut Vec<f32>) -> Result<()> {
        self.call("forward", |model| model.forward(batch, logits))?
    }

    fn len(&self, sequence: SequenceId) -> usize {
        catch_panic(|| self.model.len(sequence)).unwrap_or(0)
    }

    fn truncate(&mut self, sequence: SequenceId, length: usize) -> Result<()> {
        self.call("truncate", |model| model.truncate(sequence, length))?
    }

    fn fork(&mut self, sequence: SequenceId, length: usize) -> Result<SequenceId> {
        self.call("fork", |model| model.fork(sequence, length))?
    }

    fn free(&mut self, sequence: SequenceId) {
        // There is no error to return; `panicked` says that there was a panic. A sequence that stays would take the place of
        // others for good, so a second attempt is made. To free what does not exist is allowed.
        if self.call("free", |model| model.free(sequence)).is_err() {
            let _ = self.call("free", |model| model.free(sequence));
        }
    }

    fn kv_identity(&self) -> Result<KvIdentity> {
        self.model.kv_identity()
    }

    fn prefix(&mut self, sequence: SequenceId, blocks: Range<usize>) -> Result<KvPrefix> {
        self.call("prefix", |model| model.prefix(sequence, blocks))?
    }

    fn adopt(&mut self, prefix: KvPrefix) -> Result<SequenceId> {
        self.call("adopt", |model| model.adopt(prefix))?
    }
}
