//! A server for a test, on a port of its own, and a client.
#![allow(dead_code, reason = "each test uses some of it")]

use std::{path::PathBuf, time::Duration};

use reqwest::{Client, RequestBuilder, Response};
use serde_json::Value;
use ternion::{
    config::{Config, Format},
    models::Models,
};
use ternion_server::{Server, ServerOptions};
use tokio::{sync::oneshot, task::JoinHandle};

/// A server that stops when it is dropped.
pub(crate) struct Running {
    pub(crate) url: String,
    pub(crate) models: Models,
    pub(crate) client: Client,
    stop: Option<oneshot::Sender<()>>,
    serving: Option<JoinHandle<ternion::Result<()>>>,
}

pub(crate) fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name).canonicalize().unwrap()
}

/// The cryptography of the client, which it asks for even where it needs none.
pub(crate) fn install_provider() {
    // Fails where it is there already.
    let _ = rustls_graviola::default_provider().install_default();
}

/// Models that answer without a model: `echo` at once, `slow` with a word each 50 ms, `broken` fails after two words, and `busy` has
/// one place.
pub(crate) const ECHO: &str = r#"
    default_model = "echo"
    [models.echo]
    backend = "echo"
    [models.slow]
    backend = "echo"
    options.delay_ms = 50
    [models.broken]
    backend = "echo"
    options.fail = "backend"
    options.fail_after = 2
    [models.busy]
    backend = "echo"
    max_sequences = 1
    max_queued = 0
    options.delay_ms = 50
    [models.missing]
    path = "no/such/folder"
"#;

pub(crate) fn config(text: &str) -> Config {
    Config::from_str(text, Format::Toml).unwrap()
}

/// The small real model.
pub(crate) fn tiny() -> Config {
    config(&format!(
        "default_model = \"tiny\"\n[models.tiny]\npath = '{}'\nthreads = 1\ncontext_length = 256\n",
        fixture("ternion-tiny").display()
    ))
}

impl Running {
    pub(crate) async fn echo() -> Self {
        Self::start(config(ECHO), ServerOptions::default()).await
    }

    pub(crate) async fn tiny() -> Self {
        Self::start(tiny(), ServerOptions::default()).await
    }

    pub(crate) async fn start(config: Config, options: ServerOptions) -> Self {
        install_provider();
        let models = Models::new(config).unwrap();
        let server = Server::new(models.clone(), options).unwrap();
        let bound = server.bind("127.0.0.1:0").unwrap();
        let url = bound.url();
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(bound.serve(async move {
            let _ = stopped.await;
        }));
        server.load_default().await.unwrap();
        let client = Client::builder().timeout(Duration::from_secs(120)).build().unwrap();
        Self { url, models, client, stop: Some(stop), serving: Some(serving) }
    }

    /// Begins the shutdown.
    pub(crate) fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }

    /// Waits for the end.
    pub(crate) async fn ended(mut self) {
        self.stop();
        self.serving.take().unwrap().await.unwrap().unwrap();
    }

    pub(crate) fn get(&self, path: &str) -> RequestBuilder {
        self.client.get(format!("{}{path}", self.url))
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        self.client.post(format!("{}{path}", self.url)).json(body)
    }

    /// The JSON of an answer that must be a 200.
    pub(crate) async fn ok(&self, path: &str, body: &Value) -> Value {
        json(self.post(path, body).send().await.unwrap(), 200).await
    }

    /// The error of an answer that must have this status.
    pub(crate) async fn refused(&self, path: &str, body: &Value, status: u16) -> Value {
        let answer = json(self.post(path, body).send().await.unwrap(), status).await;
        assert_is_error(&answer);
        answer["error"].clone()
    }

    /// The chunks of a stream, and whether `[DONE]` came.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> (Vec<Value>, bool) {
        let response = self.post(path, body).send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let text = response.text().await.unwrap();
        let data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let done = data.last() == Some(&"[DONE]");
        let chunks = data.iter().filter(|data| **data != "[DONE]");
        (chunks.map(|data| serde_json::from_str(data).unwrap()).collect(), done)
    }
}

pub(crate) async fn json(response: Response, status: u16) -> Value {
    let found = response.status().as_u16();
    let text = response.text().await.unwrap();
    assert_eq!(found, status, "{text}");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// OpenAI's form, with a `code` that is a string or null.
pub(crate) fn assert_is_error(answer: &Value) {
    let error = &answer["error"];
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{answer}");
    assert!(error["type"].is_string(), "{answer}");
    assert!(error["code"].is_string() || error["code"].is_null(), "{answer}");
    assert!(error.as_object().unwrap().contains_key("param"), "{answer}");
}

/// Waits until `done`.
pub(crate) async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..500 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} has not happened in five seconds");
}
