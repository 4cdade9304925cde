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

use ternion::{
    LlmBackend, Message, Result,
    config::{Config, ModelConfig},
};
use ternion_conformance::{Reference, Row, Suite};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// A context that the checks fill soon, and a short queue.
async fn load(backend: &str, path: Option<&Path>) -> Result<Arc<dyn LlmBackend>> {
    let mut config = ModelConfig::for_path(path.unwrap_or(Path::new("")));
    config.path = path.map(Path::to_owned);
    config.backend = backend.to_owned();
    config.context = Some(256);
    config.max_sequences = Some(3);
    config.max_queued = Some(4);
    config.prefill_chunk = Some(32).filter(|_| path.is_some());
    config.threads = Some(1).filter(|_| path.is_some()); // the backends run side by side
    ternion::load(&Config::single("model", config), None).await
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

fn main() -> ExitCode {
    let suite = Suite::new().backend("echo", async || load("echo", None).await);
    let checkpoint = fixture("nano-packed");
    #[cfg(feature = "candle")]
    let suite = {
        let path = checkpoint.clone();
        let load = async move || load("candle", Some(&path)).await;
        suite.backend_with("candle", references(&checkpoint), load)
    };
    suite.run()
}
