//! Programs of others, unchanged: `openai`, `lm-eval` and `pydantic-ai` of PyPI, which `cargo xtask setup` installs, and `curl`.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::{
    path::{Path, PathBuf},
    process::Output,
    sync::Arc,
};

use common::Running;
use serde_json::{Value, json};
use ternion::{
    LlmBackend, ScoreRequest,
    answer::{Reasoning, ReasoningTags, ToolFormat},
    config::ModelConfig,
};
use ternion_eval::{Kind, Model, Outcome, Report, RunOptions, Settings, Task, evaluate};
use ternion_server::ServerOptions;

/// The project's Python, if it has these modules.
fn python(modules: &str) -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools");
    let python =
        [tools.join("bin/python"), tools.join("Scripts/python.exe")].into_iter().find(|path| path.exists());
    let found = python.filter(|python| {
        let spec = format!(
            "import importlib.util as u, sys; sys.exit(not all(u.find_spec(m) for m in {modules:?}.split()))"
        );
        std::process::Command::new(python).args(["-c", &spec]).status().is_ok_and(|status| status.success())
    });
    if found.is_none() {
        // Past the test harness, which keeps the output of tests that pass.
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "skipped: no Python package {modules} in target/tools");
    }
    found
}

async fn run(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Output {
    let mut command = std::process::Command::new(program);
    command.args(args);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

async fn script(python: &Path, name: &str, args: &[&str]) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python").join(name);
    let output = run(python, &[&[path.to_str().unwrap()], args].concat()).await;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{err}\n{out}");
    serde_json::from_str(out.lines().last().unwrap_or_default())
        .unwrap_or_else(|error| panic!("{error}: {out}\n{err}"))
}

/// The small model, one that breaks in the middle of an answer, and one that thinks and calls a function.
async fn server() -> Running {
    let mut config = common::tiny();
    // Descriptions of tools are long.
    config.models.get_mut("tiny").unwrap().context_length = Some(1024);
    let echo = |options: Value| {
        let mut model = ModelConfig::default();
        "echo".clone_into(&mut model.backend);
        model.options.extend(options.as_object().unwrap().clone());
        model
    };
    config.models.insert("broken".to_owned(), echo(json!({ "fail": "backend", "fail_after": 2 })));
    let call = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Bern\"}}\n</tool_call>";
    let mut caller = echo(json!({ "reply": format!("<think>Where?</think>Let me see.\n{call}") }));
    caller.tool_format = Some(ToolFormat::Hermes);
    caller.reasoning = Some(Reasoning::Tags(ReasoningTags::new("<think>", "</think>")));
    config.models.insert("caller".to_owned(), caller);
    Running::start(config, ServerOptions::default()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_openai_works_unchanged() {
    let Some(python) = python("openai") else { return };
    let server = server().await;
    let said = script(&python, "openai_client.py", &[&server.url]).await;
    assert_eq!(said["models"], json!(["tiny", "broken", "caller"]));
}

/// Random weights in each form of calls: whatever the model would like to say, a call that has to come comes, and is valid.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_of_random_weights_are_valid_to_jsonschema() {
    let Some(python) = python("openai jsonschema") else { return };
    let mut config = common::config("");
    config.default_model = Some("hermes".to_owned());
    let forms = [
        ("hermes", Some(ToolFormat::Hermes)),
        ("xml", Some(ToolFormat::QwenXml)),
        ("llama3", Some(ToolFormat::Llama3)),
        ("mistral", Some(ToolFormat::Mistral)),
        // Described in the prompt, for a model without a form of its own.
        ("described", None),
    ];
    for (name, form) in forms {
        let mut model = ModelConfig::for_path(common::fixture("nano-packed"));
        (model.threads, model.context_length, model.tool_format) = (Some(1), Some(4096), form);
        config.models.insert(name.to_owned(), model);
    }
    let server = Running::start(config, ServerOptions::default()).await;
    let names: Vec<&str> = forms.iter().map(|(name, _)| *name).collect();
    let said = script(&python, "tool_calls.py", &[&[server.url.as_str()], &names[..]].concat()).await;
    for name in names {
        assert!(said["calls"][name].as_u64().unwrap() >= 20, "{said}");
    }
}

/// An agent framework whose answers have types.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_framework_works_unchanged() {
    let Some(python) = python("pydantic_ai openai") else { return };
    let mut config = common::tiny();
    let mut random = ModelConfig::for_path(common::fixture("nano-packed"));
    (random.threads, random.context_length) = (Some(1), Some(4096));
    random.tool_format = Some(ToolFormat::Hermes);
    config.models.insert("random".to_owned(), random);
    let server = Running::start(config, ServerOptions::default()).await;
    let said = script(&python, "agent.py", &[&server.url, "random", "tiny"]).await;
    assert_eq!(said["found"].as_array().unwrap().len(), 8, "{said}");
    assert_eq!(said["text"], "There are seven days in a week.", "{said}");
    assert!(said["pieces"].as_u64().unwrap() > 2, "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lm_eval_gets_the_scores_of_the_library() {
    let Some(python) = python("lm_eval aiohttp tenacity") else { return };
    let server = server().await;
    let model = server.models.get("tiny").await.unwrap();
    let tokenizer = model.tokenizer().unwrap();
    let pairs = [
        ["How many days are in a week?", " Seven."],
        ["How many days are in a week?", " A banana"],
        ["What is 1 + 1?", " 2"],
        ["The", " sun is hot, and the moon is cold."],
    ];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("requests.json");
    std::fs::write(&path, json!({ "pairs": pairs, "prompts": ["What is 1 + 1?"] }).to_string()).unwrap();
    let said = script(&python, "lm_eval_client.py", &[&server.url, path.to_str().unwrap()]).await;

    for (pair, found) in pairs.iter().zip(said["scores"].as_array().unwrap()) {
        let [context, continuation] = pair;
        // As the harness: both as one text, without special tokens.
        let context = tokenizer.encode(context, false).unwrap();
        let whole = tokenizer.encode(&format!("{}{continuation}", pair[0]), false).unwrap();
        let score = model.score(ScoreRequest::new(whole, context.len())).await.unwrap();
        let greedy = score.tokens.iter().all(|token| token.rank == 0);
        let expected = score.total();
        let difference = (found[0].as_f64().unwrap() - expected).abs();
        assert!(difference < 1e-9, "{pair:?}: {found}, {expected} expected");
        assert_eq!(found[1], json!(greedy), "{pair:?}");
    }
    assert!(said["texts"][0].is_string() && said["answers"][0].is_string(), "{said}");
}

/// The harness's own tasks through the server, and `ternion eval` beside the model: the same answers and the same scores.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lm_eval_and_the_own_evaluation_agree_on_the_bundled_data() {
    const LIMIT: usize = 6;
    let Some(python) = python("lm_eval aiohttp tenacity datasets transformers") else { return };
    let mut config = common::tiny();
    config.models.get_mut("tiny").unwrap().context_length = Some(1024);
    let server = Running::start(config, ServerOptions::default()).await;
    let data = common::fixture("ternion-tiny").join("eval");
    let limit = LIMIT.to_string();
    let said = script(&python, "lm_eval_tasks.py", &[&server.url, data.to_str().unwrap(), &limit]).await;

    let handle = server.models.get("tiny").await.unwrap();
    let model = Model::new(Arc::new(handle)).unwrap();
    let settings = Settings { limit: Some(LIMIT), ..Settings::default() };
    let mut compared = 0;
    for (kind, data) in [(Kind::Gsm8k, data.join("gsm8k.jsonl")), (Kind::Mmlu, data.join("mmlu"))] {
        let task = Task::open(kind, &data, &settings).unwrap();
        let own = evaluate(&model, &task, RunOptions::default()).await.unwrap();
        let report = Report::new(&own);
        assert_eq!((report.fewer_shots, report.truncated), (0, 0));
        for record in &own.records {
            let (group, number) = record.id.split_once('/').unwrap();
            let name = if kind == Kind::Mmlu { format!("mmlu_{group}") } else { group.to_owned() };
            let item = &said["items"][&name][number.parse::<usize>().unwrap()];
            match &record.outcome {
                Outcome::Generated { text, strict, flexible, .. } => {
                    assert_eq!(item["answer"], json!(text), "{}", record.id);
                    let filtered = json!({ "strict-match": strict, "flexible-extract": flexible });
                    assert_eq!(item["filtered"], filtered, "{}", record.id);
                }
                Outcome::Chosen { loglikelihoods, .. } => {
                    let theirs = item["loglikelihoods"].as_array().unwrap();
                    for (own, theirs) in loglikelihoods.iter().zip(theirs) {
                        let theirs = theirs.as_f64().unwrap();
                        assert!((own - theirs).abs() < 1e-9, "{}: {own} here, {theirs} there", record.id);
                    }
                }
                other => panic!("{}: {other:?}", record.id),
            }
            compared += 1;
        }
        if kind == Kind::Gsm8k {
            for metric in &report.metrics {
                let theirs = said["scores"]["gsm8k"][format!("exact_match,{}", metric.name)].as_f64();
                assert_eq!(Some(metric.value), theirs, "{}", metric.name);
            }
        }
        for subject in &report.subjects {
            let theirs = said["scores"][format!("mmlu_{}", subject.name)]["acc,none"].as_f64();
            assert_eq!(Some(subject.value), theirs, "{}", subject.name);
        }
    }
    assert_eq!(compared, 5 * LIMIT);
}

/// Hostile and merely odd requests, made from the document that the server gives of itself. Not all rules fit into that document,
/// so it is not asked which requests have to be refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn schemathesis_finds_no_broken_answer() {
    let Some(python) = python("schemathesis") else { return };
    let server = server().await;
    let folder = tempfile::tempdir().unwrap();
    let url = format!("{}/openapi.json", server.url);
    let words = [
        "-m",
        "schemathesis.cli",
        "run",
        &url,
        "--phases=examples,coverage,fuzzing",
        "--max-examples=20",
        "--seed=1",
        "--exclude-checks=positive_data_acceptance,negative_data_rejection",
        "--suppress-health-check=all",
        "--continue-on-failure",
        "--request-timeout=60",
        "--no-color",
    ];
    let mut command = std::process::Command::new(python);
    // It leaves a cache where it runs.
    command.args(words).current_dir(folder.path());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("generated"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_works_without_a_header() {
    if std::process::Command::new("curl").arg("--version").output().is_err() {
        return;
    }
    let server = server().await;
    let url = format!("{}/v1/chat/completions", server.url);
    let body =
        r#"{"messages": [{"role": "user", "content": "How many days are in a week?"}], "stream": true}"#;
    let output = run("curl", &["-sN", &url, "-d", body]).await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
}
