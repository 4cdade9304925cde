//! The `ternion` command: chat with, inspect, verify and measure ternary language models.
//!
//! It is a thin host of the `ternion` library: everything that a model does is reached through `LlmBackend`. The answer
//! goes to standard output and all else to standard error, so that it can stand in a pipe.
#![deny(unsafe_code)]
#![cfg_attr(
    not(all(feature = "conformance", feature = "eval", feature = "hub", feature = "serve")),
    allow(dead_code, reason = "some helpers serve only the commands that are left out")
)]

mod args;
mod args_bench;
#[cfg(feature = "conformance")]
mod args_conformance;
mod args_constraint;
#[cfg(feature = "eval")]
mod args_eval;
#[cfg(feature = "serve")]
mod args_serve;
mod commands;
mod failure;
mod input;
mod interrupt;
mod model;
mod output;
#[cfg(feature = "plots")]
mod plot;
mod rss;
#[expect(unsafe_code, reason = "calls of the C library that no crate offers before `main`")]
mod startup;
mod terminal;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::{Parser, error::ContextKind};
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};
use failure::{Failure, Outcome};
use interrupt::Interrupts;
use output::{Output, complain};

/// What every command gets.
struct App {
    output: Output,
    interrupts: Interrupts,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return show(&error),
    };
    log_to_stderr(&cli);
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            complain(&format!("the runtime cannot be started: {e}"));
            return ExitCode::from(4);
        }
    };
    let (result, ended_by) = runtime.block_on(async {
        let app = App { output: Output::new(&cli.output), interrupts: Interrupts::listen() };
        let result = match app.output.can_print(&cli.command) {
            Ok(()) => run(&app, cli.command).await,
            closed => closed,
        };
        (result, app.interrupts.exit_signal())
    });
    // A load that Ctrl-C has left behind is not waited for.
    runtime.shutdown_background();
    let code = finish(result);
    ended_by.map_or(code, |signal| ExitCode::from(signal.exit_code()))
}

/// Reports how a command has ended.
fn finish(result: Outcome) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(message) = failure.message() {
                complain(&message);
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Shows what the parser of the command line has to say: a mistake, or the help or version that was asked for.
fn show(error: &clap::Error) -> ExitCode {
    if error.use_stderr() {
        // A closed standard error is no reason for another exit code.
        let _ = error.print();
        let named = error.get(ContextKind::InvalidSubcommand).map(ToString::to_string);
        if let Some((command, feature)) = left_out().find(|(command, _)| named.as_deref() == Some(*command)) {
            complain(&format!(
                "`{command}` is not in this build; it needs the feature `{feature}`, which is on by default"
            ));
        }
        return ExitCode::from(2);
    }
    let printed = output::open_stdout()
        .and_then(|_| error.print())
        .and_then(|()| std::io::stdout().flush())
        .map_err(Failure::from);
    finish(printed)
}

/// The commands that this build does not have, with their features.
fn left_out() -> impl Iterator<Item = (&'static str, &'static str)> {
    let commands = [
        ("conformance", "conformance", cfg!(feature = "conformance")),
        ("eval", "eval", cfg!(feature = "eval")),
        ("serve", "serve", cfg!(feature = "serve")),
        ("pull", "hub", cfg!(feature = "hub")),
        ("list", "hub", cfg!(feature = "hub")),
        ("rm", "hub", cfg!(feature = "hub")),
    ];
    commands.into_iter().filter_map(|(command, feature, is_here)| (!is_here).then_some((command, feature)))
}

async fn run(app: &App, command: Command) -> Outcome {
    match command {
        Command::Chat(args) => commands::chat::run(app, &args).await,
        Command::Generate(args) => commands::generate::run(app, &args).await,
        Command::Count(args) => commands::count::run(app, &args),
        Command::Chunk(args) => commands::chunk::run(app, &args),
        Command::Inspect(args) => commands::inspect::run(app, &args),
        Command::Verify(args) => commands::verify::run(app, &args).await,
        #[cfg(feature = "conformance")]
        Command::Conformance(args) => commands::conformance::run(app, &args).await,
        Command::Logits(args) => commands::logits::run(app, &args).await,
        Command::Embed(args) => commands::embed::run(app, &args).await,
        Command::Synth(args) => commands::synth::run(app, &args),
        Command::Convert(args) => commands::convert::run(app, &args),
        Command::Bench(args) => commands::bench::run(app, &args).await,
        #[cfg(feature = "eval")]
        Command::Eval(args) => commands::eval::run(app, &args).await,
        #[cfg(feature = "serve")]
        Command::Serve(args) => commands::serve::run(app, &args).await,
        #[cfg(feature = "hub")]
        Command::Pull(args) => commands::hub::pull(app, &args).await,
        #[cfg(feature = "hub")]
        Command::List => commands::hub::list(app),
        #[cfg(feature = "hub")]
        Command::Rm(args) => commands::hub::rm(app, &args),
        Command::Schema => commands::schema::run(app),
    }
}

fn log_to_stderr(cli: &Cli) {
    // ONNX Runtime warns of what files are made like on purpose.
    let level = match (&cli.command, cli.output.verbose) {
        // A server writes its access log and what happens to its models.
        #[cfg(feature = "serve")]
        (Command::Serve(_), 0) if !cli.output.quiet => "warn,ort=error,ternion=info,ternion_server=info",
        (_, 0) => "warn,ort=error",
        (_, 1) => "info",
        (_, 2) => "debug",
        _ => "trace",
    };
    let verbose = cli.output.verbose;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_target(verbose > 1)
        .init();
}
