//! What any GGUF file is, whether it can be run or not.

use std::collections::BTreeMap;

use serde::Serialize;
use ternion_core::{Error, Result};

use super::keys::{self, Keys};
use super::support::Reader;
use super::{File, Value, preflight};

/// What a GGUF file says of itself. Serialises to JSON.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Overview {
    /// `general.name`.
    pub name: Option<String>,
    /// `general.architecture`.
    pub architecture: Option<String>,
    /// The version of the container.
    pub version: u32,
    /// Files that the model lies in.
    pub files: usize,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Decoder layers.
    pub layers: Option<u64>,
    /// Width of the hidden states.
    pub hidden_size: Option<u64>,
    /// Heads of queries.
    pub heads: Option<u64>,
    /// Heads of keys and values.
    pub kv_heads: Option<u64>,
    /// Positions that the model was made for.
    pub context_length: Option<u64>,
    /// Entries of the vocabulary.
    pub vocab_size: Option<u64>,
    /// `tokenizer.ggml.model`: `gpt2` for byte-level BPE, `llama` for SentencePiece.
    pub tokenizer: Option<String>,
    /// `tokenizer.ggml.pre`.
    pub pre_tokenizer: Option<String>,
    /// Whether there is a chat template.
    pub chat_template: bool,
    /// Sums over the tensors of each element type.
    pub types: Vec<TypeOverview>,
    /// All metadata; long arrays and strings are shortened.
    pub metadata: Vec<(String, String)>,
    /// Why llama.cpp cannot run the file; `None` where nothing speaks against it.
    pub llama_cpp_error: Option<String>,
}

/// The tensors of one element type.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TypeOverview {
    /// The type's name.
    pub name: String,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of elements.
    pub parameters: u64,
    /// Bytes in the file.
    pub bytes: u64,
}

impl Overview {
    /// Looks at a file, which may have been [joined](File::joined) with its other parts.
    pub fn of(file: &File) -> Self {
        let text = |key: &str| file.string(key).ok().flatten().map(str::to_owned);
        let architecture = text(keys::ARCHITECTURE);
        let keys_of = Keys::new(architecture.as_deref().unwrap_or_default());
        // Some keys have a list with one value for each layer; the first stands for all.
        let number = |key: &str| {
            let value = file.value(&keys_of.of(key))?;
            let first = || value.as_array()?.as_integers()?.next();
            value.as_integer().or_else(first).and_then(|n| u64::try_from(n).ok())
        };
        let tokens = file.array(keys::TOKENS).ok().flatten().map(|tokens| tokens.len() as u64);
        let mut types: BTreeMap<u32, TypeOverview> = BTreeMap::new();
        for tensor in file.tensors() {
            let of_type = types.entry(tensor.kind.id()).or_insert_with(|| TypeOverview {
                name: tensor.kind.to_string(),
                tensors: 0,
                parameters: 0,
                bytes: 0,
            });
            of_type.tensors += 1;
            // Of a type that is not known, any dimensions may be said.
            let elements = tensor.dims.iter().fold(1, |product: u64, &n| product.saturating_mul(n));
            of_type.parameters = of_type.parameters.saturating_add(elements);
            of_type.bytes += tensor.bytes;
        }
        let types: Vec<TypeOverview> = types.into_values().collect();
        Self {
            name: text(keys::NAME),
            version: file.version(),
            files: file.paths().count(),
            parameters: types.iter().map(|t| t.parameters).fold(0, u64::saturating_add),
            bytes: types.iter().map(|t| t.bytes).fold(0, u64::saturating_add),
            layers: number("block_count"),
            hidden_size: number("embedding_length"),
            heads: number("attention.head_count"),
            kv_heads: number("attention.head_count_kv"),
            context_length: number("context_length"),
            vocab_size: number("vocab_size").or(tokens),
            tokenizer: text(keys::TOKENIZER),
            pre_tokenizer: text(keys::PRE_TOKENIZER),
            chat_template: file.value(keys::CHAT_TEMPLATE).is_some(),
            types,
            metadata: file.metadata().map(|(key, value)| (key.to_owned(), short(value))).collect(),
            llama_cpp_error: llama_cpp(file).err().map(|error| error.to_string()),
            architecture,
        }
    }
}

/// Why llama.cpp itself cannot run the file.
fn llama_cpp(file: &File) -> Result<()> {
    if Reader::of(file) == Reader::Checkpoint {
        return Err(Error::unsupported("the backend `llama-cpp` runs the file only where `candle` does"));
    }
    preflight(file)
}

fn short(value: &Value) -> String {
    crate::json::shorten(value)
}
