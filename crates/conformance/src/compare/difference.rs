//! How far two models' answers are apart.

use serde::Serialize;
use ternion_core::ModelInfo;

use super::{
    Answers, Questions,
    answers::{GreedyAnswer, KINDS},
};

/// The difference of one model from the reference. A part that either could not be asked is `None`.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Comparison {
    /// The model that is compared with.
    pub reference: ModelInfo,
    /// The model that is compared.
    pub model: ModelInfo,
    /// Texts with the same token ids.
    pub token_ids: Option<Agreement>,
    /// Conversations that are rendered to the same text and the same token ids.
    pub prompts: Option<Agreement>,
    /// Ways of cutting all texts into chunks that give the same chunks.
    pub chunk_plans: Option<Agreement>,
    /// Logits at the positions of all sequences.
    pub logits: Option<LogitsDifference>,
    /// Greedy answers.
    pub greedy: Option<GreedyDifference>,
    /// The perplexity of the document.
    pub perplexity: Option<PerplexityDifference>,
}

/// How many of some things are equal.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Agreement {
    /// So many are.
    pub equal: usize,
    /// Of so many.
    pub total: usize,
    /// The first that is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_difference: Option<String>,
}

/// How far logits are apart.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct LogitsDifference {
    /// The largest difference of a logit.
    pub max: f32,
    /// The mean of the absolute differences.
    pub mean: f64,
    /// The largest Kullback-Leibler divergence at a position, of the model's distribution from the reference's, in nats.
    pub max_kl: f64,
    /// The mean of the divergences.
    pub mean_kl: f64,
    /// The fraction of positions with the same most probable token.
    pub top1: f64,
    /// The mean fraction of the reference's five most probable tokens that are among the model's five.
    pub top5: f64,
    /// Each position.
    pub positions: Vec<Position>,
}

/// How far the logits of one position are apart; the fields as in [`LogitsDifference`].
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Position {
    /// Which sequence of the questions.
    pub sequence: usize,
    /// The position in the sequence.
    pub position: usize,
    /// The largest difference.
    pub max: f32,
    /// The mean of the absolute differences.
    pub mean: f64,
    /// The divergence, in nats.
    pub kl: f64,
    /// Whether the most probable token is the same.
    pub top1: bool,
    /// How many of the five most probable tokens are the same.
    pub top5: usize,
}

/// How far greedy answers are apart.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct GreedyDifference {
    /// Answers with the same tokens.
    pub answers: Agreement,
    /// Where answers part, the largest difference between the log-probabilities that the reference gives to its own choice
    /// and to the model's: how clear the choice was that the model made otherwise. 0 if all are equal, infinite (null in
    /// JSON) if the model's choice was not among the reference's first ones.
    pub largest_gap: f32,
}

/// The perplexity of the document: the exponential of the mean negative log-probability of its tokens.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct PerplexityDifference {
    /// To the reference.
    pub reference: f64,
    /// To the model.
    pub model: f64,
    /// Scored tokens.
    pub tokens: usize,
    /// Of the two, relative to the reference's.
    pub relative: f64,
}

impl Comparison {
    /// Compares the answers of a model with those of the reference to the same questions.
    pub fn new(questions: &Questions, reference: &Answers, model: &Answers) -> Self {
        let texts = &questions.inputs.texts;
        let chats: Vec<String> =
            (1..=questions.inputs.chats.len()).map(|n| format!("conversation {n}")).collect();
        let logits = |(reference, model): (&Vec<f32>, &Vec<f32>)| difference(questions, reference, model);
        Self {
            reference: (*reference.info).clone(),
            model: (*model.info).clone(),
            token_ids: agreement(texts, &reference.texts, &model.texts),
            prompts: prompts(&chats, reference, model),
            chunk_plans: agreement(&KINDS.map(|(_, name)| name.to_owned()), &reference.plans, &model.plans),
            logits: reference.logits.as_ref().zip(model.logits.as_ref()).and_then(logits),
            greedy: greedy(&reference.greedy, &model.greedy),
            perplexity: perplexity(&reference.document, &model.document),
        }
    }
}

/// A model that should have a chat template and has none renders every conversation otherwise.
fn prompts(names: &[String], reference: &Answers, model: &Answers) -> Option<Agreement> {
    if !reference.chats.is_empty() && model.chats.is_empty() && !model.texts.is_empty() {
        let first_difference = Some("there is no chat template".to_owned());
        return Some(Agreement { equal: 0, total: reference.chats.len(), first_difference });
    }
    agreement(names, &reference.chats, &model.chats)
}

fn agreement<T: PartialEq>(names: &[String], reference: &[T], model: &[T]) -> Option<Agreement> {
    if reference.is_empty() || model.is_empty() {
        return None;
    }
    let pairs = || names.iter().zip(reference.iter().zip(model));
    let first = pairs().find(|(_, (a, b))| a != b);
    Some(Agreement {
        equal: pairs().filter(|(_, (a, b))| a == b).count(),
        total: reference.len().max(model.len()),
        first_difference: first.map(|(name, _)| name.clone()),
    })
}

fn difference(questions: &Questions, reference: &[f32], model: &[f32]) -> Option<LogitsDifference> {
    let vocab = questions.vocab_size;
    let places =
        questions.sequences.iter().enumerate().flat_map(|(s, tokens)| (0..tokens.len()).map(move |p| (s, p)));
    let rows = reference.chunks_exact(vocab).zip(model.chunks_exact(vocab));
    let positions: Vec<Position> =
        places.zip(rows).map(|((sequence, at), (a, b))| position(sequence, at, a, b)).collect();
    if positions.is_empty() {
        return None;
    }
    let mean = |of: &dyn Fn(&Position) -> f64| positions.iter().map(of).sum::<f64>() / positions.len() as f64;
    Some(LogitsDifference {
        max: positions.iter().map(|p| p.max).fold(0.0, larger),
        mean: mean(&|p| p.mean),
        max_kl: positions.iter().map(|p| p.kl).fold(0.0, f64::max),
        mean_kl: mean(&|p| p.kl),
        top1: mean(&|p| f64::from(p.top1)),
        top5: mean(&|p| p.top5 as f64 / 5f64.min(vocab as f64)),
        positions,
    })
}

/// The larger of two differences, where one that is no number is the largest.
fn larger(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) }
}

fn position(sequence: usize, position: usize, reference: &[f32], model: &[f32]) -> Position {
    let pairs = || reference.iter().zip(model);
    let (a, b) = (log_normaliser(reference), log_normaliser(model));
    let kl: f64 = pairs()
        .map(|(&p, &q)| {
            let (p, q) = (f64::from(p) - a, f64::from(q) - b);
            if p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - q) }
        })
        .sum();
    let (best, others) = (leading(reference), leading(model));
    Position {
        sequence,
        position,
        // Infinities of the same sign are no difference.
        max: pairs().map(|(p, q)| if p == q { 0.0 } else { (p - q).abs() }).fold(0.0, larger),
        mean: pairs().map(|(p, q)| if p == q { 0.0 } else { f64::from((p - q).abs()) }).sum::<f64>()
            / reference.len() as f64,
        // Rounding may bring the sum a little below zero.
        kl: if kl.is_nan() { kl } else { kl.max(0.0) },
        top1: best[0] == others[0],
        top5: best.iter().filter(|id| others.contains(id)).count(),
    }
}

/// The logarithm of the sum of the exponentials.
fn log_normaliser(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + logits.iter().map(|&l| (f64::from(l) - max).exp()).sum::<f64>().ln()
}

/// The tokens of the five largest logits, the largest first; of equal ones the lowest id.
fn leading(logits: &[f32]) -> Vec<usize> {
    let mut best: Vec<usize> = Vec::with_capacity(6);
    for (id, logit) in logits.iter().enumerate() {
        let at = best.partition_point(|&other| logits[other].total_cmp(logit).is_ge());
        if at < 5 {
            best.insert(at, id);
            best.truncate(5);
        }
    }
    best
}

fn greedy(reference: &[GreedyAnswer], model: &[GreedyAnswer]) -> Option<GreedyDifference> {
    let names: Vec<String> =
        reference.iter().zip(model).map(|(a, b)| format!("{:?} for {:?}", b.text, a.text)).collect();
    let tokens = |answers: &[GreedyAnswer]| answers.iter().map(|a| a.tokens.clone()).collect::<Vec<_>>();
    let answers = agreement(&names, &tokens(reference), &tokens(model))?;
    let gaps =
        reference.iter().zip(model).filter(|(a, b)| a.tokens != b.tokens).map(|(a, b)| gap(a, &b.tokens));
    Some(GreedyDifference { answers, largest_gap: gaps.fold(0.0, f32::max) })
}

/// How much more probable the reference finds its own token than the model's, where the two part.
fn gap(reference: &GreedyAnswer, model: &[u32]) -> f32 {
    let at = reference.tokens.iter().zip(model).take_while(|(a, b)| a == b).count();
    let alternatives = reference.alternatives.get(at).map_or(&[][..], Vec::as_slice);
    let logprob = |id: Option<&u32>| {
        alternatives.iter().find(|(other, _)| Some(other) == id).map(|(_, logprob)| logprob)
    };
    match (logprob(reference.tokens.get(at)), logprob(model.get(at))) {
        (Some(own), Some(other)) => own - other,
        _ => f32::INFINITY,
    }
}

fn perplexity(reference: &[f32], model: &[f32]) -> Option<PerplexityDifference> {
    if reference.is_empty() || model.len() != reference.len() {
        return None;
    }
    let of = |logprobs: &[f32]| {
        (-logprobs.iter().map(|&l| f64::from(l)).sum::<f64>() / logprobs.len() as f64).exp()
    };
    let (a, b) = (of(reference), of(model));
    Some(PerplexityDifference {
        reference: a,
        model: b,
        tokens: reference.len(),
        relative: (b - a).abs() / a,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_have_no_difference_and_shifted_ones_no_divergence() {
        let row = [0.5, -1.0, 3.0, 2.0, f32::NEG_INFINITY, 0.0, 1.0];
        let same = position(0, 0, &row, &row);
        assert_eq!((same.max, same.mean, same.kl, same.top1, same.top5), (0.0, 0.0, 0.0, true, 5));
        let shifted = row.map(|logit| logit + 1.0);
        let other = position(0, 0, &row, &shifted);
        assert!(other.max == 1.0 && other.kl < 1e-12 && other.top1, "{other:?}");
    }

    #[test]
    fn the_divergence_is_that_of_the_formula() {
        // P = (1/2, 1/2), Q = (1/4, 3/4): KL = 1/2 ln(2) + 1/2 ln(2/3).
        let found = position(0, 0, &[0.0, 0.0], &[0.0, 3f32.ln()]);
        assert!((found.kl - 0.5 * (2f64.ln() + (2.0 / 3.0f64).ln())).abs() < 1e-7);
        assert!(!found.top1);
        assert_eq!(found.top5, 2);
    }

    #[test]
    fn what_is_no_number_is_the_largest_difference() {
        let found = position(0, 0, &[1.0, 2.0], &[1.0, f32::NAN]);
        assert!(found.max.is_nan() && found.kl.is_nan());
        assert!(larger(larger(0.0, f32::NAN), 3.0).is_nan());
    }

    #[test]
    fn a_gap_says_how_clear_the_choice_was() {
        let reference = GreedyAnswer {
            text: "ab".into(),
            tokens: vec![1, 2],
            alternatives: vec![vec![(1, -0.1), (5, -3.0)], vec![(2, -0.5), (3, -0.75)]],
        };
        let with = |tokens: &[u32]| GreedyAnswer { tokens: tokens.to_vec(), ..reference.clone() };
        let gap_to =
            |tokens: &[u32]| greedy(std::slice::from_ref(&reference), &[with(tokens)]).unwrap().largest_gap;
        assert_eq!(gap_to(&[1, 2]), 0.0);
        assert_eq!(gap_to(&[1, 3]), 0.25);
        assert_eq!(gap_to(&[9, 2]), f32::INFINITY);
        assert_eq!(gap_to(&[1]), f32::INFINITY);
    }

    #[test]
    fn perplexity_is_the_exponential_of_the_mean() {
        let found = perplexity(&[-1.0, -3.0], &[-2.0, -2.2]).unwrap();
        assert!((found.reference - 2f64.exp()).abs() < 1e-6);
        assert!((found.relative - (0.1f64.exp() - 1.0)).abs() < 1e-6);
        assert!(perplexity(&[], &[]).is_none());
    }
}
