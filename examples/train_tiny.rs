//! Trains a small BitNet b1.58 with 2B4T's graph from nothing, on text that it makes itself, and writes it as a BF16 master
//! and, by Ternion's own converters, in the formats that engines run. `fixtures/ternion-tiny` was made so.
//!
//! ```console
//! $ cargo run --release -p ternion --example train_tiny -- --out target/ternion-tiny
//! $ cargo run --release -p ternion --example train_tiny -- --out target/ternion-tiny --resume
//! $ cargo run --release -p ternion --example train_tiny -- --quick --out target/quick
//! $ cargo run --release -p ternion --example train_tiny -- --eval-data target/eval
//! ```
//!
//! Ctrl-C saves and stops; `--resume` goes on with the very next step, as if nothing had been.

#[path = "train_tiny/mod.rs"]
mod train_tiny;

use std::env;
use std::error::Error;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use train_tiny::batch::Batches;
use train_tiny::checkpoint::{Plan, State};
use train_tiny::model::Shape;
use train_tiny::train::{self, Run};
use train_tiny::{export, master, questions};

/// Trains a small BitNet b1.58 on text that it makes itself.
#[derive(Parser)]
struct Args {
    /// Folder for the state of the training and for what comes out of it.
    #[arg(long, default_value = "target/ternion-tiny")]
    out: PathBuf,
    /// Goes on with the training in the folder.
    #[arg(long)]
    resume: bool,
    /// Length of the training in steps of 1024 tokens (default: 6000). With --resume: another length, as long as the last
    /// two fifths of either have not begun.
    #[arg(long)]
    steps: Option<usize>,
    /// Stops after so many minutes, as Ctrl-C does.
    #[arg(long)]
    minutes: Option<f64>,
    /// Of the text and of the first weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A model of one layer in a few steps, to see that all works.
    #[arg(long)]
    quick: bool,
    /// Only writes held-out questions in the files of GSM8K and MMLU to this folder.
    #[arg(long, value_name = "FOLDER")]
    eval_data: Option<PathBuf>,
}

impl Args {
    fn plan(&self, vocab: usize) -> Plan {
        let layers = if self.quick { 1 } else { 5 };
        let shape = Shape { hidden: 256, intermediate: 512, layers, heads: 8, kv_heads: 4, vocab };
        let (steps, length) = if self.quick { (20, 128) } else { (6000, 512) };
        let steps = self.steps.unwrap_or(steps);
        // The few steps of a quick run do not get beyond the warm-up.
        let rate = if self.quick { 2e-2 } else { 2e-3 };
        Plan { shape, seed: self.seed, steps, rows: 2, length, rate }
    }
}

/// By this candle knows with how many threads to share an operation.
const THREADS: &str = "RAYON_NUM_THREADS";

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    if env::var_os(THREADS).is_none() {
        // One for each operation, as rows are computed side by side: candle's own threads wait for each other by spinning. It
        // reads the variable when it starts, so this program starts again.
        let mut command = Command::new(env::current_exe()?);
        command.args(env::args_os().skip(1)).env(THREADS, "1");
        // For glibc, to keep the memory of one step for the next: else a quarter of the time goes into clearing pages.
        command.env("MALLOC_MMAP_THRESHOLD_", "2000000000").env("MALLOC_TRIM_THRESHOLD_", "4000000000");
        return Err(restart(command));
    }
    tokio::runtime::Runtime::new()?.block_on(run(args))
}

/// Comes back only where it fails.
#[cfg(unix)]
fn restart(mut command: Command) -> Box<dyn Error> {
    std::os::unix::process::CommandExt::exec(&mut command).into()
}

#[cfg(not(unix))]
fn restart(mut command: Command) -> Box<dyn Error> {
    match command.status() {
        Ok(status) => std::process::exit(status.code().unwrap_or(1)),
        Err(error) => error.into(),
    }
}

async fn run(args: Args) -> Result<(), Box<dyn Error>> {
    if let Some(folder) = &args.eval_data {
        questions::write(folder)?;
        println!("held-out questions: {}", folder.display());
        return Ok(());
    }
    let folder = args.out.join("master");
    let (mut state, tokenizer) = if args.resume {
        (State::load(&train::state_file(&args.out))?, master::open_tokenizer(&folder)?)
    } else {
        let tokenizer = master::tokenizer(&folder, 1280, args.seed, if args.quick { 1000 } else { 20_000 })?;
        (State::new(args.plan(tokenizer.vocab_size()))?, tokenizer)
    };
    if let Some(steps) = args.steps {
        state.plan = state.lengthened(steps)?;
    }
    let plan = state.plan;
    let batches =
        Batches { tokenizer: Arc::new(tokenizer), seed: plan.seed, rows: plan.rows, length: plan.length };
    let run = Run {
        out: args.out.clone(),
        report: 20,
        evaluate: if args.quick { 0 } else { 500 },
        limit: args.minutes.map(|minutes| Duration::from_secs_f64(60.0 * minutes)),
        stop: stop_on_ctrl_c(),
    };
    println!(
        "{} parameters, {} steps of {} tokens",
        state.model.count(),
        plan.steps,
        plan.rows * plan.length
    );
    if !train::run(&mut state, &batches, &run).await? {
        return Ok(());
    }
    println!(
        "trained for {:.0} minutes; accuracy on held-out items, with 95 % intervals:",
        state.seconds / 60.0
    );
    train::report(&state, &batches, &args.out, if args.quick { 4 } else { 200 }).await?;
    export::export(&args.out)?;
    let difference = export::compare(&state, &batches, &args.out.join("packed")).await?;
    println!(
        "training and inference: {:.1} % of the tokens within 1e-3, at most {:.3} apart",
        100.0 * difference.close,
        difference.largest
    );
    Ok(())
}

/// Is set by the first Ctrl-C; the second ends the process.
fn stop_on_ctrl_c() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            if flag.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        }
    });
    stop
}
