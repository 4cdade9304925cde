//! What is drawn from: the filters keep what they should, and what is left is drawn as its probabilities say.
//!
//! The first token after one prompt is drawn with many seeds, and compared with the row of logits it was drawn from.

use ternion_core::{LlmBackend, LogitsRequest, Sampling};

use crate::{
    Failure, Sentence,
    ask::{answer, drawn, greedy, prompt, tokens},
    check::checks,
};

checks! { "drawing";
    top_k_keeps_the_most_probable, TOP_K, [Generate, Seed, Logits, Tokenizer], rounding;
    top_p_keeps_the_smallest_set, TOP_P, [Generate, Seed, Logits, Tokenizer], rounding;
    min_p_keeps_what_is_near_the_most_probable, MIN_P, [Generate, Seed, Logits, Tokenizer], rounding;
    temperature_shapes_the_probabilities, ORDER, [Generate, Seed, Logits, Tokenizer], rounding;
    drawn_seeds_are_below_2_53, SEED, [Generate, Seed];
}

const TOP_K: Sentence = Sentence::new("Sampling::top_k", "Keep the top_k most probable tokens; 0 keeps all.");
const TOP_P: Sentence = Sentence::new(
    "SamplingDefaults::top_p",
    "Keep the smallest set of tokens whose probabilities sum to at least top_p; 1 keeps all.",
);
const MIN_P: Sentence = Sentence::new(
    "SamplingDefaults::min_p",
    "Keep tokens at least min_p times as probable as the most probable one; 0 keeps all.",
);
const ORDER: Sentence = Sentence::new(
    "Sampling",
    "The order is: logit bias, repetition/presence/frequency penalties, temperature, top-k, top-p, min-p, draw.",
);

const SEED: Sentence =
    Sentence::new("Sampling::seed", "A drawn seed is below 2^53, so that every JSON reader holds it.");

/// How many tokens are drawn for each setting.
const DRAWS: u64 = 40;

/// What probabilities that are computed in another order may differ by, relatively.
const SLACK: f64 = 1e-3;

/// A prompt with the row of logits behind it.
struct Next {
    prompt: Vec<u32>,
    logits: Vec<f32>,
}

impl Next {
    async fn new(model: &dyn LlmBackend, own: &str, sentence: Sentence) -> Result<Self, Failure> {
        let prompt = tokens(model, own, 16, sentence)?;
        let request = LogitsRequest::new(prompt.clone()).with_start(prompt.len() - 1);
        let logits = model.logits(request).await.map_err(sentence.refused("logits"))?;
        Ok(Self { prompt, logits })
    }

    /// The probabilities at a temperature.
    fn probabilities(&self, temperature: f64) -> Vec<f64> {
        let largest = f64::from(self.logits.iter().copied().fold(f32::MIN, f32::max));
        let weights: Vec<f64> =
            self.logits.iter().map(|&l| ((f64::from(l) - largest) / temperature).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|weight| weight / sum).collect()
    }

    /// One token for each of some seeds.
    async fn draw(
        &self,
        model: &dyn LlmBackend,
        sampling: &Sampling,
        sentence: Sentence,
    ) -> Result<Vec<usize>, Failure> {
        let mut tokens = Vec::new();
        for seed in 0..DRAWS {
            let sampling = sampling.clone().with_seed(seed);
            let request = greedy(self.prompt.clone(), 1).with_sampling(sampling);
            tokens.push(answer(model, request, sentence).await?.tokens[0] as usize);
        }
        Ok(tokens)
    }
}

/// No token is drawn that as many others or more come before.
///
/// # Errors
/// The token.
pub async fn top_k_keeps_the_most_probable(model: &dyn LlmBackend) -> Result<(), Failure> {
    let next = Next::new(model, "top k", TOP_K).await?;
    let probabilities = next.probabilities(1.5);
    for top_k in [2, 5] {
        let sampling = drawn(None).with_top_k(top_k);
        for token in next.draw(model, &sampling, TOP_K).await? {
            let own = probabilities[token] * (1.0 + SLACK);
            let before = probabilities.iter().filter(|&&p| p > own).count();
            TOP_K.require(
                before < top_k,
                format_args!("token {token} with top_k {top_k}, {before} are more probable"),
                format_args!("one of the first {top_k}"),
            )?;
        }
    }
    Ok(())
}

/// No token is drawn that the more probable ones together make unnecessary.
///
/// # Errors
/// The token.
pub async fn top_p_keeps_the_smallest_set(model: &dyn LlmBackend) -> Result<(), Failure> {
    let next = Next::new(model, "top p", TOP_P).await?;
    let probabilities = next.probabilities(1.5);
    for top_p in [0.2_f32, 0.6] {
        let sampling = drawn(None).with_top_p(top_p);
        for token in next.draw(model, &sampling, TOP_P).await? {
            let own = probabilities[token] * (1.0 + SLACK);
            let before: f64 = probabilities.iter().filter(|&&p| p > own).sum();
            TOP_P.require(
                before < f64::from(top_p) * (1.0 + SLACK),
                format_args!("token {token} with top_p {top_p}, the more probable ones sum to {before}"),
                "a token of the smallest set",
            )?;
        }
    }
    Ok(())
}

/// No token is drawn that is less probable than the limit says.
///
/// # Errors
/// The token.
pub async fn min_p_keeps_what_is_near_the_most_probable(model: &dyn LlmBackend) -> Result<(), Failure> {
    let next = Next::new(model, "min p", MIN_P).await?;
    let probabilities = next.probabilities(1.5);
    let largest = probabilities.iter().copied().fold(0.0, f64::max);
    for min_p in [0.2_f32, 0.7] {
        let sampling = drawn(None).with_min_p(min_p);
        for token in next.draw(model, &sampling, MIN_P).await? {
            let share = probabilities[token] / largest;
            MIN_P.require(
                share >= f64::from(min_p) * (1.0 - SLACK),
                format_args!("token {token} with min_p {min_p}, {share} times as probable as the first"),
                "a more probable one",
            )?;
        }
    }
    Ok(())
}

/// The mean log-probability of what is drawn is the one that the temperature makes of the logits, within five standard
/// deviations: once in a million right samplers would be found wrong, and always the same, for the seeds are fixed.
///
/// # Errors
/// Both means.
pub async fn temperature_shapes_the_probabilities(model: &dyn LlmBackend) -> Result<(), Failure> {
    let next = Next::new(model, "shape", ORDER).await?;
    let under_the_model: Vec<f64> = next.probabilities(1.0).iter().map(|p| p.max(1e-300).ln()).collect();
    for temperature in [0.2_f32, 3.0] {
        let probabilities = next.probabilities(f64::from(temperature));
        let mean: f64 = probabilities.iter().zip(&under_the_model).map(|(p, l)| p * l).sum();
        let variance: f64 =
            probabilities.iter().zip(&under_the_model).map(|(p, l)| p * (l - mean) * (l - mean)).sum();
        let sampling = drawn(None).with_temperature(temperature);
        let tokens = next.draw(model, &sampling, ORDER).await?;
        let found = tokens.iter().map(|&t| under_the_model[t]).sum::<f64>() / tokens.len() as f64;
        let bound = 5.0 * (variance / tokens.len() as f64).sqrt() + SLACK;
        ORDER.require(
            (found - mean).abs() <= bound,
            format_args!("a mean log-probability of {found} at temperature {temperature}"),
            format_args!("{mean} within {bound}"),
        )?;
    }
    Ok(())
}

/// Twenty seeds that nobody gave.
///
/// # Errors
/// The seed.
pub async fn drawn_seeds_are_below_2_53(model: &dyn LlmBackend) -> Result<(), Failure> {
    for _ in 0..20 {
        let request = greedy(prompt("seed"), 1).with_sampling(drawn(None));
        if let Some(seed) = answer(model, request, SEED).await?.seed {
            SEED.require(seed < 1 << 53, format_args!("the seed {seed}"), "one below 2^53")?;
        }
    }
    Ok(())
}
