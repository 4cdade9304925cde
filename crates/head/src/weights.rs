//! The weights of a head: floats, or blocks of a quantised type that are decoded as they are read, to the same logits.

use std::ops::Range;

use ternion_core::Result;
use ternion_formats::{DenseTensor, QuantizedTensor, SharedBytes, Table};
use ternion_kernels::{DenseRef, dense_matmul, for_each_mut};

/// Quantised rows that one task decodes and multiplies, so that they are read again from a cache.
const ROWS_OF_TASK: usize = 16;

/// Rows that one task computes again.
const ROWS_AT_ONCE: usize = 16;

/// Elements of the smallest head that is too large for a cache.
const LARGE: usize = 1 << 24;

/// The weights of a head, `[vocab_size, hidden]`, or some of its rows. A clone shares them.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum HeadWeights {
    /// Floats.
    Dense(DenseTensor),
    /// Blocks of a quantised type.
    Quantized(QuantizedTensor),
}

impl HeadWeights {
    /// Those of a table; `None` for weights in groups, which take fewer bytes than any copy.
    pub fn of(table: &Table) -> Option<Self> {
        match table {
            Table::Dense(dense) => Some(Self::Dense(dense.clone())),
            Table::Quantized(table) => Some(Self::Quantized(table.clone())),
            Table::Grouped(_) => None,
        }
    }

    /// Whether they are too large for a cache, so that a copy of fewer bytes is read faster.
    pub fn is_large(&self) -> bool {
        let [rows, cols] = self.shape();
        rows.saturating_mul(cols) >= LARGE
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(dense) => [dense.shape[0], dense.shape[1]],
            Self::Quantized(table) => table.shape(),
        }
    }

    /// The bytes of all rows, where they lie.
    pub fn bytes(&self) -> &SharedBytes {
        match self {
            Self::Dense(dense) => &dense.bytes,
            Self::Quantized(table) => &table.bytes,
        }
    }

    /// The same, to be replaced by equal ones elsewhere.
    pub fn bytes_mut(&mut self) -> &mut SharedBytes {
        match self {
            Self::Dense(dense) => &mut dense.bytes,
            Self::Quantized(table) => &mut table.bytes,
        }
    }

    /// Some rows, as a matrix of their own.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        match self {
            Self::Dense(dense) => Self::Dense(dense.rows(rows)),
            Self::Quantized(table) => Self::Quantized(table.rows(rows)),
        }
    }

    /// Some rows as floats, one after the other in `out`.
    ///
    /// # Errors
    /// Where they cannot be read.
    pub fn widen(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
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
    pub fn multiply(&self, bytes: &[u8], hidden: &[f32], logits: &mut [f32], stride: usize) -> Result<()> {
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

    /// Replaces the logits of the rows `ids` by exact ones, those of one hidden state.
    ///
    /// # Errors
    /// Where a row cannot be read.
    pub fn multiply_rows(&self, ids: &[u32], hidden: &[f32], logits: &mut [f32]) -> Result<()> {
        let mut parts: Vec<_> = ids.chunks(ROWS_AT_ONCE).map(|ids| (ids, Ok(Vec::new()))).collect();
        for_each_mut(&mut parts, |_, (ids, found)| {
            *found = ids.iter().map(|id| self.logit(*id as usize, hidden)).collect();
        });
        for (ids, found) in parts {
            ids.iter().zip(found?).for_each(|(id, logit)| logits[*id as usize] = logit);
        }
        Ok(())
    }

    fn logit(&self, row: usize, hidden: &[f32]) -> Result<f32> {
        let row = self.rows(row..row + 1);
        let mut logit = [0.0];
        row.multiply(&row.bytes().loaded()?, hidden, &mut logit, 1)?;
        Ok(logit[0])
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
