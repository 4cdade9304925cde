//! `pin_threads`: threads stay on their CPUs on every engine, and compute the same as before.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ternion::config::{Config, ModelConfig};
use ternion::formats::Checkpoint;
use ternion::formats::convert::{Options, Target, convert};
use ternion::{ErrorKind, LlmBackend, LogitsRequest};
use ternion_kernels::allowed_cpus;
use ternion_test_support::fixture;

/// The CPUs of this process's threads that may use a single one.
fn pinned_cpus() -> BTreeSet<usize> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    // A thread may end meanwhile.
    let statuses = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok());
    let list = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        line.trim().parse().ok()
    };
    statuses.filter_map(list).collect()
}

async fn load(
    backend: &str,
    path: &Path,
    threads: Option<usize>,
    pinned: &str,
) -> ternion::Result<Arc<dyn LlmBackend>> {
    let mut config = ModelConfig::for_path(path);
    backend.clone_into(&mut config.backend);
    config.threads = threads;
    config.pin_threads = pinned.parse()?;
    ternion::load(&Config::single("pinned", config), None).await
}

async fn logits(model: &dyn LlmBackend) -> Vec<f32> {
    model.logits(LogitsRequest::new((1..40).collect::<Vec<u32>>())).await.unwrap()
}

/// The engines that are compiled in, each with a model. One is made in `folder`.
fn models(folder: &Path) -> Vec<(&'static str, PathBuf)> {
    let checkpoint = fixture("nano-packed");
    let mut models = vec![("candle", checkpoint.clone())];
    if cfg!(feature = "llama-cpp") {
        models.push(("llama-cpp", checkpoint.clone()));
    }
    if cfg!(feature = "onnx") {
        for (name, target) in [("fast", Target::OnnxFast), ("portable", Target::Onnx)] {
            let path = folder.join(name);
            let source = Checkpoint::open(&checkpoint).unwrap();
            convert(&source, &path, &Options::new(target), &mut |_, _| {}).unwrap();
            models.push(("onnx", path));
        }
    }
    models
}

/// One test, because threads of others would be counted.
#[tokio::test]
async fn threads_stay_on_their_cpus_and_compute_the_same() {
    let cpus = allowed_cpus().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let list = cpus.iter().rev().map(ToString::to_string).collect::<Vec<_>>().join(",");
    for (backend, path) in models(folder.path()) {
        let count = Some(cpus.len());
        let free = load(backend, &path, count, "false").await.unwrap();
        let expected = logits(free.as_ref()).await;
        drop(free);
        for pinned in ["true", &list] {
            let model = load(backend, &path, count, pinned).await.unwrap();
            assert_eq!(logits(model.as_ref()).await, expected, "{backend} {pinned}");
            let found = pinned_cpus();
            // The first thread is the caller's, who is let go after a pass.
            let others = cpus.len() - 1;
            assert!(found.len() >= others, "{backend} {pinned}: {found:?}");
            let unloaded = model.unloaded();
            drop(model);
            unloaded.await;
        }
        assert_eq!(allowed_cpus().unwrap(), cpus, "the thread that loads is let go");

        let last = cpus[cpus.len() - 1].to_string();
        let model = load(backend, &path, None, &last).await.unwrap();
        assert_eq!(logits(model.as_ref()).await.len(), expected.len());
        let error = load(backend, &path, None, "8000").await.map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(error.to_string().contains("may not use CPU 8000"), "{error}");
        let error = load(backend, &path, Some(cpus.len() + 1), "true").await.map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(error.to_string().contains("CPUs that `pin_threads` has"), "{error}");
    }
}
