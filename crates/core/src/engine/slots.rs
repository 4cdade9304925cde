//! The model's sequences and the tokens that each holds, so that a request whose beginning is in the KV cache
//! already need not compute it again.

use crate::{CausalLm, Error, ErrorKind, Result, SequenceId};

/// Sequences with their tokens. Idle ones are kept for later requests until their place or memory is needed.
#[derive(Default)]
pub(super) struct Slots {
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
    pub(super) fn acquire(
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
            .map(|(i, slot)| (common_prefix(&slot.tokens, reusable), !slot.busy, i))
            .max();
        let Some((common, idle, i)) = best.filter(|&(common, ..)| common > 0) else {
            return self.fresh(model);
        };
        let source = self.slots[i].sequence;
        // A sequence that goes on where it ended, or that has little else, is continued in place, and so is the one that
        // would have to make room; otherwise another conversation lives in it, which a fork leaves alone.
        let gives_room = self.slots.len() >= model.max_sequences() && self.oldest_idle() == Some(i);
        let continues = common * 2 >= self.slots[i].tokens.len() || gives_room;
        if idle && continues {
            if model.truncate(source, common).is_ok() {
                self.slots[i].busy = true;
                self.slots[i].tokens.truncate(common);
                return Ok((source, common));
            }
        } else {
            self.slots[i].busy = true; // the fork's room must not be made by freeing its source
            let forked = self.make_room(model).and_then(|()| model.fork(source, common));
            if let Some(slot) = self.slots.iter_mut().find(|s| s.sequence == source) {
                slot.busy = !idle;
            }
            match forked {
                Ok(id) => return Ok((self.keep(id, &tokens[..common]), common)),
                Err(e) if e.kind() == ErrorKind::Unsupported => {}
                Err(e) => return Err(e),
            }
        }
        self.fresh(model)
    }

    /// Notes that `tokens` have been appended to the KV cache of `sequence`.
    pub(super) fn appended(&mut self, sequence: SequenceId, tokens: &[u32]) {
        if let Some(slot) = self.slots.iter_mut().find(|s| s.sequence == sequence) {
            slot.tokens.extend_from_slice(tokens);
        }
    }

    /// Forgets all but the first `length` tokens of `sequence`. Returns the sequence to go on with and the tokens that it holds:
    /// an empty one where the model cannot truncate.
    pub(super) fn rewind(
        &mut self,
        model: &mut dyn CausalLm,
        sequence: SequenceId,
        length: usize,
    ) -> Result<(SequenceId, usize)> {
        if model.truncate(sequence, length).is_ok() {
            if let Some(slot) = self.slots.iter_mut().find(|s| s.sequence == sequence) {
                slot.tokens.truncate(length);
            }
            return Ok((sequence, length));
        }
        self.slots.retain(|s| s.sequence != sequence);
        model.free(sequence);
        self.fresh(model)
    }

    /// Nobody works on `sequence` any more; it is kept for its tokens.
    pub(super) fn release(&mut self, sequence: SequenceId) {
        self.clock += 1;
        if let Some(slot) = self.slots.iter_mut().find(|s| s.sequence == sequence) {
            slot.busy = false;
            slot.last_used = self.clock;
        }
    }

    /// Frees the idle sequence that was used the longest time ago; `false` if none is idle.
    pub(super) fn evict(&mut self, model: &mut dyn CausalLm) -> bool {
        let Some(i) = self.oldest_idle() else { return false };
        model.free(self.slots.swap_remove(i).sequence);
        true
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

    /// Frees idle sequences until one more may be made.
    fn make_room(&mut self, model: &mut dyn CausalLm) -> Result<()> {
        while self.slots.len() >= model.max_sequences() {
            if !self.evict(model) {
                return Err(Error::new(ErrorKind::ResourceExhausted, "all sequences are busy"));
            }
        }
        Ok(())
    }

    fn keep(&mut self, sequence: SequenceId, tokens: &[u32]) -> SequenceId {
        self.slots.push(Slot { sequence, tokens: tokens.to_vec(), busy: true, last_used: self.clock });
        sequence
    }
}

/// How many tokens both begin with.
pub(super) fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}
