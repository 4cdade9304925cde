//! Requests to the hub: what a repository holds, what a file is, and the bytes of it.
//!
//! The token goes to the hub alone: where the hub redirects to another host, such as its CDN, the request is made without.

use std::{ops::Range, sync::Arc, time::Duration};

use reqwest::{
    Client, Method, RequestBuilder, Response, StatusCode, Url,
    header::{ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, RANGE},
    redirect::Policy,
};
use serde::Deserialize;
use ternion_core::{Error, ErrorKind, Result};

use crate::{
    Settings,
    address::{is_commit, is_safe_path},
    failure::{Failure, Waits},
    progress::Counter,
    select::RemoteFile,
};

/// The largest description of a repository that is read.
const MAX_LISTING: usize = 64 << 20;
/// Attempts at a request that bring nothing.
const ATTEMPTS: usize = 5;
/// An attempt that brings so many bytes before it breaks does not count.
const WORTHWHILE: usize = 64 << 10;
const MAX_REDIRECTS: usize = 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may bring nothing.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection pool to one hub. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Http(Arc<Inner>);

struct Inner {
    /// Follows redirects anywhere.
    content: Client,
    /// Follows redirects within the hub alone: the headers about a file are those of the response that leads elsewhere.
    metadata: Client,
    endpoint: Url,
    token: Option<HeaderValue>,
}

/// What a revision of a repository holds.
#[derive(Debug)]
pub(crate) struct Revision {
    pub(crate) commit: String,
    pub(crate) files: Vec<RemoteFile>,
}

/// What the hub says about a file.
#[derive(Debug, Clone)]
pub(crate) struct FileFacts {
    /// The hash of its contents: SHA-256 of a large file, Git's hash of a small one.
    pub(crate) etag: String,
    pub(crate) size: Option<u64>,
}

#[derive(Deserialize)]
struct Listing {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
}

impl Http {
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) for an endpoint or a token that cannot be used, or without cryptography.
    pub(crate) fn new(settings: &Settings) -> Result<Self> {
        let endpoint = Url::parse(&settings.endpoint)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or_else(|| {
                Error::invalid_config(
                    "HF_ENDPOINT is no address; expected one such as https://huggingface.co",
                )
                .with("endpoint", &settings.endpoint)
            })?;
        let token = settings.token.as_ref().map(|token| {
            let mut value = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| {
                Error::invalid_config("the token of the hub (HF_TOKEN) cannot stand in a header")
            })?;
            value.set_sensitive(true);
            Ok::<_, Error>(value)
        });
        let within = Policy::custom(|attempt| {
            let to = attempt.url().origin();
            if attempt.previous().len() > MAX_REDIRECTS {
                attempt.error("too many redirects")
            } else if attempt.previous().first().is_some_and(|from| from.origin() == to) {
                attempt.follow()
            } else {
                attempt.stop()
            }
        });
        Ok(Self(Arc::new(Inner {
            content: client(&endpoint, Policy::limited(MAX_REDIRECTS))?,
            metadata: client(&endpoint, within)?,
            token: token.transpose()?,
            endpoint,
        })))
    }

    /// What a revision holds.
    pub(crate) async fn revision(&self, repo: &str, revision: &str) -> Result<Revision> {
        let mut url =
            self.url(["api", "models"].into_iter().chain(repo.split('/')).chain(["revision", revision]));
        // With the sizes of the files.
        url.set_query(Some("blobs=true"));
        // Few attempts: without a network, what is in the cache is used, and nobody wants to wait for that.
        let mut waits = Waits::new(3);
        let body = loop {
            let read = async { whole(self.send(&self.0.content, Method::GET, &url, None).await?).await };
            match read.await {
                Ok(body) => break body,
                Err(failure) => waits.after(failure).await?,
            }
        };
        let listing: Listing = serde_json::from_slice(&body).map_err(|e| no_hub().with_source(e))?;
        if !is_commit(&listing.sha) {
            return Err(no_hub());
        }
        // A name that would lead out of the cache is no file that anybody needs.
        let files = listing.siblings.into_iter().filter(|file| is_safe_path(&file.rfilename));
        let files = files.map(|file| RemoteFile { name: file.rfilename, size: file.size }).collect();
        Ok(Revision { commit: listing.sha, files })
    }

    /// What a file is.
    pub(crate) async fn facts(&self, repo: &str, commit: &str, file: &str) -> Result<FileFacts> {
        let url = self.file_url(repo, commit, file);
        let mut waits = Waits::new(ATTEMPTS);
        let response = loop {
            match self.send(&self.0.metadata, Method::HEAD, &url, None).await {
                Ok(response) => break response,
                Err(failure) => waits.after(failure).await?,
            }
        };
        let headers = response.headers();
        let own = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let etag = own("x-linked-etag").or_else(|| own(ETAG.as_str())).map(plain_etag);
        let etag = etag.filter(|etag| is_etag(etag)).ok_or_else(|| {
            Error::new(ErrorKind::Io, "the server does not tell the hash of the file; check HF_ENDPOINT")
                .with("file", file)
        })?;
        // The length of a redirect is not that of the file.
        let length = || own(CONTENT_LENGTH.as_str()).filter(|_| response.status().is_success());
        let size = own("x-linked-size").or_else(length).and_then(|text| text.parse().ok());
        Ok(FileFacts { etag: etag.to_owned(), size })
    }

    /// The bytes of a file in `range`. `is_whole`: that is all of it, and it is asked for without a range. Where the connection
    /// breaks, a part goes on from there, and a whole file begins again.
    pub(crate) async fn bytes(
        &self,
        url: &Url,
        range: Range<u64>,
        is_whole: bool,
        counter: &Counter,
    ) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let length = (range.end - range.start) as usize;
        let mut waits = Waits::new(ATTEMPTS);
        while bytes.len() < length {
            let had = bytes.len();
            let asked = (!is_whole).then_some(range.start + had as u64..range.end);
            let read = async {
                let response = self.send(&self.0.content, Method::GET, url, asked.clone()).await?;
                if let Some(asked) = &asked {
                    is_part(&response, asked)?;
                }
                append(response, &mut bytes, length, counter).await
            };
            let Err(failure) = read.await else { continue };
            if is_whole {
                counter.take_back(bytes.len() as u64);
                bytes.clear();
            } else if bytes.len() - had >= WORTHWHILE {
                waits = Waits::new(ATTEMPTS);
            }
            waits.after(failure).await?;
        }
        Ok(bytes)
    }

    /// The address of a file's contents.
    pub(crate) fn file_url(&self, repo: &str, commit: &str, file: &str) -> Url {
        self.url(repo.split('/').chain(["resolve", commit]).chain(file.split('/')))
    }

    fn url<'a>(&self, segments: impl Iterator<Item = &'a str>) -> Url {
        let mut url = self.0.endpoint.clone();
        // Fails only for addresses that cannot have a path; this one has a host.
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        url
    }

    /// Sends one request, up to the headers of a response that is no error.
    async fn send(
        &self,
        client: &Client,
        method: Method,
        url: &Url,
        range: Option<Range<u64>>,
    ) -> Result<Response, Failure> {
        let mut request: RequestBuilder = client.request(method, url.clone());
        // Compression would hide the length.
        request = request.header(ACCEPT_ENCODING, "identity");
        if let Some(token) = &self.0.token {
            request = request.header(reqwest::header::AUTHORIZATION, token);
        }
        if let Some(range) = range {
            request = request.header(RANGE, format!("bytes={}-{}", range.start, range.end - 1));
        }
        let response = request.send().await.map_err(Failure::of_transport)?;
        let status = response.status();
        if status.is_success() || status.is_redirection() {
            return Ok(response);
        }
        Err(Failure::of_response(status, response.headers(), self.0.token.is_some()))
    }
}

fn client(endpoint: &Url, redirects: Policy) -> Result<Client> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::invalid_config("the HTTP client cannot be set up").with_source(error.to_string())
    };
    let provider = ternion_tls::provider().ok_or_else(|| Error::invalid_config(ternion_tls::NO_PROVIDER))?;
    let tls = ternion_tls::client_config(provider, Vec::new()).map_err(|e| failed(&e))?;
    let mut builder = Client::builder()
        .user_agent(concat!("ternion/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        // A redirect must not lead from HTTPS to HTTP.
        .https_only(endpoint.scheme() == "https")
        .redirect(redirects)
        .tls_backend_preconfigured(tls);
    if is_loopback(endpoint) {
        builder = builder.no_proxy();
    }
    builder.build().map_err(|e| failed(&e.without_url()))
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

fn no_hub() -> Error {
    Error::new(ErrorKind::Io, "the server's answer is not that of a hub; check HF_ENDPOINT")
}

/// The hash without the form that HTTP gives it.
fn plain_etag(text: &str) -> &str {
    text.trim().trim_start_matches("W/").trim_matches('"')
}

/// Whether a hash can be the name of a file.
fn is_etag(text: &str) -> bool {
    (16..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// A short response as a whole.
async fn whole(mut response: Response) -> Result<Vec<u8>, Failure> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(Failure::of_transport)? {
        if body.len() + chunk.len() > MAX_LISTING {
            return Err(Failure::lasting(Error::new(
                ErrorKind::Io,
                "the hub's description of the repository is too long",
            )));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// Whether a response is the part that was asked for.
fn is_part(response: &Response, asked: &Range<u64>) -> Result<(), Failure> {
    let begins_at = |headers: &HeaderMap| {
        let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
        text.strip_prefix("bytes ")?.split('-').next()?.parse::<u64>().ok()
    };
    if response.status() == StatusCode::PARTIAL_CONTENT && begins_at(response.headers()) == Some(asked.start)
    {
        return Ok(());
    }
    let message = "the server does not answer requests for a part of a file; check HF_ENDPOINT and the proxy";
    Err(Failure::lasting(Error::new(ErrorKind::Io, message).with("status", response.status())))
}

/// Appends a response's body to `bytes`, which has `length` bytes at the end.
async fn append(
    mut response: Response,
    bytes: &mut Vec<u8>,
    length: usize,
    counter: &Counter,
) -> Result<(), Failure> {
    bytes.reserve_exact(length - bytes.len());
    while let Some(chunk) = response.chunk().await.map_err(Failure::of_transport)? {
        if bytes.len() + chunk.len() > length {
            return Err(Failure::lasting(Error::new(
                ErrorKind::Io,
                "the server sends more than the file has",
            )));
        }
        bytes.extend_from_slice(&chunk);
        counter.add(chunk.len() as u64);
    }
    if bytes.len() < length {
        return Err(Failure::passing(Error::new(ErrorKind::Io, "the server sends less than the file has")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etags_are_names_of_files() {
        assert_eq!(plain_etag("W/\"0123456789abcdef\""), "0123456789abcdef");
        assert!(is_etag("b6d767d2f8ed5d21a44b0e5886680cb9"));
        for bad in ["", "short", "../../../../../../etc/passwd", "0123456789abcdef/", "0123456789abcde."] {
            assert!(!is_etag(bad), "{bad:?}");
        }
    }

    #[test]
    fn addresses_keep_the_path_of_a_mirror() {
        let settings = Settings {
            cache: "/c".into(),
            endpoint: "http://127.0.0.1:1/mirror".to_owned(),
            token: None,
            offline: false,
        };
        let http = Http::new(&settings).unwrap();
        let url = http.file_url("a/b", "refs/pr/1", "x y/z.gguf");
        assert_eq!(url.as_str(), "http://127.0.0.1:1/mirror/a/b/resolve/refs%2Fpr%2F1/x%20y/z.gguf");
        for bad in ["huggingface.co", "ftp://h", ""] {
            assert!(Http::new(&Settings { endpoint: bad.to_owned(), ..settings.clone() }).is_err(), "{bad}");
        }
    }
}
