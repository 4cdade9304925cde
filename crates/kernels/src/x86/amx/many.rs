//! Products of more than 16 tokens.

use std::arch::asm;

use super::{DEPTH, Panels, ROWS, Rows, TILE, configure, load, multiply, store};
use crate::{TernaryLayout, lanes, matmul::tiles, quantize::Line, ternary::FIELDS};

/// Bytes from the sums of a token to those of the next.
const WIDTH: usize = ROWS * size_of::<i32>();

impl Panels<'_> {
    /// Sums of any number of tokens, for a single panel. Some columns are unpacked and multiplied by all tokens, 32 at a time,
    /// before the next ones.
    ///
    /// # Safety
    /// There are tiles, and `unpacked` and `sums` have the size that [`run`](super::run) gives them.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) unsafe fn many(&self, unpacked: &mut [Line], sums: &mut [i32]) {
        let stride = self.values.stride * Line::BYTES;
        // Lines of activations for a line of codes, and groups of 16 rows of codes.
        let (fields, groups) = match self.layout {
            TernaryLayout::Quarters => (1, 1),
            TernaryLayout::I2s => (FIELDS, 4),
        };
        let mut configured = [0; 2];
        let together = DEPTH / fields;
        for first in (0..self.lines()).step_by(together) {
            let lines = first..self.lines().min(first + together);
            for (group, line) in (0..groups).flat_map(|group| lines.clone().map(move |line| (group, line))) {
                let (at, apart) = match self.layout {
                    TernaryLayout::Quarters => (line - first, DEPTH * TILE),
                    TernaryLayout::I2s => (group * DEPTH + FIELDS * (line - first), TILE),
                };
                let rows = Rows { first: group * TILE * self.width, apart: self.width, line, ahead: None };
                self.unpack(&rows, &mut unpacked[at * TILE..], apart);
            }
            let after = if lines.end < self.lines() { lines.end * Line::BYTES } else { self.codes.len() };
            let mut prefetched = 0;
            for (token, count) in tiles(self.starts.len(), 2 * TILE) {
                let halves = [count.div_ceil(2), count / 2];
                if halves != configured {
                    // SAFETY: There are tiles, as the caller promises, and no half is over 16.
                    unsafe { configure(halves) };
                    configured = halves;
                }
                // Spread over the tokens, since there is room for a few at a time only.
                let last = (token + count) * lines.len() * self.codes.len() / self.width / self.starts.len();
                for i in prefetched..last {
                    let (row, line) = (i / lines.len(), i % lines.len());
                    lanes::prefetch(
                        self.codes.as_ptr().wrapping_add(row * self.width + after + line * Line::BYTES),
                    );
                }
                prefetched = last;
                let depth = lines.len() * fields;
                let [a, b] = [token, token + halves[0]].map(|t| self.values.of(t)[fields * first..].as_ptr());
                for pair in 0..2 {
                    let weights = unpacked[2 * pair * DEPTH * TILE..].as_ptr();
                    let [to, below] =
                        [token, token + halves[0]].map(|t| sums[t * ROWS + 2 * pair * TILE..].as_mut_ptr());
                    // SAFETY: There are tiles, configured for these tokens. Each has a line of starts, `ROWS` sums and
                    // `depth` more lines of values, which are `stride` bytes apart from token to token; each 16 rows have
                    // `DEPTH` tiles of weights.
                    unsafe {
                        if first == 0 {
                            let [start, second] =
                                [token, token + halves[0]].map(|t| self.starts[t..].as_ptr());
                            load!(0, start, Line::BYTES);
                            load!(1, start, Line::BYTES);
                            load!(2, second, Line::BYTES);
                            load!(3, second, Line::BYTES);
                        } else {
                            load!(0, to, WIDTH);
                            load!(1, to.add(TILE), WIDTH);
                            load!(2, below, WIDTH);
                            load!(3, below.add(TILE), WIDTH);
                        }
                        for k in 0..depth {
                            load!(4, a.add(k), stride);
                            load!(6, weights.add(k * TILE), Line::BYTES);
                            load!(7, weights.add((DEPTH + k) * TILE), Line::BYTES);
                            load!(5, b.add(k), stride);
                            multiply!(0, 4, 6);
                            multiply!(1, 4, 7);
                            multiply!(2, 5, 6);
                            multiply!(3, 5, 7);
                        }
                        store!(0, to, WIDTH);
                        store!(1, to.add(TILE), WIDTH);
                        store!(2, below, WIDTH);
                        store!(3, below.add(TILE), WIDTH);
                    }
                }
            }
        }
    }
}
