//! `cargo xtask setup`: what the tests and lints need besides cargo.
//!
//! [`NEEDS`] is the whole list, which includes what llama.cpp's build needs, since tests and lints take all features. Nothing is
//! installed that is there already, so a second run changes nothing. What can be neither found nor installed is left out, with
//! what depends on it, and named at the end; only on the CI it is an error.

use crate::{native, onnxruntime, shell};

/// How much of the list is wanted. A machine that only runs the tests need not have the linters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    /// What `cargo xtask wheel` needs.
    Wheel,
    /// What `cargo xtask test` needs.
    Test,
    /// That, and what `cargo xtask lint` needs.
    Lint,
}

/// Something that should be on the machine.
struct Need {
    name: &'static str,
    scope: Scope,
    probe: Probe,
    /// The lowest version that will do, `major.minor`.
    minimum: Option<&'static str>,
    remedy: Remedy,
    without: Without,
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
    /// As root install this package of Debian, else this one of PyPI, where there is one, into the project's folder.
    Native { debian: &'static str, pypi: Option<&'static str> },
    /// Call this.
    Call(fn() -> Result<(), String>),
    /// Tell the user.
    Tell(&'static str),
}

/// What it means to go on without.
#[derive(Clone, Copy)]
enum Without {
    /// Nothing works.
    Nothing,
    /// llama.cpp cannot be built: its feature is left out.
    NoLlamaCpp,
    /// This.
    Less(&'static str),
    /// This, on the CI too.
    LessEverywhere(&'static str),
}

impl Without {
    fn text(self) -> &'static str {
        match self {
            Self::Nothing => "nothing can be built",
            Self::NoLlamaCpp => "the feature `llama-cpp` is left out",
            Self::Less(text) | Self::LessEverywhere(text) => text,
        }
    }
}

/// What the machine can do after a setup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Machine {
    /// Builds llama.cpp.
    pub(crate) llama_cpp: bool,
}

impl Machine {
    /// What to test or check: the whole workspace with all features, as far as it can be built.
    pub(crate) fn selection(self) -> &'static [&'static str] {
        if self.llama_cpp {
            &["--workspace", "--all-features"]
        } else {
            &[
                "--workspace",
                "--exclude=ternion-backend-llama-cpp",
                "--features=ternion/onnx,ternion-cli/onnx,ternion/openai,ternion-cli/openai,ternion-cli/tls,ternion-cli/parquet,ternion-cli/plots,ternion-eval/parquet",
            ]
        }
    }
}

const MSRV: Option<&str> = Some(env!("CARGO_PKG_RUST_VERSION"));

/// How `cargo xtask lint` asks whether it can check licences and advisories.
pub(crate) const CARGO_DENY: &[&str] = &["cargo", "deny", "--version"];

const UPDATE_RUST: Remedy = Remedy::Tell("update Rust: `rustup update stable`");

const NEEDS: &[Need] = &[
    Need {
        name: "cargo",
        scope: Scope::Wheel,
        probe: Probe::Command(&["cargo", "--version"]),
        minimum: MSRV,
        remedy: UPDATE_RUST,
        without: Without::Nothing,
    },
    Need {
        name: "rustc",
        scope: Scope::Wheel,
        probe: Probe::Command(&["rustc", "--version"]),
        minimum: MSRV,
        remedy: UPDATE_RUST,
        without: Without::Nothing,
    },
    Need {
        name: "CMake",
        scope: Scope::Test,
        probe: Probe::Command(&["cmake", "--version"]),
        minimum: Some("3.14"),
        remedy: Remedy::Native { debian: "cmake", pypi: Some("cmake") },
        without: Without::NoLlamaCpp,
    },
    Need {
        name: "C++ compiler",
        scope: Scope::Test,
        probe: Probe::Search(native::cpp_compiler),
        minimum: None,
        remedy: Remedy::Native { debian: "g++", pypi: None },
        without: Without::NoLlamaCpp,
    },
    Need {
        name: "libclang",
        scope: Scope::Test,
        probe: Probe::Search(native::libclang),
        minimum: None,
        remedy: Remedy::Native { debian: "libclang-dev", pypi: Some("libclang") },
        without: Without::NoLlamaCpp,
    },
    Need {
        name: "Python packages",
        scope: Scope::Test,
        probe: Probe::Search(native::python_packages),
        minimum: None,
        remedy: Remedy::Call(native::install_python_packages),
        without: Without::Less(
            "the tests with other readers and writers of GGUF and ONNX, with clients of the server, and of the Python package are skipped",
        ),
    },
    // Behind the packages, which bring it along where all of them are installed.
    Need {
        name: "maturin",
        scope: Scope::Wheel,
        probe: Probe::Command(&["maturin", "--version"]),
        minimum: Some("1.9"),
        remedy: Remedy::Call(native::install_maturin),
        without: Without::Less("the Python package cannot be built"),
    },
    Need {
        name: "ONNX Runtime",
        scope: Scope::Test,
        probe: Probe::Search(onnxruntime::found),
        minimum: None,
        remedy: Remedy::Call(onnxruntime::install),
        without: Without::Less("the tests that load it are skipped"),
    },
    Need {
        name: "rustfmt",
        scope: Scope::Lint,
        probe: Probe::Command(&["cargo", "fmt", "--version"]),
        minimum: None,
        remedy: Remedy::Install(&["rustup", "component", "add", "rustfmt"]),
        without: Without::Less("lint cannot check the formatting and fails"),
    },
    Need {
        name: "clippy",
        scope: Scope::Lint,
        probe: Probe::Command(&["cargo", "clippy", "--version"]),
        minimum: None,
        remedy: Remedy::Install(&["rustup", "component", "add", "clippy"]),
        without: Without::Less("lint cannot run clippy and fails"),
    },
    Need {
        name: "cargo-deny",
        scope: Scope::Lint,
        probe: Probe::Command(CARGO_DENY),
        minimum: None,
        remedy: Remedy::Tell("install it with `cargo install --locked cargo-deny`"),
        without: Without::LessEverywhere("lint leaves out licences and advisories"),
    },
];

/// Meets every need within `scope` as far as it can, and reports each on a line of its own.
///
/// # Errors
/// When Rust itself is missing or too old, and on the CI when anything is missing. The message says what to do.
pub(crate) fn run(scope: Scope) -> Result<Machine, String> {
    native::remove_broken_environment();
    let needs = NEEDS.iter().filter(|need| need.scope <= scope);
    meet_all(needs, std::env::var_os("CI").is_some())
}

fn meet_all<'a>(needs: impl Iterator<Item = &'a Need>, ci: bool) -> Result<Machine, String> {
    let mut machine = Machine { llama_cpp: true };
    let mut missing = Vec::new();
    let mut errors = Vec::new();
    for need in needs {
        let Err(problem) = meet(need) else { continue };
        match need.without {
            Without::Nothing => errors.push(problem.clone()),
            Without::NoLlamaCpp | Without::Less(_) if ci => errors.push(problem.clone()),
            Without::NoLlamaCpp => machine.llama_cpp = false,
            Without::LessEverywhere(_) | Without::Less(_) => {}
        }
        missing.push(format!("{problem}; without it {}", need.without.text()));
    }
    if !errors.is_empty() {
        return Err(errors.join("\n  "));
    }
    if !missing.is_empty() {
        eprintln!("xtask: goes on without:\n  {}", missing.join("\n  "));
    }
    Ok(machine)
}

/// # Errors
/// What is missing, why it could not be installed, and what to do about it.
fn meet(need: &Need) -> Result<(), String> {
    let name = need.name;
    let problem = match state(need) {
        Ok(found) => {
            eprintln!("xtask: {name}: ok ({found})");
            return Ok(());
        }
        Err(problem) => problem,
    };
    let (outcome, how) = match &need.remedy {
        Remedy::Tell(advice) => return Err(format!("{name}: {problem}; {advice}")),
        Remedy::Call(install) => {
            eprintln!("xtask: {name}: {problem}; installing it");
            (install(), "the installation".to_owned())
        }
        Remedy::Install(command) => {
            eprintln!("xtask: {name}: {problem}; installing it");
            (shell::run(command, &[]), format!("`{}`", command.join(" ")))
        }
        Remedy::Native { debian, pypi } => {
            eprintln!("xtask: {name}: {problem}; installing it");
            (native::install(debian, *pypi), "the installation".to_owned())
        }
    };
    outcome.map_err(|error| format!("{name}: {problem}, and {error}"))?;
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
        without: Without::Nothing,
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
    fn what_is_missing_stops_only_the_ci_and_what_nothing_works_without() {
        let all = |without, ci| meet_all([Need { without, ..ABSENT }].iter(), ci);
        assert_eq!(all(Without::Less("less"), false), Ok(Machine { llama_cpp: true }));
        assert_eq!(all(Without::LessEverywhere("less"), true), Ok(Machine { llama_cpp: true }));
        assert_eq!(all(Without::NoLlamaCpp, false), Ok(Machine { llama_cpp: false }));
        for (without, ci) in
            [(Without::Nothing, false), (Without::Less("less"), true), (Without::NoLlamaCpp, true)]
        {
            assert!(all(without, ci).unwrap_err().contains("call someone"));
        }
        let twice = meet_all([ABSENT, ABSENT].iter(), false).unwrap_err();
        assert_eq!(twice.lines().count(), 2, "all that is missing is named: {twice}");
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
}
