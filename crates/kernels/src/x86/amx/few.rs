//! Products of at most 16 tokens.

use std::arch::asm;

use super::{Panels, Rows, TILE, configure, load, multiply, store, zero};
use crate::{TernaryLayout, quantize::Line, ternary::FIELDS};

/// Steps after which the tiles of one are multiplied: a tile is not loaded from stores that are under way.
const DELAY: usize = 2;

/// Bytes after which the codes of each row are prefetched.
const AHEAD: usize = 8 * Line::BYTES;

/// For each field of the codes the sums of 16 tokens and 16 rows.
#[repr(C, align(64))]
struct Sums([[[i32; TILE]; TILE]; FIELDS]);

impl Panels<'_> {
    /// Sums of at most 16 tokens, `width` apart from token to token.
    ///
    /// Memory is what bounds them. The rows of codes are therefore read as 16 streams without gaps, each a sixteenth of the
    /// task: the CPU prefetches these by itself, and more lines at a time than by instructions. Codes are unpacked while those
    /// of the step before are multiplied.
    ///
    /// # Safety
    /// There are tiles, and `unpacked` and `sums` have the size that [`run`](super::run) gives them.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) unsafe fn few(&self, unpacked: &mut [Line], sums: &mut [i32], width: usize) {
        // SAFETY: There are tiles, and these tokens are at most 16.
        unsafe { configure([self.starts.len(), 0]) };
        let (lines, stream) = (self.lines(), (self.codes.len() / self.width).div_ceil(TILE));
        let mut found = Sums([[[0; TILE]; TILE]; FIELDS]);
        let mut rows = Rows { first: 0, apart: stream * self.width, line: 0, ahead: Some(AHEAD) };
        let (mut row, mut line) = (0, 0);
        for step in 0..stream * lines + DELAY - 1 {
            let buffer = |step: usize| step % DELAY * FIELDS * TILE;
            if step < stream * lines {
                self.unpack(&rows, &mut unpacked[buffer(step)..], TILE);
                rows.line += 1;
                if rows.line == lines {
                    (rows.first, rows.line) = (rows.first + self.width, 0);
                }
            }
            if let Some(step) = step.checked_sub(DELAY - 1) {
                // SAFETY: The caller's promise. The step has unpacked four tiles.
                unsafe { self.multiply(line, &unpacked[buffer(step)..][..FIELDS * TILE], &mut found) };
                line += 1;
                if line == lines {
                    self.place(&found, row, stream, sums, width);
                    (row, line) = (row + 1, 0);
                }
            }
        }
    }

    /// Multiplies a line of codes. The first line of a row begins the sums, and the last stores them.
    ///
    /// # Safety
    /// As [`few`](Self::few), with four tiles of weights.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    #[inline]
    unsafe fn multiply(&self, line: usize, weights: &[Line], sums: &mut Sums) {
        let (starts, values, weights) = (self.starts.as_ptr(), self.values.of(0).as_ptr(), weights.as_ptr());
        let stride = self.values.stride * Line::BYTES;
        // SAFETY: Each token has a line of starts. Each tile of weights has 16 lines, and each token a line of values for each
        // tile, `stride` bytes from that of the token before. There is room for the sums of 16 tokens.
        unsafe {
            match self.layout {
                TernaryLayout::Quarters => {
                    if line == 0 {
                        load!(0, starts, Line::BYTES);
                        load!(1, starts, Line::BYTES);
                        load!(2, starts, Line::BYTES);
                        load!(3, starts, Line::BYTES);
                    }
                    load!(4, values.add(line), stride);
                    load!(5, weights, Line::BYTES);
                    multiply!(0, 4, 5);
                    load!(6, weights.add(TILE), Line::BYTES);
                    multiply!(1, 4, 6);
                    load!(7, weights.add(2 * TILE), Line::BYTES);
                    multiply!(2, 4, 7);
                    load!(5, weights.add(3 * TILE), Line::BYTES);
                    multiply!(3, 4, 5);
                }
                TernaryLayout::I2s => {
                    // A row has one sum. It is divided by fields, since products that are added to the same tile wait for each
                    // other.
                    if line == 0 {
                        load!(0, starts, Line::BYTES);
                        zero!(1);
                        zero!(2);
                        zero!(3);
                    }
                    let values = values.add(FIELDS * line);
                    load!(4, values, stride);
                    load!(5, weights, Line::BYTES);
                    multiply!(0, 4, 5);
                    load!(4, values.add(1), stride);
                    load!(6, weights.add(TILE), Line::BYTES);
                    multiply!(1, 4, 6);
                    load!(4, values.add(2), stride);
                    load!(7, weights.add(2 * TILE), Line::BYTES);
                    multiply!(2, 4, 7);
                    load!(4, values.add(3), stride);
                    load!(5, weights.add(3 * TILE), Line::BYTES);
                    multiply!(3, 4, 5);
                }
            }
            if line + 1 == self.lines() {
                store!(0, sums.0[0].as_mut_ptr(), Line::BYTES);
                store!(1, sums.0[1].as_mut_ptr(), Line::BYTES);
                store!(2, sums.0[2].as_mut_ptr(), Line::BYTES);
                store!(3, sums.0[3].as_mut_ptr(), Line::BYTES);
            }
        }
    }

    /// Puts the sums of row `row` of each stream where they belong.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn place(&self, found: &Sums, row: usize, stream: usize, sums: &mut [i32], width: usize) {
        for (token, sums) in sums.chunks_exact_mut(width).enumerate() {
            let [a, b, c, d] = &found.0;
            let found = [&a[token], &b[token], &c[token], &d[token]];
            // The streams behind the last row are left out.
            match self.layout {
                TernaryLayout::Quarters => {
                    for (sums, found) in sums.chunks_exact_mut(width / FIELDS).zip(found) {
                        sums[row..].iter_mut().step_by(stream).zip(found).for_each(|(to, sum)| *to = *sum);
                    }
                }
                TernaryLayout::I2s => {
                    let mut total = *found[0];
                    for field in &found[1..] {
                        total.iter_mut().zip(*field).for_each(|(total, sum)| *total += sum);
                    }
                    sums[row..].iter_mut().step_by(stream).zip(total).for_each(|(to, sum)| *to = sum);
                }
            }
        }
    }
}
