//! The softmax of attention, block by block with a running maximum.

use super::{
    BLOCK, VECTORS,
    blocks::{Blocks, Place},
};
use crate::{lanes::LANES, vector::Vector};

/// Pairs of a token and a head that are computed together.
pub(super) const TILE: usize = 4;

/// One query.
pub(super) struct Row<'a> {
    pub(super) q: &'a [f32],
    /// Values times weights so far.
    pub(super) out: &'a mut [f32],
    /// Positions that it sees.
    pub(super) length: usize,
    pub(super) sum: Softmax,
}

/// The sum of the weights so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Softmax {
    /// The largest score so far.
    pub(super) largest: f32,
    /// The sum, relative to that.
    pub(super) total: f32,
}

impl Softmax {
    pub(super) const EMPTY: Self = Self { largest: f32::NEG_INFINITY, total: 0.0 };

    /// Whether no position has been seen.
    fn is_empty(self) -> bool {
        self.total == 0.0 && self.largest == f32::NEG_INFINITY
    }
}

impl Row<'_> {
    /// The same row for a while.
    pub(super) fn borrow(&mut self) -> Row<'_> {
        Row { q: self.q, out: self.out, length: self.length, sum: self.sum }
    }

    /// Adds what other positions have given.
    #[inline(always)]
    pub(super) fn merge<V: Vector>(&mut self, out: &[f32], sum: Softmax) {
        if sum.is_empty() {
            return;
        }
        let largest = self.sum.largest.max(sum.largest);
        let own = V::splat(self.sum.largest - largest).exp_negative().lanes()[0];
        let other = V::splat(sum.largest - largest).exp_negative().lanes()[0];
        for (x, y) in self.out.iter_mut().zip(out) {
            *x = *x * own + y * other;
        }
        self.sum = Softmax { largest, total: self.sum.total * own + sum.total * other };
    }

    /// Divides by the sum of the weights.
    pub(super) fn finish(&mut self) {
        let factor = 1.0 / self.sum.total;
        self.out.iter_mut().for_each(|x| *x *= factor);
    }
}

/// What a block adds to rows, which are in the order of their lengths. `first` is the block's first position.
#[inline(always)]
pub(super) fn block<V: Vector, B: Blocks>(
    scale: f32,
    kv: B,
    place: Place,
    first: usize,
    rows: &mut [Row<'_>],
    queries: &[B::Query<'_>],
) {
    // While the first tile reads the block, it prefetches the next one.
    let mut place = place;
    let mut turn = || Place { ahead: std::mem::take(&mut place.ahead), ..place };
    let (tiles, rest) = rows.as_chunks_mut::<TILE>();
    let (tile_queries, rest_queries) = queries.as_chunks::<TILE>();
    for (rows, queries) in tiles.iter_mut().zip(tile_queries) {
        tile::<V, B, TILE>(scale, kv, turn(), first, rows, queries);
    }
    let (pairs, rest) = rest.as_chunks_mut::<2>();
    let (pair_queries, rest_queries) = rest_queries.as_chunks::<2>();
    for (rows, queries) in pairs.iter_mut().zip(pair_queries) {
        tile::<V, B, 2>(scale, kv, turn(), first, rows, queries);
    }
    for (row, query) in rest.iter_mut().zip(rest_queries) {
        let (row, query) = (std::array::from_mut(row), std::array::from_ref(query));
        tile::<V, B, 1>(scale, kv, turn(), first, row, query);
    }
}

#[inline(always)]
fn tile<V: Vector, B: Blocks, const R: usize>(
    scale: f32,
    kv: B,
    place: Place,
    first: usize,
    rows: &mut [Row<'_>; R],
    queries: &[B::Query<'_>; R],
) {
    let longest = rows[R - 1].length.saturating_sub(first).min(BLOCK);
    if longest == 0 {
        return;
    }
    let scores = kv.scores::<V, R>(place, queries);
    let mut weights = [[0.0; BLOCK]; R];
    let mut correction = [1.0f32; R];
    for r in 0..R {
        let sum = &mut rows[r].sum;
        let visible = rows[r].length.saturating_sub(first).min(BLOCK);
        if visible > 0 {
            let new = weigh_scores(&scores[r], scale, visible, sum.largest, &mut weights[r]);
            correction[r] = V::splat(sum.largest - new.largest).exp_negative().lanes()[0];
            sum.largest = new.largest;
            sum.total = sum.total * correction[r] + new.total;
        }
    }
    let mut out = rows.each_mut().map(|row| &mut *row.out);
    kv.weigh::<V, R>(place, &weights, &correction, longest, &mut out);
}

/// Turns the scores of the `visible` first positions of a block into weights relative to the largest score so far; the
/// other weights are 0. Returns the largest score and the sum of the block's weights.
#[inline(always)]
fn weigh_scores<V: Vector>(
    scores: &[V; VECTORS],
    scale: f32,
    visible: usize,
    largest: f32,
    weights: &mut [f32; BLOCK],
) -> Softmax {
    let mut most = V::splat(f32::NEG_INFINITY);
    let mut scaled = *scores;
    for (v, score) in scaled.iter_mut().enumerate() {
        let hidden = V::splat(f32::NEG_INFINITY);
        *score = score.mul(V::splat(scale)).first(visible.saturating_sub(v * LANES), hidden);
        most = score.max(most);
    }
    let largest = largest.max(most.largest());
    let mut sum = V::splat(0.0);
    for (score, weights) in scaled.iter().zip(weights.as_chunks_mut::<LANES>().0) {
        let weight = score.sub(V::splat(largest)).exp_negative();
        weight.store(weights);
        sum = sum.add(weight);
    }
    Softmax { largest, total: sum.sum() }
}
