//! AVX-VNNI: `vpdpbusd` of 256 bits, which CPUs without AVX-512 have too, Intel's since the 12th generation.
//!
//! As with AVX-512, the four codes of a byte are masked out where they are: the second counts four times, the third 16 times, the
//! fourth 64 times, which an exact shift of the sum undoes. Since a code is the weight plus one, the sum of the activations is
//! taken off at the end.

use std::arch::x86_64::{
    __m256i, _mm256_add_epi32, _mm256_and_si256, _mm256_dpbusd_avx_epi32, _mm256_set1_epi8,
    _mm256_setzero_si256, _mm256_srai_epi32,
};

use super::avx2::{WIDTH, add_up, load};
use crate::{
    TernaryLayout, lanes,
    matmul::{Sink, Task, tiles},
};

/// Tokens whose sums are kept in registers together: 2 x 4 of the 16.
const TILE: usize = 2;

/// Codes of a byte.
const FIELDS: usize = 4;

/// Computes a task.
#[target_feature(enable = "avx2,avxvnni")]
pub(crate) fn run(task: &Task<'_>, sink: &impl Sink) {
    for (token, count) in tiles(task.x.tokens(), TILE) {
        match count {
            1 => rows::<1>(task, token, sink),
            _ => rows::<TILE>(task, token, sink),
        }
    }
}

/// The tokens `token..token + T` for all units of the task.
#[target_feature(enable = "avx2,avxvnni")]
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
#[target_feature(enable = "avx2,avxvnni")]
#[inline]
fn quarters<const T: usize>(codes: &[u8], values: &[&[i8]; T], ahead: bool) -> [[i32; 4]; T] {
    for values in values {
        assert_eq!(values.len(), codes.len());
    }
    let mut sums = [[_mm256_setzero_si256(); FIELDS]; T];
    let (whole, rest) = codes.as_chunks::<WIDTH>();
    let value_rests = values.map(|values| values.as_chunks::<WIDTH>().1);
    let values = values.map(|values| values.as_chunks::<WIDTH>().0);
    for (k, codes) in whole.iter().enumerate() {
        // Two vectors are a cache line.
        if ahead && k % 2 == 0 {
            lanes::prefetch_stream(codes.as_ptr());
        }
        step(load(codes), &values.map(|values| load(&values[k])), &mut sums);
    }
    if !rest.is_empty() {
        // Copies: a vector that is read behind the end might not be there.
        let mut tail = [0u8; WIDTH];
        tail[..rest.len()].copy_from_slice(rest);
        let x = value_rests.map(|values| {
            let mut tail = [0i8; WIDTH];
            tail[..rest.len()].copy_from_slice(values);
            load(&tail)
        });
        step(load(&tail), &x, &mut sums);
    }
    sums.map(|sums| counted_once(sums).map(|lanes| add_up(lanes)))
}

/// Adds one vector of codes times one of each token's values. A plane at a time: 16 registers have no room for all four.
#[target_feature(enable = "avx2,avxvnni")]
#[inline]
fn step<const T: usize>(codes: __m256i, x: &[__m256i; T], sums: &mut [[__m256i; FIELDS]; T]) {
    for (field, plane) in planes(codes).into_iter().enumerate() {
        for (sums, x) in sums.iter_mut().zip(x) {
            sums[field] = _mm256_dpbusd_avx_epi32(sums[field], plane, *x);
        }
    }
}

/// [`quarters`] for I2_S, one row after the other, where a vector of codes is one group and its four fields belong to the same row.
#[target_feature(enable = "avx2,avxvnni")]
#[inline]
fn i2s<const T: usize>(codes: &[u8], values: &[&[i8]; T], ahead: bool) -> [[i32; 4]; T] {
    let mut out = [[0; 4]; T];
    for (row, codes) in codes.chunks_exact(codes.len() / 4).enumerate() {
        let mut sums = [[_mm256_setzero_si256(); FIELDS]; T];
        for (k, codes) in codes.as_chunks::<WIDTH>().0.iter().enumerate() {
            // Two vectors are a cache line.
            if ahead && k % 2 == 0 {
                lanes::prefetch_stream(codes.as_ptr());
            }
            let planes = planes(load(codes));
            for (sums, values) in sums.iter_mut().zip(values) {
                let values = values.as_chunks::<{ FIELDS * WIDTH }>().0[k].as_chunks::<WIDTH>().0;
                // The first values belong to the highest bits.
                for ((sum, plane), values) in sums.iter_mut().zip(planes).zip(values.iter().rev()) {
                    *sum = _mm256_dpbusd_avx_epi32(*sum, plane, load(values));
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            let [a, b, c, d] = counted_once(sums);
            out[row] = add_up(_mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d)));
        }
    }
    out
}

/// The four codes of each byte where they lie, the lowest first.
#[target_feature(enable = "avx2")]
#[inline]
fn planes(codes: __m256i) -> [__m256i; FIELDS] {
    [3, 12, 48, 192].map(|mask: u8| _mm256_and_si256(codes, _mm256_set1_epi8(mask.cast_signed())))
}

/// Sums of [`planes`] as those of codes. In each lane all products are multiples of what they count too often, so that the shifts
/// are exact.
#[target_feature(enable = "avx2")]
#[inline]
fn counted_once([once, four, sixteen, sixty_four]: [__m256i; FIELDS]) -> [__m256i; FIELDS] {
    [once, _mm256_srai_epi32::<2>(four), _mm256_srai_epi32::<4>(sixteen), _mm256_srai_epi32::<6>(sixty_four)]
}
