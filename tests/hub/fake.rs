//! A hub in the test's own process: repositories, a CDN on another port, and the faults that a test asks for.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, Method, Response, StatusCode, header},
};
use futures_util::{StreamExt, stream};
use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The commit of every repository.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The token that opens the gated repository.
pub(crate) const TOKEN: &str = "hf_of_the_test";

/// A repository.
#[derive(Clone, Default)]
pub(crate) struct Repo {
    pub(crate) files: BTreeMap<String, Bytes>,
    /// A token is needed.
    pub(crate) gated: bool,
    /// What the hub says of a file's size, against the truth.
    pub(crate) claimed_size: Option<u64>,
    /// What the hub says of a file's hash, against the truth.
    pub(crate) claimed_hash: Option<String>,
}

/// What goes wrong with one request for contents.
#[derive(Clone, Copy)]
pub(crate) enum Fault {
    /// The connection breaks after so many bytes.
    Cut(usize),
    /// This status, in place of the contents.
    Status(u16),
}

/// A request that the hub or its CDN had.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) path: String,
    pub(crate) at_cdn: bool,
    pub(crate) token: Option<String>,
}

#[derive(Default)]
struct Shared {
    repos: Mutex<BTreeMap<String, Repo>>,
    /// SHA-256 of the large files, by repository and name.
    hashes: Mutex<BTreeMap<String, String>>,
    faults: Mutex<VecDeque<Fault>>,
    asked: Mutex<Vec<Asked>>,
    served: AtomicU64,
    /// Milliseconds before each piece of 64 KiB.
    pause: AtomicU64,
}

/// The running hub.
#[derive(Clone)]
pub(crate) struct Fake {
    shared: Arc<Shared>,
    pub(crate) url: String,
}

#[derive(Clone)]
struct Side {
    shared: Arc<Shared>,
    cdn: Option<SocketAddr>,
}

impl Fake {
    /// Starts it. Must be called in a tokio runtime, which serves it.
    pub(crate) async fn start() -> Self {
        let shared = Arc::new(Shared::default());
        let cdn = serve(Side { shared: Arc::clone(&shared), cdn: None }).await;
        let hub = serve(Side { shared: Arc::clone(&shared), cdn: Some(cdn) }).await;
        Self { shared, url: format!("http://{hub}") }
    }

    pub(crate) fn add(&self, name: &str, repo: Repo) {
        for (file, bytes) in repo.files.iter().filter(|(file, _)| is_large(file)) {
            let hash = repo.claimed_hash.clone().unwrap_or_else(|| sha256(bytes));
            self.shared.hashes.lock().unwrap().insert(format!("{name}/{file}"), hash);
        }
        self.shared.repos.lock().unwrap().insert(name.to_owned(), repo);
    }

    /// The next requests for contents go wrong in this way.
    pub(crate) fn fail(&self, faults: impl IntoIterator<Item = Fault>) {
        self.shared.faults.lock().unwrap().extend(faults);
    }

    pub(crate) fn slow_down(&self, pause: Duration) {
        self.shared.pause.store(pause.as_millis() as u64, Ordering::SeqCst);
    }

    /// Bytes of contents so far.
    pub(crate) fn served(&self) -> u64 {
        self.shared.served.load(Ordering::SeqCst)
    }

    /// The requests so far, which are forgotten.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.shared.asked.lock().unwrap())
    }
}

impl Repo {
    pub(crate) fn of(files: impl IntoIterator<Item = (&'static str, Vec<u8>)>) -> Self {
        let files = files.into_iter().map(|(name, bytes)| (name.to_owned(), bytes.into())).collect();
        Self { files, ..Self::default() }
    }
}

/// Whether the hub keeps a file in its storage of large files.
fn is_large(name: &str) -> bool {
    [".safetensors", ".gguf", ".bin", ".onnx"].iter().any(|end| name.ends_with(end))
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn git_hash(bytes: &[u8]) -> String {
    hex(&Sha1::new_with_prefix(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

async fn serve(side: Side) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().fallback(handle).with_state(side);
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

async fn handle(State(side): State<Side>, request: Request) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let token = request.headers().get(header::AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned());
    side.shared.asked.lock().unwrap().push(Asked {
        path: path.clone(),
        at_cdn: side.cdn.is_none(),
        token: token.clone(),
    });
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let repos = side.shared.repos.lock().unwrap().clone();
    let (["api", "models", owner, name, rest @ ..] | [owner, name, rest @ ..]) = &parts[..] else {
        return error(404, "", "no such page");
    };
    if *owner == "renamed" {
        let to = path.replacen("/renamed/", "/test/", 1);
        return Response::builder().status(307).header(header::LOCATION, to).body(Body::empty()).unwrap();
    }
    let Some(repo) = repos.get(&format!("{owner}/{name}")) else {
        return error(401, "RepoNotFound", "Repository not found");
    };
    if side.cdn.is_some() && repo.gated && token.as_deref() != Some(&format!("Bearer {TOKEN}")) {
        let code = if token.is_some() { 403 } else { 401 };
        return error(code, "GatedRepo", "Access to this model is restricted");
    }
    match rest {
        ["revision", revision] if is_known(revision) => {
            let one = |(name, bytes): (&String, &Bytes)| json!({"rfilename": name, "size": bytes.len()});
            let files: Vec<_> = repo.files.iter().map(one).collect();
            let body = json!({"id": format!("{owner}/{name}"), "sha": COMMIT, "siblings": files});
            Response::builder()
                .header(header::CONTENT_TYPE, "application/json")
                .body(body.to_string().into())
                .unwrap()
        }
        ["resolve", revision, file @ ..] if is_known(revision) => {
            let file = file.join("/");
            let Some(bytes) = repo.files.get(&file) else {
                return error(404, "EntryNotFound", "Entry not found");
            };
            side.resolve(repo, &format!("{owner}/{name}"), &file, bytes, &request)
        }
        ["blobs", file @ ..] => side.contents(&repo.files[&file.join("/")], request.headers(), true),
        _ => error(404, "RevisionNotFound", "Invalid rev id"),
    }
}

fn is_known(revision: &str) -> bool {
    ["main", "v1", COMMIT].contains(&revision)
}

fn error(status: u16, code: &str, message: &str) -> Response<Body> {
    Response::builder()
        .status(status)
        .header("x-error-code", code)
        .header("x-error-message", message)
        .body(Body::empty())
        .unwrap()
}

impl Side {
    /// A file by its name: the contents of a small one, the way to the CDN for a large one.
    fn resolve(
        &self,
        repo: &Repo,
        name: &str,
        file: &str,
        bytes: &Bytes,
        request: &Request,
    ) -> Response<Body> {
        let mut response = if is_large(file) {
            let hash = self.shared.hashes.lock().unwrap()[&format!("{name}/{file}")].clone();
            let size = repo.claimed_size.unwrap_or(bytes.len() as u64);
            let cdn = self.cdn.expect("only the hub resolves");
            Response::builder()
                .status(302)
                .header(header::LOCATION, format!("http://{cdn}/{name}/blobs/{file}?signature=1"))
                .header("x-linked-etag", format!("\"{hash}\""))
                .header("x-linked-size", size)
                .header(header::CONTENT_LENGTH, 0)
                .body(Body::empty())
                .unwrap()
        } else if request.method() == Method::HEAD {
            Response::builder().header(header::CONTENT_LENGTH, bytes.len()).body(Body::empty()).unwrap()
        } else {
            self.contents(bytes, request.headers(), false)
        };
        let headers = response.headers_mut();
        headers.insert("x-repo-commit", COMMIT.parse().unwrap());
        if !is_large(file) {
            headers.insert(header::ETAG, format!("\"{}\"", git_hash(bytes)).parse().unwrap());
        }
        response
    }

    /// Contents or a part of them, in pieces. The hub itself serves no parts.
    fn contents(&self, bytes: &Bytes, headers: &HeaderMap, parts: bool) -> Response<Body> {
        let fault = self.shared.faults.lock().unwrap().pop_front();
        if let Some(Fault::Status(status)) = fault {
            return Response::builder().status(status).header("retry-after", 0).body(Body::empty()).unwrap();
        }
        let range = headers.get(header::RANGE).filter(|_| parts).map(|value| {
            let text = value.to_str().unwrap().strip_prefix("bytes=").unwrap();
            let (from, to) = text.split_once('-').unwrap();
            (from.parse::<usize>().unwrap(), to.parse::<usize>().unwrap() + 1)
        });
        let (from, to) = range.unwrap_or((0, bytes.len()));
        let mut response = Response::builder().header(header::CONTENT_LENGTH, to - from);
        if range.is_some() {
            response = response.status(StatusCode::PARTIAL_CONTENT);
            response =
                response.header(header::CONTENT_RANGE, format!("bytes {from}-{}/{}", to - 1, bytes.len()));
        }
        let end = match fault {
            Some(Fault::Cut(after)) => (from + after).min(to),
            _ => to,
        };
        let (body, shared) = (bytes.clone(), Arc::clone(&self.shared));
        let pieces = stream::iter((from..end).step_by(64 << 10)).then(move |at| {
            let (piece, shared) = (body.slice(at..(at + (64 << 10)).min(end)), Arc::clone(&shared));
            async move {
                let pause = shared.pause.load(Ordering::SeqCst);
                if pause > 0 {
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                }
                shared.served.fetch_add(piece.len() as u64, Ordering::SeqCst);
                Ok(piece)
            }
        });
        let broken = stream::iter((end < to).then(|| Err(std::io::Error::other("told to break"))));
        response.body(Body::from_stream(pieces.chain(broken))).unwrap()
    }
}
