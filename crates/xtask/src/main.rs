//! The project's own tasks, run as `cargo xtask <task>`.
//!
//! What contributors call and what the CI calls is the same, written once, in the language of the project so that it
//! works alike on Linux, macOS and Windows. Standard library only: a fresh clone compiles this in about a second.
#![forbid(unsafe_code)]

mod licenses;
mod lint;
mod native;
mod onnxruntime;
mod setup;
mod shell;
mod test;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <task>

  setup           check for what the tests and lints need besides cargo, install what is missing as far as
                  that is possible, and say what is left out
  test [ARGS..]   setup, then every test of the workspace, documentation included
                  ARGS go to `cargo test`: `cargo xtask test -p ternion-core -- text::`
  python [ARGS..] setup, then the tests of the Python package alone; ARGS go to `cargo test`
  wheel           the Python package as a release wheel for this machine, in target/wheels
  lint            formatting, clippy, documentation, licences and advisories, sizes of files
  ci              lint, then test";

/// Exit status for a task that does not exist or is given what it does not take.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    // `std::env::args` would panic on an argument that is not UTF-8.
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["setup"] => setup::run(setup::Scope::Lint).map(drop),
        ["test", ..] => {
            setup::run(setup::Scope::Test).and_then(|machine| test::run(machine, &arguments[1..]))
        }
        ["python", ..] => setup::run(setup::Scope::Test).and_then(|machine| {
            let only = ["--test", "python_package"].map(str::to_owned);
            test::run(machine, &[&only[..], &arguments[1..]].concat())
        }),
        ["wheel"] => setup::run(setup::Scope::Wheel).and_then(|_| wheel()),
        ["lint"] => lint::run(),
        ["ci"] => lint::run()
            .and_then(|()| setup::run(setup::Scope::Test))
            .and_then(|machine| test::run(machine, &[])),
        ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            Ok(())
        }
        [] => return usage_error("no task given"),
        [task @ ("setup" | "wheel" | "lint" | "ci"), ..] => {
            return usage_error(&format!("`{task}` takes no arguments"));
        }
        [task, ..] => return usage_error(&format!("there is no task `{task}`")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: error: {message}");
            ExitCode::FAILURE
        }
    }
}

/// The package as it is published, with the licences of all that is in it. It is compiled for itself: other features are selected for
/// it than for the workspace.
fn wheel() -> Result<(), String> {
    licenses::write()?;
    // A folder that is empty before, so that what is in it afterwards is the wheel.
    let fresh = shell::root().join("target/wheels/new");
    let failed = |error: std::io::Error| format!("cannot use {}: {error}", fresh.display());
    if fresh.exists() {
        std::fs::remove_dir_all(&fresh).map_err(failed)?;
    }
    let words = ["maturin", "build", "--release", "--locked", "--manifest-path=crates/python/Cargo.toml"];
    shell::run(&[&words[..], &["--out=target/wheels/new"]].concat(), &[])?;
    for entry in std::fs::read_dir(&fresh).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        licenses::check(&entry.path())?;
        std::fs::rename(entry.path(), shell::root().join("target/wheels").join(entry.file_name()))
            .map_err(failed)?;
    }
    std::fs::remove_dir(&fresh).map_err(failed)
}

fn usage_error(message: &str) -> ExitCode {
    eprintln!("xtask: error: {message}\n\n{USAGE}");
    ExitCode::from(EXIT_USAGE)
}
