//! A server that does what a test tells it to do, and remembers what it was asked.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part, and none has an API")]

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, Response, StatusCode},
};
use futures_util::stream;
use serde_json::{Value, json};
use ternion_backend_openai::OpenAiFactory;
use ternion_core::{
    Completion, GenerateRequest, LlmBackend, Message, Result,
    config::ModelConfig,
    registry::{BackendFactory, Progress},
};

/// What the server does with one request.
#[derive(Clone)]
pub enum Reply {
    /// A whole response.
    Whole { status: u16, headers: Vec<(&'static str, String)>, body: String },
    /// A stream of events in these steps.
    Stream(Vec<Step>),
    /// Nothing, for ever.
    Silence,
}

/// A step of a stream.
#[derive(Clone)]
pub enum Step {
    Bytes(Vec<u8>),
    Wait(u64),
    /// Breaks the connection, as the death of the server does.
    Break,
    /// Sends nothing more, and ends only with the connection.
    Stall,
}

/// A data line with a piece of a chat answer.
pub fn delta(text: &str) -> Step {
    data(&json!({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": null}]}))
}

pub fn data(value: &Value) -> Step {
    Step::Bytes(format!("data: {value}\n\n").into_bytes())
}

/// The end of a chat answer.
pub fn end(reason: &str) -> Vec<Step> {
    vec![
        data(&json!({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})),
        data(
            &json!({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}),
        ),
        Step::Bytes(b"data: [DONE]\n\n".to_vec()),
    ]
}

/// A good answer of these pieces.
pub fn answer(pieces: &[&str]) -> Reply {
    Reply::Stream(pieces.iter().map(|piece| delta(piece)).chain(end("stop")).collect())
}

pub fn whole(status: u16, body: &Value) -> Reply {
    Reply::Whole {
        status,
        headers: vec![("content-type", "application/json".to_owned())],
        body: body.to_string(),
    }
}

pub fn refusal(status: u16, code: &str) -> Reply {
    whole(
        status,
        &json!({"error": {"message": format!("refused: {code}"), "type": "t", "param": null, "code": code}}),
    )
}

/// A request that has come.
#[derive(Clone)]
pub struct Asked {
    pub path: String,
    pub headers: HeaderMap,
    pub body: Value,
}

type Responder = Box<dyn Fn(&Asked) -> Option<Reply> + Send + Sync>;

struct Shared {
    asked: Mutex<Vec<Asked>>,
    replies: Mutex<VecDeque<Reply>>,
    /// Answers what no reply is left for.
    responder: Responder,
    open: Arc<AtomicUsize>,
}

pub struct Fake {
    pub url: String,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

impl Fake {
    /// A server that lists one model, and gives these replies to requests for answers, one after the other.
    pub async fn new(replies: impl IntoIterator<Item = Reply>) -> Self {
        Self::with(replies, Box::new(|_| None)).await
    }

    pub async fn with(replies: impl IntoIterator<Item = Reply>, responder: Responder) -> Self {
        let shared = Arc::new(Shared {
            asked: Mutex::default(),
            replies: Mutex::new(replies.into_iter().collect()),
            responder,
            open: Arc::default(),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let router = Router::new().fallback(serve).with_state(Arc::clone(&shared));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, shared, task }
    }

    /// Requests for answers so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap().clone()
    }

    pub fn then(&self, reply: Reply) {
        self.shared.replies.lock().unwrap().push_back(reply);
    }

    /// Streams that the server is still sending.
    pub fn open(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// Waits until no stream is open.
    pub async fn closed(&self) {
        for _ in 0..500 {
            if self.open() == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} streams are still open", self.open());
    }

    /// The model with short timeouts, untried.
    pub fn config(&self) -> ModelConfig {
        let mut config = ModelConfig::default();
        "openai".clone_into(&mut config.backend);
        let options = json!({
            "url": self.url, "probe": false, "connect_timeout_ms": 2000, "first_byte_timeout_ms": 400,
            "idle_timeout_ms": 400, "retry": {"attempts": 3, "min_delay_ms": 1, "max_delay_ms": 5},
        });
        config.options.clone_from(options.as_object().unwrap());
        config
    }

    pub async fn load(&self) -> Arc<dyn LlmBackend> {
        load(&self.config()).await.unwrap()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub async fn load(config: &ModelConfig) -> Result<Arc<dyn LlmBackend>> {
    OpenAiFactory.load("model", config, Progress::none()).await
}

pub fn hello() -> GenerateRequest {
    GenerateRequest::chat([Message::user("Hello")])
}

pub async fn ask(model: &dyn LlmBackend) -> Result<Completion> {
    model.generate(hello()).await?.collect().await
}

/// Counts a stream that is being sent.
struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn serve(State(shared): State<Arc<Shared>>, request: Request) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 64 << 20).await.unwrap();
    let path = parts.uri.path().to_owned();
    let asked =
        Asked { path, headers: parts.headers, body: serde_json::from_slice(&body).unwrap_or_default() };
    let reply = if asked.path.ends_with("/models") {
        (shared.responder)(&asked).unwrap_or_else(|| {
            whole(200, &json!({"object": "list", "data": [{"id": "remote", "object": "model"}]}))
        })
    } else {
        shared.asked.lock().unwrap().push(asked.clone());
        let next = shared.replies.lock().unwrap().pop_front();
        next.or_else(|| (shared.responder)(&asked)).unwrap_or_else(|| refusal(404, "not_found"))
    };
    respond(reply, &shared.open).await
}

async fn respond(reply: Reply, open: &Arc<AtomicUsize>) -> Response<Body> {
    match reply {
        Reply::Silence => std::future::pending().await,
        Reply::Whole { status, headers, body } => {
            let mut response = Response::builder().status(StatusCode::from_u16(status).unwrap());
            for (name, value) in headers {
                response = response.header(name, value);
            }
            response.body(Body::from(body)).unwrap()
        }
        Reply::Stream(steps) => {
            open.fetch_add(1, Ordering::SeqCst);
            let state = (steps.into_iter(), Open(Arc::clone(open)));
            let bytes = stream::unfold(state, |(mut steps, open)| async move {
                loop {
                    match steps.next()? {
                        Step::Bytes(bytes) => return Some((Ok(Bytes::from(bytes)), (steps, open))),
                        Step::Wait(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
                        Step::Break => {
                            // What was sent before gets through first.
                            tokio::time::sleep(Duration::from_millis(30)).await;
                            let broken = std::io::Error::other("the server dies");
                            return Some((Err(broken), (Vec::new().into_iter(), open)));
                        }
                        Step::Stall => std::future::pending().await,
                    }
                }
            });
            Response::builder()
                .header("content-type", "text/event-stream; charset=utf-8")
                .body(Body::from_stream(bytes))
                .unwrap()
        }
    }
}
