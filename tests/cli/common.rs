//! What the tests of the command share: the binary in an empty folder, with none of the user's settings.

use std::path::Path;
use std::process::Output;
pub(crate) use ternion_test_support::fixture;

use assert_cmd::Command;
use serde_json::Value;

/// A run of `ternion` in `folder`.
pub(crate) fn ternion_in(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ternion"));
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("TERNION_") || key == "RUST_LOG" {
            command.env_remove(key);
        }
    }
    command.current_dir(folder).args(args).timeout(std::time::Duration::from_secs(60));
    command
}

/// A run of `ternion` where no configuration lies.
#[allow(dead_code, reason = "not every test needs it")]
pub(crate) fn ternion(args: &[&str]) -> Command {
    ternion_in(&fixture(""), args)
}

/// The same as an argument.
#[allow(dead_code, reason = "not every test needs it")]
pub(crate) fn fixture_arg(name: &str) -> String {
    fixture(name).to_str().unwrap().to_owned()
}

/// Standard output as text.
pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Standard error as text.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A successful run.
#[allow(dead_code, reason = "not every test needs it")]
#[track_caller]
pub(crate) fn success(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{:?}: {}", output.status, stderr(&output));
    output
}

/// The JSON of a successful run.
#[allow(dead_code, reason = "not every test needs it")]
#[track_caller]
pub(crate) fn json(command: Command) -> Value {
    let output = success(command);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", stdout(&output)))
}

/// A failed run: its exit code, and the one line that it says, which must hold all of `words`.
#[track_caller]
pub(crate) fn failure(mut command: Command, code: i32, words: &[&str]) {
    let output = command.output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(output.stdout.is_empty(), "{}", stdout(&output));
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{said}");
    for word in words {
        assert!(errors[0].contains(word), "`{word}` is missing in: {}", errors[0]);
    }
}
