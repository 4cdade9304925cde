//! Preprocessing: tokenizer, token counting, chat templates, incremental detokenizing.
//!
//! All engines share this module, so a prompt has the same tokens whatever runs the model. It reads the files of a
//! Hugging Face repository and gives what transformers gives for them, with one difference: the text of messages is
//! untrusted, and special tokens written in it stay plain text (see [`Tokenizer::encode_chat`]).

mod added;
mod chat;
mod chunk;
mod class;
mod code;
mod control;
mod growth;
mod jinja;
mod library;
mod parts;
mod stop;
mod stream;
mod template;
mod token_name;
mod tokenizer;
mod vocabulary;

pub use added::AddedToken;
pub use chunk::{Chunk, ChunkKind, ChunkOptions, chunks};
pub(crate) use chunk::{boundary_after, boundary_before, is_boundary};
pub use class::{Pipeline, SpacePrefix};
pub use parts::TokenizerParts;
pub use stop::StopMatcher;
pub use stream::IncrementalDecoder;
pub use token_name::TokenName;
pub use tokenizer::Tokenizer;
pub use vocabulary::Vocabulary;
