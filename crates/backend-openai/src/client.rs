//! Requests to one server: addresses, key, timeouts, and attempts until a response begins.

use std::{fmt, time::Duration};

use bytes::Bytes;
use reqwest::{
    Method, Response, Url,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue},
};
use serde_json::Value;
use ternion_core::{Error, ErrorKind, Result};

use crate::{OpenAiOptions, RetryOptions, failure::Failure, retry::Waits, tls};

/// A response that is read whole has at most so many bytes: scores of a long text with many alternatives are large.
const MAX_RESPONSE: usize = 256 << 20;
/// What is read of an error.
const MAX_ERROR: usize = 64 << 10;

/// The connection pool to one server. The key is in no error and no log.
pub(crate) struct Client {
    http: reqwest::Client,
    base: Url,
    /// The address without `/v1`, where the endpoints outside of OpenAI's API are.
    root: Url,
    authorization: Option<HeaderValue>,
    secret: Option<String>,
    /// A key that is refused is a failure of the server, after which a fallback goes on.
    denial_falls_over: bool,
    first_byte: Duration,
    pub(crate) idle: Duration,
    retry: RetryOptions,
}

impl Client {
    /// A client for the server of these options. Connects to nothing.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) for an address, a key or certificates that cannot be used.
    pub(crate) fn new(options: &OpenAiOptions) -> Result<Self> {
        let base = base(&options.url)?;
        let secret = options.api_key()?;
        let authorization = secret.as_deref().map(|key| {
            let mut value = HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| {
                Error::invalid_config("options.api_key_env: the variable's value cannot stand in a header")
            })?;
            value.set_sensitive(true);
            Ok::<_, Error>(value)
        });
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("ternion/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(options.connect_timeout())
            .redirect(reqwest::redirect::Policy::limited(3));
        builder = builder.tls_backend_preconfigured(tls::config(options.ca_file.as_deref())?);
        if is_loopback(&base) {
            builder = builder.no_proxy();
        }
        let http = builder.build().map_err(|error| {
            Error::invalid_config("the HTTP client cannot be set up").with_source(error.without_url())
        })?;
        let root = root(&base);
        Ok(Self {
            http,
            base,
            root,
            authorization: authorization.transpose()?,
            secret,
            denial_falls_over: options.fall_back_when_denied,
            first_byte: options.first_byte_timeout(),
            idle: options.idle_timeout(),
            retry: options.retry.clone(),
        })
    }

    /// Of OpenAI's API, such as `chat/completions`.
    pub(crate) fn api(&self, path: &str) -> Url {
        below(&self.base, path)
    }

    /// Outside of it, such as `tokenize`.
    pub(crate) fn outside(&self, path: &str) -> Url {
        below(&self.root, path)
    }

    /// The server's address.
    pub(crate) fn address(&self) -> &str {
        self.base.as_str()
    }

    pub(crate) fn first_byte(&self) -> Duration {
        self.first_byte
    }

    /// The waits of a new request.
    pub(crate) fn waits(&self) -> Waits {
        Waits::new(&self.retry)
    }

    /// A JSON document.
    ///
    /// # Errors
    /// Those of the module `failure`.
    pub(crate) async fn get(&self, url: &Url) -> Result<Value> {
        self.whole(&Method::GET, url, None).await
    }

    /// The JSON document that answers another.
    ///
    /// # Errors
    /// Those of the module `failure`.
    pub(crate) async fn post(&self, url: &Url, body: &Value) -> Result<Value> {
        self.whole(&Method::POST, url, Some(body.to_string().into())).await
    }

    async fn whole(&self, method: &Method, url: &Url, body: Option<Bytes>) -> Result<Value> {
        let mut waits = self.waits();
        loop {
            let failure = match self.attempt(method, url, body.clone(), "application/json").await {
                // Nothing is repeated once a response has begun.
                Ok(response) => return self.json(response).await.map_err(|e| self.told(e, url)),
                Err(failure) => failure,
            };
            tokio::time::sleep(waits.next(self.of(failure, url))?).await;
        }
    }

    async fn json(&self, response: Response) -> Result<Value> {
        let bytes = read(response, MAX_RESPONSE, self.idle).await.map_err(|failure| failure.error)?;
        serde_json::from_slice(&bytes).map_err(|error| {
            let start = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
            Error::backend(format!("the response is no JSON: {}", crate::failure::shortened(&start)))
                .with_source(error)
        })
    }

    /// A response with a stream of events, of which the headers have come. Attempts are made as `waits` allows.
    ///
    /// # Errors
    /// Those of the module `failure`.
    pub(crate) async fn open(&self, url: &Url, body: &Bytes, waits: &mut Waits) -> Result<Response> {
        loop {
            let failure =
                match self.attempt(&Method::POST, url, Some(body.clone()), "text/event-stream").await {
                    Ok(response) => match self.is_stream(response).await {
                        Ok(response) => return Ok(response),
                        Err(failure) => failure,
                    },
                    Err(failure) => failure,
                };
            tokio::time::sleep(waits.next(self.of(failure, url))?).await;
        }
    }

    /// One attempt, up to the headers of a response that is no error.
    async fn attempt(
        &self,
        method: &Method,
        url: &Url,
        body: Option<Bytes>,
        accept: &'static str,
    ) -> std::result::Result<Response, Failure> {
        let mut request = self.http.request(method.clone(), url.clone()).header(ACCEPT, accept);
        if let Some(key) = &self.authorization {
            request = request.header(AUTHORIZATION, key.clone());
        }
        if let Some(body) = body {
            request = request.header(CONTENT_TYPE, "application/json").body(body);
        }
        let response = tokio::time::timeout(self.first_byte, request.send())
            .await
            .map_err(|_| Failure::passing(no_byte(self.first_byte)))?
            .map_err(Failure::of_transport)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let (status, headers) = (response.status(), response.headers().clone());
        // What cannot be read of an error changes nothing about its status.
        let text = read(response, MAX_ERROR, self.first_byte.min(self.idle)).await.unwrap_or_default();
        let failure = Failure::of_status(status, &headers, &String::from_utf8_lossy(&text));
        Err(if self.denial_falls_over { failure.falling_over() } else { failure })
    }

    /// The response if it is a stream of events; else an error with what it says.
    async fn is_stream(&self, response: Response) -> std::result::Result<Response, Failure> {
        let kind =
            response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        if kind.is_empty() || kind == "text/event-stream" {
            return Ok(response);
        }
        let text = read(response, MAX_ERROR, self.idle).await.unwrap_or_default();
        let text = crate::failure::shortened(&String::from_utf8_lossy(&text));
        let text: String = text.chars().take(120).collect();
        Err(Failure::lasting(Error::backend(format!(
            "the server answered with `{kind}` where a stream of events is expected; is `options.url` its API? It says: {text}"
        ))))
    }

    fn of(&self, failure: Failure, url: &Url) -> Failure {
        Failure { error: self.told(failure.error, url), ..failure }
    }

    /// The error with the address, and without the key, which some servers repeat.
    pub(crate) fn told(&self, error: Error, url: &Url) -> Error {
        self.without_key(error).with("url", url)
    }

    pub(crate) fn without_key(&self, error: Error) -> Error {
        let Some(secret) = self.secret.as_deref().filter(|secret| error.to_string().contains(*secret)) else {
            return error;
        };
        let retryable = error.is_retryable();
        let message = error.message().replace(secret, "[key]");
        Error::new(error.kind(), message).with_retryable(retryable)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("base", &self.base.as_str()).finish_non_exhaustive()
    }
}

/// The error of a server that says nothing.
pub(crate) fn no_byte(limit: Duration) -> Error {
    Error::new(ErrorKind::Timeout, format!("the server has sent nothing within {} ms", limit.as_millis()))
}

/// All bytes of a response, of which at most `cap` are read, with at most `idle` between two pieces.
async fn read(mut response: Response, cap: usize, idle: Duration) -> std::result::Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    loop {
        let chunk = tokio::time::timeout(idle, response.chunk())
            .await
            .map_err(|_| Failure::passing(no_byte(idle)))?
            .map_err(Failure::of_transport)?;
        let Some(chunk) = chunk else { return Ok(bytes) };
        bytes.extend_from_slice(&chunk[..chunk.len().min(cap - bytes.len())]);
        if bytes.len() == cap {
            return Ok(bytes);
        }
    }
}

fn base(text: &str) -> Result<Url> {
    let wrong = |what: &str| {
        Error::invalid_config(format!("options.url: {what}; such as http://gpu-1:8000/v1 expected"))
    };
    let mut url = Url::parse(text.trim()).map_err(|error| wrong("is no address").with_source(error))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(wrong("is no address of the schemes http and https"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong(
            "has a user name or a password in it, which belong into the variable of `api_key_env`",
        ));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("has a query or a fragment"));
    }
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(if path.is_empty() { "/v1" } else { &path });
    Ok(url)
}

fn root(base: &Url) -> Url {
    let mut root = base.clone();
    let path = base.path().strip_suffix("/v1").unwrap_or(base.path()).to_owned();
    root.set_path(&path);
    root
}

fn below(url: &Url, path: &str) -> Url {
    let mut below = url.clone();
    below.set_path(&format!("{}/{path}", url.path().trim_end_matches('/')));
    below
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_with_and_without_a_path() {
        for (text, api, outside) in [
            ("http://h:8000", "http://h:8000/v1/models", "http://h:8000/tokenize"),
            ("http://h:8000/", "http://h:8000/v1/models", "http://h:8000/tokenize"),
            ("https://h/v1/", "https://h/v1/models", "https://h/tokenize"),
            ("https://h/proxy/v1", "https://h/proxy/v1/models", "https://h/proxy/tokenize"),
            ("https://h/api/v3", "https://h/api/v3/models", "https://h/api/v3/tokenize"),
        ] {
            let base = base(text).unwrap();
            assert_eq!(below(&base, "models").as_str(), api);
            assert_eq!(below(&root(&base), "tokenize").as_str(), outside);
        }
        for bad in ["", "gpu-1:8000", "ftp://h/v1", "http://user:secret@h/v1", "http://h/v1?key=secret"] {
            let error = base(bad).unwrap_err().to_string();
            assert!(error.contains("options.url") && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn loopback_needs_no_proxy() {
        for (url, expected) in [
            ("http://localhost:1/v1", true),
            ("http://127.0.0.2/v1", true),
            ("http://[::1]:80/v1", true),
            ("http://10.0.0.1/v1", false),
            ("http://example.org/v1", false),
        ] {
            assert_eq!(is_loopback(&Url::parse(url).unwrap()), expected, "{url}");
        }
    }
}
