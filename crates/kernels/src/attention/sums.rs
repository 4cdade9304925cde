//! Keys and values as integer sums.
//!
//! Where many queries go through a block, its head becomes floats, with the keys rotated, and is computed with as such. For a
//! single tile of queries, sums become floats in registers as they are read. Both have the same order of operations, which is
//! that of floats in memory.

use std::{cell::Cell, ops::Range};

use super::{
    Attention, VECTORS,
    blocks::{self, Blocks, Place, Source, reached},
    float::{Floats, Values, weigh_values},
    softmax::{self, Row, TILE},
};
use crate::{
    kv::{BLOCK, KeyRotation, SumBlock},
    lanes::{self, LANES, Lanes},
    vector::Vector,
};

#[derive(Clone, Copy)]
pub(super) struct Sums<'a> {
    pub(super) keys: &'a [SumBlock<'a>],
    pub(super) values: &'a [SumBlock<'a>],
    pub(super) rotations: &'a [KeyRotation],
}

impl Source for Sums<'_> {
    type Query<'a> = &'a [f32];

    #[inline(always)]
    fn query<V: Vector>(q: &[f32]) -> &[f32] {
        q
    }

    #[inline(always)]
    fn segment<V: Vector>(
        self,
        shape: &Attention,
        head: usize,
        range: Range<usize>,
        rows: &mut [Row<'_>],
        queries: &[&[f32]],
    ) {
        let head_dim = shape.head_dim;
        let plane = head_dim * BLOCK;
        let mut floats = blocks::take_floats(plane);
        for block in reached(range, rows) {
            let first = block * BLOCK;
            let is_wide =
                [self.keys, self.values].iter().any(|side| side[block].head(head, head_dim).is_wide());
            if rows.len() <= TILE && !is_wide {
                let place = Place { block, head, ahead: true };
                let kv = Narrow { sums: self, second: Cell::from_mut(&mut floats[..]).as_slice_of_cells() };
                softmax::block::<V, _>(shape.scale, kv, place, first, rows, queries);
                continue;
            }
            let (keys, values) = floats.as_flattened_mut()[..2 * plane].split_at_mut(plane);
            let visible = rows.last().map_or(0, |row| row.length.saturating_sub(first).min(BLOCK));
            let (own, next) = of_head(self.values, block, head, head_dim);
            own.values(next.as_ref(), visible, values);
            let (own, next) = of_head(self.keys, block, head, head_dim);
            own.keys(&self.rotations[block], next.as_ref(), keys);
            let floats = Floats { keys: &[&*keys], values: &[&*values] };
            let place = Place { block: 0, head: 0, ahead: false };
            softmax::block::<V, _>(shape.scale, floats, place, first, rows, queries);
        }
        blocks::put_floats(floats);
    }
}

/// A head of a block, and of the next one if there is one.
#[inline(always)]
fn of_head<'a>(
    side: &[SumBlock<'a>],
    block: usize,
    head: usize,
    head_dim: usize,
) -> (SumBlock<'a>, Option<SumBlock<'a>>) {
    (side[block].head(head, head_dim), side.get(block + 1).map(|next| next.head(head, head_dim)))
}

/// Blocks of sums that have 16 bits.
#[derive(Clone, Copy)]
struct Narrow<'a> {
    sums: Sums<'a>,
    /// Room for the second halves of the keys of a block.
    second: &'a [Cell<Lanes>],
}

impl Blocks for Narrow<'_> {
    type Query<'a> = &'a [f32];

    #[inline(always)]
    fn query<V: Vector>(q: &[f32]) -> &[f32] {
        q
    }

    #[inline(always)]
    fn scores<V: Vector, const R: usize>(
        self,
        Place { block, head, ahead }: Place,
        queries: &[&[f32]; R],
    ) -> [[V; VECTORS]; R] {
        let (own, next) = of_head(self.sums.keys, block, head, queries[0].len());
        let next = next.filter(|_| ahead).map(|next| next.low.as_ptr());
        let rotation = &self.sums.rotations[block];
        if V::STRIP >= VECTORS {
            return scores_part::<V, R, VECTORS>(&own, rotation, next, queries, 0, self.second);
        }
        let mut sums = [[V::splat(0.0); VECTORS]; R];
        for at in 0..VECTORS {
            let part = scores_part::<V, R, 1>(&own, rotation, next, queries, at, self.second);
            for r in 0..R {
                sums[r][at] = part[r][0];
            }
        }
        sums
    }

    #[inline(always)]
    fn weigh<V: Vector, const R: usize>(
        self,
        Place { block, head, ahead }: Place,
        weights: &[[f32; BLOCK]; R],
        correction: &[f32; R],
        visible: usize,
        out: &mut [&mut [f32]; R],
    ) {
        let head_dim = out[0].len();
        let (own, next) = of_head(self.sums.values, block, head, head_dim);
        let next = next.filter(|_| ahead).map(|next| next.low.as_ptr());
        weigh_values::<V, _, R>(Scaled(own), next, weights, correction, visible, out);
    }
}

/// Values as sums of 16 bits.
#[derive(Clone, Copy)]
struct Scaled<'a>(SumBlock<'a>);

impl Values for Scaled<'_> {
    type Stored = i16;

    #[inline(always)]
    fn load<V: Vector, const N: usize>(self, position: usize, at: usize) -> [V; N] {
        let factor = V::splat(self.0.factors[position]);
        let row = self.0.low[at..at + N * LANES].as_chunks::<LANES>().0;
        std::array::from_fn(|v| V::load_i16(&row[v]).mul(factor))
    }

    #[inline(always)]
    fn element(self, position: usize, at: usize) -> f32 {
        f32::from(self.0.low[at]) * self.0.factors[position]
    }
}

/// `N` vectors of positions from the vector `at` on: first the first halves of the rotated keys, while the second halves go to
/// `second`, then these.
#[inline(always)]
fn scores_part<V: Vector, const R: usize, const N: usize>(
    keys: &SumBlock<'_>,
    rotation: &KeyRotation,
    next: Option<*const i16>,
    queries: &[&[f32]; R],
    at: usize,
    second: &[Cell<Lanes>],
) -> [[V; N]; R] {
    let (x, y) = keys.low.split_at(keys.low.len() / 2);
    let (cos, sin) = rotation.angles();
    let rows = [x, y].map(|rows| rows.as_chunks::<BLOCK>().0);
    let angles = [cos, sin].map(|rows| rows.as_chunks::<BLOCK>().0);
    let pairs = rows[0].len();
    let factors: [V; N] = {
        let factors = keys.factors[at * LANES..(at + N) * LANES].as_chunks::<LANES>().0;
        std::array::from_fn(|v| V::load(&factors[v]))
    };
    let (low, high): ([&[f32]; R], [&[f32]; R]) = (
        std::array::from_fn(|r| &queries[r][..pairs]),
        std::array::from_fn(|r| &queries[r][pairs..][..pairs]),
    );
    let second = &second.as_chunks::<N>().0[..pairs];
    let mut sums = [[V::splat(0.0); N]; R];
    let all = rows[0].iter().zip(rows[1]).zip(angles[0].iter().zip(angles[1])).zip(second);
    for (pair, (((x, y), (cos, sin)), second)) in all.enumerate() {
        if let Some(next) = next {
            let next = next.wrapping_add(pair * BLOCK + at * LANES);
            lanes::prefetch_all_later(next, N * LANES);
            lanes::prefetch_all_later(next.wrapping_add(pairs * BLOCK), N * LANES);
        }
        let [x, y] = [x, y].map(|row| row.as_chunks::<LANES>().0);
        let [cos, sin] = [cos, sin].map(|row| row.as_chunks::<LANES>().0);
        let mut keys = [V::splat(0.0); N];
        for v in 0..N {
            let x = V::load_i16(&x[at + v]).mul(factors[v]);
            let y = V::load_i16(&y[at + v]).mul(factors[v]);
            let (cos, sin) = (V::load(&cos[at + v]), V::load(&sin[at + v]));
            keys[v] = x.mul(cos).sub(y.mul(sin));
            second[v].set(x.mul(sin).add(y.mul(cos)).lanes());
        }
        add_products::<V, R, N>(&mut sums, &low, pair, &keys);
    }
    for (pair, second) in second.iter().enumerate() {
        let mut keys = [V::splat(0.0); N];
        for v in 0..N {
            keys[v] = V::load(&second[v].get());
        }
        add_products::<V, R, N>(&mut sums, &high, pair, &keys);
    }
    sums
}

#[inline(always)]
fn add_products<V: Vector, const R: usize, const N: usize>(
    sums: &mut [[V; N]; R],
    queries: &[&[f32]; R],
    d: usize,
    keys: &[V; N],
) {
    for r in 0..R {
        let q = V::splat(queries[r][d]);
        for v in 0..N {
            sums[r][v] = q.mul_add(keys[v], sums[r][v]);
        }
    }
}
