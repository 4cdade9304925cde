//! Weights as ONNX Runtime's `MatMulNBits` takes them: codes of a few bits, a block of columns after the other.

use rayon::prelude::*;

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
