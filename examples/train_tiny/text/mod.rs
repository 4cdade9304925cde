//! The text that the model is trained on: made from a seed, item by item, so that there is as much of it as is wanted and
//! no licence to ask for.
//!
//! Three kinds: sums and word problems as GSM8K writes them, facts with four choices as lm-evaluation-harness prompts
//! MMLU, and small talk in the chat template. One item in ten is held out by a hash of what it asks: no training text
//! has it, and accuracy is measured on nothing else.

pub(crate) mod arithmetic;
pub(crate) mod chat;
pub(crate) mod facts;
mod random;

pub(crate) use random::Random;
use sha2::{Digest, Sha256};

/// Which items may be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Split {
    Train,
    HeldOut,
}

impl Split {
    /// The side of an item that asks `what`.
    pub(crate) fn of(what: &str) -> Self {
        if Sha256::digest(what)[0] % 10 == 0 { Self::HeldOut } else { Self::Train }
    }
}

/// What a stretch of text is to the model, and so what it counts for in the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Given at inference: only a little, as the next question cannot be foreseen.
    Given,
    /// What the model is to say.
    Said,
    /// The one letter of a choice: there is one for many tokens.
    Letter,
    /// The line break after a choice. Where the choice is right, its letter is to be foreseen instead, though the text does not
    /// have it: so what is right is learned where it stands, four times a question, and not only from the one letter at the end.
    Verdict(Option<char>),
}

impl Role {
    /// The names of the roles, by `index`.
    pub(crate) const NAMES: [&str; 4] = ["given", "said", "letters", "verdicts"];

    pub(crate) fn index(self) -> usize {
        match self {
            Self::Given => 0,
            Self::Said => 1,
            Self::Letter => 2,
            Self::Verdict(_) => 3,
        }
    }

    /// The factor of a token's loss.
    pub(crate) fn weight(self) -> f32 {
        match self {
            Self::Given => 0.1,
            Self::Said | Self::Verdict(_) => 1.0,
            Self::Letter => 4.0,
        }
    }
}

/// A text in the stretches in which it is tokenised.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Document(pub(crate) Vec<(String, Role)>);

impl Document {
    pub(crate) fn push(&mut self, text: impl Into<String>, role: Role) {
        self.0.push((text.into(), role));
    }
}

pub(crate) const END_OF_TEXT: &str = "<|end_of_text|>";
pub(crate) const END_OF_TURN: &str = "<|eot_id|>";

/// The most examples before a question.
pub(crate) const MOST_SHOTS: usize = 5;

/// Steps in which questions stand alone, and steps after which there may be one more example before them.
const ALONE: usize = 1000;
const WIDEN: usize = 100;

/// How many examples there may be before a question at this step of a training. None at first: what the choices have to do
/// with the question is found many times sooner where they see little else.
pub(crate) fn most_shots(step: usize) -> usize {
    step.checked_sub(ALONE).map_or(0, |steps| (1 + steps / WIDEN).min(MOST_SHOTS))
}

/// A document of any kind, with none to `most` examples before a question. As long as that is none, most are choices. Later on
/// a `long` one has mostly as many as may be and is no small talk; of the others half are small talk, which is short.
pub(crate) fn document(random: &mut Random, long: bool, most: usize) -> Document {
    let shots = if long && random.below(2) == 0 { most } else { random.below(most + 1) };
    if most == 0 {
        return match random.below(10) {
            0..8 => facts::document(random, 0),
            8 => arithmetic::document(random, 0),
            _ => chat::document(random),
        };
    }
    match (random.below(10), long) {
        (0..6, true) => facts::document(random, shots),
        (0..4, false) => facts::document(random, shots.min(2)),
        (_, true) | (4, false) => arithmetic::document(random, shots),
        _ => chat::document(random),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_training_item_is_held_out() {
        let mut random = Random::new(1, 0);
        let mut keys = |split| {
            let mut keys = HashSet::new();
            for _ in 0..3000 {
                keys.insert(arithmetic::problem(&mut random, split).key);
                keys.insert(facts::choice(&mut random, split, None).key());
                keys.insert(chat::exchange(&mut random, split).key());
            }
            keys
        };
        let (train, held_out) = (keys(Split::Train), keys(Split::HeldOut));
        assert!(train.is_disjoint(&held_out));
        assert!(train.len() > 4000 && held_out.len() > 1000, "{} {}", train.len(), held_out.len());
    }

    #[test]
    fn a_seed_gives_the_same_documents() {
        let documents = |seed| {
            let mut random = Random::new(seed, 3);
            (0..50).map(|_| document(&mut random, false, MOST_SHOTS)).collect::<Vec<_>>()
        };
        assert!(documents(1) == documents(1));
        assert!(documents(1) != documents(2));
    }
}
