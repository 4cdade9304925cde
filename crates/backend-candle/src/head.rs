//! The head: from hidden states to logits.
//!
//! It is read whole for every token, and in half precision it is more bytes than all ternary weights of BitNet 2B4T. A copy
//! of fewer bits is read instead where the host wants it; the leading candidates are then computed again from the original
//! weights, so that the choice among them is the exact one.

use std::ops::Range;
use std::sync::Arc;

use ternion_core::Result;
use ternion_formats::{DenseTensor, Table};
use ternion_kernels::{
    ActivationType, CompactBits, CompactMatrix, GroupedInput, GroupedMatrix, GroupedProduct, dense_matmul,
    for_each_mut, leading,
};

use crate::ops::grouped_products;
use crate::residency::{Place, Placement, head_rows};
use crate::stream::Stream;

/// How many of the largest logits are exact with a copy.
const RESCORED: usize = 64;

/// A head `[vocab_size, hidden]`.
pub(crate) struct Head {
    /// All rows, to read single ones of.
    exact: Table,
    rows: Rows,
}

enum Rows {
    /// Parts in order, each with its first row; one where all of them are in memory.
    Exact(Vec<(usize, DenseTensor, Place)>),
    Copy(CompactMatrix),
    /// Grouped weights, which take fewer bits than any copy.
    Grouped(Arc<GroupedMatrix>, ActivationType),
}

impl Head {
    /// A head on `weights`, or on a copy of them.
    ///
    /// # Errors
    /// Where weights that stay in memory cannot be read, or there is no memory.
    pub(crate) fn new(
        weights: Table,
        copy: Option<CompactBits>,
        activations: ActivationType,
        placement: &mut Placement,
    ) -> Result<Self> {
        let weights = match weights {
            Table::Grouped(matrix) => {
                let rows = Rows::Grouped(Arc::clone(&matrix), activations);
                return Ok(Self { exact: Table::Grouped(matrix), rows });
            }
            Table::Dense(weights) => weights,
        };
        let (vocab, width) = (weights.shape[0], weights.shape[1]);
        let rows = if let Some(bits) = copy {
            Rows::Copy(CompactMatrix::new(bits, vocab, width, |rows: Range<usize>, out: &mut [f32]| {
                let bytes = weights.rows(rows).bytes.loaded()?;
                let rows = weights.dtype.view(&bytes);
                out.chunks_exact_mut(width).enumerate().for_each(|(row, out)| rows.row(row, out));
                Ok(())
            })?)
        } else {
            let step = if placement.is_limited() { head_rows(&weights) } else { vocab };
            let part = |first: usize| {
                let mut tensor = weights.rows(first..vocab.min(first + step));
                let place = placement.place(&mut tensor.bytes)?;
                Ok((first, tensor, place))
            };
            Rows::Exact((0..vocab).step_by(step).map(part).collect::<Result<_>>()?)
        };
        Ok(Self { exact: Table::Dense(weights), rows })
    }

    /// Logits `[rows, vocab_size]` of normalised hidden states `[rows, hidden]`. `None` if a part could not be streamed.
    ///
    /// # Errors
    /// Where a row that is to be exact cannot be read.
    pub(crate) fn forward(
        &self,
        hidden: &[f32],
        logits: &mut [f32],
        stream: Option<&Stream>,
    ) -> Result<Option<()>> {
        let [vocab, width] = self.exact.shape();
        let parts = match &self.rows {
            Rows::Copy(copy) => {
                copy.matmul(hidden, logits, vocab);
                let mut rows = logits.chunks_exact_mut(vocab).zip(hidden.chunks_exact(width));
                return rows.try_for_each(|(logits, hidden)| self.rescore(hidden, logits)).map(Some);
            }
            Rows::Grouped(weights, activations) => {
                let product = [GroupedProduct { weights, offset: 0 }];
                let input = &mut GroupedInput::default();
                grouped_products(&product, hidden, *activations, input, logits, vocab);
                return Ok(Some(()));
            }
            Rows::Exact(parts) => parts,
        };
        for (first, tensor, place) in parts {
            let logits = &mut logits[*first..];
            match (place, stream) {
                (Place::Streamed(piece), Some(stream)) => {
                    let done = stream.with(*piece, |bytes| {
                        let weights = tensor.dtype.view(bytes);
                        dense_matmul(weights, tensor.shape[0], width, hidden, logits, vocab);
                    });
                    if done.is_none() {
                        return Ok(None);
                    }
                }
                _ => dense_matmul(tensor.view(), tensor.shape[0], width, hidden, logits, vocab),
            }
        }
        Ok(Some(()))
    }

    /// Replaces the largest logits by exact ones.
    fn rescore(&self, hidden: &[f32], logits: &mut [f32]) -> Result<()> {
        let ids = leading(logits, RESCORED);
        let mut exact: Vec<_> = ids.iter().map(|id| (*id as usize, Ok(0.0))).collect();
        for_each_mut(&mut exact, |_, (id, logit)| {
            let Table::Dense(exact) = &self.exact else { return };
            *logit = exact.row(*id).bytes.loaded().map(|bytes| {
                let mut logit = [0.0];
                dense_matmul(exact.dtype.view(&bytes), 1, hidden.len(), hidden, &mut logit, 1);
                logit[0]
            });
        });
        for (id, logit) in exact {
            logits[id] = logit?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ternion_formats::DenseType;

    use super::*;
    use crate::residency::Budget;

    #[test]
    fn the_leading_logits_of_a_copy_are_exact() {
        let (vocab, width, rows) = (1000, 48, 3);
        let value = |i: usize| ((i * 7919 % 2003) as f32 / 1001.0 - 1.0) * (1.0 + (i / width % 5) as f32);
        let bytes: Vec<u8> = (0..vocab * width).flat_map(|i| value(i).to_le_bytes()).collect();
        let weights = DenseTensor { dtype: DenseType::F32, shape: vec![vocab, width], bytes: bytes.into() };
        let hidden: Vec<f32> = (0..rows * width).map(|i| (i * 31 % 17) as f32 - 8.0).collect();
        let logits = |copy| {
            let mut logits = vec![0.0; rows * vocab];
            let mut placement = Placement::new(Budget::new(None));
            let head =
                Head::new(Table::Dense(weights.clone()), copy, ActivationType::default(), &mut placement)
                    .unwrap();
            head.forward(&hidden, &mut logits, None).unwrap().unwrap();
            logits
        };
        let exact = logits(None);
        for (bits, bound) in [(CompactBits::Eight, 2.0), (CompactBits::Four, 30.0)] {
            let copy = logits(Some(bits));
            for (exact, copy) in exact.chunks_exact(vocab).zip(copy.chunks_exact(vocab)) {
                let mut order: Vec<usize> = (0..vocab).collect();
                order.sort_by(|a, b| exact[*b].total_cmp(&exact[*a]));
                for id in &order[..RESCORED / 2] {
                    assert_eq!(exact[*id], copy[*id], "token {id}, {bits:?}");
                }
                let different = exact.iter().zip(copy).filter(|(a, b)| a != b).count();
                assert!(different > vocab / 2, "the rest is rounded");
                assert!(exact.iter().zip(copy).all(|(a, b)| (a - b).abs() < bound), "{bits:?}");
            }
        }
    }
}
