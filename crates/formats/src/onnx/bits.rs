//! Weights as ONNX Runtime's `MatMulNBits` takes them: codes of a few bits, a block of columns after the other.

use rayon::prelude::*;
use ternion_kernels::{GroupedKind, GroupedMatrix};

use crate::convert::grouped::widened;
use crate::{DenseTensor, TernaryTensor};

/// Columns of a block of ternary weights that carry weights; one more carries the constant, see
/// [`portable`](super::portable).
pub(super) const TERNARY_COLUMNS: usize = 127;

/// Columns of a block of ternary weights.
pub(super) const TERNARY_BLOCK: usize = TERNARY_COLUMNS + 1;

/// Bytes of a block of ternary weights.
pub(super) const TERNARY_BYTES: usize = TERNARY_BLOCK / 4;

/// Columns of a block of 8-bit weights.
pub(super) const BYTE_BLOCK: usize = 32;

/// Four weights of 0, whose code is 2.
const ZEROS: u8 = 0b10_10_10_10;

/// Appends a matrix `[rows, blocks, TERNARY_BYTES]`: code `w + 2` of two bits, four to a byte, the lowest bits first. The
/// last column of each block, and the columns beyond the last, hold weights of 0.
pub(super) fn append_ternary(tensor: &TernaryTensor, weights: &[i8], out: &mut Vec<u8>) {
    let row_bytes = tensor.cols.div_ceil(TERNARY_COLUMNS) * TERNARY_BYTES;
    let start = out.len();
    out.resize(start + tensor.rows * row_bytes, ZEROS);
    let rows = out[start..].par_chunks_exact_mut(row_bytes).zip(weights.par_chunks_exact(tensor.cols));
    rows.for_each(|(out, weights)| {
        for (block, weights) in out.chunks_exact_mut(TERNARY_BYTES).zip(weights.chunks(TERNARY_COLUMNS)) {
            for (column, weight) in weights.iter().enumerate() {
                // From the code of 0 to that of the weight, within its two bits: 2 is 1 or 3 by one bit.
                let flip: u8 = match weight {
                    0 => 0b00,
                    1 => 0b01,
                    _ => 0b11,
                };
                block[column / 4] ^= flip << (2 * (column % 4));
            }
        }
    });
}

/// A word of sixteen weights of -1 by the codes of `MatMulNBits`, and what has to be added to other codes to get these.
const ONES: u32 = 0x5555_5555;

/// Appends a matrix with a scale for each group, `[rows, cols / 4]`: code `w + 2` of two bits, four to a byte, the lowest bits
/// first.
pub(super) fn append_grouped(matrix: &GroupedMatrix, out: &mut Vec<u8>) {
    let width = matrix.cols() / 4;
    by_rows(matrix.rows(), width, out, |row, out| {
        let words = out.as_chunks_mut().0;
        match matrix.kind() {
            GroupedKind::Ternary => {
                for (out, word) in words.iter_mut().zip(matrix.words(row)) {
                    *out = (word + ONES).to_le_bytes();
                }
            }
            GroupedKind::Binary => {
                for (out, word) in words.as_chunks_mut().0.iter_mut().zip(matrix.words(row)) {
                    *out = [word & 0xffff, word >> 16].map(|bits| (widened(bits) + ONES).to_le_bytes());
                }
            }
        }
    });
}

/// The codes of such a matrix as it has them, `[rows, bytes of a row]`.
pub(super) fn words(matrix: &GroupedMatrix) -> Vec<u8> {
    let (width, mut out) = (matrix.cols() / matrix.kind().word() * 4, Vec::new());
    by_rows(matrix.rows(), width, &mut out, |row, out| {
        for (out, word) in out.as_chunks_mut().0.iter_mut().zip(matrix.words(row)) {
            *out = word.to_le_bytes();
        }
    });
    out
}

/// Its scales, `[rows, groups]`.
pub(super) fn scales(matrix: &GroupedMatrix) -> impl Iterator<Item = f32> {
    let groups = matrix.cols() / matrix.group();
    (0..matrix.rows()).flat_map(move |row| (0..groups).map(move |group| matrix.scale(row, group)))
}

/// Appends rows of `width` bytes, made on all threads.
fn by_rows(rows: usize, width: usize, out: &mut Vec<u8>, fill: impl Fn(usize, &mut [u8]) + Sync) {
    let start = out.len();
    out.resize(start + rows * width, 0);
    out[start..].par_chunks_exact_mut(width).enumerate().for_each(|(row, out)| fill(row, out));
}

/// A plain matrix in 8 bits: codes `[rows, blocks, BYTE_BLOCK]`, 128 more than the weight over its block's scale, and the
/// scales `[rows * blocks]`.
pub(super) fn bytes(tensor: &DenseTensor) -> (Vec<u8>, Vec<f32>) {
    let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
    let blocks = cols.div_ceil(BYTE_BLOCK);
    let mut codes = vec![128; rows * blocks * BYTE_BLOCK];
    let mut scales = vec![0.0; rows * blocks];
    let out = codes.par_chunks_exact_mut(blocks * BYTE_BLOCK).zip(scales.par_chunks_exact_mut(blocks));
    out.enumerate().for_each_init(
        || vec![0.0; cols],
        |row, (index, (codes, scales))| {
            tensor.view().row(index, row);
            let parts = codes.chunks_exact_mut(BYTE_BLOCK).zip(scales).zip(row.chunks(BYTE_BLOCK));
            for ((codes, scale), weights) in parts {
                let largest = weights.iter().fold(0.0f32, |most, w| most.max(w.abs()));
                *scale = largest / 127.0;
                if *scale > 0.0 {
                    for (code, weight) in codes.iter_mut().zip(weights) {
                        *code = ((weight / *scale).round().clamp(-127.0, 127.0) + 128.0) as u8;
                    }
                }
            }
        },
    );
    (codes, scales)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DenseType;

    #[test]
    fn ternary_codes_leave_the_last_column_of_a_block_empty() {
        let (rows, cols) = (4, 130);
        let weights: Vec<i8> = (0..rows * cols).map(|i| (i % 3) as i8 - 1).collect();
        let layout = ternion_kernels::TernaryLayout::Quarters;
        let codes = ternion_kernels::pack(layout, &weights, rows, cols).unwrap();
        let tensor = TernaryTensor { codes: codes.into(), layout, rows, cols, scale: 1.0 };
        let mut packed = vec![7];
        append_ternary(&tensor, &weights, &mut packed);
        assert_eq!((packed.len(), packed[0]), (1 + rows * 2 * TERNARY_BYTES, 7));
        for row in 0..rows {
            for column in 0..2 * TERNARY_BLOCK {
                let byte = packed[1 + row * 2 * TERNARY_BYTES + column / 4];
                let code = (byte >> (2 * (column % 4))) & 3;
                let (block, place) = (column / TERNARY_BLOCK, column % TERNARY_BLOCK);
                let at = block * TERNARY_COLUMNS + place;
                let weight = if place < TERNARY_COLUMNS && at < cols { weights[row * cols + at] } else { 0 };
                assert_eq!(code as i8 - 2, weight, "row {row}, column {column}");
            }
        }
    }

    #[test]
    fn grouped_codes_are_the_weights_and_their_scales() {
        let (rows, cols, group) = (3, 128, 64);
        for kind in [GroupedKind::Ternary, GroupedKind::Binary] {
            let fill = |row: usize, words: &mut [u32], scales: &mut [f32]| {
                for (i, word) in words.iter_mut().enumerate() {
                    let random = ((row * 31 + i + 1) as u32).wrapping_mul(0x9e37_79b1);
                    // No code is 3.
                    *word = if kind == GroupedKind::Ternary {
                        random & !(random << 1 & 0xaaaa_aaaa)
                    } else {
                        random
                    };
                }
                scales.iter_mut().enumerate().for_each(|(i, scale)| *scale = (row + 2 * i + 1) as f32);
                Ok::<(), ternion_kernels::WeightsError>(())
            };
            let matrix = GroupedMatrix::new(kind, [rows, cols], group, fill).unwrap();
            let (mut codes, scales) = (vec![9], scales(&matrix).collect::<Vec<_>>());
            append_grouped(&matrix, &mut codes);
            assert_eq!((codes.len(), scales.len()), (1 + rows * cols / 4, rows * cols / group));
            let own = words(&matrix);
            let (bits, most) = if kind == GroupedKind::Ternary { (2, 1) } else { (1, 0) };
            let mut values = vec![0.0; cols];
            for row in 0..rows {
                matrix.row(row, &mut values);
                for (col, value) in values.iter().enumerate() {
                    let at = row * cols + col;
                    let scale = scales[at / group];
                    let code = i32::from(codes[1 + at / 4] >> (2 * (at % 4)) & 3);
                    assert_eq!((code - 2) as f32 * scale, *value, "{kind:?}, row {row}, column {col}");
                    let code = i32::from(own[at * bits / 8] >> (at * bits % 8)) & ((1 << bits) - 1);
                    let weight = if most == 1 { code - 1 } else { 2 * code - 1 };
                    assert_eq!(weight as f32 * scale, *value, "{kind:?}, row {row}, column {col}");
                }
            }
        }
    }

    #[test]
    fn bytes_are_within_half_a_step() {
        let (rows, cols) = (3, BYTE_BLOCK + 5);
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0).collect();
        let bytes_of = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let tensor =
            DenseTensor { dtype: DenseType::F32, shape: vec![rows, cols], bytes: bytes_of(&values).into() };
        let (codes, scales) = bytes(&tensor);
        for row in 0..rows {
            for column in 0..2 * BYTE_BLOCK {
                let code = f32::from(codes[row * 2 * BYTE_BLOCK + column]) - 128.0;
                let scale = scales[row * 2 + column / BYTE_BLOCK];
                let exact = if column < cols { values[row * cols + column] } else { 0.0 };
                assert!((code * scale - exact).abs() <= 0.5001 * scale, "row {row}, column {column}");
            }
        }
    }
}
