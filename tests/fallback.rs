//! Fallback chains: which failures go on to the next model, which do not, and who answered.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod host;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use host::{Failing, Flaky, answer, config, say, served_by};
use ternion::{
    DoneEvent, ErrorKind, Event, FinishReason, GenerateRequest, LlmBackend, LogitsRequest, Message, Result,
    ScoreRequest,
    config::{Config, ModelConfig},
    models::{ModelEvent, Models},
    registry::{BackendFactory, Progress},
};
use tokio_util::sync::CancellationToken;

/// A model `a` that fails with `kind`, at once or in its stream, and an echo `b` in its place.
fn failing(kind: ErrorKind, after: Option<usize>) -> Config {
    let after = after.map_or(String::new(), |n| format!("fail_after = {n}\n"));
    config(&format!(
        "[models.a]\nbackend = \"echo\"\nfallback = [\"b\"]\n[models.a.options]\nfail = \"{kind}\"\n{after}\
         [models.b]\nbackend = \"echo\"\noptions.reply = \"b answers\"\n"
    ))
}

async fn load(config: &Config) -> Arc<dyn LlmBackend> {
    ternion::load(config, Some("a")).await.unwrap()
}

#[tokio::test]
async fn failures_of_a_model_go_on_to_the_next() {
    for kind in [
        ErrorKind::NotFound,
        ErrorKind::InvalidModel,
        ErrorKind::Unsupported,
        ErrorKind::ResourceExhausted,
        ErrorKind::Busy,
        ErrorKind::Timeout,
        ErrorKind::Closed,
        ErrorKind::Backend,
        ErrorKind::Io,
    ] {
        assert!(kind.should_fail_over());
        let model = load(&failing(kind, None)).await;
        let answer = answer(&*model, say("x")).await.unwrap();
        assert_eq!((answer.text.as_str(), served_by(&answer).as_str()), ("b answers", "b on echo"), "{kind}");
    }
}

#[tokio::test]
async fn failures_of_a_request_do_not() {
    for kind in [
        ErrorKind::InvalidRequest,
        ErrorKind::ContextOverflow,
        ErrorKind::InvalidConfig,
        ErrorKind::Cancelled,
    ] {
        assert!(!kind.should_fail_over());
        let model = load(&failing(kind, None)).await;
        let error = answer(&*model, say("x")).await.unwrap_err();
        assert_eq!((error.kind(), error.message()), (kind, "configured to fail"));
        let model = load(&failing(kind, Some(0))).await;
        assert_eq!(answer(&*model, say("x")).await.unwrap_err().kind(), kind);
    }
    let model = load(&failing(ErrorKind::Busy, None)).await;
    let mut request = say("x");
    request.params.max_tokens = Some(0);
    assert_eq!(answer(&*model, request).await.unwrap_err().kind(), ErrorKind::InvalidRequest);
}

#[tokio::test]
async fn a_stream_goes_on_elsewhere_only_before_its_first_token() {
    let model = load(&failing(ErrorKind::Backend, Some(0))).await;
    let mut stream = model.generate(say("one two three")).await.unwrap();
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event.unwrap());
    }
    let progress = events.iter().filter(|e| matches!(e, Event::Prefill(_))).count();
    assert_eq!(progress, 1, "progress is not told twice: {events:?}");
    let Some(Event::Done(DoneEvent { served_by: Some(who), .. })) = events.last() else {
        panic!("{events:?}")
    };
    assert_eq!((who.model.as_str(), who.backend.as_str()), ("b", "echo"));

    let model = load(&failing(ErrorKind::Backend, Some(2))).await;
    let mut stream = model.generate(say("one two three")).await.unwrap();
    let mut text = String::new();
    let error = loop {
        match stream.next().await.unwrap() {
            Ok(Event::Text(piece)) => text += &piece.text,
            Ok(Event::Prefill(_) | Event::Token(_)) => {}
            Ok(event) => panic!("{event:?}"),
            Err(error) => break error,
        }
    };
    assert_eq!((text.as_str(), error.kind()), ("one two", ErrorKind::Backend), "nothing of `b` in between");
    assert!(stream.next().await.is_none());
}

#[tokio::test]
async fn where_the_first_cannot_be_loaded_the_chain_serves() {
    let config = config(
        "default_model = \"a\"\n[models.a]\nbackend = \"candle\"\npath = \"no/such/model\"\n\
         fallback = [\"b\", \"c\"]\n[models.b]\nbackend = \"candle\"\npath = \"nor/this\"\n\
         [models.c]\nbackend = \"echo\"\n",
    );
    let models = Models::new(config).unwrap();
    let mut events = models.events();
    let model = models.default_model().await.unwrap();
    assert_eq!((model.name().as_str(), model.info().name.as_str()), ("a", "c"));
    let answer = answer(&model, say("says c")).await.unwrap();
    assert_eq!((answer.text.as_str(), served_by(&answer).as_str()), ("says c", "c on echo"));
    assert_eq!(model.pinned().await.unwrap().info().name, "c");
    let mut told = Vec::new();
    while let Ok(event) = events.try_recv() {
        match event {
            ModelEvent::Loaded { model, .. } => told.push(format!("loaded {model}")),
            ModelEvent::FellOver { model, from, to, kind, error } => {
                assert!(error.contains(if from == "a" { "no/such/model" } else { "nor/this" }), "{error}");
                told.push(format!("{model}: {from} to {to}, {kind}"));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(told, ["loaded c", "a: a to b, not_found", "a: b to c, not_found"]);

    let error = models.get("b").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(!error.to_string().contains("others"), "{error}");
}

#[tokio::test]
async fn what_is_wrong_with_the_configuration_is_told_and_not_covered() {
    let config = config(
        "[models.a]\nbackend = \"candel\"\npath = \"x\"\nfallback = [\"b\"]\n[models.b]\nbackend = \"echo\"\n",
    );
    let error = ternion::load(&config, Some("a")).await.err().unwrap();
    assert!(error.to_string().contains("unknown backend `candel`"), "{error}");
}

#[tokio::test]
async fn if_all_fail_the_error_is_that_of_the_first() {
    let config = config(
        "[models.a]\nbackend = \"echo\"\nfallback = [\"b\"]\noptions.fail = \"busy\"\n\
         [models.b]\nbackend = \"echo\"\nfallback = [\"c\"]\noptions.fail = \"context_overflow\"\n\
         [models.c]\nbackend = \"candle\"\npath = \"no/such/model\"\n",
    );
    let model = ternion::load(&config, Some("a")).await.unwrap();
    let error = answer(&*model, say("x")).await.unwrap_err();
    assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Busy, true));
    let (_, others) = error.context().find(|(key, _)| *key == "others").unwrap();
    assert!(
        others.starts_with("b: ") && others.contains("; c: ") && others.contains("no/such/model"),
        "{others}"
    );
}

#[tokio::test]
async fn an_error_that_is_worth_a_retry_is_not_hidden() {
    let config = config(
        "[models.a]\nbackend = \"echo\"\nfallback = [\"b\"]\noptions.fail = \"backend\"\n\
         [models.b]\nbackend = \"echo\"\noptions.fail = \"busy\"\n",
    );
    let model = ternion::load(&config, Some("a")).await.unwrap();
    let error = answer(&*model, say("x")).await.unwrap_err();
    assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Busy, true));
    assert!(error.to_string().contains("others: a: generate: configured to fail"), "{error}");
}

/// Where every stream of the first model breaks off before its first token. The second one's room comes on top of the
/// first one's and its tokens on top of what the first one computed, so the checks that count are left out.
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_begun_again_keep_the_contract() {
    let broken = std::iter::repeat_n(Failing::After(1, ErrorKind::Backend), 100_000);
    let mut registry = ternion::registry();
    registry.register(FlakyFactory(broken.collect()));
    let of = |name: &str, backend: &str, more: &str| {
        format!(
            "[models.{name}]\nbackend = \"{backend}\"\npath = 'FIXTURES/nano-packed'\nthreads = 1\ncontext_length = 256\n\
             max_sequences = 3\nmax_queued = 4\n{more}"
        )
    };
    let config = config(&(of("a", "flaky", "fallback = [\"b\"]\n") + &of("b", "candle", "")));
    let models = Models::with_registry(config, registry).unwrap();
    let model = models.get("a").await.unwrap();
    let counting = [
        "a_request_at_work_is_active",
        "a_full_queue_refuses_at_once",
        "a_full_queue_refuses_no_check",
        "a_queue_has_the_room_that_it_says",
        "tokens_are_counted",
        "what_has_ended_is_counted",
    ];
    let mut done = 0;
    for check in ternion_conformance::checks(&model) {
        if !counting.iter().any(|name| check.name.ends_with(name)) {
            check.run(&model).await.unwrap_or_else(|failure| panic!("{}: {failure}", check.name));
            done += 1;
        }
    }
    assert!(done > 50, "{done}");
}

#[tokio::test]
async fn a_model_of_the_chain_is_loaded_when_it_is_needed() {
    let counted = host::Counted::default();
    let loads = Arc::clone(&counted.loads);
    let mut registry = ternion::registry();
    registry.register(counted);
    let config = config(
        "[models.a]\nbackend = \"echo\"\nfallback = [\"b\"]\noptions.fail = \"busy\"\n\
         [models.b]\nbackend = \"counted\"\noptions = { of = \"echo\", load_ms = 50 }\n",
    );
    let models = Models::with_registry(config, registry).unwrap();
    let model = models.get("a").await.unwrap();
    let count = || loads.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(count(), 0);
    let (one, two) = tokio::join!(answer(&model, say("one")), answer(&model, say("two")));
    assert_eq!((one.unwrap().text.as_str(), two.unwrap().text.as_str(), count()), ("one", "two", 1));

    // A request that is given up while the model is loaded does not keep the next from having it.
    let cancel = CancellationToken::new();
    cancel.cancel();
    let end = answer(&model, say("x").with_cancel(cancel)).await;
    assert_eq!(end.unwrap().finish_reason, FinishReason::Cancelled);
}

/// The backend `flaky`: candle, with a script of failures before every answer.
struct FlakyFactory(Vec<Failing>);

#[async_trait]
impl BackendFactory for FlakyFactory {
    fn name(&self) -> &'static str {
        "flaky"
    }

    fn description(&self) -> &'static str {
        "fails as it is told"
    }

    async fn load(&self, name: &str, config: &ModelConfig, _: Progress) -> Result<Arc<dyn LlmBackend>> {
        let mut config = config.clone();
        "candle".clone_into(&mut config.backend);
        let inner = ternion::registry().load(&Config::single(name, config), None).await?;
        Ok(Flaky::new(inner, self.0.clone()))
    }
}

async fn flaky(script: impl IntoIterator<Item = Failing>, fallback: &str) -> impl LlmBackend {
    let mut registry = ternion::registry();
    registry.register(FlakyFactory(script.into_iter().collect()));
    let config = config(&format!(
        "[models.a]\nbackend = \"flaky\"\npath = 'FIXTURES/nano-packed'\nfallback = [{fallback}]\n\
         [models.other]\npath = 'FIXTURES/llama-ternary'\n[models.same]\npath = 'FIXTURES/nano-packed'\n\
         [models.echo]\nbackend = \"echo\"\n"
    ));
    Models::with_registry(config, registry).unwrap().get("a").await.unwrap()
}

#[tokio::test]
async fn token_ids_go_only_to_a_model_that_reads_them_in_the_same_way() {
    let busy = Failing::Call(ErrorKind::Busy);
    let tokens = || GenerateRequest::new(vec![5, 6, 7]).with_max_tokens(2);
    let model = flaky([busy; 3], r#""other", "echo", "same""#).await;
    assert_eq!(served_by(&answer(&model, tokens()).await.unwrap()), "same on candle");
    let score = model.score(ScoreRequest::new(vec![5, 6, 7], 1)).await.unwrap();
    assert_eq!(score.served_by.unwrap().model, "same");
    let vocabulary = model.info().limits.vocab_size;
    assert_eq!(model.logits(LogitsRequest::new(vec![5, 6])).await.unwrap().len(), 2 * vocabulary);

    let model = flaky([busy; 2], r#""other", "echo""#).await;
    let error = answer(&model, tokens()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("another than that of the model that was asked"), "{error}");
    // A text means the same to everybody.
    let text = answer(&model, say("text").with_max_tokens(2)).await.unwrap();
    assert_eq!(served_by(&text), "other on candle");
}

#[tokio::test]
async fn a_timeout_falls_over_and_gives_up_what_was_begun() {
    let config = config(
        "[models.a]\nbackend = \"echo\"\nfallback = [\"b\"]\noptions.delay_ms = 10000\n\
         layers.timeout.first_token_ms = 20\n[models.b]\nbackend = \"echo\"\noptions.reply = \"b answers\"\n",
    );
    let models = Models::new(config).unwrap();
    let model = models.get("a").await.unwrap();
    let chat = GenerateRequest::chat([Message::user("hello")]);
    assert_eq!(served_by(&answer(&model, chat).await.unwrap()), "b on echo");
    assert_eq!(model.stats().active, 0, "the model `a` does nothing any more");
}

#[tokio::test]
async fn dropping_a_stream_reaches_whoever_serves() {
    let config = config(
        "[models.a]\nbackend = \"echo\"\nfallback = [\"b\"]\noptions.fail = \"busy\"\n\
         [models.b]\nbackend = \"echo\"\noptions.delay_ms = 5\n",
    );
    let models = Models::new(config).unwrap();
    let model = models.get("a").await.unwrap();
    let mut stream = model.generate(say("one two three")).await.unwrap();
    while !matches!(stream.next().await, Some(Ok(Event::Token(_)))) {}
    let b = models.get("b").await.unwrap();
    assert_eq!(b.stats().active, 1);
    drop(stream);
    assert_eq!(b.stats().active, 0);

    let cancel = CancellationToken::new();
    let stream = model.generate(say("one two three").with_cancel(cancel.clone())).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1)).await;
    cancel.cancel();
    let end = stream.collect().await.unwrap();
    assert_eq!((end.finish_reason.clone(), served_by(&end).as_str()), (FinishReason::Cancelled, "b on echo"));
}
