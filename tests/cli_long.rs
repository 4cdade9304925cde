//! The `ternion` command with inputs that are longer than the context.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "cli/common.rs"]
mod common;

use std::path::Path;

use common::{failure, fixture_arg, json, stderr, stdout, success, ternion_in};
use serde_json::json;

fn sentences(count: usize) -> String {
    let sentences: Vec<String> =
        (0..count).map(|i| format!("Sentence {i} tells of the sky, 天空, which is blue.\n")).collect();
    sentences.concat()
}

/// The small model in a context of 192 tokens.
fn run(folder: &Path, args: &[&str]) -> assert_cmd::Command {
    let model = fixture_arg("nano-packed");
    ternion_in(folder, &[args, &["--model", &model]].concat())
}

fn with_context(args: &[&str]) -> Vec<String> {
    let more = ["--context-length", "192", "--max-tokens", "16", "--temperature", "0"];
    args.iter().chain(&more).map(|&a| a.to_owned()).collect()
}

#[test]
fn chunk_prints_where_a_text_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let text = sentences(40);
    std::fs::write(folder.path().join("a.txt"), &text).unwrap();
    let args = ["chunk", "a.txt", "--max-tokens", "100", "--overlap", "30"];
    let plan = json(run(folder.path(), &[&args[..], &["--json"]].concat()));
    assert_eq!((&plan["bytes"], &plan["kind"]), (&json!(text.len()), &json!("text")));
    let (mut end, mut overlaps) = (0, 0);
    for chunk in plan["chunks"].as_array().unwrap() {
        let of = |key: &str| usize::try_from(chunk[key].as_u64().unwrap()).unwrap();
        assert_eq!(of("start") + of("overlap"), end);
        assert!(of("tokens") <= 100 && text[of("start")..].starts_with(chunk["beginning"].as_str().unwrap()));
        overlaps += of("overlap");
        end = of("end");
    }
    assert_eq!(end, text.len());
    assert!(overlaps > 0);

    let output = success(run(folder.path(), &args));
    let table = stdout(&output);
    assert_eq!(table.lines().count(), 1 + plan["chunks"].as_array().unwrap().len());
    assert!(table.contains("Sentence 0 tells of the sky, 天空"), "{table}");
    assert!(stderr(&output).contains("chunks of at most 100 tokens"));

    std::fs::write(folder.path().join("word"), "x".repeat(200_000)).unwrap();
    let plan = json(run(folder.path(), &["chunk", "word", "--max-tokens", "2000", "--json"]));
    assert!(plan["chunks"].as_array().unwrap().len() > 10);
}

#[test]
fn input_that_cannot_be_cut_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    file("empty", b"");
    file("binary", b"abc\xff\xfe\0");
    file("nul", b"a\0b\0c");
    file("text", sentences(40).as_bytes());
    let chunk = |args: &[&str]| run(folder.path(), &[&["chunk"], args].concat());
    failure(chunk(&["empty"]), 2, &["empty: is empty"]);
    failure(chunk(&["binary"]), 2, &["binary: byte 3 is not UTF-8"]);
    failure(chunk(&["missing"]), 2, &["missing: cannot be read"]);
    failure(chunk(&["text", "--overlap", "512"]), 2, &["overlap: 512 tokens; fewer than the 512"]);
    failure(chunk(&["text", "--max-tokens", "1"]), 2, &["cannot hold the character"]);
    success(chunk(&["nul", "--max-tokens", "2"]));

    let chat = |args: &[&str]| {
        run(folder.path(), &[&["chat", "--context-length", "192", "--max-tokens", "16"], args].concat())
    };
    failure(chat(&["Sum up.", "--file", "empty"]), 2, &["document: is empty"]);
    failure(chat(&["Sum up.", "--file", "binary"]), 2, &["not UTF-8"]);
    failure(chat(&["--file", "text"]), 2, &["--file needs a message"]);
    failure(chat(&["Sum up.", "--file", "text"]), 2, &["prompt: ", "at most 191 fit"]);
    failure(chat(&["Sum up.", "--file", "text", "--overlap", "3"]), 2, &["--overlap goes with"]);
    let long = sentences(40);
    failure(chat(&[&long, "--policy", "truncate"]), 2, &["the system message and the last user message"]);
    failure(
        chat(&[&long, "--file", "text", "--policy", "refine"]),
        2,
        &["a chunk with the template and the task"],
    );
    let small = ["Sum up.", "--file", "text", "--policy", "map-reduce", "--chunk-tokens", "1"];
    failure(chat(&small), 2, &["cannot hold the character"]);
    let output = chat(&["Sum up.", "--policy", "shorten"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("truncate-middle, sliding, map-reduce or refine expected"));
}

#[test]
fn a_long_file_is_answered_with_each_policy_and_a_report() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("long.md"), sentences(30)).unwrap();
    for (policy, words) in [
        ("truncate-head", "dropped: 0.."),
        ("truncate-middle", "dropped: "),
        ("sliding", "dropped: 4.."),
        ("map-reduce", "answers merged: "),
        ("refine", "chunks of at most"),
    ] {
        let args = with_context(&["chat", "Sum up.", "--file", "long.md", "--policy", policy]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let output = success(run(folder.path(), &args));
        let said = stderr(&output);
        assert!(said.contains(words) && said.contains("at most 1"), "{policy}: {said}");
        if policy == "map-reduce" {
            assert!(said.contains("part 1 of ") && said.contains(" is done"), "{said}");
        }
        let answer = json(run(folder.path(), &[&args[..], &["--json"]].concat()));
        let name = answer["context"]["policy"].as_str().unwrap().replace('_', "-");
        assert!(policy.starts_with(&name), "{name}");
        assert!(answer["context"]["calls"].as_u64().unwrap() >= 1);
    }
    let args = with_context(&["generate", "Sum up: ", "--file", "long.md", "--policy", "refine", "--json"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    assert!(json(run(folder.path(), &args))["context"]["calls"].as_u64().unwrap() > 3);
}

#[test]
fn count_shows_what_each_message_takes() {
    let folder = tempfile::tempdir().unwrap();
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many days are in a week?"},
        {"role": "assistant", "content": "Seven, naïvely."},
        {"role": "user", "content": " And in a year? 天空"},
    ]);
    std::fs::write(folder.path().join("c.json"), messages.to_string()).unwrap();
    let args = ["count", "--messages", "c.json", "--context-length", "256", "--max-tokens", "64"];
    let found = json(run(folder.path(), &[&args[..], &["--json"]].concat()));
    let number = |value: &serde_json::Value| value.as_i64().unwrap();
    let rows = found["messages"].as_array().unwrap();
    let sum: i64 = rows.iter().map(|row| number(&row["text"]) + number(&row["template"])).sum();
    let total = number(&found["tokens"]);
    assert_eq!(number(&found["opening"]) + sum + number(&found["answer_header"]), total);
    let parts = ["template", "system", "history", "input"].map(|key| number(&found[key]));
    assert!(parts.iter().all(|&n| n > 0) && parts.iter().sum::<i64>() == total, "{found}");
    assert_eq!(number(&found["free"]), 256 - 64 - total);

    let output = success(run(folder.path(), &args));
    assert!(stdout(&output).lines().any(|l| l.contains("assistant")), "{}", stdout(&output));
    assert!(stderr(&output).contains("64 reserved for the answer"));
    std::fs::write(folder.path().join("bad.json"), "{}").unwrap();
    failure(run(folder.path(), &["count", "--messages", "bad.json"]), 2, &["JSON array"]);
}
