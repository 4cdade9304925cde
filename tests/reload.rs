//! Models that change while a host runs: by call and by the file, one in the other's place, and everything that can be
//! wrong with the new one while the old one keeps serving.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod host;

use std::{
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use host::{Counted, answer, config, fixture, say, served_by};
use ternion::{
    ErrorKind, Event, FinishReason, GenerateRequest, LlmBackend,
    models::{ModelEvent, ModelHandle, Models},
};
use tokio::sync::broadcast::Receiver;

/// Models that are counted, with `text` as their configuration.
fn counted(text: &str) -> (Models, Counted) {
    let counted = Counted::default();
    let mut registry = ternion::registry();
    registry.register(counted.clone());
    (Models::with_registry(config(text), registry).unwrap(), counted)
}

/// A model that says `reply`.
fn saying(reply: &str) -> String {
    format!("[models.m]\nbackend = \"counted\"\noptions.of = \"echo\"\noptions.reply = \"{reply}\"\n")
}

async fn says(model: &ModelHandle) -> String {
    answer(model, say("x")).await.unwrap().text
}

async fn failure(events: &mut Receiver<ModelEvent>) -> (Option<String>, ErrorKind, String) {
    loop {
        let event = tokio::time::timeout(Duration::from_secs(10), events.recv()).await.unwrap().unwrap();
        if let ModelEvent::ReloadFailed { model, kind, error } = event {
            return (model, kind, error);
        }
    }
}

#[tokio::test]
async fn a_handle_follows_the_configuration() {
    let (models, counted) = counted(&saying("old"));
    let model = models.get("m").await.unwrap();
    let clone = model.clone();
    assert_eq!(says(&model).await, "old");
    let reloaded = models.reload_with(config(&saying("old"))).await.unwrap();
    assert!(reloaded.changed.is_empty());
    let reloaded = models.reload_with(config(&saying("new"))).await.unwrap();
    assert_eq!(reloaded.changed, ["m"]);
    assert_eq!((says(&model).await, says(&clone).await), ("new".into(), "new".into()));
    assert_eq!((counted.loads.load(Ordering::SeqCst), counted.alive.load(Ordering::SeqCst)), (2, 1));
    drop((models, model, clone));
    assert_eq!(counted.alive.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_request_stays_on_the_model_that_it_began_on() {
    let (models, counted) = counted(&(saying("one two three") + "options.delay_ms = 5\n"));
    let mut events = models.events();
    let model = models.get("m").await.unwrap();
    let mut running = model.generate(say("x")).await.unwrap();
    while !matches!(running.next().await, Some(Ok(Event::Text(_)))) {}
    let pinned = model.pinned().await.unwrap();
    models.reload_with(config(&saying("new"))).await.unwrap();
    assert_eq!(says(&model).await, "new");
    assert_eq!(counted.alive.load(Ordering::SeqCst), 2, "the old one is still needed");
    assert_eq!(running.collect().await.unwrap().text, " two three");
    assert_eq!(answer(&*pinned, say("x")).await.unwrap().text, "one two three");
    drop(pinned);
    assert_eq!(counted.alive.load(Ordering::SeqCst), 1);
    let mut told = Vec::new();
    while let Ok(event) = events.try_recv() {
        told.push(event.to_string());
    }
    assert_eq!(
        told,
        ["`m` is loaded, on echo", "`m` is swapped, from echo to echo", "`m` on echo is given up"]
    );
}

#[tokio::test]
async fn a_broken_model_never_takes_over() {
    let broken = |how: &str| {
        let (of, path) =
            if how == "nan" { ("candle", "path = 'FIXTURES/nano-packed'\n") } else { ("echo", "") };
        config(&format!(
            "reload.check_seconds = 1\n[models.m]\nbackend = \"counted\"\n{path}\
             options = {{ of = \"{of}\", broken = \"{how}\" }}\n"
        ))
    };
    let (models, counted) = counted(&saying("old"));
    let mut events = models.events();
    let model = models.get("m").await.unwrap();
    for (how, kind, message) in [
        ("load", ErrorKind::InvalidModel, "told to be broken"),
        ("answer", ErrorKind::Backend, "told to be broken"),
        ("hang", ErrorKind::Timeout, "no answer to the prompts of the check within 1 s"),
        ("endless", ErrorKind::Backend, "the answer stopped without an end"),
        ("nan", ErrorKind::Backend, "has the log-probability NaN"),
    ] {
        let error = models.reload_with(broken(how)).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{how}: {error}");
        assert!(error.to_string().contains(message) && error.to_string().contains("model: m"), "{error}");
        let told = failure(&mut events).await;
        assert_eq!((told.0.as_deref(), told.1), (Some("m"), kind));
        assert_eq!(says(&model).await, "old", "{how}");
        assert_eq!(counted.alive.load(Ordering::SeqCst), 1, "{how}: nothing is left of the new one");
    }
    let mut unchecked = broken("answer");
    unchecked.reload.check = Some(Vec::new());
    models.reload_with(unchecked).await.unwrap();
    assert_eq!(answer(&model, say("x")).await.unwrap_err().kind(), ErrorKind::Backend);
}

#[tokio::test]
async fn the_check_is_what_the_configuration_says() {
    let (models, _) = counted(&saying("old"));
    let model = models.get("m").await.unwrap();
    let small = |check: &str| {
        config(&format!(
            "{check}[models.m]\npath = 'FIXTURES/nano-packed'\ncontext_length = 8\nbackend = \"candle\"\n"
        ))
    };
    let error =
        models.reload_with(small("reload.check = [\"one two three four five\"]\n")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ContextOverflow);
    assert!(error.to_string().contains("prompt: one two three four five"), "{error}");
    assert_eq!(says(&model).await, "old");
    // The prompts that nobody chose are left out where they do not fit.
    models.reload_with(small("")).await.unwrap();
    assert_eq!(model.info().limits.context_length, 8);
}

#[tokio::test]
async fn a_broken_second_model_does_not_concern_the_first() {
    let two = |m: &str, broken: &str| {
        config(&format!(
            "{}[models.second]\nbackend = \"counted\"\noptions = {{ of = \"echo\"{broken} }}\n",
            saying(m)
        ))
    };
    let (models, _) = counted(&saying("old"));
    models.reload_with(two("old", "")).await.unwrap();
    let (first, second) = (models.get("m").await.unwrap(), models.get("second").await.unwrap());
    let error = models.reload_with(two("new", ", broken = \"load\"")).await.unwrap_err();
    assert!(error.to_string().contains("model: second"), "{error}");
    assert!(error.to_string().contains("not changed: second"), "{error}");
    assert_eq!(says(&first).await, "new");
    assert_eq!(answer(&second, say("as before")).await.unwrap().text, "as before");
    // The same configuration again is another attempt.
    assert!(models.reload_with(two("new", ", broken = \"load\"")).await.is_err());
    assert!(models.reload_with(two("new", "")).await.unwrap().changed.is_empty());
}

#[tokio::test]
async fn long_requests_are_not_hurt_by_a_smaller_context() {
    let sized = |context: usize| {
        config(&format!(
            "[models.m]\nbackend = \"candle\"\npath = 'FIXTURES/nano-packed'\ncontext_length = {context}\nthreads = 1\n"
        ))
    };
    let models = Models::new(sized(256)).unwrap();
    let model = models.get("m").await.unwrap();
    let long = || {
        let mut request = GenerateRequest::new(vec![5; 100]).with_max_tokens(100);
        request.params.ignore_eos = true;
        request.params.sampling = ternion::Sampling::greedy();
        request
    };
    let expected = answer(&model, long()).await.unwrap().tokens;
    let mut running = Vec::new();
    for _ in 0..3 {
        let mut stream = model.generate(long()).await.unwrap();
        while !matches!(stream.next().await, Some(Ok(Event::Token(_)))) {}
        running.push(stream);
    }
    models.reload_with(sized(64)).await.unwrap();
    assert_eq!(model.info().limits.context_length, 64);
    let error = model.generate(long()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ContextOverflow, "what comes now is held to the new context");
    for stream in running {
        let end = stream.collect().await.unwrap();
        assert_eq!((end.finish_reason, end.tokens), (FinishReason::MaxTokens, expected[1..].to_vec()));
    }
}

#[tokio::test]
async fn layers_and_fallback_change_without_loading() {
    let (models, counted) = counted(&saying("same"));
    let model = models.get("m").await.unwrap();
    let limited = saying("same")
        + "layers.limit = { concurrent = 1, waiting = 2 }\nfallback = [\"b\"]\n"
        + "[models.b]\nbackend = \"echo\"\n";
    let reloaded = models.reload_with(config(&limited)).await.unwrap();
    assert_eq!((reloaded.changed, reloaded.added), (vec!["m".to_owned()], vec!["b".to_owned()]));
    assert_eq!(model.info().limits.max_queued, 2);
    assert_eq!(says(&model).await, "same");
    assert_eq!(counted.loads.load(Ordering::SeqCst), 1);
    assert_eq!(counted.alive.load(Ordering::SeqCst), 1);
    // The limit's fourth request finds no place, and the new fallback has one.
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(model.generate(say("b")).await.unwrap());
    }
    let last = streams.pop().unwrap().collect().await.unwrap();
    assert_eq!(served_by(&last), "b on echo");
}

#[tokio::test]
async fn names_come_and_go() {
    let (models, counted) = counted(&saying("old"));
    let model = models.get("m").await.unwrap();
    let other = "[models.n]\nbackend = \"echo\"\n";
    let reloaded = models.reload_with(config(other)).await.unwrap();
    assert_eq!((reloaded.added, reloaded.removed), (vec!["n".to_owned()], vec!["m".to_owned()]));
    assert_eq!(models.names(), ["n"]);
    let error = models.get("m").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.to_string().contains("no model `m`; configured: n"), "{error}");
    assert_eq!(says(&model).await, "old", "who has a handle keeps the model");
    models.reload_with(config(&(saying("back") + other))).await.unwrap();
    assert_eq!(says(&model).await, "back");
    models.reload_with(config(other)).await.unwrap();
    assert_eq!(counted.alive.load(Ordering::SeqCst), 1);
    drop(model);
    assert_eq!(counted.alive.load(Ordering::SeqCst), 0, "nobody can reach it any more");

    let error = models.reload_with(config("")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert_eq!(models.names(), ["n"]);
}

#[tokio::test]
async fn the_default_is_followed_when_it_is_there() {
    let two = |default: &str, options: &str| {
        config(&format!(
            "default_model = \"{default}\"\n[models.a]\nbackend = \"echo\"\noptions.reply = \"a\"\n\
             [models.b]\nbackend = \"counted\"\noptions = {{ of = \"echo\", reply = \"b\"{options} }}\n"
        ))
    };
    let mut registry = ternion::registry();
    registry.register(Counted::default());
    let models = Models::with_registry(two("a", ", broken = \"load\""), registry).unwrap();
    let (default, a) = (models.default_model().await.unwrap(), models.get("a").await.unwrap());
    assert_eq!(says(&default).await, "a");
    assert!(models.reload_with(two("b", ", broken = \"load\"")).await.is_err());
    assert_eq!(says(&default).await, "a");
    models.reload_with(two("b", "")).await.unwrap();
    assert_eq!((says(&default).await.as_str(), says(&a).await.as_str()), ("b", "a"));
    assert_eq!(default.name(), "b");
}

const AFTER: &str = "reload = { mode = \"unload_then_load\", drain_seconds = 1 }\n";

#[tokio::test]
async fn after_the_old_one_is_gone_requests_wait_for_the_new() {
    let (models, counted) =
        counted(&(AFTER.to_owned() + &saying("one two three") + "options.delay_ms = 10\n"));
    let model = models.get("m").await.unwrap();
    let running = model.generate(say("x")).await.unwrap();
    let reading = tokio::spawn(running.collect());
    let change = {
        let models = models.clone();
        let new = config(&(AFTER.to_owned() + &saying("new") + "options.load_ms = 100\n"));
        tokio::spawn(async move { models.reload_with(new).await })
    };
    tokio::time::sleep(Duration::from_millis(5)).await;
    // While the old one ends and the new one is loaded, the old one's description is there and requests wait.
    assert_eq!(model.info().name, "m");
    let (waited, cancelled) = tokio::join!(answer(&model, say("x")), async {
        let request = say("x");
        let cancel = request.cancel.clone();
        let cancelling = async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            cancel.cancel();
        };
        tokio::join!(answer(&model, request), cancelling).0
    });
    assert_eq!(waited.unwrap().text, "new");
    assert_eq!(cancelled.unwrap().finish_reason, FinishReason::Cancelled);
    assert_eq!(reading.await.unwrap().unwrap().text, "one two three");
    assert_eq!(change.await.unwrap().unwrap().changed, ["m"]);
    assert_eq!(counted.most_alive.load(Ordering::SeqCst), 1, "never two at a time");
}

#[tokio::test]
async fn after_a_failure_the_old_one_is_loaded_again() {
    let (models, counted) = counted(&(AFTER.to_owned() + &saying("old")));
    let model = models.get("m").await.unwrap();
    for how in ["load", "answer"] {
        let broken = format!(
            "{AFTER}[models.m]\nbackend = \"counted\"\n\
             options = {{ of = \"echo\", broken = \"{how}\", load_ms = 50 }}\n"
        );
        let change = {
            let models = models.clone();
            tokio::spawn(async move { models.reload_with(config(&broken)).await })
        };
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(says(&model).await, "old", "a request that waited for the new one");
        assert!(change.await.unwrap().unwrap_err().to_string().contains("told to be broken"));
        assert_eq!(says(&model).await, "old");
    }
    assert_eq!(counted.most_alive.load(Ordering::SeqCst), 1);
    assert_eq!(counted.alive.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_request_that_does_not_end_keeps_the_old_model() {
    let (models, counted) = counted(&(AFTER.to_owned() + &saying("old")));
    let model = models.get("m").await.unwrap();
    let unread = model.generate(say("x")).await.unwrap();
    let error = models.reload_with(config(&(AFTER.to_owned() + &saying("new")))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.to_string().contains("have not ended within 1 s"), "{error}");
    assert_eq!((says(&model).await.as_str(), counted.loads.load(Ordering::SeqCst)), ("old", 1));
    drop(unread);
    models.reload_with(config(&(AFTER.to_owned() + &saying("new")))).await.unwrap();
    assert_eq!(says(&model).await, "new");
}

#[tokio::test]
async fn an_engine_is_out_of_memory_before_the_next_is_loaded() {
    let nano = |context: usize| {
        config(&format!(
            "{AFTER}[models.m]\nbackend = \"candle\"\npath = 'FIXTURES/nano-packed'\ncontext_length = {context}\n"
        ))
    };
    let models = Models::new(nano(64)).unwrap();
    let model = models.get("m").await.unwrap();
    let gone = model.unloaded();
    tokio::pin!(gone);
    assert!(tokio::time::timeout(Duration::from_millis(20), &mut gone).await.is_err(), "it is in use");
    models.reload_with(nano(32)).await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), gone).await.unwrap();
    assert_eq!(model.info().limits.context_length, 32);
}

#[tokio::test]
async fn reloads_at_the_same_time_are_one_after_the_other() {
    let slow = |reply: &str| config(&(saying(reply) + "options.load_ms = 30\n"));
    let (models, counted) = counted(&saying("0"));
    let model = models.get("m").await.unwrap();
    let changes: Vec<_> = (1..=4)
        .map(|i| {
            let (models, new) = (models.clone(), slow(&i.to_string()));
            tokio::spawn(async move { models.reload_with(new).await })
        })
        .collect();
    // One that nobody waits for goes on all the same.
    let dropped = models.reload_with(slow("5"));
    assert!(tokio::time::timeout(Duration::from_millis(5), dropped).await.is_err());
    for change in changes {
        change.await.unwrap().unwrap();
    }
    models.reload_with(slow("6")).await.unwrap();
    assert_eq!(says(&model).await, "6");
    assert_eq!(counted.loads.load(Ordering::SeqCst), 7);
    assert!(counted.most_alive.load(Ordering::SeqCst) <= 2, "the old one and one new one");
}

/// A configuration file in a folder of its own, looked at every 20 ms.
struct File {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl File {
    fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host.toml");
        let file = Self { _folder: folder, path };
        file.write(text);
        file
    }

    fn write(&self, text: &str) {
        std::fs::write(&self.path, Self::text(text)).unwrap();
    }

    fn text(text: &str) -> String {
        format!("reload.poll_ms = 20\n{text}")
    }

    /// As editors do it: another file takes its place.
    fn replace(&self, text: &str) {
        let new = self.path.with_extension("toml~");
        std::fs::write(&new, Self::text(text)).unwrap();
        std::fs::rename(new, &self.path).unwrap();
    }
}

fn echo_saying(reply: &str) -> String {
    format!("[models.m]\nbackend = \"echo\"\noptions.reply = \"{reply}\"\n")
}

async fn comes_to_say(model: &ModelHandle, expected: &str) {
    for _ in 0..500 {
        if says(model).await == expected {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it still says {:?}, not {expected:?}", says(model).await);
}

#[tokio::test]
async fn a_watched_file_takes_effect_however_it_is_written() {
    let file = File::new(&echo_saying("first"));
    let models = Models::load_file(&file.path).await.unwrap();
    let mut events = models.events();
    let model = models.get("m").await.unwrap();
    let watch = models.watch().unwrap();
    assert_eq!(says(&model).await, "first");
    file.write(&echo_saying("written"));
    comes_to_say(&model, "written").await;
    file.replace(&echo_saying("replaced"));
    comes_to_say(&model, "replaced").await;

    // Written slowly: half of it stays for a while, and is no valid file.
    let text = File::text(&echo_saying("complete"));
    std::fs::write(&file.path, &text[..text.len() - 4]).unwrap();
    let (name, kind, error) = failure(&mut events).await;
    assert_eq!((name, kind), (None, ErrorKind::InvalidConfig), "{error}");
    assert!(error.contains("not valid TOML") && error.contains("host.toml"), "{error}");
    assert_eq!(says(&model).await, "replaced");
    std::fs::write(&file.path, text).unwrap();
    comes_to_say(&model, "complete").await;

    // Empty, then gone, then back.
    std::fs::write(&file.path, "").unwrap();
    assert_eq!(failure(&mut events).await.1, ErrorKind::InvalidConfig);
    std::fs::remove_file(&file.path).unwrap();
    assert_eq!(failure(&mut events).await.1, ErrorKind::NotFound);
    assert_eq!(says(&model).await, "complete");
    file.write(&echo_saying("back"));
    comes_to_say(&model, "back").await;

    drop(watch);
    file.write(&echo_saying("unwatched"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(says(&model).await, "back");
    models.reload().await.unwrap();
    assert_eq!(says(&model).await, "unwatched");
}

#[tokio::test]
async fn a_bad_file_is_told_and_changes_nothing() {
    let file = File::new(&echo_saying("old"));
    let models = Models::load_file(&file.path).await.unwrap();
    let model = models.get("m").await.unwrap();
    let twice = echo_saying("one") + &echo_saying("two");
    for (text, expected) in [
        (
            echo_saying("new") + "context_lenth = 5\n",
            "unknown key `models.m.context_lenth`; did you mean `context_length`?",
        ),
        ("reloads.mode = \"unload_then_load\"\n".to_owned() + &echo_saying("new"), "unknown key `reloads`"),
        (echo_saying("new") + "options.replly = \"x\"\n", "unknown key `options.replly`"),
        (twice, "duplicate key"),
        (echo_saying("new") + "fallback = [\"n\"]\n", "models.m.fallback: no model `n`"),
        (echo_saying("new") + "context_length = 1\n", "models.m.context_length: 1 is out of range"),
        (echo_saying("new").replace("echo", "ecko"), "unknown backend `ecko`"),
        (String::new(), "no model is configured"),
    ] {
        file.write(&text);
        let error = models.reload().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!error.to_string().contains('\n'), "{error}");
        assert_eq!(says(&model).await, "old");
    }
    file.write(&echo_saying("new"));
    models.reload().await.unwrap();
    assert_eq!(says(&model).await, "new");
}

#[tokio::test]
async fn files_of_a_model_that_changed_are_a_change() {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture("nano-packed")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let text = format!("[models.m]\npath = '{}'\n", folder.path().display());
    let models = Models::new(config(&text)).unwrap();
    let model = models.get("m").await.unwrap();
    assert!(models.reload_with(config(&text)).await.unwrap().changed.is_empty());
    // Its weights are cut off: seen, refused, and the old ones go on.
    let weights = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(weights.with_extension("new"), &bytes[..bytes.len() / 2]).unwrap();
    std::fs::rename(weights.with_extension("new"), &weights).unwrap();
    let error = models.reload_with(config(&text)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidModel);
    answer(&model, say("still here").with_max_tokens(2)).await.unwrap();
    std::fs::write(weights.with_extension("new"), &bytes).unwrap();
    std::fs::rename(weights.with_extension("new"), &weights).unwrap();
    assert_eq!(models.reload_with(config(&text)).await.unwrap().changed, ["m"]);
    answer(&model, say("again").with_max_tokens(2)).await.unwrap();
}

#[tokio::test]
async fn models_without_a_file_say_so() {
    let (models, _) = counted(&saying("x"));
    assert_eq!(models.reload().await.unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(models.watch().unwrap_err().kind(), ErrorKind::Unsupported);
    let handle: Arc<dyn LlmBackend> = Arc::new(models.get("m").await.unwrap());
    assert_eq!(handle.info().backend, "echo");
}
