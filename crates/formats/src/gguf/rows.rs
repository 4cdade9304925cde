//! Rows of matrices: their order in files of the Llama architecture, and moving them between the layouts of ternary
//! tensors, a few at a time on all threads.

use rayon::prelude::*;
use ternion_kernels::TernaryLayout;

use super::ternary::{decode_i2s, encode_i2s};
use super::types::I2S_GROUP;
use crate::TernaryTensor;

/// Which row of a query or key projection stands where. llama.cpp rotates neighbouring rows of a head in the Llama
/// architecture (and only there), transformers rows half a head apart, so files hold the two halves interleaved.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads(
    /// Rows of a head.
    pub(crate) usize,
);

impl Heads {
    /// The row in a GGUF file that is row `row` of transformers.
    pub(crate) fn in_file(self, row: usize) -> usize {
        let (head, row) = (row / self.0, row % self.0);
        let (half, at) = (row / (self.0 / 2), row % (self.0 / 2));
        head * self.0 + 2 * at + half
    }

    /// The row of transformers that is row `row` of a GGUF file.
    pub(crate) fn in_model(self, row: usize) -> usize {
        let (head, row) = (row / self.0, row % self.0);
        head * self.0 + row % 2 * (self.0 / 2) + row / 2
    }
}

/// Packs rows, which `decode` gives as one code a byte, in the layout of Hugging Face transformers.
pub(crate) fn pack_quarters(rows: usize, cols: usize, decode: impl Fn(usize, &mut [u8]) + Sync) -> Vec<u8> {
    let quarter = rows / 4;
    let mut packed = vec![0; quarter * cols];
    packed.par_chunks_exact_mut(cols).enumerate().for_each_init(
        || vec![0; cols],
        |codes, (row, out)| {
            for i in 0..4 {
                decode(i * quarter + row, codes);
                for (out, code) in out.iter_mut().zip(&*codes) {
                    *out |= code << (2 * i);
                }
            }
        },
    );
    packed
}

/// Packs rows, which `decode` gives as one code a byte, as I2_S. `cols` is a multiple of 128.
pub(crate) fn pack_i2s(rows: usize, cols: usize, decode: impl Fn(usize, &mut [u8]) + Sync) -> Vec<u8> {
    debug_assert!(cols.is_multiple_of(I2S_GROUP));
    let mut packed = vec![0; rows * cols / 4];
    packed.par_chunks_exact_mut(cols / 4).enumerate().for_each_init(
        || vec![0; cols],
        |codes, (row, out)| {
            decode(row, codes);
            encode_i2s(codes, out);
        },
    );
    packed
}

/// The codes of a row of an I2_S tensor.
fn i2s_row(bytes: &[u8], row: usize, codes: &mut [u8]) {
    let width = codes.len() / 4;
    decode_i2s(&bytes[row * width..(row + 1) * width], codes);
}

/// The codes of a row in the layout of Hugging Face transformers.
fn quarters_row(bytes: &[u8], rows: usize, row: usize, codes: &mut [u8]) {
    let (quarter, cols) = (rows / 4, codes.len());
    let (plane, at) = (row / quarter, row % quarter);
    for (code, byte) in codes.iter_mut().zip(&bytes[at * cols..(at + 1) * cols]) {
        *code = byte >> (2 * plane) & 3;
    }
}

/// The codes of a row of a ternary tensor, one a byte.
pub(crate) fn codes_of(tensor: &TernaryTensor, row: usize, codes: &mut [u8]) {
    if tensor.layout == TernaryLayout::I2s {
        i2s_row(&tensor.codes, row, codes);
    } else {
        quarters_row(&tensor.codes, tensor.rows, row, codes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_a_head_are_interleaved_in_files() {
        let heads = Heads(6);
        let in_file: Vec<usize> = (0..12).map(|row| heads.in_file(row)).collect();
        assert_eq!(in_file, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
        assert!((0..60).all(|row| heads.in_model(heads.in_file(row)) == row));
    }

    #[test]
    fn layouts_hold_the_same_rows() {
        let (rows, cols) = (8, 256);
        let code = |row: usize, col: usize| ((row * 7 + col * col) % 3) as u8;
        let decode = |row: usize, out: &mut [u8]| {
            out.iter_mut().enumerate().for_each(|(col, out)| *out = code(row, col));
        };
        let (quarters, i2s) = (pack_quarters(rows, cols, decode), pack_i2s(rows, cols, decode));
        let (mut a, mut b, mut expected) = (vec![0; cols], vec![0; cols], vec![0; cols]);
        for row in 0..rows {
            decode(row, &mut expected);
            quarters_row(&quarters, rows, row, &mut a);
            i2s_row(&i2s, row, &mut b);
            assert_eq!((&a, &b), (&expected, &expected));
        }
        let trits: Vec<i8> =
            (0..rows).flat_map(|r| (0..cols).map(move |c| code(r, c).cast_signed() - 1)).collect();
        assert_eq!(i2s, ternion_kernels::pack(TernaryLayout::I2s, &trits, rows, cols).unwrap());
        assert_eq!(quarters, ternion_kernels::pack(TernaryLayout::Quarters, &trits, rows, cols).unwrap());
    }
}
