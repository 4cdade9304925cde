//! Rows of documents, one after the other, that fill a training step. A step's batch follows from the seed and the
//! number of the step alone, so that a stopped training goes on with the same text.

use std::sync::Arc;

use ternion::text::Tokenizer;

use super::attention::Places;
use super::text::{self, Document, Random};

/// A row of documents.
pub(crate) struct Row {
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

impl Batches {
    /// The rows of this step.
    pub(crate) fn get(&self, step: usize) -> ternion::Result<Vec<Row>> {
        (0..self.rows).map(|row| self.row((step * self.rows + row) as u64)).collect()
    }

    fn row(&self, stream: u64) -> ternion::Result<Row> {
        let mut random = Random::new(self.seed, stream);
        let (mut tokens, mut targets, mut weights, mut starts) = (vec![], vec![], vec![], vec![]);
        while tokens.len() < self.length {
            let start = tokens.len();
            // The first alone has room for many examples.
            let document = self.encode(&text::document(&mut random, start == 0))?;
            let kept = document.len().min(self.length - start);
            for (i, (token, _)) in document[..kept].iter().enumerate() {
                let (target, weight) = document.get(i + 1).copied().unwrap_or_default();
                tokens.push(*token);
                targets.push(target);
                weights.push(weight);
                starts.push(start);
            }
        }
        let places = Places { length: self.length, starts: Arc::new(starts) };
        Ok(Row { tokens, targets, weights, places })
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
