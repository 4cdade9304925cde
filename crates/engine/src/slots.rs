//! The model's sequences and the tokens that each holds. A request whose beginning is in the KV cache already does not
//! compute it again.

use ternion_core::{Error, ErrorKind, Result};

use crate::{CausalLm, SequenceId, kv::KvPrefix};

/// The fewest common tokens for which a sequence is forked. A fork copies a block of the KV cache when it is written to,
/// which costs more than computing a BOS and the few tokens that a chat template begins with.
const FORK_LEAST: usize = 4;

/// Sequences with their tokens. Idle ones are kept for later requests until their place or memory is needed.
#[derive(Default)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
    clock: u64,
}

struct Slot {
    sequence: SequenceId,
    /// What is in the KV cache.
    tokens: Vec<u32>,
    busy: bool,
    last_used: u64,
}

impl Slots {
    /// Takes a sequence for `tokens`, of which at most `reusable` may be taken from the KV cache. Returns it with the
    /// number of tokens that it holds already.
    pub(crate) fn acquire(
        &mut self,
        model: &mut dyn CausalLm,
        tokens: &[u32],
        reusable: usize,
    ) -> Result<(SequenceId, usize)> {
        let reusable = &tokens[..reusable.min(tokens.len())];
        let best = self
            .slots
            .iter()
            .enumerate()
            // Of equals the one that was used the longest time ago, which would have to make room.
            .map(|(i, slot)| {
                (common_prefix(&slot.tokens, reusable), !slot.busy, std::cmp::Reverse(slot.last_used), i)
            })
            .max();
        let Some((common, idle, _, i)) = best.filter(|&(common, ..)| common > 0) else {
            return self.fresh(model);
        };
        let source = self.slots[i].sequence;
        // A sequence that goes on where it ended, or that has little else, is continued in place, and so is the one that
        // would have to make room; otherwise another conversation lives in it, which a fork leaves alone.
        let gives_room = self.slots.len() >= model.max_sequences() && self.oldest_idle() == Some(i);
        let continues = common * 2 >= self.slots[i].tokens.len() || gives_room;
        if idle && continues {
            match model.truncate(source, common) {
                Ok(()) => {
                    self.slots[i].busy = true;
                    self.slots[i].tokens.truncate(common);
                    return Ok((source, common));
                }
                Err(e) if e.kind() == ErrorKind::Unsupported => {}
                Err(_) => self.discard(model, source),
            }
        } else if common >= FORK_LEAST {
            self.slots[i].busy = true; // the fork's room must not be made by freeing its source
            let forked = self.make_room(model).and_then(|()| model.fork(source, common));
            if let Some(slot) = self.slot(source) {
                slot.busy = !idle;
            }
            match forked {
                Ok(id) => return Ok((self.keep(id, &tokens[..common]), common)),
                Err(e) if e.kind() == ErrorKind::Unsupported => {}
                Err(e) if e.kind() == ErrorKind::ResourceExhausted => return Err(e),
                // The request does not need the fork, and nobody needs an idle sequence that may be damaged.
                Err(_) if idle => self.discard(model, source),
                Err(_) => {}
            }
        }
        self.fresh(model)
    }

    /// The most tokens that `tokens` has in common with the beginning of a sequence.
    pub(crate) fn longest_common(&self, tokens: &[u32]) -> usize {
        self.slots.iter().map(|slot| common_prefix(&slot.tokens, tokens)).max().unwrap_or(0)
    }

    /// What the KV cache holds of `sequence`.
    pub(crate) fn tokens(&self, sequence: SequenceId) -> &[u32] {
        self.slots.iter().find(|slot| slot.sequence == sequence).map_or(&[], |slot| &slot.tokens)
    }

    /// Makes an idle sequence of keys and values that were saved for the first of `tokens`.
    pub(crate) fn adopt(&mut self, model: &mut dyn CausalLm, prefix: KvPrefix, tokens: &[u32]) -> Result<()> {
        self.make_room(model)?;
        let tokens = &tokens[..prefix.tokens()];
        let sequence = model.adopt(prefix)?;
        self.keep(sequence, tokens);
        self.release(sequence);
        Ok(())
    }

    /// Notes that `tokens` have been appended to the KV cache of `sequence`.
    pub(crate) fn appended(&mut self, sequence: SequenceId, tokens: &[u32]) {
        if let Some(slot) = self.slot(sequence) {
            slot.tokens.extend_from_slice(tokens);
        }
    }

    /// Forgets all but the first `length` tokens of `sequence`. Returns the sequence to go on with and the tokens that it
    /// holds: an empty one where the model cannot truncate.
    pub(crate) fn rewind(
        &mut self,
        model: &mut dyn CausalLm,
        sequence: SequenceId,
        length: usize,
    ) -> Result<(SequenceId, usize)> {
        if model.truncate(sequence, length).is_ok() {
            if let Some(slot) = self.slot(sequence) {
                slot.tokens.truncate(length);
            }
            return Ok((sequence, length));
        }
        self.discard(model, sequence);
        self.fresh(model)
    }

    /// Nobody works on `sequence` any more; it is kept for its tokens.
    pub(crate) fn release(&mut self, sequence: SequenceId) {
        self.clock += 1;
        let clock = self.clock;
        if let Some(slot) = self.slot(sequence) {
            slot.busy = false;
            slot.last_used = clock;
        }
    }

    /// Frees `sequence`, whose contents cannot be trusted.
    pub(crate) fn discard(&mut self, model: &mut dyn CausalLm, sequence: SequenceId) {
        if let Some(i) = self.slots.iter().position(|s| s.sequence == sequence) {
            self.slots.swap_remove(i);
            model.free(sequence);
        }
    }

    /// Frees the idle sequence that was used the longest time ago; `false` if none is idle.
    pub(crate) fn evict(&mut self, model: &mut dyn CausalLm) -> bool {
        let Some(i) = self.oldest_idle() else { return false };
        model.free(self.slots.swap_remove(i).sequence);
        true
    }

    /// Frees idle sequences until one more may be made.
    pub(crate) fn make_room(&mut self, model: &mut dyn CausalLm) -> Result<()> {
        while self.slots.len() >= model.max_sequences() {
            if !self.evict(model) {
                return Err(Error::new(ErrorKind::ResourceExhausted, "all sequences are busy"));
            }
        }
        Ok(())
    }

    fn slot(&mut self, sequence: SequenceId) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|s| s.sequence == sequence)
    }

    fn oldest_idle(&self) -> Option<usize> {
        let idle = self.slots.iter().enumerate().filter(|(_, slot)| !slot.busy);
        idle.min_by_key(|(_, slot)| slot.last_used).map(|(i, _)| i)
    }

    /// An empty sequence.
    fn fresh(&mut self, model: &mut dyn CausalLm) -> Result<(SequenceId, usize)> {
        self.make_room(model)?;
        let sequence = model.new_sequence()?;
        Ok((self.keep(sequence, &[]), 0))
    }

    fn keep(&mut self, sequence: SequenceId, tokens: &[u32]) -> SequenceId {
        self.slots.push(Slot { sequence, tokens: tokens.to_vec(), busy: true, last_used: self.clock });
        sequence
    }
}

/// How many tokens both begin with.
pub(crate) fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}
