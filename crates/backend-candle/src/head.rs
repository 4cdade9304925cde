//! The head: from hidden states to logits.
//!
//! It is read whole for every token, and in half precision it is more bytes than all ternary weights of BitNet 2B4T. An
//! int8 copy halves that; the leading candidates are then computed again from the original weights, so that the choice among
//! them is the exact one.

use std::ops::Range;

use rayon::prelude::*;
use ternion_core::Result;
use ternion_formats::DenseTensor;
use ternion_kernels::{Int8Matrix, dense_matmul};

use crate::residency::{Place, Placement, head_rows};
use crate::stream::Stream;

/// How many of the largest logits are exact with an int8 head.
const RESCORED: usize = 64;

/// A head `[vocab_size, hidden]`.
pub(crate) struct Head {
    /// All rows, to read single ones of.
    exact: DenseTensor,
    /// Its rows in order; one part where all of them are in memory.
    parts: Vec<Part>,
    has_copy: bool,
}

struct Part {
    first: usize,
    rows: Rows,
}

enum Rows {
    Exact(DenseTensor, Place),
    Copy(Int8Matrix),
}

impl Head {
    /// A head on `weights`, or on an int8 copy of them if `int8`.
    ///
    /// # Errors
    /// Where weights that stay in memory cannot be read, or there is no memory.
    pub(crate) fn new(weights: DenseTensor, int8: bool, placement: &mut Placement) -> Result<Self> {
        let vocab = weights.shape[0];
        let step = if placement.is_limited() { head_rows(&weights) } else { vocab };
        let part = |first: usize| -> Result<Part> {
            let range: Range<usize> = first..vocab.min(first + step);
            let mut tensor = weights.rows(range);
            let rows = if int8 {
                tensor.bytes = tensor.bytes.loaded()?;
                Rows::Copy(Int8Matrix::new(tensor.view(), tensor.shape[0], tensor.shape[1]))
            } else {
                let place = placement.place(&mut tensor.bytes)?;
                Rows::Exact(tensor, place)
            };
            Ok(Part { first, rows })
        };
        let parts = (0..vocab).step_by(step).map(part).collect::<Result<_>>()?;
        Ok(Self { exact: weights, parts, has_copy: int8 })
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
        let (vocab, width) = (self.exact.shape[0], self.exact.shape[1]);
        for Part { first, rows } in &self.parts {
            let logits = &mut logits[*first..];
            match (rows, stream) {
                (Rows::Copy(int8), _) => int8.matmul(hidden, logits, vocab),
                (Rows::Exact(tensor, Place::Streamed(piece)), Some(stream)) => {
                    let done = stream.with(*piece, |bytes| {
                        let weights = tensor.dtype.view(bytes);
                        dense_matmul(weights, tensor.shape[0], width, hidden, logits, vocab);
                    });
                    if done.is_none() {
                        return Ok(None);
                    }
                }
                (Rows::Exact(tensor, _), _) => {
                    dense_matmul(tensor.view(), tensor.shape[0], width, hidden, logits, vocab);
                }
            }
        }
        if self.has_copy {
            let rows = logits.par_chunks_exact_mut(vocab).zip(hidden.par_chunks_exact(width));
            rows.try_for_each(|(logits, hidden)| self.rescore(hidden, logits))?;
        }
        Ok(Some(()))
    }

    /// Replaces the largest logits by exact ones.
    fn rescore(&self, hidden: &[f32], logits: &mut [f32]) -> Result<()> {
        let mut leading: Vec<u32> = (0..logits.len() as u32).collect();
        if leading.len() > RESCORED {
            leading.select_nth_unstable_by(RESCORED, |a, b| {
                logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
            });
            leading.truncate(RESCORED);
        }
        for id in leading {
            let logit = &mut logits[id as usize..=id as usize];
            let row = self.exact.row(id as usize);
            let bytes = row.bytes.loaded()?;
            dense_matmul(row.dtype.view(&bytes), 1, hidden.len(), hidden, logit, 1);
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
    fn the_leading_logits_of_an_int8_head_are_exact() {
        let (vocab, width, rows) = (1000, 48, 3);
        let value = |i: usize| ((i * 7919 % 2003) as f32 / 1001.0 - 1.0) * (1.0 + (i / width % 5) as f32);
        let bytes: Vec<u8> = (0..vocab * width).flat_map(|i| value(i).to_le_bytes()).collect();
        let weights = DenseTensor { dtype: DenseType::F32, shape: vec![vocab, width], bytes: bytes.into() };
        let hidden: Vec<f32> = (0..rows * width).map(|i| (i * 31 % 17) as f32 - 8.0).collect();
        let logits = |int8| {
            let mut logits = vec![0.0; rows * vocab];
            let mut placement = Placement::new(Budget::new(None));
            let head = Head::new(weights.clone(), int8, &mut placement).unwrap();
            head.forward(&hidden, &mut logits, None).unwrap().unwrap();
            logits
        };
        let (exact, fast) = (logits(false), logits(true));
        for (exact, fast) in exact.chunks_exact(vocab).zip(fast.chunks_exact(vocab)) {
            let mut order: Vec<usize> = (0..vocab).collect();
            order.sort_by(|a, b| exact[*b].total_cmp(&exact[*a]));
            for id in &order[..RESCORED / 2] {
                assert_eq!(exact[*id], fast[*id], "token {id}");
            }
            assert!(exact.iter().zip(fast).filter(|(a, b)| a != b).count() > vocab / 2, "the rest is int8");
            assert!(exact.iter().zip(fast).all(|(a, b)| (a - b).abs() < 2.0));
        }
    }
}
