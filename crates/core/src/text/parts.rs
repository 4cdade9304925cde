//! What a tokenizer is made of, as it lies in a model's folder: `tokenizer.json`, side files that name tokens, and chat
//! templates in one of several places.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use serde_json::{Map, Value};

use super::added::{AddedToken, named_tokens};
use super::{Vocabulary, class::Pipeline};
use crate::file::{bytes_without_bom, read_capped};
use crate::{Error, ErrorKind, Result, ResultExt};

/// Real files have up to 35 MB (a vocabulary of 256 thousand tokens).
const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Templates in the folder `additional_chat_templates`. Real ones have up to three.
const MAX_TEMPLATES: usize = 64;

/// What [`Tokenizer::from_parts`](crate::text::Tokenizer::from_parts) needs. Formats without these files (GGUF) fill
/// it from their own metadata.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct TokenizerParts {
    /// The bytes of a `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// An engine's own vocabulary, in place of a `tokenizer.json`.
    pub vocabulary: Option<Arc<dyn Vocabulary>>,
    /// The steps around the tokenizer's model.
    pub pipeline: Pipeline,
    /// The special tokens by their names in templates: `bos_token`, `eos_token`, `pad_token`, ...
    pub special_tokens: BTreeMap<String, String>,
    /// Tokens that are added to those of `tokenizer_json`, in this order.
    pub added_tokens: Vec<AddedToken>,
    /// Special tokens are text in prompts too.
    pub split_special_tokens: bool,
    /// Whether a BOS stands before a text. `None` leaves it to the post-processor in `tokenizer_json`.
    pub add_bos_token: Option<bool>,
    /// Whether an EOS stands after a text. `None` leaves it to the post-processor in `tokenizer_json`.
    pub add_eos_token: Option<bool>,
    /// The id of the BOS, in place of the one that `special_tokens` names.
    pub bos_id: Option<u32>,
    /// The Jinja source of the chat template.
    pub chat_template: Option<String>,
    /// What is doubtful about these parts, one sentence each, for the log and for people who inspect a model.
    pub warnings: Vec<String>,
    /// How many entries the model's embedding has; token ids must be below.
    pub vocab_limit: Option<usize>,
}

impl TokenizerParts {
    /// The parts of a tokenizer without chat template or named special tokens.
    pub fn new(tokenizer_json: impl Into<Vec<u8>>) -> Self {
        Self { tokenizer_json: tokenizer_json.into(), ..Self::default() }
    }

    /// The parts of a tokenizer that an engine has itself. `added` are the tokens that are looked for in a text before the
    /// vocabulary sees it; each states its id.
    pub fn from_vocabulary(vocabulary: Arc<dyn Vocabulary>, added: Vec<AddedToken>) -> Self {
        Self { vocabulary: Some(vocabulary), added_tokens: added, ..Self::default() }
    }

    /// Reads the tokenizer of a model folder as transformers does. Only `tokenizer.json` must exist. Beside it may be
    /// `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`, `chat_template.jinja`,
    /// `chat_template.json` and the folder `additional_chat_templates`.
    ///
    /// `add_bos_token` and `add_eos_token` of the configuration do nothing where there is a `tokenizer.json`, whose
    /// post-processor decides: so in transformers 5 for all classes. Version 4 obeys them for `LlamaTokenizer` and some
    /// other classes.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) without `tokenizer.json`, [`Io`](ErrorKind::Io) where a file cannot be read,
    /// [`InvalidModel`](ErrorKind::InvalidModel) where one is no regular file, too large, no
    /// JSON or has a key of the wrong type.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let mut parts =
            Self::new(bytes_without_bom(read(&folder.join("tokenizer.json"), MAX_TOKENIZER_BYTES)?));
        let path = folder.join("tokenizer_config.json");
        let config = read_json(&path)?.unwrap_or_default();
        let map = read_json(&folder.join("special_tokens_map.json"))?;
        let added = read_json(&folder.join("added_tokens.json"))?;
        let named = named_tokens(&config, map.as_ref(), added.as_ref()).with("folder", folder.display())?;
        (parts.special_tokens, parts.added_tokens) = (named.roles, named.added);
        parts.pipeline = Pipeline::of(&config);
        parts.split_special_tokens =
            flag(&config, "split_special_tokens").with("file", path.display())?.unwrap_or(false);
        parts.chat_template = parts.template(folder, &config)?;
        Ok(parts)
    }

    /// The same parts with this chat template.
    pub fn with_chat_template(mut self, source: impl Into<String>) -> Self {
        self.chat_template = Some(source.into());
        self
    }

    /// The same parts with these special tokens, by their names in templates.
    pub fn with_special_tokens(mut self, tokens: BTreeMap<String, String>) -> Self {
        self.special_tokens = tokens;
        self
    }

    /// The same parts for a model whose embedding has `entries` entries.
    pub fn with_vocab_limit(mut self, entries: usize) -> Self {
        self.vocab_limit = Some(entries);
        self
    }

    /// The chat template of a folder. Files of its own win over the entry of the configuration.
    fn template(&mut self, folder: &Path, config: &Map<String, Value>) -> Result<Option<String>> {
        let mut named = BTreeMap::new();
        if let Some(source) = read_text(&folder.join("chat_template.jinja"))? {
            named.insert("default".to_owned(), source);
        }
        for (name, path) in additional_templates(&folder.join("additional_chat_templates"))? {
            named.extend(read_text(&path)?.map(|source| (name, source)));
        }
        if named.is_empty() {
            let path = folder.join("tokenizer_config.json");
            named = templates(config).with("file", path.display())?;
        }
        if named.is_empty() {
            // Written for models that also take pictures; transformers reads it with their processors.
            let path = folder.join("chat_template.json");
            if let Some(facts) = read_json(&path)? {
                named = templates(&facts).with("file", path.display())?;
            }
        }
        let default = named.remove("default");
        if default.is_none() && !named.is_empty() {
            let names: Vec<&str> = named.keys().map(String::as_str).collect();
            self.warnings.push(format!(
                "there are chat templates, but none is named `default`, so none is used: {}",
                names.join(", ")
            ));
        }
        Ok(default)
    }
}

/// The templates of the key `chat_template`, by their names.
fn templates(facts: &Map<String, Value>) -> Result<BTreeMap<String, String>> {
    let key = "chat_template";
    let named = |name: &Value, template: &Value| match (name.as_str(), template.as_str()) {
        (Some(name), Some(source)) => Some((name.to_owned(), source.to_owned())),
        _ => None,
    };
    match facts.get(key) {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(Value::String(source)) => Ok([("default".to_owned(), source.clone())].into()),
        Some(Value::Array(list)) => list
            .iter()
            .map(|entry| {
                named(&entry["name"], &entry["template"])
                    .ok_or_else(|| wrong_type("chat_template[]", entry, "{name, template}, both strings"))
            })
            .collect(),
        Some(Value::Object(list)) => list
            .iter()
            .map(|(name, source)| {
                named(&name.as_str().into(), source)
                    .ok_or_else(|| wrong_type(&format!("{key}.{name}"), source, "a string"))
            })
            .collect(),
        Some(other) => Err(wrong_type(key, other, "a string or a list of {name, template}")),
    }
}

/// The files of the folder for further templates, by the names of the templates.
fn additional_templates(folder: &Path) -> Result<BTreeMap<String, std::path::PathBuf>> {
    if !folder.is_dir() {
        return Ok(BTreeMap::new());
    }
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        let name =
            path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".jinja"));
        let Some(name) = name else { continue };
        found.insert(name.to_owned(), path);
        if found.len() > MAX_TEMPLATES {
            return Err(Error::invalid_model(format!("the folder has more than {MAX_TEMPLATES} templates"))
                .with("folder", folder.display()));
        }
    }
    Ok(found)
}

fn flag(facts: &Map<String, Value>, key: &'static str) -> Result<Option<bool>> {
    match facts.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(other) => Err(wrong_type(key, other, "true or false")),
    }
}

pub(super) fn wrong_type(key: &str, found: &Value, expected: &str) -> Error {
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
    let Some(bytes) = optional(read(path, MAX_CONFIG_BYTES))?.map(bytes_without_bom) else { return Ok(None) };
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(facts)) => Ok(Some(facts)),
        Ok(_) => Err(Error::invalid_model("not a JSON object").with("file", path.display())),
        Err(e) => Err(Error::invalid_model("not valid JSON").with("file", path.display()).with_source(e)),
    }
}

fn read_text(path: &Path) -> Result<Option<String>> {
    let Some(bytes) = optional(read(path, MAX_CONFIG_BYTES))? else { return Ok(None) };
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|e| Error::invalid_model(format!("not UTF-8: {e}")).with("file", path.display()))
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
