//! What no client should send: a 4xx in OpenAI's form, and the server stays up.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::time::{Duration, Instant};

use common::{ECHO, Running, assert_is_error, config, json};
use serde_json::{Value, json};
use ternion_server::ServerOptions;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const PATHS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"];

async fn send(server: &Running, path: &str, body: impl Into<reqwest::Body>) -> (u16, Value) {
    let response = server.client.post(format!("{}{path}", server.url)).body(body).send().await.unwrap();
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{status} {error}: {text}")))
}

async fn still_up(server: &Running) {
    let body = json!({ "messages": [{ "role": "user", "content": "a b" }] });
    assert_eq!(server.ok("/v1/chat/completions", &body).await["choices"][0]["message"]["content"], "a b");
}

#[tokio::test]
async fn bodies_that_are_no_request_are_refused() {
    let server = Running::echo().await;
    let deep = format!("{{\"messages\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    for path in PATHS {
        for body in [
            &b""[..],
            b"{",
            b"null",
            b"[]",
            b"7",
            b"\"text\"",
            b"{\"messages\": [}",
            b"{\"prompt\": \"\xff\xfe\"}",
            b"\xef\xbb\xbf{}",
            b"{} {}",
            b"\0",
            b"{\"prompt\": \"\\ud800\"}",
            b"{\"model\": \"echo\", \"model\": \"echo\"}",
            deep.as_bytes(),
        ] {
            let (status, answer) = send(&server, path, body.to_vec()).await;
            assert_eq!(status, 400, "{path} {:?} {answer}", &body[..body.len().min(40)]);
            assert_is_error(&answer);
        }
    }
    still_up(&server).await;
}

/// Every field that the OpenAPI document names, with a value of each type. What is not refused must work.
#[tokio::test]
async fn wrong_types_at_every_field_are_refused_with_its_name() {
    let server = Running::echo().await;
    let document = json(server.get("/openapi.json").send().await.unwrap(), 200).await;
    let values = [
        json!(true),
        json!(-1),
        json!(1.5),
        json!(1e300),
        json!(u64::MAX),
        json!("text"),
        json!([]),
        json!([1]),
        json!([[]]),
        json!([{}]),
        json!({}),
        json!({ "x": 1 }),
        json!([null]),
        json!({ "type": "nothing" }),
    ];
    let mut refused = 0;
    for (path, schema, valid) in [
        ("/v1/chat/completions", "ChatRequest", json!({ "messages": [{ "role": "user", "content": "a" }] })),
        ("/v1/completions", "CompletionRequest", json!({ "prompt": "a" })),
        ("/tokenize", "TokenizeRequest", json!({})),
        ("/detokenize", "DetokenizeRequest", json!({})),
    ] {
        let fields = document["components"]["schemas"][schema]["properties"].as_object().unwrap();
        assert!(fields.len() > 1);
        for field in fields.keys() {
            for value in &values {
                let mut body = valid.clone();
                body[field] = value.clone();
                let response = server.post(path, &body).send().await.unwrap();
                let status = response.status().as_u16();
                if status == 200 {
                    continue;
                }
                assert!((400..500).contains(&status), "{path} {field} {value}: {status}");
                let answer: Value = response.json().await.unwrap();
                assert_is_error(&answer);
                refused += 1;
                if status == 400 {
                    assert!(answer["error"]["param"].is_string(), "{path} {field} {value}: {answer}");
                }
            }
        }
    }
    assert!(refused > 500, "{refused}");
    still_up(&server).await;
}

#[tokio::test]
async fn values_out_of_range_are_refused_with_the_name_of_the_field() {
    let server = Running::tiny().await;
    for (field, value) in [
        ("temperature", json!(-1)),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("min_p", json!(2)),
        ("presence_penalty", json!(1000)),
        ("repetition_penalty", json!(0)),
        ("n", json!(0)),
        ("n", json!(100_000)),
        ("max_tokens", json!(0)),
        ("max_completion_tokens", json!(0)),
        ("top_logprobs", json!(101)),
        ("top_logprobs", json!(1)),
        ("stop", json!([""])),
        ("stop", json!(vec!["x"; 65])),
        ("stop_token_ids", json!([99_999_999])),
        ("logit_bias", json!({ "99999999": 1 })),
        ("logit_bias", json!({ "-1": 1 })),
        ("messages", json!([])),
        ("messages", json!([{ "role": "" }])),
        ("messages", json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }])),
        ("tools", json!([{ "type": "function", "function": {} }])),
        ("tool_choice", json!("required")),
        ("response_format", json!({ "type": "xml" })),
        ("reasoning_effort", json!("extreme")),
        ("modalities", json!(["audio"])),
        ("stream_options", json!({ "include_usage": true })),
    ] {
        let mut body = json!({ "messages": [{ "role": "user", "content": "a" }] });
        body[field] = value.clone();
        let error = server.refused("/v1/chat/completions", &body, 400).await;
        assert_eq!(error["param"], field, "{value} {error}");
        assert!(error["message"].as_str().unwrap().contains(field), "{error}");
    }
    for (field, value) in [
        ("prompt", json!("")),
        ("prompt", json!([])),
        ("prompt", json!([[]])),
        ("prompt", json!(["a", 1])),
        ("prompt", json!([99_999_999])),
        ("prompt", json!(vec!["a"; 2000])),
        ("best_of", json!(2)),
        ("suffix", json!("x")),
        ("logprobs", json!(101)),
    ] {
        let mut body = json!({ "prompt": "a" });
        body[field] = value.clone();
        let error = server.refused("/v1/completions", &body, 400).await;
        assert_eq!(error["param"], field, "{error}");
    }
}

#[tokio::test]
async fn large_requests_are_refused_before_they_are_read() {
    let server = Running::echo().await;
    let many = json!({ "messages": vec![json!({ "role": "user", "content": "a" }); 100_000] });
    let error = server.refused("/v1/chat/completions", &many, 400).await;
    assert_eq!(error["param"], "messages");

    // A gigabyte that is announced: the answer comes before any of it.
    let address = server.url.strip_prefix("http://").unwrap();
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-length: 1073741824\r\n\r\n");
    let answer = raw(address, head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("body_too_large"), "{answer}");
    // One that is not announced ends at the limit.
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ntransfer-encoding: chunked\r\n\r\n");
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    let chunk = [format!("{:x}\r\n", 1 << 20).into_bytes(), vec![b' '; 1 << 20], b"\r\n".to_vec()].concat();
    let mut sent = 0;
    while sent < 1 << 10 && stream.write_all(&chunk).await.is_ok() {
        sent += 1;
    }
    assert!(sent < 64, "{sent} MiB were taken");
    still_up(&server).await;
}

/// What the server answers to these bytes, until it closes or two seconds are over.
async fn raw(address: &str, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(2), stream.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn slow_clients_are_cut_off() {
    let mut options = ServerOptions::default();
    options.header_timeout = Duration::from_millis(500);
    options.body_timeout = Duration::from_millis(500);
    let server = Running::start(config(ECHO), options).await;
    let address = server.url.strip_prefix("http://").unwrap().to_owned();
    // Headers that come letter by letter.
    let begun = Instant::now();
    let mut stream = TcpStream::connect(&address).await.unwrap();
    let mut answer = [0; 64];
    for byte in b"GET /health HTTP/1.1\r\nx-long: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" {
        if stream.write_all(&[*byte]).await.is_err() {
            break;
        }
        if let Ok(Ok(0)) = tokio::time::timeout(Duration::from_millis(50), stream.read(&mut answer)).await {
            break;
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    // A connection that says nothing.
    let begun = Instant::now();
    let mut stream = TcpStream::connect(&address).await.unwrap();
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut answer)).await;
    assert!(matches!(read, Ok(Ok(0) | Err(_))) && begun.elapsed() < Duration::from_secs(3), "{read:?}");
    // A body that never ends.
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-length: 100\r\n\r\n{{");
    let answer = raw(&address, head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("body_timeout"), "{answer}");
    still_up(&server).await;
}

#[tokio::test]
async fn paths_and_bytes_that_are_no_http_are_refused() {
    let server = Running::echo().await;
    let address = server.url.strip_prefix("http://").unwrap().to_owned();
    for path in ["/nothing", "/v1/nothing", "/../../etc/passwd", "/v1/models/%ff%00", "/%2e%2e/x"] {
        let answer = raw(
            &address,
            format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").as_bytes(),
        )
        .await;
        assert!(answer.starts_with("HTTP/1.1 40"), "{path}: {answer}");
    }
    for bytes in
        [&b"\xff\xfe\x00garbage\r\n\r\n"[..], b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n\r\n"]
    {
        let answer = raw(&address, bytes).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    still_up(&server).await;
}
