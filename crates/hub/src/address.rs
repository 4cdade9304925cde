//! Addresses of models on the hub: `hf://owner/name[@revision][/file-or-folder]`.

use std::{fmt, path::Path, str::FromStr};

use ternion_core::{Error, Result};

/// What an address begins with.
const SCHEME: &str = "hf://";

/// The revision where an address names none.
pub(crate) const DEFAULT_REVISION: &str = "main";

/// A model on the hub, or a file or folder of it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Address {
    /// The repository: `owner/name`, or a name alone.
    pub repo: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// A file or folder in the repository. `None`: the repository's model.
    pub path: Option<String>,
}

impl Address {
    /// Whether a path is an address of the hub rather than a place in the file system.
    pub fn is_one(path: &Path) -> bool {
        path.to_str().is_some_and(|text| text.starts_with(SCHEME))
    }

    /// The address that a path stands for; `None` for a place in the file system.
    ///
    /// # Errors
    /// As [`from_str`](Self::from_str), for a path that begins with `hf://`.
    pub fn of_path(path: &Path) -> Result<Option<Self>> {
        if !Self::is_one(path) {
            return Ok(None);
        }
        path.to_str().map(str::parse).transpose()
    }

    /// Whether the revision is a commit, which never changes.
    pub(crate) fn is_pinned(&self) -> bool {
        is_commit(&self.revision)
    }
}

impl FromStr for Address {
    type Err = Error;

    /// # Errors
    /// [`InvalidConfig`](ternion_core::ErrorKind::InvalidConfig) with what is wrong.
    fn from_str(text: &str) -> Result<Self> {
        let invalid = |why: &str| {
            Error::invalid_config(format!("{why}; expected hf://owner/name[@revision][/file-or-folder]"))
                .with("address", text)
        };
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| invalid("no address of the hub"))?;
        let mut parts = rest.trim_end_matches('/').splitn(3, '/');
        let owner = parts.next().unwrap_or_default();
        let named = parts.next().ok_or_else(|| invalid("the repository has no owner"))?;
        let path = parts.next().map(str::to_owned);
        // A revision may have slashes itself (`refs/pr/1`). They are written as %2F, as in the hub's own addresses.
        let (name, revision) = match named.split_once('@') {
            Some((name, revision)) => (name, revision.replace("%2F", "/").replace("%2f", "/")),
            None => (named, DEFAULT_REVISION.to_owned()),
        };
        if !is_repo_part(owner) || !is_repo_part(name) {
            return Err(invalid("owner and name have letters, digits, `-`, `_` and `.` alone"));
        }
        if !is_safe_path(&revision) {
            return Err(invalid("the revision is no name of a branch, tag or commit"));
        }
        if path.as_deref().is_some_and(|path| !is_safe_path(path)) {
            return Err(invalid("the file or folder is no relative path"));
        }
        Ok(Self { repo: format!("{owner}/{name}"), revision, path })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.repo)?;
        if self.revision != DEFAULT_REVISION {
            write!(f, "@{}", self.revision.replace('/', "%2F"))?;
        }
        match &self.path {
            Some(path) => write!(f, "/{path}"),
            None => Ok(()),
        }
    }
}

/// Whether a text is the full hash of a commit.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether a text can be the owner or the name of a repository. The cache joins both by `--`.
fn is_repo_part(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    !text.is_empty()
        && text.len() <= 96
        && text.bytes().all(plain)
        && !text.starts_with('.')
        && !text.contains("--")
}

/// Whether a name from an address or a server stays within the folder that it is joined to, on any system.
pub(crate) fn is_safe_path(text: &str) -> bool {
    let safe = |part: &str| !matches!(part, "" | "." | "..");
    text.len() <= 1024
        && text.split('/').all(safe)
        && !text.contains(|c: char| c.is_control() || matches!(c, '\\' | ':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        let parse = |text: &str| text.parse::<Address>().unwrap();
        let plain = parse("hf://microsoft/bitnet-b1.58-2B-4T/");
        assert_eq!((plain.repo.as_str(), plain.revision.as_str()), ("microsoft/bitnet-b1.58-2B-4T", "main"));
        assert_eq!(plain.path, None);
        for text in [
            "hf://a/b",
            "hf://a/b/c.gguf",
            "hf://a/b@v1.0",
            "hf://a/b@v1.0/onnx/model.onnx",
            "hf://a/b@refs%2Fpr%2F1/c.gguf",
        ] {
            assert_eq!(parse(text).to_string(), text);
        }
        assert_eq!(parse("hf://a/b@refs%2Fpr%2F1/c.gguf").revision, "refs/pr/1");
        assert!(parse("hf://a/b@0123456789012345678901234567890123456789").is_pinned());
        assert!(!plain.is_pinned());
        assert_eq!(Address::of_path(Path::new("models/a")).unwrap(), None);
        assert!(Address::of_path(Path::new("hf://a/b")).unwrap().is_some());
    }

    #[test]
    fn what_leaves_the_cache_is_refused() {
        for text in [
            "a/b",
            "hf://",
            "hf://a",
            "hf://a/",
            "hf:///b",
            "hf://a/..",
            "hf://../b",
            "hf://a/b@",
            "hf://a/b@../x",
            "hf://a/b/../c",
            "hf://a/b//c",
            "hf://a/b\\c",
            "hf://a/b/c:d",
            "hf://a--x/b",
            "hf://a/b?x",
            "hf://a/b/c\n",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }
}
