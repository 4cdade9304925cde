//! Rows of documents, one after the other, that fill a training step. A step's batch follows from the seed and the
//! number of the step alone, so that a stopped training goes on with the same text.

use std::sync::Arc;

use ternion::text::Tokenizer;

use super::attention::Places;
use super::text::{self, Document, Random, Role};

/// A row of documents.
pub(crate) struct Row {
    pub(crate) tokens: Vec<u32>,
    /// What is to be foreseen at each, mostly the token after it, and as what; nothing at the end of a row.
    pub(crate) targets: Vec<u32>,
    pub(crate) roles: Vec<Option<Role>>,
    pub(crate) places: Places,
}

impl Row {
    /// What each token counts for in the loss.
    pub(crate) fn weights(&self) -> Vec<f32> {
        self.roles.iter().map(|role| role.map_or(0.0, Role::weight)).collect()
    }
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
        let most = text::most_shots(step);
        (0..self.rows).map(|row| self.row((step * self.rows + row) as u64, most)).collect()
    }

    fn row(&self, stream: u64, most: usize) -> ternion::Result<Row> {
        let mut random = Random::new(self.seed, stream);
        let (mut tokens, mut targets, mut roles, mut starts) = (vec![], vec![], vec![], vec![]);
        while tokens.len() < self.length {
            let start = tokens.len();
            // The first alone has room for many examples.
            let document = self.encode(&text::document(&mut random, start == 0, most))?;
            let kept = document.len().min(self.length - start);
            for (i, (token, ..)) in document[..kept].iter().enumerate() {
                let next = document.get(i + 1);
                tokens.push(*token);
                targets.push(next.map_or(0, |(_, target, _)| *target));
                roles.push(next.map(|(.., role)| *role));
                starts.push(start);
            }
        }
        let places = Places { length: self.length, starts: Arc::new(starts) };
        Ok(Row { tokens, targets, roles, places })
    }

    /// Tokens, each with the one that is to be foreseen in its place, and its role.
    fn encode(&self, document: &Document) -> ternion::Result<Vec<(u32, u32, Role)>> {
        let bos = self.tokenizer.bos_id().map(|bos| (bos, bos, Role::Given));
        let mut tokens: Vec<_> = bos.into_iter().collect();
        for (text, role) in &document.0 {
            let mut ids = self.tokenizer.encode(text, false)?.into_iter();
            if let Role::Verdict(Some(letter)) = role
                && let Some(id) = ids.next()
            {
                let letter = self.tokenizer.encode(&format!(" {letter}"), false)?;
                tokens.push((id, letter.first().copied().unwrap_or(id), *role));
            }
            tokens.extend(ids.map(|id| (id, id, *role)));
        }
        Ok(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::super::master;
    use super::super::text::facts;
    use super::*;

    #[test]
    fn the_letter_is_to_be_foreseen_behind_the_right_choice_and_the_text_stays() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = Arc::new(master::tokenizer(folder.path(), 600, 5, 100).unwrap());
        let batches = Batches { tokenizer: Arc::clone(&tokenizer), seed: 5, rows: 1, length: 64 };
        let newline = tokenizer.encode("\n", false).unwrap()[0];
        let mut random = Random::new(5, 0);
        for _ in 0..50 {
            let document = facts::document(&mut random, 2);
            let text: String = document.0.iter().map(|(text, _)| text.as_str()).collect();
            let tokens = batches.encode(&document).unwrap();
            let ids: Vec<u32> = tokens.iter().map(|(id, ..)| *id).collect();
            assert_eq!(ids, tokenizer.encode(&text, true).unwrap(), "{text}");
            let of = |wanted: fn(&Role) -> bool| {
                tokens.iter().filter(move |(.., role)| wanted(role)).map(|(_, target, _)| *target)
            };
            let pointed: Vec<u32> = of(|role| matches!(role, Role::Verdict(Some(_)))).collect();
            let letters: Vec<u32> = of(|role| *role == Role::Letter).collect();
            assert_eq!((&pointed, letters.len()), (&letters, 3), "{text}");
            let wrong: Vec<u32> = of(|role| *role == Role::Verdict(None)).collect();
            assert_eq!(wrong, [newline; 9], "{text}");
        }
    }
}
