//! Which model `--model` means: a checkpoint, a model of a configuration, or, where nothing is said, the first that
//! is found.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use ternion::config::{Config, ModelConfig, is_config_file};
use ternion::formats::CheckpointOptions;
use ternion::{Error, ErrorKind, ResultExt};

use crate::App;
use crate::args::{EngineArgs, ModelArgs};
#[cfg(feature = "hub")]
use crate::commands::hub::HubModel;
use crate::failure::{Failure, Outcome};

/// The small checkpoint of the source tree, for a first run without a download.
const DEFAULT_MODEL: &str = "fixtures/ternion-tiny";
const CONFIG_FILE: &str = "ternion.toml";
const EXPECTED: &str = if cfg!(feature = "hub") {
    "expected a checkpoint's folder, a .gguf or .safetensors file, an address hf://owner/name, or a configuration (.toml, .json, .yaml)"
} else {
    "expected a checkpoint's folder, a .gguf or .safetensors file, or a configuration (.toml, .json, .yaml); models of the Hugging \
     Face Hub need a build with the feature `hub`"
};

/// A configuration and the one model of it that is meant.
#[derive(Debug, Clone)]
pub(crate) struct Selected {
    /// All models, with the options of the command line applied to the one that is meant.
    pub(crate) config: Config,
    /// Its name.
    pub(crate) name: String,
    /// It is the small model of the source tree, which nobody asked for.
    pub(crate) is_default: bool,
    /// The configuration file that it comes from.
    pub(crate) file: Option<PathBuf>,
}

impl Selected {
    /// Finds the model for a command that runs it.
    pub(crate) fn for_engine(app: &App, args: &EngineArgs) -> Outcome<Self> {
        let mut selected = match (&args.backend, source(&args.model)) {
            (Some(backend), Source::Default) if backend == "echo" => Self::echo(&args.model)?,
            (_, source) => Self::open(app, &args.model, source)?,
        };
        let model = selected.model_mut()?;
        if let Some(backend) = &args.backend
            && *backend != model.backend
        {
            model.backend.clone_from(backend);
            // The others are the other engine's.
            let kept = facts(&model.options);
            model.options.clear();
            if reads_checkpoints(backend) {
                set_facts(model, &kept);
            }
        }
        set_facts(model, &args.model.facts.options());
        for (flag, value) in [("--threads", args.threads), ("--context-length", args.context)] {
            if value == Some(0) {
                return Err(Failure::usage(format!("{flag} 0 is out of range; at least 1 expected")));
            }
        }
        model.threads = args.threads.or(model.threads);
        if let Some(pinned) = &args.pin_threads {
            model.pin_threads.clone_from(pinned);
        }
        model.context_length = args.context.or(model.context_length);
        model.memory_limit = args.memory_limit.or(model.memory_limit);
        if args.no_mmap {
            model.mmap = Some(false);
        }
        Ok(selected)
    }

    /// Finds the model for a command that only reads its files.
    pub(crate) fn for_files(app: &App, args: &ModelArgs) -> Outcome<Self> {
        let mut selected = Self::open(app, args, source(args))?;
        set_facts(selected.model_mut()?, &args.facts.options());
        Ok(selected)
    }

    /// How its files are to be read.
    pub(crate) fn facts(&self) -> Outcome<CheckpointOptions> {
        Ok(facts(&self.model()?.options))
    }

    /// The model's own configuration.
    pub(crate) fn model(&self) -> Outcome<&ModelConfig> {
        Ok(self.config.model(Some(&self.name))?.1)
    }

    /// The same, to be changed.
    pub(crate) fn model_mut(&mut self) -> Outcome<&mut ModelConfig> {
        self.model()?;
        Ok(self.config.models.entry(self.name.clone()).or_default())
    }

    /// Where its files are.
    pub(crate) fn path(&self) -> Outcome<&Path> {
        self.model()?.path.as_deref().ok_or_else(|| {
            Error::invalid_config(format!("model `{}` has no `path`: it has no files to read", self.name))
                .into()
        })
    }

    fn open(app: &App, args: &ModelArgs, source: Source) -> Outcome<Self> {
        match source {
            Source::Named(path) => Self::at(app, &path, args),
            Source::Default => {
                let path = default_model().ok_or_else(|| {
                    Error::new(
                        ErrorKind::NotFound,
                        format!(
                            "no model is named and none is found at {CONFIG_FILE} or {DEFAULT_MODEL}; name one with --model"
                        ),
                    )
                })?;
                Ok(Self { is_default: true, ..Self::at(app, &path, args)? })
            }
        }
    }

    fn at(app: &App, path: &Path, args: &ModelArgs) -> Outcome<Self> {
        #[cfg(not(feature = "hub"))]
        let _ = app;
        if !path.exists() {
            #[cfg(feature = "hub")]
            if let Some(model) = HubModel::named(&path.to_string_lossy())? {
                no_name(args, path)?;
                return Ok(Self::single(model.name(), ModelConfig::for_path(model.local(app)?)));
            }
            let error = Error::new(ErrorKind::NotFound, format!("no such file or folder; {EXPECTED}"));
            return Err(error.with("path", path.display()).into());
        }
        if is_config_file(path) {
            let config = Config::load(path).map_err(|e| hint_checkpoint_config(e, path))?;
            let (name, _) = config.model(args.name.as_deref()).with("file", path.display())?;
            let name = name.to_owned();
            let selected = Self { config, name, is_default: false, file: Some(path.to_owned()) };
            #[cfg(feature = "hub")]
            let selected = selected.downloaded(app)?;
            return Ok(selected);
        }
        no_name(args, path)?;
        let name = checkpoint_name(path);
        Ok(Self::single(name, ModelConfig::for_path(path)))
    }

    /// With the files of a model of the hub on this machine.
    #[cfg(feature = "hub")]
    fn downloaded(mut self, app: &App) -> Outcome<Self> {
        let address = self.model()?.path.as_deref().map(Path::to_string_lossy).unwrap_or_default();
        if address.starts_with("hf://")
            && let Some(model) = HubModel::named(&address)?
        {
            self.model_mut()?.path = Some(model.local(app)?);
        }
        Ok(self)
    }

    fn echo(args: &ModelArgs) -> Outcome<Self> {
        match &args.name {
            Some(name) => Err(Failure::usage(format!(
                "--name {name} chooses a model of a configuration; name that too"
            ))),
            None => Ok(Self::single("echo".to_owned(), ModelConfig::default())),
        }
    }

    fn single(name: String, model: ModelConfig) -> Self {
        let mut config = Config::default();
        config.default_model = Some(name.clone());
        config.models.insert(name.clone(), model);
        Self { config, name, is_default: false, file: None }
    }
}

/// Refuses `--name` where there is no configuration to choose from.
fn no_name(args: &ModelArgs, path: &Path) -> Outcome {
    args.name.as_ref().map_or(Ok(()), |name| {
        let path = path.display();
        Err(Failure::usage(format!("--name {name} chooses a model of a configuration, and {path} is none")))
    })
}

/// Whether a backend has the options of [`CheckpointOptions`].
fn reads_checkpoints(backend: &str) -> bool {
    ["auto", "candle", "llama-cpp"].contains(&backend)
}

/// The options about reading a checkpoint. A value that is wrong is refused by the backend, which knows its name.
fn facts(options: &serde_json::Map<String, serde_json::Value>) -> CheckpointOptions {
    serde_json::from_value(serde_json::Value::Object(options.clone())).unwrap_or_default()
}

/// Sets the options that are not left out.
fn set_facts(model: &mut ModelConfig, facts: &CheckpointOptions) {
    if let Ok(serde_json::Value::Object(set)) = serde_json::to_value(facts) {
        model.options.extend(set);
    }
}

/// The folder of a checkpoint that was named by its folder or by one of its files.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if path.is_file() => {
            if parent.as_os_str().is_empty() {
                Path::new(".")
            } else {
                parent
            }
        }
        _ => path,
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Source {
    Named(PathBuf),
    Default,
}

fn source(args: &ModelArgs) -> Source {
    choose(args.model.clone(), |key| env::var_os(key), Path::new(CONFIG_FILE).is_file())
}

fn choose(flag: Option<PathBuf>, var: impl Fn(&str) -> Option<OsString>, has_config_file: bool) -> Source {
    let var = |key| var(key).filter(|value| !value.is_empty()).map(PathBuf::from);
    let file = has_config_file.then(|| PathBuf::from(CONFIG_FILE));
    flag.or_else(|| var("TERNION_MODEL"))
        .or_else(|| var("TERNION_CONFIG"))
        .or(file)
        .map_or(Source::Default, Source::Named)
}

fn default_model() -> Option<PathBuf> {
    // The tree that this program was built in; it may have moved, then the current directory is tried.
    let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(DEFAULT_MODEL);
    let found = [built_in, PathBuf::from(DEFAULT_MODEL)].into_iter().find(|path| path.is_dir())?;
    // For the messages that name it.
    Some(found.canonicalize().unwrap_or(found))
}

/// `config.json` out of a checkpoint is an easy mistake, and its unknown keys would not tell what is wrong.
fn hint_checkpoint_config(error: Error, path: &Path) -> Error {
    if path.file_name().is_some_and(|name| name == "config.json")
        && folder_of(path).join("tokenizer.json").is_file()
    {
        return Error::invalid_config("this is a checkpoint's own configuration; name its folder instead")
            .with("file", path.display());
    }
    error
}

fn checkpoint_name(path: &Path) -> String {
    // `.` and `..` have no name of their own.
    let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = if full.is_file() { full.file_stem() } else { full.file_name() };
    name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_wins_over_the_environment_and_that_over_the_folder() {
        let named = |path: &str| Source::Named(path.into());
        let none = |_: &str| None;
        let both = |key: &str| Some(OsString::from(format!("from-{key}")));
        let config = |key: &str| (key == "TERNION_CONFIG").then(|| "c.toml".into());
        let empty = |_: &str| Some(OsString::new());
        assert_eq!(choose(Some("x".into()), both, true), named("x"));
        assert_eq!(choose(None, both, true), named("from-TERNION_MODEL"));
        assert_eq!(choose(None, config, true), named("c.toml"));
        assert_eq!(choose(None, none, true), named(CONFIG_FILE));
        assert_eq!(choose(None, empty, false), Source::Default);
    }

    #[test]
    fn a_file_belongs_to_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        std::fs::write(&path, "").unwrap();
        assert_eq!(folder_of(&path), folder.path());
        assert_eq!(folder_of(folder.path()), folder.path());
    }

    #[test]
    fn a_checkpoint_is_named_after_its_folder_or_file() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("some-model");
        std::fs::create_dir(&inner).unwrap();
        assert_eq!(checkpoint_name(&inner), "some-model");
        assert_eq!(checkpoint_name(&inner.join(".")), "some-model");
        let file = inner.join("weights.safetensors");
        std::fs::write(&file, "").unwrap();
        assert_eq!(checkpoint_name(&file), "weights");
    }
}
