//! The embedded engine: runs ternary decoders on candle tensors, in pure Rust, from checkpoints in safetensors and GGUF.
//!
//! candle carries the hidden states. What happens to them in the layers is one custom operation (`layer`), since candle has
//! none for the W1.58A8 products (`ops`), which read the packed weights where they lie in the mapped file, nor for attention
//! over a paged KV cache ([`kv`](ternion_engine::kv)), which neither copies itself on append nor repeats the key/value heads; and since
//! tensors between these would be allocated some three hundred times for each token. All the arithmetic is in `ternion-kernels`.
//!
//! Weights lie in the mapped file. Under a `memory_limit` the sizes that keep it are planned before anything is allocated
//! (`plan`), and weights that do not fit are read from the disk for each step (`residency`, `stream`), with the same results.
//!
//! Hidden states are f32 throughout: squared ReLU passes the range of f16, and the answers are held to those of
//! transformers in f32.
#![forbid(unsafe_code)]

mod backend;
mod config;
#[cfg(feature = "dense")]
mod dense;
mod embed;
mod head;
mod layer;
mod model;
mod ops;
mod plan;
mod projection;
mod residency;
mod stream;

pub use backend::factory;
pub use config::{CandleOptions, HeadPrecision};
pub use model::{Decoder, DecoderOptions};
pub use ternion_engine::kv::KvType;

use std::path::Path;

use ternion_core::{Error, registry::Registry};
use ternion_formats::{RawCheckpoint, gguf::File, gguf_file};

/// Makes the backend `candle` known to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(factory());
}

/// Names the feature `dense` in an error about a model that it would run.
fn with_feature(error: Error, path: &Path) -> Error {
    const FAMILIES: [&str; 7] = ["qwen2", "gemma2", "gemma3", "gemma3_text", "phi3", "llama", "qwen3"];
    if cfg!(feature = "dense") {
        return error;
    }
    let file = gguf_file(path).ok().flatten().and_then(|file| File::open(file).ok());
    let architecture = match file {
        Some(file) => file.architecture().ok().map(str::to_owned),
        None => RawCheckpoint::architecture_at(path).ok().flatten(),
    };
    match architecture {
        Some(name) if FAMILIES.contains(&&*name) => error.with("runs with", "the cargo feature `dense`"),
        _ => error,
    }
}
