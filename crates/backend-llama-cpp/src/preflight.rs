//! Who loads a model, and that a GGUF file is checked before llama.cpp sees it.

use std::path::{Path, PathBuf};

use ternion_core::Result;
use ternion_formats::gguf::{self, TensorType};

/// Who loads a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Loader {
    /// Ternion reads a checkpoint, and makes llama.cpp's model of it.
    Ternion,
    /// llama.cpp reads this file.
    LlamaCpp(PathBuf),
}

/// Decides who loads what is at `path`. A file that llama.cpp is to load has been checked then; this is the one place where
/// that is done.
///
/// # Errors
/// Those of reading a GGUF file's metadata and of [`gguf::preflight`].
pub(crate) fn loader(path: &Path) -> Result<Loader> {
    let Some(path) = ternion_formats::gguf_file(path)? else { return Ok(Loader::Ternion) };
    let file = gguf::File::open(&path)?;
    let ternary = [TensorType::I2S, TensorType::Tq1_0, TensorType::Tq2_0];
    if file.architecture()?.starts_with("bitnet") || file.tensors().iter().any(|t| ternary.contains(&t.kind))
    {
        return Ok(Loader::Ternion);
    }
    gguf::preflight(&file)?;
    Ok(Loader::LlamaCpp(path))
}
