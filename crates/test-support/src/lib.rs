//! What the tests of this workspace share: where their data lies.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

/// The folder `fixtures` of the repository.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// A folder or file in `fixtures`.
pub fn fixture(name: &str) -> PathBuf {
    fixtures().join(name)
}

/// The folder with larger checkpoints and what transformers computes on them, which the variable `TERNION_ORACLE` names. Tests
/// that need it are skipped without it.
pub fn oracle() -> Option<PathBuf> {
    std::env::var_os("TERNION_ORACLE").map(PathBuf::from)
}
