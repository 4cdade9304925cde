//! The licences of what is linked into the Python package, as a text that goes into its wheel.
//!
//! `cargo tree` says which crates they are, and each has its texts in its folder. A crate without texts is taken under Apache 2.0 where
//! that is one of its licences, whose text is always the same; one without that needs an entry in [`STANDING_IN`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::shell;

/// Crates without texts of their own that are not under Apache 2.0, and the crate of the same authors whose texts hold for them.
const STANDING_IN: [(&str, &str); 1] = [("pulp-wasm-simd-flag", "pulp")];

/// What names of files with licences begin with.
const NAMES: [&str; 5] = ["license", "licence", "copying", "notice", "unlicense"];

/// The folder of the package, whose licences go into the wheel.
const PACKAGE: &str = "crates/python";

/// Where the texts are put for maturin, which takes them from within the package alone.
const FOLDER: &str = "licenses";

const THIRD_PARTY: &str = "THIRD-PARTY.txt";

/// A crate that is linked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Linked {
    name: String,
    version: String,
    license: String,
}

/// Writes the project's licences and those of all crates into the package's folder.
///
/// # Errors
/// For a crate without a text, and where files cannot be read or written.
pub(crate) fn write() -> Result<(), String> {
    let folder = shell::root().join(PACKAGE).join(FOLDER);
    let failed = |path: &Path, error| format!("cannot write {}: {error}", path.display());
    fs::create_dir_all(&folder).map_err(|error| failed(&folder, error))?;
    let mut files = vec![(THIRD_PARTY.to_owned(), third_party()?)];
    for name in ["LICENSE-APACHE", "LICENSE-MIT"] {
        files.push((name.to_owned(), read(&shell::root().join(name))?));
    }
    for (name, text) in files {
        let path = folder.join(name);
        fs::write(&path, text).map_err(|error| failed(&path, error))?;
    }
    Ok(())
}

/// Checks that a wheel has the texts.
///
/// # Errors
/// Naming what it lacks.
pub(crate) fn check(wheel: &Path) -> Result<(), String> {
    let wheel = wheel.display().to_string();
    let list = "import sys, zipfile\nfor name in zipfile.ZipFile(sys.argv[1]).namelist(): print(name)";
    let names = output(&["python", "-c", list, &wheel])?;
    for expected in [THIRD_PARTY, "LICENSE-APACHE", "LICENSE-MIT"] {
        let end = format!(".dist-info/licenses/{FOLDER}/{expected}");
        if !names.lines().any(|name| name.ends_with(&end)) {
            return Err(format!("{wheel} has no {end}"));
        }
    }
    Ok(())
}

/// One text with all licences. Crates that have the same text share it.
///
/// # Errors
/// For a crate without a text.
pub(crate) fn third_party() -> Result<String, String> {
    let crates = linked()?;
    let apache = read(&shell::root().join("LICENSE-APACHE"))?;
    let mut texts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut missing = Vec::new();
    for one in &crates {
        let title = format!("{} {} ({})", one.name, one.version, one.license);
        let mut own = texts_of(&folder_of(one)?)?;
        if own.is_empty() {
            let other = STANDING_IN.iter().find(|(name, _)| *name == one.name);
            own = match other.and_then(|(_, other)| crates.iter().find(|found| found.name == *other)) {
                Some(other) => texts_of(&folder_of(other)?)?,
                None if one.license.contains("Apache-2.0") => vec![apache.clone()],
                None => Vec::new(),
            };
        }
        if own.is_empty() {
            missing.push(title);
            continue;
        }
        for text in own {
            texts.entry(text).or_default().insert(title.clone());
        }
    }
    if !missing.is_empty() {
        return Err(format!("no text of a licence is found for {}", missing.join(", ")));
    }
    texts.entry(apache).or_default().insert("the standard library of Rust (MIT OR Apache-2.0)".to_owned());

    let line = "=".repeat(100);
    let mut all = format!(
        "The engine in this package is compiled from the crates below, each with its version and the licences that it names.\n\
         {} crates.\n",
        crates.len()
    );
    for (text, titles) in &texts {
        let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
        all.push_str(&format!("\n{line}\n{}\n{line}\n\n{}\n", titles.join("\n"), text.trim_end()));
    }
    Ok(all)
}

/// The crates that are linked into the package on this machine, those of the workspace left out.
fn linked() -> Result<BTreeSet<Linked>, String> {
    let package = ["cargo", "tree", "--locked", "--package=ternion-python", "--edges=normal,no-proc-macro"];
    let form = ["--prefix=none", "--format={p}\t{l}"];
    let crates: BTreeSet<Linked> = output(&[&package[..], &form].concat())?.lines().filter_map(one).collect();
    if crates.is_empty() { Err("`cargo tree` names no crates".to_owned()) } else { Ok(crates) }
}

/// A line such as `serde v1.0.229\tMIT OR Apache-2.0 (*)`; `None` for a crate of the workspace, which has a path.
fn one(line: &str) -> Option<Linked> {
    let (package, license) = line.split_once('\t')?;
    let mut words = package.split(' ');
    let (name, version) = (words.next()?, words.next()?.strip_prefix('v')?);
    if words.next().is_some() {
        return None;
    }
    let license = license.trim_end_matches(" (*)").to_owned();
    Some(Linked { name: name.to_owned(), version: version.to_owned(), license })
}

/// Where cargo has put the sources of a crate.
fn folder_of(one: &Linked) -> Result<PathBuf, String> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(std::env::home_dir()?.join(".cargo")));
    let sources = home.unwrap_or_default().join("registry").join("src");
    let name = format!("{}-{}", one.name, one.version);
    let registries = fs::read_dir(&sources).into_iter().flatten().flatten();
    let found = registries.map(|registry| registry.path().join(&name)).find(|folder| folder.is_dir());
    found.ok_or_else(|| format!("the sources of {name} are not in {}; run `cargo fetch`", sources.display()))
}

/// The texts of licences in a folder, and in folders of licences in it.
fn texts_of(folder: &Path) -> Result<Vec<String>, String> {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    entries.sort();
    let mut texts = Vec::new();
    for path in entries {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        // `license.rs` would be a source.
        if !NAMES.iter().any(|begin| name.starts_with(begin))
            || path.extension().is_some_and(|extension| extension == "rs")
        {
            continue;
        }
        if path.is_dir() {
            let inner = fs::read_dir(&path).into_iter().flatten().flatten().map(|e| e.path());
            for file in inner.filter(|file| file.is_file()) {
                texts.push(read(&file)?);
            }
        } else {
            texts.push(read(&path)?);
        }
    }
    Ok(texts)
}

/// A text, with the line ends of Unix.
fn read(path: &Path) -> Result<String, String> {
    let bytes = fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).replace("\r\n", "\n"))
}

/// All that a command prints.
fn output(words: &[&str]) -> Result<String, String> {
    let line = words.join(" ");
    let output = shell::command(words).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| format!("cannot start `{line}`: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("`{line}` failed ({})", output.status))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_are_read_from_the_tree() {
        let of = |name: &str, version: &str, license: &str| {
            Some(Linked { name: name.to_owned(), version: version.to_owned(), license: license.to_owned() })
        };
        assert_eq!(one("serde v1.0.229\tMIT OR Apache-2.0"), of("serde", "1.0.229", "MIT OR Apache-2.0"));
        assert_eq!(one("ahash v0.8.12\tMIT (*)"), of("ahash", "0.8.12", "MIT"));
        assert_eq!(one("ternion-core v0.1.0 (/work/crates/core)\tMIT OR Apache-2.0"), None);
        assert_eq!(one(""), None);
    }

    #[test]
    fn every_crate_has_a_licence_and_those_of_the_workspace_are_not_among_them() {
        let text = third_party().unwrap();
        for expected in [
            "\npyo3 ",
            "\ncandle-core ",
            "\ntokenizers ",
            "\nrustls-graviola ",
            "the standard library of Rust",
        ] {
            assert!(text.contains(expected), "{expected}");
        }
        assert!(!text.contains("ternion-core"));
        assert!(text.contains("Apache License") && text.contains("Permission is hereby granted"));
    }
}
