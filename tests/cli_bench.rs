//! `ternion bench`: what it measures and says, its files, comparisons and plots. What times come out is not looked at.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "cli/common.rs"]
mod common;

use std::path::Path;

use common::{failure, fixture_arg, json, stderr, stdout, success, ternion, ternion_in};
use serde_json::{Value, json};

/// A measurement that takes no time to speak of.
const QUICK: [&str; 10] =
    ["bench", "--prompt", "16", "--decode", "4", "--repeat", "2", "--warm-up", "0", "--buffer"];

fn bench(buffer: &str, args: &[&str]) -> assert_cmd::Command {
    let model = fixture_arg("nano-packed");
    ternion(&[&QUICK[..], &[buffer, "--model", &model], args].concat())
}

/// That a spread is one of speeds or times.
#[track_caller]
fn is_ordered(spread: &Value) {
    let value = |part: &str| spread[part].as_f64().unwrap();
    assert!(
        0.0 < value("min") && value("min") <= value("median") && value("median") <= value("max"),
        "{spread}"
    );
}

#[test]
fn everything_that_is_named_is_measured() {
    let found = json(bench("8", &["--json", "--threads", "2"]));
    assert_eq!((&found["format"], &found["version"]), (&json!("ternion-bench"), &json!(1)));
    assert_eq!(
        (&found["repeat"], &found["warm_up"], &found["interrupted"]),
        (&json!(2), &json!(0), &json!(false))
    );
    assert_eq!(
        (&found["model"]["name"], &found["model"]["backend"]),
        (&json!("nano-packed"), &json!("candle"))
    );
    let points = found["points"].as_array().unwrap();
    assert_eq!(points.len(), 1);
    let point = &points[0];
    for key in ["prefill_tokens_per_second", "decode_tokens_per_second", "first_token_seconds"] {
        is_ordered(&point[key]);
    }
    for (key, expected) in
        [("threads", 2), ("batch", 1), ("prompt_tokens", 16), ("decode_tokens", 4), ("runs", 2)]
    {
        assert_eq!(point[key], expected, "{key}");
    }
    let load = &found["loads"][0];
    assert_eq!(load["threads"], 2);
    let bandwidth = load["bandwidth_bytes_per_second"].as_f64().unwrap();
    let number = |key: &str| point[key].as_f64().unwrap();
    // All weights once, and the keys and values of 18 positions.
    let reads = &found["reads"];
    let bytes = |key: &str| reads[key].as_u64().unwrap() as f64;
    let read = bytes("linears") + bytes("head") + 18.0 * bytes("kv_position");
    assert_eq!(number("decode_bytes_per_token"), read);
    // A number that is written and read again may differ in its last digit.
    let is_near =
        |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-9, "{found} {expected}");
    is_near(number("decode_limit_tokens_per_second"), bandwidth / read);
    let decode = point["decode_tokens_per_second"]["median"].as_f64().unwrap();
    is_near(number("decode_share_of_limit"), decode * read / bandwidth);

    let machine = &found["machine"];
    assert_eq!(machine["ternion"], env!("CARGO_PKG_VERSION"));
    assert!(
        !machine["cpu"].as_str().unwrap().is_empty() && !machine["instructions"].as_str().unwrap().is_empty()
    );
    if cfg!(target_os = "linux") {
        assert!(found["memory"]["peak"].as_u64().unwrap() > 0);
        assert!(machine["memory_bytes"].as_u64().unwrap() > 1 << 20 && machine["load_average"].is_number());
    }

    let text = stdout(&success(bench("0", &[])));
    for words in ["prefill tokens/s", "decode tokens/s", "first token s", "machine", "of 2 runs after 0"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    // A buffer that is far larger than the model is not counted as its memory.
    if cfg!(target_os = "linux") {
        let peak = json(bench("512", &["--json"]))["memory"]["peak"].as_u64().unwrap();
        assert!(peak < 400 << 20, "{peak}");
    }
    assert!(!text.contains("GB/s") && !text.contains("of the limit"), "no bandwidth, no limit: {text}");
    failure(ternion(&["bench", "--backend", "echo"]), 3, &["vocabulary"]);
}

#[test]
fn every_combination_of_threads_sequences_and_depths_is_a_point() {
    let args = ["--json", "--threads", "1,2", "--batch", "1,6", "--depth", "100,40"];
    let found = json(bench("1", &args));
    let points = found["points"].as_array().unwrap();
    let number = |point: &Value, key: &str| point[key].as_u64().unwrap();
    let told: Vec<_> = points
        .iter()
        .map(|p| (number(p, "threads"), number(p, "batch"), number(p, "prompt_tokens")))
        .collect();
    let of = |threads| {
        [1, 6].into_iter().flat_map(move |batch| [16, 40, 100].map(|depth| (threads, batch, depth)))
    };
    assert_eq!(told, of(1).chain(of(2)).collect::<Vec<_>>());
    for point in points {
        is_ordered(&point["decode_tokens_per_second"]);
        assert_eq!(number(point, "runs"), 2);
        // Prompts of a depth are computed once.
        assert_eq!(point["prefill_tokens_per_second"].is_object(), point["prompt_tokens"] == 16, "{point}");
        assert!(point["decode_limit_tokens_per_second"].as_f64().unwrap() > 0.0);
    }
    let loads: Vec<_> =
        found["loads"].as_array().unwrap().iter().map(|load| number(load, "threads")).collect();
    assert_eq!(loads, [1, 2]);
    // Four sequences are the default, and six were asked for.
    assert_eq!(found["memory_plan"]["max_sequences"], 6);
}

#[test]
fn a_head_in_fewer_bits_is_fewer_bytes_to_read() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({ "models": {
        "exact": { "path": fixture_arg("nano-packed") },
        "int8": { "path": fixture_arg("nano-packed"), "options": { "head": "int8", "kv_type": "f16" } },
        "int4": { "path": fixture_arg("nano-packed"), "options": { "head": "int4", "kv_type": "int8" } },
    }});
    std::fs::write(folder.path().join("models.json"), config.to_string()).unwrap();
    let reads = |name| {
        let model = ["0", "--json", "--model", "models.json", "--name", name];
        json(ternion_in(folder.path(), &[&QUICK[..], &model].concat()))["reads"].clone()
    };
    let (exact, int8, int4) = (reads("exact"), reads("int8"), reads("int4"));
    let number = |reads: &Value, key: &str| reads[key].as_u64().unwrap();
    assert_eq!(exact["linears"], int8["linears"]);
    assert!(number(&int8, "head") < number(&exact, "head"), "{exact} {int8}");
    assert!(number(&int4, "head") < number(&int8, "head"), "{int8} {int4}");
    assert!(number(&int4, "kv_position") < number(&int8, "kv_position"), "{int8} {int4}");
    // Of exact ones attention reads 16 bits, a factor and a mark for each head.
    let heads = 2 * 2;
    assert_eq!(number(&exact, "kv_position"), number(&int8, "kv_position") + 5 * heads);
}

#[test]
fn saved_results_are_compared() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (old, new) = (file("old.json"), file("new.json"));
    success(bench("1", &["--threads", "1", "--depth", "24", "--save", &old]));
    let mut saved: Value = serde_json::from_slice(&std::fs::read(&old).unwrap()).unwrap();
    // Half as fast, with a spread apart; the other point is not there.
    saved["points"].as_array_mut().unwrap().truncate(1);
    let was = saved["points"][0]["decode_tokens_per_second"]["median"].as_f64().unwrap();
    saved["points"][0]["decode_tokens_per_second"] =
        json!({"min": was / 2e3, "median": was / 2.0, "max": was / 2.0});
    let least = &mut saved["points"][0]["first_token_seconds"]["min"];
    *least = json!(least.as_f64().unwrap() / 2.0);
    std::fs::write(&new, saved.to_string()).unwrap();
    let found = json(ternion(&["bench", "--compare", &old, &new, "--json"]));
    let measures = found["measures"].as_array().unwrap();
    let of = |name: &str| measures.iter().find(|m| m["measure"] == name).unwrap();
    assert_eq!(of("prefill tokens/s")["ratio"], 1.0);
    assert_eq!(of("prefill tokens/s")["within_noise"], true);
    assert!((of("decode tokens/s")["ratio"].as_f64().unwrap() - 0.5).abs() < 1e-9);
    assert_eq!((&found["same_machine"], &found["points_only_in_old"]), (&json!(true), &json!(1)));
    let text = stdout(&success(ternion(&["bench", "--compare", &old, &new])));
    for words in
        ["new/old", "0.500", "1.000", "within noise", "1 point is only in old", "old  nano-packed (candle)"]
    {
        assert!(text.contains(words), "{words}: {text}");
    }

    let other = file("other.json");
    std::fs::write(&other, "{\"format\": \"something\"}").unwrap();
    failure(
        ternion(&["bench", "--compare", &old, &other]),
        2,
        &["other.json", "version", "ternion bench --save"],
    );
    failure(ternion(&["bench", "--compare", "none.json", &old]), 2, &["none.json", "cannot be read"]);
    saved["version"] = json!(99);
    std::fs::write(&other, saved.to_string()).unwrap();
    failure(ternion(&["bench", "--compare", &other, &old]), 2, &["other.json", "version 99", "version 1"]);
    let output = ternion(&["bench", "--compare", &old, &new, "--repeat", "2"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_plot_alone_chooses_depths_and_threads() {
    let folder = tempfile::tempdir().unwrap();
    let plot = folder.path().join("speed.svg");
    let args = ["--json", "--context-length", "300", "--plot", plot.to_str().unwrap()];
    let found = json(bench("1", &args));
    let depths: Vec<u64> =
        found["points"].as_array().unwrap().iter().map(|p| p["prompt_tokens"].as_u64().unwrap()).collect();
    assert!(depths.ends_with(&[16, 128, 256]), "{depths:?}");
    let svg = std::fs::read_to_string(&plot).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("decoding by depth") && svg.contains("dashed"), "{svg}");
    let cores = std::thread::available_parallelism().unwrap().get();
    assert_eq!(svg.contains("decoding by threads"), cores > 1);
}

#[test]
fn what_cannot_be_measured_or_written_is_said_in_one_line() {
    failure(bench("0", &["--depth", "5000"]), 2, &["--depth 5000", "4096", "expected"]);
    failure(bench("0", &["--context-length", "16"]), 2, &["--prompt 16", "16 tokens"]);
    for option in ["--save", "--plot"] {
        failure(bench("0", &[option, "no/such/folder/x"]), 2, &[option, "no/such/folder"]);
        failure(bench("0", &[option, "."]), 2, &[option, "is a folder"]);
    }
    for wrong in
        [["--batch", "0"], ["--threads", "0"], ["--depth", "0"], ["--decode", "0"], ["--compare", "x"]]
    {
        let output = bench("0", &wrong).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {}", stderr(&output));
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_with_what_was_measured_before() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::{Command, Stdio};
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("part.json");
    // The second point, whose prompt is long and which is repeated often, is the one that is interrupted.
    let mut child = Command::new(env!("CARGO_BIN_EXE_ternion"))
        .args([
            "bench",
            "--model",
            &fixture_arg("tiny-packed"),
            "--prompt",
            "4",
            "--decode",
            "2",
            "--repeat",
            "300",
        ])
        .args(["--depth", "4000", "--threads", "1", "--buffer", "1", "--json", "--save"])
        .arg(&saved)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("tokens/s") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "it ended without a point");
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{rest}");
    assert!(rest.contains("interrupted"), "{rest}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["interrupted"], true);
    let points = found["points"].as_array().unwrap();
    assert_eq!((points.len(), &points[0]["prompt_tokens"]), (1, &json!(4)));
    assert!(points[0]["decode_share_of_limit"].is_number(), "{points:?}");
    assert_eq!(serde_json::from_slice::<Value>(&std::fs::read(Path::new(&saved)).unwrap()).unwrap(), found);
}
