//! A host that keeps one handle while its model goes from engine to engine under load, and no request fails.
//!
//! The same small checkpoint is written in the format of each engine that is compiled in. Then the host's configuration file
//! is rewritten again and again, and nothing else is done: the watcher sees it, loads the new model beside the old one,
//! lets it answer a few prompts, and puts it in the old one's place, while clients keep asking.
//!
//! ```console
//! $ cargo run --release -p ternion --features llama-cpp,onnx --example hot_swap
//! ```
//!
//! The model is a small one that has learned a few answers. With the feature `dense` a dense model of random weights, which answers
//! nonsense, takes its turn, and with `openai` a remote one, if `HOT_SWAP_URL` is the address of a server:
//! the three kinds of `examples/hosts/three.toml`.
//!
//! ```console
//! $ cargo run --release -- serve --model fixtures/ternion-tiny --port 8123 &
//! $ HOT_SWAP_URL=http://127.0.0.1:8123/v1 cargo run --release -p ternion --features dense,openai --example hot_swap
//! ```
//!
//! An engine that cannot be loaded, as ONNX Runtime where its library is not installed, shows the other side: the error is
//! told, and the old model goes on.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use ternion::{
    GenerateRequest, LlmBackend, Message, Result, Sampling,
    formats::{
        Checkpoint,
        convert::{Options, Target, convert},
    },
    models::{ModelEvent, Models},
};

const CLIENTS: usize = 4;
const ROUNDS: usize = 3;

/// All that a client knows of the model.
async fn client(model: Arc<dyn LlmBackend>, log: Arc<Log>) {
    while !log.stop.load(Ordering::Relaxed) {
        let question = GenerateRequest::chat([Message::user("How many days are in a week?")])
            .with_max_tokens(16)
            .with_sampling(Sampling::greedy());
        let asked = Instant::now();
        let answer = match model.generate(question).await {
            Ok(stream) => stream.collect().await,
            Err(error) => Err(error),
        };
        let mut seen = log.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        seen.longest = seen.longest.max(asked.elapsed());
        match answer {
            Ok(answer) => {
                let who = answer.served_by.map_or_else(|| "?".to_owned(), |who| who.backend);
                *seen.answers.entry((who, answer.text)).or_default() += 1;
            }
            Err(error) => seen.failures.push(error.to_string()),
        }
    }
}

/// What the clients have seen.
#[derive(Default)]
struct Log {
    stop: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// How often an engine gave an answer.
    answers: BTreeMap<(String, String), usize>,
    longest: Duration,
    failures: Vec<String>,
}

/// What goes into the configuration for each engine that is compiled in: the checkpoint in a format of its own, a dense model
/// beside it, and a remote model where `HOT_SWAP_URL` names a server.
fn models(folder: &Path) -> Result<Vec<String>> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    let source = fixtures.join("ternion-tiny");
    let checkpoint = Checkpoint::open(&source)?;
    let local = |engine: &str, path: &Path| format!("backend = \"{engine}\"\npath = '{}'\n", path.display());
    let mut models = vec![local("candle", &source)];
    let wanted = [
        (cfg!(feature = "llama-cpp"), "llama-cpp", Target::GgufI2s, "model.gguf"),
        (cfg!(feature = "onnx"), "onnx", Target::Onnx, "model-onnx"),
    ];
    for (_, engine, target, name) in wanted.into_iter().filter(|(compiled_in, ..)| *compiled_in) {
        let out = folder.join(name);
        convert(&checkpoint, &out, &Options::new(target), &mut |_, _| {})?;
        println!("converted to {target} for {engine}");
        models.push(local(engine, &out));
    }
    if cfg!(feature = "dense") {
        models.push(local("auto", &fixtures.join("dense/qwen2")));
    }
    if cfg!(feature = "openai")
        && let Ok(url) = std::env::var("HOT_SWAP_URL")
    {
        models.push(format!("backend = \"openai\"\noptions.url = \"{url}\"\n"));
    }
    if models.len() == 1 {
        // One engine can still be swapped for itself, with another format.
        let out = folder.join("model.gguf");
        convert(&checkpoint, &out, &Options::new(Target::GgufI2s), &mut |_, _| {})?;
        models.push(local("candle", &out));
    }
    Ok(models)
}

fn write(file: &Path, model: &str) -> std::io::Result<()> {
    let context = if model.contains("path") { "context_length = 128\n" } else { "" };
    let text = format!("reload.poll_ms = 50\n\n[models.chat]\n{context}{model}");
    // In one piece, so that nobody sees half of it; the watcher would wait for the rest, though.
    let new = file.with_extension("new");
    std::fs::write(&new, text)?;
    std::fs::rename(new, file)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let all = models(folder.path())?;
    let file = folder.path().join("host.toml");
    write(&file, &all[0])?;

    let models = Models::load_file(&file).await?;
    let model: Arc<dyn LlmBackend> = Arc::new(models.get("chat").await?);
    let mut events = models.events();
    let _watch = models.watch()?;
    let log = Arc::new(Log::default());
    let clients: Vec<_> =
        (0..CLIENTS).map(|_| tokio::spawn(client(Arc::clone(&model), Arc::clone(&log)))).collect();

    for wanted in all.iter().cycle().skip(1).take(ROUNDS * all.len()) {
        tokio::time::sleep(Duration::from_millis(300)).await; // some answers by the present one
        println!("the file says: {}", wanted.lines().last().unwrap_or_default());
        let wrote = Instant::now();
        write(&file, wanted)?;
        loop {
            let event = events.recv().await?;
            println!("{:>5} ms  {event}", wrote.elapsed().as_millis());
            if matches!(event, ModelEvent::Swapped { .. } | ModelEvent::ReloadFailed { .. }) {
                break;
            }
        }
    }

    log.stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await?;
    }
    let seen = log.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    println!();
    for ((engine, text), count) in &seen.answers {
        println!("{count:>6} answers by {engine}: {text:?}");
    }
    println!("longest answer: {} ms", seen.longest.as_millis());
    println!("failed requests: {}", seen.failures.len());
    match seen.failures.first() {
        None => Ok(()),
        Some(failure) => Err(failure.clone().into()),
    }
}
