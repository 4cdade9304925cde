//! NEON with matrix products of bytes: `usmmla` multiplies two rows of eight weights with two tokens of eight
//! values and adds the four sums to the lanes of a register.
//!
//! The values of a tile are first laid out so that those of two tokens follow each other in a vector. A single token has
//! no second one to share the weights with: it takes the path for dot products.

use std::{
    arch::{
        aarch64::{
            int8x16_t, int32x4_t, uint8x16_t, vaddq_s32, vandq_u8, vcombine_u8, vdup_n_u8, vdupq_n_s32,
            vdupq_n_u8, vdupq_n_u64, vreinterpretq_s8_s64, vreinterpretq_s64_s8, vreinterpretq_u8_u64,
            vreinterpretq_u64_u8, vshrq_n_u8, vst1q_s8, vuzp1q_s32, vuzp2q_s32, vzip1q_s64, vzip1q_u64,
            vzip2q_s64, vzip2q_u64,
        },
        asm,
    },
    array,
};

use super::dot::{self, WIDTH, load, load_signed, padded, shifted};
use crate::{
    TernaryLayout,
    matmul::{Sink, Task},
    ternary::GROUP,
};

/// Tokens whose sums are kept in registers together, in two parts each.
const TILE: usize = 8;

/// Columns of one instruction.
const COLS: usize = WIDTH / 2;

/// Eight values of two tokens.
type Pair = [i8; WIDTH];

/// Sums of two rows and two tokens, for rows 0 and 1 and for rows 2 and 3.
type Sums = [int32x4_t; 2];

/// Computes a task.
#[target_feature(enable = "neon,dotprod,i8mm")]
pub(crate) fn run(task: &Task<'_>, sink: &impl Sink) {
    let tokens = task.x.tokens();
    let mut pairs = Vec::new();
    // Tiles of nearly the same size, but of whole pairs.
    let tiles = tokens.div_ceil(TILE);
    let mut token = 0;
    for tile in 0..tiles {
        let rest = tokens - token;
        let count = rest.div_ceil(tiles - tile).next_multiple_of(2).min(rest);
        match count {
            1 => dot::rows::<1>(task, token, sink),
            2 => rows::<1>(task, token, count, &mut pairs, sink),
            3 | 4 => rows::<2>(task, token, count, &mut pairs, sink),
            5 | 6 => rows::<3>(task, token, count, &mut pairs, sink),
            _ => rows::<{ TILE / 2 }>(task, token, count, &mut pairs, sink),
        }
        token += count;
    }
}

/// The `count` tokens from `token` on, which are `P` pairs or one less, for all units of the task.
#[target_feature(enable = "neon,dotprod,i8mm")]
fn rows<const P: usize>(
    task: &Task<'_>,
    token: usize,
    count: usize,
    pairs: &mut Vec<Pair>,
    sink: &impl Sink,
) {
    pair::<P>(task, token, count, pairs);
    let x = pairs.as_chunks::<P>().0;
    for unit in task.first..task.last {
        let codes = task.weights.unit(unit);
        let sums = match task.weights.layout {
            TernaryLayout::Quarters => quarters::<P>(codes, x),
            TernaryLayout::I2s => i2s::<P>(codes, x),
        };
        for (t, sums) in sums.as_flattened()[..count].iter().enumerate() {
            let offset = task.x.tokens[token + t].sum;
            sink(unit, token + t, sums.map(|sum| sum - offset));
        }
    }
}

/// Lays out the values of `P` pairs of tokens: for each eight columns, those of all pairs. The columns are filled up to
/// whole vectors, and the tokens to whole pairs, with zeros.
#[target_feature(enable = "neon")]
fn pair<const P: usize>(task: &Task<'_>, token: usize, count: usize, pairs: &mut Vec<Pair>) {
    pairs.clear();
    pairs.resize(task.x.cols().div_ceil(WIDTH) * 2 * P, [0; WIDTH]);
    let none = vec![0; if count < 2 * P { task.x.cols() } else { 0 }];
    let values = |t: usize| if t < count { task.x.values(token + t) } else { &none[..] };
    for p in 0..P {
        let (first, first_rest) = values(2 * p).as_chunks::<WIDTH>();
        let (second, second_rest) = values(2 * p + 1).as_chunks::<WIDTH>();
        let rest = [(padded(first_rest), padded(second_rest))];
        let vectors = first.iter().zip(second).chain(rest.iter().map(|(a, b)| (a, b)));
        for ((a, b), out) in vectors.zip(pairs.as_chunks_mut::<P>().0.as_chunks_mut::<2>().0) {
            let [a, b] = [a, b].map(|x| vreinterpretq_s64_s8(load_signed(x)));
            store(vreinterpretq_s8_s64(vzip1q_s64(a, b)), &mut out[0][p]);
            store(vreinterpretq_s8_s64(vzip2q_s64(a, b)), &mut out[1][p]);
        }
    }
}

/// The sums of codes times values, for each token of the pairs those of the four rows in `codes`.
///
/// Codes are masked out where they are, and count once, 4, 16 and 64 times.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn quarters<const P: usize>(codes: &[u8], x: &[[Pair; P]]) -> [[[i32; 4]; 2]; P] {
    let mut sums = [[[vdupq_n_s32(0); 2]; P]; 2];
    let (whole, rest) = codes.as_chunks::<WIDTH>();
    let (x, _) = x.as_chunks::<2>();
    for (bytes, x) in whole.iter().zip(x) {
        step(bytes, x, &mut sums);
    }
    if !rest.is_empty() {
        // A copy: a vector that is read behind the end might not be there.
        step(&padded(rest), &x[whole.len()], &mut sums);
    }
    finish(&sums, [0, -2, -4, -6])
}

/// Adds one vector of codes times one of each token's values.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn step<const P: usize>(codes: &[u8; WIDTH], x: &[[Pair; P]; 2], sums: &mut [[Sums; P]; 2]) {
    let masks = [
        vcombine_u8(vdup_n_u8(0b0000_0011), vdup_n_u8(0b0000_1100)),
        vcombine_u8(vdup_n_u8(0b0011_0000), vdup_n_u8(0b1100_0000)),
    ];
    for (half, codes) in codes.as_chunks::<COLS>().0.iter().enumerate() {
        // The same bytes for both rows of an instruction.
        let bytes = vreinterpretq_u8_u64(vdupq_n_u64(u64::from_le_bytes(*codes)));
        let planes = masks.map(|mask| vandq_u8(bytes, mask));
        for (sums, x) in sums[half].iter_mut().zip(&x[half]) {
            let x = load_signed(x);
            for (sum, plane) in sums.iter_mut().zip(planes) {
                *sum = usmmla(*sum, plane, x);
            }
        }
    }
}

/// [`quarters`] for I2_S: two rows side by side in a register.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn i2s<const P: usize>(codes: &[u8], x: &[[Pair; P]]) -> [[[i32; 4]; 2]; P] {
    let width = codes.len() / 4;
    let x = x.as_chunks::<{ GROUP / COLS }>().0;
    let rows: [&[[u8; GROUP / 4]]; 4] =
        array::from_fn(|i| &codes[i * width..(i + 1) * width].as_chunks().0[..x.len()]);
    let low = vdupq_n_u8(3);
    let mut sums = [[[vdupq_n_s32(0); 2]; P]; 2];
    for (group, x) in x.iter().enumerate() {
        for half in 0..2 {
            let [a, b, c, d] = rows.map(|row| vreinterpretq_u64_u8(load(&row[group].as_chunks().0[half])));
            let mut bytes = [[vzip1q_u64(a, b), vzip1q_u64(c, d)], [vzip2q_u64(a, b), vzip2q_u64(c, d)]]
                .map(|rows| rows.map(|bytes| vreinterpretq_u8_u64(bytes)));
            for field in 0..4 {
                for part in 0..2 {
                    let planes = bytes[part].map(|bytes| vandq_u8(bytes, low));
                    // The first values belong to the highest bits.
                    let x = &x[4 * (3 - field) + 2 * half + part];
                    for (sums, x) in sums[part].iter_mut().zip(x) {
                        let x = load_signed(x);
                        for (sum, plane) in sums.iter_mut().zip(planes) {
                            *sum = usmmla(*sum, plane, x);
                        }
                    }
                    bytes[part] = bytes[part].map(|bytes| vshrq_n_u8::<2>(bytes));
                }
            }
        }
    }
    finish(&sums, [0; 4])
}

/// For each token the sums of the four rows, shifted.
#[target_feature(enable = "neon")]
#[inline]
fn finish<const P: usize>([a, b]: &[[Sums; P]; 2], shift: [i32; 4]) -> [[[i32; 4]; 2]; P] {
    array::from_fn(|p| {
        let [first, second] = array::from_fn(|rows| vaddq_s32(a[p][rows], b[p][rows]));
        [shifted(vuzp1q_s32(first, second), shift), shifted(vuzp2q_s32(first, second), shift)]
    })
}

/// Adds to the lanes of `sum` the products of the two rows of `a` with those of `b`.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn usmmla(mut sum: int32x4_t, a: uint8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: An instruction of this function's feature, on registers alone.
    unsafe {
        asm!(
            "usmmla {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

#[target_feature(enable = "neon")]
#[inline]
fn store(x: int8x16_t, out: &mut Pair) {
    // SAFETY: The array has room for as many bytes as are stored.
    unsafe { vst1q_s8(out.as_mut_ptr(), x) };
}
