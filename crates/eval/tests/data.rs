//! The layouts in which the data sets are distributed give the same items.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]
#![cfg(feature = "parquet")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use ternion_core::echo::{Echo, EchoOptions};
use ternion_eval::{Item, Kind, Model, Outcome, RunOptions, Settings, Task, Work, evaluate};

fn fixture(name: &str) -> PathBuf {
    ternion_test_support::fixture("eval").join(name)
}

fn model() -> Model {
    Model::new(Arc::new(Echo::new("echo", EchoOptions::default()))).unwrap()
}

fn items(path: &Path, settings: &Settings) -> Vec<Item> {
    Task::open(Kind::Gsm8k, path, settings).unwrap().items(&model()).unwrap()
}

#[test]
fn jsonl_and_parquet_and_the_file_itself_are_one_data_set() {
    let settings = Settings::default();
    let lines = items(&fixture("gsm8k"), &settings);
    assert_eq!(lines, items(&fixture("gsm8k/test.jsonl"), &settings));
    assert_eq!(lines, items(&fixture("gsm8k-parquet"), &settings));
    assert_eq!(lines, items(&fixture("gsm8k-parquet/main"), &settings));
    assert_eq!(lines, items(&fixture("gsm8k-parquet/main/test-00000-of-00001.parquet"), &settings));
    let folder = tempfile::tempdir().unwrap();
    fs::copy(fixture("gsm8k/train.jsonl"), folder.path().join("small_train.jsonl")).unwrap();
    fs::copy(fixture("gsm8k/test.jsonl"), folder.path().join("small.jsonl")).unwrap();
    assert_eq!(lines, items(&folder.path().join("small.jsonl"), &settings));
    // As the authors' repository has it.
    let inner = folder.path().join("grade_school_math/data");
    fs::create_dir_all(&inner).unwrap();
    for name in ["train.jsonl", "test.jsonl"] {
        fs::copy(fixture("gsm8k").join(name), inner.join(name)).unwrap();
    }
    assert_eq!(lines, items(folder.path(), &settings));
}

#[test]
fn a_limit_changes_no_prompt_and_a_seed_changes_all() {
    let all = items(&fixture("gsm8k"), &Settings::default());
    let limited = items(&fixture("gsm8k"), &Settings { limit: Some(2), ..Settings::default() });
    assert_eq!(limited, all[..2]);
    let other = items(&fixture("gsm8k"), &Settings { seed: 1, ..Settings::default() });
    assert!(all.iter().zip(&other).all(|(a, b)| a.work != b.work));
    let none = items(&fixture("gsm8k"), &Settings { shots: Some(0), ..Settings::default() });
    let Work::Generate { prompt, .. } = &none[0].work else { panic!() };
    assert!(prompt.text(5).starts_with("Question: A gardener") && prompt.shots.is_empty());
}

#[test]
fn a_folder_for_each_subject_is_one_data_set_too() {
    let folder = tempfile::tempdir().unwrap();
    for split in ["dev", "test"] {
        let name = format!("{split}-00000-of-00001.parquet");
        fs::create_dir_all(folder.path().join("some")).unwrap();
        fs::copy(fixture("mmlu-parquet/all").join(&name), folder.path().join("some").join(&name)).unwrap();
    }
    // With everything that it has read: its items need a model that scores.
    let id = |path: &Path| format!("{:?}", Task::open(Kind::Mmlu, path, &Settings::default()).unwrap());
    let expected = id(&fixture("mmlu"));
    assert_eq!(id(folder.path()), expected);
    assert_eq!(id(&fixture("mmlu-parquet")), expected);
    // The authors' archive has a folder `data` around it.
    let data = folder.path().join("archive/data");
    for split in ["dev", "test"] {
        fs::create_dir_all(data.join(split)).unwrap();
        for entry in fs::read_dir(fixture("mmlu").join(split)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, data.join(split).join(path.file_name().unwrap())).unwrap();
        }
    }
    assert_eq!(id(&folder.path().join("archive")), expected);
}

/// `make_answers.py` has asked lm-evaluation-harness's own filters and comparison.
#[tokio::test]
async fn answers_are_found_and_compared_as_lm_eval_does() {
    let cases: Vec<Value> = serde_json::from_slice(&fs::read(fixture("answers.json")).unwrap()).unwrap();
    assert!(cases.len() > 50);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("test.jsonl");
    for case in cases {
        let problem = serde_json::json!({"question": "?", "answer": case["gold"]});
        fs::write(&path, problem.to_string()).unwrap();
        let kind = if case["task"] == "gsm8k" { Kind::Gsm8k } else { Kind::Gsm8kCot };
        let task = Task::open(kind, &path, &Settings { shots: Some(0), ..Settings::default() }).unwrap();
        let mut options = EchoOptions::default();
        options.reply = case["text"].as_str().map(str::to_owned);
        let model = Model::new(Arc::new(Echo::new("echo", options))).unwrap();
        let run = evaluate(&model, &task, RunOptions::default()).await.unwrap();
        let Outcome::Generated { strict, flexible, strict_match, flexible_match, .. } =
            &run.records[0].outcome
        else {
            panic!()
        };
        let of = |right: &bool| Value::from(f64::from(u8::from(*right)));
        assert_eq!(case["found"]["strict-match"], **strict, "{case}");
        assert_eq!(case["found"]["flexible-extract"], **flexible, "{case}");
        assert_eq!(case["match"]["strict-match"], of(strict_match), "{case}");
        assert_eq!(case["match"]["flexible-extract"], of(flexible_match), "{case}");
    }
}
