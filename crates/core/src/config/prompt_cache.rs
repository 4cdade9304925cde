//! The prompt cache of a model.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ByteSize;

/// What the cache may take where nothing is said.
const MAX_SIZE: ByteSize = ByteSize(8_000_000_000);

/// The prompt cache of a model: a folder with the KV cache of prompts. A request whose beginning is there does not compute it again,
/// also after a restart. Answers are the same with and without. Models and processes may share a folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct PromptCacheConfig {
    /// The folder, which is made if it does not exist. A relative path is relative to the configuration file's folder. The files in
    /// it hold what was in prompts; only the user who runs the process can read them.
    pub path: PathBuf,
    /// The most that all models together may take there: a number of bytes, or a text such as `20GB`. What was used the longest time
    /// ago makes room. Left out: 8 GB. A token of BitNet 2B4T takes 154 kB, or 40 kB with `kv_type = "int8"`.
    #[serde(default = "max_size")]
    pub max_size: ByteSize,
}

impl PromptCacheConfig {
    /// A cache in this folder, with the size that is taken where nothing is said.
    pub fn in_folder(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), max_size: MAX_SIZE }
    }
}

fn max_size() -> ByteSize {
    MAX_SIZE
}
