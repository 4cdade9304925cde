//! Models that stop by themselves, and models that cannot be loaded at first: they come back.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod host;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use host::{answer, config, echo, fixture, say, served_by};
use ternion::{
    BackendWrapper, Error, ErrorKind, GenerateRequest, GenerateStream, LlmBackend, ModelInfo, Result,
    config::ModelConfig,
    engine::{CausalLm, Engine, EngineOptions, SequenceId, SequenceInput},
    formats::Checkpoint,
    models::{ModelEvent, Models},
    registry::{BackendFactory, Progress},
    text::Tokenizer,
};

/// The backend `mortal`: an echo that stops when a request says `die`.
#[derive(Clone, Default)]
struct Mortal {
    /// Calls of `load`.
    attempts: Arc<AtomicUsize>,
    /// Loading fails so often.
    broken: Arc<AtomicUsize>,
    /// Whether `is_closed` tells of it, or only the errors.
    silent: Arc<AtomicBool>,
}

struct MortalBackend {
    inner: Arc<dyn LlmBackend>,
    dead: AtomicBool,
    silent: Arc<AtomicBool>,
}

#[async_trait]
impl BackendFactory for Mortal {
    fn name(&self) -> &'static str {
        "mortal"
    }

    fn description(&self) -> &'static str {
        "stops when it is told to"
    }

    async fn load(&self, _: &str, _: &ModelConfig, _: Progress) -> Result<Arc<dyn LlmBackend>> {
        self.attempts.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(20)).await;
        if self.broken.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
            return Err(Error::invalid_model("told to be broken"));
        }
        let silent = Arc::clone(&self.silent);
        Ok(Arc::new(MortalBackend { inner: echo("{}"), dead: AtomicBool::new(false), silent }))
    }
}

#[async_trait]
impl BackendWrapper for MortalBackend {
    fn inner(&self) -> &dyn LlmBackend {
        &*self.inner
    }

    fn is_closed(&self) -> bool {
        self.dead.load(Ordering::SeqCst) && !self.silent.load(Ordering::SeqCst)
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        if format!("{:?}", request.params.prompt).contains("die") {
            self.dead.store(true, Ordering::SeqCst);
        }
        if self.dead.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Closed, "dead"));
        }
        self.inner.generate(request).await
    }
}

const MORTAL: &str = "[reload]\npoll_ms = 10\n[models.m]\nbackend = \"mortal\"\n";

fn mortal(text: &str) -> (Models, Mortal) {
    let mortal = Mortal::default();
    let mut registry = ternion::registry();
    registry.register(mortal.clone());
    (Models::with_registry(config(text), registry).unwrap(), mortal)
}

async fn kind(model: &dyn LlmBackend, text: &str) -> Option<ErrorKind> {
    answer(model, say(text)).await.err().map(|e| e.kind())
}

#[tokio::test(start_paused = true)]
async fn a_model_that_has_stopped_is_loaded_by_the_next_request() {
    for silent in [false, true] {
        let (models, mortal) = mortal(MORTAL);
        mortal.silent.store(silent, Ordering::SeqCst);
        let model = models.get("m").await.unwrap();
        let mut events = models.events();
        assert_eq!(kind(&model, "die").await, Some(ErrorKind::Closed));
        // Many at once share one load.
        let requests = (0..20).map(|_| {
            let model = model.clone();
            tokio::spawn(async move { kind(&model, "hello").await })
        });
        for request in requests.collect::<Vec<_>>() {
            assert_eq!(request.await.unwrap(), None);
        }
        assert_eq!(mortal.attempts.load(Ordering::SeqCst), 2);
        assert!(matches!(events.recv().await.unwrap(), ModelEvent::Stopped { model, .. } if model == "m"));
        while !matches!(events.recv().await.unwrap(), ModelEvent::Loaded { .. }) {}
    }
}

#[tokio::test(start_paused = true)]
async fn a_model_that_has_stopped_is_loaded_by_get_and_reload() {
    for silent in [false, true] {
        let (models, mortal) = mortal(MORTAL);
        mortal.silent.store(silent, Ordering::SeqCst);
        let model = models.get("m").await.unwrap();
        assert_eq!(kind(&model, "die").await, Some(ErrorKind::Closed));
        models.get("m").await.unwrap();
        assert_eq!(mortal.attempts.load(Ordering::SeqCst), 2);
        assert_eq!(kind(&model, "hello").await, None);

        assert_eq!(kind(&model, "die").await, Some(ErrorKind::Closed));
        let reloaded = models.reload_with(config(MORTAL)).await.unwrap();
        assert_eq!(reloaded.changed, ["m"]);
        assert_eq!((kind(&model, "hello").await, mortal.attempts.load(Ordering::SeqCst)), (None, 3));

        // What cannot be loaded is no success.
        assert_eq!(kind(&model, "die").await, Some(ErrorKind::Closed));
        mortal.broken.store(1, Ordering::SeqCst);
        let error = models.reload_with(config(MORTAL)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidModel, "{error}");
        assert_eq!(models.reload_with(config(MORTAL)).await.unwrap().changed, ["m"]);
        assert_eq!(kind(&model, "hello").await, None);
    }
}

#[tokio::test]
async fn a_model_that_has_stopped_is_loaded_by_the_watch() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.toml");
    let text = "[reload]\npoll_ms = 10\n[models.m]\nbackend = \"echo\"\noptions.fail = \"closed\"\n\
                [models.healthy]\nbackend = \"echo\"\n";
    std::fs::write(&path, text).unwrap();
    let models = Models::load_file(&path).await.unwrap();
    let (model, _healthy) = (models.get("m").await.unwrap(), models.get("healthy").await.unwrap());
    let _watch = models.watch().unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut events = models.events();
    assert_eq!(kind(&model, "hello").await, Some(ErrorKind::Closed));
    // Nobody asks any more.
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let event = tokio::time::timeout(Duration::from_secs(10), events.recv()).await.unwrap().unwrap();
        seen.push(event.to_string());
    }
    seen.sort();
    let expected = ["`m` is loaded, on echo", "`m` on echo has stopped by itself", "`m` on echo is given up"];
    assert_eq!(seen, expected);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(events.try_recv().is_err(), "what is healthy stays");
}

#[tokio::test(start_paused = true)]
async fn a_model_that_stops_again_and_again_is_left_alone_for_a_while() {
    let (models, mortal) = mortal(MORTAL);
    let model = models.get("m").await.unwrap();
    let attempts = || mortal.attempts.load(Ordering::SeqCst);
    kind(&model, "die").await;
    kind(&model, "die").await; // loaded at once, and dead again
    assert_eq!(attempts(), 2);
    for _ in 0..10 {
        assert_eq!(kind(&model, "hello").await, Some(ErrorKind::Closed));
    }
    assert_eq!(attempts(), 2);
    assert_eq!(model.stats().active, 0);
    assert_eq!(model.info().backend, "echo", "what it was is still known");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((kind(&model, "hello").await, attempts()), (None, 3));
    // One that has run for long begins anew.
    tokio::time::sleep(Duration::from_secs(61)).await;
    kind(&model, "die").await;
    assert_eq!((kind(&model, "hello").await, attempts()), (None, 4));
}

#[tokio::test(start_paused = true)]
async fn a_first_load_that_fails_is_tried_again_after_a_time() {
    let (models, mortal) =
        mortal(&format!("{MORTAL}fallback = [\"other\"]\n[models.other]\nbackend = \"echo\"\n"));
    mortal.broken.store(3, Ordering::SeqCst);
    let model = models.get("m").await.unwrap();
    let attempts = || mortal.attempts.load(Ordering::SeqCst);
    let answered_by = async || served_by(&answer(&model, say("hello")).await.unwrap());
    // Waits of one, two and four seconds.
    for (attempt, seconds) in [(1, 1), (2, 2), (3, 4)] {
        for _ in 0..5 {
            assert_eq!(answered_by().await, "other on echo");
            assert_eq!(attempts(), attempt);
        }
        tokio::time::sleep(Duration::from_millis(seconds * 1000 - 100)).await;
        assert_eq!((answered_by().await.as_str(), attempts()), ("other on echo", attempt));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!((answered_by().await.as_str(), attempts()), ("echo on echo", 4));

    // `get` asks for it now, and callers that wait for the same attempt share its outcome.
    let (models, mortal) = self::mortal(MORTAL);
    mortal.broken.store(1, Ordering::SeqCst);
    let (first, second) = tokio::join!(models.get("m"), models.get("m"));
    assert_eq!(first.unwrap_err().kind(), ErrorKind::InvalidModel);
    assert_eq!(second.unwrap_err().kind(), ErrorKind::InvalidModel);
    assert_eq!(mortal.attempts.load(Ordering::SeqCst), 1);
    models.get("m").await.unwrap();
}

/// A decoder that panics on one token.
struct Fragile(Mutex<Vec<(SequenceId, usize)>>);

impl Fragile {
    fn set(&self, sequence: SequenceId, length: usize) -> SequenceId {
        let mut all = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        all.retain(|(id, _)| *id != sequence);
        all.push((sequence, length));
        sequence
    }

    fn next(&self) -> SequenceId {
        let all = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        SequenceId(all.iter().map(|(id, _)| id.0 + 1).max().unwrap_or(0))
    }
}

impl CausalLm for Fragile {
    fn context_length(&self) -> usize {
        512
    }

    fn vocab_size(&self) -> usize {
        1280
    }

    fn max_sequences(&self) -> usize {
        4
    }

    fn max_batch_tokens(&self) -> usize {
        64
    }

    fn new_sequence(&mut self) -> Result<SequenceId> {
        Ok(self.set(self.next(), 0))
    }

    fn forward(&mut self, batch: &[SequenceInput<'_>], logits: &mut Vec<f32>) -> Result<()> {
        for input in batch {
            assert!(!input.tokens.contains(&7), "a bug in the engine");
            self.set(input.sequence, self.len(input.sequence) + input.tokens.len());
            for _ in 0..input.rows() {
                let mut row = vec![0.0; 1280];
                row[100] = 9.0;
                logits.extend(row);
            }
        }
        Ok(())
    }

    fn len(&self, sequence: SequenceId) -> usize {
        let all = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        all.iter().find(|(id, _)| *id == sequence).map_or(0, |(_, length)| *length)
    }

    fn truncate(&mut self, sequence: SequenceId, length: usize) -> Result<()> {
        self.set(sequence, length);
        Ok(())
    }

    fn fork(&mut self, _: SequenceId, length: usize) -> Result<SequenceId> {
        Ok(self.set(self.next(), length))
    }

    fn free(&mut self, sequence: SequenceId) {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).retain(|(id, _)| *id != sequence);
    }
}

struct FragileFactory;

#[async_trait]
impl BackendFactory for FragileFactory {
    fn name(&self) -> &'static str {
        "fragile"
    }

    fn description(&self) -> &'static str {
        "panics on token 7"
    }

    async fn load(&self, name: &str, _: &ModelConfig, _: Progress) -> Result<Arc<dyn LlmBackend>> {
        let parts = Checkpoint::tokenizer_parts_at(fixture("ternion-tiny"))?;
        let options = EngineOptions::new(ModelInfo::new(name, "fragile"));
        let model = Box::new(Fragile(Mutex::default()));
        Ok(Arc::new(Engine::start(model, Tokenizer::from_parts(parts)?, options)?))
    }
}

#[tokio::test]
async fn a_panic_in_an_engine_is_survived() {
    let mut registry = ternion::registry();
    registry.register(FragileFactory);
    let text = "[reload]\ncheck = []\n[models.m]\nbackend = \"fragile\"\n";
    let models = Models::with_registry(config(text), registry).unwrap();
    let model = models.get("m").await.unwrap();
    let ask = async |tokens: Vec<u32>| {
        let answer = answer(&model, GenerateRequest::new(tokens).with_max_tokens(3)).await;
        answer.map(|answer| answer.tokens.len()).map_err(|e| e.kind())
    };
    assert_eq!(ask(vec![1, 2]).await, Ok(3));
    for _ in 0..2 {
        let error = ask(vec![1, 7]).await.unwrap_err();
        assert!([ErrorKind::Closed, ErrorKind::Backend].contains(&error), "{error:?}");
        models.reload_with(config(text)).await.unwrap();
        assert_eq!(ask(vec![1, 2]).await, Ok(3));
        assert_eq!(model.stats().active, 0);
    }
}
