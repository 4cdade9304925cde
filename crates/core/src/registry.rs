//! The registry: from the name of a backend in a configuration to a running model.
//!
//! Backends register themselves here; hosts add their own in the same way. Names are looked up at run time, so that a
//! host swaps its engine without being compiled again, as far as the engine is compiled in.

use std::{collections::BTreeMap, fmt, sync::Arc};

use async_trait::async_trait;
use schemars::JsonSchema;

use crate::{
    Error, LlmBackend, MemoryPlan, Result, ResultExt,
    blocking::blocking,
    config::{Config, ModelConfig, suggest},
    context::ContextLayer,
    echo::EchoFactory,
};

/// Makes running models for one kind of backend.
#[async_trait]
pub trait BackendFactory: Send + Sync {
    /// What configurations call it: lower case, words joined by `-`.
    fn name(&self) -> &'static str;

    /// What it runs, in a few words.
    fn description(&self) -> &'static str;

    /// Loads the model that the host calls `name`.
    ///
    /// # Requires
    /// `config` has passed [`ModelConfig::validate`].
    ///
    /// # Behavior
    /// Must be awaited in a tokio runtime, which it does not block; outside of one it may panic. Refuses options that it
    /// does not know. Calls `progress` from any thread.
    ///
    /// # Errors
    /// [`NotFound`](crate::ErrorKind::NotFound), [`InvalidModel`](crate::ErrorKind::InvalidModel) or
    /// [`InvalidConfig`](crate::ErrorKind::InvalidConfig), with the file and what is wrong with it.
    ///
    /// # Cancellation
    /// Dropping the future gives the model up; what has been started may go on in the background until it is done.
    async fn load(&self, name: &str, config: &ModelConfig, progress: Progress)
    -> Result<Arc<dyn LlmBackend>>;

    /// The JSON schema of the table `options`; `None` where the backend does not say.
    fn options_schema(&self) -> Option<serde_json::Value> {
        None
    }

    /// Whether [`load`](Self::load) keeps the configuration's `memory_limit`. Where it does not, a configuration with one
    /// is refused.
    fn keeps_memory_limit(&self) -> bool {
        false
    }

    /// What the model would take in memory, without loading its weights. Blocks.
    ///
    /// # Requires
    /// As [`load`](Self::load).
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) where the backend makes no plans, else as [`load`](Self::load).
    fn plan(&self, name: &str, config: &ModelConfig) -> Result<MemoryPlan> {
        let _ = (name, config);
        Err(no_plan(self.name()))
    }
}

type LoadFn = fn(&str, &ModelConfig, &Progress) -> Result<Arc<dyn LlmBackend>>;
type PlanFn = fn(&str, &ModelConfig) -> Result<MemoryPlan>;

/// The factory of a backend whose loading blocks, as that of local engines does. It loads on tokio's threads for such
/// work, and a panic while loading is an error.
pub struct BlockingFactory {
    name: &'static str,
    description: &'static str,
    load: LoadFn,
    plan: Option<PlanFn>,
    options_schema: fn() -> serde_json::Value,
}

impl BlockingFactory {
    /// A factory of backends with the options `O` that does not keep a memory limit.
    pub fn new<O: JsonSchema>(name: &'static str, description: &'static str, load: LoadFn) -> Self {
        let options_schema = || schemars::schema_for!(O).to_value();
        Self { name, description, load, plan: None, options_schema }
    }

    /// The same factory with a plan of the memory, by which it keeps a memory limit.
    pub fn with_plan(mut self, plan: PlanFn) -> Self {
        self.plan = Some(plan);
        self
    }
}

#[async_trait]
impl BackendFactory for BlockingFactory {
    fn name(&self) -> &'static str {
        self.name
    }

    fn description(&self) -> &'static str {
        self.description
    }

    async fn load(
        &self,
        name: &str,
        config: &ModelConfig,
        progress: Progress,
    ) -> Result<Arc<dyn LlmBackend>> {
        let (load, name, config) = (self.load, name.to_owned(), config.clone());
        let work = move || {
            crate::catch_panic(|| load(&name, &config, &progress))
                .unwrap_or_else(|panic| Err(Error::backend(format!("loading panicked: {panic}"))))
        };
        blocking("loading", work).await.with_operation("load")
    }

    fn options_schema(&self) -> Option<serde_json::Value> {
        Some((self.options_schema)())
    }

    fn keeps_memory_limit(&self) -> bool {
        self.plan.is_some()
    }

    fn plan(&self, name: &str, config: &ModelConfig) -> Result<MemoryPlan> {
        let plan = self.plan.ok_or_else(|| no_plan(self.name))?;
        plan(name, config)
    }
}

fn no_plan(backend: &str) -> Error {
    Error::unsupported(format!("backend `{backend}` makes no plan of its memory")).with_operation("plan")
}

/// How far the loading of a model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadProgress {
    /// What is being done, in a word or two.
    pub stage: &'static str,
    /// How much of it is done.
    pub done: u64,
    /// How much there is, in the same unit.
    pub total: u64,
}

impl LoadProgress {
    /// `done` of `total` in this stage.
    pub fn new(stage: &'static str, done: u64, total: u64) -> Self {
        Self { stage, done, total }
    }
}

/// A listener to the progress of loading. Cheap to clone.
#[derive(Clone)]
pub struct Progress(Option<Arc<dyn Fn(LoadProgress) + Send + Sync>>);

impl Progress {
    /// Nobody listens.
    pub fn none() -> Self {
        Self(None)
    }

    /// Calls `listener`, which should return soon.
    pub fn new(listener: impl Fn(LoadProgress) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(listener)))
    }

    /// Tells the listener.
    pub fn report(&self, progress: LoadProgress) {
        if let Some(listener) = &self.0 {
            listener(progress);
        }
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Progress").field(&self.0.is_some()).finish()
    }
}

/// The backends that can be named in a configuration.
pub struct Registry {
    factories: BTreeMap<&'static str, Arc<dyn BackendFactory>>,
}

impl Registry {
    /// A registry with the backend `echo` alone.
    pub fn new() -> Self {
        let mut registry = Self { factories: BTreeMap::new() };
        registry.register(EchoFactory);
        registry
    }

    /// Adds a backend, in the place of one with the same name.
    pub fn register(&mut self, factory: impl BackendFactory + 'static) {
        self.factories.insert(factory.name(), Arc::new(factory));
    }

    /// Names and descriptions, in the order of the names.
    pub fn backends(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.factories.values().map(|factory| (factory.name(), factory.description()))
    }

    /// The JSON schema of a configuration file with the options of every backend, for editors and for checks before a
    /// roll-out.
    pub fn schema(&self) -> serde_json::Value {
        let mut schema = Config::schema();
        let default = ModelConfig::default().backend;
        let mut cases = Vec::new();
        for factory in self.factories.values() {
            let Some(mut options) = factory.options_schema() else { continue };
            // Definitions stand beside those of the configuration.
            let definitions = options.as_object_mut().and_then(|o| o.remove("$defs"));
            if let (Some(serde_json::Value::Object(new)), Some(all)) =
                (definitions, schema.pointer_mut("/$defs").and_then(serde_json::Value::as_object_mut))
            {
                all.extend(new);
            }
            if let Some(options) = options.as_object_mut() {
                options.remove("$schema");
            }
            let mut when = serde_json::json!({"properties": {"backend": {"const": factory.name()}}});
            if factory.name() != default {
                when["required"] = serde_json::json!(["backend"]);
            }
            cases.push(serde_json::json!({"if": when, "then": {"properties": {"options": options}}}));
        }
        if let Some(model) = schema.pointer_mut("/$defs/ModelConfig") {
            model["allOf"] = cases.into();
        }
        schema
    }

    /// Loads a model of a configuration, with its context policy around it: the one that is named, else its default. Its
    /// `layers` and its `fallback` are what the facade `ternion` adds. Must be awaited in a tokio runtime;
    /// outside of one, the loading of most backends panics.
    ///
    /// # Errors
    /// [`InvalidConfig`](crate::ErrorKind::InvalidConfig) for an unknown model or backend, and what
    /// [`BackendFactory::load`] returns.
    pub async fn load(&self, config: &Config, model: Option<&str>) -> Result<Arc<dyn LlmBackend>> {
        self.load_with_progress(config, model, Progress::none()).await
    }

    /// [`load`](Self::load) that reports how far it is.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub async fn load_with_progress(
        &self,
        config: &Config,
        model: Option<&str>,
        progress: Progress,
    ) -> Result<Arc<dyn LlmBackend>> {
        let (name, model, factory) = self.find(config, model).with_operation("load")?;
        let load = async {
            let backend = factory.load(name, model, progress).await?;
            let layer = ContextLayer::new(backend, model.context_policy.clone())?;
            let layer = layer.with_max_tokens(config.with_defaults(model).max_tokens);
            Ok::<Arc<dyn LlmBackend>, Error>(Arc::new(layer))
        };
        load.await.with("model", name).with_operation("load")
    }

    /// What a model of a configuration would take in memory, without loading it. Blocks while it reads the files.
    ///
    /// # Errors
    /// As [`load`](Self::load), and [`Unsupported`](crate::ErrorKind::Unsupported) where the backend makes no plans.
    pub fn plan(&self, config: &Config, model: Option<&str>) -> Result<MemoryPlan> {
        let (name, model, factory) = self.find(config, model).with_operation("plan")?;
        factory.plan(name, model).with("model", name).with_operation("plan")
    }

    fn find<'a>(
        &self,
        config: &'a Config,
        model: Option<&str>,
    ) -> Result<(&'a str, &'a ModelConfig, &Arc<dyn BackendFactory>)> {
        let (name, model) = config.model(model)?;
        model.validate(name)?;
        let factory = self.factory(&model.backend)?;
        if model.memory_limit.is_some() && !factory.keeps_memory_limit() {
            let able: Vec<&str> =
                self.factories.values().filter(|f| f.keeps_memory_limit()).map(|f| f.name()).collect();
            let able = if able.is_empty() { "none that is compiled in".to_owned() } else { able.join(", ") };
            return Err(Error::unsupported(format!(
                "models.{name}.memory_limit: backend `{}` cannot keep a limit; backends that can: {able}",
                model.backend
            )));
        }
        Ok((name, model, factory))
    }

    fn factory(&self, name: &str) -> Result<&Arc<dyn BackendFactory>> {
        self.factories.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.factories.keys().copied().collect();
            let mut message = format!("unknown backend `{name}`; compiled in: {}", known.join(", "));
            suggest(&mut message, name, known.into_iter());
            Error::invalid_config(message)
        })
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.factories.keys()).finish()
    }
}
