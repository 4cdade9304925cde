//! What is checked of a GGUF file before llama.cpp sees it.

use std::{fs::File, io::Read, path::Path};

use ternion_core::{Error, Result};

/// Checks a file that llama.cpp is about to load; the one place where this is done.
///
/// # Errors
/// [`NotFound`](ternion_core::ErrorKind::NotFound), [`Io`](ternion_core::ErrorKind::Io), and
/// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) for a file that is no GGUF file of version 2 or 3.
pub(crate) fn check_gguf_file(path: &Path) -> Result<()> {
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
