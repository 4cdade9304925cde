//! A [`CausalLm`] over a [`Network`]: several sequences, logits at every position, and errors that leave sequences as they were.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use ternion_core::{Error, ErrorKind, Result};
use ternion_engine::{
    CausalLm, LogitsWanted, SequenceId, SequenceInput,
    batch::{no_such, room_for_one, spans},
};

use super::network::Network;

/// The sizes of a [`DenseLm`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) context_length: usize,
    pub(super) vocab_size: usize,
    pub(super) max_sequences: usize,
    pub(super) prefill_chunk: usize,
}

/// A dense model. Its sequences are computed one after the other.
pub(super) struct DenseLm {
    /// What new sequences are made of: a network that is never fed where it can be forked, else the only one, which a sequence
    /// takes and gives back.
    source: Option<Box<dyn Network>>,
    can_fork: bool,
    sequences: BTreeMap<SequenceId, Sequence>,
    next: u32,
    sizes: Sizes,
}

struct Sequence {
    network: Box<dyn Network>,
    tokens: Vec<u32>,
    /// How many of the tokens the network holds: all of them, or none after an error.
    computed: usize,
}

impl Sequence {
    /// Feeds all tokens that the network does not hold, and appends the logits from the position `wanted` on.
    fn compute(
        &mut self,
        wanted: usize,
        vocab_size: usize,
        logits: &mut Vec<f32>,
    ) -> candle_core::Result<()> {
        while self.computed < self.tokens.len() {
            let past = self.computed;
            // A call gives the logits of its last token alone.
            let until = self.tokens.len().min(wanted.max(past) + 1);
            let count = (until - past).min(self.network.most(past));
            let tokens = Tensor::new(&self.tokens[past..past + count], &Device::Cpu)?.unsqueeze(0)?;
            let row = self.network.forward(&tokens, past)?;
            self.computed += count;
            if self.computed > wanted {
                let row = row.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                if row.len() != vocab_size {
                    candle_core::bail!("the model gave {} logits, expected {vocab_size}", row.len());
                }
                logits.extend(row);
            }
        }
        Ok(())
    }

    /// Goes back to the first `length` tokens, which are computed again when they are needed.
    fn restore(&mut self, length: usize) {
        self.network.reset();
        self.computed = 0;
        self.tokens.truncate(length);
    }
}

impl DenseLm {
    /// A model whose sequences are made of `network`, which has not been fed.
    pub(super) fn new(network: Box<dyn Network>, sizes: Sizes) -> Self {
        let can_fork = network.fork().is_some();
        Self { source: Some(network), can_fork, sequences: BTreeMap::new(), next: 0, sizes }
    }

    fn insert(&mut self, network: Box<dyn Network>, tokens: Vec<u32>) -> SequenceId {
        while self.sequences.contains_key(&SequenceId(self.next)) {
            self.next = self.next.wrapping_add(1);
        }
        let id = SequenceId(self.next);
        self.next = self.next.wrapping_add(1);
        let computed = tokens.len();
        self.sequences.insert(id, Sequence { network, tokens, computed });
        id
    }
}

impl CausalLm for DenseLm {
    fn context_length(&self) -> usize {
        self.sizes.context_length
    }

    fn vocab_size(&self) -> usize {
        self.sizes.vocab_size
    }

    fn max_sequences(&self) -> usize {
        self.sizes.max_sequences
    }

    fn max_batch_tokens(&self) -> usize {
        self.sizes.prefill_chunk
    }

    fn can_truncate(&self) -> bool {
        false
    }

    fn new_sequence(&mut self) -> Result<SequenceId> {
        room_for_one(self.sequences.len(), self.sizes.max_sequences)?;
        let network = if self.can_fork {
            self.source.as_ref().and_then(|network| network.fork())
        } else {
            self.source.take()
        };
        let network = network.ok_or_else(|| Error::backend("the model's only sequence is in use"))?;
        Ok(self.insert(network, Vec::new()))
    }

    fn forward(&mut self, batch: &[SequenceInput<'_>], logits: &mut Vec<f32>) -> Result<()> {
        let Sizes { context_length, vocab_size, .. } = self.sizes;
        let spans =
            spans(batch, |id| self.sequences.get(&id).map(|s| s.tokens.len()), context_length, vocab_size)?;
        logits.clear();
        let mut compute = |input: &SequenceInput<'_>| {
            let sequence = self.sequences.get_mut(&input.sequence).ok_or_else(|| no_such(input.sequence))?;
            let past = sequence.tokens.len();
            sequence.tokens.extend_from_slice(input.tokens);
            let wanted = match input.logits {
                LogitsWanted::None => usize::MAX - 1,
                LogitsWanted::Last => sequence.tokens.len() - 1,
                LogitsWanted::From(first) => past + first,
            };
            sequence
                .compute(wanted, vocab_size, logits)
                .map_err(|e| Error::backend("candle cannot compute the step").with_source(e))
        };
        let result = batch.iter().try_for_each(&mut compute);
        if result.is_err() {
            for span in spans {
                if let Some(sequence) = self.sequences.get_mut(&span.sequence) {
                    sequence.restore(span.past);
                }
            }
        }
        result
    }

    fn len(&self, sequence: SequenceId) -> usize {
        self.sequences.get(&sequence).map_or(0, |s| s.tokens.len())
    }

    fn truncate(&mut self, sequence: SequenceId, length: usize) -> Result<()> {
        match self.sequences.get_mut(&sequence) {
            Some(s) if length == 0 => s.restore(0),
            Some(s) if length < s.tokens.len() => {
                let message = "the model cannot forget a part of its tokens";
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            _ => {}
        }
        Ok(())
    }

    fn fork(&mut self, sequence: SequenceId, length: usize) -> Result<SequenceId> {
        room_for_one(self.sequences.len(), self.sizes.max_sequences)?;
        let source = self.sequences.get(&sequence).ok_or_else(|| no_such(sequence))?;
        let is_whole = length >= source.tokens.len() && source.computed == source.tokens.len();
        let fork = is_whole.then(|| source.network.fork()).flatten();
        let (Some(network), tokens) = (fork, source.tokens.clone()) else {
            return Err(Error::new(ErrorKind::Unsupported, "the model cannot share a part of its tokens"));
        };
        Ok(self.insert(network, tokens))
    }

    fn free(&mut self, sequence: SequenceId) {
        if let Some(mut freed) = self.sequences.remove(&sequence)
            && !self.can_fork
        {
            freed.network.reset();
            self.source = Some(freed.network);
        }
    }
}
