//! Sixteen floats in vector registers, for loops that the compiler does not turn into vector instructions by itself.
//!
//! A function over [`Vector`] is compiled once for each set of instructions ([`vectorized!`](crate::isa)). All
//! implementations have 16 lanes, so that a sum has the same order everywhere.

use crate::lanes::{self, LANES, Lanes};

/// Sixteen floats. The methods are instructions; they are only called within functions that are compiled for them.
pub(crate) trait Vector: Copy {
    fn splat(x: f32) -> Self;
    fn load(x: &Lanes) -> Self;
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

impl Vector for Lanes {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        [x; LANES]
    }
    #[inline(always)]
    fn load(x: &Lanes) -> Self {
        *x
    }
    #[inline(always)]
    fn store(self, out: &mut Lanes) {
        *out = self;
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] - other[i])
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] * other[i])
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] + other[i])
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        const FMA: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
        std::array::from_fn(|i| lanes::mul_add::<FMA>(self[i], a[i], b[i]))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        std::array::from_fn(|i| if self[i] > other[i] { self[i] } else { other[i] })
    }
    #[inline(always)]
    fn round(self) -> Self {
        self.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn power_of_two(self) -> Self {
        self.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn first(self, count: usize, other: Self) -> Self {
        std::array::from_fn(|i| if i < count { self[i] } else { other[i] })
    }
    #[inline(always)]
    fn zero_where_below(self, x: Self, limit: f32) -> Self {
        std::array::from_fn(|i| if x[i] < limit { 0.0 } else { self[i] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_that_of_the_lanes() {
        for i in 0..=88_000 {
            let x = [i as f32 * -1e-3; LANES];
            let exact = f64::from(x[0]).exp();
            let ours = f64::from(x.exp_negative()[3]);
            assert!((ours - exact).abs() <= 2.4e-7 * exact + 1e-37, "{}: {ours} {exact}", x[0]);
        }
        assert_eq!([f32::NEG_INFINITY; LANES].exp_negative(), [0.0; LANES]);
        assert_eq!([0.0; LANES].exp_negative(), [1.0; LANES]);
        assert!([f32::NAN; LANES].exp_negative()[0].is_nan());
    }
}
