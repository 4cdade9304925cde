//! Keys and values in int8: products with 16-bit integers, summed exactly in 32 bits.
//!
//! The other factor, a query or a block's weights, is rounded to 16 bits with a scale of its own, which changes a sum by
//! less than a hundredth of what int8 does. In return the widened pairs take one multiply-add for two elements, and a sum has the same
//! bits in whatever order it is added up.

use super::{
    BLOCK, VECTORS,
    blocks::{Blocks, Place},
};
use crate::{
    kv::Int8Block,
    lanes::{self, LANES, Lanes},
    vector::Vector,
};

/// The largest absolute value of a 16-bit factor.
const MOST: f32 = i16::MAX as f32;

/// Below this nothing is left but 0: the factor that it is rounded with would be infinite.
const LEAST: f32 = 1e-30;

#[derive(Clone, Copy)]
pub(super) struct Int8s<'a> {
    pub(super) keys: &'a [Int8Block<'a>],
    pub(super) values: &'a [Int8Block<'a>],
}

/// A query in 16 bits.
pub(super) struct Query {
    /// In whole vectors, with zeros behind the head.
    values: Vec<[i16; LANES]>,
    head_dim: usize,
    /// What they are multiplied by.
    scale: f32,
}

impl Blocks for Int8s<'_> {
    type Query<'a> = Query;

    #[inline(always)]
    fn query<V: Vector>(q: &[f32]) -> Query {
        let mut lanes = vec![[0.0; LANES]; q.len().div_ceil(LANES)];
        lanes.as_flattened_mut()[..q.len()].copy_from_slice(q);
        // As many bits as a sum of products with int8 has room for: all 16 for heads of up to 512.
        let most = MOST.min((i32::MAX / 128) as f32 / q.len() as f32).floor();
        let mut values = vec![[0; LANES]; lanes.len()];
        let scale = shorten::<V>(&lanes, most, &mut values);
        Query { values, head_dim: q.len(), scale }
    }

    #[inline(always)]
    fn scores<V: Vector, const R: usize>(
        self,
        Place { block, head, ahead }: Place,
        queries: &[Query; R],
    ) -> [[V; VECTORS]; R] {
        let head_dim = queries[0].head_dim;
        let (keys, scales) = self.keys[block];
        let keys = &keys[head * head_dim * BLOCK..(head + 1) * head_dim * BLOCK];
        let keys = keys.as_chunks::<{ 2 * BLOCK }>().0;
        let queries_16: [&[[i16; 2]]; R] =
            std::array::from_fn(|r| &queries[r].values.as_flattened().as_chunks().0[..keys.len()]);
        let mut sums = [[V::zeros(); VECTORS]; R];
        let next = next(self.keys, head, head_dim, block, ahead);
        if V::STRIP < VECTORS {
            for at in 0..VECTORS {
                sums_part::<V, R, 1>(keys, next, &queries_16, at, &mut sums);
            }
        } else {
            sums_part::<V, R, VECTORS>(keys, next, &queries_16, 0, &mut sums);
        }
        let scales = scales[head * BLOCK..(head + 1) * BLOCK].as_chunks::<LANES>().0;
        let mut scores = [[V::splat(0.0); VECTORS]; R];
        for r in 0..R {
            let scale = V::splat(queries[r].scale);
            for v in 0..VECTORS {
                scores[r][v] = V::of_ints(sums[r][v]).mul(V::load(&scales[v]).mul(scale));
            }
        }
        scores
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
        let (values, scales) = self.values[block];
        let values = &values[head * head_dim * BLOCK..(head + 1) * head_dim * BLOCK];
        let scales = scales[head * BLOCK..(head + 1) * BLOCK].as_chunks::<LANES>().0;
        let next = next(self.values, head, head_dim, block, ahead);
        let mut factors = [Factors { weights: [[0; LANES]; VECTORS], scale: 0.0, correction: 0.0 }; R];
        for r in 0..R {
            let weights = weights[r].as_chunks::<LANES>().0;
            let mut products = [[0.0; LANES]; VECTORS];
            for v in 0..VECTORS {
                // What lies behind the visible positions is what was there before.
                let scale = V::load(&scales[v]).first(visible.saturating_sub(v * LANES), V::splat(0.0));
                V::load(&weights[v]).mul(scale).store(&mut products[v]);
            }
            factors[r].scale = shorten::<V>(&products, MOST, &mut factors[r].weights);
            factors[r].correction = correction[r];
        }
        let mut at = 0;
        while V::STRIP >= VECTORS && head_dim - at >= VECTORS * LANES {
            weigh_part::<V, R, VECTORS>(values, next, &factors, visible, at, out);
            at += VECTORS * LANES;
        }
        while head_dim - at >= LANES {
            weigh_part::<V, R, 1>(values, next, &factors, visible, at, out);
            at += LANES;
        }
        if at < head_dim {
            weigh_rest::<V, R>(values, &factors, visible, at, out);
        }
    }
}

/// Where a head's elements lie in the next block, to ask for them; asks for their scales.
#[inline(always)]
fn next(
    blocks: &[Int8Block<'_>],
    head: usize,
    head_dim: usize,
    block: usize,
    ahead: bool,
) -> Option<*const i8> {
    let (elements, scales) = blocks.get(block + 1).filter(|_| ahead)?;
    lanes::prefetch_all(scales.as_ptr().wrapping_add(head * BLOCK), BLOCK);
    Some(elements.as_ptr().wrapping_add(head * head_dim * BLOCK))
}

/// The weights of a row times the scales of the values, in 16 bits.
#[derive(Clone, Copy)]
struct Factors {
    weights: [[i16; LANES]; VECTORS],
    /// What they are multiplied by.
    scale: f32,
    correction: f32,
}

impl Factors {
    /// The weights of the `j`th pair of positions.
    #[inline(always)]
    fn pair(&self, j: usize) -> [i16; 2] {
        self.weights.as_flattened().as_chunks().0[j]
    }

    /// `out = out * correction + sum * scale`
    #[inline(always)]
    fn add<V: Vector>(&self, sum: V::Ints, out: &mut Lanes) {
        let before = V::load(out).mul(V::splat(self.correction));
        V::of_ints(sum).mul_add(V::splat(self.scale), before).store(out);
    }
}

/// Rounds to 16 bits so that the largest absolute value becomes `most`; returns what undoes the scaling, NaN if an
/// element is infinite or NaN.
#[inline(always)]
fn shorten<V: Vector>(x: &[Lanes], most: f32, out: &mut [[i16; LANES]]) -> f32 {
    let zero = V::splat(0.0);
    let (mut largest, mut poison) = (zero, zero);
    for x in x {
        let x = V::load(x);
        largest = x.max(zero.sub(x)).max(largest);
        poison = poison.add(x.mul(zero));
    }
    let (largest, poison) = (largest.largest(), poison.sum());
    let factor = if largest < LEAST { 0.0 } else { most / largest };
    for (x, out) in x.iter().zip(out) {
        V::load(x).mul(V::splat(factor)).store_i16(out);
    }
    if largest < LEAST { poison } else { largest / most + poison }
}

/// The sums of products with the keys, for `N` vectors of positions from the vector `at` on.
#[inline(always)]
fn sums_part<V: Vector, const R: usize, const N: usize>(
    keys: &[[i8; 2 * BLOCK]],
    next: Option<*const i8>,
    queries: &[&[[i16; 2]]; R],
    at: usize,
    out: &mut [[V::Ints; VECTORS]; R],
) {
    let mut sums = [[V::zeros(); N]; R];
    for (d, keys) in keys.iter().enumerate() {
        if let Some(next) = next {
            lanes::prefetch_all_later(next.wrapping_add(2 * (d * BLOCK + at * LANES)), 2 * N * LANES);
        }
        let keys = keys.as_chunks::<{ 2 * LANES }>().0;
        let keys: [V::Pairs; N] = std::array::from_fn(|v| V::load_pairs(&keys[at + v]));
        for r in 0..R {
            let q = V::splat_pair(queries[r][d]);
            for v in 0..N {
                sums[r][v] = V::add_products(sums[r][v], keys[v], q);
            }
        }
    }
    for r in 0..R {
        out[r][at..at + N].copy_from_slice(&sums[r]);
    }
}

/// `N` vectors of dimensions from `at` on.
#[inline(always)]
fn weigh_part<V: Vector, const R: usize, const N: usize>(
    values: &[i8],
    next: Option<*const i8>,
    factors: &[Factors; R],
    visible: usize,
    at: usize,
    out: &mut [&mut [f32]; R],
) {
    let head_dim = out[0].len();
    let mut sums = [[V::zeros(); N]; R];
    for j in 0..visible.div_ceil(2) {
        let from = 2 * (j * head_dim + at);
        if let Some(next) = next {
            lanes::prefetch_all_later(next.wrapping_add(from), 2 * N * LANES);
        }
        let row = values[from..from + 2 * N * LANES].as_chunks::<{ 2 * LANES }>().0;
        let row: [V::Pairs; N] = std::array::from_fn(|v| V::load_pairs(&row[v]));
        for r in 0..R {
            let weight = V::splat_pair(factors[r].pair(j));
            for v in 0..N {
                sums[r][v] = V::add_products(sums[r][v], row[v], weight);
            }
        }
    }
    for r in 0..R {
        let out = out[r][at..at + N * LANES].as_chunks_mut::<LANES>().0;
        for v in 0..N {
            factors[r].add::<V>(sums[r][v], &mut out[v]);
        }
    }
}

/// The dimensions from `at` on, which are less than a vector.
#[inline(always)]
fn weigh_rest<V: Vector, const R: usize>(
    values: &[i8],
    factors: &[Factors; R],
    visible: usize,
    at: usize,
    out: &mut [&mut [f32]; R],
) {
    let head_dim = out[0].len();
    let mut sums = [V::zeros(); R];
    for j in 0..visible.div_ceil(2) {
        let rest = &values[2 * (j * head_dim + at)..2 * (j + 1) * head_dim];
        let mut row = [0; 2 * LANES];
        row[..rest.len()].copy_from_slice(rest);
        for r in 0..R {
            sums[r] = V::add_products(sums[r], V::load_pairs(&row), V::splat_pair(factors[r].pair(j)));
        }
    }
    for r in 0..R {
        let rest = &mut out[r][at..];
        let mut lanes = lanes::partial(rest);
        factors[r].add::<V>(sums[r], &mut lanes);
        rest.copy_from_slice(&lanes[..rest.len()]);
    }
}
