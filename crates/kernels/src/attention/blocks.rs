//! What attention asks of each type of the KV cache.

use std::{cell::RefCell, ops::Range};

use super::{
    Attention, VECTORS,
    softmax::{self, Row},
};
use crate::{
    kv::{BLOCK, Int8Block, KvBlocks, SumBlock},
    lanes::{LANES, Lanes},
    vector::Vector,
};

impl KvBlocks<'_> {
    /// Whether there are at least `count` blocks, of the right lengths.
    pub(super) fn are(&self, count: usize, kv_heads: usize, head_dim: usize) -> bool {
        let plane = kv_heads * BLOCK * head_dim;
        match self {
            Self::F32 { keys, values } => {
                [keys, values].iter().all(|s| s.len() >= count && s.iter().all(|b| b.len() == plane))
            }
            Self::F16 { keys, values } => {
                [keys, values].iter().all(|s| s.len() >= count && s.iter().all(|b| b.len() == plane))
            }
            Self::Int8 { keys, values } => {
                let fits = |b: &Int8Block<'_>| b.0.len() == plane && b.1.len() == kv_heads * BLOCK;
                head_dim.is_multiple_of(2)
                    && [keys, values].iter().all(|s| s.len() >= count && s.iter().all(fits))
            }
            Self::Sums { keys, values, rotations } => {
                let positions = kv_heads * BLOCK;
                let fits = |b: &SumBlock<'_>| {
                    (b.low.len(), b.high.len()) == (plane, plane)
                        && (b.factors.len(), b.wide.len()) == (positions, positions)
                };
                head_dim.is_multiple_of(2)
                    && [keys, values].iter().all(|s| s.len() >= count && s.iter().all(fits))
                    && rotations.len() >= count
                    && rotations[..count].iter().all(|r| r.pairs() == head_dim / 2)
            }
        }
    }
}

/// A head of keys and values in a block.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) block: usize,
    pub(super) head: usize,
    /// Whether to prefetch the same place of the next block, which the hardware's own prefetching does not know.
    pub(super) ahead: bool,
}

/// The two products of an attention with the blocks of a type.
pub(super) trait Blocks: Copy {
    /// What a query becomes before it is multiplied with keys.
    type Query<'a>;

    fn query<V: Vector>(q: &[f32]) -> Self::Query<'_>;

    /// The products of the queries with all keys of a head in a block.
    fn scores<V: Vector, const R: usize>(
        self,
        place: Place,
        queries: &[Self::Query<'_>; R],
    ) -> [[V; VECTORS]; R];

    /// `out = out * correction + weights * values`, over the first `visible` positions of a block. Weights are 0 behind those
    /// that a row sees.
    fn weigh<V: Vector, const R: usize>(
        self,
        place: Place,
        weights: &[[f32; BLOCK]; R],
        correction: &[f32; R],
        visible: usize,
        out: &mut [&mut [f32]; R],
    );
}

/// Keys and values that rows go through segment by segment.
pub(super) trait Source: Copy {
    /// What a query becomes before it is multiplied with keys.
    type Query<'a>;

    fn query<V: Vector>(q: &[f32]) -> Self::Query<'_>;

    /// Adds what some blocks give to rows, which are in the order of their lengths.
    fn segment<V: Vector>(
        self,
        shape: &Attention,
        head: usize,
        blocks: Range<usize>,
        rows: &mut [Row<'_>],
        queries: &[Self::Query<'_>],
    );
}

thread_local! {
    /// Keys and values of a block of one head.
    static FLOATS: RefCell<Vec<Lanes>> = const { RefCell::new(Vec::new()) };
}

/// Room for the keys and the values of a block, `plane` floats each, which [`put_floats`] gives back.
pub(super) fn take_floats(plane: usize) -> Vec<Lanes> {
    let mut floats = FLOATS.take();
    if floats.len() < 2 * plane / LANES {
        floats.resize(2 * plane / LANES, [0.0; LANES]);
    }
    floats
}

/// Keeps the room for the thread's next block.
pub(super) fn put_floats(floats: Vec<Lanes>) {
    FLOATS.set(floats);
}

/// The blocks of `blocks` that the longest row reaches.
pub(super) fn reached(blocks: Range<usize>, rows: &[Row<'_>]) -> Range<usize> {
    let longest = rows.last().map_or(0, |row| row.length);
    blocks.start..blocks.end.min(longest.div_ceil(BLOCK))
}

/// Blocks that are multiplied as they are. Each is read from memory once for all rows.
#[derive(Clone, Copy)]
pub(super) struct Direct<B>(pub(super) B);

impl<B: Blocks> Source for Direct<B> {
    type Query<'a> = B::Query<'a>;

    #[inline(always)]
    fn query<V: Vector>(q: &[f32]) -> B::Query<'_> {
        B::query::<V>(q)
    }

    #[inline(always)]
    fn segment<V: Vector>(
        self,
        shape: &Attention,
        head: usize,
        blocks: Range<usize>,
        rows: &mut [Row<'_>],
        queries: &[B::Query<'_>],
    ) {
        for block in reached(blocks, rows) {
            let place = Place { block, head, ahead: true };
            softmax::block::<V, B>(shape.scale, self.0, place, block * BLOCK, rows, queries);
        }
    }
}
