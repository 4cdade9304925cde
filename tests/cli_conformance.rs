//! `ternion conformance` as a person starts it: verdicts, exit codes, JSON, the page.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "cli/common.rs"]
mod common;

use std::path::Path;

use serde_json::Value;

use common::{failure, fixture, fixture_arg, json, stderr, stdout, success, ternion};

/// A configuration of the same checkpoint three times: as it is, as GGUF, and with a head in int8.
fn configuration(folder: &Path) -> String {
    let (packed, gguf) = (fixture("nano-packed"), folder.join("nano.gguf"));
    let arguments =
        ["convert", packed.to_str().unwrap(), "--to", "gguf-i2s", "--out", gguf.to_str().unwrap()];
    success(ternion(&arguments));
    let config = serde_json::json!({ "default_model": "packed", "models": {
        "packed": { "path": packed },
        "gguf": { "path": gguf },
        "int8": { "path": packed, "options": { "head": "int8" } },
    }});
    let path = folder.join("models.json");
    std::fs::write(&path, config.to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn one_checkpoint_in_two_formats_is_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let config = configuration(folder.path());
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (text, page) = (path("text.txt"), path("page.html"));
    std::fs::write(&text, "A week has seven days, and a year has fifty-two weeks and a day. ".repeat(8))
        .unwrap();

    let arguments = [
        "conformance",
        "--config",
        &config,
        "--name",
        "packed",
        "--name",
        "gguf",
        "--text",
        &text,
        "--html",
        &page,
    ];
    let printed = stdout(&success(ternion(&arguments)));
    for what in [
        "token ids",
        "rendered prompts",
        "chunk plans",
        "largest difference of logits",
        "greedy answers",
        "perplexity",
    ] {
        assert!(printed.contains(&format!("pass  {what}")), "{what}: {printed}");
    }
    assert!(!printed.contains("FAIL"), "{printed}");
    let page = std::fs::read_to_string(page).unwrap();
    assert_eq!(page.matches("</svg>").count(), 2, "a plot of the differences and one of the divergences");
}

#[test]
fn a_coarser_head_and_a_missing_template_are_differences() {
    let folder = tempfile::tempdir().unwrap();
    let config = configuration(folder.path());
    let models = ["conformance", "--config", &config, "--name", "packed", "--name", "int8"];
    let output = ternion(&[&models[..], &["--json"]].concat()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["passed"], false);
    let comparison = &report["comparisons"][0];
    assert!(comparison["logits"]["max"].as_f64().unwrap() > 0.0, "{comparison}");
    assert_eq!(comparison["logits"]["positions"].as_array().unwrap().len(), 128);
    assert_eq!(comparison["token_ids"]["equal"], comparison["token_ids"]["total"]);

    let bare = folder.path().join("bare");
    std::fs::create_dir(&bare).unwrap();
    for entry in std::fs::read_dir(fixture("nano-packed")).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() && entry.file_name() != "chat_template.jinja" {
            std::fs::copy(entry.path(), bare.join(entry.file_name())).unwrap();
        }
    }
    let tokenizer = bare.join("tokenizer_config.json");
    let mut value: Value = serde_json::from_slice(&std::fs::read(&tokenizer).unwrap()).unwrap();
    value.as_object_mut().unwrap().remove("chat_template");
    std::fs::write(&tokenizer, value.to_string()).unwrap();
    let templates =
        ["conformance", "--config", &fixture_arg("nano-packed"), "--config", bare.to_str().unwrap()];
    let output = ternion(&templates).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stdout(&output).contains("there is no chat template"), "{}", stdout(&output));

    let allowed =
        "--max-logit 2 --mean-logit 1 --mean-kl 0.01 --min-top1 0.9 --min-top5 0.9 --greedy-gap 0.5 --json";
    let allowed: Vec<&str> = allowed.split(' ').collect();
    assert_eq!(json(ternion(&[&models[..], &allowed].concat()))["passed"], true);
}

#[test]
fn one_model_alone_is_tried_on_the_contract() {
    let report = json(ternion(&["conformance", "--config", &fixture_arg("nano-packed"), "--json"]));
    assert_eq!(report["passed"], true);
    let checks = report["checks"].as_array().unwrap();
    let passed = checks.iter().filter(|check| check["outcome"] == "pass").count();
    assert!(passed > 40, "{passed} of {}", checks.len());
    assert!(checks.iter().all(|check| check["sentence"].as_str().is_some_and(|s| s.contains(": "))));
}

#[test]
fn what_cannot_be_compared_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let config = configuration(folder.path());
    let (nano, other) = (fixture("nano-packed"), fixture("llama-ternary"));
    let (nano, other) = (nano.to_str().unwrap(), other.to_str().unwrap());
    for (arguments, code, word) in [
        (&["--config", nano, "--config", other][..], 3, "vocabulary"),
        (&["--config", &config, "--name", "packed", "--name", "gguff"], 3, "did you mean `gguf`"),
        (&["--config", &config, "--config", nano, "--name", "packed"], 2, "--name"),
        (&["--config", "missing.toml", "--config", nano], 3, "missing.toml"),
        (&["--config", nano, "--config", nano, "--text", "missing.txt"], 2, "missing.txt"),
    ] {
        failure(ternion(&[&["conformance"], arguments].concat()), code, &[word]);
    }
}
