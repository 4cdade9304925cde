//! What a tokenizer is made of, as it lies in a model's folder: `tokenizer.json` beside two small files of facts that
//! were added over the years, and a chat template that is in one of two places.

use std::{collections::BTreeMap, path::Path};

use serde_json::{Map, Value};

use crate::{Error, ErrorKind, Result, ResultExt, file::read_capped};

/// Real files have up to 35 MB (a vocabulary of 256 thousand tokens).
const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// The names under which a template sees the special tokens.
const NAMED_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What [`Tokenizer::from_parts`](crate::text::Tokenizer::from_parts) needs. Formats without these files (GGUF) fill
/// it from their own metadata.
#[derive(Debug, Clone, Default)]
pub struct TokenizerParts {
    /// The bytes of a `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// The special tokens by their names in templates: `bos_token`, `eos_token`, `pad_token`, ...
    pub special_tokens: BTreeMap<String, String>,
    /// Whether a BOS stands before a text. `None` leaves it to the post-processor in `tokenizer_json`.
    pub add_bos_token: Option<bool>,
    /// Whether an EOS stands after a text. `None` leaves it to the post-processor in `tokenizer_json`.
    pub add_eos_token: Option<bool>,
    /// The Jinja source of the chat template.
    pub chat_template: Option<String>,
    /// How many entries the model's embedding has; token ids must be below.
    pub vocab_limit: Option<usize>,
}

impl TokenizerParts {
    /// The parts of a tokenizer without chat template or named special tokens.
    pub fn new(tokenizer_json: impl Into<Vec<u8>>) -> Self {
        Self { tokenizer_json: tokenizer_json.into(), ..Self::default() }
    }

    /// Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja` of a model
    /// folder; only the first must exist.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) without `tokenizer.json`, [`Io`](ErrorKind::Io) where a file cannot be read,
    /// [`InvalidModel`](ErrorKind::InvalidModel) where one is no regular file, too large, no
    /// JSON or has a key of the wrong type.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("tokenizer.json");
        let mut parts = Self::new(read(&path, MAX_TOKENIZER_BYTES)?);

        let config = folder.join("tokenizer_config.json");
        let mut has_added_tokens = false;
        if let Some(facts) = read_json(&config)? {
            parts.read_config(&facts).with("file", config.display())?;
            has_added_tokens = facts.contains_key("added_tokens_decoder");
        }
        // As in transformers: the map is the elder place. It counts where the config has no list of added tokens.
        let map = folder.join("special_tokens_map.json");
        if let Some(facts) = read_json(&map)? {
            for (name, token) in special_tokens(&facts).with("file", map.display())? {
                if has_added_tokens {
                    parts.special_tokens.entry(name).or_insert(token);
                } else {
                    parts.special_tokens.insert(name, token);
                }
            }
        }
        let jinja = folder.join("chat_template.jinja");
        if let Some(bytes) = optional(read(&jinja, MAX_CONFIG_BYTES))? {
            let source = String::from_utf8(bytes)
                .map_err(|e| Error::invalid_model(format!("not UTF-8: {e}")).with("file", jinja.display()))?;
            parts.chat_template = Some(source);
        }
        Ok(parts)
    }

    /// The same parts for a model whose embedding has `entries` entries.
    pub fn with_vocab_limit(mut self, entries: usize) -> Self {
        self.vocab_limit = Some(entries);
        self
    }

    fn read_config(&mut self, facts: &Map<String, Value>) -> Result<()> {
        self.special_tokens = special_tokens(facts)?;
        self.add_bos_token = flag(facts, "add_bos_token")?;
        self.add_eos_token = flag(facts, "add_eos_token")?;
        self.chat_template = match facts.get("chat_template") {
            None | Some(Value::Null) => None,
            Some(Value::String(source)) => Some(source.clone()),
            Some(Value::Array(named)) => default_template(named)?,
            Some(other) => {
                return Err(wrong_type("chat_template", other, "a string or a list of {name, template}"));
            }
        };
        Ok(())
    }
}

/// Of several templates (`tool_use`, `rag`, ...) the one that is named `default`.
fn default_template(named: &[Value]) -> Result<Option<String>> {
    for entry in named {
        match (entry.get("name").and_then(Value::as_str), entry.get("template").and_then(Value::as_str)) {
            (Some("default"), Some(source)) => return Ok(Some(source.to_owned())),
            (Some(_), Some(_)) => {}
            _ => return Err(wrong_type("chat_template[]", entry, "{name, template}, both strings")),
        }
    }
    Ok(None)
}

fn special_tokens(facts: &Map<String, Value>) -> Result<BTreeMap<String, String>> {
    let mut tokens = BTreeMap::new();
    for name in NAMED_TOKENS {
        let content = match facts.get(name) {
            None | Some(Value::Null) => continue,
            Some(Value::String(content)) => content,
            Some(other) => match other.get("content") {
                Some(Value::String(content)) => content,
                _ => return Err(wrong_type(name, other, "a string or an object with a string `content`")),
            },
        };
        tokens.insert(name.to_owned(), content.clone());
    }
    Ok(tokens)
}

fn flag(facts: &Map<String, Value>, key: &'static str) -> Result<Option<bool>> {
    match facts.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(other) => Err(wrong_type(key, other, "true or false")),
    }
}

fn wrong_type(key: &str, found: &Value, expected: &str) -> Error {
    let found = match found {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    Error::invalid_model(format!("`{key}` is {found}, expected {expected}"))
}

fn read_json(path: &Path) -> Result<Option<Map<String, Value>>> {
    let Some(bytes) = optional(read(path, MAX_CONFIG_BYTES))? else { return Ok(None) };
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(facts)) => Ok(Some(facts)),
        Ok(_) => Err(Error::invalid_model("not a JSON object").with("file", path.display())),
        Err(e) => Err(Error::invalid_model("not valid JSON").with("file", path.display()).with_source(e)),
    }
}

fn read(path: &Path, cap: u64) -> Result<Vec<u8>> {
    read_capped(path, cap, ErrorKind::InvalidModel)
}

fn optional<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}
