//! What the tests of this workspace share: where their data lies.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

/// The folder `fixtures` of the repository.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// A folder or file in `fixtures`.
pub fn fixture(name: &str) -> PathBuf {
    fixtures().join(name)
}

/// The folder with larger checkpoints and what transformers computes on them, which the variable `TERNION_ORACLE` names. Tests
/// that need it are skipped without it.
pub fn oracle() -> Option<PathBuf> {
    std::env::var_os("TERNION_ORACLE").map(PathBuf::from)
}

/// A model with weights in groups.
pub struct GroupedModel {
    /// The folder with its `golden.json` and what transformers computes.
    pub golden: PathBuf,
    /// Its checkpoints in the forms that are there: GGUF files and folders of safetensors, sorted by name.
    pub forms: Vec<PathBuf>,
}

/// The models with weights in groups in `fixtures`, and those in [`oracle`].
///
/// # Panics
/// If a folder cannot be read, or there are fewer models than the repository has.
pub fn grouped_models() -> Vec<GroupedModel> {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort();
        paths
    };
    let is_form = |path: &PathBuf| {
        path.extension().is_some_and(|e| e == "gguf") || path.join("model.safetensors").is_file()
    };
    let roots = [Some(fixtures()), oracle()];
    let folders = roots.iter().flatten().flat_map(|root| entries(root));
    let models: Vec<GroupedModel> = folders
        .filter(|folder| folder.join("hf/golden.json").is_file())
        .map(|folder| GroupedModel {
            golden: folder.join("hf"),
            forms: entries(&folder).into_iter().filter(is_form).collect(),
        })
        .collect();
    assert!(models.len() >= 2, "the fixtures are missing");
    models
}
