//! Configuration: which models a host has, which backend runs each, and the sizes that the host sets.
//!
//! A file in TOML, JSON or YAML is read into one [`Config`]; values of the environment override it. Whatever the file
//! says that does not exist or has the wrong type is an error that names the place: a setting that is silently ignored
//! costs a host more than one that is refused.
//!
//! ```toml
//! default_model = "bitnet"
//!
//! [models.bitnet]
//! backend = "candle"                   # left out: the one that suits the files
//! path = "models/bitnet-b1.58-2B-4T"   # relative to this file
//! context_length = 4096
//!
//! fallback = ["small"]                 # who answers where it fails
//!
//! [models.bitnet.sampling]
//! temperature = 0.7
//!
//! [models.bitnet.layers]
//! metrics = true
//! timeout.first_token_ms = 10000
//!
//! [models.small]
//! path = "models/small"
//!
//! [reload]
//! mode = "unload_then_load"                       # there is no memory for two models at a time
//! ```

mod env;
mod fallback;
mod host;
mod parse;
mod pin;
mod prompt_cache;
mod size;
mod unique;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt::Write as _,
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use pin::PinThreads;
pub use size::ByteSize;

use crate::{
    Error, ErrorKind, Result, ResultExt, Sampling,
    answer::{Reasoning, ToolFormat},
    context::ContextPolicy,
    file::read_capped,
    text::TokenName,
    validate,
};

pub use host::{LayersConfig, LimitConfig, ReloadConfig, ReloadMode, RetryConfig, TimeoutConfig};
pub use prompt_cache::PromptCacheConfig;

/// The `backend` of a model for which the backend is chosen by what its files are, among those that are compiled in.
pub const AUTO: &str = "auto";

/// No configuration is larger than this, and a file that is was named by mistake.
const MAX_BYTES: u64 = 1 << 20;

/// The models of a host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Config {
    /// The model that is meant where none is named. May be left out if there is only one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_model: Option<String>,
    /// The most tokens of an answer where neither the request nor its model says, at least 1. Left out: until the model
    /// ends or the context is full.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_tokens: Option<usize>,
    /// The models by the names that the host calls them.
    pub models: BTreeMap<String, ModelConfig>,
    /// How a model takes the place of another while the host runs.
    pub reload: ReloadConfig,
}

/// One model: where it is, what runs it, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The backend that runs it, such as `candle`. `auto`: the one that suits its files best.
    pub backend: String,
    /// The checkpoint's folder or file, or its address on the Hugging Face Hub (`hf://owner/name[@revision][/file-or-folder]`). A
    /// relative path is relative to the configuration file's folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Threads that compute, at least 1. Left out: one for each physical core.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub threads: Option<usize>,
    /// Whether each of them stays on a CPU of its own, on Linux and Android. `true`: on a physical core among those that the process
    /// may use. A text such as `"0-15"`: on these CPUs, and as many threads as there are CPUs unless `threads` says fewer; weights
    /// that are read into memory then lie on their NUMA node. Left out: `false`, the system moves threads as it likes.
    #[serde(skip_serializing_if = "PinThreads::is_no")]
    pub pin_threads: PinThreads,
    /// Tokens that prompt and answer may have together, at least 2. Left out: as many as the model was made for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 2))]
    pub context_length: Option<usize>,
    /// The most tokens of an answer where a request does not say, at least 1. Left out: the configuration's own
    /// `max_tokens`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_tokens: Option<usize>,
    /// Requests that are worked on at the same time, at least 1. Left out: 4; on `llama-cpp`, which allocates the KV cache of all
    /// of them at once, 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_sequences: Option<usize>,
    /// Requests that may wait beyond those. Left out: 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_queued: Option<usize>,
    /// Milliseconds that nobody may read an answer while it waits for its reader. After that, if the queue is full, it ends with
    /// an error and another request has its place. Left out: 30000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stall_limit_ms: Option<u64>,
    /// The most prompt tokens that are computed in one step, at least 1: more is faster, fewer let a cancellation and
    /// other requests through sooner. Left out: 128, or 256 where `candle` uses AMX.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub prefill_chunk: Option<usize>,
    /// The most memory that the process may take with this model: a number of bytes, or a text such as `400MB` or `1GiB`.
    /// What is left out here is then chosen so that it is kept, and what cannot be kept is refused when the model is
    /// loaded. Left out: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<ByteSize>,
    /// Whether weights are used where they lie in their files, which the system maps into memory. `false` reads them into
    /// memory instead: loading takes longer, the memory is not shared with other processes, and files may be written over
    /// while the model runs. Left out: `true`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mmap: Option<bool>,
    /// Where the KV cache of prompts is kept, so that it is there after a restart. Left out: nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_cache: Option<PromptCacheConfig>,
    /// Whether answers that repeat parts of their prompts are drafted from them, which is faster and changes no token. Engines that
    /// could not keep the tokens the same never do so. Left out: `true`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_lookup: Option<bool>,
    /// What is done with prompts that do not fit into the context, unless a request says otherwise. Left out: they are refused.
    pub context_policy: ContextPolicy,
    /// Models of this configuration that answer, in this order, where this one cannot be loaded or fails. A mistake in a request or
    /// in the configuration is told instead: a remote server that refuses the key is such a mistake, unless
    /// `options.fall_back_when_denied` of the backend `openai` says otherwise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fallback: Vec<String>,
    /// What is done around each request to it.
    pub layers: LayersConfig,
    /// The tokens that end an answer, by id or by text as in `["<|im_end|>"]`, in place of those that the model's files name. An
    /// empty list: none. Left out: those of the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_tokens: Option<Vec<TokenName>>,
    /// How the model writes calls of tools. Left out: as its chat template has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_format: Option<ToolFormat>,
    /// The tags around the model's thoughts, as in `{ start = "<think>", end = "</think>" }`; `false`: there are none. Left out: as
    /// its chat template has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<Reasoning>,
    /// What applies where a request leaves its sampling open, before the model's own defaults.
    pub sampling: Sampling,
    /// What only this backend knows. Its documentation says what there is.
    pub options: serde_json::Map<String, serde_json::Value>,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            backend: AUTO.to_owned(),
            path: None,
            threads: None,
            pin_threads: PinThreads::No,
            context_length: None,
            max_tokens: None,
            max_sequences: None,
            max_queued: None,
            stall_limit_ms: None,
            prefill_chunk: None,
            memory_limit: None,
            mmap: None,
            prompt_cache: None,
            prompt_lookup: None,
            context_policy: ContextPolicy::default(),
            fallback: Vec::new(),
            layers: LayersConfig::default(),
            end_tokens: None,
            tool_format: None,
            reasoning: None,
            sampling: Sampling::default(),
            options: serde_json::Map::new(),
        }
    }
}

/// A format of configuration files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// `.toml`
    Toml,
    /// `.json`
    Json,
    /// `.yaml` or `.yml`
    Yaml,
}

impl Format {
    /// The format that a path's extension stands for.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] for any other extension.
    pub fn of_path(path: &Path) -> Result<Self> {
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        match extension.as_deref() {
            Some("toml") => Ok(Self::Toml),
            Some("json") => Ok(Self::Json),
            Some("yaml" | "yml") => Ok(Self::Yaml),
            _ => Err(Error::invalid_config("a configuration file ends in .toml, .json, .yaml or .yml")
                .with("path", path.display())),
        }
    }
}

/// Whether a path that may name a configuration or a checkpoint names a configuration: a file that ends in .toml, .json,
/// .yaml or .yml. `model.safetensors.index.json` is a checkpoint's.
pub fn is_config_file(path: &Path) -> bool {
    let is_index =
        path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(".safetensors.index.json"));
    !is_index && path.is_file() && Format::of_path(path).is_ok()
}

impl Config {
    /// Reads a file, lets the environment override it, and makes the models' paths relative to the file's folder.
    ///
    /// `TERNION_DEFAULT_MODEL` names the default model. `TERNION_RELOAD__<KEY>` sets a key of the table `reload`, and
    /// `TERNION_MODELS__<NAME>__<KEY>` a key of a model, such as `TERNION_MODELS__BITNET__THREADS=2`; a further `__<KEY>`
    /// goes into a table (`...__SAMPLING__TOP_K=40`). Names are compared without case, and in the name of a model all
    /// characters but letters and digits are `_`. A path that the environment gives is relative to the working directory.
    ///
    /// Every variable `TERNION_...` with a double underscore belongs to the configuration, and one that names no key is
    /// refused, as is one that spells a key with single underscores. Empty variables are ignored, and so are all others,
    /// such as those that Kubernetes sets for a service called `ternion`.
    ///
    /// The models' paths are absolute afterwards, so that they stay what they are if the process changes its working
    /// directory.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::Io`] if it cannot be read, [`ErrorKind::InvalidConfig`] if it
    /// is no regular file, or naming the place if it is not valid.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Self::load_with_env(path, std::env::vars_os())
    }

    /// [`load`](Self::load) with these variables in place of the process's environment.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_with_env(
        path: impl AsRef<Path>,
        variables: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self> {
        let path = path.as_ref();
        let load = || -> Result<Self> {
            let format = Format::of_path(path)?;
            let text = String::from_utf8(read_capped(path, MAX_BYTES, ErrorKind::InvalidConfig)?)
                .map_err(|e| not_utf8(&e))?;
            let mut value = parse::to_value(&text, format)?;
            let overrides = env::apply(&mut value, variables)?;
            let mut config = Self::from_value(value).map_err(|e| overrides.blame(e))?;
            // A folder whose name is not UTF-8 can be joined only here: before, the paths are text.
            let folder = path.parent().unwrap_or(Path::new(""));
            for (name, model) in &mut config.models {
                if !overrides.has(&format!("models.{name}.path")) {
                    model.make_path_relative_to(folder);
                }
                if let Some(cache) = &mut model.prompt_cache
                    && !overrides.has(&format!("models.{name}.prompt_cache.path"))
                {
                    cache.path = folder.join(&cache.path);
                }
            }
            config.make_paths_absolute();
            Ok(config)
        };
        load().with("path", path.display()).with_operation("configuration")
    }

    /// Makes relative paths of models absolute, by the working directory of the process. Addresses such as `hf://...` stay
    /// as they are.
    pub fn make_paths_absolute(&mut self) {
        for path in self.models.values_mut().flat_map(ModelConfig::paths_mut) {
            if !is_address(path)
                && let Ok(absolute) = std::path::absolute(&*path)
            {
                *path = absolute;
            }
        }
    }

    /// Reads a text, without the environment.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] naming the place.
    pub fn from_str(text: &str, format: Format) -> Result<Self> {
        parse::to_value(text, format).and_then(Self::from_value).with_operation("configuration")
    }

    /// A configuration of one model.
    pub fn single(name: impl Into<String>, model: ModelConfig) -> Self {
        Self { models: BTreeMap::from([(name.into(), model)]), ..Self::default() }
    }

    /// The JSON schema of a configuration file, for editors and for checks before a roll-out.
    pub fn schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }

    /// The model called `name`, or the default one.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if there is no such model, or no default.
    pub fn model(&self, name: Option<&str>) -> Result<(&str, &ModelConfig)> {
        let Some(name) = name.or(self.default_model.as_deref()) else {
            let mut models = self.models.iter();
            return match (models.next(), models.next()) {
                (Some((name, model)), None) => Ok((name, model)),
                (None, _) => {
                    Err(Error::invalid_config("no model is configured; expected a table `models.<name>`"))
                }
                _ => Err(Error::invalid_config(format!(
                    "none of the models is the default; set `default_model` to one of: {}",
                    self.names()
                ))),
            };
        };
        self.models.get_key_value(name).map(|(name, model)| (name.as_str(), model)).ok_or_else(|| {
            let mut message = format!("no model `{name}`; configured: {}", self.names());
            suggest(&mut message, name, self.models.keys().map(String::as_str));
            Error::invalid_config(message)
        })
    }

    /// A model of this configuration with the host-wide defaults in the place of what it leaves out.
    pub fn with_defaults(&self, model: &ModelConfig) -> ModelConfig {
        let mut model = model.clone();
        model.max_tokens = model.max_tokens.or(self.max_tokens);
        model
    }

    /// Checks the ranges of all values and that the default model exists.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] naming the key, what was found and what is allowed.
    pub fn validate(&self) -> Result<()> {
        if self.models.contains_key("") {
            return Err(Error::invalid_config("models: a model's name is empty"));
        }
        if let Some(name) = &self.default_model {
            self.model(Some(name))
                .map_err(|e| Error::invalid_config(format!("default_model: {}", e.message())))?;
        }
        if self.max_tokens == Some(0) {
            return Err(Error::invalid_config("max_tokens: 0 is out of range; at least 1 expected"));
        }
        self.reload.validate()?;
        fallback::validate(&self.models)?;
        self.models.iter().try_for_each(|(name, model)| model.validate(name))
    }

    fn from_value(mut value: serde_json::Value) -> Result<Self> {
        rename_old_keys(&mut value);
        let config: Self = parse::strict(value, "")?;
        config.validate()?;
        Ok(config)
    }

    fn names(&self) -> String {
        self.models.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
    }
}

impl ModelConfig {
    /// The checkpoint in a folder or file, with the default backend and sizes.
    pub fn for_path(path: impl Into<PathBuf>) -> Self {
        Self { path: Some(path.into()), ..Self::default() }
    }

    /// All paths of the model.
    fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        self.path.iter_mut().chain(self.prompt_cache.as_mut().map(|cache| &mut cache.path))
    }

    fn make_path_relative_to(&mut self, folder: &Path) {
        if let Some(path) = self.path.as_mut().filter(|path| !is_address(path)) {
            *path = folder.join(&*path);
        }
    }

    /// The table `options` as the backend's own type.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] naming a key that does not exist, with the nearest one that does, or that has a
    /// wrong value.
    pub fn parse_options<T: DeserializeOwned + JsonSchema>(&self) -> Result<T> {
        parse::strict(serde_json::Value::Object(self.options.clone()), "options")
    }

    /// Checks the ranges of all values but `options`; `name` is what the model is called.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] naming the key, what was found and what is allowed.
    pub fn validate(&self, name: &str) -> Result<()> {
        let ranges = [
            ("threads", self.threads, 1, 1024),
            ("context_length", self.context_length, 2, usize::MAX),
            ("max_tokens", self.max_tokens, 1, usize::MAX),
            ("max_sequences", self.max_sequences, 1, usize::MAX),
            ("prefill_chunk", self.prefill_chunk, 1, usize::MAX),
        ];
        for (key, value, least, most) in ranges {
            if let Some(value) = value.filter(|v| !(least..=most).contains(v)) {
                let mut allowed = format!("at least {least}");
                if most < usize::MAX {
                    let _ = write!(allowed, " and at most {most}");
                }
                return Err(Error::invalid_config(format!(
                    "models.{name}.{key}: {value} is out of range; {allowed} expected"
                )));
            }
        }
        if let Some(cache) = &self.prompt_cache {
            let refused =
                |what: &str| Err(Error::invalid_config(format!("models.{name}.prompt_cache{what}")));
            if cache.path.as_os_str().is_empty() {
                return refused(".path: is empty; a folder expected");
            }
        }
        self.context_policy
            .validate()
            .map_err(|e| Error::invalid_config(format!("models.{name}.context_policy.{}", e.message())))?;
        self.layers.validate(&format!("models.{name}.layers"))?;
        // Token ids can only be checked when the vocabulary is known, at load.
        validate::sampling(&self.sampling, usize::MAX).map_err(|e| {
            Error::new(ErrorKind::InvalidConfig, format!("models.{name}.sampling.{}", e.message()))
        })
    }
}

/// Gives keys of the first edition their new names.
fn rename_old_keys(value: &mut serde_json::Value) {
    let models = value.get_mut("models").and_then(serde_json::Value::as_object_mut);
    for model in models.into_iter().flat_map(serde_json::Map::values_mut) {
        if let Some(model) = model.as_object_mut()
            && !model.contains_key("context_length")
            && let Some(length) = model.remove("context")
        {
            model.insert("context_length".to_owned(), length);
        }
    }
}

fn not_utf8(error: &std::string::FromUtf8Error) -> Error {
    let utf16 = error.as_bytes().starts_with(&[0xff, 0xfe]) || error.as_bytes().starts_with(&[0xfe, 0xff]);
    let encoding = if utf16 { ", it looks like UTF-16; save it as UTF-8" } else { "" };
    Error::invalid_config(format!("not UTF-8{encoding}: {error}"))
}

/// Whether a path is an address with a scheme, such as `hf://`.
fn is_address(path: &Path) -> bool {
    path.to_str().is_some_and(|text| text.contains("://"))
}

/// Adds the nearest of `known` to a message, if one is near enough to be meant.
pub(crate) fn suggest<'a>(message: &mut String, found: &str, known: impl Iterator<Item = &'a str>) {
    let nearest = known
        .map(|k| (strsim::damerau_levenshtein(&k.to_ascii_lowercase(), &found.to_ascii_lowercase()), k))
        .min()
        .filter(|(distance, k)| *distance <= 1.max(k.chars().count() / 3));
    if let Some((_, nearest)) = nearest {
        let _ = write!(message, "; did you mean `{nearest}`?");
    }
}
