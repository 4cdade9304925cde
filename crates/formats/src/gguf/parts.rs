//! Models that `llama-gguf-split` has split: `name-00001-of-00003.gguf` and so on. The first part has the metadata.

use std::path::{Path, PathBuf};

use ternion_core::{Error, ErrorKind, Result};

use super::file::duplicate;
use super::{File, keys};
use crate::SharedBytes;

const MAX_PARTS: u64 = 1 << 12;
const MAX_TENSORS: u64 = u32::MAX as u64;

/// The parts after the first, which `first` must be; none where the model is not split.
pub(super) fn others(first: &File, map: &mut dyn FnMut(&Path) -> Result<SharedBytes>) -> Result<Vec<File>> {
    let count = first.integer(keys::SPLIT_COUNT, 0..=MAX_PARTS)?.unwrap_or(0);
    if count <= 1 {
        return Ok(Vec::new());
    }
    if let index @ 1.. = first.integer(keys::SPLIT_INDEX, 0..=MAX_PARTS)?.unwrap_or(0) {
        return Err(Error::invalid_model(format!(
            "the file is part {} of {count}; name the first part, whose name ends with `-00001-of-{count:05}.gguf`",
            index + 1
        ))
        .with("file", first.path().display()));
    }
    let mut others = Vec::new();
    for (index, path) in part_paths(first, count)?.iter().enumerate().skip(1) {
        let part = map(path).and_then(|bytes| File::parse(&bytes, path));
        let part = part.map_err(|e| e.with("part", format!("{} of {count}", index + 1)))?;
        if part.integer(keys::SPLIT_INDEX, 0..=MAX_PARTS)? != Some(index as u64) {
            return Err(part.invalid(keys::SPLIT_INDEX, &index.to_string()));
        }
        others.push(part);
    }
    let tensors = || [first].into_iter().chain(&others).flat_map(File::tensors);
    if let Some((_, name)) = duplicate(tensors().map(|tensor| tensor.name.as_str())) {
        return Err(Error::invalid_model("the tensor occurs in two parts")
            .with("tensor", name)
            .with("file", first.path().display()));
    }
    let found = tensors().count() as u64;
    match first.integer(keys::SPLIT_TENSORS, 0..=MAX_TENSORS)? {
        Some(expected) if expected != found => {
            Err(first.invalid(keys::SPLIT_TENSORS, &format!("{found}, as many as the parts have")))
        }
        _ => Ok(others),
    }
}

fn part_paths(file: &File, count: u64) -> Result<Vec<PathBuf>> {
    let path = file.path();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let suffix = format!("-00001-of-{count:05}.gguf");
    let Some(prefix) = name.strip_suffix(&suffix) else {
        return Err(Error::new(
            ErrorKind::InvalidModel,
            format!("the file is the first of {count} parts, expected a name that ends with `{suffix}`"),
        )
        .with("file", path.display()));
    };
    Ok((1..=count)
        .map(|part| path.with_file_name(format!("{prefix}-{part:05}-of-{count:05}.gguf")))
        .collect())
}
