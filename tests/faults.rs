//! Faults from outside: files that another program changes while a model uses them, and listeners of the host that panic.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use ternion::config::{Config, ModelConfig};
use ternion::formats::{
    Checkpoint,
    convert::{Options, Target, convert},
};
use ternion::models::Models;
use ternion::registry::Progress;
use ternion::{Error, ErrorKind, Event, GenerateRequest, LlmBackend, LogitsRequest, Sampling};
use ternion_test_support::fixture;

/// A model in a folder of its own, and the file that its weights are mapped from.
struct Case {
    _folder: tempfile::TempDir,
    backend: &'static str,
    path: PathBuf,
    weights: PathBuf,
    memory_limit: Option<u64>,
    mmap: Option<bool>,
}

fn copied(source: &Path, target: &Path) {
    fs::create_dir_all(target).unwrap();
    for entry in fs::read_dir(source).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, target.join(path.file_name().unwrap())).unwrap();
        }
    }
}

impl Case {
    fn new(backend: &'static str, name: &str, weights: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        copied(&fixture(name), &path);
        let weights = path.join(weights);
        // A GGUF file is named itself: its folder holds the script that made it.
        let path = if weights.extension().is_some_and(|e| e == "gguf") { weights.clone() } else { path };
        Self { _folder: folder, backend, path, weights, memory_limit: None, mmap: None }
    }

    fn exported(target: Target) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let checkpoint = Checkpoint::open(fixture("nano-packed")).unwrap();
        convert(&checkpoint, &path, &Options::new(target), &mut |_, _| {}).unwrap();
        let weights = path.join("model.onnx.data");
        let (backend, memory_limit, mmap) = ("onnx", None, None);
        Self { _folder: folder, backend, path, weights, memory_limit, mmap }
    }

    fn config(&self) -> Config {
        let mut config = ModelConfig::for_path(&self.path);
        self.backend.clone_into(&mut config.backend);
        config.threads = Some(1);
        config.context_length = Some(256);
        config.mmap = self.mmap;
        config.memory_limit = self.memory_limit.map(ternion::config::ByteSize);
        Config::single("model", config)
    }

    async fn load(&self) -> Arc<dyn LlmBackend> {
        ternion::load(&self.config(), None).await.unwrap()
    }
}

fn all() -> Vec<Case> {
    let mut all = Vec::new();
    if cfg!(feature = "candle") {
        all.push(Case::new("candle", "nano-packed", "model.safetensors"));
        all.push(Case::new("candle", "gguf-llama", "model.gguf"));
        let mut limited = Case::new("candle", "nano-packed", "model.safetensors");
        limited.memory_limit = Some(1 << 32);
        all.push(limited);
    }
    if cfg!(feature = "llama-cpp") {
        all.push(Case::new("llama-cpp", "nano-packed", "model.safetensors"));
        all.push(Case::new("llama-cpp", "gguf-llama", "model.gguf"));
    }
    if cfg!(feature = "onnx") && std::env::var_os("ORT_DYLIB_PATH").is_some_and(|path| !path.is_empty()) {
        all.push(Case::exported(Target::OnnxFast));
        all.push(Case::exported(Target::Onnx));
    }
    all
}

/// Writes into a file without shortening it first, which could end this process while a model reads it.
fn overwrite(path: &Path, bytes: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all(bytes).unwrap();
}

async fn logits(model: &dyn LlmBackend, first: u32) -> Result<Vec<f32>, Error> {
    model.logits(LogitsRequest::new(vec![first, 7, 9])).await
}

fn refused(outcome: Result<Vec<f32>, Error>, case: &Case) {
    let error = outcome.unwrap_err();
    let said = error.to_string();
    assert_eq!(error.kind(), ErrorKind::InvalidModel, "{}: {said}", case.backend);
    let name = case.weights.file_name().unwrap().to_str().unwrap();
    for words in ["has changed while its model was in use", "renaming", "mmap = false", name] {
        assert!(said.contains(words), "{}: {said}", case.backend);
    }
}

/// Bytes of the second half of a file, which are weights, in the other order: the length stays, and so do codes.
fn turned(good: &[u8]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let middle = bytes.len() / 2;
    bytes[middle..].reverse();
    bytes
}

#[tokio::test]
async fn a_file_that_is_written_over_is_refused_before_it_is_used() {
    for case in all() {
        println!("{} {}", case.backend, case.weights.display());
        let model = case.load().await;
        let before = logits(&*model, 1).await.unwrap();
        let good = fs::read(&case.weights).unwrap();

        overwrite(&case.weights, &turned(&good));
        for first in [2, 1, 3] {
            refused(logits(&*model, first).await, &case);
        }
        // What was read before, and other times.
        overwrite(&case.weights, &good);
        assert_eq!(logits(&*model, 1).await.unwrap(), before);
        let other = SystemTime::now() - Duration::from_secs(1000);
        File::options().write(true).open(&case.weights).unwrap().set_modified(other).unwrap();
        logits(&*model, 4).await.unwrap();

        // A read beyond the new end would kill this process.
        File::options().write(true).open(&case.weights).unwrap().set_len(5000).unwrap();
        refused(logits(&*model, 5).await, &case);
        fs::write(&case.weights, b"").unwrap();
        refused(logits(&*model, 6).await, &case);
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_file_that_is_replaced_by_renaming_is_used_on() {
    for case in all() {
        let model = case.load().await;
        let before = logits(&*model, 1).await.unwrap();
        let other = case.weights.with_extension("other");
        fs::write(&other, [7; 3000]).unwrap();
        fs::rename(&other, &case.weights).unwrap();
        let fresh = logits(&*model, 2).await.unwrap();
        assert_eq!(logits(&*model, 1).await.unwrap(), before, "{}", case.backend);
        fs::remove_file(&case.weights).unwrap();
        assert_eq!(logits(&*model, 2).await.unwrap(), fresh, "{}", case.backend);
    }
}

/// Within an answer too: what is computed while the file changes is not used.
#[tokio::test]
async fn an_answer_ends_with_an_error_where_the_file_changes() {
    for case in all() {
        let model = case.load().await;
        let mut request =
            GenerateRequest::new(vec![1, 2, 3]).with_max_tokens(240).with_sampling(Sampling::greedy());
        request.params.ignore_eos = true;
        let mut stream = model.generate(request).await.unwrap();
        while !matches!(stream.next().await.unwrap().unwrap(), Event::Token(_)) {}
        let good = fs::read(&case.weights).unwrap();
        overwrite(&case.weights, &turned(&good));
        let mut last = None;
        while let Some(event) = stream.next().await {
            last = Some(event);
        }
        let error = last.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidModel, "{}: {error}", case.backend);
    }
}

/// A reload sees that the files are others and loads them.
#[tokio::test]
async fn a_changed_model_is_loaded_anew() {
    for case in all() {
        let models = Models::new(case.config()).unwrap();
        let handle = models.get("model").await.unwrap();
        let before = logits(&handle, 1).await.unwrap();
        let bytes = fs::read(&case.weights).unwrap();
        let name = case.weights.to_str().unwrap();
        if name.ends_with(".safetensors") {
            // Another model of the same shape: the codes of one tensor turned round, in place.
            overwrite(&case.weights, &other_model(&bytes));
            refused(logits(&handle, 2).await, &case);
            models.reload_with(case.config()).await.unwrap();
            let after = logits(&handle, 1).await.unwrap();
            assert!(after != before && after.len() == before.len(), "{}", case.backend);
            let alone = case.load().await;
            assert_eq!(logits(&*alone, 1).await.unwrap(), after);
        }
    }
}

/// A safetensors file with the bytes of its first tensor of packed codes turned round.
fn other_model(good: &[u8]) -> Vec<u8> {
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let entries: Value = serde_json::from_slice(&good[8..header]).unwrap();
    let entry = entries.as_object().unwrap().values().find(|entry| entry["dtype"] == "U8").unwrap();
    let offset = |i: usize| header + entry["data_offsets"][i].as_u64().unwrap() as usize;
    let mut bytes = good.to_vec();
    bytes[offset(0)..offset(1)].reverse();
    bytes
}

#[tokio::test]
async fn a_model_in_memory_does_not_need_its_files() {
    for mut case in all().into_iter().filter(|case| case.memory_limit.is_none()) {
        let mapped = logits(&*case.load().await, 1).await.unwrap();
        case.mmap = Some(false);
        let model = case.load().await;
        assert_eq!(logits(&*model, 1).await.unwrap(), mapped, "{}", case.backend);
        let good = fs::read(&case.weights).unwrap();
        overwrite(&case.weights, &turned(&good));
        let fresh = logits(&*model, 2).await.unwrap();
        fs::write(&case.weights, b"short").unwrap();
        assert_eq!(logits(&*model, 1).await.unwrap(), mapped, "{}", case.backend);
        assert_eq!(logits(&*model, 2).await.unwrap(), fresh, "{}", case.backend);
    }
}

#[cfg(feature = "candle")]
#[tokio::test]
async fn a_limit_and_weights_in_memory_exclude_each_other() {
    let mut case = Case::new("candle", "nano-packed", "model.safetensors");
    (case.memory_limit, case.mmap) = (Some(1 << 32), Some(false));
    let error = ternion::load(&case.config(), None).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.to_string().contains("mmap: false together with `memory_limit`"), "{error}");
}

/// The same error on all engines, and the process lives.
#[tokio::test]
async fn a_listener_to_the_progress_of_loading_may_panic() {
    for case in all() {
        let listener = Progress::new(|_| panic!("the host's own bug"));
        let error = ternion::load_with_progress(&case.config(), None, listener).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Backend, "{}: {error}", case.backend);
        assert!(error.to_string().contains("loading panicked: the host's own bug"), "{error}");
        logits(&*case.load().await, 1).await.unwrap();
    }
}
