//! Sixteen floats in vector registers, for loops that the compiler does not turn into vector instructions by itself.
//!
//! A function over [`Vector`] is compiled once for each set of instructions ([`vectorized!`](crate::isa)). All
//! implementations have 16 lanes, so that a sum has the same order everywhere.

use crate::lanes::{self, LANES, Lanes};
use crate::quantize::Line;

/// Sixteen floats. The methods are instructions; they are only called within functions that are compiled for them.
pub(crate) trait Vector: Copy {
    /// Sixteen 32-bit integers.
    type Ints: Copy;
    /// Sixteen pairs of 16-bit integers.
    type Pairs: Copy;
    /// How many of these beside each other are worth keeping for each row of a tile of attention; 1 where more would not
    /// fit into the registers.
    const STRIP: usize = 4;
    /// Tokens whose sums fit into the registers beside codes that are widened as they are multiplied.
    const TOKENS: usize = 2;
    /// Whether [`mul_add`](Self::mul_add) is fused.
    const FUSED: bool = true;

    fn splat(x: f32) -> Self;
    fn load(x: &Lanes) -> Self;
    /// Of the bits of half precision.
    fn load_halves(x: &[u16; LANES]) -> Self;
    /// Of integers.
    fn load_i16(x: &[i16; LANES]) -> Self;
    fn store(self, out: &mut Lanes);
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn add(self, other: Self) -> Self;
    /// `self * a + b`, fused where that is an instruction.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// The larger of both; `other` where one is NaN.
    fn max(self, other: Self) -> Self;
    /// To the nearest integer, ties to even.
    fn round(self) -> Self;
    /// `2^self` for integers from -126 to 127.
    fn power_of_two(self) -> Self;
    /// The lanes below `count`, and `other` in the rest.
    fn first(self, count: usize, other: Self) -> Self;

    /// The nearest integers, ties to even, which are within 16 bits.
    fn store_i16(self, out: &mut [i16; LANES]);

    /// The weights of one column in sixteen words of codes: of two bits, the code less one, or of one, twice the code less one.
    #[inline(always)]
    fn weights<const BITS: u32>(words: &Line, column: u32) -> Self {
        let weight = |word: u32| match BITS {
            1 => (2 * (word >> column & 1) as i32 - 1) as f32,
            _ => ((word >> (2 * column) & 3) as i32 - 1) as f32,
        };
        Self::load(&words.words().map(weight))
    }

    fn zeros() -> Self::Ints;
    fn of_ints(x: Self::Ints) -> Self;
    fn splat_pair(pair: [i16; 2]) -> Self::Pairs;
    fn load_pairs(x: &[i8; 2 * LANES]) -> Self::Pairs;
    /// Adds the sum of both products of each pair.
    fn add_products(sum: Self::Ints, a: Self::Pairs, b: Self::Pairs) -> Self::Ints;

    /// The sum of the lanes, by halves.
    #[inline(always)]
    fn sum(self) -> f32 {
        lanes::sum(self.lanes())
    }

    /// The largest lane. NaN lanes are passed over.
    #[inline(always)]
    fn largest(self) -> f32 {
        lanes::max(self.lanes())
    }

    #[inline(always)]
    fn lanes(self) -> Lanes {
        let mut out = [0.0; LANES];
        self.store(&mut out);
        out
    }

    /// `e^x` for `x` of at most 0, as [`lanes::exp`]; 0 below -87.
    #[inline(always)]
    fn exp_negative(self) -> Self {
        let x = Self::splat(-87.0).max(self); // in this order NaN stays NaN
        let n = x.mul(Self::splat(std::f32::consts::LOG2_E)).round();
        let r = n.mul_add(Self::splat(-lanes::LN2_HIGH), x);
        let r = n.mul_add(Self::splat(-lanes::LN2_LOW), r);
        let mut p = Self::splat(lanes::EXP[0]);
        for coefficient in &lanes::EXP[1..] {
            p = p.mul_add(r, Self::splat(*coefficient));
        }
        let y = p.mul(r).mul_add(r, r).add(Self::splat(1.0)).mul(n.power_of_two());
        y.zero_where_below(self, -87.0)
    }

    /// 0 where `x` is below `limit`, and `self` elsewhere, NaN included.
    fn zero_where_below(self, x: Self, limit: f32) -> Self;
}

/// The reference: portable Rust, with multiply-adds fused or not.
#[derive(Clone, Copy)]
pub(crate) struct Portable<const FMA: bool>(Lanes);

impl<const FMA: bool> Portable<FMA> {
    #[inline(always)]
    fn each(self, f: impl Fn(f32) -> f32) -> Self {
        Self(self.0.map(f))
    }
    #[inline(always)]
    fn with(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl<const FMA: bool> Vector for Portable<FMA> {
    type Ints = [i32; LANES];
    type Pairs = [[i16; 2]; LANES];
    const STRIP: usize = 1;
    const FUSED: bool = FMA;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }
    #[inline(always)]
    fn load(x: &Lanes) -> Self {
        Self(*x)
    }
    #[inline(always)]
    fn load_halves(x: &[u16; LANES]) -> Self {
        Self(x.map(lanes::half))
    }
    #[inline(always)]
    fn load_i16(x: &[i16; LANES]) -> Self {
        Self(x.map(f32::from))
    }
    #[inline(always)]
    fn store(self, out: &mut Lanes) {
        *out = self.0;
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.with(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.with(other, |a, b| a * b)
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.with(other, |a, b| a + b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        Self(std::array::from_fn(|i| lanes::mul_add::<FMA>(self.0[i], a.0[i], b.0[i])))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.with(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn round(self) -> Self {
        self.each(f32::round_ties_even)
    }
    #[inline(always)]
    fn power_of_two(self) -> Self {
        self.each(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn first(self, count: usize, other: Self) -> Self {
        Self(std::array::from_fn(|i| if i < count { self.0[i] } else { other.0[i] }))
    }
    #[inline(always)]
    fn zero_where_below(self, x: Self, limit: f32) -> Self {
        self.with(x, |y, x| if x < limit { 0.0 } else { y })
    }
    #[inline(always)]
    fn store_i16(self, out: &mut [i16; LANES]) {
        *out = self.0.map(|x| x.round_ties_even() as i16);
    }
    #[inline(always)]
    fn zeros() -> Self::Ints {
        [0; LANES]
    }
    #[inline(always)]
    fn of_ints(x: Self::Ints) -> Self {
        Self(x.map(|x| x as f32))
    }
    #[inline(always)]
    fn splat_pair(pair: [i16; 2]) -> Self::Pairs {
        [pair; LANES]
    }
    #[inline(always)]
    fn load_pairs(x: &[i8; 2 * LANES]) -> Self::Pairs {
        std::array::from_fn(|i| [i16::from(x[2 * i]), i16::from(x[2 * i + 1])])
    }
    #[inline(always)]
    fn add_products(sum: Self::Ints, a: Self::Pairs, b: Self::Pairs) -> Self::Ints {
        std::array::from_fn(|i| {
            let product = |j: usize| i32::from(a[i][j]) * i32::from(b[i][j]);
            sum[i] + product(0) + product(1)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exp(x: f32) -> Lanes {
        Portable::<false>::splat(x).exp_negative().lanes()
    }

    #[test]
    fn exp_is_that_of_the_lanes() {
        for i in 0..=88_000 {
            let x = i as f32 * -1e-3;
            let exact = f64::from(x).exp();
            let ours = f64::from(exp(x)[3]);
            assert!((ours - exact).abs() <= 2.4e-7 * exact + 1e-37, "{x}: {ours} {exact}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), [0.0; LANES]);
        assert_eq!(exp(0.0), [1.0; LANES]);
        assert!(exp(f32::NAN)[0].is_nan());
    }
}
