//! The training loop.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::batch::Batches;
use super::checkpoint::State;
use super::ops::CrossEntropy;
use super::optimizer::schedule;
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

/// One step: the loss before it.
pub(crate) fn step(state: &mut State, batches: &Batches) -> Result<f32, Box<dyn Error>> {
    let batch = batches.get(state.step)?;
    let logits = state.model.forward(&batch.tokens, &batch.places)?;
    let loss = logits.apply_op1(CrossEntropy { targets: batch.targets, weights: batch.weights })?;
    let value = loss.to_scalar::<f32>()?;
    if !value.is_finite() {
        return Err(format!("the loss of step {} is {value}", state.step).into());
    }
    let gradients = loss.backward()?;
    let schedule = schedule(state.step, state.plan.steps, state.plan.rate);
    state.optimizer.step(&state.model, &gradients, state.step, schedule)?;
    state.step += 1;
    Ok(value)
}

/// Trains until the plan, the time or the user's patience ends; the state is on the disk then. Tells whether the plan
/// was done.
pub(crate) async fn run(state: &mut State, batches: &Batches, run: &Run) -> Result<bool, Box<dyn Error>> {
    let (began, before, first) = (Instant::now(), state.seconds, state.step);
    let mut saved = Instant::now();
    let mut losses = (0.0, 0);
    // What it takes to measure is not training.
    let mut measuring = Duration::ZERO;
    while state.step < state.plan.steps {
        losses = (losses.0 + step(state, batches)?, losses.1 + 1);
        let elapsed = began.elapsed();
        state.seconds = before + elapsed.as_secs_f64();
        let done = state.step == state.plan.steps;
        if state.step % run.report == 0 || done {
            let seconds = (elapsed - measuring).as_secs_f64();
            let steps = (state.step - first) as f64;
            let tokens = steps * (state.plan.rows * state.plan.length) as f64;
            let left = (state.plan.steps - state.step) as f64 * seconds / steps;
            println!(
                "step {}/{}  loss {:.4}  {:.0} tokens/s  {} left",
                state.step,
                state.plan.steps,
                losses.0 / losses.1 as f32,
                tokens / seconds,
                minutes(left)
            );
            losses = (0.0, 0);
        }
        if run.evaluate > 0 && state.step % run.evaluate == 0 && !done {
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
