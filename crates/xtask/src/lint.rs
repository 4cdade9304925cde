//! `cargo xtask lint`: everything that is checked about the code without running it.
//!
//! All checks run even if an early one fails, so that one round shows all there is to mend.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::setup::Machine;
use crate::{setup, shell};

/// A source file longer than this holds more than one idea.
const MAX_LINES: usize = 700;

/// Everyone who clones the repository downloads the fixtures, and git keeps each version for ever.
const MAX_FIXTURE_BYTES: u64 = 20_000_000;

/// The folders with Rust sources.
const SOURCES: [&str; 4] = ["crates", "examples", "tests", "benches"];

/// Runs all checks.
///
/// # Errors
/// One message that lists every check that failed.
pub(crate) fn run() -> Result<(), String> {
    let machine = setup::run(setup::Scope::Lint)?;
    let checks =
        [formatting, clippy, least_features, documentation, dependencies, file_lengths, fixture_size];
    let failures: Vec<String> = checks.into_iter().filter_map(|check| check(machine).err()).collect();
    match failures.as_slice() {
        [] => Ok(()),
        [only] => Err(only.clone()),
        several => Err(format!("{} checks failed:\n  {}", several.len(), several.join("\n  "))),
    }
}

fn formatting(_: Machine) -> Result<(), String> {
    shell::run(&["cargo", "fmt", "--all", "--check"], &[])
}

fn clippy(machine: Machine) -> Result<(), String> {
    let words = [&["cargo", "clippy"], machine.selection(), &["--all-targets", "--", "-D", "warnings"]];
    shell::run(&words.concat(), &[])
}

/// The command as a newcomer builds it first, without its default features.
fn least_features(_: Machine) -> Result<(), String> {
    let words =
        ["cargo", "clippy", "--package", "ternion-cli", "--no-default-features", "--", "-D", "warnings"];
    shell::run(&words, &[])
}

/// Libraries only: the program and the facade are both called `ternion`, and their pages would overwrite each other.
fn documentation(machine: Machine) -> Result<(), String> {
    let words = [&["cargo", "doc", "--lib", "--no-deps"], machine.selection()];
    shell::run(&words.concat(), &[("RUSTDOCFLAGS", "-D warnings")])
}

/// Licences, advisories and sources of the dependencies; `setup` has said so if the tool for it is not there.
fn dependencies(_: Machine) -> Result<(), String> {
    if shell::probe(setup::CARGO_DENY).is_some() {
        shell::run(&["cargo", "deny", "check"], &[])
    } else {
        Ok(())
    }
}

fn file_lengths(_: Machine) -> Result<(), String> {
    let root = shell::root();
    let mut too_long = Vec::new();
    for folder in SOURCES {
        too_long.extend(longer_than(MAX_LINES, &root.join(folder))?);
    }
    if too_long.is_empty() {
        return Ok(());
    }
    let list = too_long
        .iter()
        .map(|(file, lines)| format!("{} ({lines})", file.strip_prefix(&root).unwrap_or(file).display()));
    Err(format!("more than {MAX_LINES} lines, split by idea: {}", list.collect::<Vec<_>>().join(", ")))
}

fn fixture_size(_: Machine) -> Result<(), String> {
    let bytes = size(&shell::root().join("fixtures"))?;
    if bytes < MAX_FIXTURE_BYTES {
        return Ok(());
    }
    Err(format!(
        "fixtures/ holds {bytes} bytes, fewer than {MAX_FIXTURE_BYTES} are allowed: use smaller models"
    ))
}

/// The Rust files below `folder` with more than `limit` lines, and how many they have.
fn longer_than(limit: usize, folder: &Path) -> Result<Vec<(PathBuf, usize)>, String> {
    let mut found = Vec::new();
    for file in files(folder)?.into_iter().filter(|file| file.extension().is_some_and(|end| end == "rs")) {
        let text = fs::read(&file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
        let lines = String::from_utf8_lossy(&text).lines().count();
        if lines > limit {
            found.push((file, lines));
        }
    }
    Ok(found)
}

/// Bytes in all files below `folder`.
fn size(folder: &Path) -> Result<u64, String> {
    files(folder)?.iter().try_fold(0, |sum, file| {
        let data = fs::metadata(file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
        Ok(sum + data.len())
    })
}

/// Every regular file below `folder`, sorted; none if there is no such folder. Hidden entries and build output are
/// left out, and links are not followed, so there is no cycle.
fn files(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let unreadable = |error: io::Error| format!("cannot read the folder {}: {error}", folder.display());
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.map_err(unreadable)?,
        };
        for entry in entries {
            let entry = entry.map_err(unreadable)?;
            let name = entry.file_name();
            if name == "target" || name.as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let kind = entry.file_type().map_err(unreadable)?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An empty folder for one test, removed at its end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("ternion-xtask-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn write(&self, file: &str, text: &str) -> PathBuf {
            let path = self.0.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            // A folder left behind in the system's temporary place harms nobody.
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn only_rust_files_above_the_limit_are_too_long() {
        let folder = Folder::new("lengths");
        folder.write("a/at_the_limit.rs", "1\n2\n3\n");
        let above = folder.write("a/b/above.rs", "1\n2\n3\n4");
        folder.write("a/data.json", "1\n2\n3\n4\n5\n");
        folder.write("target/generated.rs", "1\n2\n3\n4\n5\n");
        folder.write(".hidden/x.rs", "1\n2\n3\n4\n5\n");
        assert_eq!(longer_than(3, &folder.0), Ok(vec![(above, 4)]));
    }

    #[test]
    fn sizes_add_up_over_folders() {
        let folder = Folder::new("sizes");
        folder.write("one.bin", "12345");
        folder.write("deep/er/two.bin", "678");
        assert_eq!(size(&folder.0), Ok(8));
    }

    #[test]
    fn a_folder_that_is_not_there_is_empty() {
        assert_eq!(files(Path::new("no/such/folder")), Ok(Vec::new()));
    }
}
