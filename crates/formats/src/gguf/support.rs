//! Which engine runs a file.

use std::path::Path;

use ternion_core::{Error, ErrorKind};

use super::{File, TensorType, keys, preflight};

/// Ternion's own reader is the only one that computes these right.
fn is_ours_alone(file: &File) -> bool {
    // llama.cpp's graph of the architecture computes SiLU, whatever the model needs.
    let is_bitnet = file.architecture().is_ok_and(|name| name.starts_with("bitnet"));
    let is_ours = |kind: TensorType| kind == TensorType::I2S || kind.is_of_forks();
    is_bitnet || file.tensors().iter().any(|tensor| is_ours(tensor.kind))
}

/// Who reads a file for the backend `llama-cpp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reader {
    /// [`Checkpoint`](crate::Checkpoint), and nothing else.
    Checkpoint,
    /// [`Checkpoint`](crate::Checkpoint) where it can, else llama.cpp: a ternary model of a family that Ternion knows.
    CheckpointOrLlamaCpp,
    /// llama.cpp.
    LlamaCpp,
}

impl Reader {
    /// Decides by the architecture and the element types.
    pub fn of(file: &File) -> Self {
        if is_ours_alone(file) {
            return Self::Checkpoint;
        }
        let is_ternary = file.tensors().iter().any(|t| t.kind.is_ternary() || t.kind.is_grouped());
        let architecture = file.string(keys::ARCHITECTURE).ok().flatten();
        let is_known = matches!(architecture, Some("llama" | "qwen3"));
        if is_ternary && is_known { Self::CheckpointOrLlamaCpp } else { Self::LlamaCpp }
    }
}

/// Adds to the reason why Ternion's reader does not take a file who may run it.
pub(super) fn with_engine(error: Error, file: &File) -> Error {
    let may_run = error.kind() == ErrorKind::Unsupported && !is_ours_alone(file) && preflight(file).is_ok();
    if may_run {
        error.with("runs with", "the backend `llama-cpp` (cargo feature `llama-cpp`)")
    } else {
        error
    }
}

/// Whether a GGUF file is a language model, or the first part of one, rather than a vision tower, an adapter or a later
/// part. A file that cannot be read counts, so that its error is told.
pub(crate) fn is_model(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return true };
    let is_later_part = file.integer(keys::SPLIT_INDEX, 1..=u64::MAX).is_ok_and(|index| index.is_some());
    let kind = file.string(keys::KIND).ok().flatten().unwrap_or("model");
    !is_later_part && kind == "model" && file.architecture().is_ok_and(|name| name != "clip")
}
