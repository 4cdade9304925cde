//! What llama.cpp's build needs beside Rust: CMake, a C++ compiler and libclang; and the Python packages that tests compare with.
//!
//! The packages come from PyPI into a virtual environment in `target/tools`; so do CMake and libclang where the system lacks them
//! and this user may not install them. The commands of this program get there by the variables of [`environment`]. A `cargo build`
//! by hand needs the same variables, which are printed after the installation.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::shell;

/// The C++ compiler that the build will find, and what it says of itself.
pub(crate) fn cpp_compiler() -> Option<String> {
    if let Ok(chosen) = std::env::var("CXX") {
        return shell::probe(&[&chosen, "--version"]);
    }
    if cfg!(windows) {
        // The build looks for Visual Studio in the registry, and says so if there is none.
        return Some("left to the build".to_owned());
    }
    ["c++", "g++", "clang++"].iter().find_map(|name| shell::probe(&[name, "--version"]))
}

/// Where libclang is. The build looks nowhere else where `LIBCLANG_PATH` is set.
pub(crate) fn libclang() -> Option<String> {
    let places = match std::env::var_os("LIBCLANG_PATH") {
        Some(chosen) => vec![PathBuf::from(chosen)],
        None => wheel_of_libclang().into_iter().chain(system_folders()).collect(),
    };
    places.into_iter().flat_map(|place| libraries(&place)).next().map(|found| found.display().to_string())
}

/// Installs a package of Debian where this user may, else a package of PyPI into `target/tools`.
///
/// # Errors
/// When neither is possible; the message says what to install by hand.
pub(crate) fn install(debian: &str, pypi: Option<&str>) -> Result<(), String> {
    let by_hand = format!(
        "it must be installed by hand: the package `{debian}` on Debian or Ubuntu, Xcode's command line tools or Homebrew on macOS"
    );
    if may_use_apt() && apt_install(debian).is_ok() {
        return Ok(());
    }
    let Some(pypi) = pypi else { return Err(by_hand) };
    pip_install(&[pypi]).map_err(|error| format!("{error}; else {by_hand}"))?;
    eprintln!("xtask: for `cargo build` by hand:");
    for (key, value) in environment() {
        eprintln!("xtask:   export {key}='{}'", value.display());
    }
    Ok(())
}

fn may_use_apt() -> bool {
    let root = shell::probe(&["id", "-u"]).is_some_and(|id| id == "0");
    root && shell::probe(&["apt-get", "--version"]).is_some()
}

fn apt_install(package: &str) -> Result<(), String> {
    // The lists of packages may be missing, as in a container, or old; if they are not, this is no loss.
    let _ = shell::run(&["apt-get", "update", "--quiet"], &[]);
    let words = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", package];
    shell::run(&words, &[("DEBIAN_FRONTEND", "noninteractive")])
}

/// What builds the Python package.
const MATURIN: &str = "maturin>=1.9.4,<2";

/// The packages, with the versions that the comparisons were written for.
const PYTHON_PACKAGES: [&str; 15] = [
    "gguf==0.19.0",
    "huggingface_hub",
    "jsonschema",
    "lm-eval[api]==0.4.13",
    MATURIN,
    "mypy>=2.4,<3",
    "numpy",
    "onnx",
    "onnxruntime==1.32.0",
    "openai",
    // An agent framework, without the clients of other services.
    "pydantic-ai-slim[openai]>=2.68,<3",
    "pytest>=8,<10",
    "schemathesis==4.32.5",
    // Its tokenizers, which lm-eval takes; no model of it runs.
    "transformers",
    "xllamacpp",
];

/// Whether the project's Python has the packages that tests compare with.
pub(crate) fn python_packages() -> Option<String> {
    let python = program(&tools(), "python").display().to_string();
    let program = "import gguf, huggingface_hub, jsonschema, maturin, mypy, numpy, onnx, onnxruntime, openai, pytest, tenacity; import importlib.util as u; \
                   assert all(map(u.find_spec, ['lm_eval', 'pydantic_ai', 'schemathesis', 'transformers', 'xllamacpp'])); \
                   print('onnx', onnx.__version__)";
    shell::probe(&[&python, "-c", program])
}

/// Gets what builds the Python package.
///
/// # Errors
/// As [`install_python_packages`].
pub(crate) fn install_maturin() -> Result<(), String> {
    pip_install(&[MATURIN])
}

/// Gets those packages.
///
/// # Errors
/// Without Python, its `venv` or a way to the package index.
pub(crate) fn install_python_packages() -> Result<(), String> {
    pip_install(&PYTHON_PACKAGES)?;
    if python_packages().is_none() {
        // Installed, says pip, but not complete: an earlier run was stopped.
        pip_install(&[&["--force-reinstall"][..], &PYTHON_PACKAGES].concat())?;
    }
    Ok(())
}

/// Installs packages of PyPI into the virtual environment in `target/tools`, which is made if there is none. One that was made
/// for nothing is removed: its Python would hide that of the system, and the packages of that.
fn pip_install(packages: &[&str]) -> Result<(), String> {
    let own = program(&tools(), "python").display().to_string();
    let is_new = !has_pip(&own);
    if is_new {
        make_environment(&own)?;
    }
    let pip = [&own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries=2"];
    let outcome = shell::run(&[&pip[..], packages].concat(), &[]);
    if outcome.is_err() && is_new {
        remove_environment();
    }
    outcome.map_err(|error| format!("{error}, which needs a way to a package index such as PyPI"))
}

fn make_environment(own: &str) -> Result<(), String> {
    let install =
        "install Python 3 with its `venv` (the packages `python3` and `python3-venv` on Debian or Ubuntu)";
    let make = || {
        remove_environment();
        let python = system_python().ok_or_else(|| format!("no Python 3 is found; {install}"))?;
        let made = shell::run(&[python, "-m", "venv", &tools().display().to_string()], &[]);
        if made.is_ok() && has_pip(own) {
            return Ok(());
        }
        remove_environment();
        Err(format!("`{python} -m venv` makes no environment with pip; {install}"))
    };
    make().or_else(
        |error| {
            if may_use_apt() && apt_install("python3-venv").is_ok() { make() } else { Err(error) }
        },
    )
}

/// A Python 3 that is not the one in `target/tools`.
fn system_python() -> Option<&'static str> {
    let names = if cfg!(windows) { ["python", "py"] } else { ["python3", "python"] };
    let program = "import sys; assert sys.version_info[0] == 3";
    names.into_iter().find(|name| shell::probe(&[name, "-c", program]).is_some())
}

fn has_pip(python: &str) -> bool {
    shell::probe(&[python, "-m", "pip", "--version"]).is_some()
}

/// Removes a virtual environment that cannot be used: a run was stopped while it was made, or its Python is gone.
pub(crate) fn remove_broken_environment() {
    let own = program(&tools(), "python");
    let exists = own.is_symlink() || own.exists() || tools().join("pyvenv.cfg").exists();
    if exists && !has_pip(&own.display().to_string()) {
        eprintln!("xtask: the Python environment in target/tools is broken and is removed");
        remove_environment();
    }
}

/// Removes the virtual environment and leaves what else lies in `target/tools`.
fn remove_environment() {
    let parts = ["bin", "lib", "lib64", "include", "share", "Scripts", "Lib", "Include", "pyvenv.cfg"];
    for part in parts.iter().map(|part| tools().join(part)) {
        // What cannot be removed makes the next step fail, which says why.
        let _ = if part.is_dir() && !part.is_symlink() {
            std::fs::remove_dir_all(part)
        } else {
            std::fs::remove_file(part)
        };
    }
}

/// What leads commands to the programs in `target/tools`; nothing where there are none.
pub(crate) fn environment() -> Vec<(&'static str, OsString)> {
    let mut variables = Vec::new();
    let python = program(&tools(), "python");
    if python.is_file() {
        let own = python.parent().map(Path::to_path_buf);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let all = own.into_iter().chain(std::env::split_paths(&path));
        variables.extend(std::env::join_paths(all).ok().map(|path| ("PATH", path)));
    }
    if let Some(folder) = wheel_of_libclang()
        && std::env::var_os("LIBCLANG_PATH").is_none()
    {
        variables.push(("LIBCLANG_PATH", folder.into_os_string()));
        // The wheel holds the library without its headers (`stddef.h` and the like); those of GCC do as well.
        if let Some(headers) =
            gcc_headers().filter(|_| std::env::var_os("BINDGEN_EXTRA_CLANG_ARGS").is_none())
        {
            variables.push(("BINDGEN_EXTRA_CLANG_ARGS", format!("-I{headers}").into()));
        }
    }
    variables
}

/// GCC's own headers. Not by [`shell`], whose commands ask for the environment that this is a part of.
fn gcc_headers() -> Option<String> {
    let output = std::process::Command::new("gcc").arg("-print-file-name=include").output().ok()?;
    let folder = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    Path::new(&folder).is_absolute().then_some(folder)
}

fn tools() -> PathBuf {
    shell::root().join("target").join("tools")
}

/// A program of a virtual environment.
fn program(tools: &Path, name: &str) -> PathBuf {
    if cfg!(windows) {
        tools.join("Scripts").join(format!("{name}.exe"))
    } else {
        tools.join("bin").join(name)
    }
}

/// The folder of the library in the wheel `libclang`.
fn wheel_of_libclang() -> Option<PathBuf> {
    let tools = tools();
    let site = [tools.join("Lib")].into_iter().chain(children(&tools.join("lib")));
    site.map(|folder| folder.join("site-packages").join("clang").join("native"))
        .find(|folder| folder.is_dir())
}

/// The folders in which bindgen looks, as far as they are common.
fn system_folders() -> Vec<PathBuf> {
    let plain = [
        "/usr/lib",
        "/usr/lib64",
        "/usr/local/lib",
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/Library/Developer/CommandLineTools/usr/lib",
        "/Applications/Xcode.app/Contents/Developer/Toolchains/XcodeDefault.xctoolchain/usr/lib",
        "/opt/homebrew/opt/llvm/lib",
        "/usr/local/opt/llvm/lib",
        "C:\\Program Files\\LLVM\\bin",
    ];
    let versions = children(Path::new("/usr/lib"))
        .into_iter()
        .filter(|folder| folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with("llvm")));
    plain.iter().map(PathBuf::from).chain(versions.map(|folder| folder.join("lib"))).collect()
}

/// Files in `place` (or `place` itself) that are libclang with its whole interface.
fn libraries(place: &Path) -> Vec<PathBuf> {
    // `libclang-cpp` is another library, and the static ones (`libclangAST.a`) are parts of it.
    let is_library = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let versioned = name.strip_prefix("libclang-").and_then(|rest| rest.split_once(".so"));
        ["libclang.dll", "libclang.dylib", "libclang.so"].contains(&name.as_str())
            || name.starts_with("libclang.so.")
            || versioned.is_some_and(|(version, _)| version.starts_with(|c: char| c.is_ascii_digit()))
    };
    let candidates = if place.is_file() { vec![place.to_path_buf()] } else { children(place) };
    candidates.into_iter().filter(is_library).collect()
}

/// What a folder holds, sorted; nothing if it cannot be read.
fn children(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut found: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libclang_is_told_from_its_relatives() {
        let folder = std::env::temp_dir().join(format!("ternion-xtask-{}-libclang", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for name in
            ["libclang-cpp.so.14", "libclang-14.so.1", "libclang.so", "libclang.so.1", "libclangAST.a"]
        {
            std::fs::write(folder.join(name), "").unwrap();
        }
        let found = libraries(&folder);
        let names: Vec<_> = found.iter().filter_map(|path| path.file_name()?.to_str()).collect();
        assert_eq!(names, ["libclang-14.so.1", "libclang.so", "libclang.so.1"]);
        assert_eq!(libraries(&folder.join("libclang.so")).len(), 1);
        let _ = std::fs::remove_dir_all(&folder);
        assert!(libraries(&folder).is_empty());
    }
}
