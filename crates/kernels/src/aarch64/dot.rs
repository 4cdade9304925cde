//! NEON with dot products: `sdot` adds, in each 32-bit lane, four products of signed bytes.
//!
//! Three of the four codes of a byte are masked out where they are and not shifted down: the second counts four times,
//! the third 16 times, which an exact shift of the whole sum undoes. The fourth has the bit that would be a sign there,
//! so it is shifted down. Since a code is the weight plus one, the sum of the activations is taken off at the end.

use std::{
    arch::{
        aarch64::{
            int8x16_t, int32x4_t, uint8x16_t, vaddq_s32, vaddvq_s32, vandq_u8, vdupq_n_s32, vdupq_n_u8,
            vld1q_s8, vld1q_s32, vld1q_u8, vpaddq_s32, vreinterpretq_s8_u8, vshlq_s32, vshrq_n_u8,
            vsraq_n_s32, vst1q_s32,
        },
        asm,
    },
    array,
};

use crate::{
    TernaryLayout, lanes,
    matmul::{Sink, Task, tiles},
    ternary::GROUP,
};

/// Bytes of a vector.
pub(super) const WIDTH: usize = 16;

/// Tokens whose sums are kept in registers together: 4 x 5 of the 32.
const TILE: usize = 5;

/// How far ahead of its use a single token's stream of codes is asked for.
const AHEAD: usize = 1024;

/// Computes a task.
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn run(task: &Task<'_>, sink: &impl Sink) {
    for (token, count) in tiles(task.x.tokens(), TILE) {
        match count {
            1 => rows::<1>(task, token, sink),
            2 => rows::<2>(task, token, sink),
            3 => rows::<3>(task, token, sink),
            4 => rows::<4>(task, token, sink),
            _ => rows::<TILE>(task, token, sink),
        }
    }
}

/// The tokens `token..token + T` for all units of the task.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn rows<const T: usize>(task: &Task<'_>, token: usize, sink: &impl Sink) {
    let values: [&[i8]; T] = array::from_fn(|t| task.x.values(token + t));
    for unit in task.first..task.last {
        let codes = task.weights.unit(unit);
        let sums = match task.weights.layout {
            // Two sums for each row of a single token, since each addition waits for the one before.
            TernaryLayout::Quarters if T == 1 => quarters::<T, 2>(codes, &values),
            TernaryLayout::Quarters => quarters::<T, 1>(codes, &values),
            TernaryLayout::I2s if T == 1 => values.map(|values| i2s_row_by_row(codes, values)),
            TernaryLayout::I2s => i2s::<T>(codes, &values),
        };
        for (t, sums) in sums.into_iter().enumerate() {
            let offset = task.x.tokens[token + t].sum;
            sink(unit, token + t, sums.map(|sum| sum - offset));
        }
    }
}

/// The sums of codes times values, for each of `T` tokens those of the four rows in `codes`; each in `U` parts.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn quarters<const T: usize, const U: usize>(codes: &[u8], values: &[&[i8]; T]) -> [[i32; 4]; T] {
    let mut sums = [[[vdupq_n_s32(0); 4]; T]; U];
    let (whole, rest) = codes.as_chunks::<WIDTH>();
    let (steps, odd) = whole.as_chunks::<U>();
    let value_steps = values.map(|values| &values.as_chunks::<WIDTH>().0.as_chunks::<U>().0[..steps.len()]);
    for (i, bytes) in steps.iter().enumerate() {
        if T == 1 {
            lanes::prefetch(bytes.as_ptr().wrapping_byte_add(AHEAD));
        }
        for u in 0..U {
            step(&bytes[u], value_steps.map(|values| &values[i][u]), &mut sums[u]);
        }
    }
    for (i, bytes) in odd.iter().enumerate() {
        let at = steps.len() * U + i;
        step(bytes, values.map(|values| &values.as_chunks().0[at]), &mut sums[i]);
    }
    if !rest.is_empty() {
        // Copies: a vector that is read behind the end might not be there.
        let at = codes.len() - rest.len();
        let x = values.map(|values| padded(&values[at..codes.len()]));
        step(&padded(rest), x.each_ref(), &mut sums[0]);
    }
    array::from_fn(|t| {
        let row = |i: usize| sums.iter().fold(vdupq_n_s32(0), |sum, part| vaddq_s32(sum, part[t][i]));
        shifted(vpaddq_s32(vpaddq_s32(row(0), row(1)), vpaddq_s32(row(2), row(3))), [0, -2, -4, 0])
    })
}

/// Adds one vector of codes times one of each token's values.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn step<const T: usize>(codes: &[u8; WIDTH], x: [&[i8; WIDTH]; T], sums: &mut [[int32x4_t; 4]; T]) {
    let planes = planes(load(codes));
    for (sums, x) in sums.iter_mut().zip(x) {
        let x = load_signed(x);
        for (sum, plane) in sums.iter_mut().zip(planes) {
            *sum = sdot(*sum, plane, x);
        }
    }
}

/// The sums for I2_S and a single token, one row after the other: a single stream of codes, as memory likes it.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn i2s_row_by_row(codes: &[u8], values: &[i8]) -> [i32; 4] {
    let width = codes.len() / 4;
    array::from_fn(|row| {
        let groups = codes[row * width..(row + 1) * width].as_chunks::<{ GROUP / 4 }>().0;
        // For both halves of a group one sum for each field of a byte, counted once, 4 times, 16 times and once.
        let mut sums = [[vdupq_n_s32(0); 4]; 2];
        for (bytes, values) in groups.iter().zip(values.as_chunks::<GROUP>().0) {
            lanes::prefetch(bytes.as_ptr().wrapping_add(AHEAD));
            let (halves, values) = (bytes.as_chunks::<WIDTH>().0, values.as_chunks::<WIDTH>().0);
            for (half, sums) in sums.iter_mut().enumerate() {
                for (field, plane) in planes(load(&halves[half])).into_iter().enumerate() {
                    // The first values belong to the highest bits.
                    sums[field] = sdot(sums[field], plane, load_signed(&values[2 * (3 - field) + half]));
                }
            }
        }
        let [a, b, c, d] = array::from_fn(|field| vaddq_s32(sums[0][field], sums[1][field]));
        vaddvq_s32(vsraq_n_s32::<4>(vsraq_n_s32::<2>(vaddq_s32(a, d), b), c))
    })
}

/// [`quarters`] for I2_S: the four rows side by side, so that each load of values serves four products.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn i2s<const T: usize>(codes: &[u8], values: &[&[i8]; T]) -> [[i32; 4]; T] {
    let width = codes.len() / 4;
    let groups = width / (GROUP / 4);
    let rows: [&[[u8; GROUP / 4]]; 4] =
        array::from_fn(|i| &codes[i * width..(i + 1) * width].as_chunks().0[..groups]);
    let values = values.map(|values| &values.as_chunks::<GROUP>().0[..groups]);
    let low = vdupq_n_u8(3);
    let mut sums = [[vdupq_n_s32(0); 4]; T];
    for group in 0..groups {
        for half in 0..2 {
            let mut bytes = rows.map(|row| load(&row[group].as_chunks().0[half]));
            for field in 0..4 {
                let planes = bytes.map(|bytes| vreinterpretq_s8_u8(vandq_u8(bytes, low)));
                for (sums, values) in sums.iter_mut().zip(values) {
                    let x = load_signed(&values[group].as_chunks().0[2 * (3 - field) + half]);
                    for (sum, plane) in sums.iter_mut().zip(planes) {
                        *sum = sdot(*sum, plane, x);
                    }
                }
                bytes = bytes.map(|bytes| vshrq_n_u8::<2>(bytes));
            }
        }
    }
    sums.map(|[a, b, c, d]| shifted(vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)), [0; 4]))
}

/// The four codes of each byte: the first three where they are in it, the last shifted down.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn planes(bytes: uint8x16_t) -> [int8x16_t; 4] {
    [
        vandq_u8(bytes, vdupq_n_u8(0b0000_0011)),
        vandq_u8(bytes, vdupq_n_u8(0b0000_1100)),
        vandq_u8(bytes, vdupq_n_u8(0b0011_0000)),
        vshrq_n_u8::<6>(bytes),
    ]
    .map(|plane| vreinterpretq_s8_u8(plane))
}

/// Adds to each lane of `sum` four products of `a` and `b`.
#[target_feature(enable = "neon,dotprod")]
#[inline]
pub(super) fn sdot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: An instruction of this function's feature, on registers alone.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// The bytes with zeros behind them; there are less than [`WIDTH`].
pub(super) fn padded<T: Copy + Default>(bytes: &[T]) -> [T; WIDTH] {
    let mut out = [T::default(); WIDTH];
    out[..bytes.len()].copy_from_slice(bytes);
    out
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load(bytes: &[u8; WIDTH]) -> uint8x16_t {
    // SAFETY: The array has as many bytes as are loaded.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_signed(bytes: &[i8; WIDTH]) -> int8x16_t {
    // SAFETY: The array has as many bytes as are loaded.
    unsafe { vld1q_s8(bytes.as_ptr()) }
}

/// The lanes, each shifted up by so many bits, or down if it is less than 0.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn shifted(lanes: int32x4_t, by: [i32; 4]) -> [i32; 4] {
    let mut out = [0; 4];
    // SAFETY: Both arrays have four integers.
    unsafe { vst1q_s32(out.as_mut_ptr(), vshlq_s32(lanes, vld1q_s32(by.as_ptr()))) };
    out
}
