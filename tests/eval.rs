//! The evaluation against lm-evaluation-harness: the same prompts byte for byte and the same scores, for the same model in
//! transformers. `crates/eval/tests/golden.py` has written what is compared with.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use serde::Deserialize;
use std::collections::BTreeMap;
use ternion::config::{Config, ModelConfig};
use ternion_eval::{
    Evaluation, Item, Kind, Model, Outcome, Record, Report, RunOptions, Settings, Task, Work, evaluate,
};
use ternion_test_support::fixture;

#[derive(Deserialize)]
struct Golden {
    checkpoint: String,
    max_length: usize,
    tasks: BTreeMap<String, GoldenTask>,
    /// Averages over MMLU's subjects.
    #[serde(default)]
    mmlu: BTreeMap<String, f64>,
}

#[derive(Deserialize)]
struct GoldenTask {
    scores: BTreeMap<String, f64>,
    items: Vec<GoldenItem>,
}

#[derive(Deserialize)]
struct GoldenItem {
    prompt: String,
    answer: Option<String>,
    #[serde(default)]
    filtered: BTreeMap<String, String>,
    #[serde(default)]
    continuations: Vec<String>,
    #[serde(default)]
    loglikelihoods: Vec<f64>,
    loglikelihood: Option<f64>,
}

fn golden(name: &str) -> Golden {
    serde_json::from_slice(&std::fs::read(fixture("eval").join(name)).unwrap()).unwrap()
}

/// The model of a golden file with a context of one more token, which is scored and not fed.
async fn model(golden: &Golden) -> Model {
    let folder = if golden.checkpoint == "dense" { "eval/dense" } else { &golden.checkpoint };
    let mut model = ModelConfig::for_path(fixture(folder));
    model.context_length = Some(golden.max_length + 1);
    let mut config = Config::default();
    config.models.insert("tiny".to_owned(), model);
    Model::new(ternion::load(&config, Some("tiny")).await.unwrap()).unwrap()
}

fn open(kind: Kind, data: &str) -> Task {
    Task::open(kind, &fixture("eval").join(data), &Settings::default()).unwrap()
}

async fn run(model: &Model, task: &Task) -> Evaluation {
    evaluate(model, task, RunOptions::default()).await.unwrap()
}

#[track_caller]
fn close(a: f64, b: f64, tolerance: f64, what: &str) {
    assert!((a - b).abs() <= tolerance, "{what}: {a} is not {b}");
}

fn prompt(item: &Item) -> String {
    match &item.work {
        Work::Generate { prompt, .. } | Work::Choose { prompt, .. } => prompt.text(prompt.shots.len()),
        _ => panic!("{} has no prompt", item.id),
    }
}

#[tokio::test]
async fn gsm8k_has_the_prompts_answers_and_scores_of_lm_eval() {
    let golden = golden("golden.json");
    let model = model(&golden).await;
    for (kind, name) in [(Kind::Gsm8k, "gsm8k"), (Kind::Gsm8kCot, "gsm8k_cot")] {
        let expected = &golden.tasks[name];
        let task = open(kind, "gsm8k");
        let items = task.items(&model).unwrap();
        assert_eq!(items.len(), expected.items.len());
        for (item, expected) in items.iter().zip(&expected.items) {
            assert_eq!(prompt(item), expected.prompt, "{}", item.id);
        }
        let run = run(&model, &task).await;
        for (record, expected) in run.records.iter().zip(&expected.items) {
            let Outcome::Generated { text, strict, flexible, .. } = &record.outcome else { panic!() };
            assert_eq!(Some(text), expected.answer.as_ref(), "{}", record.id);
            assert_eq!(*strict, expected.filtered["strict-match"]);
            assert_eq!(*flexible, expected.filtered["flexible-extract"]);
        }
        for metric in Report::new(&run).metrics {
            let name = &metric.name;
            close(metric.value, expected.scores[&format!("exact_match,{name}")], 1e-9, name);
            close(metric.stderr.unwrap(), expected.scores[&format!("exact_match_stderr,{name}")], 1e-9, name);
        }
    }
}

#[tokio::test]
async fn mmlu_has_the_prompts_loglikelihoods_and_scores_of_lm_eval() {
    let golden = golden("golden.json");
    let model = model(&golden).await;
    let task = open(Kind::Mmlu, "mmlu");
    let items = task.items(&model).unwrap();
    let run = run(&model, &task).await;
    let report = Report::new(&run);
    let mut compared = 0;
    for (name, expected) in golden.tasks.iter().filter(|(name, _)| name.starts_with("mmlu_")) {
        let subject = name.strip_prefix("mmlu_").unwrap();
        let of_subject = |group: &str| group == subject;
        let records: Vec<&Record> = run.records.iter().filter(|r| of_subject(&r.group)).collect();
        let items: Vec<&Item> = items.iter().filter(|i| of_subject(&i.group)).collect();
        assert_eq!(items.len(), expected.items.len());
        for ((item, record), expected) in items.iter().zip(records).zip(&expected.items) {
            assert_eq!(prompt(item), expected.prompt, "{}", item.id);
            assert_eq!(expected.continuations, [" A", " B", " C", " D"]);
            let Outcome::Chosen { loglikelihoods, .. } = &record.outcome else { panic!() };
            for (found, expected) in loglikelihoods.iter().zip(&expected.loglikelihoods) {
                close(*found, *expected, 1e-4, &item.id);
            }
            compared += 1;
        }
        let metric = report.subjects.iter().find(|s| s.name == subject).unwrap();
        close(metric.value, expected.scores["acc,none"], 1e-9, subject);
        close(metric.stderr.unwrap(), expected.scores["acc_stderr,none"], 1e-9, subject);
    }
    assert_eq!(compared, run.records.len());
    for (metric, name) in report.metrics.iter().zip(["acc", "mean"]) {
        close(metric.value, golden.mmlu[name], 1e-9, name);
        close(metric.stderr.unwrap(), golden.mmlu[&format!("{name}_stderr")], 1e-9, name);
    }
}

/// With the chat template the white space before the answer belongs to the continuation.
#[tokio::test]
async fn chats_have_the_loglikelihoods_of_lm_eval() {
    let golden = golden("golden-chat.json");
    let model = model(&golden).await;
    let settings = Settings { chat: true, ..Settings::default() };
    let task = Task::open(Kind::Mmlu, &fixture("eval/mmlu"), &settings).unwrap();
    let run = run(&model, &task).await;
    for (name, expected) in &golden.tasks {
        let subject = name.strip_prefix("mmlu_").unwrap();
        let records = run.records.iter().filter(|r| r.group == subject);
        let mut compared = 0;
        for (record, expected) in records.zip(&expected.items) {
            assert_eq!(expected.continuations, ["A", "B", "C", "D"]);
            let Outcome::Chosen { loglikelihoods, .. } = &record.outcome else { panic!() };
            for (found, expected) in loglikelihoods.iter().zip(&expected.loglikelihoods) {
                close(*found, *expected, 1e-4, &record.id);
            }
            compared += 1;
        }
        assert_eq!(compared, expected.items.len());
    }
}

/// A ternary model rounds activations to int8, and in prompts of hundreds of tokens some lie so near a tie that they fall
/// either way. Transformers in float32 differs from itself in float64 by what that is; so may we.
#[tokio::test]
async fn a_ternary_model_is_as_near_to_double_precision_as_transformers_is() {
    let (single, double) = (golden("golden-ternary.json"), golden("golden-ternary-double.json"));
    let model = model(&double).await;
    let run = run(&model, &open(Kind::Mmlu, "mmlu")).await;
    let (mut own, mut theirs) = (Vec::new(), Vec::new());
    for (name, expected) in &double.tasks {
        let subject = name.strip_prefix("mmlu_").unwrap();
        let records = run.records.iter().filter(|r| r.group == subject);
        for ((record, double), single) in records.zip(&expected.items).zip(&single.tasks[name].items) {
            let Outcome::Chosen { loglikelihoods, choice, .. } = &record.outcome else { panic!() };
            let best = |values: &[f64]| (0..4).max_by(|&a, &b| values[a].total_cmp(&values[b])).unwrap();
            assert_eq!(*choice, best(&double.loglikelihoods), "{}", record.id);
            let exact = &double.loglikelihoods;
            own.extend(loglikelihoods.iter().zip(exact).map(|(a, b)| (a - b).abs()));
            theirs.extend(single.loglikelihoods.iter().zip(exact).map(|(a, b)| (a - b).abs()));
        }
    }
    assert_eq!(own.len(), 28);
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    assert!(mean(&own) <= 1.5 * mean(&theirs), "{} and {}", mean(&own), mean(&theirs));
    // Where no activation falls the other way, nothing is left but the rounding of the result.
    let exact = own.iter().filter(|d| **d < 1e-4).count();
    assert!(exact >= 4, "{own:?}");
}

#[tokio::test]
async fn texts_have_the_loglikelihoods_and_perplexities_of_lm_eval() {
    // In one window each, and in windows of 63 tokens.
    for (name, windows) in [("golden.json", 2), ("golden-windows.json", 5)] {
        texts_are_those_of(&golden(name), windows).await;
    }
}

async fn texts_are_those_of(golden: &Golden, windows: usize) {
    let model = model(golden).await;
    let expected = &golden.tasks["text"];
    let run = run(&model, &open(Kind::Perplexity, "text")).await;
    assert!(run.records.len() >= windows, "{}", run.records.len());
    for (document, expected) in run.documents.iter().zip(&expected.items) {
        let windows = run.records.iter().filter(|r| r.group == document.name);
        let total = windows.map(|r| match r.outcome {
            Outcome::Scored { loglikelihood, .. } => loglikelihood,
            _ => panic!("{} is not scored", r.id),
        });
        close(total.sum(), expected.loglikelihood.unwrap(), 1e-3, &document.name);
    }
    let found = Report::new(&run).perplexity.unwrap();
    close(found.bits_per_byte, expected.scores["bits_per_byte,none"], 1e-4, "bits per byte");
    close(found.byte_perplexity, expected.scores["byte_perplexity,none"], 1e-3, "byte perplexity");
    close(found.word_perplexity.ln(), expected.scores["word_perplexity,none"].ln(), 1e-4, "word perplexity");
}
