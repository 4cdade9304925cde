//! Keys and values as integer sums.
//!
//! The product of ternary weights with int8 activations is an integer, at most 127 times the width of the input, times a
//! factor of the token. Kept as both, it is exact, and in most models 16 bits hold the integer. The rotary embedding would
//! make floats of keys, so it is left to attention.

use std::collections::TryReserveError;

use super::{BLOCK, copy, sides, sides_mut, zeros};
use crate::isa::multiversion;

/// The largest absolute value of a sum: the quotient of its product and the factor is off by less than a half.
pub const MAX_SUM: usize = (1 << 22) - 1;

/// The sums of one side of a layer in a block: the keys, or the values.
#[derive(Debug, Clone, Copy)]
pub struct SumBlock<'a> {
    /// The sums modulo 2^16, as signed integers.
    pub low: &'a [i16],
    /// What is missing from them, in units of 2^16.
    pub high: &'a [i8],
    /// What the sums are multiplied by, `[kv_heads, BLOCK]`.
    pub factors: &'a [f32],
    /// Whether any of a position's `high` is not 0, `[kv_heads, BLOCK]`; any number but 0 is true.
    pub wide: &'a [u8],
}

/// The sums of all layers in a block.
pub(super) struct Sums {
    low: Vec<i16>,
    high: Vec<i8>,
    factors: Vec<f32>,
    wide: Vec<u8>,
}

impl Sums {
    pub(super) fn new(elements: usize, factors: usize) -> Result<Self, TryReserveError> {
        let (low, high) = (zeros(elements)?, zeros(elements)?);
        Ok(Self { low, high, factors: zeros(factors)?, wide: zeros(factors)? })
    }

    pub(super) fn try_clone(&self) -> Result<Self, TryReserveError> {
        let (low, high) = (copy(&self.low)?, copy(&self.high)?);
        Ok(Self { low, high, factors: copy(&self.factors)?, wide: copy(&self.wide)? })
    }

    pub(super) fn parts(&self) -> [&[u8]; 4] {
        let (high, factors) = (bytemuck::cast_slice(&self.high), bytemuck::cast_slice(&self.factors));
        [bytemuck::cast_slice(&self.low), high, factors, &self.wide]
    }

    pub(super) fn parts_mut(&mut self) -> [&mut [u8]; 4] {
        let (high, factors) =
            (bytemuck::cast_slice_mut(&mut self.high), bytemuck::cast_slice_mut(&mut self.factors));
        [bytemuck::cast_slice_mut(&mut self.low), high, factors, &mut self.wide]
    }

    /// The keys and the values of a layer.
    pub(super) fn layer(&self, layer: usize, plane: usize, scales: usize) -> (SumBlock<'_>, SumBlock<'_>) {
        let (low, high) = (sides(&self.low, layer, plane), sides(&self.high, layer, plane));
        let (factors, wide) = (sides(&self.factors, layer, scales), sides(&self.wide, layer, scales));
        (
            SumBlock { low: low.0, high: high.0, factors: factors.0, wide: wide.0 },
            SumBlock { low: low.1, high: high.1, factors: factors.1, wide: wide.1 },
        )
    }

    /// Keys and values of each head of a layer, with `head` elements, to be written to.
    pub(super) fn heads(
        &mut self,
        layer: usize,
        plane: usize,
        scales: usize,
        head: usize,
    ) -> impl Iterator<Item = (Head<'_>, Head<'_>)> {
        let (low, high) = (sides_mut(&mut self.low, layer, plane), sides_mut(&mut self.high, layer, plane));
        let factors = sides_mut(&mut self.factors, layer, scales);
        let wide = sides_mut(&mut self.wide, layer, scales);
        heads_of(low.0, high.0, factors.0, wide.0, head).zip(heads_of(low.1, high.1, factors.1, wide.1, head))
    }
}

fn heads_of<'a>(
    low: &'a mut [i16],
    high: &'a mut [i8],
    factors: &'a mut [f32],
    wide: &'a mut [u8],
    head: usize,
) -> impl Iterator<Item = Head<'a>> {
    let sums = low.chunks_exact_mut(head).zip(high.chunks_exact_mut(head));
    let positions = factors.chunks_exact_mut(BLOCK).zip(wide.chunks_exact_mut(BLOCK));
    sums.zip(positions).map(|((low, high), (factors, wide))| Head { low, high, factors, wide })
}

/// One head of the keys or of the values of a block.
pub(super) struct Head<'a> {
    low: &'a mut [i16],
    high: &'a mut [i8],
    factors: &'a mut [f32],
    wide: &'a mut [u8],
}

impl Head<'_> {
    /// Writes the elements of a position `step` elements apart from `first` on. Each is `sum as f32 * factor`.
    pub(super) fn write(&mut self, place: usize, x: &[f32], factor: f32, first: usize, step: usize) {
        let mut any = 0;
        let low = self.low[first..].iter_mut().step_by(step);
        let high = self.high[first..].iter_mut().step_by(step);
        for ((low, high), x) in low.zip(high).zip(x) {
            let sum = sum_of(*x, factor);
            *low = sum as i16;
            *high = ((sum - i32::from(*low)) >> 16) as i8;
            any |= *high;
        }
        self.factors[place] = factor;
        self.wide[place] = u8::from(any != 0);
    }
}

/// The integer that `x` is the rounded product of.
fn sum_of(x: f32, factor: f32) -> i32 {
    const MOST: f32 = MAX_SUM as f32;
    // Rounds to the nearest integer: the sum with 1.5 * 2^23 has no bits below 1. `round_ties_even` would be a function call.
    const SHIFT: f32 = 12_582_912.0;
    // A quotient that is not a number becomes 0; its factor shows it.
    ((x / factor).clamp(-MOST, MOST) + SHIFT - SHIFT) as i32
}

/// The rotary embedding of the keys of one block.
#[derive(Debug, Clone)]
pub struct KeyRotation {
    /// `[head_dim / 2, BLOCK]`
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl KeyRotation {
    /// From the cosines and sines of each position, `[BLOCK, head_dim / 2]`.
    ///
    /// # Panics
    /// If the lengths differ or are no multiples of [`BLOCK`].
    pub fn new(cos: &[f32], sin: &[f32]) -> Self {
        assert!(cos.len() == sin.len() && cos.len().is_multiple_of(BLOCK), "angles of a block");
        Self { cos: transposed(cos), sin: transposed(sin) }
    }

    /// Cosines and sines, `[head_dim / 2, BLOCK]` each.
    pub(crate) fn angles(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Pairs of dimensions.
    pub(crate) fn pairs(&self) -> usize {
        self.cos.len() / BLOCK
    }
}

fn transposed(x: &[f32]) -> Vec<f32> {
    let pairs = x.len() / BLOCK;
    (0..x.len()).map(|i| x[i % BLOCK * pairs + i / BLOCK]).collect()
}

impl SumBlock<'_> {
    /// The sums of one head.
    pub(crate) fn head(&self, head: usize, head_dim: usize) -> Self {
        let elements = head * head_dim * BLOCK..(head + 1) * head_dim * BLOCK;
        let positions = head * BLOCK..(head + 1) * BLOCK;
        let (low, high) = (&self.low[elements.clone()], &self.high[elements]);
        Self { low, high, factors: &self.factors[positions.clone()], wide: &self.wide[positions] }
    }

    /// Whether 16 bits do not suffice for one head.
    pub(crate) fn is_wide(&self) -> bool {
        self.wide.iter().fold(0, |any, wide| any | wide) != 0
    }

    /// Fills `out`, `[head_dim, BLOCK]`, with the rotated keys of one head. Prefetches those of the next block.
    pub(crate) fn keys(&self, rotation: &KeyRotation, next: Option<&SumBlock<'_>>, out: &mut [f32]) {
        let next = next.map_or(self.low.as_ptr(), |next| next.low.as_ptr());
        let high = if self.is_wide() { self.high } else { &[] };
        rotated(self.low, high, self.factors, &rotation.cos, &rotation.sin, next, out);
    }

    /// Fills `out`, `[BLOCK, head_dim]`, with the first `count` values of one head. Prefetches those of the next block.
    pub(crate) fn values(&self, next: Option<&SumBlock<'_>>, count: usize, out: &mut [f32]) {
        let next = next.map_or(self.low.as_ptr(), |next| next.low.as_ptr());
        let head_dim = self.low.len() / BLOCK;
        let high = if self.is_wide() { self.high } else { &[] };
        let used = count * head_dim;
        scaled(&self.low[..used], high, &self.factors[..count], next, &mut out[..used]);
    }
}

multiversion! {
    fn rotated(
        low: &[i16],
        high: &[i8],
        factors: &[f32],
        cos: &[f32],
        sin: &[f32],
        next: *const i16,
        out: &mut [f32],
    ) = rotated_body;
}

#[inline(always)]
fn rotated_body<const FMA: bool>(
    low: &[i16],
    high: &[i8],
    factors: &[f32],
    cos: &[f32],
    sin: &[f32],
    next: *const i16,
    out: &mut [f32],
) {
    let Some(factors) = factors.first_chunk::<BLOCK>() else { return };
    let half = out.len() / 2;
    let (out_x, out_y) = out.split_at_mut(half);
    let (low_x, low_y) = low.split_at(half);
    let out = out_x.as_chunks_mut::<BLOCK>().0.iter_mut().zip(out_y.as_chunks_mut::<BLOCK>().0);
    let low = low_x.as_chunks::<BLOCK>().0.iter().zip(low_y.as_chunks::<BLOCK>().0);
    let angles = cos.as_chunks::<BLOCK>().0.iter().zip(sin.as_chunks::<BLOCK>().0);
    let high = high.split_at_checked(half).unwrap_or_default();
    for (pair, (((out_x, out_y), (low_x, low_y)), (cos, sin))) in out.zip(low).zip(angles).enumerate() {
        crate::lanes::prefetch_all(next.wrapping_add(pair * BLOCK), BLOCK);
        crate::lanes::prefetch_all(next.wrapping_add(half + pair * BLOCK), BLOCK);
        let high_x = high.0.as_chunks::<BLOCK>().0.get(pair);
        let high_y = high.1.as_chunks::<BLOCK>().0.get(pair);
        let (Some(high_x), Some(high_y)) = (high_x, high_y) else {
            for i in 0..BLOCK {
                let (x, y) = (f32::from(low_x[i]) * factors[i], f32::from(low_y[i]) * factors[i]);
                out_x[i] = x * cos[i] - y * sin[i];
                out_y[i] = x * sin[i] + y * cos[i];
            }
            continue;
        };
        for i in 0..BLOCK {
            let x = whole(low_x[i], high_x[i]) * factors[i];
            let y = whole(low_y[i], high_y[i]) * factors[i];
            out_x[i] = x * cos[i] - y * sin[i];
            out_y[i] = x * sin[i] + y * cos[i];
        }
    }
}

multiversion! {
    fn scaled(low: &[i16], high: &[i8], factors: &[f32], next: *const i16, out: &mut [f32]) = scaled_body;
}

#[inline(always)]
fn scaled_body<const FMA: bool>(
    low: &[i16],
    high: &[i8],
    factors: &[f32],
    next: *const i16,
    out: &mut [f32],
) {
    let head_dim = out.len() / factors.len().max(1);
    let rows = out.chunks_exact_mut(head_dim).zip(low.chunks_exact(head_dim)).zip(factors);
    for (position, ((out, low), factor)) in rows.enumerate() {
        crate::lanes::prefetch_all(next.wrapping_add(position * head_dim), head_dim);
        match high.get(position * head_dim..(position + 1) * head_dim) {
            Some(high) => {
                for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
                    *out = whole(*low, *high) * factor;
                }
            }
            None => {
                for (out, low) in out.iter_mut().zip(low) {
                    *out = f32::from(*low) * factor;
                }
            }
        }
    }
}

/// A sum of both parts; of 24 bits, so that the float is exact.
#[inline(always)]
fn whole(low: i16, high: i8) -> f32 {
    (i32::from(low) + (i32::from(high) << 16)) as f32
}
