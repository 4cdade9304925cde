//! `ternion serve` as a process: its address, its keys, its end.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "cli/common.rs"]
mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{failure, fixture_arg, ternion};

/// A server on a port of its own; killed if the test fails.
struct Serving {
    child: Child,
    address: String,
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

fn serve(args: &[&str], key: Option<&str>, folder: &Path) -> Serving {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ternion"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TERNION_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    if let Some(key) = key {
        command.env("TERNION_API_KEY", key);
    }
    command.args(["serve", "--json", "--port", "0"]).args(args).current_dir(folder);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut text = String::new();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    while !text.ends_with("}\n") {
        assert_ne!(output.read_line(&mut text).unwrap(), 0, "it has ended: {text}");
    }
    let said: serde_json::Value = serde_json::from_str(&text).unwrap();
    let address = said["url"].as_str().unwrap().strip_prefix("http://").unwrap().to_owned();
    Serving { child, address }
}

/// The status and the text of an answer.
fn ask(address: &str, request: &str, body: &str, key: Option<&str>) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    let key = key.map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
    let length = body.len();
    write!(stream, "{request} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n{key}content-length: {length}\r\n\r\n{body}").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    (answer.split(' ').nth(1).unwrap().parse().unwrap(), answer)
}

const CHAT: &str = "POST /v1/chat/completions";
const QUESTION: &str =
    r#"{"messages": [{"role": "user", "content": "How many days are in a week?"}], "temperature": 0}"#;

fn wait_until_ready(server: &mut Serving) {
    let begun = Instant::now();
    while ask(&server.address, "GET /ready", "", None).0 != 200 {
        assert!(server.child.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn signal(server: &Serving, signal: &str) {
    assert!(Command::new("kill").args([signal, &server.child.id().to_string()]).status().unwrap().success());
}

/// The exit code and what the log says.
fn ended(mut server: Serving) -> (i32, String) {
    let begun = Instant::now();
    while server.child.try_wait().unwrap().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(30), "it does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut log = String::new();
    server.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    (server.child.wait().unwrap().code().unwrap(), log)
}

#[test]
fn the_small_model_is_served_without_a_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = serve(&[], None, folder.path());
    wait_until_ready(&mut server);
    let (status, answer) = ask(&server.address, CHAT, QUESTION, None);
    assert!(status == 200 && answer.contains("even"), "{answer}");
    assert!(ask(&server.address, "GET /", "", None).1.contains("<title>Ternion</title>"));
    signal(&server, "-TERM");
    let (code, log) = ended(server);
    assert_eq!(code, 0, "an end in order: {log}");
    assert!(log.contains("path=\"/v1/chat/completions\" status=200"), "{log}");
}

#[test]
fn the_key_of_the_environment_is_needed_and_not_logged() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = serve(&["--backend", "echo", "--host", "0.0.0.0"], Some("sk-secret"), folder.path());
    server.address = server.address.replace("0.0.0.0", "127.0.0.1");
    wait_until_ready(&mut server);
    assert_eq!(ask(&server.address, CHAT, QUESTION, None).0, 401);
    assert_eq!(ask(&server.address, CHAT, QUESTION, Some("sk-wrong")).0, 401);
    assert_eq!(ask(&server.address, CHAT, QUESTION, Some("sk-secret")).0, 200);
    signal(&server, "-INT");
    let (code, log) = ended(server);
    assert_eq!(code, 0, "{log}");
    assert!(!log.contains("sk-"), "{log}");
}

#[test]
fn a_change_of_the_file_takes_effect() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("models.toml");
    let write = |reply: &str| {
        let next = folder.path().join("next.toml");
        std::fs::write(
            &next,
            format!("reload.poll_ms = 20\n[models.m]\nbackend = \"echo\"\noptions.reply = {reply:?}\n"),
        )
        .unwrap();
        std::fs::rename(&next, &path).unwrap();
    };
    write("old");
    let mut server = serve(&["--config", path.to_str().unwrap()], None, folder.path());
    wait_until_ready(&mut server);
    assert!(ask(&server.address, CHAT, QUESTION, None).1.contains("\"content\":\"old\""));
    write("new");
    let begun = Instant::now();
    while !ask(&server.address, CHAT, QUESTION, None).1.contains("\"content\":\"new\"") {
        assert!(begun.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn mistakes_are_told_at_once() {
    let open = ["serve", "--backend", "echo", "--host", "0.0.0.0", "--port", "0"];
    failure(ternion(&open), 3, &["0.0.0.0:0", "--allow-anonymous"]);
    failure(ternion(&["serve", "--model", "no/such/model", "--port", "0"]), 3, &["no such file"]);
    let no_keys = ["serve", "--backend", "echo", "--port", "0", "--api-key-file", "no/such/keys"];
    failure(ternion(&no_keys), 3, &["no/such/keys"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    failure(ternion(&["serve", "--backend", "echo", "--port", &port]), 4, &["the address cannot be used"]);
    // A checkpoint that cannot be loaded ends the server.
    let damaged = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json"] {
        std::fs::copy(format!("{}/{file}", fixture_arg("ternion-tiny")), damaged.path().join(file)).unwrap();
    }
    std::fs::write(damaged.path().join("model.safetensors"), "not safetensors").unwrap();
    failure(ternion(&["serve", "--model", damaged.path().to_str().unwrap(), "--port", "0"]), 3, &["load"]);
}

/// The models of `examples/hosts/three.toml` take turns under one name while clients ask: none of them loses a request.
#[cfg(feature = "openai")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_kinds_of_models_are_swapped_under_load() {
    use std::{
        collections::BTreeMap,
        sync::{
            Arc, Mutex,
            atomic::{AtomicBool, Ordering},
        },
    };
    use ternion::{GenerateRequest, LlmBackend, Message, Sampling, config::Config, models::Models};

    let folder = tempfile::tempdir().unwrap();
    let mut server =
        serve(&["--model", &fixture_arg("ternion-tiny"), "--context-length", "256"], None, folder.path());
    wait_until_ready(&mut server);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/hosts/three.toml");
    let example = Config::load(&file).unwrap();
    let kind = |name: &str| {
        let mut model = example.models[name].clone();
        if name == "remote" {
            model.options.insert("url".into(), format!("http://{}/v1", server.address).into());
        } else {
            model.threads = Some(1);
        }
        model
    };
    let models = Models::new(Config::single("chat", kind("bitnet"))).unwrap();
    let handle: Arc<dyn LlmBackend> = Arc::new(models.get("chat").await.unwrap());
    let (stop, served) =
        (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(BTreeMap::<String, usize>::new())));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (handle, stop, served) = (Arc::clone(&handle), Arc::clone(&stop), Arc::clone(&served));
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let question = GenerateRequest::chat([Message::user("How many days are in a week?")]);
                    let question = question.with_max_tokens(8).with_sampling(Sampling::greedy());
                    let answer = handle.generate(question).await.unwrap().collect().await.unwrap();
                    let who = answer.served_by.unwrap();
                    *served
                        .lock()
                        .unwrap()
                        .entry(format!("{} {}", who.backend, handle.info().architecture))
                        .or_default() += 1;
                }
            })
        })
        .collect();
    for name in ["dense", "remote", "bitnet", "remote", "dense", "bitnet"] {
        tokio::time::sleep(Duration::from_millis(200)).await;
        models
            .reload_with(Config::single("chat", kind(name)))
            .await
            .unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    let served = served.lock().unwrap();
    println!("{served:?}");
    for kind in ["candle bitnet", "candle qwen2", "openai "] {
        assert!(served.keys().any(|key| key.starts_with(kind)), "{kind}: {served:?}");
    }
}
