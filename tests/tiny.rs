//! The small trained model of `fixtures/ternion-tiny`: it answers, and in every format and through every engine that is
//! compiled in it says the same.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ternion::config::{Config, ModelConfig};
use ternion::formats::Checkpoint;
use ternion::formats::convert::{Options, Target, convert};
use ternion::{GenerateRequest, LlmBackend, Message, Sampling};

const EXPECTED: [(&str, &str); 6] = [
    ("How many days are in a week?", "There are seven days in a week."),
    ("how many days does a week have", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("Hello", "Hello! How can I help you?"),
    ("Who are you?", "I am the tiny demo model of Ternion."),
    ("What is the capital of France?", "I am a very small model, and I do not know that."),
];

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/ternion-tiny")
}

async fn load(path: &Path, backend: &str) -> ternion::Result<Arc<dyn LlmBackend>> {
    let mut config = ModelConfig::for_path(path);
    config.backend = backend.into();
    ternion::load(&Config::single("tiny", config), None).await
}

async fn expect_answers(model: &dyn LlmBackend, what: &str) {
    for (question, expected) in EXPECTED {
        let request = GenerateRequest::chat([Message::user(question)])
            .with_sampling(Sampling::greedy())
            .with_max_tokens(40);
        let answer = model.generate(request).await.unwrap().collect().await.unwrap();
        assert_eq!(answer.text, expected, "{what}: {question}");
    }
}

/// The fixture in this format, in a folder that lives as long as it is wanted.
fn converted(target: Target, name: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    let checkpoint = Checkpoint::open(fixture()).unwrap();
    convert(&checkpoint, &path, &Options::new(target), &mut |_, _| {}).unwrap();
    (folder, path)
}

#[tokio::test]
async fn it_answers() {
    let model = load(&fixture(), "candle").await.unwrap();
    expect_answers(&*model, "packed").await;
}

#[tokio::test]
async fn gguf_says_the_same() {
    for target in [Target::GgufI2s, Target::GgufTq1, Target::GgufTq2] {
        let (_folder, path) = converted(target, "tiny.gguf");
        let model = load(&path, "candle").await.unwrap();
        expect_answers(&*model, &target.to_string()).await;
    }
}

#[cfg(feature = "llama-cpp")]
#[tokio::test]
async fn llama_cpp_says_the_same() {
    for target in [Target::GgufI2s, Target::GgufTq2] {
        let (_folder, path) = converted(target, "tiny.gguf");
        let model = load(&path, "llama-cpp").await.unwrap();
        expect_answers(&*model, &format!("llama.cpp, {target}")).await;
    }
}

#[cfg(feature = "onnx")]
#[tokio::test]
async fn onnx_says_the_same() {
    for target in [Target::Onnx, Target::OnnxFast] {
        let (_folder, path) = converted(target, "onnx");
        match load(&path, "onnx").await {
            Ok(model) => expect_answers(&*model, &target.to_string()).await,
            // The library is loaded at run time.
            Err(error) if std::env::var_os("ORT_DYLIB_PATH").is_none() => eprintln!("skipped: {error}"),
            Err(error) => panic!("{target}: {error}"),
        }
    }
}
