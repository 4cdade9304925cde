//! GGUF, the format of llama.cpp: its container, read and written, and the ternary checkpoints in it.
//!
//! [`File`] reads any GGUF file, whatever model it holds, and believes none of its numbers before they are checked;
//! [`preflight()`] checks on top of that what llama.cpp only asserts. [`Writer`] writes one.
//!
//! Layout: `GGUF`, version, number of tensors, number of metadata pairs; the pairs; the table of tensors; padding; the
//! data of the tensors in the table's order, each at a multiple of the alignment. All numbers are little-endian.

mod dense;
mod file;
mod foreign;
pub(crate) mod grouped;
pub(crate) mod keys;
mod kquants;
mod layout;
mod open;
mod overview;
mod parts;
mod pre_tokenizer;
mod preflight;
mod projections;
pub(crate) mod rows;
mod signs;
mod spec;
mod special;
mod support;
pub(crate) mod ternary;
mod tokenizer;
mod types;
mod value;
mod vocabulary;
mod write;

pub use dense::{decode, encode, is_dense};
pub use file::{File, TensorInfo};
pub use foreign::Foreign;
pub(crate) use open::{open, recognise};
pub use overview::{Overview, TypeOverview};
pub(crate) use pre_tokenizer::PreTokenizer;
pub use preflight::{preflight, preflight_tokenizer};
pub use spec::{refuse_transformed, sampling_defaults};
pub use special::end_tokens;
pub use support::Reader;
pub(crate) use support::is_model;
pub use tokenizer::{chat_template, splits_by_default, tokenizer_parts};
pub(crate) use tokenizer::{names_rule, tokenizer_parts_as};
pub use types::{I2S_GROUP, I2S_TRAILER, TensorType};
pub use value::{Array, Value, ValueType};
pub(crate) use vocabulary::token_type;
pub use write::{DataWriter, Writer};
