//! The registry: from the name of a backend in a configuration to a running model.
//!
//! Backends register themselves here; hosts add their own in the same way. Names are looked up at run time, so that a
//! host swaps its engine without being compiled again, as far as the engine is compiled in.

use std::{collections::BTreeMap, fmt, sync::Arc};

use async_trait::async_trait;
use schemars::JsonSchema;

use crate::{
    Error, ErrorKind, LlmBackend, MemoryPlan, Result, ResultExt,
    blocking::blocking,
    config::{AUTO, Config, ModelConfig, suggest},
    context::ContextLayer,
    echo::EchoFactory,
    schema::merge_definitions,
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

    /// How well the backend suits a model, for [`AUTO`]. Blocks.
    ///
    /// # Requires
    /// As [`load`](Self::load).
    ///
    /// # Behavior
    /// Looks at what the files are, not at whether they are sound: a damaged file of a format that the backend reads suits it, so
    /// that [`load`](Self::load) tells what is wrong.
    ///
    /// # Errors
    /// Why the model is none for this backend, and which other may run it.
    fn suitability(&self, config: &ModelConfig) -> Result<Suitability> {
        let _ = config;
        Err(not_chosen(self.name()))
    }

    /// The JSON schema of the table `options`; `None` where the backend does not say.
    fn options_schema(&self) -> Option<serde_json::Value> {
        None
    }

    /// Whether [`load`](Self::load) keeps the configuration's `memory_limit`. Where it does not, a configuration with one
    /// is refused.
    fn keeps_memory_limit(&self) -> bool {
        false
    }

    /// Whether [`load`](Self::load) makes use of the configuration's `prompt_cache`. Where it does not, a configuration with one
    /// is refused.
    fn saves_prompts(&self) -> bool {
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

/// How well a backend suits a model. The greatest is chosen; of equals, the backend whose name comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Suitability {
    /// It runs the model with limits that others do not have.
    Limited,
    /// It runs the model.
    Able,
    /// It is made for such models.
    Native,
}

impl Suitability {
    /// In a word, for people and for JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Limited => "limited",
            Self::Able => "able",
            Self::Native => "native",
        }
    }
}

type SuitabilityFn = fn(&ModelConfig) -> Result<Suitability>;
type LoadFn = fn(&str, &ModelConfig, &Progress) -> Result<Arc<dyn LlmBackend>>;
type PlanFn = fn(&str, &ModelConfig) -> Result<MemoryPlan>;

/// The factory of a backend whose loading blocks, as that of local engines does. It loads on tokio's threads for such
/// work, and a panic while loading is an error.
pub struct BlockingFactory {
    name: &'static str,
    description: &'static str,
    load: LoadFn,
    plan: Option<PlanFn>,
    suitability: Option<SuitabilityFn>,
    saves_prompts: bool,
    options_schema: fn() -> serde_json::Value,
}

impl BlockingFactory {
    /// A factory of backends with the options `O` that does not keep a memory limit.
    pub fn new<O: JsonSchema>(name: &'static str, description: &'static str, load: LoadFn) -> Self {
        let options_schema = || schemars::schema_for!(O).to_value();
        Self { name, description, load, plan: None, suitability: None, saves_prompts: false, options_schema }
    }

    /// The same factory of models that can save their KV cache.
    pub fn with_prompt_cache(mut self) -> Self {
        self.saves_prompts = true;
        self
    }

    /// The same factory with a judgement of what it runs, by which it can be [chosen](crate::config::AUTO).
    pub fn with_suitability(mut self, suitability: SuitabilityFn) -> Self {
        self.suitability = Some(suitability);
        self
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

    fn suitability(&self, config: &ModelConfig) -> Result<Suitability> {
        let judge = self.suitability.ok_or_else(|| not_chosen(self.name))?;
        judge(config)
    }

    fn options_schema(&self) -> Option<serde_json::Value> {
        Some((self.options_schema)())
    }

    fn keeps_memory_limit(&self) -> bool {
        self.plan.is_some()
    }

    fn saves_prompts(&self) -> bool {
        self.saves_prompts
    }

    fn plan(&self, name: &str, config: &ModelConfig) -> Result<MemoryPlan> {
        let plan = self.plan.ok_or_else(|| no_plan(self.name))?;
        plan(name, config)
    }
}

fn not_chosen(backend: &str) -> Error {
    Error::unsupported(format!("backend `{backend}` runs a model only where it is named"))
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

/// The backends that can be named in a configuration. Cheap to clone.
#[derive(Clone)]
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
        let mut cases = Vec::new();
        let mut all_options = Vec::new();
        for factory in self.factories.values() {
            let Some(mut options) = factory.options_schema() else { continue };
            // Definitions stand beside those of the configuration.
            if let Some(all) = schema.pointer_mut("/$defs").and_then(serde_json::Value::as_object_mut) {
                merge_definitions(all, &mut options, factory.name());
            }
            if let Some(options) = options.as_object_mut() {
                options.remove("$schema");
            }
            all_options.push(options.clone());
            let when = serde_json::json!(
                {"properties": {"backend": {"const": factory.name()}}, "required": ["backend"]}
            );
            cases.push(serde_json::json!({"if": when, "then": {"properties": {"options": options}}}));
        }
        // Also where no backend is named: that is the default.
        let auto = serde_json::json!({"properties": {"backend": {"const": AUTO}}});
        cases.push(
            serde_json::json!({"if": auto, "then": {"properties": {"options": {"anyOf": all_options}}}}),
        );
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
        let (name, model) = named(config, model).with_operation("load")?;
        let load = async {
            let factories = {
                let (registry, name, model) = (self.clone(), name.to_owned(), model.clone());
                blocking("the choice of a backend", move || registry.choose(&name, &model)).await?
            };
            let backend = load_first(&factories, name, model, progress).await?;
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
        let (name, model) = named(config, model).with_operation("plan")?;
        let plan = self.choose(name, model).and_then(|factories| factories[0].plan(name, model));
        plan.with("model", name).with_operation("plan")
    }

    /// Whether a model of a configuration can be loaded as far as the configuration tells. Looks at no files.
    ///
    /// # Errors
    /// [`InvalidConfig`](crate::ErrorKind::InvalidConfig) for values out of range and for an unknown backend,
    /// [`Unsupported`](crate::ErrorKind::Unsupported) for what the backend cannot do.
    pub fn check(&self, config: &Config, model: Option<&str>) -> Result<()> {
        let (name, model) = named(config, model).with_operation("load")?;
        // Which one is chosen depends on the files.
        if model.backend == AUTO {
            return Ok(());
        }
        self.choose(name, model).map(drop).with_operation("load")
    }

    /// How well each backend suits a model of a configuration, or why it cannot run it, in the order in which they are chosen.
    /// Blocks while it looks at the files.
    ///
    /// # Errors
    /// For an unknown model.
    pub fn suitability(
        &self,
        config: &Config,
        model: Option<&str>,
    ) -> Result<Vec<(&'static str, Result<Suitability>)>> {
        let (_, model) = named(config, model).with_operation("suitability")?;
        Ok(self.judgements(model))
    }

    /// All but `echo`, which is for tests, the best first.
    fn judgements(&self, model: &ModelConfig) -> Vec<(&'static str, Result<Suitability>)> {
        let factories = self.factories.values().filter(|factory| factory.name() != EchoFactory.name());
        let mut all: Vec<_> = factories.map(|factory| (factory.name(), factory.suitability(model))).collect();
        // Stable: equals keep the order of their names.
        all.sort_by_key(|(_, judgement)| std::cmp::Reverse(judgement.as_ref().ok().copied()));
        all
    }

    /// The backend that is named, or those that suit the model, the best first; at least one.
    fn choose(&self, name: &str, model: &ModelConfig) -> Result<Vec<Arc<dyn BackendFactory>>> {
        let needed = Ability::needed(model);
        if model.backend != AUTO {
            let factory = self.factory(&model.backend)?;
            if let Some(ability) = needed.iter().find(|ability| !(ability.has)(&**factory)) {
                return Err(self.lacking(name, &format!("backend `{}`", model.backend), ability));
            }
            return Ok(vec![Arc::clone(factory)]);
        }
        if let Some(path) = &model.path
            && let Err(error) = std::fs::metadata(path)
        {
            return Err(Error::io(path, error));
        }
        let (mut able, mut refusals) = (Vec::new(), Vec::new());
        for (backend, judgement) in self.judgements(model) {
            match judgement {
                Ok(_) => able.push(Arc::clone(self.factory(backend)?)),
                Err(error) => refusals.push((backend, error)),
            }
        }
        if able.is_empty() {
            return Err(none_suits(refusals));
        }
        for ability in needed {
            able.retain(|factory| (ability.has)(&**factory));
            if able.is_empty() {
                return Err(self.lacking(name, "each backend that runs the model", ability));
            }
        }
        Ok(able)
    }

    fn lacking(&self, name: &str, who: &str, ability: &Ability) -> Error {
        let able: Vec<&str> =
            self.factories.values().filter(|f| (ability.has)(&***f)).map(|f| f.name()).collect();
        let able = if able.is_empty() { "none that is compiled in".to_owned() } else { able.join(", ") };
        let Ability { key, lack, .. } = ability;
        Error::unsupported(format!("models.{name}.{key}: {who} {lack}; backends that can: {able}"))
    }

    fn factory(&self, name: &str) -> Result<&Arc<dyn BackendFactory>> {
        self.factories.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.factories.keys().copied().collect();
            let mut message = format!("unknown backend `{name}`; compiled in: {}", known.join(", "));
            suggest(&mut message, name, known.into_iter().chain([AUTO]));
            Error::invalid_config(message)
        })
    }
}

/// What a key of the configuration asks of a backend.
struct Ability {
    key: &'static str,
    /// What a backend without it does not do, after its name.
    lack: &'static str,
    has: fn(&dyn BackendFactory) -> bool,
}

impl Ability {
    /// Those that a model's configuration asks for.
    fn needed(model: &ModelConfig) -> Vec<&'static Self> {
        const MEMORY_LIMIT: &Ability = &Ability {
            key: "memory_limit",
            lack: "cannot keep a limit",
            has: |factory| factory.keeps_memory_limit(),
        };
        const PROMPT_CACHE: &Ability = &Ability {
            key: "prompt_cache",
            lack: "cannot save its KV cache",
            has: |factory| factory.saves_prompts(),
        };
        let limit = model.memory_limit.is_some().then_some(MEMORY_LIMIT);
        limit.into_iter().chain(model.prompt_cache.is_some().then_some(PROMPT_CACHE)).collect()
    }
}

/// The model that is meant, with its configuration checked.
fn named<'a>(config: &'a Config, model: Option<&str>) -> Result<(&'a str, &'a ModelConfig)> {
    let (name, model) = config.model(model)?;
    model.validate(name)?;
    Ok((name, model))
}

/// Loads with the first factory that can. One that finds something in the model that it does not implement gives way to the
/// next; where none can, its error is the one that counts.
async fn load_first(
    factories: &[Arc<dyn BackendFactory>],
    name: &str,
    model: &ModelConfig,
    progress: Progress,
) -> Result<Arc<dyn LlmBackend>> {
    let mut first = None;
    for factory in factories {
        match factory.load(name, model, progress.clone()).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                first.get_or_insert(error);
            }
            result => return result,
        }
    }
    Err(first.unwrap_or_else(|| none_suits(Vec::new())))
}

/// The error for a model that no backend suits, each of which has said why.
fn none_suits(mut refusals: Vec<(&'static str, Error)>) -> Error {
    if refusals.len() < 2 {
        let none = || Error::unsupported("no backend that chooses its models by their files is compiled in");
        return refusals.pop().map_or_else(none, |(_, error)| error);
    }
    let kind = refusals[0].1.kind();
    let is_shared = refusals.iter().all(|(_, reason)| reason.kind() == kind);
    let kind = if is_shared { kind } else { ErrorKind::Unsupported };
    let error = Error::new(kind, "none of the backends that are compiled in runs the model");
    // Backends that read the same formats say the same.
    let mut reasons: Vec<(&'static str, String)> = Vec::new();
    for (backend, reason) in refusals {
        let reason = reason.to_string();
        if reasons.iter().all(|(_, known)| *known != reason) {
            reasons.push((backend, reason));
        }
    }
    reasons.into_iter().fold(error, |error, (backend, reason)| error.with(backend, reason))
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
