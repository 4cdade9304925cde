//! Ternary and binary matrices with a scale for each group of columns in a row.
//!
//! Sixteen rows lie side by side: a cache line holds one 32-bit word of each of them, so that a lane of a vector is a row and
//! no product needs a sum over lanes. A word holds 16 ternary codes (weight + 1) or 32 binary ones, the first column in the
//! lowest bits. Code `i` of each byte is *plane* `i`: masking a line by a plane leaves four columns for each row, which is
//! what one `vpdpbusd` multiplies.
//!
//! * [`GroupedInput`] is the activations of a product in int8, with a scale for each plane of a group.
//! * [`grouped_matmul`] multiplies these. Its integer sums are exact and its float sums have one order, so the result has
//!   the same bits on every [`Isa`](crate::Isa), whatever the threads and the tokens beside it.
//! * [`grouped_matmul_f32`] takes the activations as they are.

mod exact;
mod input;
mod product;

use std::ops::Range;

use half::f16;
use rayon::prelude::*;

pub use exact::{grouped_matmul_f32, grouped_matmul_f32_part};
pub use input::{ActivationType, GroupedInput};
#[cfg(target_arch = "x86_64")]
pub(crate) use input::{Tile, shifts};
#[cfg(target_arch = "x86_64")]
pub(crate) use product::Task;
pub use product::{
    GroupedProduct, grouped_matmul, grouped_matmul_all, grouped_matmul_part, grouped_matmul_with,
};

use crate::WeightsError;
use crate::quantize::Line;

/// Whether a number can be the scale of a group: it is finite and not -0.0.
pub fn is_group_scale(scale: f32) -> bool {
    scale.is_finite() && !(scale == 0.0 && scale.is_sign_negative())
}

/// Rows of a block, which are the lanes of a vector.
pub(crate) const ROWS: usize = 16;

/// The widest group.
pub(crate) const MAX_GROUP: usize = 256;

/// Which weights a group has beside its scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GroupedKind {
    /// -1, 0 and 1: a code of two bits, the weight plus one.
    Ternary,
    /// -1 and 1: a code of one bit.
    Binary,
}

impl GroupedKind {
    /// Codes of a 32-bit word.
    pub fn word(self) -> usize {
        4 * self.planes()
    }

    /// Codes of a byte.
    pub(crate) fn planes(self) -> usize {
        match self {
            Self::Ternary => 4,
            Self::Binary => 8,
        }
    }

    /// The weight of code `index` of a word.
    fn weight(self, word: u32, index: usize) -> i32 {
        match self {
            Self::Ternary => (word >> (2 * index) & 3) as i32 - 1,
            Self::Binary => 2 * (word >> index & 1) as i32 - 1,
        }
    }
}

/// A matrix `[rows, cols]` of ternary or binary weights with a scale for each `group` columns of a row.
#[derive(Clone, PartialEq)]
pub struct GroupedMatrix {
    kind: GroupedKind,
    rows: usize,
    cols: usize,
    group: usize,
    /// `[blocks, words of a row]`; each line has a word of 16 rows. Rows that fill up the last block are zeros.
    codes: Vec<Line>,
    /// `[blocks, groups, 16]`
    scales: Scales,
}

#[derive(Clone, PartialEq)]
enum Scales {
    F16(Vec<u16>),
    F32(Vec<f32>),
}

impl GroupedMatrix {
    /// Builds a matrix row by row on the threads of the current rayon pool. `fill` is given a row's number, its words
    /// (`cols / kind.word()`, each with its first column in the lowest bits) and its scales, all of which it sets. No ternary
    /// code may be 3, which would count as the weight 2.
    ///
    /// Scales are stored as f16 where each of them is one, else as f32. Neighbouring groups of 64 become groups of 128 where
    /// all pairs have the same scale.
    ///
    /// # Errors
    /// [`WeightsError`] for a shape that is not supported: `group` is 64, 128 or 256, divides `cols`, and no dimension is 0
    /// or over 2^24. The first error of `fill`, for whichever row.
    pub fn new<E: Send + From<WeightsError>>(
        kind: GroupedKind,
        [rows, cols]: [usize; 2],
        group: usize,
        fill: impl Fn(usize, &mut [u32], &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        const MAX: usize = 1 << 24;
        if !matches!(group, 64 | 128 | 256) {
            return Err(
                WeightsError::new(format!("groups of {group} columns; 64, 128 or 256 expected")).into()
            );
        }
        if rows == 0 || rows > MAX || cols == 0 || cols > MAX || !cols.is_multiple_of(group) {
            let message = format!("{rows} rows and {cols} columns; columns a multiple of {group} expected");
            return Err(WeightsError::new(message).into());
        }
        let (words, groups, blocks) = (cols / kind.word(), cols / group, rows.div_ceil(ROWS));
        let mut codes = vec![Line::EMPTY; blocks * words];
        let mut scales = vec![0.0f32; blocks * groups * ROWS];
        let parts = codes.par_chunks_exact_mut(words).zip(scales.par_chunks_exact_mut(groups * ROWS));
        parts.enumerate().try_for_each_init(
            || (vec![0u32; words], vec![0.0f32; groups]),
            |(row_codes, row_scales), (block, (codes, scales))| {
                for (lane, row) in (block * ROWS..rows.min((block + 1) * ROWS)).enumerate() {
                    fill(row, row_codes, row_scales)?;
                    for (line, word) in codes.iter_mut().zip(&*row_codes) {
                        line.set_word(lane, *word);
                    }
                    for (scales, scale) in scales.chunks_exact_mut(ROWS).zip(&*row_scales) {
                        scales[lane] = *scale;
                    }
                }
                Ok::<(), E>(())
            },
        )?;
        let (group, scales) = match merged(group, groups, &scales) {
            Some(merged) => (2 * group, merged),
            None => (group, scales),
        };
        let is_half = |scale: &f32| f16::from_f32(*scale).to_f32() == *scale;
        let scales = if scales.par_iter().all(is_half) {
            Scales::F16(scales.iter().map(|scale| f16::from_f32(*scale).to_bits()).collect())
        } else {
            Scales::F32(scales)
        };
        Ok(Self { kind, rows, cols, group, codes, scales })
    }

    /// Which weights it has.
    pub fn kind(&self) -> GroupedKind {
        self.kind
    }

    /// Output width.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Columns that share a scale.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Whether the scales are stored as f16; otherwise as f32.
    pub fn has_f16_scales(&self) -> bool {
        matches!(self.scales, Scales::F16(_))
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        let scales = match &self.scales {
            Scales::F16(scales) => size_of_val(&scales[..]),
            Scales::F32(scales) => size_of_val(&scales[..]),
        };
        size_of_val(&self.codes[..]) + scales
    }

    /// The scale of a group of a row.
    ///
    /// # Panics
    /// If there is no such group.
    pub fn scale(&self, row: usize, group: usize) -> f32 {
        assert!(row < self.rows && group < self.groups(), "group {group} of row {row}");
        let at = (row / ROWS * self.groups() + group) * ROWS + row % ROWS;
        match &self.scales {
            Scales::F16(scales) => f16::from_bits(scales[at]).to_f32(),
            Scales::F32(scales) => scales[at],
        }
    }

    /// The words of a row, as [`new`](Self::new) was given them.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn words(&self, row: usize) -> impl Iterator<Item = u32> {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let words = self.words_of_row();
        self.codes[row / ROWS * words..][..words].iter().map(move |line| line.word(row % ROWS))
    }

    /// A row as floats: each weight times its scale.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not as long as one.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "elements of a row");
        let width = self.kind.word();
        for (i, (word, out)) in self.words(row).zip(out.chunks_exact_mut(width)).enumerate() {
            let scale = self.scale(row, i * width / self.group);
            for (k, out) in out.iter_mut().enumerate() {
                *out = self.kind.weight(word, k) as f32 * scale;
            }
        }
    }

    fn groups(&self) -> usize {
        self.cols / self.group
    }

    fn words_of_row(&self) -> usize {
        self.cols / self.kind.word()
    }

    fn blocks(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// Sixteen rows.
    #[inline(always)]
    pub(crate) fn block(&self, block: usize) -> Block<'_> {
        let (words, scales) = (self.words_of_row(), self.groups() * ROWS);
        Block {
            codes: &self.codes[block * words..(block + 1) * words],
            lines: self.group / self.kind.word(),
            scales: match &self.scales {
                Scales::F16(all) => BlockScales::F16(all[block * scales..(block + 1) * scales].as_chunks().0),
                Scales::F32(all) => BlockScales::F32(all[block * scales..(block + 1) * scales].as_chunks().0),
            },
        }
    }

    /// The rows of a block that are rows of the matrix.
    fn rows_of(&self, block: usize) -> Range<usize> {
        block * ROWS..self.rows.min((block + 1) * ROWS)
    }
}

impl std::fmt::Debug for GroupedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GroupedMatrix")
            .field("kind", &self.kind)
            .field("rows", &self.rows)
            .field("cols", &self.cols)
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}

/// Sixteen rows of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    pub(crate) codes: &'a [Line],
    /// Lines of a group.
    pub(crate) lines: usize,
    pub(crate) scales: BlockScales<'a>,
}

#[derive(Clone, Copy)]
pub(crate) enum BlockScales<'a> {
    F16(&'a [[u16; ROWS]]),
    F32(&'a [[f32; ROWS]]),
}

impl BlockScales<'_> {
    /// Those of a group, widened without vector instructions.
    #[inline(always)]
    pub(crate) fn of(&self, group: usize) -> [f32; ROWS] {
        match self {
            Self::F16(scales) => scales[group].map(crate::lanes::half),
            Self::F32(scales) => scales[group],
        }
    }
}

/// The scales of groups twice as wide, where both halves of each have the same.
fn merged(group: usize, groups: usize, scales: &[f32]) -> Option<Vec<f32>> {
    let can_be = group == 64 && groups.is_multiple_of(2);
    let mut pairs = scales.chunks_exact(2 * ROWS);
    if !can_be || !pairs.all(|pair| pair[..ROWS] == pair[ROWS..]) {
        return None;
    }
    Some(scales.chunks_exact(2 * ROWS).flat_map(|pair| &pair[..ROWS]).copied().collect())
}
