//! AVX-512-VNNI for [`CompactMatrix`](crate::CompactMatrix): a row after the other, one stream of codes, for up to eight
//! tokens at a time.

use std::arch::x86_64::{
    __m512, __m512i, _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps,
    _mm512_loadu_si512, _mm512_reduce_add_epi32, _mm512_set1_epi8, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_srli_epi16, _mm512_storeu_ps,
};

use crate::{
    compact::{BLOCK, CompactBits, Task, by_tiles, product},
    lanes::{self, LANES},
};

/// Tokens whose sums are kept in registers together.
const TILE: usize = 8;

/// Computes a task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
pub(crate) fn run(task: &Task<'_>, out: &mut [&mut [f32]]) {
    by_tiles!(tile, [1, 2, 3, 4, 5, 6, 7], TILE, task, out);
}

/// The tokens `token..token + T` for all rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
fn tile<const T: usize>(task: &Task<'_>, token: usize, out: &mut [&mut [f32]]) {
    let inputs: [_; T] = std::array::from_fn(|t| task.inputs.token(token + t));
    for row in 0..out[0].len() {
        let (codes, scales) = task.row(row);
        match task.bits() {
            CompactBits::Eight => {
                let mut sums: [__m512i; T] = std::array::from_fn(|t| load(&inputs[t].1[0]));
                for (k, codes) in codes.iter().enumerate() {
                    lanes::prefetch_stream(codes.as_ptr());
                    let codes = load(codes);
                    for (sum, input) in sums.iter_mut().zip(&inputs) {
                        *sum = _mm512_dpbusd_epi32(*sum, codes, load(&input.0[k]));
                    }
                }
                for ((out, sum), input) in out.iter_mut().zip(sums).zip(&inputs) {
                    out[row] = product([_mm512_reduce_add_epi32(sum)], scales[0], input.2);
                }
            }
            CompactBits::Four => {
                let low = _mm512_set1_epi8(15);
                let mut totals = [_mm512_setzero_ps(); T];
                for (g, (codes, scale)) in codes.iter().zip(scales).enumerate() {
                    lanes::prefetch_stream(codes.as_ptr());
                    let codes = load(codes);
                    let first = _mm512_and_si512(codes, low);
                    let second = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low);
                    for (total, (values, starts, _)) in totals.iter_mut().zip(&inputs) {
                        let sum = _mm512_dpbusd_epi32(load(&starts[g]), first, load(&values[2 * g]));
                        let sum = _mm512_dpbusd_epi32(sum, second, load(&values[2 * g + 1]));
                        *total = scaled(sum, *scale, *total);
                    }
                }
                for ((out, total), input) in out.iter_mut().zip(totals).zip(&inputs) {
                    let mut sums = [0.0; LANES];
                    // SAFETY: The array has as many floats as are stored.
                    unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), total) };
                    out[row] = lanes::sum(sums) * input.2;
                }
            }
        }
    }
}

/// `total + sum * scale`, lane by lane.
#[target_feature(enable = "avx512f")]
#[inline]
fn scaled(sum: __m512i, scale: f32, total: __m512) -> __m512 {
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale), total)
}

/// The 64 bytes of an array.
#[target_feature(enable = "avx512f")]
#[inline]
fn load<T>(block: &T) -> __m512i {
    const { assert!(size_of::<T>() == BLOCK) };
    // SAFETY: As many bytes as are loaded, and all are initialised: it is called with arrays of integers.
    unsafe { _mm512_loadu_si512(std::ptr::from_ref(block).cast()) }
}
