//! What the files of a model look like from outside, to see when they change.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Extensions of files that hold weights, tokenizers and templates, in whatever folder of a model.
const EXTENSIONS: [&str; 10] =
    ["safetensors", "gguf", "onnx", "onnx_data", "data", "bin", "npz", "model", "jinja", "tiktoken"];

/// Further files that tools write beside weights.
const NAMES: [&str; 15] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "quantize_config.json",
    "quantization_config.json",
    "genai_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
];

/// Folders of a model that have files of it, as some converters lay them out.
const FOLDERS: [&str; 2] = ["onnx", "additional_chat_templates"];

/// Names, sizes and times of the files that belong to a model. Others that lie beside them, such as the configuration
/// itself, a README or a log, do not count.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Files(Vec<(PathBuf, u64, Option<SystemTime>)>);

impl Files {
    /// Looks at the model's file or folder. What cannot be seen is left to the loading to report.
    pub(super) async fn look(path: Option<&Path>) -> Self {
        let Some(path) = path.map(Path::to_owned) else { return Self::default() };
        tokio::task::spawn_blocking(move || Self::look_now(&path)).await.unwrap_or_default()
    }

    fn look_now(path: &Path) -> Self {
        let paths = if path.is_dir() {
            let folders = FOLDERS.map(|name| path.join(name));
            let all = std::iter::once(path).chain(folders.iter().map(PathBuf::as_path)).flat_map(entries);
            all.filter(|path| belongs(path)).collect()
        } else {
            beside(path)
        };
        // Symbolic links are followed: that they point elsewhere now is a change too.
        let look = |path: PathBuf| {
            let metadata = std::fs::metadata(&path).ok().filter(std::fs::Metadata::is_file)?;
            Some((path, metadata.len(), metadata.modified().ok()))
        };
        let mut files: Vec<_> = paths.into_iter().filter_map(look).collect();
        files.sort();
        Self(files)
    }
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Whether a file in a model's folder is one of the model's.
fn belongs(path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default().to_ascii_lowercase();
    EXTENSIONS.contains(&extension.as_str()) || NAMES.contains(&name)
}

/// A model's file, and what belongs to it in its folder: the tokenizer and the configuration, the other parts of a model
/// in several files, and external data, whose names begin with that of the file. A GGUF file has all of that inside.
fn beside(path: &Path) -> Vec<PathBuf> {
    let mut files = vec![path.to_owned()];
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(OsStr::to_str)) else {
        return files;
    };
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    // `model-00001-of-00003.gguf`: the parts differ in the number.
    let series = stem.rsplit_once("-of-").and_then(|(before, _)| before.rsplit_once('-')).map(|(s, _)| s);
    let is_gguf = name.to_ascii_lowercase().ends_with(".gguf");
    files.extend(entries(folder).into_iter().filter(|other| {
        let Some(other_name) = other.file_name().and_then(OsStr::to_str) else { return false };
        let part = series.is_some_and(|series| {
            other_name.strip_prefix(series).is_some_and(|rest| rest.starts_with('-') && rest.contains("-of-"))
        });
        let data = other_name.starts_with(name) || (belongs(other) && external_data_of(stem, other_name));
        other.as_path() != path && (part || (!is_gguf && (data || NAMES.contains(&other_name))))
    }));
    files
}

/// Whether a name is that of the external data of a file with this stem, such as `model.onnx_data` or `model.data`.
fn external_data_of(stem: &str, name: &str) -> bool {
    name.strip_prefix(stem).is_some_and(|rest| rest.starts_with('.') && rest.ends_with("data"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(path: &Path) -> Vec<String> {
        let name = |(path, ..): &(PathBuf, u64, Option<SystemTime>)| {
            path.file_name().unwrap().to_str().unwrap().to_owned()
        };
        let mut names: Vec<_> = Files::look_now(path).0.iter().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn only_a_models_own_files_count() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("onnx")).unwrap();
        for name in [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "ternion.toml",
            "ternion.json",
            "README.md",
            "notes.txt",
            "log.jsonl",
            "onnx/model.onnx",
        ] {
            std::fs::write(folder.path().join(name), "x").unwrap();
        }
        let whole = ["config.json", "model.onnx", "model.safetensors", "tokenizer.json"];
        assert_eq!(seen(folder.path()), whole);
    }

    #[test]
    fn a_file_has_its_parts_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "a.onnx",
            "a.onnx_data",
            "a.onnx.data",
            "b.onnx",
            "b.onnx_data",
            "tokenizer.json",
            "m.gguf",
            "m2.gguf",
            "s-00001-of-00002.gguf",
            "s-00002-of-00002.gguf",
            "ternion.toml",
        ] {
            std::fs::write(folder.path().join(name), "x").unwrap();
        }
        let seen = |name: &str| seen(&folder.path().join(name));
        assert_eq!(seen("a.onnx"), ["a.onnx", "a.onnx.data", "a.onnx_data", "tokenizer.json"]);
        assert_eq!(seen("m.gguf"), ["m.gguf"]);
        assert_eq!(seen("s-00001-of-00002.gguf"), ["s-00001-of-00002.gguf", "s-00002-of-00002.gguf"]);
        assert!(seen("missing.gguf").is_empty());
    }
}
