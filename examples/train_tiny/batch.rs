//! Rows of documents, one after the other, that fill a training step. A step's batch follows from the seed and the
//! number of the step alone, so that a stopped training goes on with the same text.

use std::sync::Arc;

use rayon::prelude::*;
use ternion::text::Tokenizer;

use super::attention::Places;
use super::text::{self, Document, Random};

/// Tokens of one step.
pub(crate) struct Batch {
    pub(crate) tokens: Vec<u32>,
    /// The token after each, and what its prediction counts for.
    pub(crate) targets: Vec<u32>,
    pub(crate) weights: Vec<f32>,
    pub(crate) places: Places,
}

/// Turns text into rows of tokens.
pub(crate) struct Batches {
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) seed: u64,
    /// Rows of a batch, and tokens of a row.
    pub(crate) rows: usize,
    pub(crate) length: usize,
}

/// One row: tokens, targets, weights, starts.
type Row = (Vec<u32>, Vec<u32>, Vec<f32>, Vec<usize>);

impl Batches {
    /// The batch of this step.
    pub(crate) fn get(&self, step: usize) -> ternion::Result<Batch> {
        let row = |row| self.row((step * self.rows + row) as u64);
        let rows = (0..self.rows).into_par_iter().map(row).collect::<ternion::Result<Vec<_>>>()?;
        let mut row = Row::default();
        for next in rows {
            row.0.extend(next.0);
            row.1.extend(next.1);
            row.2.extend(next.2);
            row.3.extend(next.3);
        }
        let places = Places { length: self.length, starts: Arc::new(row.3) };
        Ok(Batch { tokens: row.0, targets: row.1, weights: row.2, places })
    }

    fn row(&self, stream: u64) -> ternion::Result<Row> {
        let mut random = Random::new(self.seed, stream);
        let mut row = Row::default();
        while row.0.len() < self.length {
            let start = row.0.len();
            // The first alone has room for many examples.
            let document = self.encode(&text::document(&mut random, start == 0))?;
            let kept = document.len().min(self.length - start);
            for (i, (token, _)) in document[..kept].iter().enumerate() {
                let (target, weight) = document.get(i + 1).copied().unwrap_or_default();
                row.0.push(*token);
                row.1.push(target);
                row.2.push(weight);
                row.3.push(start);
            }
        }
        Ok(row)
    }

    /// Tokens, each with what its prediction counts for.
    fn encode(&self, document: &Document) -> ternion::Result<Vec<(u32, f32)>> {
        let mut tokens: Vec<(u32, f32)> = self.tokenizer.bos_id().map(|bos| (bos, 0.0)).into_iter().collect();
        for (text, role) in &document.0 {
            tokens.extend(self.tokenizer.encode(text, false)?.into_iter().map(|id| (id, role.weight())));
        }
        Ok(tokens)
    }
}
