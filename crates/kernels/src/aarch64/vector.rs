//! [`Vector`] in registers of NEON.
//!
//! NEON is part of the architecture, so no function has to be compiled for it.

use std::arch::{
    aarch64::{
        float32x4_t, int8x16_t, int16x8_t, int32x4_t, uint16x8_t, vaddq_f32, vaddq_s32, vandq_u32, vbslq_f32,
        vcgtq_f32, vcgtq_u32, vcltq_f32, vcombine_s16, vcvtnq_s32_f32, vcvtq_f32_s32, vdupq_n_f32,
        vdupq_n_s16, vdupq_n_s32, vdupq_n_u32, vfmaq_f32, vget_low_s8, vget_low_s16, vld1q_f32, vld1q_s8,
        vld1q_s16, vld1q_u16, vld1q_u32, vmlal_high_s16, vmlal_s16, vmovl_high_s8, vmovl_high_s16, vmovl_s8,
        vmovl_s16, vmulq_f32, vmvnq_u32, vqmovn_s32, vreinterpretq_f32_s32, vreinterpretq_f32_u32,
        vreinterpretq_u32_f32, vrndnq_f32, vshlq_n_s32, vst1q_f32, vst1q_s16, vsubq_f32, vuzp1q_s8,
        vuzp2q_s8,
    },
    asm,
};

use crate::{
    lanes::{LANES, Lanes},
    vector::Vector,
};

/// Four registers of four floats.
#[derive(Clone, Copy)]
pub(crate) struct Neon([float32x4_t; 4]);

/// 16 pairs, with the first elements of all apart from the second ones: so a multiplication of either goes to the lane
/// of its pair.
#[derive(Clone, Copy)]
pub(crate) struct Pairs {
    first: [int16x8_t; 2],
    second: [int16x8_t; 2],
}

impl Neon {
    #[inline(always)]
    fn each(self, f: impl Fn(float32x4_t) -> float32x4_t) -> Self {
        Self(self.0.map(f))
    }
    #[inline(always)]
    fn with(self, other: Self, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Self {
        let [a, b, c, d] = self.0;
        let [x, y, z, w] = other.0;
        Self([f(a, x), f(b, y), f(c, z), f(d, w)])
    }
}

// SAFETY (of all blocks): these are instructions of NEON, which is part of the architecture; loads and stores touch the 16
// elements of the reference, or 32.
impl Vector for Neon {
    type Ints = [int32x4_t; 4];
    type Pairs = Pairs;
    const STRIP: usize = 1;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: See above.
        Self([unsafe { vdupq_n_f32(x) }; 4])
    }
    #[inline(always)]
    fn load(x: &Lanes) -> Self {
        let at = x.as_ptr();
        // SAFETY: See above.
        Self(unsafe { [vld1q_f32(at), vld1q_f32(at.add(4)), vld1q_f32(at.add(8)), vld1q_f32(at.add(12))] })
    }
    #[inline(always)]
    fn load_halves(x: &[u16; LANES]) -> Self {
        let at = x.as_ptr();
        // SAFETY: See above.
        let (a, b) = unsafe { (widened(vld1q_u16(at)), widened(vld1q_u16(at.add(8)))) };
        Self([a[0], a[1], b[0], b[1]])
    }
    #[inline(always)]
    fn load_i16(x: &[i16; LANES]) -> Self {
        let at = x.as_ptr();
        // SAFETY: See above.
        unsafe {
            let floats = |x| [vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_high_s16(x))];
            let (a, b) = (floats(vld1q_s16(at)), floats(vld1q_s16(at.add(8))));
            Self([a[0], a[1], b[0], b[1]])
        }
    }
    #[inline(always)]
    fn store(self, out: &mut Lanes) {
        for (x, out) in self.0.into_iter().zip(out.as_chunks_mut::<4>().0) {
            // SAFETY: See above.
            unsafe { vst1q_f32(out.as_mut_ptr(), x) }
        }
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: See above.
        self.with(other, |a, b| unsafe { vsubq_f32(a, b) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: See above.
        self.with(other, |a, b| unsafe { vmulq_f32(a, b) })
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: See above.
        self.with(other, |a, b| unsafe { vaddq_f32(a, b) })
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        let add = |i: usize| {
            // SAFETY: See above.
            unsafe { vfmaq_f32(b.0[i], self.0[i], a.0[i]) }
        };
        Self([add(0), add(1), add(2), add(3)])
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: See above.
        self.with(other, |a, b| unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: See above.
        self.each(|x| unsafe { vrndnq_f32(x) })
    }
    #[inline(always)]
    fn power_of_two(self) -> Self {
        // SAFETY: See above.
        self.each(|n| unsafe {
            let exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))
        })
    }
    #[inline(always)]
    fn first(self, count: usize, other: Self) -> Self {
        const INDEX: [[u32; 4]; 4] = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]];
        let count = count.min(LANES) as u32;
        let keep = |i: usize| {
            // SAFETY: See above; the index has four elements.
            unsafe {
                let below = vcgtq_u32(vdupq_n_u32(count), vld1q_u32(INDEX[i].as_ptr()));
                vbslq_f32(below, self.0[i], other.0[i])
            }
        };
        Self([keep(0), keep(1), keep(2), keep(3)])
    }
    #[inline(always)]
    fn zero_where_below(self, x: Self, limit: f32) -> Self {
        // SAFETY: See above.
        self.with(x, |y, x| unsafe {
            let above = vmvnq_u32(vcltq_f32(x, vdupq_n_f32(limit)));
            vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(y), above))
        })
    }
    #[inline(always)]
    fn store_i16(self, out: &mut [i16; LANES]) {
        for (x, out) in self.0.as_chunks::<2>().0.iter().zip(out.as_chunks_mut::<8>().0) {
            // SAFETY: See above.
            unsafe {
                let [low, high] = x.map(|x| vqmovn_s32(vcvtnq_s32_f32(x)));
                vst1q_s16(out.as_mut_ptr(), vcombine_s16(low, high));
            }
        }
    }
    #[inline(always)]
    fn zeros() -> [int32x4_t; 4] {
        // SAFETY: See above.
        [unsafe { vdupq_n_s32(0) }; 4]
    }
    #[inline(always)]
    fn of_ints(x: [int32x4_t; 4]) -> Self {
        // SAFETY: See above.
        Self(x.map(|x| unsafe { vcvtq_f32_s32(x) }))
    }
    #[inline(always)]
    fn splat_pair([first, second]: [i16; 2]) -> Pairs {
        // SAFETY: See above.
        let splat = |x| [unsafe { vdupq_n_s16(x) }; 2];
        Pairs { first: splat(first), second: splat(second) }
    }
    #[inline(always)]
    fn load_pairs(x: &[i8; 2 * LANES]) -> Pairs {
        // SAFETY: See above.
        unsafe {
            let (low, high) = (vld1q_s8(x.as_ptr()), vld1q_s8(x.as_ptr().add(LANES)));
            let widen = |x: int8x16_t| [vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x)];
            Pairs { first: widen(vuzp1q_s8(low, high)), second: widen(vuzp2q_s8(low, high)) }
        }
    }
    #[inline(always)]
    fn add_products(sum: [int32x4_t; 4], a: Pairs, b: Pairs) -> [int32x4_t; 4] {
        // SAFETY: See above.
        let add = |[low, high]: [int32x4_t; 2], a, b| unsafe {
            [vmlal_s16(low, vget_low_s16(a), vget_low_s16(b)), vmlal_high_s16(high, a, b)]
        };
        let low = add(add([sum[0], sum[1]], a.first[0], b.first[0]), a.second[0], b.second[0]);
        let high = add(add([sum[2], sum[3]], a.first[1], b.first[1]), a.second[1], b.second[1]);
        [low[0], low[1], high[0], high[1]]
    }
}

/// The numbers with the bits of halves; Rust has no stable intrinsics for them.
#[inline(always)]
fn widened(halves: uint16x8_t) -> [float32x4_t; 2] {
    let (low, high): (float32x4_t, float32x4_t);
    // SAFETY: Two instructions of NEON, on registers alone; the first output is written before the last input is read.
    unsafe {
        asm!(
            "fcvtl {low:v}.4s, {halves:v}.4h",
            "fcvtl2 {high:v}.4s, {halves:v}.8h",
            low = out(vreg) low,
            high = lateout(vreg) high,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    [low, high]
}
