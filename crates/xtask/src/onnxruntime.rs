//! ONNX Runtime's native library, which the tests of the backend `onnx` load: from the wheel on PyPI, by version and hash.
//!
//! Without Python those tests are skipped.

use std::fs;
use std::path::{Path, PathBuf};

use crate::shell;

const VERSION: &str = "1.32.0";

/// The wheels by the system that they are for. Any of one version has the same library for all versions of Python.
const WHEELS: [Wheel; 4] = [
    Wheel {
        os: "linux",
        arch: "x86_64",
        platform: "manylinux_2_28_x86_64",
        library: "libonnxruntime.so.1.32.0",
        sha256: "99e1074c4b2197accd5073052a465361be17b89c093b8ffb6e6bd8f986c52df8",
    },
    Wheel {
        os: "linux",
        arch: "aarch64",
        platform: "manylinux_2_28_aarch64",
        library: "libonnxruntime.so.1.32.0",
        sha256: "e36c187006e7a7c8b8d6d57f1a209dd63f52430dca6c282b177718ad6b841054",
    },
    Wheel {
        os: "macos",
        arch: "aarch64",
        platform: "macosx_14_0_arm64",
        library: "libonnxruntime.1.32.0.dylib",
        sha256: "d52510bbbcc880c13b826f7d75cdf33ac5cf0bb864d960000fc29ce73f0cb83e",
    },
    Wheel {
        os: "windows",
        arch: "x86_64",
        platform: "win_amd64",
        library: "onnxruntime.dll",
        sha256: "efe7456952c243a05a53d5b8732953625144642c2f3989094277f6217f0c0c40",
    },
];

/// Where to look for the library, and what it must be.
const VARIABLE: &str = "ORT_DYLIB_PATH";

struct Wheel {
    os: &'static str,
    arch: &'static str,
    /// As `pip` names it.
    platform: &'static str,
    /// The library's name within `onnxruntime/capi`.
    library: &'static str,
    sha256: &'static str,
}

/// Where the library is: as the environment says, or got by [`install`].
pub(crate) fn found() -> Option<String> {
    let named = std::env::var_os(VARIABLE).filter(|path| !path.is_empty());
    let path = named.map(PathBuf::from).or_else(library)?;
    Some(path.display().to_string())
}

/// The variable that tells tests where the library is, if it is there and the user has not set it.
pub(crate) fn environment() -> Option<(&'static str, PathBuf)> {
    let is_set = std::env::var_os(VARIABLE).is_some_and(|path| !path.is_empty());
    if is_set { None } else { library().map(|path| (VARIABLE, path)) }
}

fn folder() -> PathBuf {
    shell::root().join("target/tools/onnxruntime").join(VERSION)
}

fn wheel() -> Option<&'static Wheel> {
    WHEELS.iter().find(|w| (w.os, w.arch) == (std::env::consts::OS, std::env::consts::ARCH))
}

fn library() -> Option<PathBuf> {
    let path = folder().join(wheel()?.library);
    path.is_file().then_some(path)
}

/// Gets the library.
///
/// # Errors
/// Where there is no wheel for this system, no Python with pip, or no way to the package index.
pub(crate) fn install() -> Result<(), String> {
    let Some(wheel) = wheel() else {
        return Err(format!("no wheel for {} on {}", std::env::consts::OS, std::env::consts::ARCH));
    };
    let Some(python) =
        ["python3", "python"].into_iter().find(|p| shell::probe(&[p, "-m", "pip", "--version"]).is_some())
    else {
        return Err(
            "no Python 3 with pip is found to get it with; install them, or name the library in ORT_DYLIB_PATH"
                .to_owned(),
        );
    };
    let folder = folder();
    let temporary = folder.with_extension("partial");
    // Left behind by a run that was stopped.
    let _ = fs::remove_dir_all(&temporary);
    let outcome = download(wheel, python, &temporary, &folder.join(wheel.library));
    // The rest of the wheel, or what there is of it; and the folder above if nothing else is in it.
    let _ = fs::remove_dir_all(&temporary);
    if let Some(parent) = temporary.parent() {
        let _ = fs::remove_dir(parent);
    }
    outcome
}

/// Gets the wheel into the folder `temporary` and moves the library out of it.
fn download(wheel: &Wheel, python: &str, temporary: &Path, library: &Path) -> Result<(), String> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let failed = |what: &Path, error: std::io::Error| format!("cannot write {}: {error}", what.display());
    fs::create_dir_all(temporary).map_err(|error| failed(temporary, error))?;
    let requirements = temporary.join("requirements.txt");
    fs::write(&requirements, format!("onnxruntime=={VERSION} --hash=sha256:{}\n", wheel.sha256))
        .map_err(|error| failed(&requirements, error))?;
    let (requirements, target) = (text(&requirements), text(temporary));
    shell::run(
        &[
            python,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--retries=2",
            "--require-hashes",
            "--only-binary=:all:",
            "--no-deps",
            "--implementation=cp",
            "--python-version=3.12",
            "--abi=cp312",
            "--platform",
            wheel.platform,
            "--dest",
            &target,
            "--requirement",
            &requirements,
        ],
        &[],
    )?;
    let archive = format!("onnxruntime-{VERSION}-cp312-cp312-{}.whl", wheel.platform);
    shell::run(&[python, "-m", "zipfile", "-e", &text(&temporary.join(archive)), &target], &[])?;
    if let Some(folder) = library.parent() {
        fs::create_dir_all(folder).map_err(|error| failed(folder, error))?;
    }
    fs::rename(temporary.join("onnxruntime/capi").join(wheel.library), library)
        .map_err(|error| failed(library, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wheel_is_pinned() {
        for wheel in &WHEELS {
            assert_eq!(wheel.sha256.len(), 64, "{}", wheel.platform);
            assert!(wheel.sha256.bytes().all(|b| b.is_ascii_hexdigit()), "{}", wheel.platform);
            assert!(wheel.library.contains(VERSION) || wheel.os == "windows", "{}", wheel.platform);
        }
        let mut hashes: Vec<_> = WHEELS.iter().map(|w| w.sha256).collect();
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), WHEELS.len());
    }
}
