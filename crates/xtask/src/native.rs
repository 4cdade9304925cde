//! What llama.cpp's build needs beside Rust, CMake, a C++ compiler and libclang, and the Python packages that tests
//! compare with.
//!
//! The packages, and where the system lacks them and cannot be changed CMake and libclang too, come from PyPI into a
//! virtual environment in `target/tools`. [`environment`] leads the commands of this program to them; a `cargo build` by hand needs the same
//! variables, which are printed once they are needed.

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

/// Where libclang is.
pub(crate) fn libclang() -> Option<String> {
    let chosen = std::env::var_os("LIBCLANG_PATH").map(PathBuf::from);
    let places = chosen.into_iter().chain(wheel_of_libclang()).chain(system_folders());
    places.flat_map(|place| libraries(&place)).next().map(|found| found.display().to_string())
}

/// Installs a package of Debian where this user may, else a package of PyPI into `target/tools`.
///
/// # Errors
/// When neither is possible; the message says what to install.
pub(crate) fn install(debian: &str, pypi: Option<&str>) -> Result<(), String> {
    let root = shell::probe(&["id", "-u"]).is_some_and(|id| id == "0");
    if root && shell::probe(&["apt-get", "--version"]).is_some() {
        // The lists of packages may be missing, as in a container, or old; if they are not, this is no loss.
        let _ = shell::run(&["apt-get", "update", "--quiet"], &[]);
        let words = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", debian];
        return shell::run(&words, &[("DEBIAN_FRONTEND", "noninteractive")]);
    }
    let Some(pypi) = pypi else {
        return Err(format!(
            "it must be installed: the package `{debian}` on Debian or Ubuntu, Xcode's tools on macOS"
        ));
    };
    pip_install(&[pypi])?;
    eprintln!("xtask: for `cargo build` by hand:");
    for (key, value) in environment() {
        eprintln!("xtask:   export {key}='{}'", value.display());
    }
    Ok(())
}

/// The packages, with the versions that the comparisons were written for.
const PYTHON_PACKAGES: [&str; 4] = ["gguf==0.19.0", "numpy", "onnx", "onnxruntime==1.32.0"];

/// Whether the project's Python has the packages that tests compare with.
pub(crate) fn python_packages() -> Option<String> {
    let python = program(&tools(), "python").display().to_string();
    let program = "import gguf, numpy, onnx, onnxruntime; print('onnx', onnx.__version__)";
    shell::probe(&[&python, "-c", program])
}

/// Gets those packages.
///
/// # Errors
/// Without Python, its `venv` or a way to the package index.
pub(crate) fn install_python_packages() -> Result<(), String> {
    pip_install(&PYTHON_PACKAGES)
}

/// Installs packages of PyPI into the virtual environment in `target/tools`, which is made if there is none.
fn pip_install(packages: &[&str]) -> Result<(), String> {
    let python = if cfg!(windows) { "python" } else { "python3" };
    let own = program(&tools(), "python");
    let own_words = own.display().to_string();
    if !own.is_file() {
        shell::run(&[python, "-m", "venv", &tools().display().to_string()], &[])?;
    }
    let pip = [&own_words, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
    shell::run(&[&pip[..], packages].concat(), &[])
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

    #[test]
    fn what_only_a_system_has_is_named() {
        if shell::probe(&["id", "-u"]).is_some_and(|id| id != "0") {
            assert!(install("g++", None).unwrap_err().contains("`g++`"));
        }
    }
}
