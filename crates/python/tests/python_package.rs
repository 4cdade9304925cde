//! The tests in Python: the library that Cargo has built goes into a wheel, the wheel into a fresh virtual environment, and
//! pytest runs there.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{
    ffi::OsStr,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

#[path = "../../../tests/hub/fake.rs"]
#[allow(dead_code, reason = "the tests of the hub itself use the rest")]
mod fake;

use fake::{Fake, Repo};
use ternion::formats::{
    Checkpoint,
    convert::{Options, Target, convert},
};

#[test]
fn the_tests_in_python_pass() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let Some(python) = project_python() else { return };
    let work = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let hub = runtime.block_on(Fake::start());
    fill(&hub, &folder.join("../../fixtures/ternion-tiny"), &work.path().join("bitnet.gguf"));
    let path = |name: &str| work.path().join(name);

    let pack = folder.join("tests/pack.py");
    let wheel = run(Command::new(&python).arg(pack).arg(library()).arg(work.path()));
    run(Command::new(&python).args(["-m", "venv", "--without-pip"]).arg(path("venv")));
    let fresh = interpreter(&path("venv")).unwrap();
    let install = ["-m", "pip", "--disable-pip-version-check", "--python"];
    let offline = ["install", "--quiet", "--no-index", "--no-deps", wheel.trim()];
    run(Command::new(&python).args(install).arg(&fresh).args(offline));

    // What the tests themselves need is taken from the project's environment.
    let show = ["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"];
    let packages = run(Command::new(&python).args(show));
    let own = run(Command::new(&fresh).args(show));
    std::fs::write(Path::new(own.trim()).join("tests.pth"), packages).unwrap();

    let mut tests = Command::new(&fresh);
    tests.args(["-m", "pytest", "-q", "-rs"]).current_dir(folder);
    // A bytecode cache would end up in the source tree.
    tests.env("PYTHONDONTWRITEBYTECODE", "1");
    tests.env("TERNION_TEST_HUB", &hub.url).env("NO_PROXY", "127.0.0.1");
    println!("{}", run(&mut tests));
}

/// Puts the small model into the hub: as it is, behind a gate, and as a GGUF file.
fn fill(hub: &Fake, tiny: &Path, gguf: &Path) {
    let mut repo = Repo::of([("README.md", b"# tiny".to_vec())]);
    for entry in std::fs::read_dir(tiny).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file()) {
        let bytes = std::fs::read(entry.path()).unwrap();
        repo.files.insert(entry.file_name().into_string().unwrap(), bytes.into());
    }
    hub.add("test/tiny", repo.clone());
    hub.add("test/gated", Repo { gated: true, ..repo });
    convert(&Checkpoint::open(tiny).unwrap(), gguf, &Options::new(Target::GgufI2s), &mut |_, _| {}).unwrap();
    hub.add("test/gguf", Repo::of([("bitnet.gguf", std::fs::read(gguf).unwrap())]));
}

/// The library of this crate, which Cargo puts beside the executables of its tests.
fn library() -> PathBuf {
    let name = format!("{}_native{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let folder = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let library = folder.join(name);
    assert!(library.is_file(), "{} is not there", library.display());
    library
}

/// The project's Python, if it has pytest.
fn project_python() -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools");
    let has_pytest = |python: &PathBuf| {
        Command::new(python)
            .args(["-c", "import pytest"])
            .output()
            .is_ok_and(|output| output.status.success())
    };
    let python = interpreter(&tools).filter(has_pytest);
    if python.is_none() {
        // Past the test harness, which keeps the output of tests that pass.
        let _ = writeln!(std::io::stderr(), "skipped: no Python package pytest in target/tools");
    }
    python
}

fn interpreter(environment: &Path) -> Option<PathBuf> {
    [environment.join("bin/python"), environment.join("Scripts/python.exe")]
        .into_iter()
        .find(|path| path.exists())
}

/// What a command prints.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let program = command.get_program().to_owned();
    let words: Vec<&OsStr> = std::iter::once(&*program).chain(command.get_args()).collect();
    assert!(output.status.success(), "{words:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}
