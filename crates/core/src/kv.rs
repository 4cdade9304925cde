//! A paged KV cache, for engines that keep keys and values themselves.
//!
//! A sequence is a list of blocks of [`BLOCK`] positions. Appending fills the last block and adds new ones, so nothing
//! is ever moved; a fork shares its full blocks with its source and copies one only when it writes to it. A block
//! has the keys and values of all layers (10 MB for BitNet 2B4T), which keeps the bookkeeping to one list per sequence.

use std::{collections::BTreeMap, sync::Arc};

use crate::{Error, ErrorKind, Result, SequenceId, batch::no_such};

/// Positions in a block. `ternion_kernels::attention` takes blocks of the same size.
pub const BLOCK: usize = 64;

/// What a block holds for each position.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Decoder layers.
    pub layers: usize,
    /// Heads of keys and values in each.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Layout {
    /// Floats of the keys, or of the values, of one layer.
    fn plane(&self) -> usize {
        self.kv_heads * BLOCK * self.head_dim
    }
}

/// The keys and values of [`BLOCK`] positions: for each layer the keys `[kv_heads, head_dim, BLOCK]`, then the values
/// `[kv_heads, BLOCK, head_dim]`, as `ternion_kernels::attention` takes them.
type Block = Vec<f32>;

/// The keys, or the values, of one layer: a part of each block.
pub type Planes<'a> = Vec<&'a [f32]>;

#[derive(Default)]
struct Sequence {
    blocks: Vec<Arc<Block>>,
    length: usize,
}

/// The KV caches of all sequences.
pub struct KvCache {
    layout: Layout,
    sequences: BTreeMap<SequenceId, Sequence>,
    next: u32,
}

impl KvCache {
    /// A cache without sequences.
    pub fn new(layout: Layout) -> Self {
        Self { layout, sequences: BTreeMap::new(), next: 0 }
    }

    /// Whether there is such a layer, with such heads.
    pub fn has(&self, layer: usize, kv_heads: usize, head_dim: usize) -> bool {
        let own = &self.layout;
        layer < own.layers && (kv_heads, head_dim) == (own.kv_heads, own.head_dim)
    }

    /// How many sequences there are.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Makes an empty sequence.
    pub fn create(&mut self) -> SequenceId {
        self.insert(Sequence::default())
    }

    fn insert(&mut self, sequence: Sequence) -> SequenceId {
        while self.sequences.contains_key(&SequenceId(self.next)) {
            self.next = self.next.wrapping_add(1);
        }
        let id = SequenceId(self.next);
        self.next = self.next.wrapping_add(1);
        self.sequences.insert(id, sequence);
        id
    }

    /// Positions in use; `None` for a sequence that does not exist.
    pub fn length(&self, id: SequenceId) -> Option<usize> {
        self.sequences.get(&id).map(|s| s.length)
    }

    /// Forgets the positions from `length` on, if there are any.
    pub fn truncate(&mut self, id: SequenceId, length: usize) {
        if let Some(s) = self.sequences.get_mut(&id) {
            s.length = s.length.min(length);
            s.blocks.truncate(s.length.div_ceil(BLOCK));
        }
    }

    /// A new sequence that shares the first `length` positions of `id`.
    ///
    /// # Errors
    /// If `id` does not exist.
    pub fn fork(&mut self, id: SequenceId, length: usize) -> Result<SequenceId> {
        let source = self.sequences.get(&id).ok_or_else(|| no_such(id))?;
        let length = length.min(source.length);
        let blocks = source.blocks[..length.div_ceil(BLOCK)].to_vec();
        Ok(self.insert(Sequence { blocks, length }))
    }

    /// Removes a sequence; nothing happens if it does not exist.
    pub fn free(&mut self, id: SequenceId) {
        self.sequences.remove(&id);
    }

    /// Makes room for `count` more positions and sees to it that they may be written to.
    ///
    /// # Errors
    /// If `id` does not exist; [`ResourceExhausted`](ErrorKind::ResourceExhausted) without memory.
    pub fn reserve(&mut self, id: SequenceId, count: usize) -> Result<()> {
        let floats = 2 * self.layout.layers * self.layout.plane();
        let s = self.sequences.get_mut(&id).ok_or_else(|| no_such(id))?;
        let first = s.length / BLOCK;
        if let Some(partial) = s.blocks.get_mut(first)
            && Arc::get_mut(partial).is_none()
        {
            let mut own = allocate(floats)?;
            own.copy_from_slice(partial);
            *partial = Arc::new(own);
        }
        while s.blocks.len() * BLOCK < s.length + count {
            s.blocks.push(Arc::new(allocate(floats)?));
        }
        Ok(())
    }

    /// Counts `count` positions that have been written in every layer.
    pub fn advance(&mut self, id: SequenceId, count: usize) {
        if let Some(s) = self.sequences.get_mut(&id) {
            s.length += count;
        }
    }

    /// Writes the keys and values of new positions, `[count, kv_heads, head_dim]` each, behind those in use.
    /// [`reserve`](Self::reserve) must have made room.
    ///
    /// # Errors
    /// If `id` does not exist or has no room.
    pub fn write(&mut self, id: SequenceId, layer: usize, keys: &[f32], values: &[f32]) -> Result<()> {
        let Layout { kv_heads, head_dim, .. } = self.layout;
        let plane = self.layout.plane();
        let s = self.sequences.get_mut(&id).ok_or_else(|| no_such(id))?;
        let rows = keys.chunks_exact(kv_heads * head_dim).zip(values.chunks_exact(kv_heads * head_dim));
        for (i, (key, value)) in rows.enumerate() {
            let position = s.length + i;
            let block =
                s.blocks.get_mut(position / BLOCK).and_then(Arc::get_mut).ok_or_else(|| no_room(id))?;
            let (k, v) = block[2 * layer * plane..][..2 * plane].split_at_mut(plane);
            for head in 0..kv_heads {
                let from = head * head_dim..(head + 1) * head_dim;
                let column = k[head * head_dim * BLOCK + position % BLOCK..].iter_mut().step_by(BLOCK);
                column.zip(&key[from.clone()]).for_each(|(place, x)| *place = *x);
                let at = (head * BLOCK + position % BLOCK) * head_dim;
                v[at..at + head_dim].copy_from_slice(&value[from]);
            }
        }
        Ok(())
    }

    /// The keys and the values of one layer, block by block.
    ///
    /// # Errors
    /// If `id` does not exist.
    pub fn layer(&self, id: SequenceId, layer: usize) -> Result<(Planes<'_>, Planes<'_>)> {
        let plane = self.layout.plane();
        let s = self.sequences.get(&id).ok_or_else(|| no_such(id))?;
        Ok(s.blocks.iter().map(|block| block[2 * layer * plane..][..2 * plane].split_at(plane)).unzip())
    }
}

fn allocate(floats: usize) -> Result<Block> {
    let mut block = Vec::new();
    block.try_reserve_exact(floats).map_err(|e| {
        Error::new(ErrorKind::ResourceExhausted, format!("no memory for {} bytes of KV cache", floats * 4))
            .with_source(e)
    })?;
    block.resize(floats, 0.0);
    Ok(block)
}

fn no_room(id: SequenceId) -> Error {
    Error::backend(format!("sequence {} has no room reserved", id.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout { layers: 2, kv_heads: 2, head_dim: 2 };

    /// Appends positions whose keys are their numbers plus `tag`.
    fn append(cache: &mut KvCache, id: SequenceId, count: usize, tag: f32) {
        cache.reserve(id, count).unwrap();
        let start = cache.length(id).unwrap();
        for layer in 0..2 {
            let keys: Vec<f32> = (start..start + count)
                .flat_map(|p| [0.0, 0.25, 0.5, 0.75].map(|f| p as f32 + f + tag))
                .collect();
            let values: Vec<f32> = keys.iter().map(|k| -k - layer as f32).collect();
            cache.write(id, layer, &keys, &values).unwrap();
        }
        cache.advance(id, count);
    }

    /// The key of head 1, first dimension, at a position of layer 1, and the value there.
    fn at(cache: &KvCache, id: SequenceId, position: usize) -> (f32, f32) {
        let (keys, values) = cache.layer(id, 1).unwrap();
        let (block, place) = (position / BLOCK, position % BLOCK);
        (keys[block][2 * BLOCK + place], values[block][(BLOCK + place) * 2])
    }

    #[test]
    fn positions_keep_their_place_however_they_are_appended() {
        let mut cache = KvCache::new(LAYOUT);
        let id = cache.create();
        for count in [1, 62, 1, 1, 100, 3] {
            append(&mut cache, id, count, 0.0);
        }
        assert_eq!(cache.length(id), Some(168));
        for position in [0, 1, 63, 64, 127, 128, 167] {
            let key = position as f32 + 0.5;
            assert_eq!(at(&cache, id, position), (key, -key - 1.0));
        }
    }

    #[test]
    fn a_fork_shares_until_it_writes() {
        let mut cache = KvCache::new(LAYOUT);
        let source = cache.create();
        append(&mut cache, source, 100, 0.0);
        let fork = cache.fork(source, 70).unwrap();
        assert!(Arc::ptr_eq(&cache.sequences[&source].blocks[0], &cache.sequences[&fork].blocks[0]));
        append(&mut cache, fork, 5, 1000.0);
        assert!(Arc::ptr_eq(&cache.sequences[&source].blocks[0], &cache.sequences[&fork].blocks[0]));
        assert_eq!(at(&cache, fork, 69).0, 69.5);
        assert_eq!(at(&cache, fork, 70).0, 1070.5);
        assert_eq!(at(&cache, source, 70).0, 70.5);
        cache.free(source);
        assert_eq!(at(&cache, fork, 10).0, 10.5);
        assert_eq!((cache.sequences(), cache.length(source)), (1, None));
    }

    #[test]
    fn truncation_frees_whole_blocks_and_goes_on() {
        let mut cache = KvCache::new(LAYOUT);
        let id = cache.create();
        append(&mut cache, id, 130, 0.0);
        cache.truncate(id, 64);
        assert_eq!(cache.sequences[&id].blocks.len(), 1);
        append(&mut cache, id, 2, 500.0);
        assert_eq!((at(&cache, id, 63).0, at(&cache, id, 65).0), (63.5, 565.5));
        cache.truncate(id, 0);
        assert!(cache.sequences[&id].blocks.is_empty());
        cache.truncate(id, 10);
        assert_eq!(cache.length(id), Some(0));
    }

    #[test]
    fn writing_without_room_is_an_error() {
        let mut cache = KvCache::new(LAYOUT);
        let id = cache.create();
        assert!(cache.write(id, 0, &[0.0; 4], &[0.0; 4]).is_err());
        assert!(cache.write(SequenceId(99), 0, &[0.0; 4], &[0.0; 4]).is_err());
    }
}
