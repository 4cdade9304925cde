//! The engine on llama.cpp: ternary decoders of every format that Ternion reads, and any other GGUF model that
//! llama.cpp knows.
//!
//! **Ternary models** run in llama.cpp's graph with the arithmetic of `ternion-kernels`. llama.cpp has no such model: its
//! own graph computes SiLU where BitNet b1.58 2B4T needs squared ReLU, and its ternary types quantise activations in
//! blocks where BitNet takes one scale for a token. So a model is made from the checkpoint in memory (`source`), its
//! weights are placeholders that nothing ever writes to, and before a graph is computed a callback turns each product
//! of a placeholder into a custom operation on the checkpoint's own mapped weights (`hook`, `ops`), and attention into
//! one over llama.cpp's cache (`attention`). What llama.cpp keeps is the scheduling on its threads, norms, rotary
//! embedding and the KV cache. A model of one layer is computed in both ways before the first real one (`selftest`).
//!
//! **Other GGUF models** are loaded by llama.cpp, after a check in safe Rust (`preflight`), and left as they are. Where the tokenizers
//! crate has no equal of a file's tokenizer, or the file does not name the rule that splits texts, llama.cpp's own is used
//! (`vocabulary`). Models for embeddings get a context that pools
//! (`embed`).
//!
//! This stands on `llama-cpp-sys-2` rather than on `llama-cpp-2`. The latter's types hide all that this crate needs (the
//! evaluation callback, models from memory, batches of embeddings, the thread pool, why a model was refused) and its
//! context borrows the model, which an engine's thread has to own; what remained to use of it was one call of
//! `llama_backend_init`, for which its fixed feature `common` doubles the time that the C++ code takes to build. The
//! bindings are pinned to one version, since the graphs are part of what is relied on.
//!
//! llama.cpp's own code is built for CPUs with AVX2, FMA and F16C on x86-64; Ternion's kernels choose their instructions
//! at run time. `GGML_AVX512=ON` and the like in the environment of the build raise the former.
//!
//! For a prompt cache, blocks of the KV cache are taken out of llama.cpp and put back in its own form: see the module `saved`. Models
//! with a sliding window or a recurrent state cannot do that.
//!
//! A cancellation is seen between two calls of `forward`, each of which is one chunk of a prompt, so llama.cpp's abort
//! callback is not used.

mod attention;
mod backend;
mod config;
mod embed;
mod ffi;
mod gguf;
mod guard;
mod head;
mod hook;
mod log;
mod memory;
mod model;
mod ops;
mod preflight;
mod runtime;
mod saved;
mod selftest;
mod source;
mod vocabulary;

pub use backend::factory;
pub use config::{Arithmetic, KvType, LlamaCppOptions};
pub use model::{LlamaCpp, ModelOptions};
pub use ternion_head::HeadKind;

use ternion_core::registry::Registry;

/// Makes the backend `llama-cpp` known to a registry.
pub fn register(registry: &mut Registry) {
    registry.register(factory());
}
