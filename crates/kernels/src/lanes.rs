//! Sixteen floats side by side, in portable Rust that the compiler turns into vector instructions.
//!
//! A sum over many elements is kept in lanes and added up in one fixed order, so that it has the same bits whatever the
//! width of the vectors is.

/// Number of lanes.
pub(crate) const LANES: usize = 16;

/// One vector.
pub(crate) type Lanes = [f32; LANES];

/// `ln 2` in two parts, the first with few bits, so that its products with small integers are exact.
pub(crate) const LN2_HIGH: f32 = 0.693_359_4;
pub(crate) const LN2_LOW: f32 = -2.121_944_4e-4;

/// The polynomial of Cephes' `expf`, highest power first: `e^r = 1 + r + r^2 p(r)` for `|r| <= ln 2 / 2`.
pub(crate) const EXP: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

/// `a * b + c`, fused where that is an instruction.
#[inline(always)]
pub(crate) fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Adds `a * b` lane by lane.
#[inline(always)]
pub(crate) fn accumulate<const FMA: bool>(sum: &mut Lanes, a: &Lanes, b: &Lanes) {
    for i in 0..LANES {
        sum[i] = mul_add::<FMA>(a[i], b[i], sum[i]);
    }
}

/// The number with the bits of an IEEE 754 half. Without branches, so that a loop over it becomes vector instructions.
#[inline(always)]
pub(crate) fn half(bits: u16) -> f32 {
    let half = u32::from(bits);
    // The half's exponent and fraction in the place of a single's; the product puts the exponent right, for subnormal
    // numbers too.
    let magnitude = f32::from_bits((half & 0x7fff) << 13) * f32::from_bits((254 - 15) << 23);
    let special = if half & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (half & 0x8000) << 16)
}

/// Asks for the cache line at an address, which may be any.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64, and a prefetch of an address that is not mapped does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: A prefetch of an address that is not mapped does nothing. Rust has no stable intrinsic for it.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{at}]", at = in(reg) at.addr(), options(nomem, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// Prefetches the cache line at an address, which may be any, into the second-level cache.
#[inline(always)]
fn prefetch_later<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: SSE is part of x86-64, and a prefetch of an address that is not mapped does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    prefetch(at);
}

/// For a loop that reads one stream of memory, called for each line that it reads: prefetches the line that it reads soon and one that it
/// reads later. The first-level cache alone has too few buffers for lines on their way from memory, and the hardware's own prefetching
/// ends at each page.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn prefetch_stream<T>(at: *const T) {
    const SOON: usize = 1024;
    const LATER: usize = 8192;
    prefetch(at.wrapping_byte_add(SOON));
    prefetch_later(at.wrapping_byte_add(LATER));
}

/// Prefetches `count` elements from an address on into the second-level cache.
#[inline(always)]
pub(crate) fn prefetch_all_later<T>(at: *const T, count: usize) {
    for line in (0..count * size_of::<T>()).step_by(64) {
        prefetch_later(at.wrapping_byte_add(line));
    }
}

/// Prefetches `count` elements from an address on into the first-level cache.
#[inline(always)]
pub(crate) fn prefetch_all<T>(at: *const T, count: usize) {
    for line in (0..count * size_of::<T>()).step_by(64) {
        prefetch(at.wrapping_byte_add(line));
    }
}

/// Adds up the lanes, by halves.
#[inline(always)]
pub(crate) fn sum(mut lanes: Lanes) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest lane. NaN lanes are passed over.
#[inline(always)]
pub(crate) fn max(lanes: Lanes) -> f32 {
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Up to 16 elements from the front of `x`, the rest 0.
#[inline(always)]
pub(crate) fn partial(x: &[f32]) -> Lanes {
    let mut lanes = [0.0; LANES];
    lanes[..x.len()].copy_from_slice(x);
    lanes
}

/// `e^x` to within 2 units in the last place; 0 below -87 and infinite above 88, just before the results become
/// subnormal and overflow.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = mul_add::<FMA>(n, -LN2_HIGH, x);
    let r = mul_add::<FMA>(n, -LN2_LOW, r);
    let mut p = EXP[0];
    for coefficient in &EXP[1..] {
        p = mul_add::<FMA>(p, r, *coefficient);
    }
    let y = mul_add::<FMA>(p * r, r, r) + 1.0;
    // In range `n` is -126 to 127, so the exponent is that of a normal float.
    let power = f32::from_bits(((n.clamp(-126.0, 127.0) as i32 + 127) as u32) << 23);
    let y = if x < -87.0 { 0.0 } else { y * power };
    if x > 88.0 { f32::INFINITY } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        let mut worst = 0.0f64;
        for i in -86_990..88_000 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp::<true>(x)) - exact).abs() / exact);
            worst = worst.max((f64::from(exp::<false>(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.4e-7, "{worst:e}");
        assert_eq!(exp::<true>(0.0), 1.0);
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<true>(f32::MAX), f32::INFINITY);
        assert!(exp::<true>(f32::NAN).is_nan());
    }

    #[test]
    fn sums_take_all_lanes() {
        let lanes = std::array::from_fn(|i| i as f32);
        assert_eq!(sum(lanes), 120.0);
        assert_eq!(max(lanes), 15.0);
    }
}
