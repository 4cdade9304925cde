//! AVX-512-VNNI for [`grouped_matmul`](crate::grouped_matmul): a lane is a row of the weights, so `vpdpbusd` adds four columns of
//! a plane to the sums of 16 rows, and the activations are broadcast from memory.
//!
//! Codes are masked where they lie in their byte and not shifted down; the activations' starts and scales undo that exactly.

use std::arch::x86_64::{
    __m512, __m512i, _mm256_loadu_si256, _mm512_add_epi8, _mm512_and_si512, _mm512_cvtepi32_ps,
    _mm512_cvtph_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_load_si512, _mm512_loadu_ps,
    _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

use crate::grouped::{Block, BlockScales, GroupedKind, ROWS, Task, Tile};
use crate::lanes;
use crate::quantize::Line;

/// Computes a task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(crate) fn run(task: &Task<'_>, sink: &mut impl FnMut(usize, [f32; ROWS])) {
    match task.kind() {
        GroupedKind::Ternary => tiles::<4>(task, sink),
        GroupedKind::Binary => tiles::<8>(task, sink),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn tiles<const P: usize>(task: &Task<'_>, sink: &mut impl FnMut(usize, [f32; ROWS])) {
    let block = task.block();
    for (first, tile) in task.tiles() {
        one_tile::<P>(&block, &tile, first, sink);
    }
}

/// Computes the sums of a tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) fn one_tile<const P: usize>(
    block: &Block<'_>,
    tile: &Tile<'_>,
    first: usize,
    sink: &mut impl FnMut(usize, [f32; ROWS]),
) {
    match tile.size {
        // Few rows of activations: the codes are read once.
        1 => line_by_line::<P, 1>(block, tile, first, sink),
        2 if P == 4 => line_by_line::<P, 2>(block, tile, first, sink),
        2 => plane_by_plane::<P, 2>(block, tile, first, sink),
        4 => plane_by_plane::<P, 4>(block, tile, first, sink),
        8 => plane_by_plane::<P, 8>(block, tile, first, sink),
        _ => plane_by_plane::<P, 16>(block, tile, first, sink),
    }
}

/// Checks that what the loops below read is there.
#[inline(always)]
pub(super) fn check<const P: usize, const T: usize>(block: &Block<'_>, tile: &Tile<'_>) -> usize {
    let groups = block.codes.len() / block.lines;
    assert!(tile.size == T && tile.values.len() == block.codes.len() * P * T);
    assert!(tile.starts.len() == groups * P * T && tile.scales.len() == groups * P * T);
    groups
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
#[inline]
fn line_by_line<const P: usize, const T: usize>(
    block: &Block<'_>,
    tile: &Tile<'_>,
    first: usize,
    sink: &mut impl FnMut(usize, [f32; ROWS]),
) {
    let groups = check::<P, T>(block, tile);
    let mut totals = [_mm512_setzero_ps(); T];
    for g in 0..groups {
        let mut sums = [[_mm512_set1_epi32(0); T]; P];
        for p in 0..P {
            for t in 0..T {
                // SAFETY: `check` found `groups * P * T` of them.
                sums[p][t] = _mm512_set1_epi32(unsafe { *tile.starts.get_unchecked((g * P + p) * T + t) });
            }
        }
        for line in g * block.lines..(g + 1) * block.lines {
            let codes = load(&block.codes[line]);
            lanes::prefetch_stream(block.codes.as_ptr().wrapping_add(line));
            let doubled = if P == 8 { _mm512_add_epi8(codes, codes) } else { codes };
            for p in 0..P {
                let plane = plane::<P>(codes, doubled, p);
                for t in 0..T {
                    // SAFETY: `check` found `P * T` of them for each line.
                    let x = unsafe { *tile.values.get_unchecked((line * P + p) * T + t) };
                    sums[p][t] = _mm512_dpbusd_epi32(sums[p][t], plane, _mm512_set1_epi32(x.cast_signed()));
                }
            }
        }
        let scales = scales(&block.scales, g);
        for t in 0..T {
            let mut sum = _mm512_setzero_ps();
            for p in 0..P {
                // SAFETY: As for the starts.
                let scale = unsafe { *tile.scales.get_unchecked((g * P + p) * T + t) };
                sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[p][t]), _mm512_set1_ps(scale), sum);
            }
            totals[t] = _mm512_fmadd_ps(sum, scales, totals[t]);
        }
    }
    finish(totals, first, sink);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
#[inline]
fn plane_by_plane<const P: usize, const T: usize>(
    block: &Block<'_>,
    tile: &Tile<'_>,
    first: usize,
    sink: &mut impl FnMut(usize, [f32; ROWS]),
) {
    let groups = check::<P, T>(block, tile);
    let mut totals = [_mm512_setzero_ps(); T];
    for g in 0..groups {
        let mut group = [_mm512_setzero_ps(); T];
        let codes = &block.codes[g * block.lines..(g + 1) * block.lines];
        for p in 0..P {
            let at = (g * P + p) * T;
            let mut sums = [_mm512_set1_epi32(0); T];
            for t in 0..T {
                // SAFETY: `check` found `groups * P * T` of them.
                sums[t] = _mm512_set1_epi32(unsafe { *tile.starts.get_unchecked(at + t) });
            }
            for (i, codes) in codes.iter().enumerate() {
                let codes = load(codes);
                let doubled = if P == 8 { _mm512_add_epi8(codes, codes) } else { codes };
                let plane = plane::<P>(codes, doubled, p);
                let at = ((g * block.lines + i) * P + p) * T;
                for t in 0..T {
                    // SAFETY: `check` found `P * T` of them for each line.
                    let x = unsafe { *tile.values.get_unchecked(at + t) };
                    sums[t] = _mm512_dpbusd_epi32(sums[t], plane, _mm512_set1_epi32(x.cast_signed()));
                }
            }
            for t in 0..T {
                // SAFETY: As for the starts.
                let scale = unsafe { *tile.scales.get_unchecked(at + t) };
                group[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t]), _mm512_set1_ps(scale), group[t]);
            }
        }
        let scales = scales(&block.scales, g);
        for t in 0..T {
            totals[t] = _mm512_fmadd_ps(group[t], scales, totals[t]);
        }
    }
    finish(totals, first, sink);
}

/// The codes of a plane where they lie; of binary ones twice the code, which the last has no room for.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(super) fn plane<const P: usize>(codes: __m512i, doubled: __m512i, p: usize) -> __m512i {
    if P == 4 {
        _mm512_and_si512(codes, _mm512_set1_epi8((3u8 << (2 * p)).cast_signed()))
    } else if p < 7 {
        _mm512_and_si512(doubled, _mm512_set1_epi8((2u8 << p).cast_signed()))
    } else {
        _mm512_and_si512(codes, _mm512_set1_epi8(0x80u8.cast_signed()))
    }
}

#[target_feature(enable = "avx512f,f16c")]
#[inline]
pub(super) fn scales(scales: &BlockScales<'_>, group: usize) -> __m512 {
    match scales {
        // SAFETY: An array of 16 halves has the 32 bytes that are loaded.
        BlockScales::F16(scales) => unsafe {
            _mm512_cvtph_ps(_mm256_loadu_si256(scales[group].as_ptr().cast()))
        },
        // SAFETY: An array of 16 singles has the 64 bytes that are loaded.
        BlockScales::F32(scales) => unsafe { _mm512_loadu_ps(scales[group].as_ptr()) },
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load(line: &Line) -> __m512i {
    // SAFETY: A line has as many bytes as are loaded, and is aligned to them.
    unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn finish<const T: usize>(
    totals: [__m512; T],
    first: usize,
    sink: &mut impl FnMut(usize, [f32; ROWS]),
) {
    for (t, total) in totals.into_iter().enumerate() {
        let mut out = [0.0; ROWS];
        // SAFETY: The array has as many floats as are stored.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), total) };
        sink(first + t, out);
    }
}
