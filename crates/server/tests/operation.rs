//! Keys, origins, health, metrics, the page and the shutdown.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::time::{Duration, Instant};

use common::{ECHO, Running, config, eventually, json};
use serde_json::json;
use ternion::LlmBackend;
use ternion::models::Models;
use ternion_server::{Server, ServerOptions};

const CHAT: &str = "/v1/chat/completions";

fn body() -> serde_json::Value {
    json!({ "messages": [{ "role": "user", "content": "a b" }] })
}

#[tokio::test]
async fn a_key_is_needed_where_there_are_keys() {
    let mut options = ServerOptions::default();
    options.api_keys.add("sk-right").unwrap();
    let server = Running::start(config(ECHO), options).await;
    for path in ["/v1/models", "/metrics", "/openapi.json", "/tokenizer_info"] {
        let response = server.get(path).send().await.unwrap();
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
        let error = json(response, 401).await;
        assert_eq!(error["error"]["code"], "invalid_api_key", "{path}");
    }
    for path in ["/", "/health", "/ready"] {
        assert_eq!(server.get(path).send().await.unwrap().status(), 200, "{path}");
    }
    let wrong = server.post(CHAT, &body()).bearer_auth("sk-wrong").send().await.unwrap();
    let error = json(wrong, 401).await.to_string();
    assert!(!error.contains("sk-wrong") && !error.contains("sk-right"));
    let right = server.post(CHAT, &body()).bearer_auth("sk-right").send().await.unwrap();
    json(right, 200).await;
}

#[tokio::test]
async fn an_address_beyond_this_machine_needs_a_key_or_the_operators_word() {
    let models = || Models::new(config(ECHO)).unwrap();
    let error = Server::new(models(), ServerOptions::default()).unwrap().bind("0.0.0.0:0").unwrap_err();
    assert!(error.to_string().contains("--allow-anonymous"), "{error}");
    let mut anonymous = ServerOptions::default();
    anonymous.allow_anonymous = true;
    Server::new(models(), anonymous).unwrap().bind("0.0.0.0:0").unwrap();
    let mut keyed = ServerOptions::default();
    keyed.api_keys.add("k").unwrap();
    Server::new(models(), keyed).unwrap().bind("0.0.0.0:0").unwrap();
    let mut aliased = ServerOptions::default();
    aliased.aliases.insert("x".into(), "nothing".into());
    assert!(Server::new(models(), aliased).is_err());
}

#[tokio::test]
async fn pages_of_other_origins_are_kept_out() {
    let server = Running::echo().await;
    let ask = async |server: &Running, name: &str, value: &str| {
        server.post(CHAT, &body()).header(name, value).send().await.unwrap()
    };
    let response = ask(&server, "origin", "https://evil.example").await;
    assert!(response.headers().get("access-control-allow-origin").is_none());
    assert_eq!(json(response, 403).await["error"]["code"], "origin_not_allowed");
    // A name that an attacker lets resolve to this machine.
    assert_eq!(
        json(ask(&server, "host", "evil.example").await, 403).await["error"]["code"],
        "host_not_allowed"
    );
    assert_eq!(ask(&server, "origin", &server.url).await.status(), 200, "the page itself");

    let mut options = ServerOptions::default();
    options.cors_origins = vec!["https://chat.example".to_owned()];
    let server = Running::start(config(ECHO), options).await;
    let response = ask(&server, "origin", "https://chat.example").await;
    assert_eq!(response.headers()["access-control-allow-origin"], "https://chat.example");
    assert_eq!(response.status(), 200);
    assert_eq!(ask(&server, "origin", "https://evil.example").await.status(), 403);
    let preflight = server
        .client
        .request(reqwest::Method::OPTIONS, format!("{}{CHAT}", server.url))
        .header("origin", "https://chat.example")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type")
        .send()
        .await
        .unwrap();
    assert_eq!(preflight.status(), 200);
    assert_eq!(preflight.headers()["access-control-allow-origin"], "https://chat.example");
}

#[tokio::test]
async fn every_answer_has_an_id() {
    let server = Running::echo().await;
    let one = server.get("/health").send().await.unwrap();
    let two = server.get("/nothing").send().await.unwrap();
    assert!(one.headers()["x-request-id"].to_str().unwrap().starts_with("req-"));
    assert_ne!(one.headers()["x-request-id"], two.headers()["x-request-id"]);
    json(two, 404).await;
    let own = server.get("/health").header("x-request-id", "mine-1").send().await.unwrap();
    assert_eq!(own.headers()["x-request-id"], "mine-1");
    let odd = server.get("/health").header("x-request-id", "a b").send().await.unwrap();
    assert_ne!(odd.headers()["x-request-id"], "a b");
    let wrong = server.get(CHAT).send().await.unwrap();
    common::assert_is_error(&json(wrong, 405).await);
}

#[tokio::test]
async fn alive_is_told_apart_from_able_to_answer() {
    common::install_provider();
    let models = Models::new(config(ECHO)).unwrap();
    let server = Server::new(models, ServerOptions::default()).unwrap();
    let bound = server.bind("127.0.0.1:0").unwrap();
    let url = bound.url();
    let serving = tokio::spawn(bound.serve(std::future::pending()));
    let status = async |path: &str| reqwest::get(format!("{url}{path}")).await.unwrap().status().as_u16();
    assert_eq!((status("/health").await, status("/ready").await), (200, 503), "no model is loaded yet");
    server.load_default().await.unwrap();
    assert_eq!((status("/health").await, status("/ready").await), (200, 200));
    serving.abort();
}

#[tokio::test]
async fn a_shutdown_lets_answers_end() {
    let mut server = Running::echo().await;
    let slow = server.models.get("slow").await.unwrap();
    let words = json!({ "model": "slow", "messages": [{ "role": "user", "content": "a b c d e f g h i j" }], "stream": true });
    let request = server.post(CHAT, &words).send();
    let answer = tokio::spawn(async move { request.await.unwrap().text().await.unwrap() });
    eventually("the answer's start", || slow.stats().active == 1).await;
    server.stop();
    let text = answer.await.unwrap();
    assert!(text.contains(" j") && text.contains("[DONE]"), "{text}");
    server.ended().await;
}

#[tokio::test]
async fn answers_that_take_longer_than_the_grace_time_end_with_an_error() {
    let mut options = ServerOptions::default();
    options.grace = Duration::from_millis(300);
    let mut server = Running::start(config(ECHO), options).await;
    let slow = server.models.get("slow").await.unwrap();
    let words = json!({ "model": "slow", "messages": [{ "role": "user", "content": "word ".repeat(500) }], "stream": true });
    let request = server.post(CHAT, &words).send();
    let answer = tokio::spawn(async move { request.await.unwrap().text().await.unwrap() });
    eventually("the answer's start", || slow.stats().active == 1).await;
    let begun = Instant::now();
    server.stop();
    let text = answer.await.unwrap();
    assert!(text.contains("shutting_down") && !text.contains("[DONE]"), "{text}");
    server.ended().await;
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(slow.stats().active, 0);
}

#[tokio::test]
async fn a_request_ends_at_its_deadline() {
    let mut options = ServerOptions::default();
    options.request_timeout = Some(Duration::from_secs(1));
    let server = Running::start(config(ECHO), options).await;
    let words = json!({ "model": "slow", "messages": [{ "role": "user", "content": "word ".repeat(500) }] });
    let response = server.post(CHAT, &words).send().await.unwrap();
    assert_eq!(response.headers()["x-should-retry"], "false");
    assert_eq!(json(response, 504).await["error"]["code"], "timeout");
    let slow = server.models.get("slow").await.unwrap();
    eventually("the answer's end", || slow.stats().active == 0).await;
}

#[tokio::test]
async fn metrics_count_requests_and_tokens() {
    let server = Running::echo().await;
    server.ok(CHAT, &json!({ "model": "slow", "messages": [{ "role": "user", "content": "a b c" }] })).await;
    server.get("/no-such-path").send().await.unwrap();
    let text = server.get("/metrics").send().await.unwrap().text().await.unwrap();
    for line in [
        "ternion_completion_tokens_total{model=\"slow\"}",
        "ternion_first_token_seconds_bucket{model=\"slow\",le=\"0.1\"}",
        "ternion_http_requests_total{route=\"/v1/chat/completions\",status=\"200\",outcome=\"complete\"}",
        "ternion_http_requests_total{route=\"unknown\",status=\"404\"",
        "ternion_sequences_active{model=\"slow\"} 0",
        "# TYPE ternion_request_duration_seconds histogram",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
}

#[tokio::test]
async fn models_are_swapped_while_the_server_runs() {
    let server = Running::echo().await;
    assert_eq!(server.ok(CHAT, &body()).await["choices"][0]["message"]["content"], "a b");
    let mut new = config(ECHO);
    new.models.get_mut("echo").unwrap().options.insert("reply".into(), "new".into());
    new.models.insert("more".into(), new.models["echo"].clone());
    server.models.reload_with(new).await.unwrap();
    assert_eq!(server.ok(CHAT, &body()).await["choices"][0]["message"]["content"], "new");
    let mut more = body();
    more["model"] = "more".into();
    assert_eq!(server.ok(CHAT, &more).await["model"], "more");
}

#[tokio::test]
async fn the_page_may_run_its_own_script_and_nothing_else() {
    let server = Running::echo().await;
    let response = server.get("/").send().await.unwrap();
    let policy = response.headers()["content-security-policy"].to_str().unwrap().to_owned();
    assert!(policy.contains("default-src 'none'") && policy.contains("script-src 'sha256-"), "{policy}");
    assert!(!policy.contains("unsafe"));
    assert!(response.text().await.unwrap().contains("<title>Ternion</title>"));
    let openapi = json(server.get("/openapi.json").send().await.unwrap(), 200).await;
    assert_eq!(openapi["openapi"], "3.1.0");
}
