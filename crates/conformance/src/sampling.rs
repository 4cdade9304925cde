//! How tokens are chosen: seeds, greedy decoding, filters, penalties and biases.

use futures_util::future::join_all;
use std::collections::HashSet;

use ternion_core::{Completion, LlmBackend, LogitsRequest, Sampling};

use crate::{
    Failure, Sentence,
    ask::{SHORT, answer, drawn, greedy, prompt, tokens},
    check::checks,
};

checks! { "sampling";
    the_same_seed_gives_the_same_tokens, SEED, [Generate, Seed], rounding;
    the_same_seed_gives_the_same_tokens_beside_others, SEED, [Generate, Seed], rounding;
    other_seeds_give_other_tokens, OTHER, [Generate, Seed, Tokenizer];
    a_seed_that_was_drawn_is_reported, REPORTED, [Generate, Seed], rounding;
    a_seed_that_was_given_is_reported, DONE_SEED, [Generate, Seed];
    greedy_answers_have_no_seed, DONE_SEED, [Generate];
    temperature_0_takes_the_most_probable_token, ZERO, [Generate], rounding;
    filters_that_leave_one_token_are_greedy, KEEP, [Generate, Seed], rounding;
    open_fields_take_the_defaults, DEFAULTS, [Generate, Seed], rounding;
    a_bias_forbids_and_forces_tokens, BIAS, [Generate, Tokenizer], rounding, ranges;
    penalties_change_the_logits_as_documented, PENALTY, [Generate, Logits, Tokenizer], rounding;
    a_presence_penalty_keeps_tokens_from_repeating, PRESENCE, [Generate, Tokenizer], ranges;
    all_values_within_work_together, RANGES, [Generate], ranges;
}

const SEED: Sentence = Sentence::new(
    "Sampling::seed",
    "The same seed with the same prompt gives the same tokens, whatever else runs (but for rounding, where the backend \
     is not batch_invariant).",
);
const OTHER: Sentence = Sentence::new("Capabilities::seed", "The same seed gives the same tokens.");
const REPORTED: Sentence =
    Sentence::new("Sampling::seed", "None draws a seed, which the final event reports.");
const DONE_SEED: Sentence = Sentence::new(
    "Event::Done",
    "The seed that the tokens were drawn with; None if they were not drawn (greedy).",
);
const ZERO: Sentence =
    Sentence::new("Sampling::temperature", "Finite and at least 0; 0 takes the most probable token.");
const KEEP: Sentence = Sentence::new("Sampling::top_k", "Keep the top_k most probable tokens; 0 keeps all.");
const DEFAULTS: Sentence =
    Sentence::new("Sampling", "A field that is None takes the model's own default (SamplingDefaults).");
const BIAS: Sentence = Sentence::new(
    "Sampling::logit_bias",
    "Added to the logits of these token ids; finite, or -inf, which forbids a token.",
);
const PENALTY: Sentence = Sentence::new(
    "Sampling::repetition_penalty",
    "Finite and over 0; 1 changes nothing. Counts prompt and answer.",
);
const PRESENCE: Sentence = Sentence::new(
    "Sampling::presence_penalty",
    "Subtracted once from the logit of each token that the answer has; from -100 to 100, default 0.",
);
const RANGES: Sentence = Sentence::new(
    "Sampling",
    "All values within work together: a logit that bias or penalties would carry out of the range of f32 becomes its \
     largest or smallest number.",
);

async fn draw(
    model: &dyn LlmBackend,
    text: &str,
    sampling: Sampling,
    sentence: Sentence,
) -> Result<Completion, Failure> {
    answer(model, greedy(text, SHORT).with_sampling(sampling), sentence).await
}

/// Twice the same.
///
/// # Errors
/// Both answers where they differ.
pub async fn the_same_seed_gives_the_same_tokens(model: &dyn LlmBackend) -> Result<(), Failure> {
    let text = prompt("seed");
    for seed in [0, 1, 42, u64::MAX] {
        let first = draw(model, &text, drawn(Some(seed)), SEED).await?;
        let second = draw(model, &text, drawn(Some(seed)), SEED).await?;
        SEED.equal(format_args!("tokens with seed {seed}"), second.tokens, first.tokens)?;
    }
    Ok(())
}

/// The same while others run.
///
/// # Errors
/// Both answers where they differ.
pub async fn the_same_seed_gives_the_same_tokens_beside_others(
    model: &dyn LlmBackend,
) -> Result<(), Failure> {
    let text = prompt("seed beside others");
    let alone = draw(model, &text, drawn(Some(7)), SEED).await?;
    let others = [Some(7), Some(8), None].map(|seed| draw(model, &text, drawn(seed), SEED));
    let mut all: Vec<std::pin::Pin<Box<dyn Future<Output = _> + Send + '_>>> = Vec::new();
    for other in others {
        all.push(Box::pin(other));
    }
    let mut answers = join_all(all).await.into_iter();
    let Some(beside) = answers.next() else { return Ok(()) };
    SEED.equal("tokens with seed 7 beside others", beside?.tokens, alone.tokens)?;
    answers.try_for_each(|answer| answer.map(|_| ()))
}

/// Of some seeds, not all give the same answer: a backend that always takes the most probable token keeps to no seed.
///
/// # Errors
/// The one answer.
pub async fn other_seeds_give_other_tokens(model: &dyn LlmBackend) -> Result<(), Failure> {
    let text = prompt("other seeds");
    let mut answers = HashSet::new();
    for seed in 0..8 {
        answers.insert(draw(model, &text, drawn(Some(seed)), OTHER).await?.tokens);
    }
    OTHER.require(answers.len() > 1, format_args!("{answers:?} for 8 seeds"), "different answers")
}

/// Without a seed one is drawn; the reported one gives the same answer. A backend that reports none has drawn nothing, so
/// that its answers are always the same.
///
/// # Errors
/// Both answers where they differ.
pub async fn a_seed_that_was_drawn_is_reported(model: &dyn LlmBackend) -> Result<(), Failure> {
    let text = prompt("reported");
    let mut seeds = HashSet::new();
    for _ in 0..4 {
        let first = draw(model, &text, drawn(None), REPORTED).await?;
        let again = draw(model, &text, drawn(first.seed), REPORTED).await?;
        REPORTED.equal(
            format_args!("tokens with the reported seed {:?}", first.seed),
            again.tokens,
            first.tokens,
        )?;
        seeds.insert(first.seed);
    }
    let drawn = seeds.len() > 1 || seeds.contains(&None);
    REPORTED.require(drawn, format_args!("the seeds {seeds:?} of four answers"), "different ones")
}

/// The seed of the request comes back.
///
/// # Errors
/// The other seed.
pub async fn a_seed_that_was_given_is_reported(model: &dyn LlmBackend) -> Result<(), Failure> {
    let answer = draw(model, &prompt("given"), drawn(Some(42)), DONE_SEED).await?;
    // A backend that does not draw has nothing to report.
    DONE_SEED.require(
        matches!(answer.seed, Some(42) | None),
        format_args!("seed {:?}", answer.seed),
        "42, as in the request,",
    )
}

/// Nothing is drawn at temperature 0.
///
/// # Errors
/// The seed.
pub async fn greedy_answers_have_no_seed(model: &dyn LlmBackend) -> Result<(), Failure> {
    let mut request = greedy(prompt("no seed"), 3);
    request.params.sampling.seed = Some(1);
    let answer = answer(model, request, DONE_SEED).await?;
    DONE_SEED.equal("seed of a greedy answer", answer.seed, None)
}

/// At temperature 0 the answer is always the same, whatever seed and filters are.
///
/// # Errors
/// Both answers where they differ.
pub async fn temperature_0_takes_the_most_probable_token(model: &dyn LlmBackend) -> Result<(), Failure> {
    let text = prompt("zero");
    let first = draw(model, &text, Sampling::greedy(), ZERO).await?;
    for (seed, top_k, top_p) in [(1, 0, 1.0), (2, 3, 0.5), (3, 100, 0.9)] {
        let mut sampling = Sampling::greedy();
        (sampling.seed, sampling.top_k, sampling.top_p) = (Some(seed), Some(top_k), Some(top_p));
        let again = draw(model, &text, sampling, ZERO).await?;
        ZERO.equal("tokens at temperature 0", again.tokens, first.tokens.clone())?;
    }
    Ok(())
}

/// `top_k` of 1, a `top_p` that the first token passes, and a `min_p` of 1 leave the most probable token.
///
/// # Errors
/// Both answers where they differ.
pub async fn filters_that_leave_one_token_are_greedy(model: &dyn LlmBackend) -> Result<(), Failure> {
    let text = prompt("filters");
    let expected = draw(model, &text, Sampling::greedy(), KEEP).await?.tokens;
    for filter in ["top_k", "top_p", "min_p"] {
        for seed in 0..3 {
            let mut sampling = drawn(Some(seed));
            match filter {
                "top_k" => sampling.top_k = Some(1),
                "top_p" => sampling.top_p = Some(1e-9),
                _ => sampling.min_p = Some(1.0),
            }
            let found = draw(model, &text, sampling, KEEP).await?.tokens;
            KEEP.equal(format_args!("tokens with one left by {filter}"), found, expected.clone())?;
        }
    }
    Ok(())
}

/// Open fields are the same as the defaults that `info` tells, written out.
///
/// # Errors
/// Both answers where they differ.
pub async fn open_fields_take_the_defaults(model: &dyn LlmBackend) -> Result<(), Failure> {
    let (text, defaults) = (prompt("defaults"), model.info().defaults.clone());
    for seed in 0..3 {
        let open = Sampling::default().with_seed(seed);
        let written = open
            .clone()
            .with_temperature(defaults.temperature)
            .with_top_k(defaults.top_k)
            .with_top_p(defaults.top_p)
            .with_min_p(defaults.min_p)
            .with_repetition_penalty(defaults.repetition_penalty);
        let (open, written) =
            (draw(model, &text, open, DEFAULTS).await?, draw(model, &text, written, DEFAULTS).await?);
        DEFAULTS.equal("tokens with open fields", open.tokens, written.tokens)?;
        DEFAULTS.equal("seed with open fields", open.seed, written.seed)?;
    }
    Ok(())
}

/// A token that is forbidden is not in the answer, and one with a large bias is all of it.
///
/// # Errors
/// The tokens.
pub async fn a_bias_forbids_and_forces_tokens(model: &dyn LlmBackend) -> Result<(), Failure> {
    let text = prompt("bias");
    let first = draw(model, &text, Sampling::greedy(), BIAS).await?;
    let token = first.tokens[0];
    let mut sampling = Sampling::greedy();
    sampling.logit_bias.insert(token, f32::NEG_INFINITY);
    let without = draw(model, &text, sampling, BIAS).await?;
    BIAS.require(!without.tokens.contains(&token), format_args!("{:?}", without.tokens), "others")?;
    for mut sampling in [Sampling::greedy(), drawn(Some(1))] {
        sampling.logit_bias.insert(0, 1e30);
        let forced = draw(model, &text, sampling, BIAS).await?;
        let count = forced.tokens.len();
        BIAS.equal("tokens with a large bias on token 0", forced.tokens, vec![0; count])?;
    }
    Ok(())
}

/// The token that is chosen with a repetition penalty and a bias is the largest of the logits changed by hand.
///
/// # Errors
/// Both tokens where they differ.
pub async fn penalties_change_the_logits_as_documented(model: &dyn LlmBackend) -> Result<(), Failure> {
    let prompt = tokens(model, "penalty", 20, PENALTY)?;
    let request = LogitsRequest::new(prompt.clone()).with_start(prompt.len() - 1);
    let raw = model.logits(request).await.map_err(PENALTY.refused("logits"))?;
    let seen: HashSet<u32> = prompt.iter().copied().collect();
    for penalty in [0.2, 0.5, 2.0, 5.0] {
        let mut logits = raw.clone();
        for &id in &seen {
            let logit = &mut logits[id as usize];
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
        let mut sampling = Sampling::greedy();
        sampling.repetition_penalty = Some(penalty);
        let found =
            answer(model, greedy(prompt.clone(), 1).with_sampling(sampling), PENALTY).await?.tokens[0];
        let largest = logits.iter().copied().fold(f32::MIN, f32::max);
        // Two ways to one logit may differ in the last digits.
        let fits = logits[found as usize] >= largest - crate::scoring::TOLERANCE * penalty.max(1.0);
        PENALTY.require(
            fits,
            format_args!("token {found} with penalty {penalty}, a logit of {}", logits[found as usize]),
            format_args!("the largest, {largest},"),
        )?;
    }
    Ok(())
}

/// With the largest penalty no token comes twice.
///
/// # Errors
/// The tokens.
pub async fn a_presence_penalty_keeps_tokens_from_repeating(model: &dyn LlmBackend) -> Result<(), Failure> {
    for by_count in [false, true] {
        let mut sampling = Sampling::greedy();
        let penalty = if by_count { &mut sampling.frequency_penalty } else { &mut sampling.presence_penalty };
        *penalty = Some(100.0);
        let tokens = draw(model, &prompt("presence"), sampling, PRESENCE).await?.tokens;
        let different: HashSet<u32> = tokens.iter().copied().collect();
        PRESENCE.require(
            different.len() == tokens.len(),
            format_args!("{tokens:?} with a penalty of 100"),
            "different tokens",
        )?;
    }
    Ok(())
}

/// The ends of all ranges, together.
///
/// # Errors
/// The refusal.
pub async fn all_values_within_work_together(model: &dyn LlmBackend) -> Result<(), Failure> {
    for temperature in [f32::MIN_POSITIVE, 1e30, f32::MAX] {
        for (penalty, sign) in [(f32::MIN_POSITIVE, 1.0), (f32::MAX, -1.0)] {
            for (top_k, top_p, min_p) in [(1, f32::MIN_POSITIVE, 1.0), (usize::MAX, 1.0, 0.0)] {
                let sampling = Sampling::default()
                    .with_temperature(temperature)
                    .with_top_k(top_k)
                    .with_top_p(top_p)
                    .with_min_p(min_p)
                    .with_repetition_penalty(penalty)
                    .with_presence_penalty(100.0 * sign)
                    .with_frequency_penalty(-100.0 * sign)
                    .with_logit_bias(0, f32::MAX * sign)
                    .with_seed(1);
                let request = greedy(prompt("ranges"), 3).with_sampling(sampling);
                answer(model, request, RANGES).await?;
            }
        }
    }
    Ok(())
}
