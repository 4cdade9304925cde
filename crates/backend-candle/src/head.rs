//! The head: from hidden states to logits.
//!
//! It is read whole for every token, and in half precision it is more bytes than all ternary weights of BitNet 2B4T. A copy
//! of fewer bits is read instead; the leading candidates are then computed again from the original weights, so that the choice
//! among them is the exact one. With a certified copy these are all that could be leading, by proof.

use std::sync::Arc;

use ternion_core::Result;
use ternion_engine::{ComputeThreads, LogitsPrecision};
use ternion_formats::Table;
use ternion_head::{CertifiedHead, HeadWeights};
use ternion_kernels::{
    ActivationType, CompactMatrix, GroupedInput, GroupedMatrix, GroupedProduct, grouped_matmul_all, leading,
};

use crate::HeadPrecision;
use crate::residency::{Place, Placement, head_rows};
use crate::stream::Stream;

/// How many of the largest logits are exact with a copy.
const RESCORED: usize = 64;

/// A head `[vocab_size, hidden]`.
pub(crate) struct Head {
    /// `[vocab_size, hidden]`
    shape: [usize; 2],
    rows: Rows,
}

enum Rows {
    /// Parts in order, each with its first row; one where all of them are in memory.
    Exact(Vec<(usize, HeadWeights, Place)>),
    /// The weights, and a copy of fewer bits.
    Copy(HeadWeights, CompactMatrix),
    /// The weights with a copy with bounds.
    Certified(CertifiedHead),
    /// Grouped weights, which take fewer bits than any copy.
    Grouped(Arc<GroupedMatrix>, ActivationType),
}

impl Head {
    /// A head on `weights`, or on a copy of them, which may be made by so many threads of its own.
    ///
    /// # Errors
    /// Where weights that stay in memory cannot be read, or there is no memory.
    pub(crate) fn new(
        weights: Table,
        (precision, threads): (HeadPrecision, &ComputeThreads),
        activations: ActivationType,
        placement: &mut Placement,
    ) -> Result<Self> {
        let shape = weights.shape();
        let weights = match weights {
            Table::Grouped(matrix) => return Ok(Self { shape, rows: Rows::Grouped(matrix, activations) }),
            Table::Dense(weights) => HeadWeights::Dense(weights),
            Table::Quantized(weights) => HeadWeights::Quantized(weights),
        };
        let [vocab, width] = shape;
        let rows = if let Some(bits) = precision.copy() {
            let copy = CompactMatrix::new(bits, vocab, width, |rows, out| weights.widen(rows, out))?;
            Rows::Copy(weights, copy)
        } else if precision == HeadPrecision::Certified {
            Rows::Certified(CertifiedHead::start(weights, threads))
        } else {
            let step = if placement.is_limited() { head_rows(&weights) } else { vocab };
            let part = |first: usize| {
                let mut tensor = weights.rows(first..vocab.min(first + step));
                let place = placement.place(tensor.bytes_mut())?;
                Ok((first, tensor, place))
            };
            Rows::Exact((0..vocab).step_by(step).map(part).collect::<Result<_>>()?)
        };
        Ok(Self { shape, rows })
    }

    /// Logits `[rows, vocab_size]` of normalised hidden states `[rows, hidden]`, each row with its precision. `None` if a part
    /// could not be streamed.
    ///
    /// # Errors
    /// Where a row that is to be exact cannot be read.
    pub(crate) fn forward(
        &self,
        hidden: &[f32],
        precision: &[LogitsPrecision],
        logits: &mut [f32],
        stream: Option<&Stream>,
    ) -> Result<Option<()>> {
        let [vocab, width] = self.shape;
        let parts = match &self.rows {
            Rows::Copy(weights, copy) => {
                copy.matmul(hidden, logits, vocab);
                let mut rows = logits.chunks_exact_mut(vocab).zip(hidden.chunks_exact(width));
                // The largest become exact.
                let rescore = |(logits, hidden): (&mut [f32], &[f32])| {
                    weights.multiply_rows(&leading(logits, RESCORED), hidden, logits)
                };
                return rows.try_for_each(rescore).map(Some);
            }
            Rows::Certified(head) => return head.forward(hidden, precision, logits).map(Some),
            Rows::Grouped(weights, activations) => {
                let product = [GroupedProduct { weights, offset: 0 }];
                let input = &mut GroupedInput::default();
                grouped_matmul_all(&product, hidden, *activations, input, logits, vocab);
                return Ok(Some(()));
            }
            Rows::Exact(parts) => parts,
        };
        for (first, tensor, place) in parts {
            let logits = &mut logits[*first..];
            match (place, stream) {
                (Place::Streamed(piece), Some(stream)) => {
                    let done = stream.with(*piece, |bytes| tensor.multiply(bytes, hidden, logits, vocab));
                    match done {
                        Some(done) => done?,
                        None => return Ok(None),
                    }
                }
                _ => tensor.multiply(tensor.bytes(), hidden, logits, vocab)?,
            }
        }
        Ok(Some(()))
    }
}

#[cfg(test)]
mod tests {
    use ternion_formats::{DenseTensor, DenseType};

    use super::*;
    use crate::residency::Budget;

    #[test]
    fn the_leading_logits_of_a_copy_are_exact() {
        let (vocab, width, rows) = (1000, 48, 3);
        let value = |i: usize| ((i * 7919 % 2003) as f32 / 1001.0 - 1.0) * (1.0 + (i / width % 5) as f32);
        let bytes: Vec<u8> = (0..vocab * width).flat_map(|i| value(i).to_le_bytes()).collect();
        let weights = DenseTensor { dtype: DenseType::F32, shape: vec![vocab, width], bytes: bytes.into() };
        let hidden: Vec<f32> = (0..rows * width).map(|i| (i * 31 % 17) as f32 - 8.0).collect();
        let logits = |precision| {
            let mut logits = vec![0.0; rows * vocab];
            let mut placement = Placement::new(Budget::new(None));
            let head = Head::new(
                Table::Dense(weights.clone()),
                (precision, &ComputeThreads::new(1)),
                ActivationType::default(),
                &mut placement,
            )
            .unwrap();
            head.forward(&hidden, &[LogitsPrecision::Exact; 3], &mut logits, None).unwrap().unwrap();
            logits
        };
        let exact = logits(HeadPrecision::Exact);
        for (bits, bound) in [(HeadPrecision::Int8, 2.0), (HeadPrecision::Int4, 30.0)] {
            let copy = logits(bits);
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
