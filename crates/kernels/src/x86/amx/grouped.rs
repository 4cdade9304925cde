//! Products of weights with a scale for each group, 16 rows of activations at a time.
//!
//! A line of codes holds four columns of 16 rows in each plane, which is what a line of a tile of weights is. The sums of a
//! plane of a group are therefore one product of tiles. Only the scaling of its sums is left to vectors, with the same steps as
//! in [`grouped_avx512`](crate::x86::grouped_avx512).

use std::arch::asm;
use std::arch::x86_64::{
    _mm512_add_epi8, _mm512_add_epi32, _mm512_cvtepi32_ps, _mm512_fmadd_ps, _mm512_load_si512,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_store_si512,
};

use super::{TILE, multiply, zero};
use crate::grouped::{Block, GroupedKind, ROWS, Task, Tile};
use crate::quantize::Line;
use crate::x86::grouped_avx512::{check, finish, load, one_tile, plane, scales};

/// Lines of a group below which vectors are faster: a product of tiles takes the same time for fewer columns, and the scaling of
/// its sums as well.
const FEWEST_LINES: usize = 8;

thread_local! {
    /// The planes of a block, and the sums of a group. Kept, since a block is short.
    static BUFFER: std::cell::Cell<Vec<Line>> = const { std::cell::Cell::new(Vec::new()) };
}

/// Computes a task.
///
/// # Safety
/// [`is_available`](super::is_available) has returned true.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn run(task: &Task<'_>, sink: &mut impl FnMut(usize, [f32; ROWS])) {
    // SAFETY: The caller's promise.
    unsafe {
        match task.kind() {
            GroupedKind::Ternary => tiles::<4>(task, sink),
            GroupedKind::Binary => tiles::<8>(task, sink),
        }
    }
}

/// # Safety
/// As [`run`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn tiles<const P: usize>(task: &Task<'_>, sink: &mut impl FnMut(usize, [f32; ROWS])) {
    let block = task.block();
    let wide = if block.lines < FEWEST_LINES {
        0
    } else {
        task.tiles().filter(|(_, tile)| tile.size == TILE).count()
    };
    if wide > 0 {
        let mut buffer = BUFFER.take();
        buffer.resize(P * (block.codes.len() + TILE), Line::EMPTY);
        let (sums, planes) = buffer.split_at_mut(P * TILE);
        unpack::<P>(&block, planes);
        // SAFETY: There are tiles, as the caller promises. The lines of a group are at most 16.
        unsafe { configure(block.lines) };
        let rows = task.rows().chunks_exact(block.codes.len() * P * TILE);
        for ((first, tile), rows) in task.tiles().take(wide).zip(rows) {
            // SAFETY: The tiles are configured for this block.
            unsafe { one::<P>(&block, planes, (&tile, rows), sums, first, sink) };
        }
        // SAFETY: There are tiles.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
        BUFFER.set(buffer);
    }
    for (first, tile) in task.tiles().skip(wide) {
        one_tile::<P>(&block, &tile, first, sink);
    }
}

/// Masks the planes of a block, `[groups, planes, lines of a group]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn unpack<const P: usize>(block: &Block<'_>, planes: &mut [Line]) {
    for (codes, planes) in block.codes.chunks_exact(block.lines).zip(planes.chunks_exact_mut(P * block.lines))
    {
        for (i, codes) in codes.iter().enumerate() {
            let codes = load(codes);
            let doubled = if P == 8 { _mm512_add_epi8(codes, codes) } else { codes };
            for p in 0..P {
                let line = &mut planes[p * block.lines + i];
                // SAFETY: A line has as many bytes as are stored, and is aligned to them.
                unsafe { _mm512_store_si512(line.0.as_mut_ptr().cast(), plane::<P>(codes, doubled, p)) };
            }
        }
    }
}

/// Sixteen rows of activations, whose values are `rows`.
///
/// # Safety
/// There are tiles, [configured](configure) for the lines of a group.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn one<const P: usize>(
    block: &Block<'_>,
    planes: &[Line],
    (tile, rows): (&Tile<'_>, &[u32]),
    sums: &mut [Line],
    first: usize,
    sink: &mut impl FnMut(usize, [f32; ROWS]),
) {
    let groups = check::<P, TILE>(block, tile);
    let lines = block.lines;
    assert!(sums.len() == P * TILE && rows.len() == groups * P * TILE * lines);
    assert!(planes.len() == groups * P * lines);
    let mut totals = [_mm512_setzero_ps(); TILE];
    for g in 0..groups {
        for p in 0..P {
            // SAFETY: There are so many lines and rows, as was asserted, and room for the sums of each plane.
            unsafe {
                let weights = planes.as_ptr().add((g * P + p) * lines);
                let values = rows.as_ptr().add((g * P + p) * TILE * lines);
                let to = sums.as_mut_ptr().add(p * TILE);
                // Two sets of registers by turns.
                if p % 2 == 0 {
                    zero!(0);
                    super::load!(2, values, 4 * lines);
                    super::load!(3, weights, Line::BYTES);
                    multiply!(0, 2, 3);
                    super::store!(0, to, Line::BYTES);
                } else {
                    zero!(1);
                    super::load!(4, values, 4 * lines);
                    super::load!(5, weights, Line::BYTES);
                    multiply!(1, 4, 5);
                    super::store!(1, to, Line::BYTES);
                }
            }
        }
        let scales = scales(&block.scales, g);
        for t in 0..TILE {
            let mut sum = _mm512_setzero_ps();
            for p in 0..P {
                let at = (g * P + p) * TILE + t;
                // SAFETY: `check` found `groups * P * TILE` starts and scales, and there are `P * TILE` lines of sums.
                let (exact, start, scale) = unsafe {
                    let exact = _mm512_load_si512(sums.as_ptr().add(p * TILE + t).cast());
                    (exact, *tile.starts.get_unchecked(at), *tile.scales.get_unchecked(at))
                };
                let exact = _mm512_add_epi32(exact, _mm512_set1_epi32(start));
                sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(scale), sum);
            }
            totals[t] = _mm512_fmadd_ps(sum, scales, totals[t]);
        }
    }
    finish(totals, first, sink);
}

/// Sets the shapes of the tiles: 0 and 1 are sums, 2 and 4 activations with four columns for each line of a group, 3 and 5 these
/// lines.
///
/// # Safety
/// There are tiles, and a group has at most 16 lines.
unsafe fn configure(lines: usize) {
    let (all, lines) = (TILE as u8, lines as u8);
    let bytes = 4 * u16::from(lines);
    // SAFETY: The caller's promise: no tile has more than 16 rows of 64 bytes.
    unsafe {
        super::configure_shapes(&[
            (all, 64),
            (all, 64),
            (all, bytes),
            (lines, 64),
            (all, bytes),
            (lines, 64),
        ]);
    }
}
