//! Trains a small BitNet b1.58 with 2B4T's graph from nothing, on text that it makes itself, and writes the BF16 master.
//!
//! ```console
//! $ cargo run --release -p ternion --example train_tiny -- --out target/ternion-tiny
//! $ cargo run --release -p ternion --example train_tiny -- --out target/ternion-tiny --resume
//! ```

#[path = "train_tiny/mod.rs"]
mod train_tiny;

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use train_tiny::batch::Batches;
use train_tiny::checkpoint::{Plan, State};
use train_tiny::model::Shape;
use train_tiny::train::{self, Run};
use train_tiny::{master, text, tokenizer};

#[derive(Parser)]
struct Args {
    /// Folder for the state of the training and for what comes out of it.
    #[arg(long, default_value = "target/ternion-tiny")]
    out: PathBuf,
    /// Goes on with the training in the folder.
    #[arg(long)]
    resume: bool,
    /// Length of the training.
    #[arg(long, default_value_t = 6000)]
    steps: usize,
    /// Stops after so many minutes, as Ctrl-C does.
    #[arg(long)]
    minutes: Option<f64>,
    /// Of the text and of the first weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Layers.
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Rows of a batch.
    #[arg(long, default_value_t = 4)]
    rows: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 2e-3)]
    rate: f64,
    /// Prints sample documents.
    #[arg(long)]
    show: Option<usize>,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    if let Some(count) = args.show {
        let mut random = text::Random::new(args.seed, 0);
        for i in 0..count {
            println!("{:?}", text::document(&mut random, i % 4 == 0));
        }
        return Ok(());
    }
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            if flag.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        }
    });
    let folder = args.out.join("master");
    let (mut state, tokenizer) = if args.resume {
        (State::load(&train::state_file(&args.out))?, master::open_tokenizer(&folder)?)
    } else {
        let tokenizer = master::tokenizer(&folder, 1280, args.seed)?;
        let shape = Shape { hidden: 256, intermediate: 768, layers: args.layers, heads: 4, kv_heads: 2, vocab: tokenizer.vocab_size() };
        let plan = Plan { shape, seed: args.seed, steps: args.steps, rows: args.rows, length: 512, rate: args.rate };
        (State::new(plan)?, tokenizer)
    };
    let plan = state.plan;
    println!("{plan:?}");
    let batches = Batches { tokenizer: Arc::new(tokenizer), seed: plan.seed, rows: plan.rows, length: plan.length };
    let run = Run {
        out: args.out.clone(),
        report: 20,
        evaluate: 500,
        limit: args.minutes.map(|m| Duration::from_secs_f64(60.0 * m)),
        stop,
    };
    if train::run(&mut state, &batches, &run).await? {
        train::report(&state, &batches, &args.out, 200).await?;
    }
    Ok(())
}
