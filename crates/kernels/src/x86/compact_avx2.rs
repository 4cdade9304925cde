//! AVX2 for [`CompactMatrix`](crate::CompactMatrix), as [`super::compact`]: the same sums in the same lanes, of which a
//! vector has the lower or the upper half.

use std::arch::x86_64::{
    __m256, __m256i, _mm256_abs_epi8, _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256,
    _mm256_cvtepi32_ps, _mm256_fmadd_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256,
    _mm256_sign_epi8, _mm256_srli_epi16, _mm256_storeu_ps, _mm256_storeu_si256, _mm256_xor_si256,
};

use crate::{
    compact::{BLOCK, CompactBits, Task, by_tiles, product},
    lanes::{self, LANES},
};

/// Tokens whose sums are kept in registers together.
const TILE: usize = 4;

/// Computes a task.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn run(task: &Task<'_>, out: &mut [&mut [f32]]) {
    by_tiles!(tile, [1, 2, 3], TILE, task, out);
}

/// The tokens `token..token + T` for all rows.
#[target_feature(enable = "avx2,fma")]
fn tile<const T: usize>(task: &Task<'_>, token: usize, out: &mut [&mut [f32]]) {
    let inputs: [_; T] = std::array::from_fn(|t| task.inputs.token(token + t));
    for row in 0..out[0].len() {
        let (codes, scales) = task.row(row);
        match task.bits() {
            CompactBits::Eight => {
                let mut sums = [[_mm256_setzero_si256(); 2]; T];
                for (k, codes) in codes.iter().enumerate() {
                    lanes::prefetch_stream(codes.as_ptr());
                    for half in 0..2 {
                        let weights = _mm256_xor_si256(load(codes, half), _mm256_set1_epi8(-128));
                        for (sums, input) in sums.iter_mut().zip(&inputs) {
                            let sum = signed_products(weights, load(&input.0[k], half));
                            sums[half] = _mm256_add_epi32(sums[half], sum);
                        }
                    }
                }
                for ((out, [low, high]), input) in out.iter_mut().zip(sums).zip(&inputs) {
                    let mut lanes = [0; LANES / 2];
                    // SAFETY: The array has as many integers as are stored.
                    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), _mm256_add_epi32(low, high)) };
                    out[row] = product(lanes, scales[0], input.2);
                }
            }
            CompactBits::Four => {
                let low = _mm256_set1_epi8(15);
                let mut totals = [[_mm256_setzero_ps(); 2]; T];
                for (g, (codes, scale)) in codes.iter().zip(scales).enumerate() {
                    lanes::prefetch_stream(codes.as_ptr());
                    for half in 0..2 {
                        let codes = load(codes, half);
                        let first = _mm256_and_si256(codes, low);
                        let second = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), low);
                        for (totals, (values, starts, _)) in totals.iter_mut().zip(&inputs) {
                            // 4 * 15 * 128 is within 16 bits.
                            let sum = _mm256_add_epi16(
                                _mm256_maddubs_epi16(first, load(&values[2 * g], half)),
                                _mm256_maddubs_epi16(second, load(&values[2 * g + 1], half)),
                            );
                            let sum = _mm256_add_epi32(load(&starts[g], half), widened(sum));
                            totals[half] = scaled(sum, *scale, totals[half]);
                        }
                    }
                }
                for ((out, totals), input) in out.iter_mut().zip(totals).zip(&inputs) {
                    let mut sums = [0.0; LANES];
                    for (sums, total) in sums.as_chunks_mut::<{ LANES / 2 }>().0.iter_mut().zip(totals) {
                        // SAFETY: The array has as many floats as are stored.
                        unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), total) };
                    }
                    out[row] = lanes::sum(sums) * input.2;
                }
            }
        }
    }
}

/// Four products for each lane. Weights are -127 to 127 (or anything times 0), so that two products are within 16 bits.
#[target_feature(enable = "avx2")]
#[inline]
fn signed_products(weights: __m256i, x: __m256i) -> __m256i {
    widened(_mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(weights, x)))
}

/// The sums of two 16-bit lanes each.
#[target_feature(enable = "avx2")]
#[inline]
fn widened(sums: __m256i) -> __m256i {
    _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
}

/// `total + sum * scale`, lane by lane.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn scaled(sum: __m256i, scale: f32, total: __m256) -> __m256 {
    _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale), total)
}

/// The first or the second 32 bytes of an array of 64.
#[target_feature(enable = "avx2")]
#[inline]
fn load<T>(block: &T, half: usize) -> __m256i {
    const { assert!(size_of::<T>() == BLOCK) };
    assert!(half < 2);
    // SAFETY: Within the array, as `half` is 0 or 1, and all bytes are initialised: it is called with arrays of integers.
    unsafe { _mm256_loadu_si256(std::ptr::from_ref(block).cast::<__m256i>().add(half)) }
}
