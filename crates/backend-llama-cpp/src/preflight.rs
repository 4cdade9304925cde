//! Who loads a model, and what is checked of a GGUF file before llama.cpp sees it.

use std::{fs::File, io::Read, path::Path};

use ternion_core::{Error, Result};

/// Who loads a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loader {
    /// Ternion reads a checkpoint, and makes llama.cpp's model of it.
    Ternion,
    /// llama.cpp reads the file.
    LlamaCpp,
}

/// Decides who loads what is at `path`. A file that llama.cpp is to load has been checked then; this is the one place where
/// that is done.
///
/// # Errors
/// Those of [`check_gguf_file`].
pub(crate) fn loader(path: &Path) -> Result<Loader> {
    if !path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return Ok(Loader::Ternion);
    }
    check_gguf_file(path)?;
    Ok(Loader::LlamaCpp)
}

/// Checks the beginning of a GGUF file.
///
/// # Errors
/// [`NotFound`](ternion_core::ErrorKind::NotFound), [`Io`](ternion_core::ErrorKind::Io), and
/// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) for a file that is no GGUF file of version 2 or 3.
fn check_gguf_file(path: &Path) -> Result<()> {
    let invalid = |message: String| Error::invalid_model(message).with("file", path.display());
    // Asked before opening: opening a pipe would wait for its writer.
    if !std::fs::metadata(path).map_err(|e| Error::io(path, e))?.is_file() {
        return Err(invalid("is not a file, expected a regular file".to_owned()));
    }
    let mut header = [0; 8];
    let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
    file.read_exact(&mut header).map_err(|_| invalid("the file is shorter than a GGUF header".to_owned()))?;
    let [magic, version] = [&header[..4], &header[4..]];
    if magic != b"GGUF" {
        return Err(invalid(format!("the file begins with {magic:02x?}, expected `GGUF`")));
    }
    let version = version.iter().rev().fold(0u32, |v, byte| v << 8 | u32::from(*byte));
    if !(2..=3).contains(&version) {
        return Err(invalid(format!("the GGUF version is {version}, expected 2 or 3")));
    }
    Ok(())
}
