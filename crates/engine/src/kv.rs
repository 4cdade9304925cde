//! A paged KV cache, for engines that keep keys and values themselves.
//!
//! A sequence is a list of blocks of [`BLOCK`] positions. Appending fills the last block and adds new ones, so nothing is
//! ever moved. A fork shares its full blocks with its source and copies a block only when it writes to it. A block has the
//! keys and values of all layers (10 MB of f32 for BitNet 2B4T), which keeps the bookkeeping to one list for each
//! sequence. How a block lays them out is defined in [`ternion_kernels::kv`].
//!
//! Keys and values are rounded to the cache's [`KvType`] when they are written and never again: a prefix that is kept or
//! shared, and a prompt in chunks, give the same bits as a prompt that is computed whole.

use std::{
    collections::{BTreeMap, TryReserveError},
    ops::Range,
    sync::Arc,
};

use ternion_kernels::kv::{self as layout, KvBlock};
pub use ternion_kernels::kv::{BLOCK, Factors, KeyRotation, KvBlocks, KvLayout, KvType};

use crate::{KvForm, SequenceId, batch::no_such};
use ternion_core::{Error, ErrorKind, Result};

#[derive(Default)]
struct Sequence {
    blocks: Vec<Arc<KvBlock>>,
    length: usize,
}

/// Keys and values of successive blocks of a sequence, outside of the model. Blocks of a [`KvCache`] are shared with it, so a clone is
/// cheap, and the sequence may go on.
#[derive(Clone)]
pub struct KvPrefix {
    form: KvForm,
    blocks: Vec<SavedBlock>,
}

/// The keys and values of [`BLOCK`] tokens.
#[derive(Clone)]
pub(crate) enum SavedBlock {
    Paged(Arc<KvBlock>),
    Opaque(Arc<[u8]>),
}

impl SavedBlock {
    /// Its bytes.
    pub(crate) fn parts(&self) -> [&[u8]; 4] {
        match self {
            Self::Paged(block) => block.parts(),
            Self::Opaque(bytes) => [bytes, &[], &[], &[]],
        }
    }
}

impl KvPrefix {
    /// Blocks of this form.
    pub(crate) fn new(form: KvForm, blocks: Vec<SavedBlock>) -> Self {
        Self { form, blocks }
    }

    /// Blocks of bytes that an engine understands.
    ///
    /// # Errors
    /// [`Backend`](ErrorKind::Backend) where they are not equally long.
    pub fn opaque(bytes: u64, blocks: Vec<Arc<[u8]>>) -> Result<Self> {
        if let Some(other) = blocks.iter().find(|block| block.len() as u64 != bytes) {
            return Err(Error::backend(format!(
                "a block of {} bytes of keys and values, expected {bytes}",
                other.len()
            )));
        }
        Ok(Self::new(KvForm::Opaque { bytes }, blocks.into_iter().map(SavedBlock::Opaque).collect()))
    }

    /// Tokens in it, a multiple of [`BLOCK`].
    pub fn tokens(&self) -> usize {
        self.blocks.len() * BLOCK
    }

    /// The blocks of [`opaque`](Self::opaque), the first positions first.
    ///
    /// # Errors
    /// [`Backend`](ErrorKind::Backend) for blocks of another form or length.
    pub fn opaque_blocks(&self, bytes: u64) -> Result<Vec<&[u8]>> {
        let mut found = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            match block {
                SavedBlock::Opaque(own) if own.len() as u64 == bytes => found.push(&own[..]),
                _ => return Err(other_form()),
            }
        }
        Ok(found)
    }

    /// Keeps the first blocks alone.
    pub(crate) fn truncate(&mut self, blocks: usize) {
        self.blocks.truncate(blocks);
    }

    /// Its blocks, the first positions first.
    pub(crate) fn blocks(&self) -> &[SavedBlock] {
        &self.blocks
    }
}

fn other_form() -> Error {
    Error::backend("the saved keys and values have another form than those of the model")
}

/// The KV caches of all sequences.
pub struct KvCache {
    layout: KvLayout,
    kv_type: KvType,
    sequences: BTreeMap<SequenceId, Sequence>,
    next: u32,
}

impl KvCache {
    /// A cache without sequences.
    pub fn new(layout: KvLayout, kv_type: KvType) -> Self {
        Self { layout, kv_type, sequences: BTreeMap::new(), next: 0 }
    }

    /// Whether there is such a layer, with such heads.
    pub fn has(&self, layer: usize, kv_heads: usize, head_dim: usize) -> bool {
        let own = &self.layout;
        layer < own.layers && (kv_heads, head_dim) == (own.kv_heads, own.head_dim)
    }

    /// How keys and values are stored.
    pub fn kv_type(&self) -> KvType {
        self.kv_type
    }

    /// The shape of keys and values.
    pub fn layout(&self) -> KvLayout {
        self.layout
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

    /// Some blocks of a sequence, as far as they are full.
    ///
    /// # Errors
    /// If `id` does not exist.
    pub fn prefix(&self, id: SequenceId, blocks: Range<usize>) -> Result<KvPrefix> {
        let source = self.sequences.get(&id).ok_or_else(|| no_such(id))?;
        let end = blocks.end.min(source.length / BLOCK);
        let blocks = &source.blocks[blocks.start.min(end)..end];
        let form = KvForm::Paged { layout: self.layout, kv_type: self.kv_type };
        Ok(KvPrefix::new(form, blocks.iter().cloned().map(SavedBlock::Paged).collect()))
    }

    /// A new sequence that begins with a prefix.
    ///
    /// # Errors
    /// [`Backend`](ErrorKind::Backend) if the prefix is of a cache with another layout or type.
    pub fn adopt(&mut self, prefix: KvPrefix) -> Result<SequenceId> {
        let own = KvForm::Paged { layout: self.layout, kv_type: self.kv_type };
        let length = prefix.tokens();
        let of_one = |block| match block {
            SavedBlock::Paged(block) if prefix.form == own => Ok(block),
            _ => Err(other_form()),
        };
        let blocks = prefix.blocks.into_iter().map(of_one).collect::<Result<_>>()?;
        Ok(self.insert(Sequence { blocks, length }))
    }

    /// Removes a sequence; nothing happens if it does not exist.
    pub fn free(&mut self, id: SequenceId) {
        self.sequences.remove(&id);
    }

    /// Makes room for `count` more positions and sees to it that they may be written to.
    ///
    /// # Errors
    /// If `id` does not exist; [`ResourceExhausted`](ternion_core::ErrorKind::ResourceExhausted) without memory.
    pub fn reserve(&mut self, id: SequenceId, count: usize) -> Result<()> {
        let s = self.sequences.get_mut(&id).ok_or_else(|| no_such(id))?;
        let first = s.length / BLOCK;
        if let Some(partial) = s.blocks.get_mut(first)
            && Arc::get_mut(partial).is_none()
        {
            *partial = Arc::new(partial.try_clone().map_err(no_memory)?);
        }
        while s.blocks.len() * BLOCK < s.length + count {
            s.blocks.push(Arc::new(KvBlock::new(&self.layout, self.kv_type).map_err(no_memory)?));
        }
        Ok(())
    }

    /// Counts `count` positions that have been written in every layer.
    pub fn advance(&mut self, id: SequenceId, count: usize) {
        if let Some(s) = self.sequences.get_mut(&id) {
            s.length += count;
        }
    }

    /// Writes the keys and values of new positions, `[count, kv_heads, head_dim]` each, behind those in use. The work is
    /// divided over the [`Team`](ternion_kernels::Team) of the caller. [`reserve`](Self::reserve) must have made room.
    ///
    /// # Errors
    /// If `id` does not exist or has no room, or if there is no such layer.
    pub fn write(&mut self, id: SequenceId, layer: usize, keys: &[f32], values: &[f32]) -> Result<()> {
        if self.kv_type == KvType::Exact {
            return Err(Error::backend("keys and values without their factors for a cache of sums"));
        }
        self.write_with(id, layer, keys, values, |blocks, place| {
            layout::append(blocks, layer, place, keys, values);
        })
    }

    /// [`write`](Self::write) for a cache of [`KvType::Exact`]: sums times factors, keys without their rotary embedding, and
    /// one factor for each position.
    ///
    /// # Errors
    /// As [`write`](Self::write), and for a cache of another type or another number of factors.
    pub fn write_sums(
        &mut self,
        id: SequenceId,
        layer: usize,
        (keys, values): (&[f32], &[f32]),
        factors: Factors<'_>,
    ) -> Result<()> {
        let positions = keys.len() / (self.layout.kv_heads * self.layout.head_dim).max(1);
        if self.kv_type != KvType::Exact
            || [factors.keys, factors.values].iter().any(|f| f.len() != positions)
        {
            return Err(Error::backend(format!(
                "sums with {} and {} factors for {positions} positions in {}",
                factors.keys.len(),
                factors.values.len(),
                self.kv_type
            )));
        }
        self.write_with(id, layer, keys, values, |blocks, place| {
            layout::append_sums(blocks, layer, place, (keys, values), factors);
        })
    }

    fn write_with(
        &mut self,
        id: SequenceId,
        layer: usize,
        keys: &[f32],
        values: &[f32],
        append: impl FnOnce(&mut [&mut KvBlock], usize),
    ) -> Result<()> {
        let s = self.sequences.get_mut(&id).ok_or_else(|| no_such(id))?;
        let width = self.layout.kv_heads * self.layout.head_dim;
        let count = keys.len() / width;
        if keys.len() != count * width || values.len() != keys.len() || layer >= self.layout.layers {
            return Err(Error::backend(format!(
                "{} keys and {} values for layer {layer}; multiples of {width} expected",
                keys.len(),
                values.len()
            )));
        }
        let end = s.length + count;
        let first = s.length / BLOCK;
        let blocks = s.blocks.get_mut(first..end.div_ceil(BLOCK)).ok_or_else(|| no_room(id))?;
        let mut blocks: Vec<&mut KvBlock> =
            blocks.iter_mut().map(Arc::get_mut).collect::<Option<_>>().ok_or_else(|| no_room(id))?;
        append(&mut blocks, s.length % BLOCK);
        Ok(())
    }

    /// The keys and the values of one layer, block by block.
    ///
    /// # Errors
    /// If `id` does not exist.
    pub fn layer(&self, id: SequenceId, layer: usize) -> Result<KvBlocks<'_>> {
        let s = self.sequences.get(&id).ok_or_else(|| no_such(id))?;
        Ok(layout::kv_blocks(s.blocks.iter().map(AsRef::as_ref), &self.layout, self.kv_type, layer))
    }
}

fn no_memory(error: TryReserveError) -> Error {
    Error::new(ErrorKind::ResourceExhausted, "no memory for another block of the KV cache").with_source(error)
}

fn no_room(id: SequenceId) -> Error {
    Error::backend(format!("sequence {} has no room reserved", id.0))
}

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::*;

    const LAYOUT: KvLayout = KvLayout { layers: 2, kv_heads: 2, head_dim: 2 };
    const TYPES: [KvType; 3] = [KvType::F32, KvType::F16, KvType::Int8];

    /// Appends positions whose keys are their numbers plus `tag`, plus a part of 1 for each dimension.
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

    /// Key and value of layer 1 at a position, in head 1, dimension 0 or 1.
    fn element(cache: &KvCache, id: SequenceId, position: usize, d: usize) -> (f32, f32) {
        let (block, place) = (position / BLOCK, position % BLOCK);
        let (key_at, value_at) = ((2 + d) * BLOCK + place, (BLOCK + place) * 2 + d);
        match cache.layer(id, 1).unwrap() {
            KvBlocks::F32 { keys, values } => (keys[block][key_at], values[block][value_at]),
            KvBlocks::F16 { keys, values } => (
                f16::from_bits(keys[block][key_at]).to_f32(),
                f16::from_bits(values[block][value_at]).to_f32(),
            ),
            KvBlocks::Int8 { keys, values } => {
                let ((keys, key_scales), (values, value_scales)) = (keys[block], values[block]);
                let key = keys[(BLOCK + place) * 2 + d];
                let value = values[(BLOCK + place / 2 * 2 + d) * 2 + place % 2];
                (f32::from(key) * key_scales[BLOCK + place], f32::from(value) * value_scales[BLOCK + place])
            }
            KvBlocks::Sums { .. } => unreachable!("not among the types"),
        }
    }

    /// The same of dimension 0.
    fn at(cache: &KvCache, id: SequenceId, position: usize) -> (f32, f32) {
        element(cache, id, position, 0)
    }

    /// What rounding may change at most of numbers up to `largest`.
    fn close(kv_type: KvType, found: f32, expected: f32, largest: f32) -> bool {
        let step = match kv_type {
            KvType::F32 => 0.0,
            KvType::F16 => expected.abs() / 2048.0,
            _ => largest / 253.9,
        };
        (found - expected).abs() <= step
    }

    #[test]
    fn positions_keep_their_place_however_they_are_appended() {
        for kv_type in TYPES {
            let mut cache = KvCache::new(LAYOUT, kv_type);
            let id = cache.create();
            for count in [1, 62, 1, 1, 100, 3] {
                append(&mut cache, id, count, 0.0);
            }
            assert_eq!(cache.length(id), Some(168));
            for position in [0, 1, 63, 64, 127, 128, 167] {
                for d in 0..2 {
                    let expected = position as f32 + 0.5 + 0.25 * d as f32;
                    let (key, value) = element(&cache, id, position, d);
                    let largest = expected + 1.25;
                    assert!(close(kv_type, key, expected, largest), "{kv_type:?} {position}: {key}");
                    assert!(close(kv_type, value, -expected - 1.0, largest), "{kv_type:?}: {value}");
                }
            }
        }
    }

    #[test]
    fn a_fork_shares_until_it_writes() {
        for kv_type in TYPES {
            let mut cache = KvCache::new(LAYOUT, kv_type);
            let source = cache.create();
            append(&mut cache, source, 100, 0.0);
            let before = at(&cache, source, 70);
            let fork = cache.fork(source, 70).unwrap();
            let shared = |cache: &KvCache, block: usize| {
                Arc::ptr_eq(&cache.sequences[&source].blocks[block], &cache.sequences[&fork].blocks[block])
            };
            assert!(shared(&cache, 0) && shared(&cache, 1));
            append(&mut cache, fork, 5, 1000.0);
            assert!(shared(&cache, 0) && !shared(&cache, 1));
            assert_eq!(at(&cache, fork, 69), at(&cache, source, 69));
            assert!(at(&cache, fork, 70).0 > 1066.0);
            assert_eq!(at(&cache, source, 70), before);
            let kept = at(&cache, fork, 10);
            cache.free(source);
            assert_eq!(at(&cache, fork, 10), kept);
            assert_eq!((cache.sequences(), cache.length(source)), (1, None));
        }
    }

    #[test]
    fn truncation_frees_whole_blocks_and_goes_on() {
        for kv_type in TYPES {
            let mut cache = KvCache::new(LAYOUT, kv_type);
            let id = cache.create();
            append(&mut cache, id, 130, 0.0);
            let before = at(&cache, id, 63);
            cache.truncate(id, 64);
            assert_eq!(cache.sequences[&id].blocks.len(), 1);
            append(&mut cache, id, 2, 500.0);
            assert_eq!(at(&cache, id, 63), before);
            assert!(close(kv_type, at(&cache, id, 65).0, 565.5, 565.75));
            cache.truncate(id, 0);
            assert!(cache.sequences[&id].blocks.is_empty());
            cache.truncate(id, 10);
            assert_eq!(cache.length(id), Some(0));
        }
    }

    #[test]
    fn writing_without_room_is_an_error() {
        let mut cache = KvCache::new(LAYOUT, KvType::Int8);
        let id = cache.create();
        assert!(cache.write(id, 0, &[0.0; 4], &[0.0; 4]).is_err());
        assert!(cache.write(SequenceId(99), 0, &[0.0; 4], &[0.0; 4]).is_err());
        let sums = |cache: &mut KvCache, id, factors: &[f32]| {
            cache.write_sums(id, 0, (&[1.0; 4], &[1.0; 4]), Factors { keys: &[1.0], values: factors })
        };
        assert!(sums(&mut cache, id, &[1.0]).is_err());
        let mut exact = KvCache::new(LAYOUT, KvType::Exact);
        let id = exact.create();
        assert!(sums(&mut exact, id, &[1.0]).is_err());
        exact.reserve(id, 1).unwrap();
        assert!(exact.write(id, 0, &[0.0; 4], &[0.0; 4]).is_err());
        assert!(sums(&mut exact, id, &[1.0, 1.0]).is_err());
        sums(&mut exact, id, &[1.0]).unwrap();
    }

    #[test]
    fn sizes_are_those_that_are_allocated() {
        let layout = KvLayout { layers: 30, kv_heads: 5, head_dim: 128 };
        let of = |kv_type| layout.bytes_per_position(kv_type);
        assert_eq!(TYPES.map(of), [153_600, 76_800, 39_600]);
        assert_eq!(TYPES.map(|t| t.to_string()), ["f32", "f16", "int8"]);
        assert_eq!(layout.bytes(KvType::Int8, 65), 128 * 39_600);
        assert_eq!(of(KvType::Exact), 30 * 2 * 5 * (3 * 128 + 5));
        for kv_type in TYPES.into_iter().chain([KvType::Exact]) {
            let bytes = KvBlock::new(&LAYOUT, kv_type).unwrap().bytes();
            assert_eq!(bytes as u64, LAYOUT.bytes(kv_type, 1));
        }
    }

    /// The elements of one head of a fresh cache.
    fn stored(kv_type: KvType, key: [f32; 2]) -> [f32; 2] {
        let mut cache = KvCache::new(LAYOUT, kv_type);
        let id = cache.create();
        cache.reserve(id, 1).unwrap();
        cache.write(id, 1, &[0.0, 0.0, key[0], key[1]], &[1.0; 4]).unwrap();
        cache.advance(id, 1);
        [0, 1].map(|d| element(&cache, id, 0, d).0)
    }

    #[test]
    fn what_no_type_can_hold_is_seen_and_the_rest_is_kept_in_range() {
        assert_eq!(stored(KvType::F16, [1e6, -1e6]), [65504.0, -65504.0]);
        assert_eq!(stored(KvType::F16, [f32::INFINITY, 1.0]), [f32::INFINITY, 1.0]);
        assert!(stored(KvType::F16, [f32::NAN, 1.0])[0].is_nan());
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(stored(KvType::Int8, [broken, 1.0]).iter().all(|x| x.is_nan()), "{broken}");
        }
        assert_eq!(stored(KvType::Int8, [0.0, 0.0]), [0.0, 0.0]);
        assert_eq!(stored(KvType::Int8, [1e-38, -1e-38]), [0.0, 0.0]);
        let [large, _] = stored(KvType::Int8, [3e38, 1.0]);
        assert!(large.is_finite() && large > 2.99e38);
    }

    proptest! {
        #[test]
        fn int8_is_within_half_a_step(a in -1e4f32..1e4, b in -1e4f32..1e4) {
            let largest = a.abs().max(b.abs());
            let [x, y] = stored(KvType::Int8, [a, b]);
            prop_assert!(close(KvType::Int8, x, a, largest) && close(KvType::Int8, y, b, largest));
        }

        /// Appending in any parts, with forks and truncations in between, leaves the same bits.
        #[test]
        fn parts_make_the_same_cache(cuts in proptest::collection::vec(1usize..90, 1..6), back in 0usize..40) {
            for kv_type in TYPES {
                let total: usize = cuts.iter().sum();
                let mut cache = KvCache::new(LAYOUT, kv_type);
                let whole = cache.create();
                append(&mut cache, whole, total, 0.0);
                let mut id = cache.create();
                for count in &cuts {
                    append(&mut cache, id, *count, 0.0);
                    let length = cache.length(id).unwrap();
                    let fork = cache.fork(id, length - back.min(length)).unwrap();
                    append(&mut cache, fork, back.min(length), 0.0);
                    cache.free(id);
                    id = fork;
                }
                for position in 0..total {
                    for d in 0..2 {
                        prop_assert_eq!(element(&cache, id, position, d), element(&cache, whole, position, d));
                    }
                }
            }
        }
    }
}
