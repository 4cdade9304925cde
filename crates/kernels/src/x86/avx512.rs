//! AVX-512-VNNI: `vpdpbusd` adds, in each 32-bit lane, four products of unsigned codes with signed activations.
//!
//! The four codes of a byte are masked out where they are and not shifted down: the second counts four times, the
//! third 16 times, the fourth 64 times, which an exact shift of the whole sum undoes. Since a code is the weight
//! plus one, the sum of the activations is taken off at the end.

use std::arch::x86_64::{
    __m128i, __m512i, __mmask64, _MM_HINT_T0, _mm_add_epi32, _mm_prefetch, _mm_setr_epi32, _mm_srav_epi32,
    _mm_storeu_si128, _mm256_add_epi32, _mm256_castsi256_si128, _mm256_extracti128_si256, _mm512_add_epi32,
    _mm512_and_si512, _mm512_castsi512_si256, _mm512_dpbusd_epi32, _mm512_extracti64x4_epi64,
    _mm512_loadu_si512, _mm512_maskz_loadu_epi8, _mm512_set1_epi8, _mm512_setzero_si512,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use crate::matmul::{Sink, Task};

/// Bytes of a vector.
const WIDTH: usize = 64;

/// Tokens whose sums are kept in registers together: 4 x 6 of the 32.
const TILE: usize = 6;

/// How far ahead of its use a single token's stream of codes is asked for; the hardware's own prefetching ends at
/// each page.
const AHEAD: usize = 2048;

/// Computes a task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(crate) fn run(task: &Task<'_>, sink: &impl Sink) {
    let tokens = task.x.tokens();
    // Tiles of nearly the same size: 8 tokens are 4 and 4, not 6 and 2.
    let tiles = tokens.div_ceil(TILE);
    let mut token = 0;
    for tile in 0..tiles {
        let count = (tokens - token).div_ceil(tiles - tile);
        match count {
            1 => rows::<1>(task, token, sink),
            2 => rows::<2>(task, token, sink),
            3 => rows::<3>(task, token, sink),
            4 => rows::<4>(task, token, sink),
            5 => rows::<5>(task, token, sink),
            _ => rows::<TILE>(task, token, sink),
        }
        token += count;
    }
}

/// The tokens `token..token + T` for all rows of the task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn rows<const T: usize>(task: &Task<'_>, token: usize, sink: &impl Sink) {
    let cols = task.weights.cols;
    let values: [&[i8]; T] = std::array::from_fn(|t| task.x.values(token + t));
    for row in task.first..task.last {
        let codes = &task.weights.codes[row * cols..(row + 1) * cols];
        let sums = dot::<T>(codes, &values);
        for (t, sums) in sums.into_iter().enumerate() {
            let offset = task.x.tokens[token + t].sum;
            // Codes are weights + 1. Wrapping: 128 * 131072 * 64 is just beyond what an i32 holds in between.
            sink(row, token + t, sums.map(|sum| sum.wrapping_sub(offset)));
        }
    }
}

/// The sums of codes times values, for each of `T` tokens those of the four rows in `codes`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn dot<const T: usize>(codes: &[u8], values: &[&[i8]; T]) -> [[i32; 4]; T] {
    let cols = codes.len();
    for values in values {
        assert_eq!(values.len(), cols);
    }
    let mut sums = [[_mm512_setzero_si512(); 4]; T];
    let whole = cols / WIDTH * WIDTH;
    for k in (0..whole).step_by(WIDTH) {
        if T == 1 {
            // A prefetch may name any address.
            _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(k + AHEAD).cast());
        }
        // SAFETY: `k + WIDTH <= cols`, the length of `codes`.
        let bytes = unsafe { _mm512_loadu_si512(codes.as_ptr().add(k).cast()) };
        let planes = planes(bytes);
        for (sums, values) in sums.iter_mut().zip(values) {
            // SAFETY: `k + WIDTH <= cols`, which is also the length of each of `values`.
            let x = unsafe { _mm512_loadu_si512(values.as_ptr().add(k).cast()) };
            for (sum, plane) in sums.iter_mut().zip(planes) {
                *sum = _mm512_dpbusd_epi32(*sum, plane, x);
            }
        }
    }
    if whole < cols {
        let mask: __mmask64 = (1 << (cols - whole)) - 1;
        // SAFETY: The mask has `cols - whole` bits, and a masked load touches no other byte.
        let bytes = unsafe { _mm512_maskz_loadu_epi8(mask, codes.as_ptr().add(whole).cast()) };
        let planes = planes(bytes);
        for (sums, values) in sums.iter_mut().zip(values) {
            // SAFETY: As above.
            let x = unsafe { _mm512_maskz_loadu_epi8(mask, values.as_ptr().add(whole)) };
            for (sum, plane) in sums.iter_mut().zip(planes) {
                *sum = _mm512_dpbusd_epi32(*sum, plane, x);
            }
        }
    }
    sums.map(|sums| {
        let mut out = [0; 4];
        let sums = _mm_srav_epi32(add_up(sums), _mm_setr_epi32(0, 2, 4, 6));
        // SAFETY: `out` has room for four.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), sums) };
        out
    })
}

/// The four codes of each byte, where they are in it.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn planes(bytes: __m512i) -> [__m512i; 4] {
    [
        _mm512_and_si512(bytes, _mm512_set1_epi8(0b0000_0011)),
        _mm512_and_si512(bytes, _mm512_set1_epi8(0b0000_1100)),
        _mm512_and_si512(bytes, _mm512_set1_epi8(0b0011_0000)),
        _mm512_and_si512(bytes, _mm512_set1_epi8(0b1100_0000_u8 as i8)),
    ]
}

/// The sums of the lanes of four vectors, side by side.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn add_up([a, b, c, d]: [__m512i; 4]) -> __m128i {
    let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    let abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    let half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64::<1>(abcd));
    _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half))
}
