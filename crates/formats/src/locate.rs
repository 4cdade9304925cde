//! What a path means: the format of a file by its first bytes, and the model in a folder.
//!
//! Names decide nothing where content can: blobs of Ollama, Docker and the Hugging Face cache have hashes for names, and
//! downloads keep query strings in theirs.

use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use ternion_core::{Error, ErrorKind, Result};

use crate::gguf;

/// The engines that read checkpoints, for messages.
pub(crate) const CHECKPOINT_ENGINES: &str =
    "the backends `candle` and `llama-cpp` (cargo features of the same names)";
/// The engine that runs ONNX files, for messages.
pub(crate) const ONNX_ENGINE: &str = "the backend `onnx` (cargo feature `onnx`)";

/// How a file begins that Git LFS has not fetched.
pub(crate) const LFS_POINTER: &[u8] = b"version https://git-lfs";
pub(crate) const LFS_MESSAGE: &str =
    "the file is a pointer of Git LFS, not the data; fetch that with `git lfs pull`, or download the file";

/// Files in a folder that an error lists.
const LISTED: usize = 6;

/// The format of a file, as its first bytes tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    Gguf,
    Safetensors,
    Onnx,
    /// A few lines that Git LFS leaves in the place of a file that it has not fetched.
    LfsPointer,
    Other,
}

impl Content {
    /// Looks at the first bytes of a regular file; anything else, and what cannot be read, is `Other`.
    pub(crate) fn of(path: &Path) -> Self {
        // Asked before opening: opening a pipe would wait for its writer.
        if !path.is_file() {
            return Self::Other;
        }
        let mut bytes = Vec::new();
        match File::open(path).and_then(|file| file.take(64).read_to_end(&mut bytes)) {
            Ok(_) => Self::of_bytes(&bytes),
            Err(_) => Self::Other,
        }
    }

    fn of_bytes(bytes: &[u8]) -> Self {
        // A version follows, in either byte order; a text may begin with the same four letters.
        if let Some((b"GGUF", [0, 0, 0, _] | [_, 0, 0, 0])) =
            bytes.split_first_chunk::<4>().and_then(|(magic, rest)| Some((magic, rest.first_chunk::<4>()?)))
        {
            return Self::Gguf;
        }
        if bytes.starts_with(LFS_POINTER) {
            return Self::LfsPointer;
        }
        // The length of a JSON object, which follows.
        if let Some((length, [b'{', ..])) = bytes.split_first_chunk::<8>()
            && (2..1 << 32).contains(&u64::from_le_bytes(*length))
        {
            return Self::Safetensors;
        }
        // Protobuf: field 1 is the version of the format, field 2 the name of the writer, field 7 the graph.
        match bytes {
            [0x08, 1..=0x7f, 0x12 | 0x3a, ..] => Self::Onnx,
            _ => Self::Other,
        }
    }
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

/// The GGUF file that `path` means, if it means one: itself, whatever its name, or the one model in a folder.
///
/// A folder of a Hugging Face checkpoint (`config.json` with `model.safetensors` or its index) is no GGUF model, even
/// where it holds one too; other safetensors, such as adapters, do not count. Of the GGUF files in a folder those count
/// that are language models: no vision towers (`mmproj`), adapters or later parts of a split model.
///
/// # Errors
/// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for a folder with several models, naming them; those of
/// reading the folder.
pub fn gguf_file(path: &Path) -> Result<Option<PathBuf>> {
    if !path.is_dir() {
        let is_gguf = match Content::of(path) {
            Content::Gguf => true,
            Content::Safetensors => false,
            _ => has_extension(path, "gguf"),
        };
        return Ok(is_gguf.then(|| path.to_owned()));
    }
    let files = files_in(path)?;
    let is_gguf = |file: &&PathBuf| Content::of(file) == Content::Gguf || has_extension(file, "gguf");
    let mut found: Vec<&PathBuf> = files.iter().filter(is_gguf).collect();
    if is_hugging_face(path) {
        return Ok(None);
    }
    if found.len() > 1 {
        let models: Vec<&PathBuf> = found.iter().copied().filter(|file| gguf::is_model(file)).collect();
        if !models.is_empty() {
            found = models;
        }
    }
    match &found[..] {
        [] => Ok(None),
        [file] => Ok(Some((*file).clone())),
        several => Err(Error::unsupported(format!(
            "the folder holds {} GGUF files, expected one; name one of them: {}",
            several.len(),
            listed(several.iter().map(|file| file.as_path()))
        ))
        .with("folder", path.display())),
    }
}

/// Warns of other weights in the folder `path` than those that are loaded: the GGUF file `gguf`, or safetensors.
pub(crate) fn warn_of_others(path: &Path, gguf: Option<&Path>) {
    let files = if path.is_dir() { files_in(path).unwrap_or_default() } else { Vec::new() };
    let extension = if gguf.is_some() { "safetensors" } else { "gguf" };
    let Some(other) = files.iter().find(|file| has_extension(file, extension)) else { return };
    let other = other.display();
    if let Some(file) = gguf {
        let file = file.display();
        tracing::warn!(%file, %other, "the folder also holds safetensors, such as an adapter; they are not used");
    } else {
        tracing::warn!(%other, "the folder holds safetensors, which are loaded, and a GGUF file; name that file to run it");
    }
}

/// Whether the folder has what transformers would load.
fn is_hugging_face(folder: &Path) -> bool {
    let is_file = |name: &str| folder.join(name).is_file();
    is_file("config.json") && (is_file("model.safetensors") || is_file("model.safetensors.index.json"))
}

/// The regular files in a folder (links to such among them), sorted by name.
pub(crate) fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The names of some files, for a message.
pub(crate) fn listed<'a>(files: impl ExactSizeIterator<Item = &'a Path>) -> String {
    let count = files.len();
    let mut text = String::new();
    for (i, file) in files.take(LISTED).enumerate() {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        // Writing to a string cannot fail.
        let _ = write!(text, "{}`{name}`", if i == 0 { "" } else { ", " });
    }
    if count > LISTED {
        text.push_str(", ...");
    }
    text
}

/// The error for a folder without a model that this crate's [`Checkpoint`](crate::Checkpoint) reads: what it holds
/// instead, and what to do with it.
pub(crate) fn no_weights(folder: &Path) -> Error {
    let mut message = "the folder holds no weights, expected `model.safetensors`, `model.safetensors.index.json` or a .gguf \
                       file"
        .to_owned();
    let files = files_in(folder).unwrap_or_default();
    let with = |extension: &str| -> Vec<&Path> {
        files.iter().map(PathBuf::as_path).filter(|file| has_extension(file, extension)).collect()
    };
    let (safetensors, pickles) = (with("safetensors"), [with("bin"), with("pt"), with("pth")].concat());
    if let Some(snapshot) = snapshot(folder) {
        message += &format!("; it is an entry of the Hugging Face cache: name `{}`", snapshot.display());
    } else if !safetensors.is_empty() {
        message += &format!(
            "; it holds {}, which is no checkpoint of this layout: name a file to read it nevertheless",
            listed(safetensors.into_iter())
        );
    } else if let Some(model) = onnx_in(folder) {
        message += &format!("; it holds {}, which {ONNX_ENGINE} runs", listed([model.as_path()].into_iter()));
    } else if !pickles.is_empty() {
        message += &format!("; it holds {}: convert them to safetensors", listed(pickles.into_iter()));
    }
    Error::new(ErrorKind::NotFound, message).with("folder", folder.display())
}

/// The newest snapshot of a repository in the Hugging Face cache (`models--owner--name`), where `folder` is one.
fn snapshot(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder.join("snapshots");
    let main = std::fs::read_to_string(folder.join("refs/main")).ok();
    let named = main.map(|revision| snapshots.join(revision.trim())).filter(|path| path.is_dir());
    let any = || std::fs::read_dir(&snapshots).ok()?.flatten().map(|entry| entry.path()).find(|p| p.is_dir());
    named.or_else(any)
}

/// Whether `path` means a model in ONNX: a file, or a folder with one that has no weights in another format.
///
/// # Errors
/// Those of [`gguf_file`].
pub(crate) fn is_onnx(path: &Path) -> Result<bool> {
    if path.is_dir() {
        let has_others = gguf_file(path)?.is_some()
            || ["model.safetensors", "model.safetensors.index.json"]
                .iter()
                .any(|name| path.join(name).exists());
        return Ok(!has_others && onnx_in(path).is_some());
    }
    Ok(match Content::of(path) {
        Content::Onnx => true,
        Content::Other => has_extension(path, "onnx"),
        _ => false,
    })
}

/// An ONNX file in a folder or its folder `onnx`.
fn onnx_in(folder: &Path) -> Option<PathBuf> {
    [folder.to_owned(), folder.join("onnx")]
        .iter()
        .flat_map(|folder| files_in(folder).unwrap_or_default())
        .find(|file| has_extension(file, "onnx"))
}

/// The error for a file that is in none of the formats of a [`Checkpoint`](crate::Checkpoint).
pub(crate) fn not_readable(file: &Path) -> Error {
    let expected = "expected a folder, a GGUF file, a .safetensors file or a .safetensors.index.json";
    let message = match Content::of(file) {
        Content::LfsPointer => return Error::invalid_model(LFS_MESSAGE).with("file", file.display()),
        content if content == Content::Onnx || has_extension(file, "onnx") => {
            format!("is an ONNX file, which {ONNX_ENGINE} runs; {expected}")
        }
        _ => format!("is not a format that can be read; {expected}"),
    };
    Error::unsupported(message).with("file", file.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_by_their_first_bytes() {
        let safetensors = [&100u64.to_le_bytes()[..], b"{\"a\":"].concat();
        for (bytes, expected) in [
            (&b"GGUF\x03\0\0\0"[..], Content::Gguf),
            (&safetensors, Content::Safetensors),
            (b"\x08\x08\x12\x07pytorch", Content::Onnx),
            (b"\x08\x0a:\x80", Content::Onnx),
            (b"version https://git-lfs.github.com/spec/v1\n", Content::LfsPointer),
            (b"{\"metadata\": {}}", Content::Other),
            (b"<!DOCTYPE html>", Content::Other),
            (b"", Content::Other),
            (b"GGU", Content::Other),
            (b"GGUF models of", Content::Other),
        ] {
            assert_eq!(Content::of_bytes(bytes), expected, "{bytes:?}");
        }
    }

    #[test]
    fn lists_are_short() {
        let paths: Vec<PathBuf> = (0..9).map(|i| format!("x/{i}.gguf").into()).collect();
        let text = listed(paths.iter().map(PathBuf::as_path));
        assert_eq!(text, "`0.gguf`, `1.gguf`, `2.gguf`, `3.gguf`, `4.gguf`, `5.gguf`, ...");
    }
}
