//! Running other programs from the root of the workspace, with errors that say which command failed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::native;

/// The root of the workspace. Cargo names this crate's folder when it runs the program, so that a target folder
/// shared by several checkouts works on the right one; the folder of compilation stands in when run by hand.
pub(crate) fn root() -> PathBuf {
    let own = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    own.ancestors().nth(2).map_or_else(|| own.clone(), Path::to_path_buf)
}

/// `words` as a command in the root, with what has been installed in the project's folder on its `PATH`. `cargo` is the
/// one that started this program, whatever `PATH` says.
pub(crate) fn command<S: AsRef<str>>(words: &[S]) -> Command {
    let (program, arguments) =
        words.split_first().map_or(("", words), |(first, rest)| (first.as_ref(), rest));
    let program = match std::env::var_os("CARGO") {
        Some(cargo) if program == "cargo" => cargo,
        _ => program.into(),
    };
    let mut command = Command::new(program);
    command.args(arguments.iter().map(AsRef::as_ref)).current_dir(root()).envs(native::environment());
    command
}

/// Runs a command with its output shown.
///
/// # Errors
/// When it cannot be started, or ends with anything but success.
pub(crate) fn run(words: &[&str], environment: &[(&str, &str)]) -> Result<(), String> {
    let line = words.join(" ");
    eprintln!("xtask: {line}");
    let status = command(words)
        .envs(environment.iter().copied())
        .status()
        .map_err(|error| format!("cannot start `{line}`: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("`{line}` failed ({status})")) }
}

/// The first line that a command prints, or `None` if it is not there or does not succeed.
pub(crate) fn probe(words: &[&str]) -> Option<String> {
    let output = command(words).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    output.status.success().then(|| text.lines().next().unwrap_or_default().trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_holds_the_workspace() {
        let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
        assert!(manifest.contains("[workspace]"));
    }

    #[test]
    fn a_failing_command_is_named() {
        let error = run(&["cargo", "no-such-subcommand"], &[]).unwrap_err();
        assert!(error.starts_with("`cargo no-such-subcommand` failed"), "{error}");
        let error = run(&["no-such-program-here"], &[]).unwrap_err();
        assert!(error.starts_with("cannot start `no-such-program-here`"), "{error}");
    }

    #[test]
    fn probe_tells_present_from_absent() {
        assert!(probe(&["cargo", "--version"]).unwrap().starts_with("cargo "));
        assert_eq!(probe(&["cargo", "no-such-subcommand"]), None);
        assert_eq!(probe(&["no-such-program-here", "--version"]), None);
    }
}
