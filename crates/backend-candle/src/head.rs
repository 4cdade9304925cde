//! The head: from hidden states to logits.
//!
//! It is read whole for every token, and in half precision it is more bytes than all ternary weights of BitNet 2B4T. An
//! int8 copy halves that; the leading candidates are then computed again from the original weights, so that the choice among
//! them is the exact one.

use rayon::prelude::*;
use ternion_formats::DenseTensor;
use ternion_kernels::{Int8Matrix, dense_matmul};

/// How many of the largest logits are exact with an int8 head.
const RESCORED: usize = 64;

/// A head `[vocab_size, hidden]`.
pub(crate) struct Head {
    exact: DenseTensor,
    int8: Option<Int8Matrix>,
}

impl Head {
    /// A head on `weights`, with an int8 copy of them if `int8`.
    pub(crate) fn new(weights: DenseTensor, int8: bool) -> Self {
        let int8 = int8.then(|| Int8Matrix::new(weights.view(), weights.shape[0], weights.shape[1]));
        Self { exact: weights, int8 }
    }

    /// Logits `[rows, vocab_size]` of normalised hidden states `[rows, hidden]`.
    pub(crate) fn forward(&self, hidden: &[f32], logits: &mut [f32]) {
        let (vocab, width) = (self.exact.shape[0], self.exact.shape[1]);
        let Some(int8) = &self.int8 else {
            dense_matmul(self.exact.view(), vocab, width, hidden, logits, vocab);
            return;
        };
        int8.matmul(hidden, logits, vocab);
        let rows = logits.par_chunks_exact_mut(vocab).zip(hidden.par_chunks_exact(width));
        rows.for_each(|(logits, hidden)| self.rescore(hidden, logits));
    }

    /// Replaces the largest logits by exact ones.
    fn rescore(&self, hidden: &[f32], logits: &mut [f32]) {
        let mut leading: Vec<u32> = (0..logits.len() as u32).collect();
        if leading.len() > RESCORED {
            leading.select_nth_unstable_by(RESCORED, |a, b| {
                logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
            });
            leading.truncate(RESCORED);
        }
        for id in leading {
            let logit = &mut logits[id as usize..=id as usize];
            dense_matmul(self.exact.row(id as usize).view(), 1, hidden.len(), hidden, logit, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use ternion_formats::DenseType;

    use super::*;

    #[test]
    fn the_leading_logits_of_an_int8_head_are_exact() {
        let (vocab, width, rows) = (1000, 48, 3);
        let value = |i: usize| ((i * 7919 % 2003) as f32 / 1001.0 - 1.0) * (1.0 + (i / width % 5) as f32);
        let bytes: Vec<u8> = (0..vocab * width).flat_map(|i| value(i).to_le_bytes()).collect();
        let weights = DenseTensor { dtype: DenseType::F32, shape: vec![vocab, width], bytes: bytes.into() };
        let hidden: Vec<f32> = (0..rows * width).map(|i| (i * 31 % 17) as f32 - 8.0).collect();
        let logits = |int8| {
            let mut logits = vec![0.0; rows * vocab];
            Head::new(weights.clone(), int8).forward(&hidden, &mut logits);
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
