//! Loading models, and what can be asked of one.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use pyo3::prelude::*;
use serde_json::{Map, Value};
use ternion::{
    Error, LlmBackend, Result, ResultExt, ScoreRequest,
    config::{Config, Format, ModelConfig, is_config_file},
};

use crate::{
    convert,
    errors::{self, Process, exception},
    operation::Operation,
    stream::Stream,
    tokenizer::Tokenizer,
};

/// A loaded model.
#[pyclass(frozen, module = "ternion._native")]
pub(crate) struct Model {
    backend: RwLock<Option<Arc<dyn LlmBackend>>>,
    process: Process,
}

impl Model {
    fn backend(&self, py: Python<'_>) -> PyResult<Arc<dyn LlmBackend>> {
        self.process.check(py)?;
        let backend = self.backend.read().unwrap_or_else(PoisonError::into_inner).clone();
        backend.ok_or_else(|| exception(py, &errors::closed()))
    }
}

/// Loads the model called `name` of a configuration, or the checkpoint at `path`. `settings` are keys of the model's
/// configuration and win over what the file says.
#[pyfunction]
pub(crate) fn load(path: PathBuf, name: Option<String>, settings: &Bound<'_, PyAny>) -> PyResult<Operation> {
    let settings: Map<String, Value> = convert::from_python(settings)?;
    let load = async move {
        let config = tokio::task::spawn_blocking(move || configuration(&path, name, settings))
            .await
            .unwrap_or_else(|e| Err(Error::backend("reading the configuration panicked").with_source(e)))?;
        ternion::load(&config, None).await
    };
    Ok(Operation::new(load, |py, backend| {
        let model = Model { backend: RwLock::new(Some(backend)), process: Process::current() };
        Ok(Py::new(py, model)?.into_any())
    }))
}

/// A configuration whose default model is the one that is meant.
fn configuration(path: &Path, name: Option<String>, settings: Map<String, Value>) -> Result<Config> {
    let mut config = if is_config_file(path) {
        Config::load(path)?
    } else if name.is_some() {
        let message = "a name chooses a model of a configuration (.toml, .json, .yaml), and this is none";
        return Err(Error::invalid_config(message).with("path", path.display()).with_operation("load"));
    } else {
        Config::single(checkpoint_name(path), ModelConfig::for_path(path))
    };
    let name = config.model(name.as_deref()).with_operation("load")?.0.to_owned();
    if !settings.is_empty() {
        config = with_settings(&config, &name, settings)?;
    }
    config.default_model = Some(name);
    Ok(config)
}

fn with_settings(config: &Config, name: &str, settings: Map<String, Value>) -> Result<Config> {
    let unwritable = |e| Error::invalid_config("the configuration cannot be written as JSON").with_source(e);
    let mut json = serde_json::to_value(config).map_err(unwritable)?;
    drop_nulls(&mut json);
    if let Some(model) = json["models"][name].as_object_mut() {
        model.extend(settings);
    }
    Config::from_str(&json.to_string(), Format::Json)
}

/// What is left out is written as `null`, which the configuration does not read.
fn drop_nulls(json: &mut Value) {
    if let Value::Object(object) = json {
        object.retain(|_, value| !value.is_null());
        object.values_mut().for_each(drop_nulls);
    }
}

fn checkpoint_name(path: &Path) -> String {
    let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = if full.is_file() { full.file_stem() } else { full.file_name() };
    name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

#[pymethods]
impl Model {
    /// What the model is and can do.
    fn info(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        convert::to_python(py, &*self.backend(py)?.info())
    }

    /// What the model is doing, and what it has done.
    fn stats(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        convert::to_python(py, &self.backend(py)?.stats())
    }

    /// The tokenizer; `None` where it is not known on this side.
    fn tokenizer(&self, py: Python<'_>) -> PyResult<Option<Tokenizer>> {
        Ok(self.backend(py)?.tokenizer().map(Tokenizer::from))
    }

    /// Starts a generation.
    fn generate(&self, py: Python<'_>, params: &Bound<'_, PyAny>, with_progress: bool) -> PyResult<Stream> {
        Stream::start(py, self.backend(py)?, convert::from_python(params)?, with_progress)
    }

    /// The log-probabilities of `tokens[start..]`.
    fn score(&self, py: Python<'_>, tokens: Vec<u32>, start: usize, top: usize) -> PyResult<Operation> {
        let backend = self.backend(py)?;
        let request = ScoreRequest::new(tokens, start).with_top(top);
        let score = async move { backend.score(request).await };
        Ok(Operation::new(score, |py, score| convert::to_python(py, &score)))
    }

    /// Frees the model, once the streams that use it have ended.
    fn close(&self, py: Python<'_>) {
        let backend = self.backend.write().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(backend));
    }
}
