//! The contract of `LlmBackend`, kept by every backend: the same weights in three formats, and echo.
//!
//! The checkpoint is one of the fixtures. GGUF and ONNX are made of it here, so that the three engines run the same model
//! and are held to the same numbers, which transformers computed.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "oracle/cases.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod cases;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use ternion::formats::{
    Checkpoint,
    convert::{Options, Target, convert},
};
use ternion::{
    LlmBackend, Message, Result,
    config::{Config, ModelConfig, PromptCacheConfig},
};
use ternion_conformance::{Reference, Row, Suite};
use ternion_test_support::fixture;

const CONTEXT: usize = 256;
const SEQUENCES: usize = 3;

/// A model whose context the checks fill soon, with a short queue.
fn config(backend: &str, path: Option<&Path>) -> ModelConfig {
    let mut config = ModelConfig::for_path(path.unwrap_or(Path::new("")));
    config.path = path.map(Path::to_owned);
    backend.clone_into(&mut config.backend);
    config.context_length = Some(CONTEXT);
    config.max_sequences = Some(SEQUENCES);
    config.max_queued = Some(4);
    if path.is_some() {
        config.prefill_chunk = Some(32);
        config.threads = Some(1); // the backends run side by side
    }
    config
}

async fn load(config: &ModelConfig) -> Result<Arc<dyn LlmBackend>> {
    ternion::load(&Config::single("model", config.clone()), None).await
}

/// The same with a prompt cache in a folder of its own.
#[cfg(any(feature = "candle", feature = "llama-cpp", feature = "onnx"))]
fn saving(mut config: ModelConfig, folder: &Path, name: &str) -> ModelConfig {
    config.prompt_cache =
        Some(PromptCacheConfig::in_folder(folder.join("prompts").join(name.replace("::", "-"))));
    config
}

/// What transformers computed, where no activation lies near a rounding tie; the rest for its prompts alone.
fn references(checkpoint: &Path) -> Vec<Reference> {
    let mut references = Vec::new();
    for case in cases::cases(checkpoint) {
        let mut reference = Reference::new(case.name.as_str(), case.ids.clone());
        if let Some(messages) = case.golden.get("messages") {
            reference.messages = Some(serde_json::from_value::<Vec<Message>>(messages.clone()).unwrap());
        }
        if case.name == "natural" {
            reference.text = case.golden["text"].as_str().map(str::to_owned);
        }
        if case.strict {
            let vocab = case.logits.len() / case.ids.len();
            let rows = case.logits.chunks_exact(vocab).enumerate();
            reference.logits = rows.map(|(position, row)| Row { position, logits: row.to_vec() }).collect();
            if case.golden["greedy_strict"] == true {
                reference.greedy = cases::ids(&case.golden["greedy_f32"]);
            }
        }
        references.push(reference);
    }
    references
}

/// The checkpoint in another format, in a folder that lives as long as the tests.
#[cfg(any(feature = "llama-cpp", feature = "onnx"))]
fn converted(checkpoint: &Path, target: Target, out: PathBuf) -> PathBuf {
    convert(&Checkpoint::open(checkpoint).unwrap(), &out, &Options::new(target), &mut |_, _| {}).unwrap();
    out
}

/// Adds a backend that runs the checkpoint, wherever it lies.
#[cfg(any(feature = "candle", feature = "llama-cpp", feature = "onnx"))]
fn with(suite: Suite, name: &str, references: &[Reference], config: ModelConfig) -> Suite {
    suite.backend_with(name, references.to_vec(), async move || load(&config).await)
}

fn main() -> ExitCode {
    let echo = config("echo", None);
    let mut suite = Suite::new().backend("echo", async move || load(&echo).await);
    let folder = tempfile::tempdir().unwrap();
    // Squared ReLU with sub-norms and a BOS from the tokenizer; SiLU without sub-norms and a BOS from the template.
    for name in ["nano-packed", "llama-ternary"] {
        suite = engines(suite, name, folder.path());
    }
    #[cfg(feature = "dense")]
    {
        suite = dense(suite);
    }
    let code = suite.run();
    drop(folder); // Models may have read what is in it until now.
    code
}

/// candle-transformers: a model whose clones are sequences, and one of a single sequence.
#[cfg(feature = "dense")]
fn dense(mut suite: Suite) -> Suite {
    for (name, file, sequences) in [("dense", "qwen2", SEQUENCES), ("quantised", "qwen2/q8_0.gguf", 1)] {
        let mut config = config("candle", Some(&fixture("dense").join(file)));
        (config.context_length, config.max_sequences) = (Some(128), Some(sequences));
        suite = with(suite, &format!("{name}-qwen2::candle"), &[], config);
    }
    suite
}

/// All engines that are compiled in, on one checkpoint. What they need of it in other formats is put into `folder`.
#[allow(unused_mut, unused_variables, reason = "no engine may be compiled in")]
fn engines(mut suite: Suite, name: &str, folder: &Path) -> Suite {
    let checkpoint = fixture(name);
    let references = references(&checkpoint);
    #[cfg(feature = "candle")]
    {
        let test = format!("{name}::candle");
        let config = saving(config("candle", Some(&checkpoint)), folder, &test);
        suite = with(suite, &test, &references, config);
    }
    #[cfg(feature = "llama-cpp")]
    {
        let file = converted(&checkpoint, Target::GgufI2s, folder.join(name).with_extension("gguf"));
        let test = format!("{name}::llama-cpp");
        let config = saving(config("llama-cpp", Some(&file)), folder, &test);
        suite = with(suite, &test, &references, config);
    }
    #[cfg(feature = "onnx")]
    for (variant, target) in [("onnx", Target::Onnx), ("onnx-fast", Target::OnnxFast)] {
        let test = format!("{name}::{variant}");
        let path = converted(&checkpoint, target, folder.join(test.replace("::", "-")));
        suite = match ternion_backend_onnx::Library::load(None) {
            Ok(_) => {
                let config = saving(config("onnx", Some(&path)), folder, &test);
                with(suite, &test, &references, config)
            }
            Err(error) => {
                assert!(std::env::var_os("ORT_DYLIB_PATH").is_none(), "{error}");
                suite.skip(test, error.to_string())
            }
        };
    }
    suite
}
