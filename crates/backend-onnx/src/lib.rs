//! The engine for ONNX files: runs decoders through ONNX Runtime, whose native library is loaded at run time.
//!
//! Two kinds of files run. Exports in the layout of Hugging Face models, whoever made them, are driven through the names
//! and shapes that they declare (modules `layout` and `exported`). Files of the fast variant, which
//! [`convert`](ternion_formats::convert) writes, are made of operators that this crate brings along (`ops`): they
//! read ternary weights where the runtime has mapped them and attend over a paged KV cache of our own ([`kv`](ternion_engine::kv)), so that
//! several sequences are computed in one step and no past is ever copied (`fast`).
//!
//! Nothing of a file reaches the runtime before [`Summary`](ternion_formats::onnx::Summary) has looked at it.
//!
//! `unsafe` is where the native library is looked at (`library`), where weights are seen as bytes (`ops`) and where constants are
//! read into memory (`constants`).

mod attributes;
mod backend;
mod config;
mod constants;
mod exported;
mod fast;
mod grouped;
mod layout;
mod library;
mod model;
mod ops;

pub use backend::factory;
pub use config::OnnxOptions;
pub use library::{Library, MINIMUM_VERSION};
pub use model::{Decoder, DecoderOptions};
pub use ternion_head::HeadKind;

use ternion_core::registry::Registry;

/// Makes the backend `onnx` known to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(factory());
}
