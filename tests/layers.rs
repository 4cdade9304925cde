//! The layers: what each does, how it fails, and that giving a request up reaches the model through all of them.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod host;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use host::{Failing, Flaky, answer, config, echo, idle, say};
use ternion::{
    ErrorKind, Event, FinishReason, LlmBackend, LogitsRequest, ScoreRequest,
    layers::{ConcurrencyLimitLayer, Layer, LayerExt, MetricsLayer, RetryLayer, TimeoutLayer, TracingLayer},
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const MS: Duration = Duration::from_millis(1);

fn retry(attempts: usize) -> RetryLayer {
    RetryLayer::new(attempts).with_delays(10 * MS, 40 * MS)
}

#[tokio::test(start_paused = true)]
async fn a_timeout_ends_what_does_not_begin() {
    let model = echo(r#"{"delay_ms": 1000}"#).layer(&TimeoutLayer::new().with_first_token(200 * MS));
    let start = Instant::now();
    let mut stream = model.generate(say("one two")).await.unwrap();
    assert!(matches!(stream.next().await, Some(Ok(Event::Prefill(_)))));
    let error = stream.next().await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert_eq!(error.to_string(), "generate: no first token within 200 ms");
    assert!(error.is_retryable());
    assert!(start.elapsed() >= 200 * MS && start.elapsed() < 210 * MS, "{:?}", start.elapsed());
    assert!(stream.next().await.is_none());
    assert_eq!(model.stats().active, 0, "the work underneath is given up");
}

#[tokio::test(start_paused = true)]
async fn a_timeout_between_tokens_is_the_models_and_not_the_readers() {
    let between = TimeoutLayer::new().with_between_tokens(50 * MS);
    let slow = echo(r#"{"delay_ms": 100}"#).layer(&between);
    let mut stream = slow.generate(say("one two three")).await.unwrap();
    let mut tokens = 0;
    let error = loop {
        match stream.next().await.unwrap() {
            Ok(Event::Token(_)) => tokens += 1,
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!((tokens, error.kind()), (1, ErrorKind::Timeout), "the first token is not between tokens");
    assert!(error.message().contains("no further token within 50 ms"), "{error}");

    let quick = echo("{}").layer(&between);
    let mut stream = quick.generate(say("one two three")).await.unwrap();
    let mut last = None;
    while let Some(event) = stream.next().await {
        last = Some(event.unwrap());
        tokio::time::sleep(200 * MS).await;
    }
    assert!(matches!(last, Some(Event::Done(_))), "a slow reader gets everything");
}

#[tokio::test(start_paused = true)]
async fn a_timeout_bounds_the_whole() {
    let model = echo(r#"{"delay_ms": 100}"#).layer(&TimeoutLayer::new().with_total(250 * MS));
    assert_eq!(answer(&*model, say("one two")).await.unwrap().text, "one two");
    let error = answer(&*model, say("one two three")).await.unwrap_err();
    assert_eq!(error.to_string(), "generate: no end within 250 ms");
    assert_eq!(model.stats().active, 0);

    let hanging: Arc<dyn LlmBackend> = Flaky::new(echo("{}"), [Failing::Hang; 3]);
    let model = hanging.layer(&TimeoutLayer::new().with_total(250 * MS).with_first_token(Duration::MAX));
    let score = model.score(ScoreRequest::new(vec![1, 2], 1)).await.unwrap_err();
    let logits = model.logits(LogitsRequest::new(vec![1, 2])).await.unwrap_err();
    let generate = answer(&*model, say("x")).await.unwrap_err();
    for (error, operation) in [(score, "score"), (logits, "logits"), (generate, "generate")] {
        assert_eq!((error.kind(), error.operation()), (ErrorKind::Timeout, operation));
    }
}

#[tokio::test(start_paused = true)]
async fn a_timeout_ends_streams_that_nobody_polls() {
    let slow = || echo(r#"{"delay_ms": 100}"#);
    let total = slow().layer(&TimeoutLayer::new().with_total(250 * MS));
    let unread = total.generate(say("one two three four")).await.unwrap();
    let mut begun = total.generate(say("one two three four")).await.unwrap();
    begun.next().await.unwrap().unwrap();
    tokio::time::sleep(240 * MS).await;
    assert_eq!(total.stats().active, 2);
    tokio::time::sleep(20 * MS).await;
    assert_eq!(total.stats().active, 0, "the work has ended, although the streams are kept");
    for mut stream in [unread, begun] {
        let error = stream.next().await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "generate: no end within 250 ms");
        assert!(stream.next().await.is_none());
    }

    // The reader has asked for a token, and has then forgotten the stream.
    for (timeout, message) in [
        (TimeoutLayer::new().with_between_tokens(50 * MS), "no further token within 50 ms"),
        (TimeoutLayer::new().with_first_token(50 * MS), "no first token within 50 ms"),
    ] {
        let model = slow().layer(&timeout);
        let mut stream = model.generate(say("one two three")).await.unwrap();
        while tokio::time::timeout(10 * MS, stream.next()).await.is_ok() {}
        if message.contains("further") {
            tokio::time::sleep(100 * MS).await;
            assert!(matches!(stream.next().await, Some(Ok(Event::Token(_)))));
            assert!(matches!(stream.next().await, Some(Ok(Event::Text(_)))));
            assert!(tokio::time::timeout(10 * MS, stream.next()).await.is_err());
        }
        assert_eq!(model.stats().active, 1);
        tokio::time::sleep(60 * MS).await;
        assert_eq!(model.stats().active, 0, "{message}");
        assert!(stream.next().await.unwrap().unwrap_err().to_string().contains(message));
    }
}

#[tokio::test(start_paused = true)]
async fn a_timeout_counts_what_has_come_in_time_and_is_not_read() {
    let timeout = TimeoutLayer::new().with_first_token(100 * MS).with_between_tokens(100 * MS);
    let model = echo("{}").layer(&timeout);
    let stream = model.generate(say("one two three")).await.unwrap();
    tokio::time::sleep(1000 * MS).await;
    assert_eq!(stream.collect().await.unwrap().text, "one two three");
    assert_eq!(model.stats().active, 0);
}

#[tokio::test(start_paused = true)]
async fn a_retry_waits_longer_each_time() {
    let flaky = Flaky::new(echo("{}"), [Failing::Call(ErrorKind::Busy); 2]);
    let model = (Arc::clone(&flaky) as Arc<dyn LlmBackend>).layer(&retry(3));
    let start = Instant::now();
    assert_eq!(answer(&*model, say("one two")).await.unwrap().text, "one two");
    assert_eq!(flaky.calls(), 3);
    // 10 and 20 ms, and up to as much again.
    assert!(start.elapsed() >= 30 * MS && start.elapsed() <= 65 * MS, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_retry_gives_up() {
    let flaky = Flaky::new(echo("{}"), [Failing::Call(ErrorKind::Busy); 9]);
    let model = (Arc::clone(&flaky) as Arc<dyn LlmBackend>).layer(&retry(3));
    let error = answer(&*model, say("x")).await.unwrap_err();
    assert_eq!((error.kind(), flaky.calls()), (ErrorKind::Busy, 3));
    assert!(error.context().any(|(key, value)| key == "attempts" && value == "3"), "{error}");
    let error = model.score(ScoreRequest::new(vec![1, 2], 1)).await.unwrap_err();
    assert_eq!((error.kind(), flaky.calls()), (ErrorKind::Busy, 6));
}

#[tokio::test(start_paused = true)]
async fn what_no_retry_helps_is_not_made_again() {
    for kind in [ErrorKind::Backend, ErrorKind::InvalidRequest, ErrorKind::Cancelled] {
        let flaky = Flaky::new(echo("{}"), [Failing::Call(kind); 9]);
        let model = (Arc::clone(&flaky) as Arc<dyn LlmBackend>).layer(&retry(3));
        let error = answer(&*model, say("x")).await.unwrap_err();
        assert_eq!((error.kind(), flaky.calls()), (kind, 1));
        assert_eq!(error.context().count(), 0, "{error}");
        assert_eq!(model.logits(LogitsRequest::new(vec![1])).await.unwrap_err().kind(), kind);
        assert_eq!(flaky.calls(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_is_begun_again_only_before_its_first_token() {
    // One event is the prompt's progress, two are that and a token.
    let before =
        Flaky::new(echo("{}"), [Failing::After(1, ErrorKind::Busy), Failing::After(0, ErrorKind::Busy)]);
    let model = (Arc::clone(&before) as Arc<dyn LlmBackend>).layer(&retry(3));
    let mut stream = model.generate(say("one two")).await.unwrap();
    let (mut text, mut progress) = (String::new(), 0);
    while let Some(event) = stream.next().await {
        match event.unwrap() {
            Event::Prefill(_) => progress += 1,
            Event::Text(piece) => text += &piece.text,
            Event::Token(_) | Event::Done(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((text.as_str(), progress, before.calls()), ("one two", 1, 3), "progress is not told twice");

    let after = Flaky::new(echo("{}"), [Failing::After(2, ErrorKind::Busy)]);
    let model = (Arc::clone(&after) as Arc<dyn LlmBackend>).layer(&retry(3));
    let error = answer(&*model, say("one two")).await.unwrap_err();
    assert_eq!((error.kind(), after.calls()), (ErrorKind::Busy, 1));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_for_its_next_attempt_can_be_cancelled_and_dropped() {
    let slow = RetryLayer::new(9).with_delays(Duration::from_secs(60), Duration::from_secs(60));
    let flaky = Flaky::new(echo("{}"), [Failing::Call(ErrorKind::Busy); 9]);
    let model = (Arc::clone(&flaky) as Arc<dyn LlmBackend>).layer(&slow);
    let cancel = CancellationToken::new();
    let mut score = ScoreRequest::new(vec![1, 2], 1);
    score.cancel = cancel.clone();
    let start = Instant::now();
    let (completion, error, ()) =
        tokio::join!(answer(&*model, say("x").with_cancel(cancel.clone())), model.score(score), async {
            tokio::time::sleep(MS).await;
            cancel.cancel();
        });
    assert_eq!(completion.unwrap().finish_reason, FinishReason::Cancelled);
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(start.elapsed() < 10 * MS);

    let calls = flaky.calls();
    assert!(tokio::time::timeout(MS, model.generate(say("x"))).await.is_err());
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(flaky.calls(), calls + 1, "nobody goes on with what was dropped");
}

#[tokio::test(start_paused = true)]
async fn a_limit_lets_so_many_through_in_their_order() {
    let inner = echo(r#"{"delay_ms": 10}"#);
    let model = Arc::clone(&inner).layer(&ConcurrencyLimitLayer::new(2).with_waiting(8));
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for i in 0..10 {
        let stream = model.generate(say("one two three")).await.unwrap();
        let order = Arc::clone(&order);
        tasks.push(tokio::spawn(async move {
            let text = stream.collect().await.unwrap().text;
            order.lock().unwrap().push(i);
            text
        }));
    }
    let error = model.generate(say("x")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.is_retryable() && error.to_string().contains("concurrent: 2, waiting: 8"), "{error}");
    assert_eq!(model.stats().queued, 8);
    let mut most = 0;
    while !tasks.iter().all(tokio::task::JoinHandle::is_finished) {
        most = most.max(inner.stats().active);
        tokio::time::sleep(MS).await;
    }
    assert_eq!(most, 2);
    for task in tasks {
        assert_eq!(task.await.unwrap(), "one two three");
    }
    let order = order.lock().unwrap().clone();
    for pair in [0, 2, 4, 6, 8] {
        let mut two = order[pair..pair + 2].to_vec();
        two.sort_unstable();
        assert_eq!(two, [pair, pair + 1], "{order:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_place_is_given_back_at_the_end_and_by_dropping() {
    let model = echo(r#"{"delay_ms": 10}"#).layer(&ConcurrencyLimitLayer::new(1));
    let mut first = model.generate(say("one two")).await.unwrap();
    assert_eq!(model.generate(say("x")).await.unwrap_err().kind(), ErrorKind::Busy);
    while first.next().await.is_some() {}
    let second = model.generate(say("one two")).await.unwrap(); // though the first is still held
    drop(second);
    assert_eq!(answer(&*model, say("x y")).await.unwrap().text, "x y");
    drop(first);

    // A request that is cancelled has no place any more, even if nobody reads its end.
    let cancel = CancellationToken::new();
    let unread = model.generate(say("one two").with_cancel(cancel.clone())).await.unwrap();
    cancel.cancel();
    tokio::time::sleep(MS).await;
    assert_eq!(answer(&*model, say("x y")).await.unwrap().text, "x y");
    assert_eq!(unread.collect().await.unwrap().finish_reason, FinishReason::Cancelled);

    // Those that wait can be dropped and cancelled, and the places go on to the next.
    let model = echo(r#"{"delay_ms": 10}"#).layer(&ConcurrencyLimitLayer::new(1).with_waiting(3));
    let cancel = CancellationToken::new();
    let running = model.generate(say("one two")).await.unwrap();
    let dropped = model.generate(say("dropped")).await.unwrap();
    let cancelled = model.generate(say("cancelled").with_cancel(cancel.clone())).await.unwrap();
    let waiting = model.generate(say("waiting")).await.unwrap();
    drop(dropped);
    cancel.cancel();
    assert_eq!(cancelled.collect().await.unwrap().finish_reason, FinishReason::Cancelled);
    tokio::time::sleep(MS).await;
    assert_eq!(model.stats().queued, 1);
    drop(running);
    assert_eq!(waiting.collect().await.unwrap().text, "waiting");
    assert_eq!(model.stats().active + model.stats().queued, 0);
}

#[tokio::test(start_paused = true)]
async fn places_of_streams_that_nobody_reads_are_given_to_others() {
    let model = echo("{}").layer(&ConcurrencyLimitLayer::new(2).with_waiting(4));
    let mut unread = model.generate(say("one two three")).await.unwrap();
    unread.next().await.unwrap().unwrap();
    let untouched = model.generate(say("four five six")).await.unwrap();
    let start = Instant::now();
    for _ in 0..3 {
        assert_eq!(answer(&*model, say("seven eight")).await.unwrap().text, "seven eight");
    }
    assert!(start.elapsed() >= 400 * MS && start.elapsed() < 1000 * MS, "{:?}", start.elapsed());
    // They go on where they were, and are not among those that wait.
    assert_eq!(model.stats().queued, 0);
    assert_eq!(untouched.collect().await.unwrap().text, "four five six");
    assert_eq!(unread.collect().await.unwrap().text, "one two three");

    // A reader that waits for the model keeps its place, however long that takes.
    let slow = echo(r#"{"delay_ms": 3000}"#).layer(&ConcurrencyLimitLayer::new(1).with_waiting(4));
    let (first, second) = tokio::join!(answer(&*slow, say("one two")), async {
        tokio::time::sleep(MS).await;
        let start = Instant::now();
        answer(&*slow, say("three")).await.unwrap();
        start.elapsed()
    });
    assert_eq!(first.unwrap().text, "one two");
    assert!(second >= 8900 * MS, "{second:?}");

    // One that has lost its place waits in turn, and may be cancelled then.
    let request = say("one two three");
    let cancel = request.cancel.clone();
    let mut lost = slow.generate(request).await.unwrap();
    tokio::time::sleep(600 * MS).await;
    let other = slow.generate(say("four")).await.unwrap();
    let other = tokio::spawn(other.collect());
    tokio::time::sleep(300 * MS).await;
    assert!(tokio::time::timeout(100 * MS, lost.next()).await.is_err());
    assert_eq!(slow.stats().queued, 1);
    cancel.cancel();
    assert_eq!(lost.collect().await.unwrap().finish_reason, FinishReason::Cancelled);
    other.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_request_that_has_to_wait_is_checked_at_once() {
    let model = echo(r#"{"delay_ms": 10}"#).layer(&ConcurrencyLimitLayer::new(1).with_waiting(1));
    let _running = model.generate(say("one two")).await.unwrap();
    let mut wrong = say("x");
    wrong.params.max_tokens = Some(0);
    assert_eq!(model.generate(wrong).await.unwrap_err().kind(), ErrorKind::InvalidRequest);
    assert_eq!(model.stats().queued, 0);
}

#[tokio::test]
async fn a_limit_tells_of_its_places() {
    let limits = |limit: ConcurrencyLimitLayer| {
        let limits = echo("{}").layer(&limit).info().limits.clone();
        (limits.max_sequences, limits.max_queued)
    };
    // An echo has 4 places and 64 that wait.
    assert_eq!(limits(ConcurrencyLimitLayer::new(2).with_waiting(3)), (2, 3));
    assert_eq!(limits(ConcurrencyLimitLayer::new(10).with_waiting(3)), (4, 9));
    assert_eq!(
        limits(ConcurrencyLimitLayer::new(100).with_waiting(3)),
        (4, 64),
        "the echo itself refuses first"
    );
}

/// A recorder: the value of each counter and gauge, and how many values each histogram has, by name and labels.
#[derive(Clone, Default)]
struct Counts(Arc<Mutex<BTreeMap<String, f64>>>);

struct Count(Counts, String);

impl Counts {
    fn of(&self, key: &metrics::Key) -> Arc<Count> {
        let labels = key.labels().map(metrics::Label::value);
        let name = std::iter::once(key.name()).chain(labels).collect::<Vec<_>>().join(" ");
        Arc::new(Count(self.clone(), name))
    }
}

impl Count {
    fn add(&self, value: f64) {
        *self.0.0.lock().unwrap().entry(self.1.clone()).or_default() += value;
    }
}

impl metrics::CounterFn for Count {
    fn increment(&self, value: u64) {
        self.add(value as f64);
    }

    fn absolute(&self, _: u64) {
        unreachable!("nothing here sets a counter");
    }
}

impl metrics::GaugeFn for Count {
    fn increment(&self, value: f64) {
        self.add(value);
    }

    fn decrement(&self, value: f64) {
        self.add(-value);
    }

    fn set(&self, _: f64) {
        unreachable!("nothing here sets a gauge");
    }
}

impl metrics::HistogramFn for Count {
    fn record(&self, value: f64) {
        assert!(value.is_finite() && value >= 0.0);
        self.add(1.0);
    }
}

impl metrics::Recorder for Counts {
    fn describe_counter(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn describe_gauge(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn describe_histogram(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn register_counter(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
        metrics::Counter::from_arc(self.of(key))
    }

    fn register_gauge(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
        metrics::Gauge::from_arc(self.of(key))
    }

    fn register_histogram(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Histogram {
        metrics::Histogram::from_arc(self.of(key))
    }
}

#[tokio::test(start_paused = true)]
async fn metrics_count_every_end() {
    let recorder = Counts::default();
    let _installed = metrics::set_default_local_recorder(&recorder);
    let model = echo(r#"{"delay_ms": 10}"#).layer(&MetricsLayer::new());
    answer(&*model, say("one two three")).await.unwrap();
    answer(&*model, say("one two three").with_max_tokens(2)).await.unwrap();
    let mut dropped = model.generate(say("one two three")).await.unwrap();
    dropped.next().await.unwrap().unwrap();
    drop(dropped);
    let mut wrong = say("x");
    wrong.params.max_tokens = Some(0);
    model.generate(wrong).await.unwrap_err();
    model.score(ScoreRequest::new(vec![1, 2], 1)).await.unwrap_err();
    let running = model.generate(say("one")).await.unwrap();

    let seen = recorder.0.lock().unwrap().clone();
    for (name, value) in [
        ("ternion_requests_total echo generate end_of_sequence", 1.0),
        ("ternion_requests_total echo generate max_tokens", 1.0),
        ("ternion_requests_total echo generate dropped", 1.0),
        ("ternion_requests_total echo generate invalid_request", 1.0),
        ("ternion_requests_total echo score unsupported", 1.0),
        ("ternion_requests_active echo generate", 1.0),
        ("ternion_requests_active echo score", 0.0),
        ("ternion_request_duration_seconds echo generate", 4.0),
        ("ternion_first_token_seconds echo", 2.0),
        ("ternion_queued_seconds echo", 2.0),
        ("ternion_prompt_tokens_total echo", 6.0),
        ("ternion_cached_tokens_total echo", 0.0),
        ("ternion_completion_tokens_total echo", 5.0),
    ] {
        assert_eq!(seen.get(name), Some(&value), "{name}: {seen:?}");
    }
    drop(running);
}

#[tokio::test]
async fn metrics_count_every_answer_that_a_policy_asks_for() {
    let recorder = Counts::default();
    let _installed = metrics::set_default_local_recorder(&recorder);
    let config = config(
        "[models.m]\npath = 'FIXTURES/nano-packed'\nthreads = 1\ncontext_length = 200\ncontext_policy.kind = \"map_reduce\"\n\
         layers.metrics = true\n",
    );
    let model = ternion::load(&config, None).await.unwrap();
    let long = "the sun is up and the day is long ".repeat(40);
    let mut request = say("What is it about?").with_document(long).with_max_tokens(8);
    request.params.ignore_eos = true;
    let answer = answer(&*model, request).await.unwrap();
    let report = answer.context.unwrap();
    assert!(report.calls > 2, "{report:?}");
    let seen = recorder.0.lock().unwrap().clone();
    for (name, value) in [
        ("ternion_requests_total m generate max_tokens", 1),
        ("ternion_generations_total m", report.calls),
        ("ternion_prompt_tokens_total m", report.total_prompt_tokens),
        ("ternion_completion_tokens_total m", report.total_completion_tokens),
    ] {
        assert_eq!(seen.get(name), Some(&(value as f64)), "{name}: {seen:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn nested_retries_do_not_multiply() {
    let flaky = Flaky::new(echo("{}"), [Failing::Call(ErrorKind::Busy); 99]);
    let inner = (Arc::clone(&flaky) as Arc<dyn LlmBackend>).layer(&retry(3));
    let model = inner.layer(&retry(4)).layer(&retry(5));
    let error = answer(&*model, say("x")).await.unwrap_err();
    assert_eq!((error.kind(), flaky.calls()), (ErrorKind::Busy, 3));
    assert!(error.is_retried() && error.is_retryable(), "{error:?}");
    model.score(ScoreRequest::new(vec![1, 2], 1)).await.unwrap_err();
    assert_eq!(flaky.calls(), 6);
}

#[tokio::test(start_paused = true)]
async fn every_layer_forwards_what_it_does_not_change() {
    /// Says something of its own wherever the default says something else.
    struct Odd(Arc<dyn LlmBackend>);

    #[async_trait::async_trait]
    impl ternion::BackendWrapper for Odd {
        fn inner(&self) -> &dyn LlmBackend {
            &*self.0
        }

        fn is_closed(&self) -> bool {
            true
        }

        fn unloaded(&self) -> ternion::Unloaded {
            Box::pin(std::future::pending())
        }

        async fn validate(&self, _: &ternion::GenerateRequest) -> ternion::Result<()> {
            Err(ternion::Error::backend("odd"))
        }
    }

    let odd: Arc<dyn LlmBackend> = Arc::new(Odd(echo("{}")));
    let context =
        ternion::context::ContextLayer::new(Arc::clone(&odd), ternion::context::ContextPolicy::default())
            .unwrap();
    let mut layered: Vec<Arc<dyn LlmBackend>> = vec![Arc::new(context)];
    let (limit, timeout) = (ConcurrencyLimitLayer::new(1), TimeoutLayer::new());
    let layers: [&dyn Layer; 5] = [&limit, &retry(2), &timeout, &MetricsLayer::new(), &TracingLayer::new()];
    layered.extend(layers.map(|layer| Arc::clone(&odd).layer(layer)));
    layered.push(config(ALL).models["m"].layers.wrap(odd));
    for model in layered {
        assert!(model.is_closed());
        assert!(tokio::time::timeout(MS, model.unloaded()).await.is_err());
        assert_eq!(model.validate(&say("x")).await.unwrap_err().message(), "odd");
        assert!(format!("{model:?}").contains("echo"), "{model:?}");
    }
}

/// A log in memory.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn a_trace_tells_what_was_done_but_not_what_was_said() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let _installed = tracing::subscriber::set_default(subscriber);
    let flaky = Flaky::new(echo(r#"{"delay_ms": 10}"#), []);
    let model = (Arc::clone(&flaky) as Arc<dyn LlmBackend>).layer(&TracingLayer::new());
    answer(&*model, say("secret words").with_max_tokens(1)).await.unwrap();
    let mut dropped = model.generate(say("secret words")).await.unwrap();
    dropped.next().await.unwrap().unwrap();
    drop(dropped);
    model.score(ScoreRequest::new(vec![1, 2], 1)).await.unwrap_err();

    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    for expected in [
        "generate{model=\"echo\" backend=\"echo\" prompt=\"text\" max_tokens=1 prompt_tokens=2 cached_tokens=0 \
         completion_tokens=1 finish_reason=\"max_tokens\" served_by=echo on echo}",
        "finish_reason=\"dropped\"",
        "score{model=\"echo\" backend=\"echo\" tokens=2 error=\"unsupported\"}",
    ] {
        assert!(text.contains(expected), "{expected}\n{text}");
    }
    assert!(!text.contains("secret"), "{text}");
}

/// All layers of a configuration.
const ALL: &str = "[models.m.layers]\ntracing = true\nmetrics = true\ntimeout = { first_token_ms = 60000, \
                   between_tokens_ms = 60000, total_ms = 600000 }\nretry.attempts = 3\n\
                   limit = { concurrent = 1, waiting = 4 }\n";

#[tokio::test(start_paused = true)]
async fn dropping_a_stream_through_all_layers_cancels_the_work() {
    let inner = echo(r#"{"delay_ms": 1000}"#);
    let model = config(ALL).models["m"].layers.wrap(Arc::clone(&inner));
    let mut running = model.generate(say("one two three")).await.unwrap();
    while !matches!(running.next().await, Some(Ok(Event::Token(_)))) {}
    let waiting = model.generate(say("four")).await.unwrap();
    assert_eq!((inner.stats().active, model.stats().queued), (1, 1));
    drop(running);
    assert_eq!(waiting.collect().await.unwrap().text, "four");
    let mut late = model.generate(say("five six")).await.unwrap();
    late.next().await.unwrap().unwrap();
    drop(late);
    assert_eq!(inner.stats().active, 0);
}

#[tokio::test]
async fn layers_of_a_configuration_lie_around_the_model() {
    let config = config(&format!("[models.m]\nbackend = \"echo\"\noptions.delay_ms = 5\n{ALL}"));
    let model = ternion::load(&config, None).await.unwrap();
    assert_eq!(model.info().limits.max_queued, 4, "the limit's");
    let mut streams = Vec::new();
    for _ in 0..5 {
        streams.push(model.generate(say("one two")).await.unwrap());
    }
    for stream in streams {
        assert_eq!(stream.collect().await.unwrap().text, "one two");
    }
    idle(&*model).await;
}
