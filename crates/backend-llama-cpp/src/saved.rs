//! Blocks of the KV cache outside of llama.cpp, for the prompt cache.
//!
//! llama.cpp writes the state of a whole sequence alone, and reading one empties the sequence first. So a block passes through a
//! sequence of its own, which shares cells with the one that is meant: nothing is copied within the cache.
//!
//! The state begins with the places of its cells:
//!
//! ```text
//! magic, sequence, streams (1), cells; for each cell its position, its sequences (1) and their ids
//! ```
//!
//! all of 32 bits; what follows are types, sizes and the rows of each layer. A block on the disk is not trusted, so only what follows
//! is kept: the beginning is written anew when it is read, and llama.cpp compares types and sizes with its own.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use ternion_core::{Error, Result};
use ternion_engine::{CausalLm, KvIdentity, LogitsWanted, SequenceInput, kv::BLOCK, kv::KvPrefix};
use ternion_formats::FileWatch;

use crate::{LlamaCpp, ffi::Context};

/// What a model's saved blocks look like, and what they depend on.
#[derive(Debug, Default)]
pub(crate) struct Saved {
    /// llama.cpp's magic number of a sequence's state.
    magic: [u8; 4],
    /// Bytes of a block without the places of its cells; 0 where blocks are not saved.
    pub(crate) bytes: usize,
    /// Files of weights.
    pub(crate) files: Vec<PathBuf>,
    /// What else keys and values depend on, in words.
    pub(crate) facts: String,
}

impl Saved {
    /// What keys and values depend on, in blocks of `unit` tokens.
    ///
    /// # Errors
    /// Without a prompt cache, or where a file cannot be read.
    pub(crate) fn identity(&self, unit: usize) -> Result<KvIdentity> {
        if self.bytes == 0 {
            return Err(Error::unsupported("the model was loaded without `prompt_cache`"));
        }
        let mut hash = Sha256::new_with_prefix(&self.facts);
        hash.update(FileWatch::open(&self.files)?.fingerprint());
        Ok(KvIdentity::opaque(self.bytes as u64, hash.finalize().into()).with_unit(unit))
    }

    /// The beginning of a state: where its cells are.
    fn places(&self, sequence: i32, positions: Range<usize>) -> Vec<u8> {
        let head = [sequence, 1, positions.len() as i32];
        let cells = positions.flat_map(|position| [position as i32, 1, sequence]);
        let numbers = head.into_iter().chain(cells).flat_map(i32::to_ne_bytes);
        self.magic.into_iter().chain(numbers).collect()
    }
}

impl LlamaCpp {
    /// Finds out what saved blocks look like, from two tokens that are saved and restored.
    ///
    /// # Errors
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for a model whose blocks cannot be taken apart.
    pub(crate) fn keep_prompts(&mut self) -> Result<()> {
        let cannot = |why: &str| Error::unsupported(format!("prompt_cache: {why}; leave it out"));
        if !self.can_truncate() {
            return Err(cannot("the model keeps a state rather than keys and values"));
        }
        if self.context().window() > 0 {
            return Err(cannot(
                "layers of the model look back a few tokens alone, and keep no more of a prompt",
            ));
        }
        let first = self.new_sequence()?;
        self.forward(&[SequenceInput::new(first, &[0, 0], LogitsWanted::None)], &mut Vec::new())?;
        let passing = self.context().passing()?;
        let [one, two] = [1, 2].map(|count| self.context().save(first.0, 0..count));
        let (one, two) = (one?, two?);
        let mut saved = std::mem::take(self.saved());
        saved.magic = one.first_chunk().copied().unwrap_or_default();
        let empty = saved.places(passing, 0..0).len();
        let places = saved.places(passing, 0..2);
        let each = two.len().checked_sub(one.len()).filter(|each| *each > 12);
        let is_known = two.starts_with(&places) && one.starts_with(&saved.places(passing, 0..1));
        let fixed = each.and_then(|each| two.len().checked_sub(empty + 2 * each));
        let (Some(each), Some(fixed), true) = (each, fixed, is_known) else {
            return Err(cannot("llama.cpp saves the model's keys and values in a form that is not known"));
        };
        saved.bytes = fixed + BLOCK * (each - (places.len() - empty) / 2);
        *self.saved() = saved;
        let second = self.new_sequence().or_else(|_| {
            self.free(first);
            self.new_sequence()
        })?;
        self.context().restore(second.0, 0..2, &two)?;
        let again = self.context().save(second.0, 0..2)?;
        self.context().remove(second.0, 0);
        self.free(first);
        self.free(second);
        if again == two { Ok(()) } else { Err(cannot("llama.cpp does not restore what it saves")) }
    }
}

/// The keys and values of some blocks of a sequence.
pub(crate) fn take(
    context: &mut Context,
    saved: &Saved,
    sequence: u32,
    blocks: Range<usize>,
) -> Result<KvPrefix> {
    let passing = context.passing()?;
    let mut taken: Vec<Arc<[u8]>> = Vec::with_capacity(blocks.len());
    for block in blocks {
        let positions = block * BLOCK..(block + 1) * BLOCK;
        let state = context.save(sequence, positions.clone())?;
        let rest = state.strip_prefix(&saved.places(passing, positions)[..]);
        let rest = rest.ok_or_else(|| Error::backend("llama.cpp has saved other tokens than it was told"))?;
        taken.push(rest.into());
    }
    KvPrefix::opaque(saved.bytes as u64, taken)
}

/// Appends blocks to a sequence, which is empty. After an error it holds some of them.
pub(crate) fn put(context: &mut Context, saved: &Saved, sequence: u32, prefix: &KvPrefix) -> Result<()> {
    let passing = context.passing()?;
    for (block, bytes) in prefix.opaque_blocks(saved.bytes as u64)?.into_iter().enumerate() {
        let positions = block * BLOCK..(block + 1) * BLOCK;
        let state = [&saved.places(passing, positions.clone()), bytes].concat();
        context.restore(sequence, positions, &state)?;
    }
    Ok(())
}
