//! `ternion bench`: how fast a model runs here, beside what this machine's memory allows.
//!
//! The bandwidth is measured in the same run, around the passes of the model and with as many threads: on a shared machine
//! it changes by the minute.

mod bandwidth;
mod cases;
mod compare;
mod energy;
mod machine;
#[cfg(feature = "plots")]
mod picture;
mod reads;
mod report;
mod result;
mod run;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use ternion::config::LayersConfig;
use ternion::{Error, MemoryPlan, ModelInfo};
use ternion_kernels::default_threads;

use self::bandwidth::Bandwidth;
use self::energy::Energy;
use self::machine::Machine;
use self::reads::Reads;
use self::result::{Load, Model, Results};
use self::run::{Bench, Samples};
use super::load;
use crate::App;
use crate::args_bench::BenchArgs;
use crate::failure::{Failure, Outcome};
use crate::input::write_atomically;
use crate::model::Selected;
use crate::rss;

pub(crate) async fn run(app: &App, args: &BenchArgs) -> Outcome {
    if let Some([old, new]) = args.compare.as_deref() {
        return compare::run(app, old, new);
    }
    if args.plot.is_some() && !cfg!(feature = "plots") {
        return Err(Failure::usage("--plot needs a build with the feature `plots`: add `--features plots`"));
    }
    for (option, path) in [("--save", &args.save), ("--plot", &args.plot)] {
        if let Some(path) = path {
            can_be_written(option, path)?;
        }
    }
    let mut selected = Selected::for_engine(app, &args.engine())?;
    let model = selected.model_mut()?;
    // What is measured is the model: not what goes around it, nor another that stands in for it.
    model.layers = LayersConfig::default();
    model.fallback.clear();
    if args.most_sequences() > 1 {
        let set = model.max_sequences.unwrap_or_default();
        model.max_sequences = Some(set.max(args.most_sequences()));
    }

    let machine = Machine::here();
    if let Some(warning) = machine.warning() {
        app.output.notice(&warning);
    }
    let mut results = Results::new(machine, args.repeat, args.warm_up);
    match measure(app, args, &mut selected, &mut results).await {
        Err(Failure::Interrupted) if !results.points.is_empty() => {
            results.interrupted = true;
            app.output.notice("interrupted; this is what was measured before:");
        }
        other => other?,
    }
    app.interrupts.idle();
    // The files are mapped once more for this, so it comes after the looks at the memory.
    let reads = tokio::task::block_in_place(|| reads(&selected, results.memory_plan.as_ref()));
    results.relate_to_limits(reads);

    if app.output.json {
        app.output.object(&results)?;
    } else {
        app.output.line(&report::text(&results))?;
    }
    if let Some(path) = &args.save {
        let text = serde_json::to_string_pretty(&results).map_err(std::io::Error::from)?;
        write_atomically(&app.interrupts, path, |temporary| std::fs::write(temporary, text + "\n"))?;
    }
    #[cfg(feature = "plots")]
    if let Some(path) = &args.plot {
        match picture::svg(&results) {
            Some(svg) => write_atomically(&app.interrupts, path, |temporary| std::fs::write(temporary, svg))?,
            None => app.output.notice(&format!("{}: not written: there is no speed to draw", path.display())),
        }
    }
    if results.interrupted { Err(Failure::Interrupted) } else { Ok(()) }
}

/// Measures all cases with each number of threads.
async fn measure(app: &App, args: &BenchArgs, selected: &mut Selected, results: &mut Results) -> Outcome {
    let cores = results.machine.cores_available;
    let threads =
        cases::thread_counts(args, selected.model()?.threads.unwrap_or_else(default_threads), cores);
    let energy = Energy::open(Path::new(energy::ROOT));
    // What is read for the bandwidth is no memory that the model takes. Where the peak cannot be forgotten, it is read only
    // at the end.
    let mut peak_is_its_own = true;
    for (i, &count) in threads.iter().enumerate() {
        selected.model_mut()?.threads = Some(count);
        let start = Instant::now();
        let backend = load(app, selected).await?;
        // One token for all passes and what lies between them, so that no interruption is lost.
        app.interrupts.renew();
        let seconds = start.elapsed().as_secs_f64();
        let info = backend.info();
        if results.loads.is_empty() {
            describe(results, &info);
        }
        results.loads.push(Load { threads: count, seconds, bandwidth_bytes_per_second: None });
        // Its memory would not keep a limit.
        let measured = args.buffer > 0 && selected.model()?.memory_limit.is_none();
        let mut bandwidth = measured
            .then(|| Bandwidth::new(selected.path().ok(), (args.buffer as usize) << 20, count))
            .flatten();
        if peak_is_its_own {
            results.memory = results.memory.max(rss::memory());
        }
        let between = rss::forget_peak();

        let gone = backend.unloaded();
        let last = i + 1 == threads.len();
        let ended = {
            let mut bench = Bench::new(app, args, backend, energy.as_ref(), count);
            let between = bandwidth.as_mut().filter(|_| between);
            let ended = measure_cases(&mut bench, &info, last, between, results).await;
            if peak_is_its_own {
                results.memory = results.memory.max(rss::memory());
            }
            ended
        };
        // What was measured needs its limit, an interruption or not.
        if matches!(ended, Ok(()) | Err(Failure::Interrupted)) {
            gone.await;
            if let (Some(bandwidth), Some(load)) = (&mut bandwidth, results.loads.last_mut()) {
                tokio::task::block_in_place(|| bandwidth.measure());
                peak_is_its_own &= rss::forget_peak();
                load.bandwidth_bytes_per_second = bandwidth.best();
            }
        }
        ended?;
        // It came while nothing looked at it.
        if app.interrupts.is_cancelled() {
            return Err(Failure::Interrupted);
        }
    }
    Ok(())
}

async fn measure_cases(
    bench: &mut Bench<'_>,
    info: &Arc<ModelInfo>,
    last: bool,
    mut bandwidth: Option<&mut Bandwidth>,
    results: &mut Results,
) -> Outcome {
    if info.limits.vocab_size == 0 {
        let message = format!("backend `{}` has no vocabulary to draw a prompt from", info.backend);
        return Err(Error::unsupported(message).with_operation("bench").into());
    }
    let cases = cases::cases(bench.args, &info.limits, &info.backend, last)?;
    let bar = bench.app.output.steps("bench");
    let total = cases.len() as u64 * u64::from(bench.args.warm_up + bench.args.repeat);
    let mut done = 0;
    bar.set(done, total);
    for case in &cases {
        if let Some(bandwidth) = &mut bandwidth {
            results.memory = results.memory.max(rss::memory());
            tokio::task::block_in_place(|| bandwidth.measure());
            rss::forget_peak();
            if bench.app.interrupts.is_cancelled() {
                bar.clear();
                return Err(Failure::Interrupted);
            }
        }
        let mut samples = Samples::default();
        let step = || {
            done += 1;
            bar.set(done, total);
        };
        let ended = bench.measure(case, &mut samples, step).await;
        if let Some(point) = samples.point(bench.threads, case, bench.args.decode) {
            bench.app.output.progress(&report::progress(&point));
            results.points.push(point);
        }
        if ended.is_err() {
            bar.clear();
        }
        ended?;
    }
    bar.clear();
    Ok(())
}

fn describe(results: &mut Results, info: &ModelInfo) {
    results.model = Model {
        name: info.name.clone(),
        backend: info.backend.clone(),
        format: info.format.clone(),
        parameters: info.parameters,
    };
    results.planned_bytes = info.memory.as_ref().map(MemoryPlan::total);
    results.memory_plan.clone_from(&info.memory);
}

/// What the checkpoint says is read for each token; `None` where only the engine can read it.
fn reads(selected: &Selected, plan: Option<&MemoryPlan>) -> Option<Reads> {
    let config = selected.model().ok()?;
    let path = selected.path().ok()?;
    let facts = selected.facts().ok()?;
    let checkpoint = match config.memory_limit {
        Some(limit) => facts.open_within(path, limit.0, &mut |_, _| {}),
        None => facts.open(path, &mut |_, _| {}),
    };
    Some(Reads::of(&checkpoint.ok()?, config, plan))
}

/// Says before the measurement what would make it be in vain.
fn can_be_written(option: &str, path: &Path) -> Outcome {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        return Err(Failure::usage(format!(
            "{option} {}: there is no folder {}",
            path.display(),
            folder.display()
        )));
    }
    if path.is_dir() {
        return Err(Failure::usage(format!("{option} {}: is a folder; a file expected", path.display())));
    }
    Ok(())
}
