//! `cargo xtask setup` on machines where something is missing, played by scripts that stand in for the system's programs.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A machine: a folder of programs, and a checkout to work in.
struct Machine {
    folder: PathBuf,
    /// One at a time: a script cannot be started while a child of another test still has it open for writing.
    _turn: MutexGuard<'static, ()>,
}

static TURN: Mutex<()> = Mutex::new(());

/// Ends well and says a version.
const FINE: &str = "echo \"$0 9.9.0\"";
const FAILS: &str = "exit 1";

/// A Python that can make an environment, get packages where there is a network, and import them afterwards.
const PYTHON: &str = r#"
case "$*" in
  "-m venv "*)
    mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; : > "$3/pyvenv.cfg" ;;
  "-m pip --version") echo pip 25.0 ;;
  "-m pip install "*) test "$NO_NETWORK" = "" || exit 1; : > "$ROOT/packages" ;;
  "-m pip download "*) exit 1 ;;
  "-c import sys;"*) ;;
  "-c import gguf"*) test -e "$ROOT/packages" && echo onnx 1.0 ;;
  *) exit 1 ;;
esac
"#;

impl Machine {
    /// One with all that cargo and llama.cpp need, without root's rights and without Python.
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("ternion-xtask-{}-{name}", std::process::id()));
        let machine = Self { folder, _turn: TURN.lock().unwrap_or_else(PoisonError::into_inner) };
        fs::create_dir_all(machine.folder.join("crates/xtask")).unwrap();
        fs::create_dir_all(machine.folder.join("clang")).unwrap();
        fs::write(machine.folder.join("clang/libclang.so"), "").unwrap();
        for program in ["cargo", "rustc", "cmake", "c++"] {
            machine.program(program, FINE);
        }
        machine.program("id", "echo 1000");
        // What the scripts themselves call.
        for tool in ["mkdir", "cp", "rm"] {
            machine.program(tool, &format!("exec /bin/{tool} \"$@\""));
        }
        machine
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.folder.join("programs").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.folder.join("programs").join(name)).unwrap();
    }

    fn tools(&self) -> PathBuf {
        self.folder.join("target/tools")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// Runs the task and gives its exit code and what it says.
    fn setup(&self, variables: &[(&str, &str)]) -> (Option<i32>, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .arg("setup")
            .env_clear()
            .env("PATH", self.folder.join("programs"))
            .env("CARGO_MANIFEST_DIR", self.folder.join("crates/xtask"))
            .env("LIBCLANG_PATH", self.folder.join("clang"))
            .env("ROOT", &self.folder)
            .envs(variables.iter().copied())
            .current_dir(&self.folder)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // A folder left behind in the system's temporary place harms nobody.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

#[track_caller]
fn has_all(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "`{word}` is missing in:\n{said}");
    }
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none()) || !folder.exists()
}

#[test]
fn without_python_the_tests_that_need_it_are_left_out() {
    let machine = Machine::new("no-python");
    let (code, said) = machine.setup(&[]);
    assert_eq!(code, Some(0), "{said}");
    has_all(&said, &["CMake: ok", "libclang: ok", "goes on without", "no Python 3 is found", "python3-venv"]);
    has_all(&said, &["Python packages: not found", "ONNX Runtime: not found", "are skipped"]);
    assert!(!said.contains("`llama-cpp` is left out"), "{said}");
    assert!(is_empty(&machine.tools()), "nothing is left behind");
}

#[test]
fn without_root_what_only_the_system_has_is_named_and_llama_cpp_left_out() {
    let machine = Machine::new("no-compiler");
    machine.remove("c++");
    machine.remove("cmake");
    machine.program("apt-get", "echo \"$@\" >> \"$ROOT/log\"");
    let (code, said) = machine.setup(&[]);
    assert_eq!(code, Some(0), "{said}");
    has_all(&said, &["the package `g++`", "the package `cmake`", "the feature `llama-cpp` is left out"]);
    assert_eq!(machine.log(), "", "only root may install");
    // On the CI nothing may be left out, and everything that is missing is named.
    let (code, said) = machine.setup(&[("CI", "true")]);
    assert_eq!(code, Some(1), "{said}");
    has_all(&said, &["error: CMake", "C++ compiler: not found", "Python packages: not found"]);
}

#[test]
fn root_installs_what_is_missing() {
    let machine = Machine::new("root");
    machine.program("id", "echo 0");
    machine.remove("c++");
    let install = "echo \"$*\" >> \"$ROOT/log\"; case \"$*\" in *g++) cp \"$ROOT/programs/rustc\" \"$ROOT/programs/g++\";; esac";
    machine.program("apt-get", install);
    let (code, said) = machine.setup(&[]);
    assert_eq!(code, Some(0), "{said}");
    has_all(&said, &["C++ compiler: installed"]);
    assert!(machine.log().contains("install --yes --quiet --no-install-recommends g++"), "{}", machine.log());
}

#[test]
fn root_without_a_network_goes_on_without() {
    let machine = Machine::new("root-no-network");
    machine.program("id", "echo 0");
    machine.program("apt-get", "case \"$1\" in --version) echo apt 2;; *) exit 100;; esac");
    machine.program("python3", PYTHON);
    machine.remove("cmake");
    let (code, said) = machine.setup(&[("NO_NETWORK", "1")]);
    assert_eq!(code, Some(0), "{said}");
    has_all(&said, &["CMake: not found", "a way to a package index", "the package `cmake`", "left out"]);
    assert!(
        !machine.tools().join("bin").exists(),
        "an environment without packages hides the system's Python"
    );
}

#[test]
fn a_python_without_venv_is_told_what_to_install_and_leaves_nothing() {
    let machine = Machine::new("no-venv");
    // As Debian's does without `python3-venv`: it stops half-way.
    let script = PYTHON.replace(": > \"$3/pyvenv.cfg\" ;;", "exit 1 ;;");
    machine.program("python3", &script);
    let (code, said) = machine.setup(&[]);
    assert_eq!(code, Some(0), "{said}");
    has_all(&said, &["`python3 -m venv` makes no environment", "python3-venv"]);
    assert!(is_empty(&machine.tools()), "nothing is left behind");
}

#[test]
fn packages_are_installed_once() {
    let machine = Machine::new("python");
    machine.program("python3", PYTHON);
    let (code, said) = machine.setup(&[]);
    assert_eq!(code, Some(0), "{said}");
    has_all(&said, &["Python packages: installed (onnx 1.0)"]);
    let (code, said) = machine.setup(&[]);
    assert_eq!(code, Some(0), "{said}");
    has_all(&said, &["Python packages: ok (onnx 1.0)"]);
    assert!(!said.contains("-m venv"), "{said}");
}

#[test]
fn a_half_made_environment_is_made_anew() {
    let machine = Machine::new("half");
    machine.program("python3", PYTHON);
    for broken in ["a program that is no Python", "a dangling link"] {
        let bin = machine.tools().join("bin");
        let _ = fs::remove_dir_all(&bin);
        fs::create_dir_all(&bin).unwrap();
        let _ = fs::remove_file(machine.folder.join("packages"));
        fs::create_dir_all(machine.tools().join("onnxruntime/1.0")).unwrap();
        if broken == "a dangling link" {
            std::os::unix::fs::symlink("/no/such/python", bin.join("python")).unwrap();
        } else {
            machine.program("half", FAILS);
            fs::copy(machine.folder.join("programs/half"), bin.join("python")).unwrap();
        }
        let (code, said) = machine.setup(&[]);
        assert_eq!(code, Some(0), "{broken}: {said}");
        has_all(&said, &["target/tools is broken", "Python packages: installed"]);
        assert!(machine.tools().join("onnxruntime/1.0").is_dir(), "what else lies there stays");
    }
}

#[test]
fn an_old_rust_stops_it() {
    let machine = Machine::new("old");
    machine.program("rustc", "echo rustc 1.50.0");
    let (code, said) = machine.setup(&[]);
    assert_eq!(code, Some(1), "{said}");
    has_all(&said, &["error: rustc: found `rustc 1.50.0`", "rustup update stable"]);
}
