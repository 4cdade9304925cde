//! `cargo xtask test`: every test of the workspace, and one summary under the pages that `cargo test` prints.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;
use std::time::Instant;

use crate::setup::Machine;
use crate::{onnxruntime, shell};

/// How a test begins the line that says why it checks nothing here, such as a native library that is missing. It is printed past the
/// test harness, which would keep it to itself and count the test as passed.
const SKIPPED: &str = "skipped: ";

/// Runs `cargo test` with `extra` arguments and prints how many tests passed, failed, were ignored and were skipped.
///
/// # Errors
/// When `cargo test` cannot be started or does not succeed, be it by a failed test or by code that does not compile.
pub(crate) fn run(machine: Machine, extra: &[String]) -> Result<(), String> {
    let words = cargo_words(machine, extra);
    let line = words.join(" ");
    eprintln!("xtask: {line}");
    let started = Instant::now();
    let mut child = shell::command(&words)
        .envs(onnxruntime::environment())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start `{line}`: {error}"))?;
    let mut tally = Tally::default();
    let copied = child.stdout.take().map_or(Ok(()), |output| tally.follow(output, std::io::stdout().lock()));
    let status = child.wait().map_err(|error| format!("lost `{line}`: {error}"))?;
    copied.map_err(|error| format!("cannot pass on the output of `{line}`: {error}"))?;

    if tally.suites > 0 {
        eprintln!("\n{tally}, {:.1} s", started.elapsed().as_secs_f64());
    }
    if status.success() { Ok(()) } else { Err(format!("`{line}` failed ({status})")) }
}

/// The `cargo test` command. All packages and all features that can be built, unless `extra` chooses among them; failures do not
/// keep the other suites from running.
fn cargo_words(machine: Machine, extra: &[String]) -> Vec<String> {
    let for_cargo = || extra.iter().take_while(|argument| *argument != "--");
    let chosen =
        |flags: &[&str]| for_cargo().any(|argument| flags.iter().any(|flag| is_flag(argument, flag)));

    let mut words = vec!["cargo", "test"];
    let all_packages = !chosen(&["--package", "-p", "--workspace"]);
    let all_features = !chosen(&["--features", "-F", "--no-default-features", "--all-features"]);
    match (all_packages, all_features) {
        (true, true) => words.extend(machine.selection()),
        (true, false) => words.push("--workspace"),
        // Of one package, all that the machine can build is not known here.
        (false, true) => words.push("--all-features"),
        (false, false) => {}
    }
    if !chosen(&["--no-fail-fast"]) {
        words.push("--no-fail-fast");
    }
    words.into_iter().chain(extra.iter().map(String::as_str)).map(str::to_owned).collect()
}

/// Whether `argument` is `flag`, alone or with its value attached: `--package=x`, `-px`.
fn is_flag(argument: &str, flag: &str) -> bool {
    argument
        .strip_prefix(flag)
        .is_some_and(|rest| rest.is_empty() || !flag.starts_with("--") || rest.starts_with('='))
}

/// What the suites reported, added up.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    suites: u32,
    passed: u32,
    failed: u32,
    ignored: u32,
    /// Tests that checked nothing, which the harness counts as passed, and why.
    skipped: Vec<String>,
    /// Names of the failed tests, as the harness printed them.
    failures: Vec<String>,
}

impl Tally {
    /// Copies `input` to `output` line by line, as it comes, and counts what it reports.
    fn follow(&mut self, input: impl Read, mut output: impl Write) -> std::io::Result<()> {
        let mut input = BufReader::new(input);
        let mut line = Vec::new();
        while input.read_until(b'\n', &mut line)? > 0 {
            output.write_all(&line)?;
            output.flush()?;
            self.count(String::from_utf8_lossy(&line).trim_end());
            line.clear();
        }
        Ok(())
    }

    /// Takes in one line of libtest's output, or of a harness that prints the same.
    fn count(&mut self, line: &str) {
        if let Some(name) = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED")) {
            self.failures.push(name.to_owned());
        }
        // The harness may have begun the line with the test's name.
        if let Some((before, reason)) = line.split_once(SKIPPED)
            && (before.is_empty() || before.starts_with("test "))
        {
            self.skipped.push(reason.to_owned());
        }
        let Some(result) = line.strip_prefix("test result: ") else { return };
        self.suites += 1;
        // "ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s"
        for part in result.split(['.', ';']) {
            let Some((number, what)) = part.trim().split_once(' ') else { continue };
            let Ok(number) = number.parse::<u32>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for name in &self.failures {
            writeln!(f, "failed: {name}")?;
        }
        let mut reasons = self.skipped.clone();
        reasons.sort_unstable();
        for same in reasons.chunk_by(|a, b| a == b) {
            writeln!(f, "skipped {}: {}", same.len(), same[0])?;
        }
        let Self { suites, passed, failed, ignored, .. } = self;
        let skipped = self.skipped.len() as u32;
        let passed = passed.saturating_sub(skipped);
        write!(
            f,
            "tests: {passed} passed, {failed} failed, {ignored} ignored, {skipped} skipped; suites: {suites}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(extra: &[&str]) -> String {
        cargo_words(
            Machine { llama_cpp: true },
            &extra.iter().map(|&word| word.to_owned()).collect::<Vec<_>>(),
        )
        .join(" ")
    }

    #[test]
    fn everything_is_tested_unless_something_is_chosen() {
        assert_eq!(words(&[]), "cargo test --workspace --all-features --no-fail-fast");
        assert_eq!(words(&["-p", "x"]), "cargo test --all-features --no-fail-fast -p x");
        assert_eq!(words(&["-px"]), "cargo test --all-features --no-fail-fast -px");
        assert_eq!(words(&["--package=x"]), "cargo test --all-features --no-fail-fast --package=x");
        assert_eq!(
            words(&["--no-default-features"]),
            "cargo test --workspace --no-fail-fast --no-default-features"
        );
        assert_eq!(words(&["--release"]), "cargo test --workspace --all-features --no-fail-fast --release");
        assert_eq!(
            words(&["--profile", "x"]),
            "cargo test --workspace --all-features --no-fail-fast --profile x"
        );
    }

    #[test]
    fn what_cannot_be_built_is_left_out_of_everything() {
        let words = |extra: &[&str]| {
            let extra: Vec<String> = extra.iter().map(|&word| word.to_owned()).collect();
            cargo_words(Machine { llama_cpp: false }, &extra).join(" ")
        };
        assert_eq!(
            words(&[]),
            "cargo test --workspace --exclude=ternion-backend-llama-cpp \
             --features=ternion/onnx,ternion-cli/onnx,ternion/openai,ternion-cli/openai,ternion-cli/tls,ternion-cli/parquet,ternion-cli/plots,ternion-eval/parquet --no-fail-fast"
        );
        assert_eq!(words(&["-p", "x"]), "cargo test --all-features --no-fail-fast -p x");
    }

    #[test]
    fn arguments_of_the_harness_choose_nothing() {
        assert_eq!(words(&["--", "-p"]), "cargo test --workspace --all-features --no-fail-fast -- -p");
    }

    #[test]
    fn suites_are_added_up_and_passed_on_unchanged() {
        let printed = b"\nrunning 3 tests\n\
            test a::one ... ok\n\
            test a::two ... FAILED\n\
            test src/lib.rs - b (line 3) ... FAILED\n\
            output that is not UTF-8: \xff\n\
            skipped: no library\n\
            test a::three ... skipped: no library\n\
            skipped: no package\n\
            it said that it skipped: nothing\n\
            test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s\n\
            test result: ok. 40 passed; 0 failed; 3 ignored; 1 measured; 9 filtered out; finished in 12.50s";
        let mut tally = Tally::default();
        let mut copy = Vec::new();
        tally.follow(&printed[..], &mut copy).unwrap();
        assert_eq!(copy, printed);
        assert_eq!(
            tally.to_string(),
            "failed: a::two\nfailed: src/lib.rs - b (line 3)\nskipped 2: no library\nskipped 1: no package\n\
             tests: 38 passed, 2 failed, 3 ignored, 3 skipped; suites: 2"
        );
    }
}
