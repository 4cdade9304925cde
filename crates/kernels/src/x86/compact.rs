//! AVX-512-VNNI for [`CompactMatrix`](crate::CompactMatrix): a row after the other, one stream of codes, for up to eight
//! tokens at a time.

use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32,
    _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_set1_epi8, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_srli_epi16, _mm512_storeu_ps,
};

use crate::{
    compact::{BLOCK, CompactBits, Task},
    lanes::{self, LANES},
};

/// Tokens whose sums are kept in registers together.
const TILE: usize = 8;

/// How far ahead of their use codes are asked for.
const AHEAD: usize = 2048;

/// Computes a task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
pub(crate) fn run(task: &Task<'_>, out: &mut [&mut [f32]]) {
    let mut token = 0;
    for out in out.chunks_mut(TILE) {
        match out.len() {
            1 => tile::<1>(task, token, out),
            2 => tile::<2>(task, token, out),
            3 => tile::<3>(task, token, out),
            4 => tile::<4>(task, token, out),
            5 => tile::<5>(task, token, out),
            6 => tile::<6>(task, token, out),
            7 => tile::<7>(task, token, out),
            _ => tile::<TILE>(task, token, out),
        }
        token += out.len();
    }
}

/// The tokens `token..token + T` for all rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
fn tile<const T: usize>(task: &Task<'_>, token: usize, out: &mut [&mut [f32]]) {
    let inputs: [_; T] = std::array::from_fn(|t| task.inputs.token(token + t));
    for row in 0..out[0].len() {
        let (codes, scales) = task.row(row);
        let mut totals = [_mm512_setzero_ps(); T];
        match task.bits() {
            CompactBits::Eight => {
                let mut sums: [__m512i; T] = std::array::from_fn(|t| load(&inputs[t].1[0]));
                for (k, codes) in codes.iter().enumerate() {
                    prefetch(codes);
                    let codes = load(codes);
                    for (sum, input) in sums.iter_mut().zip(&inputs) {
                        *sum = _mm512_dpbusd_epi32(*sum, codes, load(&input.0[k]));
                    }
                }
                for (total, sum) in totals.iter_mut().zip(sums) {
                    *total = scaled(sum, scales[0], *total);
                }
            }
            CompactBits::Four => {
                let low = _mm512_set1_epi8(15);
                for (g, (codes, scale)) in codes.iter().zip(scales).enumerate() {
                    prefetch(codes);
                    let codes = load(codes);
                    let first = _mm512_and_si512(codes, low);
                    let second = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low);
                    for (total, (values, starts, _)) in totals.iter_mut().zip(&inputs) {
                        let sum = _mm512_dpbusd_epi32(load(&starts[g]), first, load(&values[2 * g]));
                        let sum = _mm512_dpbusd_epi32(sum, second, load(&values[2 * g + 1]));
                        *total = scaled(sum, *scale, *total);
                    }
                }
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

/// `total + sum * scale`, lane by lane.
#[target_feature(enable = "avx512f")]
#[inline]
fn scaled(sum: __m512i, scale: f32, total: __m512) -> __m512 {
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale), total)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn prefetch(codes: &[u8; BLOCK]) {
    // A prefetch may name any address.
    _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(AHEAD).cast());
}

/// The 64 bytes of an array.
#[target_feature(enable = "avx512f")]
#[inline]
fn load<T>(block: &T) -> __m512i {
    const { assert!(size_of::<T>() == BLOCK) };
    // SAFETY: As many bytes as are loaded, and all are initialised: it is called with arrays of integers.
    unsafe { _mm512_loadu_si512(std::ptr::from_ref(block).cast()) }
}
