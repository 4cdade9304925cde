//! Weights from the codes in which graphs hold them: what [`bits`](super::super::bits) writes, and what exporters write for
//! `MatMulNBits`.

use std::ops::Range;

use rayon::prelude::*;
use ternion_core::Result;
use ternion_kernels::{GroupedKind, GroupedMatrix, TernaryLayout};

use super::constants::Constant;
use crate::gguf::rows::{codes_of, pack_quarters};
use crate::grouped::{Wrong, check_codes, check_scale};
use crate::onnx::bits::{TERNARY_BLOCK, TERNARY_BYTES, TERNARY_COLUMNS};
use crate::{SharedBytes, TernaryTensor};

/// The lower bit of each code of a word.
const LOWER: u32 = 0x5555_5555;

/// An error about a place in the codes.
fn at(codes: &Constant, Wrong(error): Wrong) -> ternion_core::Error {
    error.with("tensor", &codes.name)
}

/// The rows `rows` of a product in blocks of [`TERNARY_COLUMNS`], packed in quarters.
pub(super) fn ternary(codes: &Constant, rows: Range<usize>, cols: usize) -> Result<SharedBytes> {
    let width = cols.div_ceil(TERNARY_COLUMNS) * TERNARY_BYTES;
    // A weight's code is 2 more than the weight; the last column of a block, and what is beyond the last, are zeros.
    let code = |row: &[u8], block: usize, place: usize| {
        row[block * TERNARY_BYTES + place / 4] >> (2 * (place % 4)) & 3
    };
    let wrong = rows.clone().into_par_iter().find_map_first(|row| {
        let bytes = &codes.bytes[row * width..(row + 1) * width];
        (0..width / TERNARY_BYTES * TERNARY_BLOCK).find_map(|column| {
            let (block, place) = (column / TERNARY_BLOCK, column % TERNARY_BLOCK);
            let is_weight = place < TERNARY_COLUMNS && block * TERNARY_COLUMNS + place < cols;
            match (code(bytes, block, place), is_weight) {
                (1..=3, true) | (2, false) => None,
                (code, true) => Some(format!("row {row}: a weight has the code {code}, expected 1, 2 or 3")),
                (code, false) => {
                    Some(format!("row {row}: a column without a weight has the code {code}, expected 2"))
                }
            }
        })
    });
    if let Some(message) = wrong {
        return Err(codes.invalid(message));
    }
    let packed = pack_quarters(rows.len(), cols, |row, out| {
        let bytes = &codes.bytes[(rows.start + row) * width..(rows.start + row + 1) * width];
        for (column, out) in out.iter_mut().enumerate() {
            *out = code(bytes, column / TERNARY_COLUMNS, column % TERNARY_COLUMNS) - 1;
        }
    });
    Ok(packed.into())
}

/// Codes of a layout of our own, packed in quarters.
pub(super) fn in_quarters(codes: &Constant, layout: TernaryLayout, rows: usize, cols: usize) -> SharedBytes {
    if layout == TernaryLayout::Quarters {
        return codes.bytes.clone();
    }
    let tensor = TernaryTensor { codes: codes.bytes.clone(), layout, rows, cols, scale: 1.0 };
    pack_quarters(rows, cols, |row, out| codes_of(&tensor, row, out)).into()
}

/// Rows of a matrix with a scale for each block of a row.
pub(super) struct Blocks<'a> {
    /// Two bits for a weight, the first column in the lowest.
    pub(super) codes: &'a Constant,
    /// One for each block of all rows.
    pub(super) scales: &'a [f32],
    /// The code of the weight 0 in each block; `None`: 2.
    pub(super) zeros: Option<&'a [u8]>,
    /// Columns of a block.
    pub(super) group: usize,
}

impl Blocks<'_> {
    /// The rows `rows` as a matrix, which is binary where no weight is 0.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) for a weight that is not -1, 0 or 1 times its scale, naming
    /// tensor, row and group.
    pub(super) fn matrix(&self, rows: Range<usize>, cols: usize) -> Result<GroupedMatrix> {
        let ternary =
            GroupedMatrix::new(GroupedKind::Ternary, [rows.len(), cols], self.group, |row, words, scales| {
                self.row(rows.start + row, words, scales)
            });
        let ternary = ternary.map_err(|wrong| at(self.codes, wrong))?;
        if !is_binary(&ternary) {
            return Ok(ternary);
        }
        let binary = GroupedMatrix::new(
            GroupedKind::Binary,
            [rows.len(), cols],
            ternary.group(),
            |row, words, scales| {
                let codes: Vec<u32> = ternary.words(row).collect();
                let half = |word: u32| (0..16).fold(0, |bits, i| bits | (word >> (2 * i + 1) & 1) << i);
                for (out, pair) in words.iter_mut().zip(codes.chunks_exact(2)) {
                    *out = half(pair[0]) | half(pair[1]) << 16;
                }
                scales.iter_mut().enumerate().for_each(|(group, scale)| *scale = ternary.scale(row, group));
                Ok::<(), Wrong>(())
            },
        );
        binary.map_err(|wrong| at(self.codes, wrong))
    }

    /// A row's words of codes and its scales.
    fn row(&self, row: usize, words: &mut [u32], scales: &mut [f32]) -> std::result::Result<(), Wrong> {
        let (groups, per_group) = (scales.len(), self.group / 16);
        let bytes = &self.codes.bytes[row * words.len() * 4..(row + 1) * words.len() * 4];
        let bytes = bytes.as_chunks::<4>().0.chunks_exact(per_group);
        for (group, ((words, bytes), out)) in
            words.chunks_exact_mut(per_group).zip(bytes).zip(scales).enumerate()
        {
            let at = row * groups + group;
            let scale = self.scales[at];
            let magnitude = check_scale(row, group, scale.abs())?;
            let zero = self.zeros.map_or(2, |zeros| zeros[at]);
            for (word, bytes) in words.iter_mut().zip(bytes) {
                *word = weights(u32::from_le_bytes(*bytes), zero, scale < 0.0).ok_or_else(|| {
                    let message = format!(
                        "a weight is not -1, 0 or 1 times the scale: its code is more than 1 from {zero}, the code of 0"
                    );
                    Wrong::group(row, group, message)
                })?;
            }
            *out = magnitude;
        }
        Ok(())
    }
}

/// Sixteen codes as the weights plus one; `None` where one is another weight.
fn weights(word: u32, zero: u8, is_negative: bool) -> Option<u32> {
    let codes = if zero == 2 {
        // No code is 0, so that nothing is borrowed.
        (!(word | word >> 1) & LOWER == 0).then(|| word - LOWER)?
    } else {
        (0..16).try_fold(0, |codes, i| {
            let code = (word >> (2 * i) & 3) + 1;
            let code = code.checked_sub(u32::from(zero)).filter(|code| *code < 3)?;
            Some(codes | code << (2 * i))
        })?
    };
    // Of 0, 1 and 2 the other sign is 2, 1 and 0.
    Some(if is_negative { 2 * LOWER - codes } else { codes })
}

/// Whether every weight with a scale other than 0 is -1 or 1.
fn is_binary(matrix: &GroupedMatrix) -> bool {
    let (groups, per_group) = (matrix.cols() / matrix.group(), matrix.group() / 16);
    let has_zero = (0..matrix.rows()).into_par_iter().any(|row| {
        let has_scale = |word: usize| matrix.scale(row, word / per_group) != 0.0;
        matrix.words(row).enumerate().any(|(i, word)| word & !(word >> 1) & LOWER != 0 && has_scale(i))
    });
    let has_scale = || (0..matrix.rows()).any(|row| (0..groups).any(|group| matrix.scale(row, group) != 0.0));
    matrix.cols().is_multiple_of(32) && !has_zero && has_scale()
}

/// A matrix as our own operators take it: codes `[rows, cols * bits / 8]` and scales `[rows, groups]`.
pub(super) fn grouped(
    codes: &Constant,
    scales: &Constant,
    bits: usize,
    [rows, cols]: [usize; 2],
) -> Result<GroupedMatrix> {
    let kind = match bits {
        1 => GroupedKind::Binary,
        2 => GroupedKind::Ternary,
        _ => return Err(codes.invalid(format!("the attribute `bits` is {bits}, expected 1 or 2"))),
    };
    let groups = match scales.dims[..] {
        [found, groups] if found == rows && groups > 0 && cols.is_multiple_of(groups) => groups,
        _ => {
            let message =
                format!("the shape is {:?}, expected {rows} rows of a scale for each group", scales.dims);
            return Err(scales.invalid(message));
        }
    };
    if !cols.is_multiple_of(kind.word()) {
        return Err(
            codes.invalid(format!("a row has {cols} columns, expected a multiple of {}", kind.word()))
        );
    }
    let width = cols / kind.word() * 4;
    codes.check_codes(rows * width)?;
    let values = scales.floats(rows * groups)?;
    let group = cols / groups;
    let matrix = GroupedMatrix::new(kind, [rows, cols], group, |row, words, out| {
        let bytes = &codes.bytes[row * width..(row + 1) * width];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        for (group, (out, scale)) in out.iter_mut().zip(&values[row * groups..(row + 1) * groups]).enumerate()
        {
            *out = check_scale(row, group, *scale)?;
        }
        if kind == GroupedKind::Ternary { check_codes(row, words, group) } else { Ok(()) }
    });
    matrix.map_err(|wrong| at(codes, wrong))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_weights_by_their_zero() {
        for zero in 0..4u32 {
            for code in 0..4u32 {
                let expected = u32::try_from(code as i32 - zero as i32 + 1).ok().filter(|code| *code < 3);
                let words = (0..16).fold(0, |word, i| word | code << (2 * i));
                for (negative, expected) in [(false, expected), (true, expected.map(|code| 2 - code))] {
                    let expected = expected.map(|code| (0..16).fold(0, |word, i| word | code << (2 * i)));
                    assert_eq!(weights(words, zero as u8, negative), expected, "{code} by {zero}");
                }
            }
        }
    }
}
