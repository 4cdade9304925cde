//! A remote model as a backend: any server that speaks OpenAI's HTTP API, such as vLLM, llama-server, SGLang or another
//! Ternion.
//!
//! ```toml
//! [models.remote]
//! backend = "openai"
//! fallback = ["local"]                     # who answers while the server is down
//!
//! [models.remote.options]
//! url = "http://gpu-1:8000/v1"
//! model = "Qwen/Qwen3-8B"                  # may be left out if the server has only one
//! api_key_env = "GPU_1_KEY"                # the variable that holds the key
//! tokenizer = "/models/qwen3-8b"           # a folder with tokenizer.json; optional
//! ```
//!
//! When it is loaded, the backend asks the server what it is (module `facts`) and tries what it can do (`probe`):
//! [`Capabilities`](ternion_core::Capabilities) say what was found, and nothing is assumed. [`OpenAiOptions`] lists all
//! options.
//!
//! # Prompts
//!
//! With a `tokenizer`, and a server that takes token ids, prompts are rendered and tokenized on this side, exactly as for a
//! local model: special tokens in the text of a message stay text, lengths are checked before anything is sent, and the text
//! of an answer is decoded here. Without one, a conversation goes to `/v1/chat/completions` and a text to
//! `/v1/completions`; the server's template then decides what special tokens in a message are.
//!
//! # Answers
//!
//! Stop strings are matched on this side, so that they mean the same on every server; the connection is closed where one
//! is complete. Token ids come from the field `token_ids` of vLLM or from log-probabilities, where the server gives ids with
//! them; where it gives none, only the text of an answer arrives. Reasoning and calls of tools that the server sends apart from
//! the content become events of their own. A server that leaves them in the text needs `tool_format` and `reasoning` in the model's
//! configuration.
//!
//! # Constraints
//!
//! A constraint goes to the server by the field of its dialect: `response_format`, `structured_outputs` or `guided_*` of vLLM,
//! `json_schema` or `grammar` of llama-server. Each kind is tried when the model is loaded, and a kind that was not enforced is
//! refused as [`Unsupported`](ternion_core::ErrorKind::Unsupported), so that a fallback goes on. The form of an answer is looked at
//! once more on this side: one that the server calls complete and that is not what was asked for ends with an error.
//!
//! # Failures
//!
//! A request is made again (module `retry`) only as long as no byte of its answer has come. What the errors of servers
//! become is in the module `failure`. Dropping a stream, or cancelling its request, closes the connection, which is how servers
//! learn of it.
#![forbid(unsafe_code)]

mod admission;
mod answer;
mod backend;
mod body;
mod calls;
mod client;
mod config;
mod constraint;
mod embed;
mod facts;
mod failure;
mod llama_schema;
mod model;
mod probe;
mod prompt;
mod retry;
mod schema;
mod score;
mod sse;
mod stream;
mod tls;
mod wire;

pub use backend::OpenAiFactory;
pub use config::{Dialect, OpenAiOptions, Rendering, RetryOptions};

use ternion_core::registry::Registry;

/// Makes the backend `openai` known to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(OpenAiFactory);
}
