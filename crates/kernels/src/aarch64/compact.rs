//! NEON with dot products for [`CompactMatrix`](crate::CompactMatrix): a row after the other, one stream of codes, for up
//! to four tokens at a time.

use std::{
    arch::aarch64::{
        float32x4_t, int8x16_t, int32x4_t, uint8x16_t, vaddq_s32, vaddvq_s32, vandq_u8, vcvtq_f32_s32,
        vdupq_n_f32, vdupq_n_s32, vdupq_n_u8, veorq_u8, vfmaq_n_f32, vld1q_s32, vreinterpretq_s8_u8,
        vshrq_n_u8, vst1q_f32,
    },
    array,
};

use super::dot::{load, load_signed, sdot};
use crate::{
    compact::{BLOCK, CompactBits, Task, by_tiles, product},
    lanes::{self, LANES},
    quantize::Line,
};

/// Tokens whose sums are kept in registers together: 4 x 4 of the 32.
const TILE: usize = 4;

/// How far ahead of their use codes are asked for.
const AHEAD: usize = 1024;

/// Computes a task.
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn run(task: &Task<'_>, out: &mut [&mut [f32]]) {
    by_tiles!(tile, [1, 2, 3], TILE, task, out);
}

/// The tokens `token..token + T` for all rows.
#[target_feature(enable = "neon,dotprod")]
fn tile<const T: usize>(task: &Task<'_>, token: usize, out: &mut [&mut [f32]]) {
    let inputs: [_; T] = array::from_fn(|t| task.inputs.token(token + t));
    for row in 0..out[0].len() {
        let (codes, scales) = task.row(row);
        match task.bits() {
            CompactBits::Eight => {
                let mut sums = [[vdupq_n_s32(0); 4]; T];
                for (k, codes) in codes.iter().enumerate() {
                    lanes::prefetch(codes.as_ptr().wrapping_add(AHEAD));
                    // Takes off the 128 that codes are too large by, so that the sums begin with 0.
                    let codes = quarters(codes)
                        .map(|codes| vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(0b1000_0000))));
                    for (sums, input) in sums.iter_mut().zip(&inputs) {
                        add(sums, codes, &input.0[k]);
                    }
                }
                for ((out, [a, b, c, d]), input) in out.iter_mut().zip(sums).zip(&inputs) {
                    let sum = vaddvq_s32(vaddq_s32(vaddq_s32(a, b), vaddq_s32(c, d)));
                    out[row] = product([sum], scales[0], input.2);
                }
            }
            CompactBits::Four => {
                let mut totals = [[vdupq_n_f32(0.0); 4]; T];
                for (g, (codes, scale)) in codes.iter().zip(scales).enumerate() {
                    lanes::prefetch(codes.as_ptr().wrapping_add(AHEAD));
                    let codes = quarters(codes);
                    let first = codes.map(|codes| vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(15))));
                    let second = codes.map(|codes| vreinterpretq_s8_u8(vshrq_n_u8::<4>(codes)));
                    for (total, (values, starts, _)) in totals.iter_mut().zip(&inputs) {
                        let mut sums = load_sums(&starts[g]);
                        add(&mut sums, first, &values[2 * g]);
                        add(&mut sums, second, &values[2 * g + 1]);
                        add_scaled(total, sums, *scale);
                    }
                }
                for ((out, total), input) in out.iter_mut().zip(totals).zip(&inputs) {
                    out[row] = lanes::sum(store(total)) * input.2;
                }
            }
        }
    }
}

/// Adds the products of a block of codes and values.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn add(sums: &mut [int32x4_t; 4], codes: [int8x16_t; 4], values: &Line) {
    for ((sum, codes), values) in sums.iter_mut().zip(codes).zip(values.0.as_chunks().0) {
        *sum = sdot(*sum, codes, load_signed(values));
    }
}

/// Adds `sums * scale`, lane by lane.
#[target_feature(enable = "neon")]
#[inline]
fn add_scaled(total: &mut [float32x4_t; 4], sums: [int32x4_t; 4], scale: f32) {
    for (total, sum) in total.iter_mut().zip(sums) {
        *total = vfmaq_n_f32(*total, vcvtq_f32_s32(sum), scale);
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn quarters(codes: &[u8; BLOCK]) -> [uint8x16_t; 4] {
    let codes = codes.as_chunks().0;
    [load(&codes[0]), load(&codes[1]), load(&codes[2]), load(&codes[3])]
}

#[target_feature(enable = "neon")]
#[inline]
fn load_sums(lanes: &[i32; LANES]) -> [int32x4_t; 4] {
    let at = lanes.as_ptr();
    // SAFETY: The array has as many integers as are loaded.
    unsafe { [vld1q_s32(at), vld1q_s32(at.add(4)), vld1q_s32(at.add(8)), vld1q_s32(at.add(12))] }
}

#[target_feature(enable = "neon")]
#[inline]
fn store(lanes: [float32x4_t; 4]) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for (lanes, out) in lanes.into_iter().zip(out.as_chunks_mut::<4>().0) {
        // SAFETY: There is room for four.
        unsafe { vst1q_f32(out.as_mut_ptr(), lanes) };
    }
    out
}
