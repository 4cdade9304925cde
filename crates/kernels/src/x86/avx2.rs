//! AVX2: `vpmaddubsw` adds pairs of products of unsigned codes with signed activations in 16-bit lanes.
//!
//! A pair is at most 2 * 2 * 128 = 512 away from 0, so 32 of them can be added up before the lanes are widened to 32
//! bits. Since a code is the weight plus one, the sum of the activations is taken off at the end.

use std::arch::x86_64::{
    __m256i, _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256, _mm256_loadu_si256, _mm256_madd_epi16,
    _mm256_maddubs_epi16, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_setzero_si256, _mm256_srli_epi16,
    _mm256_storeu_si256,
};

use crate::{
    TernaryLayout, lanes,
    matmul::{Sink, Task},
};

/// Bytes of a vector.
pub(super) const WIDTH: usize = 32;

/// Vectors that are added up in 16 bits.
const NARROW: usize = 32;

/// Computes a task.
#[target_feature(enable = "avx2")]
pub(crate) fn run(task: &Task<'_>, sink: &impl Sink) {
    let tokens = task.x.tokens();
    let mut token = 0;
    while token + 2 <= tokens {
        rows::<2>(task, token, sink);
        token += 2;
    }
    if token < tokens {
        rows::<1>(task, token, sink);
    }
}

/// The tokens `token..token + T` for all units of the task.
#[target_feature(enable = "avx2")]
fn rows<const T: usize>(task: &Task<'_>, token: usize, sink: &impl Sink) {
    let values: [&[i8]; T] = std::array::from_fn(|t| task.x.values(token + t));
    for unit in task.first..task.last {
        let codes = task.weights.unit(unit);
        let sums = match task.weights.layout {
            TernaryLayout::Quarters => quarters::<T>(codes, &values, token == 0),
            TernaryLayout::I2s => i2s::<T>(codes, &values, token == 0),
        };
        for (t, sums) in sums.into_iter().enumerate() {
            let offset = task.x.tokens[token + t].sum;
            sink(unit, token + t, sums.map(|sum| sum - offset));
        }
    }
}

/// The sums of codes times values, for each of `T` tokens those of the four rows in `codes`. `ahead`: the codes come from
/// memory, as they do for the first tokens of a block.
#[target_feature(enable = "avx2")]
#[inline]
fn quarters<const T: usize>(codes: &[u8], values: &[&[i8]; T], ahead: bool) -> [[i32; 4]; T] {
    for values in values {
        assert_eq!(values.len(), codes.len());
    }
    let mut wide = [[_mm256_setzero_si256(); 4]; T];
    let (whole, rest) = codes.as_chunks::<WIDTH>();
    let value_rests = values.map(|values| values.as_chunks::<WIDTH>().1);
    let values = values.map(|values| values.as_chunks::<WIDTH>().0);
    for (i, segment) in whole.chunks(NARROW).enumerate() {
        let mut narrow = [[_mm256_setzero_si256(); 4]; T];
        for (j, codes) in segment.iter().enumerate() {
            let mut x = [_mm256_setzero_si256(); T];
            for (x, values) in x.iter_mut().zip(values) {
                *x = load(&values[i * NARROW + j]);
            }
            // Two vectors are a cache line.
            if ahead && j % 2 == 0 {
                lanes::prefetch_stream(codes.as_ptr());
            }
            step(load(codes), &x, &mut narrow);
        }
        widen(&narrow, &mut wide);
    }
    if !rest.is_empty() {
        let mut narrow = [[_mm256_setzero_si256(); 4]; T];
        // Copies: a vector that is read behind the end might not be there.
        let mut tail = [0u8; WIDTH];
        tail[..rest.len()].copy_from_slice(rest);
        let mut x = [_mm256_setzero_si256(); T];
        for (x, values) in x.iter_mut().zip(value_rests) {
            let mut tail = [0i8; WIDTH];
            tail[..rest.len()].copy_from_slice(values);
            *x = load(&tail);
        }
        step(load(&tail), &x, &mut narrow);
        widen(&narrow, &mut wide);
    }
    wide.map(|sums| sums.map(|lanes| add_up(lanes)))
}

/// [`quarters`] for I2_S, where a vector of codes is one group and its four fields belong to the same row.
#[target_feature(enable = "avx2")]
#[inline]
fn i2s<const T: usize>(codes: &[u8], values: &[&[i8]; T], ahead: bool) -> [[i32; 4]; T] {
    let mut out = [[0; 4]; T];
    for (i, codes) in codes.chunks_exact(codes.len() / 4).enumerate() {
        let mut wide = [_mm256_setzero_si256(); T];
        let groups = codes.as_chunks::<WIDTH>().0;
        // Four products are added to a lane for each group, so it is widened four times as soon.
        for (s, segment) in groups.chunks(NARROW / 4).enumerate() {
            let mut narrow = [_mm256_setzero_si256(); T];
            for (g, codes) in segment.iter().enumerate() {
                // Two vectors are a cache line.
                if ahead && g % 2 == 0 {
                    lanes::prefetch_stream(codes.as_ptr());
                }
                let planes = planes(load(codes));
                let at = (s * (NARROW / 4) + g) * 4 * WIDTH;
                for (sum, values) in narrow.iter_mut().zip(values) {
                    let values = values[at..at + 4 * WIDTH].as_chunks::<WIDTH>().0;
                    // The first values belong to the highest bits.
                    for (plane, values) in planes.into_iter().rev().zip(values) {
                        *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(plane, load(values)));
                    }
                }
            }
            for (wide, narrow) in wide.iter_mut().zip(narrow) {
                *wide = _mm256_add_epi32(*wide, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
            }
        }
        for (out, wide) in out.iter_mut().zip(wide) {
            out[i] = add_up(wide);
        }
    }
    out
}

/// The four codes of each byte, the lowest first.
#[target_feature(enable = "avx2")]
#[inline]
fn planes(codes: __m256i) -> [__m256i; 4] {
    let low = _mm256_set1_epi8(3);
    [
        _mm256_and_si256(codes, low),
        _mm256_and_si256(_mm256_srli_epi16::<2>(codes), low),
        _mm256_and_si256(_mm256_srli_epi16::<4>(codes), low),
        _mm256_and_si256(_mm256_srli_epi16::<6>(codes), low),
    ]
}

/// Adds one vector of codes times one of each token's values.
#[target_feature(enable = "avx2")]
#[inline]
fn step<const T: usize>(codes: __m256i, x: &[__m256i; T], sums: &mut [[__m256i; 4]; T]) {
    let planes = planes(codes);
    for (sums, &x) in sums.iter_mut().zip(x) {
        for (sum, plane) in sums.iter_mut().zip(planes) {
            *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(plane, x));
        }
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn widen<const T: usize>(narrow: &[[__m256i; 4]; T], wide: &mut [[__m256i; 4]; T]) {
    let ones = _mm256_set1_epi16(1);
    for (wide, narrow) in wide.iter_mut().zip(narrow) {
        for (wide, &narrow) in wide.iter_mut().zip(narrow) {
            *wide = _mm256_add_epi32(*wide, _mm256_madd_epi16(narrow, ones));
        }
    }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load<T>(bytes: &[T; WIDTH]) -> __m256i {
    const { assert!(size_of::<T>() == 1) };
    // SAFETY: The array has 32 elements of one byte.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn add_up(lanes: __m256i) -> i32 {
    let mut out = [0i32; 8];
    // SAFETY: `out` has room for eight.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), lanes) };
    out.iter().sum()
}
