//! Drafts: guesses of the next tokens, which one pass of the model verifies together. A draft changes the speed of an answer
//! and not its tokens: each token is chosen from the logits at its place, and what differs from the draft is computed again.

use std::collections::HashMap;
use std::time::Duration;

/// The most tokens of a draft.
pub(crate) const MAX_DRAFT: usize = 16;

/// A source of drafts for one answer. It sees each token of the answer.
pub(crate) trait DraftSource: Send {
    /// Takes a token that was chosen.
    fn push(&mut self, token: u32);

    /// The tokens that may come next, at most `most`.
    fn propose(&self, most: usize) -> &[u32];

    /// The probability that the first token of the draft is right, and that each further one is if those before it are.
    fn confidence(&self) -> (f64, f64);
}

/// Tokens that must have come before in the same order, so that what followed them is a draft.
const NGRAM: usize = 3;

/// Tokens that are indexed at most: about 12 MB.
const MAX_HISTORY: usize = 1 << 18;

/// How much of an estimate the last observation makes.
const WEIGHT: f64 = 0.25;

/// Prompt lookup: a draft is what followed the last three tokens where they came before, in the prompt, the answer or a text that
/// the answer is expected to repeat.
///
/// It judges its guesses before they are ever used: each token that is chosen is compared with the guess, so that nothing is
/// drafted while the guesses are wrong.
#[derive(Debug)]
pub(crate) struct PromptLookup {
    history: Vec<u32>,
    /// For each n-gram the index after its last occurrence.
    index: HashMap<[u32; NGRAM], usize>,
    /// Where in `history` the guess of the next token stands.
    next: Option<usize>,
    /// Whether the last guess was right, so that the next one continues it.
    continues: bool,
    /// How often the first guess at a place is right.
    first: f64,
    /// How often a guess is right after a right one.
    further: f64,
}

impl PromptLookup {
    /// A lookup in `texts`, of which the last is the prompt.
    pub(crate) fn new(texts: &[&[u32]]) -> Self {
        let tokens = texts.iter().map(|text| text.len()).sum::<usize>();
        let mut lookup = Self {
            history: Vec::with_capacity(tokens),
            index: HashMap::with_capacity(tokens.min(MAX_HISTORY)),
            next: None,
            continues: false,
            first: 0.0,
            further: 0.5,
        };
        for &token in texts.iter().copied().flatten() {
            lookup.append(token);
        }
        lookup
    }

    /// Appends a token to what is searched. Returns where its last n-gram ended before.
    fn append(&mut self, token: u32) -> Option<usize> {
        if self.history.len() >= MAX_HISTORY {
            return None;
        }
        self.history.push(token);
        let ngram = *self.history.last_chunk::<NGRAM>()?;
        self.index.insert(ngram, self.history.len())
    }
}

impl DraftSource for PromptLookup {
    fn push(&mut self, token: u32) {
        if let Some(at) = self.next {
            let hit = self.history.get(at) == Some(&token);
            let rate = if self.continues { &mut self.further } else { &mut self.first };
            *rate += WEIGHT * (f64::from(u8::from(hit)) - *rate);
            self.continues = hit;
            self.next = hit.then_some(at + 1);
        }
        let found = self.append(token);
        if self.next.is_none() {
            (self.next, self.continues) = (found, false);
        }
    }

    fn propose(&self, most: usize) -> &[u32] {
        let start = self.next.unwrap_or(self.history.len()).min(self.history.len());
        let end = self.history.len().min(start.saturating_add(most));
        &self.history[start..end]
    }

    fn confidence(&self) -> (f64, f64) {
        (if self.continues { self.further } else { self.first }, self.further)
    }
}

/// What a step costs by its number of tokens, as observed: a line through recent steps of decoding.
#[derive(Debug, Default)]
pub(crate) struct StepCost {
    /// Weights, tokens, seconds, tokens², tokens x seconds: sums in which older steps count less.
    sums: [f64; 5],
}

/// What each further token costs as a share of a step with one, where nothing is known yet.
const FURTHER_TOKEN: f64 = 0.25;

/// How much an observation counts after each later one.
const DECAY: f64 = 0.97;

impl StepCost {
    pub(crate) fn observe(&mut self, tokens: usize, time: Duration) {
        let (n, t) = (tokens as f64, time.as_secs_f64());
        for (sum, value) in self.sums.iter_mut().zip([1.0, n, t, n * n, n * t]) {
            *sum = *sum * DECAY + value;
        }
    }

    /// Seconds of a step: a part that does not depend on its tokens, and one for each token. In other units where no step has
    /// been observed.
    pub(crate) fn line(&self) -> (f64, f64) {
        let [w, n, t, nn, nt] = self.sums;
        if w == 0.0 {
            return (1.0 - FURTHER_TOKEN, FURTHER_TOKEN);
        }
        let (mean_n, mean_t) = (n / w, t / w);
        let variance = nn / w - mean_n * mean_n;
        let one = mean_t / (1.0 + FURTHER_TOKEN * (mean_n - 1.0));
        if variance < 0.05 {
            return (one * (1.0 - FURTHER_TOKEN), one * FURTHER_TOKEN);
        }
        let slope = (nt / w - mean_n * mean_t) / variance;
        // A busy machine may make longer steps look cheaper.
        let slope = slope.clamp(mean_t * 0.01 / mean_n, mean_t / mean_n);
        ((mean_t - slope * mean_n).max(0.0), slope)
    }
}

/// How many tokens of a draft are worth their cost in a step with `tokens` tokens, from which `gain` tokens of answers are
/// expected: as many as raise the answers' tokens per second. Adds them to both.
pub(crate) fn worthwhile(
    (first, further): (f64, f64),
    most: usize,
    (base, each): (f64, f64),
    tokens: &mut f64,
    gain: &mut f64,
) -> usize {
    let mut probability = first;
    for length in 0..most {
        if probability * (base + each * *tokens) <= each * *gain {
            return length;
        }
        *tokens += 1.0;
        *gain += probability;
        probability *= further;
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pushed(lookup: &mut PromptLookup, tokens: &[u32]) {
        for &token in tokens {
            lookup.push(token);
        }
    }

    #[test]
    fn a_draft_is_what_followed_the_same_tokens() {
        let mut lookup = PromptLookup::new(&[&[1, 2, 3, 4, 5, 6, 7]]);
        assert!(lookup.propose(8).is_empty());
        pushed(&mut lookup, &[2, 3, 4]);
        assert_eq!(lookup.propose(2), [5, 6]);
        assert_eq!(lookup.propose(0), [0; 0]);
        pushed(&mut lookup, &[5]);
        assert_eq!(lookup.propose(9), [6, 7, 2, 3, 4, 5], "the answer follows the prompt");
        pushed(&mut lookup, &[9]);
        assert!(lookup.propose(9).is_empty());
    }

    #[test]
    fn the_last_occurrence_counts_and_the_first_text_is_searched_too() {
        let mut lookup = PromptLookup::new(&[&[1, 2, 3, 8], &[1, 2, 3, 9, 4, 5, 6, 7]]);
        pushed(&mut lookup, &[1, 2, 3]);
        assert_eq!(lookup.propose(1), [9]);
        let mut lookup = PromptLookup::new(&[&[1, 2, 3, 8], &[7]]);
        pushed(&mut lookup, &[1, 2, 3]);
        assert_eq!(lookup.propose(1), [8]);
    }

    #[test]
    fn nothing_is_trusted_before_it_was_right() {
        let text: Vec<u32> = (0..100).collect();
        let mut lookup = PromptLookup::new(&[&text]);
        let cost = StepCost::default().line();
        let mut lengths = Vec::new();
        for token in 10..40 {
            lookup.push(token);
            lengths.push(worthwhile(lookup.confidence(), MAX_DRAFT, cost, &mut 1.0, &mut 1.0));
        }
        assert_eq!(lengths[..3], [0, 0, 0]);
        assert!(lengths[4] >= 1, "{lengths:?}");
        assert_eq!(lengths[29], MAX_DRAFT, "{lengths:?}");
        // Places that are found and wrong.
        for i in 0..20 {
            pushed(&mut lookup, &[50 + i, 51 + i, 52 + i, 1000 + i]);
        }
        pushed(&mut lookup, &[60, 61, 62]);
        assert!(!lookup.propose(1).is_empty());
        assert_eq!(worthwhile(lookup.confidence(), MAX_DRAFT, cost, &mut 1.0, &mut 1.0), 0);
    }

    #[test]
    fn the_line_of_costs_is_found() {
        let mut cost = StepCost::default();
        for i in 0..200 {
            let tokens = 1 + i % 9;
            cost.observe(tokens, Duration::from_micros(8000 + 1000 * tokens as u64));
        }
        let (base, each) = cost.line();
        assert!((base - 0.008).abs() < 1e-4 && (each - 0.001).abs() < 1e-5, "{base} {each}");
        // Where each token costs as much as the first, only what is sure is worth it.
        let flat = (0.0, 0.01);
        assert_eq!(worthwhile((0.9, 0.9), 16, flat, &mut 1.0, &mut 1.0), 0);
        assert!(worthwhile((0.9, 0.9), 16, (0.01, 0.001), &mut 1.0, &mut 1.0) > 8);
    }

    #[test]
    fn steps_of_one_length_tell_no_slope() {
        let mut cost = StepCost::default();
        for i in 0..50 {
            cost.observe(1, Duration::from_micros(1000 + i % 7));
        }
        let (base, each) = cost.line();
        assert!((each / (base + each) - FURTHER_TOKEN).abs() < 1e-6);
    }

    #[test]
    fn what_is_indexed_is_bounded() {
        let long = vec![7; MAX_HISTORY + 10];
        let mut lookup = PromptLookup::new(&[&long]);
        pushed(&mut lookup, &[7, 7, 7]);
        assert_eq!(lookup.history.len(), MAX_HISTORY);
        assert!(lookup.propose(4).len() <= 4);
    }
}
