//! `ternion bench`: how fast a model runs here, beside what this machine's memory allows.
//!
//! Each repetition has a random prompt of its own, so that no kept prefix helps, and goes on past end-of-sequence
//! tokens. The bandwidth is measured in the same run, after the model: on a shared machine it changes by the minute.

use std::time::{Duration, Instant};

use serde::Serialize;
use ternion::formats::Checkpoint;
use ternion::{Error, GenerateRequest, LlmBackend, MemoryPlan, Sampling};

use super::load;
use crate::App;
use crate::args::BenchArgs;
use crate::bandwidth::{self, Bandwidth};
use crate::failure::{Failure, Outcome};
use crate::model::Selected;
use crate::output::bytes;
use crate::rss::{self, Memory};

/// Minimum, median and maximum over the repetitions.
#[derive(Debug, Clone, Copy, Serialize)]
struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { min, median, max })
    }
}

/// All that was measured, in seconds, bytes and tokens per second.
#[derive(Debug, Serialize)]
struct Results {
    model: String,
    backend: String,
    format: String,
    threads: Option<usize>,
    prompt_tokens: usize,
    decode_tokens: usize,
    repeat: u32,
    load_seconds: f64,
    prefill_tokens_per_second: Option<Spread>,
    decode_tokens_per_second: Option<Spread>,
    first_token_seconds: Option<Spread>,
    memory: Option<Memory>,
    /// What was planned before the model was loaded; the peak is below its sum.
    memory_plan: Option<MemoryPlan>,
    /// That sum.
    planned_bytes: Option<u64>,
    /// Weights that are read from the disk in a second of decoding (median), where not all are kept in memory.
    streamed_bytes_per_second: Option<f64>,
    /// Weights that are read for each generated token.
    weight_bytes_per_token: Option<u64>,
    bandwidth: Option<Bandwidth>,
    /// What decoding (median) reads of weights in a second, as a part of the bandwidth of all threads.
    decode_bandwidth_share: Option<f64>,
}

pub(crate) async fn run(app: &App, args: &BenchArgs) -> Outcome {
    if args.prompt == 0 || args.decode == 0 {
        return Err(Failure::usage("--prompt and --decode: at least 1 expected"));
    }
    let selected = Selected::for_engine(&args.engine)?;
    let start = Instant::now();
    let backend = load(app, &selected).await?;
    let load_time = start.elapsed();

    let runs = repeat(app, &*backend, args).await?;
    app.interrupts.idle();
    let memory = rss::memory();

    // The files are mapped once more for this, so it comes after the look at the memory.
    let limit = selected.model()?.memory_limit.map(|limit| limit.0);
    let open = |path| match limit {
        Some(limit) => Checkpoint::open_within(path, limit, &mut |_, _| {}),
        None => Checkpoint::open(path),
    };
    let weight_bytes_per_token =
        selected.path().ok().and_then(|path| open(path).ok()).map(|c| bytes_per_token(&c));
    let info = backend.info();
    drop(backend);
    // Its buffer would not keep a limit.
    let bandwidth = (args.buffer > 0 && limit.is_none())
        .then(|| {
            let bar = app.output.steps("memory");
            bar.set(0, 1);
            let available = std::thread::available_parallelism().map_or(1, usize::from);
            let threads = selected.model().ok().and_then(|m| m.threads).unwrap_or(available).min(available);
            let found =
                tokio::task::block_in_place(|| bandwidth::measure((args.buffer as usize) << 20, threads));
            bar.clear();
            found
        })
        .flatten();

    let decode = Spread::of(runs.iter().filter_map(|run| run.decode).collect());
    let share = match (decode, weight_bytes_per_token, bandwidth) {
        (Some(decode), Some(bytes), Some(bandwidth)) => {
            Some(decode.median * bytes as f64 / bandwidth.all_threads)
        }
        _ => None,
    };
    let plan = info.memory.clone();
    let streamed = plan.as_ref().map(|plan| plan.streamed_bytes as f64).filter(|bytes| *bytes > 0.0);
    let results = Results {
        planned_bytes: plan.as_ref().map(MemoryPlan::total),
        streamed_bytes_per_second: decode.zip(streamed).map(|(decode, bytes)| decode.median * bytes),
        memory_plan: plan,
        model: info.name.clone(),
        backend: info.backend.clone(),
        format: info.format.clone(),
        threads: selected.model()?.threads,
        prompt_tokens: args.prompt,
        decode_tokens: args.decode,
        repeat: args.repeat,
        load_seconds: load_time.as_secs_f64(),
        prefill_tokens_per_second: Spread::of(runs.iter().filter_map(|run| run.prefill).collect()),
        decode_tokens_per_second: decode,
        first_token_seconds: Spread::of(
            runs.iter().filter_map(|run| run.first_token).map(|t| t.as_secs_f64()).collect(),
        ),
        memory,
        weight_bytes_per_token,
        bandwidth,
        decode_bandwidth_share: share,
    };
    if app.output.json { app.output.object(&results) } else { app.output.line(&table(&results)) }
}

/// One repetition.
struct Run {
    prefill: Option<f64>,
    decode: Option<f64>,
    first_token: Option<Duration>,
}

async fn repeat(app: &App, backend: &dyn LlmBackend, args: &BenchArgs) -> Outcome<Vec<Run>> {
    let info = backend.info();
    let vocab = info.limits.vocab_size as u64;
    if vocab == 0 {
        let message = format!("backend `{}` has no vocabulary to draw a prompt from", info.backend);
        return Err(Error::unsupported(message).during("bench").into());
    }
    let bar = app.output.steps("bench");
    let mut runs = Vec::new();
    let mut random = SplitMix(0x7e41_0000);
    for index in 0..args.repeat {
        bar.set(u64::from(index), u64::from(args.repeat));
        let prompt: Vec<u32> = (0..args.prompt).map(|_| (random.next() % vocab) as u32).collect();
        let mut request = GenerateRequest::new(prompt)
            .with_max_tokens(args.decode)
            .with_sampling(Sampling::greedy())
            .with_cancel(app.interrupts.renew());
        request.ignore_eos = true;
        let done = backend.generate(request).await?.collect().await?;
        if app.interrupts.is_cancelled() {
            return Err(Failure::Interrupted);
        }
        runs.push(Run {
            prefill: done.timing.prefill_rate(&done.usage),
            decode: done.timing.decode_rate(&done.usage),
            first_token: done.timing.first_token,
        });
    }
    bar.clear();
    Ok(runs)
}

/// All projections, and the head; of an embedding that is not the head, one row, which is nothing beside them.
fn bytes_per_token(checkpoint: &Checkpoint) -> u64 {
    let linears = checkpoint
        .layers
        .iter()
        .flat_map(ternion::formats::LayerTensors::linears)
        .map(|l| l.bytes().len() as u64);
    linears.sum::<u64>() + checkpoint.head_or_embed().bytes.len() as u64
}

fn table(results: &Results) -> String {
    let mut rows = vec![
        ("model".to_owned(), format!("{} ({}), {}", results.model, results.backend, results.format)),
        ("load".to_owned(), format!("{:.3} s", results.load_seconds)),
    ];
    let mut spread = |name: String, spread: Option<Spread>, digits: usize, unit: &str| {
        if let Some(Spread { min, median, max }) = spread {
            let value = format!(
                "{median:.digits$} {unit} (from {min:.digits$} to {max:.digits$}, {} runs)",
                results.repeat
            );
            rows.push((name, value));
        }
    };
    spread(format!("prefill {}", results.prompt_tokens), results.prefill_tokens_per_second, 1, "tokens/s");
    spread(format!("decode {}", results.decode_tokens), results.decode_tokens_per_second, 1, "tokens/s");
    spread("first token".into(), results.first_token_seconds, 3, "s");
    if let Some(memory) = results.memory {
        rows.push((
            "peak memory".into(),
            format!(
                "{}; now {} of its own and {} of mapped files",
                bytes(memory.peak),
                bytes(memory.anonymous),
                bytes(memory.mapped)
            ),
        ));
    }
    if let Some(plan) = &results.memory_plan {
        let share = results.memory.map_or(String::new(), |memory| {
            format!("; the peak is {:.1} % of it", 100.0 * memory.peak as f64 / plan.total().max(1) as f64)
        });
        rows.push(("memory plan".into(), format!("{}{share}", bytes(plan.total()))));
        rows.push(("planned for".into(), plan.to_string()));
    }
    if let Some(rate) = results.streamed_bytes_per_second {
        rows.push(("disk reads".into(), format!("{:.2} GB/s of weights while decoding", rate / 1e9)));
    }
    if let Some(b) = results.bandwidth {
        rows.push((
            "memory reads".into(),
            format!(
                "{:.1} GB/s with 1 thread, {:.1} GB/s with {}",
                b.one_thread / 1e9,
                b.all_threads / 1e9,
                b.threads
            ),
        ));
    }
    if let (Some(share), Some(count)) = (results.decode_bandwidth_share, results.weight_bytes_per_token) {
        rows.push((
            "decode reads".into(),
            format!("{} of weights a token: {:.0} % of the bandwidth", bytes(count), share * 100.0),
        ));
    }
    rows.iter().map(|(name, value)| format!("{name:14} {value}")).collect::<Vec<_>>().join("\n")
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
    use super::*;

    #[test]
    fn a_spread_is_ordered_and_its_median_is_in_the_middle() {
        let s = Spread::of(vec![3.0, 1.0, 2.0]).unwrap();
        assert_eq!((s.min, s.median, s.max), (1.0, 2.0, 3.0));
        assert_eq!(Spread::of(vec![4.0, 1.0]).unwrap().median, 2.5);
        assert!(Spread::of(Vec::new()).is_none());
    }

    #[test]
    fn the_generator_gives_the_published_sequence() {
        let mut random = SplitMix(1_234_567);
        assert_eq!([random.next(), random.next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }
}
