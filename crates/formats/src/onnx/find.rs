//! Which file in a folder is the model.

use std::path::{Path, PathBuf};

use ternion_core::{Error, ErrorKind, Result};

use crate::gguf_file;
use crate::locate::{CHECKPOINT_ENGINES, files_in, listed};

/// Names of a decoder, the preferred first: of one that takes and gives its past, then of one with both kinds of graph in
/// it, as optimum and transformers.js had it.
const STEMS: [&str; 2] = ["model", "decoder_model_merged"];

/// What the names of variants end with, from full precision down: a folder may hold only a smaller one.
const VARIANTS: [&str; 12] = [
    "",
    "_fp32",
    "_bf16",
    "_fp16",
    "_int8",
    "_uint8",
    "_quantized",
    "_q8f16",
    "_q4",
    "_q4f16",
    "_bnb4",
    "_q2f16",
];

/// The model's file in `folder`: the first of the names above, at the top or in a folder `onnx`; else `named`, which a
/// genai_config.json names; else the only .onnx file.
///
/// # Errors
/// [`NotFound`](ErrorKind::NotFound) where there is none, saying what is there instead;
/// [`Unsupported`](ErrorKind::Unsupported) for several files of other names.
pub(super) fn model(folder: &Path, named: Option<&Path>) -> Result<PathBuf> {
    if let Some(named) = named.filter(|file| file.is_file()) {
        return Ok(named.to_owned());
    }
    let folders = [folder.to_owned(), folder.join("onnx")];
    for variant in VARIANTS {
        for stem in STEMS {
            let name = format!("{stem}{variant}.onnx");
            if let Some(file) = folders.iter().map(|folder| folder.join(&name)).find(|file| file.is_file()) {
                if !variant.is_empty() {
                    tracing::info!(file = %file.display(), "the folder's variant of the highest precision is loaded");
                }
                return Ok(file);
            }
        }
    }
    let is_onnx = |file: &PathBuf| file.extension().is_some_and(|e| e.eq_ignore_ascii_case("onnx"));
    let mut others: Vec<PathBuf> =
        folders.iter().flat_map(|folder| files_in(folder).unwrap_or_default()).filter(is_onnx).collect();
    match others.len() {
        0 => Err(none(folder)),
        1 => Ok(others.remove(0)),
        count => Err(Error::unsupported(format!(
            "the folder holds {count} .onnx files and none of them is named model.onnx; name one of them: {}",
            listed(others.iter().map(PathBuf::as_path))
        ))
        .with("folder", folder.display())),
    }
}

fn none(folder: &Path) -> Error {
    let mut message = "the folder holds no model; expected model.onnx or decoder_model_merged.onnx, or one of their variants \
                       (_fp16, _quantized, _q4 ...), at the top or in a folder `onnx`"
        .to_owned();
    let safetensors = ["model.safetensors", "model.safetensors.index.json"];
    let found = match gguf_file(folder) {
        Ok(Some(file)) => Some(file),
        _ => safetensors.iter().map(|name| folder.join(name)).find(|file| file.is_file()),
    };
    if let Some(file) = found {
        message += &format!("; {} is for {CHECKPOINT_ENGINES}", listed([file.as_path()].into_iter()));
    }
    Error::new(ErrorKind::NotFound, message).with("folder", folder.display())
}
