//! Reads a checkpoint, in whatever way it lies on the disk, as one thing: a [`ModelSpec`], a tokenizer and tensors that
//! are either dense or ternary.
//!
//! [`Checkpoint::open`] is the way in. What differs between formats and families is settled here, so that an engine
//! sees [`Linear`]s and norms and never a configuration key or a tensor name; a reader of another format has to fill the same
//! [`Checkpoint`] and nothing else changes.
//!
//! Large tensors stay in the mapped file ([`SharedBytes`]). Nothing that a file says is believed before it is checked:
//! sizes are compared with the file before anything is allocated, and errors name the file, the tensor or key, what
//! was found and what was expected.
#![deny(unsafe_code)]

mod bpe;
mod bytes;
mod checkpoint;
mod config;
pub mod convert;
mod embedding;
mod generation;
pub mod gguf;
mod grouped;
mod huggingface;
mod inspect;
mod json;
mod layers;
mod locate;
mod notes;
pub mod onnx;
mod options;
mod quantized;
mod raw;
mod recognise;
mod safetensors;
mod spec;
pub mod synth;
mod tensors;
mod unfinished;
mod watch;

pub use bytes::SharedBytes;
pub use checkpoint::{Access, Checkpoint, Progress};
pub use embedding::{DenseActivation, DenseModule, DenseWeights, EmbeddingSpec};
pub use inspect::{Report, TensorReport};
pub use json::Object as JsonObject;
pub use locate::gguf_file;
pub use options::{CheckpointOptions, I2sLayout};
pub use quantized::QuantizedTensor;
pub use raw::RawCheckpoint;
pub use recognise::Recognised;
pub use spec::{Activation, Family, ModelSpec, Quantization, RopeScaling, RopeSpec, ScaleUse};
pub use tensors::{DenseTensor, DenseType, LayerTensors, Linear, RmsNorm, Table, TernaryTensor, Weights};
pub use unfinished::{Unfinished, partial_path};
pub use watch::FileWatch;
