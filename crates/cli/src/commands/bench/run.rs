//! The measurement of one point.
//!
//! A run is two steps: first each sequence gets its prompt and one token, which is prefill; then all of them go on from the
//! prompts that the engine has kept, which is decoding alone, however many they are. Prompts are random, so that no kept
//! prefix helps where it should not, and answers go on past end-of-sequence tokens.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ternion::{Completion, Error, ErrorKind, GenerateRequest, LlmBackend, Sampling};
use tokio::task::JoinSet;

use super::cases::Case;
use super::energy::Energy;
use super::result::{Point, Spread};
use crate::App;
use crate::args_bench::BenchArgs;
use crate::failure::{Failure, Outcome};

/// A loaded model that is measured.
pub(super) struct Bench<'a> {
    pub(super) app: &'a App,
    pub(super) args: &'a BenchArgs,
    pub(super) backend: Arc<dyn LlmBackend>,
    pub(super) energy: Option<&'a Energy>,
    pub(super) threads: usize,
    random: SplitMix,
}

/// What the runs of a point gave, one value for each that counts.
#[derive(Debug, Default)]
pub(super) struct Samples {
    runs: u32,
    prefill: Vec<f64>,
    decode: Vec<f64>,
    first_token: Vec<f64>,
    prefill_joules: Vec<f64>,
    decode_joules: Vec<f64>,
}

impl<'a> Bench<'a> {
    pub(super) fn new(
        app: &'a App,
        args: &'a BenchArgs,
        backend: Arc<dyn LlmBackend>,
        energy: Option<&'a Energy>,
        threads: usize,
    ) -> Self {
        Self { app, args, backend, energy, threads, random: SplitMix(0x7e41_0000) }
    }

    /// Runs a case as often as is asked for, and calls `step` after each run. What an interruption leaves is in `samples`.
    pub(super) async fn measure(
        &mut self,
        case: &Case,
        samples: &mut Samples,
        mut step: impl FnMut(),
    ) -> Outcome {
        let mut prompts = Vec::new();
        for run in 0..self.args.warm_up + self.args.repeat {
            let counts = run >= self.args.warm_up;
            if case.fresh || prompts.is_empty() {
                prompts = self.prompts(case);
                let prefill = self.together(&prompts, 1).await?;
                if counts && case.fresh {
                    samples.prefill.extend(prefill.prefill_rate());
                    samples.first_token.extend(prefill.first_token());
                    samples.prefill_joules.extend(prefill.joules_per(case.batch * case.prompt));
                }
            }
            let decode = self.together(&prompts, self.args.decode).await?;
            let kept = decode.keeps_prompts();
            if case.batch > 1 && !kept {
                return Err(Error::unsupported(format!(
                    "backend `{}` does not keep prompts, so that sequences cannot be timed while all of them decode",
                    self.backend.info().backend
                ))
                .with_operation("bench")
                .into());
            }
            if counts {
                samples.runs += 1;
                samples.decode.extend(decode.decode_rate());
                if kept {
                    samples.decode_joules.extend(decode.joules_per(case.batch * self.args.decode));
                }
            }
            step();
        }
        Ok(())
    }

    /// Token ids for each sequence. Those that are computed once are the beginning of one row for all cases.
    fn prompts(&mut self, case: &Case) -> Vec<Vec<u32>> {
        let vocab = self.backend.info().limits.vocab_size.max(1) as u64;
        let tokens = |random: &mut SplitMix| -> Vec<u32> {
            (0..case.prompt).map(|_| (random.next() % vocab) as u32).collect()
        };
        (0..case.batch)
            .map(|i| if case.fresh { tokens(&mut self.random) } else { tokens(&mut SplitMix(i as u64)) })
            .collect()
    }

    /// One request for each prompt, all at the same time.
    async fn together(&self, prompts: &[Vec<u32>], max_tokens: usize) -> Outcome<Together> {
        let cancel = self.app.interrupts.current();
        let before = self.energy.and_then(Energy::now);
        let mut running = JoinSet::new();
        for prompt in prompts {
            let mut request = GenerateRequest::new(prompt.clone())
                .with_max_tokens(max_tokens)
                .with_sampling(Sampling::greedy())
                .with_cancel(cancel.clone());
            request.params.ignore_eos = true;
            let backend = Arc::clone(&self.backend);
            running.spawn(async move {
                let begun = Instant::now();
                let done = backend.generate(request).await?.collect().await?;
                Ok::<_, Error>(Request { begun, done })
            });
        }
        let mut requests = Vec::new();
        while let Some(request) = running.join_next().await {
            let request = request.map_err(|e| {
                Error::new(ErrorKind::Backend, "a request was given up")
                    .with_source(e)
                    .with_operation("bench")
            })?;
            requests.push(request?);
        }
        let joules = match (self.energy, before) {
            (Some(energy), Some(before)) => energy.now().and_then(|after| energy.joules(&before, &after)),
            _ => None,
        };
        if self.app.interrupts.is_cancelled() {
            return Err(Failure::Interrupted);
        }
        Ok(Together { requests, joules })
    }
}

impl Samples {
    /// The point; `None` if no run counts.
    pub(super) fn point(&self, threads: usize, case: &Case, decode_tokens: usize) -> Option<Point> {
        (self.runs > 0).then(|| Point {
            threads,
            batch: case.batch,
            prompt_tokens: case.prompt,
            decode_tokens,
            runs: self.runs,
            prefill_tokens_per_second: Spread::of(&self.prefill),
            decode_tokens_per_second: Spread::of(&self.decode),
            first_token_seconds: Spread::of(&self.first_token),
            prefill_joules_per_token: Spread::of(&self.prefill_joules),
            decode_joules_per_token: Spread::of(&self.decode_joules),
            ..Point::default()
        })
    }
}

/// A request that has ended.
struct Request {
    begun: Instant,
    done: Completion,
}

impl Request {
    /// When work on it began, when its prompt was computed, and when it ended.
    fn times(&self) -> [Instant; 3] {
        let timing = &self.done.timing;
        let start = self.begun + timing.queued;
        [start, start + timing.prefill, start + timing.prefill + timing.decode]
    }
}

/// Requests that ran at the same time.
struct Together {
    requests: Vec<Request>,
    joules: Option<f64>,
}

impl Together {
    /// From the first request's time `from` to the last one's time `to`.
    fn between(&self, from: usize, to: usize) -> Option<Duration> {
        let start = self.requests.iter().map(|request| request.times()[from]).min()?;
        let end = self.requests.iter().map(|request| request.times()[to]).max()?;
        Some(end.saturating_duration_since(start)).filter(|time| !time.is_zero())
    }

    fn sum(&self, count: impl Fn(&Completion) -> usize) -> usize {
        self.requests.iter().map(|request| count(&request.done)).sum()
    }

    /// Computed tokens of prompt per second.
    fn prefill_rate(&self) -> Option<f64> {
        let tokens = self
            .sum(|done| done.usage.prompt_tokens - done.usage.cached_tokens.min(done.usage.prompt_tokens));
        rate(tokens, self.between(0, 1)?)
    }

    /// Generated tokens per second, but for the first of each sequence, which comes out of its prompt.
    fn decode_rate(&self) -> Option<f64> {
        rate(self.sum(|done| done.usage.completion_tokens.saturating_sub(1)), self.between(1, 2)?)
    }

    fn first_token(&self) -> Option<f64> {
        self.requests
            .iter()
            .filter_map(|request| request.done.timing.first_token)
            .max()
            .map(|time| time.as_secs_f64())
    }

    /// All of the prompts but their last tokens came out of the KV cache.
    fn keeps_prompts(&self) -> bool {
        self.requests
            .iter()
            .all(|request| request.done.usage.cached_tokens + 1 >= request.done.usage.prompt_tokens)
    }

    fn joules_per(&self, tokens: usize) -> Option<f64> {
        self.joules.map(|joules| joules / tokens.max(1) as f64)
    }
}

fn rate(count: usize, time: Duration) -> Option<f64> {
    (count > 0).then(|| count as f64 / time.as_secs_f64())
}

/// Sebastiano Vigna's SplitMix64: enough to draw token ids, the same in every run.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use ternion::{FinishReason, Timing, Usage};

    use super::*;

    #[test]
    fn the_generator_gives_the_published_sequence() {
        let mut random = SplitMix(1_234_567);
        assert_eq!([random.next(), random.next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }

    /// A request of ten prompt tokens and five generated ones, with times in milliseconds.
    fn request(begun: Instant, cached: usize, [queued, prefill, decode]: [u64; 3]) -> Request {
        let mut usage = Usage::default();
        (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) = (10, cached, 5);
        let mut timing = Timing::default();
        let ms = Duration::from_millis;
        (timing.queued, timing.prefill, timing.decode) = (ms(queued), ms(prefill), ms(decode));
        timing.first_token = Some(ms(queued + prefill));
        let text = serde_json::json!({
            "text": "", "tokens": [], "finish_reason": FinishReason::MaxTokens, "usage": usage, "timing": timing, "seed": null,
        });
        Request { begun, done: serde_json::from_value(text).unwrap() }
    }

    #[test]
    fn speeds_are_those_of_all_sequences_from_the_first_start_to_the_last_end() {
        let begun = Instant::now();
        let later = begun + Duration::from_millis(50);
        let requests = vec![request(begun, 0, [100, 100, 800]), request(later, 2, [100, 250, 800])];
        let both = Together { requests, joules: Some(36.0) };
        // Prompts: 10 and 8 tokens from 100 to 400 ms. Answers: 4 tokens each from 200 to 1200 ms.
        assert_eq!(both.prefill_rate(), Some(60.0));
        assert_eq!(both.decode_rate(), Some(8.0));
        assert_eq!(both.first_token(), Some(0.35));
        assert_eq!(both.joules_per(18), Some(2.0));
        assert!(!both.keeps_prompts());
        assert!(Together { requests: vec![request(begun, 9, [0, 1, 1])], joules: None }.keeps_prompts());
        let nothing = Together { requests: vec![request(begun, 10, [0, 0, 0])], joules: None };
        assert_eq!(
            (nothing.prefill_rate(), nothing.decode_rate(), nothing.joules_per(1)),
            (None, None, None)
        );
    }
}
