//! Tables of quantised types of llama.cpp, which stay in the file: rows are decoded as they are read.

use std::ops::Range;

use rayon::prelude::*;
use ternion_core::{Error, Result};

use crate::gguf::{self, TensorType};
use crate::{DenseTensor, DenseType, SharedBytes};

/// Rows that are decoded at a time.
const ROWS: usize = 64;

/// A matrix `[rows, cols]` in blocks of a quantised type (Q8_0, Q6_K, Q4_K and the like), row by row. All of its values are
/// finite.
#[derive(Debug, Clone)]
pub struct QuantizedTensor {
    kind: TensorType,
    rows: usize,
    cols: usize,
    /// The blocks.
    pub bytes: SharedBytes,
}

impl QuantizedTensor {
    /// Whether tables of this type stay as they are.
    pub(crate) fn is_kind(kind: TensorType) -> bool {
        gguf::is_dense(kind) && kind.block_len() > 1
    }

    /// The matrix; the first row with a value that is infinite or not a number where there is one.
    ///
    /// # Errors
    /// Where the bytes cannot be read, or are not those of such a matrix.
    pub(crate) fn new(
        kind: TensorType,
        [rows, cols]: [usize; 2],
        bytes: SharedBytes,
    ) -> Result<std::result::Result<Self, usize>> {
        let this = Self { kind, rows, cols, bytes };
        let expected = kind.row_bytes(cols).and_then(|width| width.checked_mul(rows));
        if !Self::is_kind(kind) || expected != Some(this.bytes.len()) || rows == 0 {
            return Err(Error::invalid_model(format!(
                "{} bytes of {kind} for {rows} rows of {cols}",
                this.bytes.len()
            )));
        }
        let first_bad = (0..rows.div_ceil(ROWS)).into_par_iter().map(|part| {
            let rows = part * ROWS..this.rows.min((part + 1) * ROWS);
            let mut values = vec![0.0f32; rows.len() * cols];
            this.decode_rows(rows.clone(), &mut values)?;
            Ok(values.iter().position(|x| !x.is_finite()).map(|at| rows.start + at / cols))
        });
        let first_bad: Result<Vec<Option<usize>>> = first_bad.collect();
        Ok(match first_bad?.into_iter().flatten().next() {
            Some(row) => Err(row),
            None => Ok(this),
        })
    }

    /// The element type.
    pub fn kind(&self) -> TensorType {
        self.kind
    }

    /// `[rows, cols]`
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Some rows as a matrix of their own.
    ///
    /// # Panics
    /// If there are no such rows.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        let width = self.bytes.len() / self.rows;
        let bytes = self.bytes.slice(rows.start * width..rows.end * width).expect("rows of the matrix");
        Self { kind: self.kind, rows: rows.len(), cols: self.cols, bytes }
    }

    /// Decodes some rows, exactly.
    ///
    /// # Errors
    /// [`Io`](ternion_core::ErrorKind::Io) where they cannot be read.
    ///
    /// # Panics
    /// If there are no such rows, or `out` is not as long as they are.
    pub fn decode_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        assert_eq!(out.len(), rows.len() * self.cols, "elements of the rows");
        self.decode(&self.rows(rows).bytes.loaded()?, out)
    }

    /// Decodes rows whose blocks lie elsewhere.
    ///
    /// # Errors
    /// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) where the lengths do not fit each other.
    pub fn decode(&self, bytes: &[u8], out: &mut [f32]) -> Result<()> {
        gguf::decode(self.kind, bytes, out)
    }

    /// [`decode`](Self::decode) to the bytes of F32, as the kernels take them.
    ///
    /// # Errors
    /// As there.
    pub fn decode_to_bytes(&self, blocks: &[u8], out: &mut [u8]) -> Result<()> {
        let mut values = vec![0.0; out.len() / 4];
        self.decode(blocks, &mut values)?;
        for (out, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
            *out = value.to_le_bytes();
        }
        Ok(())
    }

    /// The same values in F32.
    #[allow(clippy::missing_panics_doc, reason = "the blocks were checked when the tensor was made")]
    pub fn to_dense(&self) -> DenseTensor {
        let mut bytes = vec![0; self.rows * self.cols * 4];
        let width = self.bytes.len() / self.rows;
        let rows = bytes.par_chunks_exact_mut(self.cols * 4).zip(self.bytes.par_chunks_exact(width));
        rows.for_each(|(out, blocks)| {
            self.decode_to_bytes(blocks, out).expect("invariant: whole rows of a dense type");
        });
        DenseTensor { dtype: DenseType::F32, shape: vec![self.rows, self.cols], bytes: bytes.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 5 rows of 512 columns, some of them encoded, the others of any bytes but finite scales.
    fn table(kind: TensorType, broken: Option<usize>) -> Result<std::result::Result<QuantizedTensor, usize>> {
        let (rows, cols) = (70, 512);
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1009) as f32 / 500.0 - 1.0).collect();
        let width = kind.row_bytes(cols).unwrap();
        let mut bytes = vec![0; rows * width];
        for (values, bytes) in values.chunks_exact(cols).zip(bytes.chunks_exact_mut(width)) {
            gguf::encode(kind, values, bytes).unwrap();
        }
        if let Some(row) = broken {
            // Every block of these types has an f16 at its beginning or end.
            let at = if kind == TensorType::Q6K { (row + 1) * width - 2 } else { row * width };
            bytes[at..at + 2].copy_from_slice(&0x7e00u16.to_le_bytes());
        }
        QuantizedTensor::new(kind, [rows, cols], bytes.into())
    }

    #[test]
    fn rows_are_those_of_the_whole() {
        for kind in [TensorType::Q8_0, TensorType::Q6K, TensorType::Q4_0] {
            let table = table(kind, None).unwrap().unwrap();
            let all = table.to_dense().to_f32();
            let mut some = vec![0.0; 3 * 512];
            table.decode_rows(65..68, &mut some).unwrap();
            assert_eq!(some, all[65 * 512..68 * 512], "{kind}");
            let part = table.rows(60..70);
            assert_eq!((part.shape(), part.to_dense().to_f32()), ([10, 512], all[60 * 512..].to_vec()));
        }
    }

    #[test]
    fn what_is_not_finite_or_not_whole_is_found() {
        for kind in [TensorType::Q8_0, TensorType::Q6K] {
            assert_eq!(table(kind, Some(66)).unwrap().unwrap_err(), 66, "{kind}");
        }
        for (kind, shape) in
            [(TensorType::Q8_0, [3, 64]), (TensorType::F32, [1, 34]), (TensorType::Q8_0, [0, 32])]
        {
            assert!(QuantizedTensor::new(kind, shape, vec![0; 136].into()).is_err(), "{kind} {shape:?}");
        }
    }
}
