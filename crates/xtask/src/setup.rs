//! `cargo xtask setup`: what the tests and lints need besides cargo.
//!
//! [`NEEDS`] is the whole list. A need is asked for before anything is installed, so a second run changes nothing. What
//! llama.cpp's build needs beside Rust is in it too, since tests and lints take all features.

use crate::{native, onnxruntime, shell};

/// How much of the list is wanted. A machine that only runs the tests need not have the linters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    /// What `cargo xtask test` needs.
    Test,
    /// That, and what `cargo xtask lint` needs.
    Lint,
}

/// Something that must be on the machine.
struct Need {
    name: &'static str,
    scope: Scope,
    probe: Probe,
    /// The lowest version that will do, `major.minor`.
    minimum: Option<&'static str>,
    remedy: Remedy,
}

/// How to see that a need is met.
enum Probe {
    /// A command that succeeds, and prints a version.
    Command(&'static [&'static str]),
    /// A function that says what it has found.
    Search(fn() -> Option<String>),
}

/// What to do about a need that is not met.
enum Remedy {
    /// Run this.
    Install(&'static [&'static str]),
    /// Install this package of Debian as root, else this one of PyPI, where there is one, into the project's folder.
    Native { debian: &'static str, pypi: Option<&'static str> },
    /// Call this. Where it fails, go on without and tell the user what that means, except on the CI.
    Wanted(fn() -> Result<(), String>, &'static str),
    /// Stop, and tell the user.
    Tell(&'static str),
    /// Go on without, and tell the user.
    Optional(&'static str),
}

const MSRV: Option<&str> = Some(env!("CARGO_PKG_RUST_VERSION"));

/// How `cargo xtask lint` asks whether it can check licences and advisories.
pub(crate) const CARGO_DENY: &[&str] = &["cargo", "deny", "--version"];

const NEEDS: &[Need] = &[
    Need {
        name: "cargo",
        scope: Scope::Test,
        probe: Probe::Command(&["cargo", "--version"]),
        minimum: MSRV,
        remedy: Remedy::Tell("update Rust: `rustup update stable`"),
    },
    Need {
        name: "rustc",
        scope: Scope::Test,
        probe: Probe::Command(&["rustc", "--version"]),
        minimum: MSRV,
        remedy: Remedy::Tell("update Rust: `rustup update stable`"),
    },
    Need {
        name: "CMake",
        scope: Scope::Test,
        probe: Probe::Command(&["cmake", "--version"]),
        minimum: Some("3.14"),
        remedy: Remedy::Native { debian: "cmake", pypi: Some("cmake") },
    },
    Need {
        name: "C++ compiler",
        scope: Scope::Test,
        probe: Probe::Search(native::cpp_compiler),
        minimum: None,
        remedy: Remedy::Native { debian: "g++", pypi: None },
    },
    Need {
        name: "libclang",
        scope: Scope::Test,
        probe: Probe::Search(native::libclang),
        minimum: None,
        remedy: Remedy::Native { debian: "libclang-dev", pypi: Some("libclang") },
    },
    Need {
        name: "ONNX Runtime",
        scope: Scope::Test,
        probe: Probe::Search(onnxruntime::found),
        minimum: None,
        remedy: Remedy::Wanted(onnxruntime::install, "the tests that load it are skipped"),
    },
    Need {
        name: "Python packages",
        scope: Scope::Test,
        probe: Probe::Search(native::python_packages),
        minimum: None,
        remedy: Remedy::Wanted(
            native::install_python_packages,
            "the tests that compare with other writers and readers of GGUF and ONNX are skipped",
        ),
    },
    Need {
        name: "rustfmt",
        scope: Scope::Lint,
        probe: Probe::Command(&["cargo", "fmt", "--version"]),
        minimum: None,
        remedy: Remedy::Install(&["rustup", "component", "add", "rustfmt"]),
    },
    Need {
        name: "clippy",
        scope: Scope::Lint,
        probe: Probe::Command(&["cargo", "clippy", "--version"]),
        minimum: None,
        remedy: Remedy::Install(&["rustup", "component", "add", "clippy"]),
    },
    Need {
        name: "cargo-deny",
        scope: Scope::Lint,
        probe: Probe::Command(CARGO_DENY),
        minimum: None,
        remedy: Remedy::Optional(
            "lint leaves out licences and advisories; `cargo install --locked cargo-deny` adds them",
        ),
    },
];

/// Meets every need within `scope` and reports each on a line of its own.
///
/// # Errors
/// When a need is not met and cannot be installed from here; the message says what to do.
pub(crate) fn run(scope: Scope) -> Result<(), String> {
    NEEDS.iter().filter(|need| need.scope <= scope).try_for_each(meet)
}

fn meet(need: &Need) -> Result<(), String> {
    let name = need.name;
    let problem = match state(need) {
        Ok(found) => {
            eprintln!("xtask: {name}: ok ({found})");
            return Ok(());
        }
        Err(problem) => problem,
    };
    match &need.remedy {
        Remedy::Optional(advice) => {
            eprintln!("xtask: {name}: {problem}; {advice}");
            Ok(())
        }
        Remedy::Tell(advice) => Err(format!("{name}: {problem}; {advice}")),
        Remedy::Wanted(installation, without) => {
            let outcome = install(need, &problem, installation, "the installation");
            match outcome {
                Err(error) if std::env::var_os("CI").is_none() => {
                    eprintln!("xtask: {error}; {without}");
                    Ok(())
                }
                outcome => outcome,
            }
        }
        Remedy::Install(command) => {
            let installed = || shell::run(command, &[]);
            install(need, &problem, &installed, &format!("`{}`", command.join(" ")))
        }
        Remedy::Native { debian, pypi } => {
            let installed = || native::install(debian, *pypi);
            install(need, &problem, &installed, "the installation")
        }
    }
}

fn install(
    need: &Need,
    problem: &str,
    install: &dyn Fn() -> Result<(), String>,
    how: &str,
) -> Result<(), String> {
    let name = need.name;
    eprintln!("xtask: {name}: {problem}; installing it");
    install().map_err(|error| format!("{name}: {problem}, and {error}"))?;
    let found = state(need).map_err(|problem| format!("{name}: {problem}, though {how} succeeded"))?;
    eprintln!("xtask: {name}: installed ({found})");
    Ok(())
}

/// The version found, or what is wrong.
fn state(need: &Need) -> Result<String, String> {
    let found = match need.probe {
        Probe::Command(command) => shell::probe(command)
            .ok_or_else(|| format!("not found (`{}` does not run)", command.join(" ")))?,
        Probe::Search(search) => search().ok_or("not found")?,
    };
    match need.minimum {
        Some(minimum) if !is_at_least(&found, minimum) => {
            Err(format!("found `{found}`, {minimum} or newer is needed"))
        }
        _ => Ok(found),
    }
}

/// Whether the version in `line`, such as `rustc 1.95.0 (59807616e 2026-04-14)`, reaches `minimum`.
fn is_at_least(line: &str, minimum: &str) -> bool {
    let found = line.split_whitespace().find_map(version);
    found.is_some() && found >= version(minimum)
}

/// Major and minor number of `1.95.0`, `1.96.0-nightly` or `1.89`.
fn version(word: &str) -> Option<(u32, u32)> {
    let mut numbers = word.split(['.', '-']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert!(is_at_least("rustc 1.95.0 (59807616e 2026-04-14)", "1.89"));
        assert!(is_at_least("cargo 1.100.0-nightly (f2d3ce0bd 2027-03-21)", "1.89"));
        assert!(is_at_least("rustc 2.0.0", "1.89.1"));
        assert!(is_at_least("rustc 1.89.0", "1.89"));
        assert!(!is_at_least("rustc 1.9.0 (f2d3ce0bd 2016-05-21)", "1.89"));
        assert!(!is_at_least("rustc 1.88.0", "1.89"));
        assert!(!is_at_least("no version here", "1.89"));
        assert!(is_at_least("cmake version 3.25.1", "3.14"));
    }

    const ABSENT: Need = Need {
        name: "ghost",
        scope: Scope::Test,
        probe: Probe::Command(&["no-such-program-here"]),
        minimum: None,
        remedy: Remedy::Tell("call someone"),
    };

    #[test]
    fn an_unmet_need_says_what_to_do() {
        let error = meet(&ABSENT).unwrap_err();
        assert_eq!(error, "ghost: not found (`no-such-program-here` does not run); call someone");
        let old = Need {
            name: "rustc",
            probe: Probe::Command(&["rustc", "--version"]),
            minimum: Some("999.0"),
            ..ABSENT
        };
        let error = meet(&old).unwrap_err();
        assert!(error.contains("999.0 or newer is needed; call someone"), "{error}");
    }

    #[test]
    fn an_optional_need_stops_nobody() {
        assert_eq!(meet(&Need { remedy: Remedy::Optional("fine without"), ..ABSENT }), Ok(()));
    }

    #[test]
    fn an_installation_is_checked() {
        let useless = Need { remedy: Remedy::Install(&["cargo", "--version"]), ..ABSENT };
        let error = meet(&useless).unwrap_err();
        assert!(error.ends_with("though `cargo --version` succeeded"), "{error}");
        let failing = Need { remedy: Remedy::Install(&["no-such-installer"]), ..ABSENT };
        let error = meet(&failing).unwrap_err();
        assert!(error.contains("cannot start `no-such-installer`"), "{error}");
    }

    #[test]
    fn this_machine_can_run_the_tests() {
        assert_eq!(run(Scope::Test), Ok(()));
    }
}
