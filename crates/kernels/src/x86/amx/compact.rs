//! Products of [`CompactMatrix`](crate::CompactMatrix) in 8 bits with several tokens.
//!
//! The codes are tiles as they lie, 16 rows of 64 columns; the activations are laid out for it. Rows are read as 16 streams, as
//! in [`few`](super::few).

use std::arch::asm;
use std::arch::x86_64::{
    _mm512_cvtepi32_ps, _mm512_load_si512, _mm512_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_storeu_ps,
};

use super::{TILE, configure, load, multiply_unsigned, store};
use crate::{compact::Task, lanes, quantize::Line};

/// Bytes after which the codes of each row are prefetched.
const AHEAD: usize = 8 * Line::BYTES;

/// Computes a task.
///
/// # Safety
/// [`is_available`](super::is_available) has returned true.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
pub(crate) unsafe fn run(task: &Task<'_>, out: &mut [&mut [f32]]) {
    let stream = out.first().map_or(0, |out| out.len()) / TILE;
    let blocks = task.row(0).0.len();
    let width = blocks * Line::BYTES;
    let all = task.inputs.tiles();
    // SAFETY: There are tiles, as the caller promises.
    unsafe { configure([TILE, 0]) };
    let mut sums = [Line::EMPTY; TILE];
    for (i, (out, tiles)) in out.chunks_mut(TILE).zip(all.chunks_exact(blocks * TILE)).enumerate() {
        let (mut start, mut factors) = (Line::EMPTY, [0.0; TILE]);
        for token in 0..out.len() {
            let (_, starts, factor) = task.inputs.token(i * TILE + token);
            start.set_word(
                token,
                starts[0].iter().fold(0, |sum, lane| i32::wrapping_add(sum, *lane)).cast_unsigned(),
            );
            factors[token] = factor;
        }
        for row in 0..stream {
            let codes = task.row(row).0.as_ptr().cast::<u8>();
            // SAFETY: Rows `row + i * stream` for `i` below 16 are rows of the task, each of `blocks` lines. There are as many
            // tiles of values.
            unsafe {
                load!(0, &raw const start, 0_usize);
                for k in 0..blocks {
                    let codes = codes.add(k * Line::BYTES);
                    for i in 0..TILE {
                        lanes::prefetch(codes.wrapping_add(i * stream * width + AHEAD));
                    }
                    load!(5, codes, stream * width);
                    load!(6, tiles.as_ptr().add(k * TILE), Line::BYTES);
                    multiply_unsigned!(0, 5, 6);
                }
                store!(0, sums.as_mut_ptr(), Line::BYTES);
            }
            for (i, sums) in sums.iter().enumerate() {
                let scale = task.row(row + i * stream).1[0];
                let mut products = [0.0; TILE];
                // SAFETY: A line has 16 integers, and the arrays have 16 floats.
                unsafe {
                    let sums = _mm512_cvtepi32_ps(_mm512_load_si512(sums.0.as_ptr().cast()));
                    let scaled = _mm512_mul_ps(sums, _mm512_set1_ps(scale));
                    _mm512_storeu_ps(
                        products.as_mut_ptr(),
                        _mm512_mul_ps(scaled, _mm512_loadu_ps(factors.as_ptr())),
                    );
                }
                for (out, product) in out.iter_mut().zip(products) {
                    out[row + i * stream] = product;
                }
            }
        }
    }
    // SAFETY: There are tiles.
    unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    // The rows that are left.
    let mut rest: Vec<&mut [f32]> = out.iter_mut().map(|out| &mut out[stream * TILE..]).collect();
    if rest.first().is_some_and(|rest| !rest.is_empty()) {
        crate::x86::compact::run(&task.behind(stream * TILE), &mut rest);
    }
}
