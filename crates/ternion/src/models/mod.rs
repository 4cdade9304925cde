//! All models of a configuration, by name, for as long as a host runs.
//!
//! ```
//! use std::sync::Arc;
//! use ternion::{LlmBackend, models::Models};
//!
//! # async fn run() -> ternion::Result<()> {
//! let models = Models::load_file("ternion.toml").await?;
//! let chat: Arc<dyn LlmBackend> = Arc::new(models.get("chat").await?); // kept for good
//! let _watch = models.watch()?; // from now on a change of the file changes what is behind it
//! # drop(chat);
//! # Ok(())
//! # }
//! ```
//!
//! # When a model is loaded
//!
//! With the first [`get`](Models::get) of its name, or when a fallback first needs it; then it stays. A model that
//! nobody asks for costs nothing.
//!
//! # When a model has failed
//!
//! * A model that cannot be loaded is tried again by [`get`](Models::get) and [`reload`](Models::reload), and by the first
//!   request to a handle that comes one second later or more; after each further failure the wait is twice as long, up to a
//!   minute. Requests in between fail at once, with the error of the last attempt.
//! * A model that has stopped by itself ([`LlmBackend::is_closed`], or a request that failed
//!   with [`Closed`](crate::ErrorKind::Closed)) is loaded again by any of these, and by [`watch`](Models::watch): the first
//!   time at once, and if it stops again within a minute, after waits as above.
//!
//! # What a reload does
//!
//! * A model that is loaded and whose table in the configuration, or whose files, have changed is loaded anew, checked
//!   with a few prompts and put in the old one's place. If `layers` alone have changed they are laid around the model
//!   that is there, and a new `fallback` needs no loading at all.
//! * Requests that run stay on the old model, which is dropped when the last of them has ended.
//! * If the new model cannot be loaded or fails the check, the old one goes on, and the error goes to the caller, to all
//!   who have subscribed to the [events](Models::events) and to `tracing`. Other models are not concerned.
//! * A new name can be asked for. A name that is gone gives no handles any more, while handles that are held go on with the
//!   model that they have; if the name comes back, they follow it again.
//! * What is not loaded takes its new configuration along. A model that had failed, or that has stopped, is loaded again.
//! * Reloads that are asked for at the same time are done one after the other.
//!
//! # Replacing the files of a model
//!
//! By renaming new files into their place, or by naming a new folder: the model that runs keeps the old files. A program
//! that writes into a file changes the weights under the model, which maps them. Such a model refuses requests from the next
//! step on ([`InvalidModel`](ternion_core::ErrorKind::InvalidModel), naming the file) until it is loaded again; a
//! file that is shortened while a step reads it can end the process (SIGBUS). With `mmap = false` weights are read into memory,
//! and the files do not matter once the model is loaded.

mod backoff;
mod check;
mod event;
mod fallback;
mod files;
mod handle;
mod loaded;
mod slot;
mod watch;

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak},
};

use ternion_core::{
    Error, LlmBackend, Result, ResultExt, Unloaded,
    config::Config,
    registry::{Progress, Registry},
};
use tokio::sync::broadcast;

use event::Events;
use fallback::Failures;
use slot::{Change, Slot, interrupted};

pub use self::{event::ModelEvent, handle::ModelHandle, watch::Watch};

/// The models of one configuration, by name. Cheap to clone; all clones are the same.
#[derive(Clone)]
pub struct Models(Arc<Inner>);

struct Inner {
    registry: Arc<Registry>,
    path: Option<PathBuf>,
    events: Events,
    catalog: Mutex<Catalog>,
    /// Held during a reload, so that it is one at a time.
    reloading: tokio::sync::Mutex<()>,
}

/// Which names there are.
struct Catalog {
    config: Config,
    slots: BTreeMap<String, Arc<Slot>>,
    /// Names that are gone from the configuration while handles are held.
    retired: BTreeMap<String, Weak<Slot>>,
    /// What handles to the default model point to, once there are any.
    default: Option<handle::Target>,
}

/// What a reload did, by the names of the models.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reloaded {
    /// These were loaded anew, or have other layers.
    pub changed: Vec<String>,
    /// These are in the configuration and were not before.
    pub added: Vec<String>,
    /// These are not in the configuration any more.
    pub removed: Vec<String>,
}

impl Models {
    /// The models of a configuration file (TOML, JSON or YAML), with the overrides of the environment. None is loaded
    /// yet.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub async fn load_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let config = read(path.clone()).await?;
        Self::build(config, crate::registry(), Some(path))
    }

    /// The models of a configuration. None is loaded yet.
    ///
    /// # Errors
    /// [`InvalidConfig`](crate::ErrorKind::InvalidConfig) naming the key that is wrong.
    pub fn new(config: Config) -> Result<Self> {
        Self::with_registry(config, crate::registry())
    }

    /// The models of a configuration, with backends of the host's own.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_registry(config: Config, registry: Registry) -> Result<Self> {
        Self::build(config, registry, None)
    }

    fn build(config: Config, registry: Registry, path: Option<PathBuf>) -> Result<Self> {
        let empty = Catalog {
            config: Config::default(),
            slots: BTreeMap::new(),
            retired: BTreeMap::new(),
            default: None,
        };
        // The process may change its working directory before it reads the file again.
        let path = path.map(|path| std::path::absolute(&path).unwrap_or(path));
        let inner = Inner {
            registry: Arc::new(registry),
            path,
            events: Events::new(),
            catalog: Mutex::new(empty),
            reloading: tokio::sync::Mutex::new(()),
        };
        config.validate().with_operation("configuration")?;
        let mut config = config;
        config.make_paths_absolute();
        inner.enter(config)?;
        Ok(Self(Arc::new(inner)))
    }

    /// A handle to the model called `name`, which is loaded if it is not yet. Where it cannot be loaded, the next model of
    /// its fallback chain has to be. Must be awaited in a tokio runtime.
    ///
    /// # Errors
    /// [`InvalidConfig`](crate::ErrorKind::InvalidConfig) if there is no such model, and what loading returns.
    pub async fn get(&self, name: &str) -> Result<ModelHandle> {
        self.get_with_progress(name, Progress::none()).await
    }

    /// [`get`](Self::get) that reports how far the loading is.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn get_with_progress(&self, name: &str, progress: Progress) -> Result<ModelHandle> {
        let slot = self.0.slot(Some(name))?;
        load_chain(&slot, progress).await?;
        Ok(ModelHandle { target: Arc::new(RwLock::new(slot)) })
    }

    /// A handle to the default model, as [`get`](Self::get). If another one becomes the default, the handle follows, as
    /// soon as that one is loaded and checked.
    ///
    /// # Errors
    /// As [`get`](Self::get); [`InvalidConfig`](crate::ErrorKind::InvalidConfig) if the configuration has several
    /// models and none is the default.
    pub async fn default_model(&self) -> Result<ModelHandle> {
        let slot = self.0.slot(None)?;
        load_chain(&slot, Progress::none()).await?;
        let mut catalog = self.0.catalog();
        let target = catalog.default.get_or_insert_with(|| Arc::new(RwLock::new(slot)));
        Ok(ModelHandle { target: Arc::clone(target) })
    }

    /// A future that ends when the models that are loaded now are gone. They go when this value, its clones, all handles and all
    /// streams are dropped, and have then written their prompt caches.
    pub fn unloaded(&self) -> Unloaded {
        let serving = self.0.catalog().slots.values().filter_map(|slot| slot.serving()).collect::<Vec<_>>();
        let gone: Vec<Unloaded> = serving.iter().map(LlmBackend::unloaded).collect();
        Box::pin(async move {
            for model in gone {
                model.await;
            }
        })
    }

    /// The names of all models, in order.
    pub fn names(&self) -> Vec<String> {
        self.0.catalog().config.models.keys().cloned().collect()
    }

    /// The configuration that was read last.
    pub fn config(&self) -> Config {
        self.0.catalog().config.clone()
    }

    /// What happens from now on. A subscriber that reads too slowly misses the oldest events, and is told so.
    pub fn events(&self) -> broadcast::Receiver<ModelEvent> {
        self.0.events.subscribe()
    }

    /// Reads the configuration file again and makes what is new in it take effect, as the [module](self) tells. Goes on
    /// to its end even if this future is dropped. Must be awaited in a tokio runtime.
    ///
    /// # Errors
    /// What [`Config::load`] returns; then nothing has changed. If single models could not be changed, the error of the
    /// first of them, with the names of all as context; the others have been.
    pub async fn reload(&self) -> Result<Reloaded> {
        let Some(path) = self.0.path.clone() else {
            let message = "these models come from no file; a configuration expected, with `reload_with`";
            return Err(Error::unsupported(message).with_operation("reload"));
        };
        self.change(read(path)).await
    }

    /// [`reload`](Self::reload) with this configuration in place of the file's.
    ///
    /// # Errors
    /// As [`reload`](Self::reload).
    pub async fn reload_with(&self, config: Config) -> Result<Reloaded> {
        self.change(std::future::ready(Ok(config))).await
    }

    async fn change(
        &self,
        config: impl Future<Output = Result<Config>> + Send + 'static,
    ) -> Result<Reloaded> {
        let inner = Arc::clone(&self.0);
        let change = async move {
            let _one = inner.reloading.lock().await;
            // Read when it is this one's turn, so that the last of several reloads sees the newest.
            let valid = config.await.and_then(|mut config| {
                config.validate()?;
                config.make_paths_absolute();
                if config.models.is_empty() && !inner.catalog().config.models.is_empty() {
                    return Err(Error::invalid_config("no model is configured; the models stay as they are"));
                }
                Ok(config)
            });
            match valid {
                Ok(config) => inner.take_effect(config).await,
                Err(error) => {
                    inner.events.reload_failed(None, &error);
                    Err(error)
                }
            }
        };
        tokio::spawn(change).await.unwrap_or_else(|e| Err(interrupted(e))).with_operation("reload")
    }
}

impl Inner {
    fn catalog(&self) -> MutexGuard<'_, Catalog> {
        self.catalog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poll_ms(&self) -> u64 {
        self.catalog().config.reload.poll_ms
    }

    fn slot(&self, name: Option<&str>) -> Result<Arc<Slot>> {
        let catalog = self.catalog();
        let (name, _) = catalog.config.model(name).with_operation("load")?;
        let slot = catalog.slots.get(name);
        slot.cloned()
            .ok_or_else(|| Error::invalid_config(format!("no model `{name}`")).with_operation("load"))
    }

    /// Makes the names and chains those of a valid configuration; what is loaded stays as it is.
    fn enter(&self, config: Config) -> Result<Reloaded> {
        let mut reloaded = Reloaded::default();
        let chains = config.models.keys().map(|name| config.chain(name)).collect::<Result<Vec<_>>>()?;
        let mut catalog = self.catalog();
        let mut old = std::mem::take(&mut catalog.slots);
        let mut slots = BTreeMap::new();
        for (name, model) in &config.models {
            let slot = old.remove(name).unwrap_or_else(|| {
                reloaded.added.push(name.clone());
                let held = catalog.retired.remove(name).and_then(|slot| slot.upgrade());
                held.unwrap_or_else(|| {
                    Slot::new(name, config.with_defaults(model), &self.registry, &self.events)
                })
            });
            slots.insert(name.clone(), slot);
        }
        for (slot, chain) in slots.values().zip(&chains) {
            slot.set_fallback(chain[1..].iter().filter_map(|name| slots.get(*name)).cloned().collect());
        }
        catalog.retired.retain(|_, slot| slot.strong_count() > 0);
        for (name, slot) in old {
            catalog.retired.insert(name.clone(), Arc::downgrade(&slot));
            reloaded.removed.push(name);
        }
        drop(chains);
        catalog.slots = slots;
        catalog.config = config;
        Ok(reloaded)
    }

    /// Brings the models in line with a valid configuration.
    async fn take_effect(&self, config: Config) -> Result<Reloaded> {
        let reload = config.reload.clone();
        let mut reloaded = self.enter(config.clone())?;
        let mut failures: Vec<(String, Error)> = Vec::new();
        for (name, model) in &config.models {
            let Ok(slot) = self.slot(Some(name)) else { continue };
            match slot.change(config.with_defaults(model), &reload).await {
                Ok(Change::None) => {}
                Ok(Change::Made) => reloaded.changed.push(name.clone()),
                Err(error) => failures.push((name.clone(), error)),
            }
        }
        if let Err(error) = self.move_default().await {
            let name = config.default_model.unwrap_or_else(|| "default".to_owned());
            failures.push((name, error));
        }
        for (name, error) in &failures {
            self.events.reload_failed(Some(name), error);
        }
        let names = failures.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
        match failures.into_iter().next() {
            None => Ok(reloaded),
            Some((name, error)) => Err(error.with("model", name).with("not changed", names)),
        }
    }

    /// Loads the models again that have stopped by themselves.
    async fn revive(&self) {
        let slots: Vec<_> = self.catalog().slots.values().cloned().collect();
        for slot in slots {
            if let Err(error) = slot.revive().await {
                self.events.reload_failed(Some(&slot.name), &error);
            }
        }
    }

    /// Points the handles to the default model to the one that is the default now, once it is there.
    async fn move_default(&self) -> Result<()> {
        let Some(target) = self.catalog().default.clone() else { return Ok(()) };
        let slot = self.slot(None)?;
        let same = Arc::ptr_eq(&slot, &target.read().unwrap_or_else(PoisonError::into_inner));
        if !same {
            load_chain(&slot, Progress::none()).await?;
            *target.write().unwrap_or_else(PoisonError::into_inner) = slot;
        }
        Ok(())
    }
}

/// Loads the first model of the slot's chain that can be.
async fn load_chain(slot: &Arc<Slot>, progress: Progress) -> Result<()> {
    let mut failures = Failures::default();
    for (at, slot) in slot.chain().into_iter().enumerate() {
        let Err(error) = slot.load(progress.clone()).await else { return Ok(()) };
        if at == 0 && !error.kind().should_fail_over() {
            return Err(error);
        }
        failures.push(&slot.name, error);
    }
    failures.take()
}

async fn read(path: PathBuf) -> Result<Config> {
    let read = tokio::task::spawn_blocking(move || Config::load(path));
    read.await.unwrap_or_else(|e| Err(interrupted(e)))
}

impl fmt::Debug for Models {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Models").field(&self.names()).finish()
    }
}
