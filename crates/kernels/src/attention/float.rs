//! Keys and values in single or half precision: products in f32.

use super::{
    BLOCK, VECTORS,
    blocks::{Blocks, Place},
};
use crate::{
    lanes::{self, LANES},
    vector::Vector,
};

/// A type of floats.
pub(super) trait Element: Copy {
    /// Whether to ask for the next block. Planes of f32 are long enough for the hardware's own prefetching.
    const AHEAD: bool;
    fn load<V: Vector>(x: &[Self; LANES]) -> V;
    fn widen(self) -> f32;
}

impl Element for f32 {
    const AHEAD: bool = true;

    #[inline(always)]
    fn load<V: Vector>(x: &[Self; LANES]) -> V {
        V::load(x)
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for u16 {
    const AHEAD: bool = true;

    #[inline(always)]
    fn load<V: Vector>(x: &[Self; LANES]) -> V {
        V::load_halves(x)
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        lanes::half(self)
    }
}

/// Blocks of them.
#[derive(Clone, Copy)]
pub(super) struct Floats<'a, T> {
    pub(super) keys: &'a [&'a [T]],
    pub(super) values: &'a [&'a [T]],
}

impl<T: Element> Blocks for Floats<'_, T> {
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
        let plane = queries[0].len() * BLOCK;
        let keys = &self.keys[block][head * plane..(head + 1) * plane];
        let next = self
            .keys
            .get(block + 1)
            .filter(|_| ahead && T::AHEAD)
            .map(|keys| keys.as_ptr().wrapping_add(head * plane));
        let mut sums = [[V::splat(0.0); VECTORS]; R];
        if V::STRIP < VECTORS {
            for at in 0..VECTORS {
                scores_part::<V, T, R, 1>(keys, next, queries, at, &mut sums);
            }
        } else {
            scores_part::<V, T, R, VECTORS>(keys, next, queries, 0, &mut sums);
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
        let plane = head_dim * BLOCK;
        let values = &self.values[block][head * plane..(head + 1) * plane];
        let next = self
            .values
            .get(block + 1)
            .filter(|_| ahead && T::AHEAD)
            .map(|values| values.as_ptr().wrapping_add(head * plane));
        weigh_values::<V, _, R>(Widened(values), next, weights, correction, visible, out);
    }
}

/// The values of one head in a block, `[BLOCK, head_dim]`, which become floats as they are read.
pub(super) trait Values: Copy {
    /// How they are stored.
    type Stored;

    /// `N` vectors from `at` on, which are the value of `position`.
    fn load<V: Vector, const N: usize>(self, position: usize, at: usize) -> [V; N];

    /// The element `at`, which is of the value of `position`.
    fn element(self, position: usize, at: usize) -> f32;
}

/// Floats of any type.
#[derive(Clone, Copy)]
struct Widened<'a, T>(&'a [T]);

impl<T: Element> Values for Widened<'_, T> {
    type Stored = T;

    #[inline(always)]
    fn load<V: Vector, const N: usize>(self, _: usize, at: usize) -> [V; N] {
        let row = self.0[at..at + N * LANES].as_chunks::<LANES>().0;
        std::array::from_fn(|v| T::load(&row[v]))
    }

    #[inline(always)]
    fn element(self, _: usize, at: usize) -> f32 {
        self.0[at].widen()
    }
}

/// [`Blocks::weigh`] of the values of one head. `next`: where those of the next block lie, which are prefetched.
#[inline(always)]
pub(super) fn weigh_values<V: Vector, S: Values, const R: usize>(
    values: S,
    next: Option<*const S::Stored>,
    weights: &[[f32; BLOCK]; R],
    correction: &[f32; R],
    visible: usize,
    out: &mut [&mut [f32]; R],
) {
    let head_dim = out[0].len();
    let mut at = 0;
    while V::STRIP >= VECTORS && head_dim - at >= VECTORS * LANES {
        weigh_part::<V, S, R, VECTORS>(values, next, weights, correction, visible, at, out);
        at += VECTORS * LANES;
    }
    while head_dim - at >= LANES {
        weigh_part::<V, S, R, 1>(values, next, weights, correction, visible, at, out);
        at += LANES;
    }
    for i in at..head_dim {
        for r in 0..R {
            let mut sum = out[r][i] * correction[r];
            for j in 0..visible {
                sum += weights[r][j] * values.element(j, j * head_dim + i);
            }
            out[r][i] = sum;
        }
    }
}

/// `N` vectors of positions from the vector `at` on.
#[inline(always)]
fn scores_part<V: Vector, T: Element, const R: usize, const N: usize>(
    keys: &[T],
    next: Option<*const T>,
    queries: &[&[f32]; R],
    at: usize,
    scores: &mut [[V; VECTORS]; R],
) {
    let mut sums = [[V::splat(0.0); N]; R];
    for (d, keys) in keys.as_chunks::<BLOCK>().0.iter().enumerate() {
        if let Some(next) = next {
            lanes::prefetch_all_later(next.wrapping_add(d * BLOCK + at * LANES), N * LANES);
        }
        let keys = keys.as_chunks::<LANES>().0;
        let keys: [V; N] = std::array::from_fn(|v| T::load(&keys[at + v]));
        for r in 0..R {
            let q = V::splat(queries[r][d]);
            for v in 0..N {
                sums[r][v] = q.mul_add(keys[v], sums[r][v]);
            }
        }
    }
    for r in 0..R {
        scores[r][at..at + N].copy_from_slice(&sums[r]);
    }
}

/// `N` vectors of dimensions from `at` on.
#[inline(always)]
fn weigh_part<V: Vector, S: Values, const R: usize, const N: usize>(
    values: S,
    next: Option<*const S::Stored>,
    weights: &[[f32; BLOCK]; R],
    correction: &[f32; R],
    visible: usize,
    at: usize,
    out: &mut [&mut [f32]; R],
) {
    let head_dim = out[0].len();
    let mut sums = [[V::splat(0.0); N]; R];
    for r in 0..R {
        let out = out[r][at..at + N * LANES].as_chunks::<LANES>().0;
        for v in 0..N {
            sums[r][v] = V::load(&out[v]).mul(V::splat(correction[r]));
        }
    }
    for j in 0..visible {
        if let Some(next) = next {
            lanes::prefetch_all_later(next.wrapping_add(j * head_dim + at), N * LANES);
        }
        let row: [V; N] = values.load(j, j * head_dim + at);
        for r in 0..R {
            let weight = V::splat(weights[r][j]);
            for v in 0..N {
                sums[r][v] = weight.mul_add(row[v], sums[r][v]);
            }
        }
    }
    for r in 0..R {
        let out = out[r][at..at + N * LANES].as_chunks_mut::<LANES>().0;
        for v in 0..N {
            sums[r][v].store(&mut out[v]);
        }
    }
}
