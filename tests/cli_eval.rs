//! `ternion eval`: its figures do not depend on how it is run, a run goes on where it was, and bad input is told in a line.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "cli/common.rs"]
mod common;

use std::fs;
use std::path::Path;

use common::{failure, fixture, fixture_arg, json, stderr, stdout, success, ternion, ternion_in};
use serde_json::Value;

/// A configuration of models that always answer the same, a word every few milliseconds.
fn canned(folder: &Path, models: &[(&str, &str, u32)]) -> String {
    let mut text = String::new();
    for (name, reply, delay) in models {
        text += &format!(
            "[models.{name}]\nbackend = \"echo\"\noptions = {{ reply = {reply:?}, delay_ms = {delay} }}\n"
        );
    }
    let path = folder.join("models.toml");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// `eval` of `fixtures/eval/DATA` as JSON, without what differs from run to run.
fn eval(task: &str, data: &str, args: &[&str]) -> Value {
    let data = fixture_arg(&format!("eval/{data}"));
    let mut report = json(ternion(&[&["eval", task, "--json", "--data", &data], args].concat()));
    report.as_object_mut().unwrap().remove("seconds");
    report
}

fn metric<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["metrics"].as_array().unwrap().iter().find(|m| m["name"] == name).unwrap()
}

#[test]
fn answers_are_extracted_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let config = canned(folder.path(), &[("right", "63 less 13 is $50.\n#### 50", 0)]);
    let report = eval("gsm8k", "gsm8k", &["--config", &config]);
    assert_eq!((report["items"].as_u64(), report["total"].as_u64()), (Some(4), Some(4)));
    for name in ["strict-match", "flexible-extract"] {
        let metric = metric(&report, name);
        assert_eq!((metric["value"].as_f64(), metric["stderr"].as_f64()), (Some(0.25), Some(0.25)));
        let interval = metric["interval"].as_array().unwrap();
        assert!(interval[0].as_f64().unwrap() < 0.06 && interval[1].as_f64().unwrap() > 0.6, "{interval:?}");
    }
    let data = fixture_arg("eval/gsm8k");
    let text = success(ternion(&["eval", "gsm8k", "--config", &config, "--data", &data, "--cot"]));
    assert!(
        stdout(&text).starts_with("gsm8k_cot, 8 shots: right (echo, none)\n4 items in "),
        "{}",
        stdout(&text)
    );
    assert!(stdout(&text).contains("flexible-extract   25.00 % ± 25.00"), "{}", stdout(&text));
}

#[test]
fn figures_do_not_depend_on_concurrency_and_format() {
    let model = fixture_arg("tiny-packed");
    let one = eval("mmlu", "mmlu", &["--model", &model, "--concurrency", "1"]);
    assert_eq!(one["items"], 7);
    assert_eq!(one["categories"].as_array().unwrap().len(), 2);
    assert_eq!(one, eval("mmlu", "mmlu", &["--model", &model, "--concurrency", "3"]));
    assert_eq!(one, eval("mmlu", "mmlu-parquet", &["--model", &model]));
    let part = eval("mmlu", "mmlu", &["--model", &model, "--subjects", "anatomy", "--limit", "1"]);
    assert_eq!((part["items"].as_u64(), part["subjects"][0]["name"].as_str()), (Some(1), Some("anatomy")));
}

#[test]
fn a_context_that_is_too_small_means_fewer_shots_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (fixture_arg("tiny-packed"), fixture_arg("eval/mmlu"));
    let args = [
        "eval",
        "mmlu",
        "--model",
        &model,
        "--data",
        &data,
        "--context-length",
        "200",
        "--records",
        "r.jsonl",
    ];
    let text = stdout(&success(ternion_in(folder.path(), &args)));
    assert!(text.contains("7 items had fewer shots: the context holds no more"), "{text}");
    let records = fs::read_to_string(folder.path().join("r.jsonl")).unwrap();
    for line in records.lines().skip(1) {
        let shots = serde_json::from_str::<Value>(line).unwrap()["shots"].as_u64().unwrap();
        assert!(shots < 5, "{line}");
    }
}

#[test]
fn a_run_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture_arg("tiny-packed");
    let records = folder.path().join("records.jsonl");
    let args = ["--model", &model, "--records", records.to_str().unwrap()];
    let first = eval("mmlu", "mmlu", &args);
    let whole = fs::read(&records).unwrap();
    // Killed while it wrote its fourth record.
    let ends: Vec<usize> = (0..whole.len()).filter(|&i| whole[i] == b'\n').collect();
    fs::write(&records, &whole[..ends[4] - 9]).unwrap();
    assert_eq!(eval("mmlu", "mmlu", &args), first);
    let lines = |bytes: &[u8]| {
        let mut lines: Vec<_> = bytes.split(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
        lines.sort();
        lines
    };
    assert_eq!(lines(&fs::read(&records).unwrap()), lines(&whole));

    let data = fixture_arg("eval/mmlu");
    let again = ["eval", "mmlu", "--data", &data, "--model", &model, "--records", records.to_str().unwrap()];
    failure(
        ternion(&[&again[..], &["--shots", "4"]].concat()),
        2,
        &["another run", "shots is 5 there and 4"],
    );
    let other = fixture_arg("nano-packed");
    let args = ["eval", "mmlu", "--data", &data, "--model", &other, "--records", records.to_str().unwrap()];
    failure(ternion(&args), 2, &["another run", "records.jsonl"]);
}

#[test]
fn two_models_are_compared_item_by_item() {
    let folder = tempfile::tempdir().unwrap();
    let config = canned(folder.path(), &[("one", "#### 50", 0), ("other", "#### 5.", 0)]);
    let data = fixture_arg("eval/gsm8k");
    let args = ["eval", "gsm8k", "--config", &config, "--name", "one", "--name", "other", "--data", &data];
    let found = json(ternion(&[&args[..], &["--json"]].concat()));
    let strict = &found["comparison"]["agreement"][0];
    for (field, count) in [("both", 0), ("only_a", 1), ("only_b", 1), ("neither", 2), ("same_answer", 0)] {
        assert_eq!(strict[field], count, "{field}");
    }
    assert_eq!(strict["p_value"], 1.0);
    let text = stdout(&success(ternion(&args)));
    assert!(text.contains("gsm8k/0 (strict-match): A 50, B 5., right 50"), "{text}");
    assert!(text.contains("p = 1.0000: no difference beyond chance"), "{text}");
}

#[test]
fn texts_of_two_models_are_compared_in_pairs() {
    let (a, b) = (fixture_arg("tiny-packed"), fixture_arg("tiny-packed"));
    let args = ["--model", &a, "--model", &b, "--context-length", "64"];
    let found = eval("perplexity", "text", &args);
    let difference = &found["comparison"]["perplexity"];
    assert_eq!((difference["unit"].as_str(), difference["difference"].as_f64()), (Some("token"), Some(0.0)));
    assert!(difference["pairs"].as_u64().unwrap() > 3, "{difference}");
    assert_eq!(found["a"]["perplexity"], found["b"]["perplexity"]);
    assert!(found["a"]["perplexity"]["token_interval"].is_array());
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_with_the_report_so_far() {
    use std::process::{Command, Stdio};
    let folder = tempfile::tempdir().unwrap();
    let config = canned(folder.path(), &[("slow", "a word and a word and a word #### 50", 60)]);
    let records = folder.path().join("r.jsonl");
    let data = fixture_arg("eval/gsm8k");
    let args =
        ["eval", "gsm8k", "--json", "--config", &config, "--data", &data, "--concurrency", "1", "--records"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_ternion"))
        .args(args)
        .arg(&records)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let started = std::time::Instant::now();
    while fs::read_to_string(&records).map_or(0, |text| text.lines().count()) < 2 {
        assert!(child.try_wait().unwrap().is_none() && started.elapsed().as_secs() < 60);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["interrupted"], true);
    let done = report["items"].as_u64().unwrap();
    assert!((1..4).contains(&done), "{done}");
    let report = json(ternion(&[&args[..], &[records.to_str().unwrap()]].concat()));
    assert_eq!((report["items"].as_u64(), report["interrupted"].as_bool()), (Some(4), Some(false)));
}

/// The shell allows no more than a kilobyte or two in a file, which fails as a full disk does.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told_and_loses_nothing() {
    use std::process::Command;
    let folder = tempfile::tempdir().unwrap();
    let config = canned(folder.path(), &[("wordy", &"word ".repeat(120), 0)]);
    let data = fixture_arg("eval/gsm8k");
    let args = ["eval", "gsm8k", "--config", &config, "--data", &data, "--records", "r.jsonl"];
    let output = Command::new("sh")
        .args(["-c", "ulimit -f 2; trap '' XFSZ; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_ternion")])
        .args(args)
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    let said = stderr(&output);
    assert!(
        said.contains("a record cannot be written; the run can go on") && said.contains("r.jsonl"),
        "{said}"
    );
    let written = fs::read_to_string(folder.path().join("r.jsonl")).unwrap();
    assert!(
        written.ends_with('\n') && written.lines().all(|l| serde_json::from_str::<Value>(l).is_ok()),
        "{written}"
    );
    let text = stdout(&success(ternion_in(folder.path(), &args)));
    assert!(text.contains("4 items in"), "{text}");
}

#[test]
fn bad_data_is_told_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let config = canned(folder.path(), &[("echo", "#### 50", 0)]);
    let root = folder.path();
    let write = |name: &str, text: &str| {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    let gsm8k = |data: &str, code: i32, words: &[&str]| {
        failure(ternion_in(root, &["eval", "gsm8k", "--config", &config, "--data", data]), code, words);
    };
    gsm8k("none", 3, &["no such file or folder", "none"]);
    fs::create_dir(root.join("nothing")).unwrap();
    gsm8k("nothing", 3, &["no test.jsonl"]);
    write("columns/test.jsonl", "{\"q\": \"a\", \"answer\": \"b\"}\n");
    gsm8k("columns", 2, &["no column `question`", "q, answer", "test.jsonl", "row: 1"]);
    write(
        "unmarked/test.jsonl",
        "{\"question\": \"a\", \"answer\": \"#### 1\"}\n{\"question\": \"a\", \"answer\": \"5\"}\n",
    );
    gsm8k("unmarked", 2, &["no `#### `", "row: 2"]);
    write("empty/test.jsonl", "");
    gsm8k("empty", 2, &["is empty", "test.jsonl"]);
    write("broken/test.jsonl", "{\"question\": \"a\", \"answer\"\n");
    gsm8k("broken", 2, &["no JSON object", "row: 1"]);
    write("alone/test.jsonl", "{\"question\": \"a\", \"answer\": \"#### 1\"}\n");
    gsm8k("alone", 3, &["no train.jsonl", "0 shots"]);
    write("alone/train.jsonl", "{\"question\": \"a\", \"answer\": \"#### 1\"}\n");
    gsm8k("alone", 2, &["shots: 5 is out of range; there are 1"]);
    write("parquet/test-00000-of-00001.parquet", "PAR1 not really PAR1");
    gsm8k("parquet", 2, &["no parquet file", "test-00000-of-00001.parquet"]);
    let bytes = fs::read(fixture("eval/mmlu-parquet/all/test-00000-of-00001.parquet")).unwrap();
    fs::write(root.join("parquet/test-00000-of-00001.parquet"), &bytes[..bytes.len() - 40]).unwrap();
    gsm8k("parquet", 2, &["parquet file"]);
    fs::write(root.join("parquet/test-00000-of-00001.parquet"), &bytes).unwrap();
    gsm8k("parquet", 2, &["column `answer` is a number; a text expected", "row: 1"]);

    let model = fixture_arg("nano-packed");
    let mmlu = |args: &[&str], code: i32, words: &[&str]| {
        failure(ternion_in(root, &[&["eval", "mmlu", "--model", &model], args].concat()), code, words);
    };
    mmlu(&["--data", "nothing"], 3, &["no MMLU there", "test/SUBJECT_test.csv"]);
    write("mmlu/test/anatomy_test.csv", "q,a,b,c,d,A\n");
    mmlu(&["--data", "mmlu"], 2, &["`anatomy` has 0 questions in `dev`"]);
    mmlu(&["--data", "mmlu", "--subjects", "physics"], 2, &["no subject `physics`; there are anatomy"]);
    write("mmlu/dev/anatomy_dev.csv", "q,a,b,c,A\n");
    mmlu(&["--data", "mmlu"], 2, &["5 columns; 6 expected", "anatomy_dev.csv", "row: 1"]);
    write("mmlu/dev/anatomy_dev.csv", "q,a,b,c,d,E\n");
    mmlu(&["--data", "mmlu"], 2, &["A, B, C or D", "row: 1"]);
    failure(
        ternion_in(root, &["eval", "mmlu", "--config", &config, "--data", &fixture_arg("eval/mmlu")]),
        3,
        &["`echo` gives no log-probabilities"],
    );
    write("blank.txt", "");
    let args = ["eval", "perplexity", "--model", &model, "--data", "blank.txt"];
    failure(ternion_in(root, &args), 2, &["is empty", "blank.txt"]);
    fs::write(root.join("bytes.txt"), b"ab\xff").unwrap();
    let args = ["eval", "perplexity", "--model", &model, "--data", "bytes.txt"];
    failure(ternion_in(root, &args), 2, &["byte 2 is not UTF-8"]);
}
