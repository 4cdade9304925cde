//! Choosing the next token from a row of logits.
//!
//! The order is that of `transformers`: constraint, bias, penalties, temperature, top-k, top-p, min-p, one draw. All sums are
//! sequential f64, and the generator is ChaCha8 with a fixed stream, so a seed gives the same tokens whatever
//! the thread count.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{BuildHasher, RandomState},
};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

use ternion_core::{Error, Result, Sampling, SamplingDefaults};

use crate::LogitsPrecision;

/// The most logits that have to be exact where tokens are drawn.
const MOST_LEADING: usize = 64;

/// A random seed below 2^53. Many readers of JSON hold numbers as f64, which rounds larger integers.
fn drawn_seed() -> u64 {
    RandomState::new().hash_one(std::time::SystemTime::now()) >> 11
}

/// The sampler of one generation.
#[derive(Debug)]
pub(crate) struct Sampler {
    params: SamplingDefaults,
    presence: f32,
    frequency: f32,
    bias: BTreeMap<u32, f32>,
    seed: u64,
    rng: ChaCha8Rng,
    /// Tokens of prompt and answer, for the repetition penalty; empty when it is 1.
    seen: HashSet<u32>,
    /// How often each token is in the answer.
    answer: HashMap<u32, u32>,
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler for checked `sampling`.
    pub(crate) fn new(sampling: &Sampling, defaults: &SamplingDefaults) -> Self {
        let seed = sampling.seed.unwrap_or_else(drawn_seed);
        Self {
            params: defaults.clone().overridden_by(sampling),
            presence: sampling.presence_penalty.unwrap_or(0.0),
            frequency: sampling.frequency_penalty.unwrap_or(0.0),
            bias: sampling.logit_bias.clone(),
            seed,
            rng: ChaCha8Rng::seed_from_u64(seed),
            seen: HashSet::new(),
            answer: HashMap::new(),
            candidates: Vec::new(),
        }
    }

    /// The seed, unless every token is simply the most probable one.
    pub(crate) fn seed(&self) -> Option<u64> {
        (self.params.temperature > 0.0).then_some(self.seed)
    }

    /// How exact logits must be. `restricted`: some tokens are not allowed, so that the chosen one may be far from the largest.
    pub(crate) fn precision(&self, restricted: bool) -> LogitsPrecision {
        let changed = restricted
            || self.params.repetition_penalty != 1.0
            || (self.presence, self.frequency) != (0.0, 0.0)
            || !self.bias.is_empty();
        match (self.params.temperature > 0.0, self.params.top_k) {
            (false, _) if changed => LogitsPrecision::Exact,
            (false, _) => LogitsPrecision::Leading(1),
            (true, 1..=MOST_LEADING) => LogitsPrecision::Leading(self.params.top_k),
            // The rest of the distribution is drawn from too, and nearly exact.
            (true, _) => LogitsPrecision::Leading(MOST_LEADING),
        }
    }

    /// Tells the prompt, which the repetition penalty counts.
    pub(crate) fn observe_prompt(&mut self, tokens: &[u32]) {
        if self.params.repetition_penalty != 1.0 {
            self.seen.extend(tokens);
        }
    }

    /// Chooses the next token. Changes `logits` in place: `restrict` first, which sets those of forbidden tokens to -inf. No other
    /// setting allows such a token again.
    pub(crate) fn sample(
        &mut self,
        logits: &mut [f32],
        restrict: impl FnOnce(&mut [f32]) -> Result<()>,
    ) -> Result<u32> {
        check_finite(logits)?;
        restrict(logits)?;
        self.penalize(logits);
        let token = if self.params.temperature > 0.0 { self.draw(logits) } else { argmax(logits) };
        token.ok_or_else(none_left)
    }

    /// Checks a token that is not sampled.
    ///
    /// # Errors
    /// If the logit bias forbids it.
    pub(crate) fn check_allowed(&self, token: u32) -> Result<()> {
        if self.bias.get(&token) == Some(&f32::NEG_INFINITY) { Err(none_left()) } else { Ok(()) }
    }

    /// Counts a token of the answer.
    pub(crate) fn count(&mut self, token: u32) {
        if self.params.repetition_penalty != 1.0 {
            self.seen.insert(token);
        }
        if self.presence != 0.0 || self.frequency != 0.0 {
            *self.answer.entry(token).or_default() += 1;
        }
    }

    fn penalize(&self, logits: &mut [f32]) {
        for (&token, &bias) in &self.bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if bias == f32::NEG_INFINITY { bias } else { finite(*logit, *logit + bias) };
            }
        }
        let penalty = self.params.repetition_penalty;
        for &token in &self.seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = finite(*logit, if *logit > 0.0 { *logit / penalty } else { *logit * penalty });
            }
        }
        for (&token, &count) in &self.answer {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = finite(*logit, *logit - (self.presence + self.frequency * count as f32));
            }
        }
    }

    /// One draw from the filtered distribution; `None` if no logit is over -inf.
    fn draw(&mut self, logits: &[f32]) -> Option<u32> {
        let SamplingDefaults { temperature, top_k, top_p, min_p, .. } = self.params;
        let max = logits[argmax(logits)? as usize];
        // Relative weights of all tokens; the largest is 1. Those that vanish in f32 can never be drawn.
        let candidates = &mut self.candidates;
        candidates.clear();
        let weight = |logit: f32| ((logit - max) / temperature).exp();
        candidates.extend(
            logits.iter().enumerate().map(|(id, &l)| (id as u32, weight(l))).filter(|&(_, w)| w > 0.0),
        );
        // No weight is NaN, for max is finite: a difference or quotient that overflows is -inf and weighs 0. The
        // largest logit weighs 1, so at least that candidate survives the filters.
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, by_weight);
            candidates.truncate(top_k);
        }
        if top_p < 1.0 {
            keep_nucleus(candidates, top_p);
        }
        if min_p > 0.0 {
            candidates.retain(|&(_, w)| w >= min_p);
        }
        // Sorts by id, so that the draw does not depend on the order of the selection.
        candidates.sort_unstable_by_key(|&(id, _)| id);
        let total: f64 = candidates.iter().map(|&(_, w)| f64::from(w)).sum();
        let unit = (self.rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let mut rest = unit * total;
        for &(id, w) in candidates.iter() {
            rest -= f64::from(w);
            if rest < 0.0 {
                return Some(id);
            }
        }
        candidates.last().map(|&(id, _)| id)
    }
}

fn none_left() -> Error {
    Error::backend(
        "no token is left to choose: all logits are -inf, by the model, the constraint or the logit bias",
    )
}

/// `changed`, held in the range of f32, so that no setting makes a forbidden token of a possible one, or a weight of
/// infinite minus infinite. What the model itself has forbidden stays so.
fn finite(logit: f32, changed: f32) -> f32 {
    if logit == f32::NEG_INFINITY { logit } else { changed.clamp(f32::MIN, f32::MAX) }
}

/// Larger weights first; equal ones by id, so that a cut among equals is always the same.
fn by_weight(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Keeps the smallest set of most probable candidates whose share is at least `top_p`.
///
/// A full sort of a large vocabulary costs more than the rest of the sampler, so only as many candidates are
/// sorted as the nucleus needs.
fn keep_nucleus(candidates: &mut Vec<(u32, f32)>, top_p: f32) {
    let total: f64 = candidates.iter().map(|&(_, w)| f64::from(w)).sum();
    let wanted = total * f64::from(top_p);
    let mut sorted = 256;
    loop {
        let whole = sorted >= candidates.len();
        if !whole {
            candidates.select_nth_unstable_by(sorted, by_weight);
        }
        let sorted_now = if whole { candidates.len() } else { sorted };
        candidates[..sorted_now].sort_unstable_by(by_weight);
        let mut sum = 0.0;
        let nucleus = candidates[..sorted_now].iter().position(|&(_, w)| {
            sum += f64::from(w);
            sum >= wanted
        });
        if let Some(last) = nucleus {
            candidates.truncate(last + 1);
            return;
        }
        if whole {
            return;
        }
        sorted *= 16;
    }
}

/// The first index of the largest logit; `None` if all are -inf.
pub(crate) fn argmax(logits: &[f32]) -> Option<u32> {
    const LANES: usize = 16;
    let larger = |most: f32, logit: f32| if logit > most { logit } else { most };
    // Several maxima at a time, which become vector instructions, and then the place of the largest in its chunk.
    let (mut best, mut max) = (0, f32::NEG_INFINITY);
    for (i, chunk) in logits.chunks(16 * LANES).enumerate() {
        let mut maxima = [f32::NEG_INFINITY; LANES];
        let (groups, rest) = chunk.as_chunks::<LANES>();
        for group in groups {
            for lane in 0..LANES {
                maxima[lane] = larger(maxima[lane], group[lane]);
            }
        }
        let most = maxima.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger);
        if most > max {
            (best, max) = (i * 16 * LANES, most);
        }
    }
    let within = logits[best..].iter().position(|logit| *logit == max && max > f32::NEG_INFINITY)?;
    Some((best + within) as u32)
}

/// An error if any logit is NaN or +inf, which means that the weights or the engine are broken.
pub(crate) fn check_finite(logits: &[f32]) -> Result<()> {
    // Infinities and NaN have all bits of the exponent set. -inf is rare, so it looks closer only then.
    const EXPONENT: u32 = 0x7f80_0000;
    let suspicious = logits.iter().fold(0, |any, l| any | u32::from(l.to_bits() & EXPONENT == EXPONENT)) != 0;
    if suspicious && let Some(id) = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
        return Err(Error::backend(format!("the model computed {} as the logit of token {id}", logits[id])));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ternion_core::validate;

    fn sampler(sampling: Sampling) -> Sampler {
        Sampler::new(&sampling, &SamplingDefaults::default())
    }

    #[test]
    fn the_first_of_the_largest_is_found_wherever_it_is() {
        assert_eq!(argmax(&[]), None);
        assert_eq!(argmax(&[f32::NEG_INFINITY; 700]), None);
        for length in [1, 15, 16, 17, 255, 256, 257, 1000] {
            for place in (0..length).step_by(7).chain([length - 1]) {
                let mut logits: Vec<f32> = (0..length).map(|i| -((i * 31 % 17) as f32) - 1.0).collect();
                logits[0] = f32::NEG_INFINITY;
                logits[place] = -0.0;
                assert_eq!(argmax(&logits), Some(place as u32), "{length}");
                logits[place + 1..].fill(0.0);
                assert_eq!(argmax(&logits), Some(place as u32), "{length}");
            }
        }
    }

    fn next(sampler: &mut Sampler, logits: &mut [f32]) -> Result<u32> {
        let token = sampler.sample(logits, |_| Ok(()))?;
        sampler.count(token);
        Ok(token)
    }

    fn drawn(sampling: Sampling, logits: &[f32], draws: usize) -> BTreeMap<u32, usize> {
        let mut sampler = sampler(sampling);
        let mut counts = BTreeMap::new();
        for _ in 0..draws {
            *counts.entry(next(&mut sampler, &mut logits.to_vec()).unwrap()).or_default() += 1;
        }
        counts
    }

    fn hot(seed: u64) -> Sampling {
        Sampling::default().with_temperature(1.0).with_seed(seed)
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(next(&mut sampler(Sampling::default()), &mut [1.0, 3.0, 3.0]).unwrap(), 1);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0, 1.0, 2.0];
        let counts = drawn(hot(7), &logits, 20_000);
        let total: f64 = logits.iter().map(|l: &f32| f64::from(l.exp())).sum();
        for (id, logit) in logits.iter().enumerate() {
            let share = counts[&(id as u32)] as f64 / 20_000.0;
            assert!((share - f64::from(logit.exp()) / total).abs() < 0.015, "{counts:?}");
        }
    }

    #[test]
    fn filters_keep_what_they_say() {
        let logits = [0.0_f32, 1.0, 2.0, 3.0]; // probabilities 0.032 0.087 0.237 0.644
        let only = |s: Sampling| drawn(s, &logits, 2000).into_keys().collect::<Vec<_>>();
        assert_eq!(only(hot(1)), [0, 1, 2, 3]);
        assert_eq!(only(hot(1).with_top_k(2)), [2, 3]);
        assert_eq!(only(hot(1).with_top_p(0.6)), [3]);
        assert_eq!(only(hot(1).with_top_p(0.7)), [2, 3]);
        assert_eq!(only(hot(1).with_min_p(0.3)), [2, 3]);
        assert_eq!(only(hot(1).with_min_p(1.0)), [3]);
        assert_eq!(only(hot(1).with_logit_bias(3, f32::NEG_INFINITY).with_top_k(1)), [2]);
    }

    #[test]
    fn a_nucleus_larger_than_the_first_cut_is_found() {
        let mut candidates: Vec<(u32, f32)> = (0..10_000).map(|id| (id, 1.0)).collect();
        keep_nucleus(&mut candidates, 0.5);
        assert_eq!(candidates.len(), 5000);
        assert!(candidates.iter().all(|&(id, _)| id < 5000), "equals are cut by id");
    }

    #[test]
    fn a_seed_repeats_and_another_differs() {
        let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32 * 0.1).collect();
        let run = |seed| {
            let mut s = sampler(hot(seed));
            (0..50).map(|_| next(&mut s, &mut logits.clone()).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn drawn_seeds_survive_a_reader_of_doubles_and_given_ones_are_taken_as_they_are() {
        let unseeded = Sampling::default().with_temperature(1.0);
        let drawn = || Sampler::new(&unseeded, &SamplingDefaults::default()).seed().unwrap();
        let seeds: HashSet<u64> = (0..1000).map(|_| drawn()).collect();
        assert!(seeds.len() > 990, "{} different ones", seeds.len());
        assert!(seeds.iter().all(|&seed| seed < 1 << 53 && seed as f64 as u64 == seed));
        assert!(seeds.iter().any(|&seed| seed > 1 << 51), "the whole range is used");
        for seed in [0, 1 << 53, u64::MAX] {
            assert_eq!(sampler(hot(seed)).seed(), Some(seed));
        }
    }

    #[test]
    fn penalties_follow_their_definitions() {
        let mut s = sampler(Sampling::default().with_repetition_penalty(2.0));
        s.observe_prompt(&[0, 1]);
        let mut logits = [4.0, -1.0, 1.0];
        s.penalize(&mut logits);
        assert_eq!(logits, [2.0, -2.0, 1.0]);

        let mut s = sampler(Sampling::default().with_presence_penalty(1.0).with_frequency_penalty(0.5));
        s.observe_prompt(&[2]);
        for expected in [0, 0, 1] {
            assert_eq!(next(&mut s, &mut [5.0, 3.2, 0.0]).unwrap(), expected);
        }
        let mut logits = [5.0, 3.2, 0.0];
        s.penalize(&mut logits);
        assert_eq!(logits, [3.0, 3.2 - 1.5, 0.0], "the prompt does not count");
    }

    #[test]
    fn broken_logits_are_errors() {
        assert!(
            next(&mut sampler(hot(1)), &mut [0.0, f32::NAN]).unwrap_err().to_string().contains("token 1")
        );
        assert!(next(&mut sampler(hot(1)), &mut [f32::INFINITY, 0.0]).is_err());
        assert!(
            next(&mut sampler(hot(1)), &mut [f32::NEG_INFINITY; 3]).unwrap_err().to_string().contains("-inf")
        );
        assert_eq!(next(&mut sampler(hot(1)), &mut [f32::NEG_INFINITY, -5.0]).unwrap(), 1);
    }

    #[test]
    fn tiny_and_huge_temperatures_are_safe() {
        for t in [f32::MIN_POSITIVE, 1e-30, 1e30, f32::MAX] {
            let token = drawn(hot(3).with_temperature(t), &[-100.0, 1.0, 100.0], 10);
            assert!(token.keys().all(|&id| id < 3), "{t}");
        }
    }

    #[test]
    fn all_settings_within_their_ranges_work_together() {
        let tiny = f32::from_bits(1);
        let rows = [[-3.0, 1.0, 0.0, 2.0], [f32::MIN, f32::MAX, f32::NEG_INFINITY, 1e30]];
        for (row, temperature) in rows.iter().flat_map(|r| [0.0, tiny, 1.0, f32::MAX].map(|t| (r, t))) {
            for repetition in [tiny, 1e-38, 0.5, f32::MAX] {
                for (penalty, bias) in [(-100.0, f32::MAX), (0.0, 3e38), (100.0, -3e38), (100.0, f32::MIN)] {
                    let sampling = Sampling::default()
                        .with_temperature(temperature)
                        .with_top_p(0.9)
                        .with_min_p(0.1)
                        .with_repetition_penalty(repetition)
                        .with_presence_penalty(penalty)
                        .with_frequency_penalty(penalty)
                        .with_logit_bias(0, bias)
                        .with_logit_bias(1, bias)
                        .with_logit_bias(2, bias)
                        .with_seed(1);
                    validate::sampling(&sampling, 4).unwrap();
                    let mut s = sampler(sampling.clone());
                    s.observe_prompt(&[0, 1, 2, 3]);
                    for _ in 0..8 {
                        let token =
                            next(&mut s, &mut row.to_vec()).unwrap_or_else(|e| panic!("{sampling:?}: {e}"));
                        assert!(
                            row[token as usize] > f32::NEG_INFINITY,
                            "{sampling:?}: {token} is forbidden"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_setting_forbids_a_token_only_where_it_says_so() {
        let mut s = sampler(hot(1).with_repetition_penalty(f32::MAX));
        s.observe_prompt(&[0, 1]);
        let mut logits = [-5.0, -4.0];
        s.penalize(&mut logits);
        assert_eq!(logits, [f32::MIN; 2]);
        assert!(next(&mut s, &mut [-5.0, -4.0]).is_ok());

        let s = sampler(hot(1).with_logit_bias(0, f32::NEG_INFINITY));
        let mut logits = [f32::MAX, 0.0];
        s.penalize(&mut logits);
        assert_eq!(logits, [f32::NEG_INFINITY, 0.0]);
    }
}
