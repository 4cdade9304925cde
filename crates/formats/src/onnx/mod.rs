//! ONNX: writing a checkpoint as a graph, and reading what a graph of anyone's needs before a runtime may see it.
//!
//! [`convert`](crate::convert) writes one of two variants. The *portable* one uses the operators of the ONNX standard and of ONNX Runtime
//! (`com.microsoft`) alone and has the inputs and outputs that exports of Hugging Face models have. The *fast* one is made
//! of a few operators of our own ([`fast`]), which `ternion-backend-onnx` brings along. Both compute W1.58A8 exactly.
//!
//! [`convert::open`](crate::convert::open) reads both variants, and exports whose products are `MatMulNBits` with two bits, as checkpoints.
//!
//! [`Summary`] reads any file, trusting none of its bytes: external data that leaves the folder or repository, tensors that are not what
//! their shapes say, and malformed messages are errors.

mod bits;
mod check;
mod element;
mod export;
pub mod fast;
mod find;
mod genai;
mod graph;
mod host;
mod import;
mod portable;
mod proto;
mod summary;
mod wire;

pub use element::Element;
pub(crate) use export::{Head, Options, Variant, write};
pub use genai::Names;
pub use host::Host;
pub use import::fast_head;
pub(crate) use import::open;
pub use summary::{Attribute, Initializer, Node, Size, Summary, Value};

/// Where tensors begin in the data file: a page, so that a runtime can map them.
const ALIGNMENT: u64 = 4096;
