//! The answers of the API: documents, and the chunks of streams.

pub(crate) mod chat;
pub(crate) mod common;
pub(crate) mod completion;
pub(crate) mod sse;
