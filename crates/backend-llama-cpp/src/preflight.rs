//! Who loads a model, and that a GGUF file is checked before llama.cpp sees it.

use std::path::{Path, PathBuf};

use ternion_core::Result;
use ternion_formats::gguf::{self, Reader};

/// Who loads a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Loader {
    /// Ternion reads a checkpoint, and makes llama.cpp's model of it.
    Ternion,
    /// As `Ternion`; llama.cpp reads this file where the checkpoint has something that Ternion does not implement.
    TernionOrLlamaCpp(PathBuf),
    /// llama.cpp reads this file.
    LlamaCpp(PathBuf),
}

/// Decides who loads what is at `path`.
///
/// # Errors
/// Those of reading a GGUF file's metadata.
pub(crate) fn loader(path: &Path) -> Result<Loader> {
    let Some(path) = ternion_formats::gguf_file(path)? else { return Ok(Loader::Ternion) };
    let file = gguf::File::open(&path)?.joined()?;
    Ok(match Reader::of(&file) {
        Reader::CheckpointOrLlamaCpp => Loader::TernionOrLlamaCpp(path),
        Reader::LlamaCpp => Loader::LlamaCpp(path),
        _ => Loader::Ternion,
    })
}

/// Checks a file that llama.cpp is to load.
///
/// # Errors
/// Those of reading a GGUF file's metadata and of [`gguf::preflight`].
pub(crate) fn check(path: &Path) -> Result<()> {
    gguf::preflight(&gguf::File::open(path)?.joined()?)
}
