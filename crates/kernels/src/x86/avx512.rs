//! AVX-512-VNNI: `vpdpbusd` adds, in each 32-bit lane, four products of unsigned codes with signed activations.
//!
//! The four codes of a byte are masked out where they are and not shifted down: the second counts four times, the
//! third 16 times, the fourth 64 times, which an exact shift of the whole sum undoes. Since a code is the weight
//! plus one, the sum of the activations is taken off at the end.

use std::arch::x86_64::{
    __m128i, __m256i, __m512i, __mmask64, _MM_HINT_T0, _mm_add_epi32, _mm_prefetch, _mm_setr_epi32,
    _mm_srav_epi32, _mm_storeu_si128, _mm256_add_epi32, _mm256_castsi256_si128, _mm256_extracti128_si256,
    _mm256_loadu_si256, _mm512_add_epi32, _mm512_and_si512, _mm512_castsi256_si512, _mm512_castsi512_si256,
    _mm512_dpbusd_epi32, _mm512_extracti64x4_epi64, _mm512_inserti64x4, _mm512_loadu_si512,
    _mm512_maskz_loadu_epi8, _mm512_set1_epi8, _mm512_setzero_si512, _mm512_srli_epi16,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    _mm512_zextsi256_si512,
};

use crate::{
    TernaryLayout,
    matmul::{Sink, Task, tiles},
    ternary::GROUP,
};

/// Bytes of a vector.
const WIDTH: usize = 64;

/// Tokens whose sums are kept in registers together: 4 x 4 of the 32. With more than 18 sums the same instructions took half
/// as long again on Sapphire Rapids, though there is no spill.
const TILE: usize = 4;

/// How far ahead of its use a stream of codes from memory is asked for; the hardware's own prefetching ends at each page.
const AHEAD: usize = 2048;

/// Computes a task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(crate) fn run(task: &Task<'_>, sink: &impl Sink) {
    for (token, count) in tiles(task.x.tokens(), TILE) {
        match count {
            1 => rows::<1>(task, token, sink),
            2 => rows::<2>(task, token, sink),
            3 => rows::<3>(task, token, sink),
            _ => rows::<TILE>(task, token, sink),
        }
    }
}

/// The tokens `token..token + T` for all units of the task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn rows<const T: usize>(task: &Task<'_>, token: usize, sink: &impl Sink) {
    let values: [&[i8]; T] = std::array::from_fn(|t| task.x.values(token + t));
    for unit in task.first..task.last {
        let codes = task.weights.unit(unit);
        let sums = match task.weights.layout {
            TernaryLayout::Quarters => quarters::<T>(codes, &values, token == 0),
            TernaryLayout::I2s if T == 1 => i2s_row_by_row::<T>(codes, &values),
            TernaryLayout::I2s => i2s::<T>(codes, &values),
        };
        for (t, sums) in sums.into_iter().enumerate() {
            let offset = task.x.tokens[token + t].sum;
            // Codes are weights + 1. Wrapping: 128 * 131072 * 64 is just beyond what an i32 holds in between.
            sink(unit, token + t, sums.map(|sum| sum.wrapping_sub(offset)));
        }
    }
}

/// The sums of codes times values, for each of `T` tokens those of the four rows in `codes`. `ahead`: the codes come from
/// memory, as they do for the first tokens of a block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn quarters<const T: usize>(codes: &[u8], values: &[&[i8]; T], ahead: bool) -> [[i32; 4]; T] {
    let cols = codes.len();
    for values in values {
        assert_eq!(values.len(), cols);
    }
    let mut sums = [[_mm512_setzero_si512(); 4]; T];
    let whole = cols / WIDTH * WIDTH;
    for k in (0..whole).step_by(WIDTH) {
        if ahead {
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
    sums.map(|sums| store(_mm_srav_epi32(add_up(sums), _mm_setr_epi32(0, 2, 4, 6))))
}

/// [`quarters`] for I2_S, one row after the other: a single stream of codes, as memory likes it.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn i2s_row_by_row<const T: usize>(codes: &[u8], values: &[&[i8]; T]) -> [[i32; 4]; T] {
    let mut out = [[0; 4]; T];
    for (i, codes) in codes.chunks_exact(codes.len() / 4).enumerate() {
        // One sum for each field of a byte, counted once, 4, 16 and 64 times.
        let mut sums = [[_mm512_setzero_si512(); 4]; T];
        for (c, bytes) in codes.chunks(WIDTH).enumerate() {
            // A prefetch may name any address.
            _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(AHEAD).cast());
            let planes = planes(codes_of(bytes));
            for (sums, values) in sums.iter_mut().zip(values) {
                let values = &values[c * 4 * WIDTH..];
                for (field, (sum, plane)) in sums.iter_mut().zip(planes).enumerate() {
                    *sum = _mm512_dpbusd_epi32(*sum, plane, field_values(values, field, bytes.len()));
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            out[i] = store(_mm_srav_epi32(add_up(sums), _mm_setr_epi32(0, 2, 4, 6))).iter().sum();
        }
    }
    out
}

/// [`quarters`] for I2_S: the four rows side by side, so that each load of values serves four products.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn i2s<const T: usize>(codes: &[u8], values: &[&[i8]; T]) -> [[i32; 4]; T] {
    let width = codes.len() / 4;
    let low = _mm512_set1_epi8(3);
    let mut sums = [[_mm512_setzero_si512(); 4]; T];
    for at in (0..width).step_by(WIDTH) {
        let length = WIDTH.min(width - at);
        let mut bytes = [_mm512_setzero_si512(); 4];
        for (i, bytes) in bytes.iter_mut().enumerate() {
            *bytes = codes_of(&codes[i * width + at..i * width + at + length]);
        }
        for field in 0..4 {
            let planes = bytes.map(|bytes| _mm512_and_si512(bytes, low));
            for (sums, values) in sums.iter_mut().zip(values) {
                let x = field_values(&values[4 * at..], field, length);
                for (sum, plane) in sums.iter_mut().zip(planes) {
                    *sum = _mm512_dpbusd_epi32(*sum, plane, x);
                }
            }
            bytes = bytes.map(|bytes| _mm512_srli_epi16::<2>(bytes));
        }
    }
    sums.map(|sums| store(add_up(sums)))
}

/// Two groups of codes, or the last one with zeros behind it.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn codes_of(bytes: &[u8]) -> __m512i {
    match bytes.first_chunk::<WIDTH>() {
        // SAFETY: The array has as many bytes as are loaded.
        Some(bytes) => unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) },
        None => _mm512_zextsi256_si512(half(bytes)),
    }
}

/// What the codes of a field (0 is in the lowest bits) of `length` bytes are multiplied by.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn field_values(values: &[i8], field: usize, length: usize) -> __m512i {
    let at = (3 - field) * WIDTH / 2;
    let first = half(&values[at..]);
    if length < WIDTH {
        return _mm512_zextsi256_si512(first);
    }
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), half(&values[GROUP + at..]))
}

/// The first 32 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn half<T>(bytes: &[T]) -> __m256i {
    const { assert!(size_of::<T>() == 1) };
    let bytes = bytes.first_chunk::<{ WIDTH / 2 }>().expect("invariant: groups are whole");
    // SAFETY: The array has as many bytes as are loaded.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn store(lanes: __m128i) -> [i32; 4] {
    let mut out = [0; 4];
    // SAFETY: `out` has room for four.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), lanes) };
    out
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
