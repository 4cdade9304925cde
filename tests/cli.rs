//! The `ternion` command without an engine: arguments, input and output, exit codes, the files of a checkpoint.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "cli/common.rs"]
mod common;

use common::{failure, fixture, fixture_arg, json, stderr, stdout, success, ternion, ternion_in};
use serde_json::json;

const ECHO: [&str; 2] = ["--backend", "echo"];

fn echo(args: &[&str]) -> assert_cmd::Command {
    ternion(&[args, &ECHO].concat())
}

#[test]
fn help_names_every_command_and_the_exit_codes() {
    let help = stdout(&success(ternion(&["--help"])));
    for command in ["chat", "generate", "count", "inspect", "verify", "logits", "synth", "bench", "schema"] {
        assert!(help.contains(command), "{command}");
        assert!(stdout(&success(ternion(&[command, "--help"]))).contains("Usage: ternion"), "{command}");
    }
    assert!(help.contains("130 Ctrl-C"));
    assert!(stdout(&success(ternion(&["--version"]))).starts_with("ternion "));
}

#[test]
fn a_wrong_command_line_is_a_usage_error() {
    for args in [
        &["chta"][..],
        &["chat", "hi", "--temprature", "1"],
        &["generate", "x", "--seed", "-1"],
        &["logits"],
        &[],
    ] {
        let output = ternion(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty());
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn chat_answers_on_standard_output_and_closes_on_standard_error() {
    let output = success(echo(&["chat", "hello world"]));
    assert_eq!(stdout(&output), "hello world\n");
    let said = stderr(&output);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(
        said.contains(" tokens in ") && said.contains("first token after") && said.contains("cached)"),
        "{said}"
    );
    assert!(!said.contains('\u{1b}'), "no progress bar in a pipe");

    assert!(stderr(&success(echo(&["chat", "hello", "--quiet"]))).is_empty());
}

#[test]
fn chat_reads_standard_input() {
    for args in [&["chat"][..], &["chat", "-"]] {
        let mut command = echo(args);
        command.write_stdin("from a pipe\n");
        assert_eq!(stdout(&success(command)), "from a pipe\n");
    }
    let mut command = echo(&["chat", "from the line"]);
    command.write_stdin("from a pipe");
    assert_eq!(stdout(&success(command)), "from the line\n");

    let mut command = echo(&["chat"]);
    command.write_stdin("\n");
    failure(command, 2, &["message is empty"]);
    let mut command = echo(&["chat"]);
    command.write_stdin(&b"\xff"[..]);
    failure(command, 2, &["standard input", "UTF-8"]);
}

#[test]
fn generate_reads_files() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    std::fs::write(&file, "once upon").unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(stdout(&success(echo(&["generate", "--prompt-file", file]))), "once upon\n");
    failure(echo(&["generate", "--prompt-file", "none.txt"]), 2, &["none.txt"]);
    let output = echo(&["generate", "x", "--prompt-file", file]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_byte_order_mark_is_no_text() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let text = write("text", b"\xef\xbb\xbfHow many days\r\nare in a week?");
    let tiny = fixture_arg("tiny-packed");
    assert_eq!(
        stdout(&success(echo(&["generate", "--prompt-file", &text]))),
        "How many days\r\nare in a week?\n"
    );
    let count = |args: &[&str]| stdout(&success(ternion(&[&["count", "--model", &tiny], args].concat())));
    assert_eq!(count(&["--file", &text]), count(&["How many days\r\nare in a week?"]));
    let mut command = ternion(&["count", "--model", &tiny, "-"]);
    command.write_stdin(&b"\xef\xbb\xbfHow"[..]);
    assert_eq!(stdout(&success(command)), count(&["How"]));

    let messages = "[{\"role\": \"user\",\r\n \"content\": \"Hi\"}]\r\n";
    let plain = write("plain.json", messages.as_bytes());
    let marked = write("marked.json", &[&b"\xef\xbb\xbf"[..], messages.as_bytes()].concat());
    assert_eq!(count(&["--messages", &marked]), count(&["--messages", &plain]));

    // With `chat --file` the document is a part of the message.
    let document = write("document.md", b"\xef\xbb\xbfOne.");
    let answer = stdout(&success(echo(&["chat", "Say it.", "--file", &document])));
    assert!(answer.contains("One.") && !answer.contains('\u{feff}'), "{answer:?}");

    // Offsets of chunks are those in the file.
    let chunks = json(ternion(&["chunk", "--json", "--model", &tiny, &text]));
    assert_eq!((&chunks["chunks"][0]["start"], &chunks["bytes"]), (&json!(3), &json!(32)));
    let wide = write("wide", b"\xff\xfeH\0i\0");
    failure(echo(&["generate", "--prompt-file", &wide]), 2, &["wide", "byte 0", "UTF-16"]);
    let broken = write("broken", b"\xef\xbb\xbfab\xff");
    failure(echo(&["generate", "--prompt-file", &broken]), 2, &["broken", "byte 5", "UTF-8"]);
}

/// Every command that reads a model takes it as the others do.
#[test]
fn commands_name_their_model_alike() {
    for command in [
        "chat",
        "generate",
        "count",
        "chunk",
        "inspect",
        "verify",
        "conformance",
        "logits",
        "convert",
        "bench",
        "eval",
    ] {
        let help = stdout(&success(ternion(&[command, "--help"])));
        assert!(help.contains("-m, --model <PATH>"), "{command}: {help}");
        assert!(help.contains("--config"), "{command}: {help}");
    }
    let folder = tempfile::tempdir().unwrap();
    let nano = fixture_arg("nano-packed");
    let config = format!("[models.a]\npath = '{nano}'\n[models.b]\npath = 'nowhere'\n");
    std::fs::write(folder.path().join("c.toml"), config).unwrap();
    let convert = |named: &[&str]| {
        let args = [&["convert", "--to", "gguf-i2s", "--out", "x.gguf", "--force", "--json"], named].concat();
        ternion_in(folder.path(), &args)
    };
    for named in [&[&nano[..]][..], &["-m", &nano], &["--config", &nano], &["-m", "c.toml", "--name", "a"]] {
        assert_eq!(json(convert(named))["source"], nano, "{named:?}");
    }
    let mut command = convert(&[]);
    command.env("TERNION_MODEL", &nano);
    assert_eq!(json(command)["source"], nano);
    failure(convert(&[]), 2, &["no model is named", "--model"]);
    failure(convert(&["-m", "nowhere"]), 3, &["nowhere", "no such file"]);
    assert_eq!(convert(&[&nano, "-m", &nano]).output().unwrap().status.code(), Some(2));
}

#[test]
fn json_is_one_object() {
    let answer = json(echo(&["chat", "hello world", "--json", "--max-tokens", "2"]));
    assert_eq!(answer["backend"], "echo");
    assert_eq!(answer["finish_reason"], "max_tokens");
    assert_eq!(answer["tokens"].as_array().unwrap().len(), 2);
    assert_eq!(answer["usage"]["completion_tokens"], 2);
    assert!(answer["timing"]["decode_seconds"].is_number());

    let stopped = json(echo(&["chat", "hello world", "--json", "--stop", "wor"]));
    assert_eq!(stopped["text"], "hello ");
    assert_eq!((&stopped["finish_reason"], &stopped["stop_string"]), (&json!("stop_string"), &json!("wor")));
}

#[test]
fn stop_tokens_are_named_by_id_or_text() {
    let tiny = fixture_arg("ternion-tiny");
    let generate = |more: &[&str]| {
        let args =
            ["generate", "Days", "-m", &tiny, "-q", "--json", "--temperature", "0", "--max-tokens", "12"];
        ternion(&[&args[..], &["--ignore-eos"], more].concat())
    };
    let whole = json(generate(&[]));
    let tokens = whole["tokens"].as_array().unwrap();
    let first = |at: usize| tokens.iter().position(|token| token["id"] == tokens[at]["id"]).unwrap();
    let at = (1..tokens.len()).find(|&at| first(at) == at).unwrap();
    let id = tokens[at]["id"].to_string();
    let stopped = json(generate(&["--stop-token", &id]));
    assert_eq!(
        (&stopped["finish_reason"], &stopped["stop_token"]),
        (&json!("stop_token"), &tokens[at]["id"])
    );
    assert_eq!(stopped["tokens"].as_array().unwrap().len(), at + 1);

    // The bias makes a special token certain, which ends the answer by its name in both ways.
    let eot = ["--logit-bias", "1273=1e30"];
    for (option, reason) in [("--stop-token", "stop_token"), ("--stop", "stop_string")] {
        let stopped = json(generate(&[&eot[..], &[option, "<|eot_id|>"]].concat()));
        assert_eq!((&stopped["finish_reason"], &stopped["text"]), (&json!(reason), &json!("")), "{option}");
    }
    failure(generate(&["--stop-token", "<|nothing|>"]), 2, &["--stop-token", "<|nothing|>", "expected"]);
    failure(echo(&["chat", "hi", "--stop-token", "5"]), 3, &["--stop-token", "echo"]);
}

#[test]
fn an_answer_has_the_form_that_was_asked_for() {
    let tiny = fixture_arg("ternion-tiny");
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let run = |more: &[&str]| {
        let args =
            ["generate", "How many days?", "-m", &tiny, "-q", "--json", "--seed", "1", "--temperature", "1"];
        ternion(&[&args[..], more].concat())
    };
    let schema = r#"{"type": "array", "items": {"enum": ["a", 1]}, "minItems": 2, "maxItems": 2}"#;
    let schema = file("schema.json", schema);
    let answer = json(run(&["--json-schema", &schema]));
    let items: Vec<serde_json::Value> = serde_json::from_str(answer["text"].as_str().unwrap()).unwrap();
    assert!(items.len() == 2 && items.iter().all(|item| *item == "a" || *item == 1), "{items:?}");
    assert_eq!(
        (&answer["constraint_complete"], &answer["finish_reason"]),
        (&json!(true), &json!("end_of_sequence"))
    );

    let word = json(run(&["--choice", "red,green", "--choice", "blue"]));
    assert!(["red", "green", "blue"].contains(&word["text"].as_str().unwrap()), "{word}");
    let digits = json(run(&["--regex", "-[0-9]{3}"]));
    assert_eq!(digits["text"].as_str().unwrap().len(), 4);
    let lark = file("grammar.lark", "start: \"(\" /[a-z]{2}/ \")\"\n");
    assert!(json(run(&["--lark", &lark]))["text"].as_str().unwrap().ends_with(')'));

    // An answer that is cut off is printed, and the command fails.
    let output = run(&["--json-schema", &schema, "--max-tokens", "2"]).output().unwrap();
    assert_eq!(output.status.code(), Some(4));
    assert!(stderr(&output).contains("incomplete"), "{}", stderr(&output));
    failure(run(&["--regex", "a(b"]), 2, &["constraint", "unclosed group"]);
    failure(run(&["--json-object", "--choice", "a"]), 2, &["--json-object"]);
    failure(run(&["--json-schema", &lark]), 2, &["grammar.lark", "is no JSON"]);
    failure(run(&["--json-schema", "missing.json"]), 2, &["missing.json"]);
    failure(echo(&["chat", "hi", "--json-object"]), 3, &["constraint", "echo"]);
}

#[test]
fn requests_out_of_range_name_the_field() {
    for (args, field) in [
        (["--max-tokens", "0"], "max_tokens"),
        (["--temperature", "NaN"], "temperature"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "1.5"], "top_p"),
        (["--min-p", "-0.1"], "min_p"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--presence-penalty", "-101"], "presence_penalty"),
        (["--stop", ""], "stop"),
    ] {
        failure(echo(&["chat", "hi", args[0], args[1]]), 2, &[field, "expected"]);
    }
    failure(echo(&["generate", ""]), 2, &["prompt"]);
    failure(echo(&["chat", "hi", "--threads", "0"]), 2, &["--threads", "at least 1"]);
}

#[test]
fn a_model_that_is_not_there_is_a_model_error() {
    failure(
        ternion(&["chat", "hi", "--model", "nowhere"]),
        3,
        &["nowhere", "expected a checkpoint's folder"],
    );
    failure(ternion(&["chat", "hi", "--backend", "ecko"]), 3, &["`ecko`", "compiled in", "echo"]);
    failure(
        ternion(&["inspect", "--model", &fixture_arg("nano-packed/config.json")]),
        3,
        &["name its folder"],
    );
    let mut command = ternion(&["chat", "hi"]);
    command.env("TERNION_MODEL", "/nowhere/else");
    failure(command, 3, &["/nowhere/else"]);
}

#[cfg(target_os = "linux")]
#[test]
fn paths_need_not_be_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join(std::ffi::OsStr::from_bytes(b"m\xff"));
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(fixture("nano-packed")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    let mut command = ternion(&["inspect", "--json", "--model"]);
    command.arg(&model);
    assert_eq!(json(command)["layers"], 2);
    let mut command = ternion(&["count", "hi", "--model"]);
    command.arg(folder.path().join(std::ffi::OsStr::from_bytes(b"\xfe")));
    failure(command, 3, &["no such file or folder"]);
}

#[test]
fn a_configuration_names_models_and_the_first_one_found_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let config = "default_model = \"one\"\n\
                  [models.one]\nbackend = \"echo\"\noptions = { reply = \"first\" }\n\
                  [models.two]\nbackend = \"echo\"\noptions = { reply = \"second\" }\n";
    std::fs::write(folder.path().join("ternion.toml"), config).unwrap();
    let other = r#"{"models": {"three": {"backend": "echo", "options": {"reply": "third"}}}}"#;
    std::fs::write(folder.path().join("other.json"), other).unwrap();
    let answer =
        |args: &[&str]| stdout(&success(ternion_in(folder.path(), &[&["chat", "hi"], args].concat())));

    assert_eq!(answer(&[]), "first\n", "./ternion.toml");
    assert_eq!(answer(&["--name", "two"]), "second\n");
    assert_eq!(answer(&["--model", "other.json"]), "third\n", "the only model is the default");
    let mut command = ternion_in(folder.path(), &["chat", "hi"]);
    command.env("TERNION_CONFIG", "other.json");
    assert_eq!(stdout(&success(command)), "third\n");
    let mut command = ternion_in(folder.path(), &["chat", "hi"]);
    command.env("TERNION_MODELS__ONE__OPTIONS__REPLY", "overridden");
    assert_eq!(stdout(&success(command)), "overridden\n");

    failure(ternion_in(folder.path(), &["chat", "hi", "--name", "tow"]), 3, &["`tow`", "one", "two"]);
    std::fs::write(folder.path().join("bad.toml"), "[models.a]\nbakend = \"echo\"\n").unwrap();
    failure(
        ternion_in(folder.path(), &["chat", "hi", "--model", "bad.toml"]),
        3,
        &["models.a.bakend", "`backend`", "bad.toml"],
    );
    failure(
        ternion(&["chat", "hi", "--name", "x", "--model", &fixture_arg("nano-packed")]),
        2,
        &["--name x"],
    );
}

#[test]
fn failures_of_the_backend_are_run_time_failures() {
    let folder = tempfile::tempdir().unwrap();
    let config = "[models.a]\nbackend = \"echo\"\noptions = { fail = \"backend\" }\n";
    std::fs::write(folder.path().join("ternion.toml"), config).unwrap();
    let output = ternion_in(folder.path(), &["chat", "hi"]).output().unwrap();
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_the_answer_with_its_line_and_130() {
    use std::io::Read;
    use std::process::{Command, Stdio};
    let folder = tempfile::tempdir().unwrap();
    let config = "[models.slow]\nbackend = \"echo\"\noptions = { delay_ms = 20 }\n";
    std::fs::write(folder.path().join("ternion.toml"), config).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_ternion"))
        .args(["chat", &"word ".repeat(1000), "--max-tokens", "5000"])
        .current_dir(folder.path())
        .env_remove("TERNION_MODEL")
        .env_remove("TERNION_CONFIG")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut text = vec![0; "word word".len()];
    child.stdout.as_mut().unwrap().read_exact(&mut text).unwrap();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    let rest = stdout(&output);
    assert!(rest.ends_with('\n') && rest.len() < 2000, "{rest}");
    assert!(stderr(&output).contains("tokens in"));
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_the_wait_for_standard_input() {
    use std::process::{Command, Stdio};
    let mut child = Command::new(env!("CARGO_BIN_EXE_ternion"))
        .args(["generate", "-", "--backend", "echo"])
        .current_dir(fixture(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // There is no sign of its waiting but that it does not end; the signal's handler stands within milliseconds.
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(child.try_wait().unwrap().is_none());
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let started = std::time::Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(started.elapsed().as_secs() < 20, "the first Ctrl-C was lost");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let code = child.wait().unwrap();
    // The handler's exit, or the system's where the signal came before it.
    assert!(code.code() == Some(130) || code.code().is_none(), "{code:?}");
}

/// Ctrl-C at any time while a file is written leaves neither it nor a part of it.
#[cfg(unix)]
#[test]
fn ctrl_c_leaves_nothing_half_written() {
    use std::process::{Command, Stdio};
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_ternion"))
        .args(["synth", "--shape", "bitnet-large", "--format", "gguf-tq1", "--out", "large.gguf"])
        .current_dir(folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let entries = || -> Vec<String> {
        let names = std::fs::read_dir(folder.path()).unwrap();
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    let started = std::time::Instant::now();
    while !entries().iter().any(|name| name.contains(".partial-")) {
        assert!(child.try_wait().unwrap().is_none() && started.elapsed().as_secs() < 60, "{:?}", entries());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(entries().is_empty(), "{:?}", entries());
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_standard_error_does_not_change_the_exit_code() {
    use std::process::Command;
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let status = Command::new(env!("CARGO_BIN_EXE_ternion"))
        .args(["count", "hi", "--model", "/no/such/model"])
        .stderr(full())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(3));
}

#[test]
fn schema_describes_the_configuration() {
    let schema = json(ternion(&["schema"]));
    assert!(schema["properties"]["models"].is_object());
}

#[test]
fn count_counts_what_the_model_will_see() {
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixture("nano-packed/golden.json")).unwrap()).unwrap();
    let model = fixture_arg("nano-packed");
    let cases = golden["cases"].as_array().unwrap();
    let mut counted = 0;
    for case in cases {
        let ids: Vec<u32> = serde_json::from_value(case["input_ids"].clone()).unwrap();
        if let Some(text) = case["text"].as_str() {
            let found = json(ternion(&["count", text, "--prompt", "--ids", "--model", &model]));
            assert_eq!(found, case["input_ids"], "{}", case["name"]);
            // All but the BOS that the tokenizer adds.
            let found = stdout(&success(ternion(&["count", text, "--model", &model])));
            assert_eq!(found, format!("{}\n", ids.len() - 1));
            counted += 1;
        }
        if let Some([message]) = case["messages"].as_array().map(Vec::as_slice) {
            let (role, text) = (message["role"].as_str().unwrap(), message["content"].as_str().unwrap());
            let args = ["count", text, "--chat", "--role", role, "--json", "--ids", "--model", &model];
            let found = json(ternion(&args));
            assert_eq!(found["ids"], case["input_ids"], "{}", case["name"]);
            assert_eq!(found["tokens"], ids.len());
            let parts = found["text_tokens"].as_u64().unwrap() + found["template_tokens"].as_u64().unwrap();
            assert_eq!(parts, ids.len() as u64);
            counted += 1;
        }
    }
    assert!(counted >= 4, "{counted}");
}

#[test]
fn count_needs_no_weights() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("nano-packed").join(name), folder.path().join(name)).unwrap();
    }
    let mut command = ternion_in(folder.path(), &["count", "--model", "."]);
    command.write_stdin("hello");
    assert!(stdout(&success(command)).trim().parse::<usize>().unwrap() > 0);
    failure(ternion_in(folder.path(), &["inspect", "--model", "."]), 3, &["model.safetensors"]);
}

#[test]
fn inspect_tells_what_a_checkpoint_is() {
    let found = json(ternion(&["inspect", "--json", "--model", &fixture_arg("nano-packed")]));
    assert_eq!(found["architecture"], "bitnet");
    assert_eq!(found["scale"], "multiplies");
    assert_eq!(found["tokenizer"]["chat_template"], true);
    assert_eq!(found["warnings"], json!([]));
    assert!(found["tensors"].is_null());
    assert!(found["memory"]["mapped_bytes"].as_u64().unwrap() > 0);
    let number = |key: &str| found[key].as_u64().unwrap();
    let heads = 2 * number("kv_heads") * number("layers");
    assert_eq!(found["memory"]["kv_type"], "exact");
    assert_eq!(found["memory"]["kv_bytes_per_token"], heads * (3 * number("head_dim") + 5));

    let all = json(ternion(&["inspect", "--json", "--tensors", "--model", &fixture_arg("llama-ternary")]));
    assert_eq!(all["scale"], "divides");
    let tensors = all["tensors"].as_array().unwrap();
    let grouped: u64 = all["groups"].as_array().unwrap().iter().map(|g| g["tensors"].as_u64().unwrap()).sum();
    assert_eq!(tensors.len() as u64, grouped);

    let text = stdout(&success(ternion(&["inspect", "--tensors", "--model", &fixture_arg("nano-master")])));
    assert!(text.contains("quantised at load") && text.contains("model.layers.0.mlp.down_proj"), "{text}");
}

#[test]
fn inspect_warns_of_a_missing_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture("nano-packed").join(name), folder.path().join(name)).unwrap();
    }
    let output = success(ternion_in(folder.path(), &["inspect", "--model", "."]));
    assert!(stderr(&output).contains("warning: the tokenizer cannot be used"), "{}", stderr(&output));
}

#[test]
fn synth_writes_what_inspect_reads_and_replaces_only_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let synth =
        |args: &[&str]| ternion_in(folder.path(), &[&["synth", "--shape", "nano", "--out"], args].concat());
    assert!(!stderr(&success(synth(&["new"]))).contains('\u{1b}'));
    let first = std::fs::read(folder.path().join("new/model.safetensors")).unwrap();
    let found = json(ternion_in(folder.path(), &["inspect", "--json", "--model", "new"]));
    assert_eq!((&found["layers"], &found["warnings"]), (&json!(2), &json!([])));

    failure(synth(&["new", "--seed", "1"]), 2, &["new", "--force"]);
    assert_eq!(std::fs::read(folder.path().join("new/model.safetensors")).unwrap(), first);
    assert_eq!(json(synth(&["new", "--seed", "1", "--force", "--json"]))["seed"], 1);
    assert_ne!(std::fs::read(folder.path().join("new/model.safetensors")).unwrap(), first);

    std::fs::create_dir(folder.path().join("mine")).unwrap();
    std::fs::write(folder.path().join("mine/notes.txt"), "keep").unwrap();
    failure(synth(&["mine", "--force"]), 2, &["mine", "no checkpoint"]);
    assert_eq!(std::fs::read(folder.path().join("mine/notes.txt")).unwrap(), b"keep");
    failure(
        ternion_in(folder.path(), &["synth", "--shape", "huge", "--out", "x"]),
        2,
        &["`huge`", "bitnet-2b4t"],
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left beside them");
}
