//! `memory_limit`: the plan, what it chooses, that the process keeps it, and what is refused.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "cli/common.rs"]
mod common;

use std::path::Path;

use common::{failure, fixture, fixture_arg, json, stderr, success, ternion, ternion_in};
use serde_json::Value;
use ternion::formats::synth::{Shape, write};

/// A model of 115 MB, of which 65 MB are the embedding, that is the head too.
fn model(folder: &Path) {
    let shape = Shape {
        hidden_size: 1024,
        intermediate_size: 2816,
        layers: 16,
        heads: 8,
        kv_heads: 2,
        vocab_size: 32_000,
        context_length: 2048,
        ..Shape::named("bitnet-2b4t").unwrap()
    };
    write(&folder.join("model"), &shape, 1, &mut |_, _| {}).unwrap();
}

fn part(plan: &Value, name: &str) -> u64 {
    let parts = plan["parts"].as_array().unwrap();
    parts.iter().find(|part| part["name"] == name).map_or(0, |part| part["bytes"].as_u64().unwrap())
}

#[test]
#[cfg_attr(not(target_os = "linux"), ignore = "only Linux tells a process the peak of its memory")]
fn a_process_keeps_its_limit() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path());
    let bench = |limit: &[&str]| {
        let args = [
            "bench",
            "--json",
            "--model",
            "model",
            "--context-length",
            "256",
            "--prompt",
            "200",
            "--decode",
            "8",
        ];
        let args = [&args[..], &["--repeat", "1", "--buffer", "0"], limit].concat();
        json(ternion_in(folder.path(), &args))
    };
    // As under each limit, the head has no copy and chunks are those of all CPUs.
    let free = bench(&["--memory-limit", "1TB"]);
    let needed = free["memory"]["peak"].as_u64().unwrap();
    assert_eq!(free["memory_plan"]["streamed_bytes"], 0);
    assert!(needed > 115_000_000, "the weights alone are that: {needed}");

    // A third of the weights less than it takes with room for all.
    let limit = needed - 40_000_000;
    let kept = bench(&["--memory-limit", &limit.to_string()]);
    let (peak, plan) = (kept["memory"]["peak"].as_u64().unwrap(), &kept["memory_plan"]);
    assert!(peak <= limit, "{peak} of {limit}: {plan:#}");
    assert!(plan["streamed_bytes"].as_u64().unwrap() > 10_000_000, "{plan:#}");
    assert!(kept["planned_bytes"].as_u64().unwrap() <= limit);
    assert_eq!(plan["kv_type"], "exact", "streaming comes before what changes results");
}

#[test]
fn a_limit_does_not_change_the_answer() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path());
    let inspect = ["inspect", "--json", "--model", "model", "--context-length", "256"];
    let memory =
        |limit: &[&str]| json(ternion_in(folder.path(), &[&inspect[..], limit].concat()))["memory"].clone();
    // Under a limit the head has no copy.
    let free = memory(&[]);
    let copy = part(&free["plan"], "certified copy of the head");
    let limit = (free["planned_bytes"].as_u64().unwrap() - copy - 40_000_000).to_string();
    let streamed = memory(&["--memory-limit", &limit])["plan"]["streamed_bytes"].as_u64().unwrap();
    assert!(streamed > 10_000_000, "{streamed}");
    let answer = |limit: &[&str]| {
        let args = [
            "generate",
            "the same",
            "--json",
            "--model",
            "model",
            "--context-length",
            "256",
            "--max-tokens",
            "12",
        ];
        let args = [&args[..], &["--temperature", "0", "--ignore-eos"], limit].concat();
        json(ternion_in(folder.path(), &args))["text"].clone()
    };
    assert_eq!(answer(&["--memory-limit", &limit]), answer(&[]));
}

#[test]
fn what_is_left_open_is_chosen_and_what_is_fixed_stays() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path());
    let plan = |args: &[&str]| {
        let args = [&["inspect", "--json", "--model", "model"], args].concat();
        json(ternion_in(folder.path(), &args))["memory"]["plan"].clone()
    };
    let free = plan(&[]);
    let kv = part(&free, "keys and values");
    // 16 layers, 2 heads of 128, keys and values in 24 bits with 5 bytes for each head, 2048 positions, 4 sequences.
    assert_eq!(kv, 16 * 2 * 2 * (3 * 128 + 5) * 2048 * 4);
    assert!(free["choices"].as_array().unwrap().is_empty());
    let limited =
        |bytes: u64, args: &[&str]| plan(&[&["--memory-limit", &bytes.to_string()[..]], args].concat());
    // Under a limit the head has no copy, and chunks are those of all CPUs.
    let roomy = limited(1 << 40, &[]);
    let total: u64 = roomy["parts"].as_array().unwrap().iter().map(|p| p["bytes"].as_u64().unwrap()).sum();

    // Fewer sequences come first, then streaming, then other types, then a shorter context.
    let fewer = limited(total - kv / 4, &[]);
    assert!(fewer["max_sequences"].as_u64().unwrap() < 4 && fewer["streamed_bytes"] == 0, "{fewer:#}");
    assert_eq!((&fewer["kv_type"], &fewer["context_length"]), (&"exact".into(), &2048.into()));
    let streamed = limited(total - kv, &[]);
    assert!(streamed["streamed_bytes"].as_u64().unwrap() > 0, "{streamed:#}");
    assert_eq!((&streamed["kv_type"], &streamed["max_sequences"]), (&"exact".into(), &1.into()));
    // What nothing can be saved of, with the buffers for streaming; small chunks save a few megabytes.
    let weights = part(&free, "ternary weights") + part(&free, "embedding and head");
    let least = total - kv - weights + part(&streamed, "read-ahead");
    let (exact, int8) = (kv / 4, 16 * 2 * (128 + 4) * 2 * 2048);
    let small = limited(least + exact - 8_000_000, &[]);
    assert_eq!((&small["kv_type"], &small["context_length"]), (&"f16".into(), &2048.into()), "{small:#}");
    let short = limited(least + int8 - 7_500_000, &[]);
    assert!(short["context_length"].as_u64().unwrap() < 2048 && short["kv_type"] == "int8", "{short:#}");
    for plan in [fewer, streamed, small, short] {
        assert!(!plan["choices"].as_array().unwrap().is_empty());
    }

    // The same limit with the context fixed is refused, with the least that would do.
    let limit = (least + int8 - 7_500_000).to_string();
    let mut refused = ternion_in(
        folder.path(),
        &["inspect", "--model", "model", "--context-length", "2048", "--memory-limit", &limit],
    );
    let output = refused.output().unwrap();
    assert_ne!(output.status.code(), Some(0));
    let said = stderr(&output);
    assert!(
        said.contains("the least is") && said.contains("context 2048") && said.contains("int8"),
        "{said}"
    );
}

#[test]
fn nonsense_is_refused() {
    let tiny = fixture_arg("tiny-packed");
    for limit in ["lots", "4M", "-1", "1e9", ""] {
        let output = ternion(&["generate", "x", "--model", &tiny, "--memory-limit", limit]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{limit}: {}", stderr(&output));
    }
    let folder = tempfile::tempdir().unwrap();
    let config = |text: &str| std::fs::write(folder.path().join("c.toml"), text).unwrap();
    let run = || ternion_in(folder.path(), &["generate", "x", "--model", "c.toml"]);
    config(&format!("[models.m]\npath = '{tiny}'\nmemory_limit = \"plenty\"\n"));
    failure(run(), 3, &["models.m.memory_limit", "plenty", "400MB"]);
    config("[models.m]\nbackend = \"echo\"\nmemory_limit = \"1GB\"\n");
    failure(run(), 3, &["models.m.memory_limit", "`echo` cannot keep a limit", "candle"]);
    config(&format!("[models.m]\npath = '{tiny}'\nmemory_limit = \"1MB\"\n"));
    failure(run(), 4, &["memory_limit", "1.0 MB is too little", "the least is"]);
}

#[test]
fn weights_that_must_be_converted_are_refused_before_they_take_more_than_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("x.gguf");
    let args =
        ["convert", &fixture_arg("tiny-packed"), "--to", "gguf-tq2", "--out", target.to_str().unwrap()];
    success(ternion(&args));
    assert!(fixture("tiny-packed").is_dir());
    // The process alone takes more than that, so that nothing is left for the weights.
    let run = ternion_in(folder.path(), &["generate", "x", "--model", "x.gguf", "--memory-limit", "2MB"]);
    failure(run, 4, &["tensor: ", "ternion convert", "memory limit"]);
}
