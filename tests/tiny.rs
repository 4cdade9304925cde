//! The small trained model of `fixtures/ternion-tiny`: it answers, in every format and through every engine that is compiled
//! in it says the same and is as often right, and an engine that computes something else is measurably worse.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ternion::config::{Config, ModelConfig};
use ternion::engine::{Engine, EngineOptions};
use ternion::formats::convert::{Options, Target, convert};
use ternion::formats::{Activation, Checkpoint};
use ternion::{GenerateRequest, LlmBackend, Message, ModelInfo, Sampling};
use ternion_backend_candle::{Decoder, DecoderOptions};
use ternion_eval::{
    Comparison, Evaluation, Kind, Metric, Model, Report, RunOptions, Settings, Task, evaluate,
};

const EXPECTED: [(&str, &str); 6] = [
    ("How many days are in a week?", "There are seven days in a week."),
    ("how many days does a week have", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("Hello", "Hello! How can I help you?"),
    ("Who are you?", "I am the tiny demo model of Ternion."),
    ("What is the capital of France?", "I am a very small model, and I do not know that."),
];

/// What the share of right answers to word problems is at least; of 100 numbers one would be right by chance.
const RIGHT: f64 = 0.9;

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

/// Held-out word problems, 5 examples before each: the share with the right number after `####`.
async fn accuracy(backend: Arc<dyn LlmBackend>) -> Metric {
    let settings = Settings { limit: Some(100), max_tokens: 100, ..Settings::default() };
    let task = Task::open(Kind::Gsm8k, &fixture().join("eval/gsm8k.jsonl"), &settings).unwrap();
    let model = Model::new(backend).unwrap();
    let report = Report::new(&evaluate(&model, &task, RunOptions::default()).await.unwrap());
    assert_eq!((report.items, report.fewer_shots), (100, 0));
    report.metrics.into_iter().find(|metric| metric.name == "strict-match").unwrap()
}

/// Asserts that a model is as often right as the packed one through candle is.
async fn expect_accuracy(backend: Arc<dyn LlmBackend>, what: &str) {
    let ours = accuracy(load(&fixture(), "candle").await.unwrap()).await;
    let (low, high) = ours.interval.unwrap();
    let value = accuracy(backend).await.value;
    println!("{what}: {value}, candle {} ({low} to {high})", ours.value);
    assert!((low..=high).contains(&value), "{what}: {value}, expected {low} to {high}");
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
        expect_accuracy(model, &target.to_string()).await;
    }
}

/// The held-out word problems with their answers as a text, and how well a model foresees it.
async fn foresight(backend: Arc<dyn LlmBackend>) -> Evaluation {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("problems.txt");
    let problems = std::fs::read_to_string(fixture().join("eval/gsm8k.jsonl")).unwrap();
    let text = problems.lines().map(|line| {
        let item: serde_json::Value = serde_json::from_str(line).unwrap();
        let field = |name: &str| item[name].as_str().unwrap().to_owned();
        format!("Question: {}\nAnswer: {}\n\n", field("question"), field("answer"))
    });
    std::fs::write(&path, text.collect::<String>()).unwrap();
    let task = Task::open(Kind::Perplexity, &path, &Settings::default()).unwrap();
    evaluate(&Model::new(backend).unwrap(), &task, RunOptions::default()).await.unwrap()
}

/// The packed model through candle, changed.
fn mutant(mutate: impl Fn(&mut Checkpoint)) -> Arc<dyn LlmBackend> {
    let mut checkpoint = Checkpoint::open(fixture()).unwrap();
    mutate(&mut checkpoint);
    let tokenizer = checkpoint.tokenizer().unwrap();
    let mut options = DecoderOptions::new(&checkpoint.spec);
    options.context = 512;
    let mut engine = EngineOptions::new(ModelInfo::new("mutant", "candle"));
    engine.eos_tokens.clone_from(&checkpoint.spec.eos);
    let decoder = Decoder::new(checkpoint, Decoder::threads(0).unwrap(), options).unwrap();
    Arc::new(Engine::start(Box::new(decoder), tokenizer, engine).unwrap())
}

#[tokio::test]
async fn it_knows_something() {
    let right = accuracy(load(&fixture(), "candle").await.unwrap()).await;
    println!("right: {} {:?}", right.value, right.interval);
    assert!(right.value >= RIGHT, "{}", right.value);
}

type Mutation = fn(&mut Checkpoint);

#[tokio::test]
async fn a_wrong_engine_is_measurably_worse() {
    let ours = foresight(mutant(|_| ())).await;
    let mutants: [(&str, Mutation); 4] = [
        ("SiLU", |c| c.spec.activation = Activation::Silu),
        ("no sub-norm of the attention", |c| c.layers.iter_mut().for_each(|l| l.attn_sub_norm = None)),
        ("no sub-norm of the feed-forward network", |c| {
            c.layers.iter_mut().for_each(|l| l.ffn_sub_norm = None);
        }),
        ("another rotary base", |c| c.spec.rope.theta = 10_000.0),
    ];
    for (what, mutate) in mutants {
        let comparison = Comparison::new(&ours, &foresight(mutant(mutate)).await).unwrap();
        let better = comparison.perplexity.unwrap();
        println!("{what}: {better:?}");
        assert!(better.interval.unwrap().0 > 0.0, "{what}: {better:?}");
    }
}

#[cfg(feature = "llama-cpp")]
#[tokio::test]
async fn llama_cpp_says_the_same() {
    for target in [Target::GgufI2s, Target::GgufTq2] {
        let (_folder, path) = converted(target, "tiny.gguf");
        let model = load(&path, "llama-cpp").await.unwrap();
        expect_answers(&*model, &format!("llama.cpp, {target}")).await;
        expect_accuracy(model, &format!("llama.cpp, {target}")).await;
    }
}

#[cfg(feature = "onnx")]
#[tokio::test]
async fn onnx_says_the_same() {
    for target in [Target::Onnx, Target::OnnxFast] {
        let (_folder, path) = converted(target, "onnx");
        match load(&path, "onnx").await {
            Ok(model) => {
                expect_answers(&*model, &target.to_string()).await;
                expect_accuracy(model, &target.to_string()).await;
            }
            // The library is loaded at run time.
            Err(error) if std::env::var_os("ORT_DYLIB_PATH").is_none() => eprintln!("skipped: {error}"),
            Err(error) => panic!("{target}: {error}"),
        }
    }
}
