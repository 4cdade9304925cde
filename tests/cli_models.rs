//! The `ternion` command with models of `fixtures/`: what it computes is what transformers computed.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "cli/common.rs"]
mod common;

use std::path::Path;

use common::{failure, fixture, fixture_arg, json, stderr, stdout, success, ternion, ternion_in};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

fn golden(model: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(model).join("golden.json")).unwrap()).unwrap()
}

/// A tensor's dimensions and its elements.
fn tensor(file: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let bytes = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = tensors.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::F32);
    let values = tensor.data().as_chunks().0.iter().map(|&b: &[u8; 4]| f32::from_le_bytes(b)).collect();
    (tensor.shape().to_vec(), values)
}

fn case(golden: &Value, name: &str) -> Value {
    golden["cases"].as_array().unwrap().iter().find(|case| case["name"] == name).unwrap().clone()
}

#[test]
fn logits_are_those_of_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let expected = fixture("nano-packed/golden.f32.safetensors");
    let mut strict = 0;
    for case in golden("nano-packed")["cases"].as_array().unwrap() {
        if case["strict"] != true {
            continue;
        }
        let name = case["name"].as_str().unwrap();
        std::fs::write(folder.path().join("ids.json"), case["input_ids"].to_string()).unwrap();
        let chunk = if strict % 2 == 0 { "3" } else { "64" };
        let args =
            ["logits", "--model", &fixture_arg("nano-packed"), "--ids", "ids.json", "--out", "x.safetensors"];
        success(ternion_in(folder.path(), &[&args[..], &["--chunk", chunk]].concat()));
        let (shape, found) = tensor(&folder.path().join("x.safetensors"), "logits");
        let (expected_shape, expected) = tensor(&expected, &format!("{name}.logits"));
        assert_eq!(shape, expected_shape, "{name}");
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-3, "{name}: off by {worst}");
        strict += 1;
    }
    assert!(strict >= 3, "{strict}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "no temporary file stays");
}

#[test]
fn logits_read_ids_from_a_pipe_and_refuse_what_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let run = |ids: &str| {
        let args = [
            "logits",
            "--json",
            "--model",
            &fixture_arg("nano-packed"),
            "--ids",
            "-",
            "--out",
            "x.safetensors",
        ];
        let mut command = ternion_in(folder.path(), &args);
        command.write_stdin(ids);
        command
    };
    let done = json(run("[304, 51]"));
    assert_eq!((&done["tokens"], &done["backend"]), (&json!(2), &json!("candle")));
    std::fs::remove_file(folder.path().join("x.safetensors")).unwrap();
    failure(run("[1, -2]"), 2, &["token ids"]);
    failure(run("{}"), 2, &["token ids"]);
    failure(run("[]"), 2, &["at least one"]);
    failure(run("[99999999]"), 2, &["99999999"]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let args = ["logits", "--model", &fixture_arg("nano-packed"), "--ids", "none.json", "--out", "x"];
    failure(ternion_in(folder.path(), &args), 2, &["none.json"]);
}

#[test]
fn generate_continues_as_transformers_does() {
    let golden = golden("nano-packed");
    let case = case(&golden, "greedy0");
    let args = ["--temperature", "0", "--max-tokens", "32", "--ignore-eos", "--json", "--logprobs"];
    let model = fixture_arg("nano-packed");
    let found = json(ternion(
        &[&["generate", case["text"].as_str().unwrap(), "--model", &model], &args[..]].concat(),
    ));
    let tokens = found["tokens"].as_array().unwrap();
    let ids: Vec<&Value> = tokens.iter().map(|token| &token["id"]).collect();
    assert_eq!(json!(ids), case["greedy_f32"]);
    assert!(tokens.iter().all(|token| token["logprob"].as_f64().unwrap() <= 0.0));
    assert_eq!(found["usage"]["prompt_tokens"], case["input_ids"].as_array().unwrap().len());
    let text: String = tokens.iter().map(|token| token["text"].as_str().unwrap()).collect();
    assert!(found["text"].as_str().unwrap().starts_with(&text));
}

#[test]
fn chat_answers_with_the_default_model_and_says_that_it_is_tiny() {
    let output = success(ternion(&["chat", "How many days are in a week?"]));
    assert_eq!(stdout(&output), "There are seven days in a week.\n");
    assert!(stderr(&output).contains("tiny"), "{}", stderr(&output));
    assert!(stderr(&output).contains("tokens/s"), "{}", stderr(&output));
}

#[test]
fn the_same_seed_gives_the_same_answer() {
    let model = fixture_arg("tiny-packed");
    let args =
        ["chat", "How many days are in a week?", "--model", &model, "--max-tokens", "8", "--seed", "7"];
    let answer = stdout(&success(ternion(&args)));
    assert_eq!(answer, stdout(&success(ternion(&args))));
    assert!(answer.trim().len() > 1, "random weights say something");
}

#[test]
fn another_configuration_is_another_model() {
    let folder = tempfile::tempdir().unwrap();
    let config = |model: &str| json!({"models": {"main": {"path": fixture(model)}}}).to_string();
    let path = folder.path().join("host.json");
    let run = || {
        json(ternion_in(
            folder.path(),
            &["chat", "hi", "--json", "--max-tokens", "4", "--model", "host.json"],
        ))
    };
    std::fs::write(&path, config("nano-packed")).unwrap();
    let first = run();
    std::fs::write(&path, config("llama-ternary")).unwrap();
    let second = run();
    assert_eq!((&first["model"], &second["model"]), (&json!("main"), &json!("main")));
    assert_ne!(first["usage"]["prompt_tokens"], second["usage"]["prompt_tokens"], "another template");
}

#[test]
fn a_prompt_that_does_not_fit_says_so() {
    let model = fixture_arg("nano-packed");
    let args = ["generate", &"word ".repeat(40), "--model", &model, "--context-length", "16"];
    failure(ternion(&args), 2, &["16"]);
}

#[test]
fn a_damaged_model_is_named_with_its_file() {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture("nano-packed")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let weights = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    bytes.truncate(bytes.len() / 2);
    std::fs::write(&weights, bytes).unwrap();
    for command in ["chat", "generate"] {
        failure(ternion_in(folder.path(), &[command, "hi", "--model", "."]), 3, &["model.safetensors"]);
    }
    failure(ternion_in(folder.path(), &["inspect", "--model", "."]), 3, &["model.safetensors"]);
}

/// What transformers computed for `nano-packed`, as `verify` takes it.
fn expectation() -> Value {
    let golden = golden("nano-packed");
    let (logits, chat) = (case(&golden, "greedy0"), case(&golden, "chat1"));
    let (shape, values) = tensor(&fixture("nano-packed/golden.f32.safetensors"), "greedy0.logits");
    let mean = |row: &[f32]| row.iter().map(|&v| f64::from(v)).sum::<f64>() / row.len() as f64;
    let means: Vec<f64> = values.chunks_exact(shape[1]).map(mean).collect();
    let tokens: Vec<u32> = serde_json::from_value(chat["greedy_f32"].clone()).unwrap();
    json!({
        "model": "nano-packed",
        "source": "transformers",
        "vocab_size": shape[1],
        "files": {"config.json": sha256_of_config()},
        "logits": {
            "text": logits["text"],
            "input_ids": logits["input_ids"],
            "mean": means,
            "mean_tolerance": 1e-4,
            "first": &values[..30],
            "first_tolerance": 1e-3,
        },
        "generation": {
            "messages": chat["messages"],
            "prompt_ids": chat["input_ids"],
            "text": chat["greedy_text_f32"],
            "tokens": tokens,
            "logprob_tolerance": 0.5,
        },
    })
}

fn sha256_of_config() -> String {
    use sha2::{Digest, Sha256};
    let hash = Sha256::digest(std::fs::read(fixture("nano-packed/config.json")).unwrap());
    hash.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

#[test]
fn verify_passes_what_is_right_and_fails_what_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let verify = |expected: &Value| {
        std::fs::write(folder.path().join("expect.json"), expected.to_string()).unwrap();
        let args = ["verify", "--json", "--expect", "expect.json", "--model", &fixture_arg("nano-packed")];
        let output = ternion_in(folder.path(), &args).output().unwrap();
        let found: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{e}: {} {}", stdout(&output), stderr(&output)));
        let failed: Vec<String> = found["checks"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|check| check["passed"] == false)
            .map(|check| check["name"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(output.status.code(), Some(if failed.is_empty() { 0 } else { 3 }));
        assert_eq!(found["passed"], failed.is_empty());
        (failed, found)
    };
    let right = expectation();
    let (failed, found) = verify(&right);
    assert!(failed.is_empty(), "{found}");
    let names: Vec<&str> =
        found["checks"].as_array().unwrap().iter().map(|check| check["name"].as_str().unwrap()).collect();
    for name in ["config.json", "model.safetensors", "mean logits", "logits at position 0", "greedy text"] {
        assert!(names.contains(&name), "{names:?}");
    }

    for (pointer, wrong, expected) in [
        ("/files/config.json", json!("00"), "config.json"),
        ("/files/absent.json", json!("00"), "absent.json"),
        ("/vocab_size", json!(128_256), "vocabulary"),
        ("/logits/mean/3", json!(99.0), "mean logits"),
        ("/logits/first/29", json!(99.0), "logits at position 0"),
        ("/generation/prompt_ids/5", json!(1), "tokens of a conversation"),
    ] {
        let mut changed = right.clone();
        if pointer == "/files/absent.json" {
            changed["files"]["absent.json"] = wrong;
        } else {
            *changed.pointer_mut(pointer).unwrap() = wrong;
        }
        let (failed, found) = verify(&changed);
        assert!(failed.contains(&expected.to_owned()), "{pointer}: {found}");
    }
    // Other words alone are no failure while the expected tokens stay near the best; these do not.
    let mut changed = right.clone();
    changed["generation"]["text"] = json!("something else");
    assert!(verify(&changed).0.is_empty());
    changed["generation"]["tokens"][0] = json!(1);
    assert_eq!(verify(&changed).0, ["greedy text"]);
}

#[test]
fn verify_tells_another_model_from_the_published_one() {
    let output = ternion(&["verify", "--model", &fixture_arg("nano-packed")]).output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    let found = stdout(&output);
    assert!(found.contains("FAIL  vocabulary") && found.contains("expected 128256"), "{found}");
    failure(ternion(&["verify", "--expect", "none.json"]), 2, &["none.json"]);
}

#[test]
fn a_converted_model_is_used_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let convert = |args: &[&str]| ternion_in(folder.path(), &[&["convert"], args].concat());
    let tiny = fixture_arg("tiny-packed");
    let done = json(convert(&[&tiny, "--to", "gguf-i2s", "--out", "tiny.gguf", "--json"]));
    assert_eq!((&done["format"], &done["out"]), (&json!("gguf-i2s"), &json!("tiny.gguf")));
    assert_eq!(done["bytes"], std::fs::metadata(folder.path().join("tiny.gguf")).unwrap().len());
    failure(convert(&[&tiny, "--to", "gguf-i2s", "--out", "tiny.gguf"]), 2, &["tiny.gguf", "exists"]);
    success(convert(&[&tiny, "--to", "gguf-tq2", "--out", "tiny.gguf", "--embedding", "q8_0", "--force"]));
    let nano = fixture_arg("nano-packed");
    failure(convert(&[&nano, "--to", "gguf-tq1", "--out", "n.gguf"]), 3, &["attn_q", "multiple of 256"]);
    let mut wrong = convert(&[&nano, "--to", "gguf-q4", "--out", "n.gguf"]);
    assert!(stderr(&wrong.output().unwrap()).contains("gguf-i2s, gguf-tq1, gguf-tq2"));

    let inspect = json(ternion_in(folder.path(), &["inspect", "--json", "--model", "tiny.gguf"]));
    assert_eq!((&inspect["format"], &inspect["name"]), (&json!("GGUF (TQ2_0)"), &json!("tiny")));
    let original = json(ternion(&["inspect", "--json", "--model", &tiny]));
    for key in ["parameters", "layers", "activation", "rope_theta", "eos", "sampling", "tokenizer", "tied"] {
        assert_eq!(inspect[key], original[key], "{key}");
    }
    let text = "How many days are in a week?";
    let count = |model: &str| {
        json(ternion_in(folder.path(), &["count", text, "--chat", "--json", "--ids", "--model", model]))
    };
    assert_eq!(count("tiny.gguf"), count(&tiny));

    success(convert(&["tiny.gguf", "--to", "safetensors", "--out", "back", "--embedding", "bf16"]));
    let generate = |model: &str| {
        let args =
            ["generate", text, "--temperature", "0", "--max-tokens", "12", "--ignore-eos", "--model", model];
        stdout(&success(ternion_in(folder.path(), &args)))
    };
    success(convert(&[&tiny, "--to", "gguf-i2s", "--out", "exact.gguf"]));
    assert_eq!(generate("exact.gguf"), generate(&tiny));
    assert!(!generate("back").is_empty());
}

/// Facts that a file does not state are shown, and flags of every command that reads it decide them.
#[test]
fn what_is_assumed_is_shown_and_can_be_set() {
    let folder = tempfile::tempdir().unwrap();
    let nano = fixture_arg("nano-packed");
    success(ternion_in(folder.path(), &["convert", &nano, "--to", "gguf-i2s", "--out", "x.gguf"]));
    let inspect = |args: &[&str]| ternion_in(folder.path(), &[&["inspect", "-m", "x.gguf"], args].concat());
    let found = json(inspect(&["--json"]));
    assert!(found["assumptions"][0].as_str().unwrap().contains("i2s_layout"), "{}", found["assumptions"]);
    assert_eq!(found["warnings"], json!([]));
    let text = stdout(&success(inspect(&[])));
    assert!(text.contains("assumed      I2_S") && text.contains("inputs are rounded to int8"), "{text}");
    let set = [
        "--json",
        "--activation",
        "silu",
        "--rope-theta",
        "10000",
        "--i2s-layout",
        "arm",
        "--sub-norms",
        "true",
    ];
    let found = json(inspect(&set));
    assert_eq!((&found["activation"], &found["rope_theta"]), (&json!("SiLU"), &json!(10000.0)));
    assert_eq!(found["assumptions"], json!([]));
    assert_eq!(found["tokenizer"]["adds_before"], json!([304]));
    let adds =
        |args: &[&str]| json(inspect(&[&["--json"], args].concat()))["tokenizer"]["adds_before"].clone();
    assert_eq!(adds(&["--add-bos", "false"]), json!([]));
    assert_eq!(adds(&["--bos", "305"]), json!([305]));
    failure(inspect(&["--i2s-layout", "riscv"]), 2, &["--i2s-layout", "x86, arm, x86-4rows"]);
    failure(inspect(&["--rope-theta", "0"]), 3, &["rope_theta", "out of range"]);

    // A second conversion through the wrong layout and back is the same file.
    let convert = |args: &[&str]| success(ternion_in(folder.path(), &[&["convert"], args].concat()));
    convert(&["x.gguf", "--i2s-layout", "arm", "--to", "gguf-i2s", "--out", "other.gguf"]);
    let bytes = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    assert_ne!(bytes("x.gguf"), bytes("other.gguf"));

    // Through ONNX and back as well.
    for (to, out) in [("onnx", "portable"), ("onnx-fast", "fast")] {
        convert(&["x.gguf", "--to", to, "--out", out]);
        convert(&[out, "--to", "gguf-i2s", "--out", "back.gguf", "--force"]);
        convert(&[format!("{out}/model.onnx").as_str(), "--to", "safetensors", "--out", "back", "--force"]);
        let weights = |name: &str| ternion::formats::gguf::File::open(folder.path().join(name)).unwrap();
        let (there, back) = (weights("x.gguf"), weights("back.gguf"));
        for tensor in there.tensors() {
            let other = back.tensor(&tensor.name).unwrap();
            assert!(there.data(tensor)[..] == back.data(other)[..], "{out}: {}", tensor.name);
        }
    }
    std::fs::remove_file(folder.path().join("fast/config.json")).unwrap();
    let broken = ["convert", "fast", "--to", "gguf-i2s", "--out", "none.gguf"];
    failure(ternion_in(folder.path(), &broken), 3, &["config.json", "no such file"]);

    // Where the files contradict each other, loading warns once.
    std::fs::create_dir(folder.path().join("model")).unwrap();
    for name in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("nano-packed").join(name), folder.path().join("model").join(name)).unwrap();
    }
    let config = std::fs::read(fixture("nano-packed").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["rope_theta"] = 500_000.0.into();
    config["rope_scaling"] = json!({"rope_type": "default", "rope_theta": 10_000.0});
    std::fs::write(folder.path().join("model/config.json"), config.to_string()).unwrap();
    let generate = |args: &[&str]| {
        let run = ["generate", "hi", "-m", "model", "--max-tokens", "1", "--temperature", "0"];
        stderr(&success(ternion_in(folder.path(), &[&run, args].concat())))
    };
    let warned = generate(&[]);
    assert_eq!(warned.matches("the option `rope_theta` decides").count(), 1, "{warned}");
    let decided = generate(&["--rope-theta", "500000"]);
    assert!(!decided.contains("rope_theta"), "{decided}");
    let found = success(ternion_in(folder.path(), &["inspect", "-m", "model"]));
    assert_eq!(stderr(&found).matches("the option `rope_theta` decides").count(), 1, "{}", stderr(&found));
}

/// Whether it can be run or not.
#[test]
fn any_gguf_file_can_be_inspected() {
    let other = tempfile::tempdir().unwrap();
    let path = other.path().join("qwen2.gguf");
    let mut bytes = std::fs::read(fixture("gguf-ternary/qwen3.gguf")).unwrap();
    while let Some(at) = bytes.windows(5).position(|name| name == b"qwen3") {
        bytes[at + 4] = b'2';
    }
    std::fs::write(&path, bytes).unwrap();
    let path = path.to_string_lossy().into_owned();
    let text = stdout(&success(ternion(&["inspect", "--model", &path, "--tensors"])));
    for words in [
        "architecture qwen2",
        "context      128 tokens",
        "tokenizer    gpt2, pre-tokenizer llama-bpe",
        if cfg!(feature = "llama-cpp") {
            "runs with    llama-cpp"
        } else {
            "runs with    the backend llama-cpp (cargo feature `llama-cpp`)"
        },
        "7 TQ2_0",
        "qwen2.block_count",
        "blk.0.attn_q_norm.weight",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let facts = json(ternion(&["inspect", "--json", "--model", &path]));
    assert_eq!((&facts["architecture"], &facts["context_length"]), (&json!("qwen2"), &json!(128)));
    assert_eq!(facts["llama_cpp_error"], Value::Null);
    assert!(facts["candle_error"].as_str().unwrap().contains("not supported"), "{facts}");
    let generate = ["generate", "hi", "--backend", "candle", "--model", &path];
    failure(ternion(&generate), 3, &["qwen2", "`llama-cpp`", "cargo feature"]);

    // With a tensor of a type that nobody knows.
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = std::fs::read(fixture("gguf/llama-tq.gguf")).unwrap();
    let at = bytes.windows(21).position(|w| w == b"blk.0.attn_q.weight\x02\0").unwrap() + 19;
    // Two dimensions, then the type.
    bytes[at + 20..][..4].copy_from_slice(&99u32.to_le_bytes());
    std::fs::write(folder.path().join("x"), bytes).unwrap();
    let facts = json(ternion_in(folder.path(), &["inspect", "--json", "--model", "x"]));
    assert!(facts["llama_cpp_error"].as_str().unwrap().contains("id 99"), "{facts}");
    failure(ternion_in(folder.path(), &["generate", "hi", "--model", "x"]), 3, &["the id 99"]);
}

#[test]
fn synthetic_models_are_written_as_gguf_too() {
    let folder = tempfile::tempdir().unwrap();
    let synth = |args: &[&str]| {
        ternion_in(folder.path(), &[&["synth", "--shape", "tiny", "--seed", "3"], args].concat())
    };
    success(synth(&["--out", "folder"]));
    success(synth(&["--out", "x.gguf", "--format", "gguf-i2s"]));
    failure(synth(&["--out", "x.gguf", "--format", "gguf-i2s"]), 2, &["x.gguf", "--force"]);
    failure(synth(&["--out", "folder", "--format", "gguf-i2s", "--force"]), 2, &["folder", "no file"]);
    success(synth(&["--out", "x.gguf", "--format", "gguf-tq1", "--force"]));
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    let inspect = |model: &str| json(ternion_in(folder.path(), &["inspect", "--json", "--model", model]));
    assert_eq!(inspect("x.gguf")["format"], "GGUF (TQ1_0)");
    assert_eq!(inspect("x.gguf")["ternary_parameters"], inspect("folder")["ternary_parameters"]);
}
