//! The models of Ternion by OpenAI's HTTP API, with a page to chat on.
//!
//! [`Server`] is what `ternion serve` runs. A host that has an axum application of its own takes [`Server::router`].
//!
//! ```no_run
//! use ternion::models::Models;
//! use ternion_server::{Server, ServerOptions};
//!
//! # async fn run() -> ternion::Result<()> {
//! let models = Models::load_file("ternion.toml").await?;
//! let server = Server::new(models, ServerOptions::default())?;
//! server.serve("127.0.0.1:8080", std::future::pending()).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What it serves
//!
//! | path | what |
//! | --- | --- |
//! | `POST /v1/chat/completions`, `POST /v1/completions` | answers, whole or as server-sent events |
//! | `GET /v1/models`, `GET /v1/models/{id}` | the models of the configuration |
//! | `POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info` | tokens, in the forms of vLLM and llama.cpp |
//! | `GET /health`, `GET /ready` | whether the process is alive; whether the default model can answer |
//! | `GET /metrics` | counters and histograms for Prometheus |
//! | `GET /openapi.json` | this, for programs |
//! | `GET /` | a page to chat on |
//!
//! # Security
//!
//! * Without API keys everybody who can reach the address may use the models. [`Server::serve`] refuses an address beyond
//!   loopback without a key unless [`ServerOptions::allow_anonymous`] is set.
//! * With keys, everything but `/health`, `/ready` and the page itself takes one.
//! * A web page from elsewhere cannot use the server of its reader: requests with a foreign `Origin` are refused unless
//!   [`ServerOptions::cors_origins`] names it, and without a key so are those with a foreign `Host`.
//! * Bodies, messages and the time in which a request arrives are bounded.
#![forbid(unsafe_code)]

mod access;
mod auth;
mod choices;
mod error;
mod handlers;
mod listen;
mod metrics;
mod openapi;
mod options;
mod page;
mod reply;
mod request;
mod router;
mod state;
#[cfg(feature = "tls")]
mod tls;
mod token_text;

pub use listen::{Bound, Server};
pub use options::{ApiKeys, ServerOptions, Tls};

/// Reads the body of a request, for a fuzz target.
#[doc(hidden)]
pub fn check_request(bytes: &[u8]) {
    request::check(bytes);
}
