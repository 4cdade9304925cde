//! The small trained model of `fixtures/ternion-tiny`: it answers, in every format and through every engine that is compiled
//! in it says the same and is as often right, and an engine that computes something else is measurably worse.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ternion::config::{Config, ModelConfig};
use ternion::engine::{ComputeThreads, Engine, EngineOptions};
use ternion::formats::convert::{Options, Target, convert};
use ternion::formats::{Activation, Checkpoint};
use ternion::{GenerateRequest, LlmBackend, Message, ModelInfo, Sampling};
use ternion_backend_candle::{Decoder, DecoderOptions};
use ternion_eval::{
    Agreement, Comparison, Evaluation, Kind, Metric, Model, Report, RunOptions, Settings, Task, evaluate,
};

const EXPECTED: [(&str, &str); 6] = [
    ("How many days are in a week?", "There are seven days in a week."),
    ("how many days does a week have", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("Hello", "Hello! How can I help you?"),
    ("Who are you?", "I am the tiny demo model of Ternion."),
    ("What is the capital of France?", "I am a very small model, and I do not know that."),
];

/// A task of `eval/`, its measure, and what the share of right answers is at least.
struct Skill {
    kind: Kind,
    path: &'static str,
    metric: &'static str,
    least: f64,
}

/// Held-out word problems, 5 examples before each, the right number after `####`: of 100 numbers one would be right by chance.
const PROBLEMS: Skill =
    Skill { kind: Kind::Gsm8k, path: "eval/gsm8k.jsonl", metric: "strict-match", least: 0.9 };

/// Held-out choices among four, likewise: one of four would be right by chance.
const CHOICES: Skill = Skill { kind: Kind::Mmlu, path: "eval/mmlu", metric: "acc", least: 0.7 };

fn fixture() -> PathBuf {
    ternion_test_support::fixture("ternion-tiny")
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

/// At most 100 items, of choices as many of each subject.
async fn evaluated(backend: Arc<dyn LlmBackend>, skill: &Skill) -> Evaluation {
    let settings = Settings { limit: Some(100), max_tokens: 100, ..Settings::default() };
    let task = Task::open(skill.kind, &fixture().join(skill.path), &settings).unwrap();
    let run = evaluate(&Model::new(backend).unwrap(), &task, RunOptions::default()).await.unwrap();
    let report = Report::new(&run);
    assert!(report.items >= 100 && report.items == report.total && report.fewer_shots == 0, "{report:?}");
    run
}

fn measure(run: &Evaluation, skill: &Skill) -> Metric {
    Report::new(run).metrics.into_iter().find(|metric| metric.name == skill.metric).unwrap()
}

/// The items that one of two models alone has right, and how probable that is where they are equally good.
fn compare(ours: &Evaluation, theirs: &Evaluation, skill: &Skill) -> Agreement {
    let comparison = Comparison::new(ours, theirs).unwrap();
    comparison.agreement.into_iter().find(|agreement| agreement.metric == skill.metric).unwrap()
}

/// Asserts that a model is as often right as the packed one through candle is, on the same items.
async fn expect_accuracy(backend: Arc<dyn LlmBackend>, what: &str) {
    for skill in [PROBLEMS, CHOICES] {
        let ours = evaluated(load(&fixture(), "candle").await.unwrap(), &skill).await;
        let theirs = evaluated(Arc::clone(&backend), &skill).await;
        let (expected, value) = (measure(&ours, &skill), measure(&theirs, &skill).value);
        let (low, high) = expected.interval.unwrap();
        let paired = compare(&ours, &theirs, &skill);
        let name = skill.kind.name();
        println!("{what}, {name}: {value}, candle {} ({low} to {high}), {paired:?}", expected.value);
        assert!((low..=high).contains(&value), "{what}, {name}: {value}, expected {low} to {high}");
        assert!(paired.p_value > 0.05, "{what}, {name}: {paired:?}");
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
    options.context_length = 512;
    let mut engine = EngineOptions::new(ModelInfo::new("mutant", "candle"));
    engine.eos_tokens.clone_from(&checkpoint.spec.eos);
    let decoder = Decoder::new(checkpoint, &ComputeThreads::default(), options).unwrap();
    Arc::new(Engine::start(Box::new(decoder), tokenizer, engine).unwrap())
}

#[tokio::test]
async fn it_knows_something() {
    for skill in [PROBLEMS, CHOICES] {
        let run = evaluated(load(&fixture(), "candle").await.unwrap(), &skill).await;
        let right = measure(&run, &skill);
        println!("{}: {} {:?}", skill.kind.name(), right.value, right.interval);
        assert!(right.value >= skill.least, "{}: {}", skill.kind.name(), right.value);
        for subject in Report::new(&run).subjects {
            println!("  {}: {} {:?}", subject.name, subject.value, subject.interval);
            assert!(subject.value >= skill.least, "{}: {}", subject.name, subject.value);
        }
    }
}

type Mutation = fn(&mut Checkpoint);

const MUTANTS: [(&str, Mutation); 4] = [
    ("SiLU", |c| c.spec.activation = Activation::Silu),
    ("no sub-norm of the attention", |c| c.layers.iter_mut().for_each(|l| l.attn_sub_norm = None)),
    ("no sub-norm of the feed-forward network", |c| c.layers.iter_mut().for_each(|l| l.ffn_sub_norm = None)),
    ("another rotary base", |c| c.spec.rope.theta = 10_000.0),
];

#[tokio::test]
async fn a_wrong_engine_foresees_measurably_worse() {
    let ours = foresight(mutant(|_| ())).await;
    for (what, mutate) in MUTANTS {
        let comparison = Comparison::new(&ours, &foresight(mutant(mutate)).await).unwrap();
        let better = comparison.perplexity.unwrap();
        println!("{what}: {better:?}");
        assert!(better.interval.unwrap().0 > 0.0, "{what}: {better:?}");
    }
}

#[tokio::test]
async fn a_wrong_engine_answers_measurably_worse() {
    let mut measurable = [0; MUTANTS.len()];
    for skill in [PROBLEMS, CHOICES] {
        let ours = evaluated(mutant(|_| ()), &skill).await;
        for ((what, mutate), measurable) in MUTANTS.iter().zip(&mut measurable) {
            let theirs = evaluated(mutant(mutate), &skill).await;
            let paired = compare(&ours, &theirs, &skill);
            println!("{what}, {}: {} {paired:?}", skill.kind.name(), measure(&theirs, &skill).value);
            assert!(paired.only_a >= paired.only_b, "{what}: {paired:?}");
            *measurable += usize::from(paired.p_value < 0.05);
        }
    }
    // A choice is one token: what changes each logit little changes few letters.
    assert!(measurable.iter().all(|count| *count > 0), "{measurable:?}");
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
            // The library is loaded at run time. The line goes past the harness, which would keep it to itself; `cargo xtask test`
            // counts such lines.
            Err(error) if std::env::var_os("ORT_DYLIB_PATH").is_none() => {
                use std::io::Write;
                let mut stdout = std::io::stdout();
                writeln!(stdout, "skipped: {error}").unwrap();
                return;
            }
            Err(error) => panic!("{target}: {error}"),
        }
    }
}
