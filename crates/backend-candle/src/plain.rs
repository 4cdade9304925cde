//! The plain weights of a head: floats, or blocks of a quantised type that are decoded as they are read, to the same logits.

use std::ops::Range;

use ternion_core::Result;
use ternion_formats::{DenseTensor, QuantizedTensor, SharedBytes};
use ternion_kernels::{DenseRef, dense_matmul, for_each_mut};

/// Quantised rows that one task decodes and multiplies, so that they are read again from a cache.
const ROWS_OF_TASK: usize = 16;

/// `[rows, cols]`
#[derive(Debug, Clone)]
pub(crate) enum Plain {
    Dense(DenseTensor),
    Quantized(QuantizedTensor),
}

impl Plain {
    pub(crate) fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(dense) => [dense.shape[0], dense.shape[1]],
            Self::Quantized(table) => table.shape(),
        }
    }

    pub(crate) fn bytes(&self) -> &SharedBytes {
        match self {
            Self::Dense(dense) => &dense.bytes,
            Self::Quantized(table) => &table.bytes,
        }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut SharedBytes {
        match self {
            Self::Dense(dense) => &mut dense.bytes,
            Self::Quantized(table) => &mut table.bytes,
        }
    }

    /// Some rows, as a matrix of their own.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Self {
        match self {
            Self::Dense(dense) => Self::Dense(dense.rows(rows)),
            Self::Quantized(table) => Self::Quantized(table.rows(rows)),
        }
    }

    /// Some rows as floats.
    ///
    /// # Errors
    /// Where they cannot be read.
    pub(crate) fn widen(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        match self {
            Self::Dense(dense) => {
                let bytes = dense.rows(rows).bytes.loaded()?;
                let rows = dense.dtype.view(&bytes);
                out.chunks_exact_mut(dense.shape[1]).enumerate().for_each(|(row, out)| rows.row(row, out));
                Ok(())
            }
            Self::Quantized(table) => table.decode_rows(rows, out),
        }
    }

    /// Logits, `stride` apart for each token, of hidden states `[tokens, cols]`. `bytes` are the weights', wherever they are.
    ///
    /// # Errors
    /// Where blocks cannot be decoded, which is a bug: they have been checked.
    pub(crate) fn multiply(
        &self,
        bytes: &[u8],
        hidden: &[f32],
        logits: &mut [f32],
        stride: usize,
    ) -> Result<()> {
        let [rows, cols] = self.shape();
        let table = match self {
            Self::Dense(dense) => {
                dense_matmul(dense.dtype.view(bytes), rows, cols, hidden, logits, stride);
                return Ok(());
            }
            Self::Quantized(table) => table,
        };
        let width = bytes.len() / rows;
        let mut tasks: Vec<Task<'_>> = bytes
            .chunks(ROWS_OF_TASK * width)
            .map(|blocks| Task { blocks, logits: Vec::new(), outcome: Ok(()) })
            .collect();
        for token in logits.chunks_mut(stride).take(hidden.len() / cols) {
            for (task, logits) in tasks.iter_mut().zip(token[..rows].chunks_mut(ROWS_OF_TASK)) {
                task.logits.push(logits);
            }
        }
        for_each_mut(&mut tasks, |_, task| task.outcome = task.compute(table, hidden, width));
        tasks.into_iter().try_for_each(|task| task.outcome)
    }
}

/// Some rows of a product.
struct Task<'a> {
    blocks: &'a [u8],
    /// Theirs, for each token.
    logits: Vec<&'a mut [f32]>,
    outcome: Result<()>,
}

impl Task<'_> {
    fn compute(&mut self, table: &QuantizedTensor, hidden: &[f32], width: usize) -> Result<()> {
        let (rows, cols) = (self.blocks.len() / width, table.shape()[1]);
        let mut bytes = vec![0; 4 * rows * cols];
        table.decode_to_bytes(self.blocks, &mut bytes)?;
        let mut own = vec![0.0; self.logits.len() * rows];
        // A kernel that is called by a task computes on its thread.
        dense_matmul(DenseRef::F32(&bytes), rows, cols, hidden, &mut own, rows);
        self.logits.iter_mut().zip(own.chunks_exact(rows)).for_each(|(out, own)| out.copy_from_slice(own));
        Ok(())
    }
}
