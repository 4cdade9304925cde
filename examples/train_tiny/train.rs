//! The training loop.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::batch::{Batches, Row};
use super::checkpoint::State;
use super::model::Quantised;
use super::ops::{CrossEntropy, token_loss, with_floats};
use super::optimizer::schedule;
use super::text::Role;
use super::{evaluate, master};

/// Between two saves.
const SAVE: Duration = Duration::from_secs(120);

/// When a run of the program ends, and what it tells on the way.
pub(crate) struct Run {
    pub(crate) out: PathBuf,
    /// Steps between two lines of report.
    pub(crate) report: usize,
    /// Steps between two measurements of accuracy; 0 for none.
    pub(crate) evaluate: usize,
    /// Ends before the plan does.
    pub(crate) limit: Option<Duration>,
    pub(crate) stop: Arc<AtomicBool>,
}

/// The file of a training in its folder.
pub(crate) fn state_file(out: &Path) -> PathBuf {
    out.join("training.safetensors")
}

/// Threads that compute one row each. Rows are larger pieces of work than candle makes of a matrix product, so that a core
/// that others use too holds up the rest only once in a step.
pub(crate) struct Workers(Vec<rayon::ThreadPool>);

impl Workers {
    /// At most as many as there are rows.
    pub(crate) fn new(rows: usize) -> Result<Self, Box<dyn Error>> {
        let count = std::thread::available_parallelism().map_or(1, usize::from).min(rows);
        let pool = |_| rayon::ThreadPoolBuilder::new().num_threads(1).build();
        Ok(Self((0..count).map(pool).collect::<Result<_, _>>()?))
    }
}

/// What a model foresees badly: sums of cross entropies and numbers of tokens, by role, and the weighted mean of all.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Losses {
    pub(crate) mean: f32,
    roles: [(f32, usize); 4],
}

impl Losses {
    /// Adds those of another part of the batch, or of another batch.
    fn add(&mut self, other: &Self) {
        self.mean += other.mean;
        for (ours, theirs) in self.roles.iter_mut().zip(other.roles) {
            *ours = (ours.0 + theirs.0, ours.1 + theirs.1);
        }
    }
}

impl fmt::Display for Losses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = Role::NAMES.iter().zip(self.roles);
        let parts = parts.map(|(name, (sum, count))| format!("{name} {:.3}", sum / count.max(1) as f32));
        f.write_str(&parts.collect::<Vec<_>>().join(", "))
    }
}

/// The losses of a row, their mean being its part of the batch's, and the gradients.
type Outcome = candle_core::Result<(Losses, Vec<Vec<f32>>)>;

fn row_gradients(weights: &Quantised, row: Row, total: f32) -> Outcome {
    let logits = weights.forward(&row.tokens, &row.places)?;
    let mut losses = Losses::default();
    with_floats(&logits, |floats| {
        let tokens = floats.chunks_exact(floats.len() / row.tokens.len()).zip(&row.targets).zip(&row.roles);
        for ((logits, target), role) in tokens {
            if let Some(role) = role {
                let (sum, count) = &mut losses.roles[role.index()];
                (*sum, *count) = (*sum + token_loss(logits, *target), *count + 1);
            }
        }
    })?;
    let weights_of_tokens = row.weights();
    let loss = logits.apply_op1(CrossEntropy { targets: row.targets, weights: weights_of_tokens, total })?;
    let gradients = loss.backward()?;
    let gradients = weights.weights.iter().map(|weight| match gradients.get(weight) {
        Some(gradient) => gradient.flatten_all()?.to_vec1::<f32>(),
        None => candle_core::bail!("a parameter has no gradient"),
    });
    losses.mean = loss.to_scalar()?;
    Ok((losses, gradients.collect::<candle_core::Result<_>>()?))
}

/// One step: the losses before it.
pub(crate) fn step(
    state: &mut State,
    batches: &Batches,
    workers: &Workers,
) -> Result<Losses, Box<dyn Error>> {
    let rows = batches.get(state.step)?;
    let total = rows.iter().flat_map(Row::weights).sum();
    let weights = state.model.quantised()?;
    let queue = Mutex::new(rows.into_iter().enumerate());
    let outcomes = Mutex::new(BTreeMap::new());
    let work = || {
        loop {
            let Some((index, row)) = queue.lock().unwrap_or_else(PoisonError::into_inner).next() else {
                return;
            };
            let outcome = row_gradients(&weights, row, total);
            outcomes.lock().unwrap_or_else(PoisonError::into_inner).insert(index, outcome);
        }
    };
    std::thread::scope(|scope| {
        for pool in &workers.0 {
            scope.spawn(|| pool.install(work));
        }
    });
    // In the order of the rows, whoever was first: the same sums on any number of threads.
    let mut sum: Option<(Losses, Vec<Vec<f32>>)> = None;
    for outcome in outcomes.into_inner().unwrap_or_else(PoisonError::into_inner).into_values() {
        let (losses, gradients) = outcome?;
        match &mut sum {
            None => sum = Some((losses, gradients)),
            Some((total, sums)) => {
                total.add(&losses);
                for (sums, gradients) in sums.iter_mut().zip(gradients) {
                    sums.iter_mut().zip(gradients).for_each(|(sum, x)| *sum += x);
                }
            }
        }
    }
    let (losses, gradients) = sum.ok_or("a batch has no rows")?;
    if !losses.mean.is_finite() {
        return Err(format!("the loss of step {} is {}", state.step, losses.mean).into());
    }
    let schedule = schedule(state.step, state.plan.steps, state.plan.rate);
    state.optimizer.step(&state.model, &gradients, state.step, schedule)?;
    state.step += 1;
    Ok(losses)
}

/// Trains until the plan, the time or the user's patience ends; the state is on the disk then. Tells whether the plan
/// was done.
pub(crate) async fn run(state: &mut State, batches: &Batches, run: &Run) -> Result<bool, Box<dyn Error>> {
    let (began, before, first) = (Instant::now(), state.seconds, state.step);
    let workers = Workers::new(state.plan.rows)?;
    let mut saved = Instant::now();
    let mut losses = (Losses::default(), 0);
    // What it takes to measure is not training.
    let mut measuring = Duration::ZERO;
    while state.step < state.plan.steps {
        losses.0.add(&step(state, batches, &workers)?);
        losses.1 += 1;
        let elapsed = began.elapsed();
        state.seconds = before + elapsed.as_secs_f64();
        let done = state.step == state.plan.steps;
        if state.step.is_multiple_of(run.report) || done {
            let seconds = elapsed.saturating_sub(measuring).as_secs_f64();
            let steps = (state.step - first) as f64;
            let tokens = steps * (state.plan.rows * state.plan.length) as f64;
            let left = (state.plan.steps - state.step) as f64 * seconds / steps;
            println!(
                "step {}/{}  loss {:.4} ({})  {:.0} tokens/s  {} left",
                state.step,
                state.plan.steps,
                losses.0.mean / losses.1 as f32,
                losses.0,
                tokens / seconds,
                minutes(left)
            );
            losses = (Losses::default(), 0);
        }
        if run.evaluate > 0 && state.step.is_multiple_of(run.evaluate) && !done {
            let start = Instant::now();
            report(state, batches, &run.out, 40).await?;
            measuring += start.elapsed();
        }
        let stop = run.stop.load(Ordering::Relaxed) || run.limit.is_some_and(|limit| elapsed >= limit);
        if done || stop || saved.elapsed() >= SAVE {
            state.save(&state_file(&run.out))?;
            saved = Instant::now();
        }
        if stop && !done {
            println!("stopped at step {}; --resume goes on", state.step);
            return Ok(false);
        }
    }
    Ok(true)
}

/// Writes the master and prints its accuracy on `count` held-out items of each kind.
pub(crate) async fn report(
    state: &State,
    batches: &Batches,
    out: &Path,
    count: usize,
) -> Result<(), Box<dyn Error>> {
    let folder = out.join("master");
    master::write(&folder, &state.model, &batches.tokenizer)?;
    for (kind, accuracy) in evaluate::held_out(&folder, count).await? {
        println!("  {kind:18} {accuracy}");
    }
    Ok(())
}

fn minutes(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    format!("{}:{:02} min", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::super::checkpoint::Plan;
    use super::super::export;
    use super::super::model::Shape;
    use super::*;

    const STEPS: usize = 24;

    fn plan(vocab: usize) -> Plan {
        let shape = Shape { hidden: 64, intermediate: 128, layers: 1, heads: 2, kv_heads: 1, vocab };
        Plan { shape, seed: 5, steps: STEPS, rows: 3, length: 96, rate: 5e-2 }
    }

    fn begin(out: &Path) -> (State, Batches) {
        let tokenizer = master::tokenizer(&out.join("master"), 400, 5, 50).unwrap();
        let plan = plan(tokenizer.vocab_size());
        let batches =
            Batches { tokenizer: Arc::new(tokenizer), seed: plan.seed, rows: plan.rows, length: plan.length };
        (State::new(plan).unwrap(), batches)
    }

    fn run_of(out: &Path, limit: Option<Duration>) -> Run {
        Run { out: out.to_owned(), report: 5, evaluate: 0, limit, stop: Arc::default() }
    }

    fn bits(state: &State) -> Vec<Vec<u32>> {
        let values = |p: &super::super::model::Parameter| {
            with_floats(&p.value, |x| x.iter().map(|x| x.to_bits()).collect()).unwrap()
        };
        state.model.parameters.iter().map(values).collect()
    }

    #[tokio::test]
    async fn the_loss_falls_and_a_stop_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (mut state, batches) = begin(folder.path());
        let workers = Workers::new(1).unwrap();
        let losses: Vec<f32> =
            (0..STEPS).map(|_| step(&mut state, &batches, &workers).unwrap().mean).collect();
        assert!(losses[STEPS - 1] < 0.8 * losses[0], "{losses:?}");

        let (mut stopped, batches) = begin(folder.path());
        let mut steps = 0;
        // Each run ends after a step: by the time, then by the flag.
        while stopped.step < STEPS {
            let mut run_of = run_of(folder.path(), (steps % 2 == 0).then_some(Duration::ZERO));
            run_of.stop = Arc::new(AtomicBool::new(steps % 2 == 1));
            assert_eq!(run(&mut stopped, &batches, &run_of).await.unwrap(), stopped.step == STEPS);
            stopped = State::load(&state_file(folder.path())).unwrap();
            steps += 1;
            assert_eq!(stopped.step, steps);
        }
        assert!(bits(&state) == bits(&stopped), "with another number of threads and in a run for each step");
    }

    #[tokio::test]
    async fn inference_computes_what_was_trained() {
        let folder = tempfile::tempdir().unwrap();
        let (mut state, batches) = begin(folder.path());
        assert!(run(&mut state, &batches, &run_of(folder.path(), None)).await.unwrap());
        let master = folder.path().join("master");
        master::write(&master, &state.model, &batches.tokenizer).unwrap();
        let difference = export::compare(&state, &batches, &master).await.unwrap();
        // Elsewhere an activation lay near a rounding tie.
        assert!(difference.close > 0.9 && difference.largest < 0.5, "{difference:?}");
    }

    #[test]
    fn a_damaged_state_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = state_file(folder.path());
        assert!(State::load(&path).err().unwrap().to_string().contains("training.safetensors"));
        std::fs::write(&path, b"nothing").unwrap();
        assert!(State::load(&path).is_err());
    }
}
