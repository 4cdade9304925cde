//! What servers, proxies and networks do wrong, and what becomes of it.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod fake;

use std::time::{Duration, Instant};

use fake::{Fake, Reply, Step, answer, ask, data, delta, end, hello, load, refusal, whole};
use serde_json::json;
use ternion_core::{Error, ErrorKind, Event, FinishReason};

/// The error of a request to a server that gives `replies`, and how often it was asked.
async fn failed(replies: Vec<Reply>) -> (Error, usize) {
    let fake = Fake::new(replies).await;
    let model = fake.load().await;
    let error = ask(&*model).await.unwrap_err();
    assert_eq!(error.operation(), "generate", "{error}");
    assert!(!error.to_string().contains('\n'), "{error}");
    (error, fake.asked().len())
}

#[tokio::test]
async fn statuses_become_kinds_and_only_those_that_may_pass_are_retried() {
    for (status, code, kind, retryable, asked) in [
        (400, "bad", ErrorKind::InvalidRequest, false, 1),
        (400, "context_length_exceeded", ErrorKind::ContextOverflow, false, 1),
        (401, "invalid_api_key", ErrorKind::InvalidConfig, false, 1),
        (404, "model_not_found", ErrorKind::NotFound, false, 1),
        (429, "insufficient_quota", ErrorKind::ResourceExhausted, false, 1),
        (429, "rate_limit_exceeded", ErrorKind::Busy, true, 3),
        (500, "server_error", ErrorKind::Backend, true, 3),
        (503, "loading", ErrorKind::Busy, true, 3),
    ] {
        let (error, times) = failed(vec![refusal(status, code); 3]).await;
        assert_eq!(
            (error.kind(), error.is_retryable(), times),
            (kind, retryable, asked),
            "{status} {code}: {error}"
        );
        assert!(error.message().contains(code), "{error}");
        assert_eq!(error.is_retried(), asked > 1);
    }
}

#[tokio::test]
async fn a_request_is_made_again_until_it_is_answered() {
    let fake = Fake::new([refusal(500, "x"), refusal(429, "y"), answer(&["Hi", " there"])]).await;
    let model = fake.load().await;
    let completion = ask(&*model).await.unwrap();
    assert_eq!(completion.text, "Hi there");
    assert_eq!((completion.usage.prompt_tokens, completion.usage.completion_tokens), (7, 3));
    assert_eq!(completion.finish_reason, FinishReason::EndOfSequence);
    assert_eq!(fake.asked().len(), 3);
}

#[tokio::test]
async fn retry_after_is_obeyed_and_capped() {
    let busy = |after: &str| Reply::Whole {
        status: 429,
        headers: vec![("retry-after", after.to_owned())],
        body: String::new(),
    };
    let fake = Fake::new([busy("1"), answer(&["later"])]).await;
    let model = fake.load().await;
    let start = Instant::now();
    assert_eq!(ask(&*model).await.unwrap().text, "later");
    assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
    // An hour is not waited for: the error comes at once, so that another model can answer.
    fake.then(busy("3600"));
    let start = Instant::now();
    let error = ask(&*model).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Busy && error.is_retried(), "{error}");
    assert!(error.to_string().contains("retry after: 3600 s") && start.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_server_that_dies_in_the_answer_is_an_error_and_not_asked_again() {
    let (error, asked) = failed(vec![Reply::Stream(vec![delta("Hel"), Step::Break]), answer(&["x"])]).await;
    assert_eq!((error.kind(), asked), (ErrorKind::Backend, 1), "{error}");
    assert!(error.is_retryable());
}

#[tokio::test]
async fn a_server_that_dies_before_the_answer_is_asked_again() {
    let fake = Fake::new([Reply::Stream(vec![Step::Break]), answer(&["second"])]).await;
    let model = fake.load().await;
    assert_eq!(ask(&*model).await.unwrap().text, "second");
    assert_eq!(fake.asked().len(), 2);
}

#[tokio::test]
async fn an_end_without_done_is_an_error_though_all_text_came() {
    let steps: Vec<Step> = [delta("all")].into_iter().chain(end("stop").into_iter().take(2)).collect();
    let (error, asked) = failed(vec![Reply::Stream(steps)]).await;
    assert_eq!((error.kind(), asked), (ErrorKind::Backend, 1));
    assert!(error.message().contains("[DONE]"), "{error}");
}

#[tokio::test]
async fn an_end_without_a_reason_is_an_error() {
    let (error, _) =
        failed(vec![Reply::Stream(vec![delta("all"), Step::Bytes(b"data: [DONE]\n\n".to_vec())])]).await;
    assert!(error.message().contains("finish_reason"), "{error}");
    let (error, _) = failed(vec![Reply::Stream([vec![delta("a")], end("content_filter")].concat())]).await;
    assert!(error.message().contains("content_filter"), "{error}");
}

#[tokio::test]
async fn an_error_object_in_the_stream_is_an_error() {
    let object = data(&json!({"error": {"message": "out of memory", "type": "server_error", "code": 500}}));
    let (error, asked) = failed(vec![Reply::Stream(vec![delta("Hel"), object])]).await;
    assert_eq!((error.kind(), asked), (ErrorKind::Backend, 1));
    assert!(error.message().contains("out of memory"), "{error}");
}

#[tokio::test]
async fn html_is_named_as_such() {
    let page = |status| Reply::Whole {
        status,
        headers: vec![("content-type", "text/html; charset=utf-8".to_owned())],
        body: "<!DOCTYPE html><html><head><title>Sign in</title></head></html>".to_owned(),
    };
    let (error, _) = failed(vec![page(200)]).await;
    assert!(error.kind() == ErrorKind::Backend && error.message().contains("text/html"), "{error}");
    let (error, asked) = failed(vec![page(502), page(502), page(502)]).await;
    assert_eq!((error.kind(), asked), (ErrorKind::Backend, 3));
    assert!(error.message().contains("HTML page") && error.message().contains("Sign in"), "{error}");
}

#[tokio::test]
async fn the_detail_of_fastapi_is_told() {
    let reply =
        whole(422, &json!({"detail": [{"loc": ["body", "messages"], "msg": "field required", "type": "x"}]}));
    let (error, _) = failed(vec![reply]).await;
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    assert!(error.message().contains("messages: field required"), "{error}");
}

#[tokio::test]
async fn a_line_that_is_cut_inside_a_character_is_whole_again() {
    let text = "zwölf 日本 \u{1f31e}";
    let Step::Bytes(line) = delta(text) else { unreachable!() };
    let mut steps = Vec::new();
    for byte in line {
        steps.extend([Step::Bytes(vec![byte]), Step::Wait(1)]);
    }
    steps.extend(end("stop"));
    let fake = Fake::new([Reply::Stream(steps)]).await;
    assert_eq!(ask(&*fake.load().await).await.unwrap().text, text);
}

#[tokio::test]
async fn a_slow_first_byte_and_a_stall_are_timeouts() {
    // Without headers, with headers alone, and within the answer.
    let (error, asked) = failed(vec![Reply::Silence; 3]).await;
    assert_eq!((error.kind(), asked), (ErrorKind::Timeout, 3), "{error}");
    let (error, asked) = failed(vec![Reply::Stream(vec![Step::Stall]); 3]).await;
    assert_eq!((error.kind(), asked), (ErrorKind::Timeout, 3), "{error}");
    let (error, asked) = failed(vec![Reply::Stream(vec![delta("Hel"), Step::Stall])]).await;
    assert_eq!((error.kind(), asked), (ErrorKind::Timeout, 1), "{error}");
}

#[tokio::test]
async fn keep_alives_and_a_slow_reader_are_no_stall() {
    let ping = || [Step::Wait(250), Step::Bytes(b": keep-alive\n\n".to_vec())];
    let steps: Vec<Step> =
        ping().into_iter().chain(ping()).chain(ping()).chain([delta("late")]).chain(end("stop")).collect();
    let fake = Fake::new([Reply::Stream(steps), answer(&["a", "b", "c"])]).await;
    let model = fake.load().await;
    assert_eq!(ask(&*model).await.unwrap().text, "late");
    let mut stream = model.generate(hello()).await.unwrap();
    let mut text = String::new();
    while let Some(event) = stream.next().await {
        if let Event::Text(piece) = event.unwrap() {
            text.push_str(&piece.text);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
    assert_eq!(text, "abc");
}

#[tokio::test]
async fn cancelling_closes_the_connection() {
    let endless = || Reply::Stream(vec![delta("a"), Step::Stall]);
    let fake = Fake::new([endless(), endless(), Reply::Silence]).await;
    let model = fake.load().await;
    // By dropping the stream.
    let mut stream = model.generate(hello()).await.unwrap();
    assert!(matches!(stream.next().await, Some(Ok(Event::Text(_)))));
    assert_eq!(fake.open(), 1);
    drop(stream);
    fake.closed().await;
    // By the token, while nobody reads.
    let request = hello();
    let cancel = request.cancel.clone();
    let stream = model.generate(request).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    cancel.cancel();
    fake.closed().await;
    let completion = stream.collect().await.unwrap();
    assert_eq!((completion.finish_reason, completion.text.as_str()), (FinishReason::Cancelled, "a"));
    // Before the server has said anything.
    let request = hello();
    let cancel = request.cancel.clone();
    let waiting = tokio::spawn(async move { model.generate(request).await.unwrap().collect().await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    cancel.cancel();
    assert_eq!(waiting.await.unwrap().unwrap().finish_reason, FinishReason::Cancelled);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_told_so() {
    let fake = Fake::new([]).await;
    let (config, model) = (fake.config(), fake.load().await);
    drop(fake);
    tokio::time::sleep(Duration::from_millis(50)).await;
    for error in [load(&config).await.err().unwrap(), ask(&*model).await.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Backend, "{error}");
        assert!(error.is_retryable() && error.kind().should_fail_over(), "{error}");
        assert!(
            error.message().contains("cannot connect") && error.to_string().contains("refused"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn garbage_is_an_error_and_no_panic() {
    for bytes in [
        &b"data: {\"choices\": 5}\n\n"[..],
        b"data: {}\n\ndata: [DONE]\n\n",
        b"data: [1, 2]\n\n",
        b"data: \xff\xff\n\n",
        b"\x00\x01\x02\n\n",
        b"data: {\"choices\": [{\"delta\": {\"tool_calls\": [{\"index\": 99999999999, \"function\": {}}]}}]}\n\n",
        b"data: {\"choices\": [{\"delta\": {\"content\": {\"a\": 1}}, \"logprobs\": {\"content\": [{}]}}]}\n\n",
    ] {
        let (error, _) = failed(vec![Reply::Stream(vec![Step::Bytes(bytes.to_vec())])]).await;
        assert_eq!(error.kind(), ErrorKind::Backend, "{}: {error}", String::from_utf8_lossy(bytes));
    }
}
