//! The place of one named model: nothing yet, a model, or one that is about to change.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use ternion_core::{
    Error, ErrorKind, GenerateRequest, GenerateStream, LlmBackend, ModelInfo, Result, ResultExt,
    config::{Config, LayersConfig, ModelConfig, ReloadConfig, ReloadMode},
    registry::{Progress, Registry},
    text::Tokenizer,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    backoff::Backoff,
    check::check,
    event::{Events, ModelEvent},
    files::Files,
    loaded::{Loaded, Pinned},
};
use crate::{layers::cancelled, source};

pub(super) struct Slot {
    pub(super) name: String,
    registry: Arc<Registry>,
    pub(super) events: Events,
    /// What is loaded when the model is first wanted.
    wanted: Mutex<ModelConfig>,
    state: watch::Sender<State>,
    /// The models that stand in for this one, in order.
    fallback: RwLock<Vec<Arc<Slot>>>,
    /// Held while a model is loaded here, so that it is one at a time.
    loading: tokio::sync::Mutex<()>,
    backoff: Mutex<Backoff>,
    /// Counts the attempts to load that have failed.
    failed_attempts: AtomicU64,
}

#[derive(Clone)]
enum State {
    /// Nobody has asked for the model yet.
    Empty,
    Serving(Arc<Loaded>),
    /// The old model is given up and the new one is not there: requests wait.
    Changing(Snapshot),
    /// It could not be loaded, or has stopped.
    Failed(Failed),
}

#[derive(Clone)]
struct Failed {
    error: Arc<Error>,
    /// When a request may try to load it again.
    retry_at: Instant,
    /// Of the model that was there before.
    snapshot: Option<Snapshot>,
}

impl Failed {
    fn error(&self, model: &str) -> Error {
        let error = Error::new(self.error.kind(), format!("the model is not loaded: {}", self.error));
        error.with("model", model)
    }
}

/// What can be asked of a model without waiting.
#[derive(Clone)]
pub(super) struct Snapshot {
    pub(super) info: Arc<ModelInfo>,
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
}

/// What a new configuration did to a model.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    None,
    Made,
}

impl Slot {
    pub(super) fn new(
        name: &str,
        config: ModelConfig,
        registry: &Arc<Registry>,
        events: &Events,
    ) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            registry: Arc::clone(registry),
            events: events.clone(),
            wanted: Mutex::new(config),
            state: watch::channel(State::Empty).0,
            fallback: RwLock::new(Vec::new()),
            loading: tokio::sync::Mutex::new(()),
            backoff: Mutex::default(),
            failed_attempts: AtomicU64::new(0),
        })
    }

    /// This model and those that stand in for it.
    pub(super) fn chain(self: &Arc<Self>) -> Vec<Arc<Self>> {
        let fallback = self.fallback.read().unwrap_or_else(PoisonError::into_inner);
        std::iter::once(self).chain(fallback.iter()).cloned().collect()
    }

    pub(super) fn set_fallback(&self, slots: Vec<Arc<Self>>) {
        *self.fallback.write().unwrap_or_else(PoisonError::into_inner) = slots;
    }

    pub(super) fn wanted(&self) -> ModelConfig {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn want(&self, config: ModelConfig) {
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) = config;
    }

    fn backoff(&self) -> MutexGuard<'_, Backoff> {
        self.backoff.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model, if it is there and has not stopped.
    pub(super) fn serving(&self) -> Option<Pinned> {
        match &*self.state.borrow() {
            State::Serving(loaded) if !loaded.is_closed() => Some(Pinned(Arc::clone(loaded))),
            _ => None,
        }
    }

    /// What the model says of itself, or the last one where there is none at the moment.
    pub(super) fn snapshot(&self) -> Option<Snapshot> {
        match &*self.state.borrow() {
            State::Serving(loaded) => Some(Snapshot::of(&Pinned(Arc::clone(loaded)))),
            State::Changing(snapshot) => Some(snapshot.clone()),
            State::Failed(failed) => failed.snapshot.clone(),
            State::Empty => None,
        }
    }

    /// The model, after it is loaded or changed if need be; `None` if the request was cancelled before.
    ///
    /// # Errors
    /// That of the loading. A model that has failed is tried again only after a time: loading takes seconds, which requests
    /// would spend one after the other.
    pub(super) async fn ready(self: &Arc<Self>, cancel: &CancellationToken) -> Result<Option<Pinned>> {
        let mut changes = self.state.subscribe();
        loop {
            let state = changes.borrow_and_update().clone();
            match state {
                State::Serving(loaded) if loaded.is_closed() => self.retire_closed(),
                State::Serving(loaded) => return Ok(Some(Pinned(loaded))),
                State::Failed(failed) if failed.retry_at > Instant::now() => {
                    return Err(failed.error(&self.name));
                }
                State::Empty | State::Failed(_) => tokio::select! {
                    biased;
                    () = cancel.cancelled() => return Ok(None),
                    outcome = self.load(Progress::none()) => outcome?,
                },
                State::Changing(_) => tokio::select! {
                    biased;
                    () = cancel.cancelled() => return Ok(None),
                    _ = changes.changed() => {}
                },
            }
        }
    }

    /// Lets go of a model that has stopped, so that it is loaded again: at once the first time, after a time if that happens
    /// again and again.
    fn retire_closed(&self) {
        let mut retired = None;
        self.state.send_if_modified(|state| {
            let State::Serving(loaded) = state else { return false };
            if !loaded.is_closed() {
                return false;
            }
            let error = Error::new(ErrorKind::Closed, "the model has stopped");
            let delay = self.backoff().after_stop(loaded.age());
            let failed = Failed {
                error: Arc::new(error),
                retry_at: Instant::now() + delay,
                snapshot: Some(Snapshot::of(&Pinned(Arc::clone(loaded)))),
            };
            retired = Some(std::mem::replace(state, State::Failed(failed)));
            true
        });
        if let Some(State::Serving(loaded)) = retired {
            let (model, backend) = (self.name.clone(), loaded.bare.info().backend.clone());
            self.events.send(ModelEvent::Stopped { model, backend });
        }
    }

    /// Loads a model that has stopped again, when its time has come.
    ///
    /// # Errors
    /// That of the loading.
    pub(super) async fn revive(self: &Arc<Self>) -> Result<()> {
        self.retire_closed();
        let due = match &*self.state.borrow() {
            State::Failed(failed) => failed.snapshot.is_some() && failed.retry_at <= Instant::now(),
            _ => false,
        };
        if due { self.load(Progress::none()).await } else { Ok(()) }
    }

    pub(super) async fn generate(self: &Arc<Self>, request: GenerateRequest) -> Result<GenerateStream> {
        match self.ready(&request.cancel).await.with_operation("generate")? {
            Some(model) => model.generate(request).await,
            None => Ok(cancelled()),
        }
    }

    /// Loads the model if it is not there. Goes on to its end even if nobody waits for it any more: the next request
    /// would begin anew. Callers that wait for the same attempt have the same result.
    pub(super) async fn load(self: &Arc<Self>, progress: Progress) -> Result<()> {
        let slot = Arc::clone(self);
        let attempts = self.failed_attempts.load(Ordering::Acquire);
        let load = async move {
            let _one = slot.loading.lock().await;
            slot.retire_closed();
            let state = slot.state.borrow().clone();
            match state {
                State::Serving(_) => return Ok(()),
                State::Failed(failed) if slot.failed_attempts.load(Ordering::Acquire) != attempts => {
                    return Err(failed.error(&slot.name));
                }
                _ => {}
            }
            match slot.open(slot.wanted(), progress).await {
                Ok(loaded) => {
                    slot.serve(loaded);
                    Ok(())
                }
                Err(error) => {
                    slot.fail(&error);
                    Err(error)
                }
            }
        };
        tokio::spawn(load).await.unwrap_or_else(|e| Err(interrupted(e)))
    }

    /// Gives the model this configuration: at once if it is not loaded yet, else by a new model in the old one's place.
    ///
    /// # Errors
    /// What loading and checking the new model return. The old model goes on, with its old configuration.
    pub(super) async fn change(&self, config: ModelConfig, reload: &ReloadConfig) -> Result<Change> {
        let _one = self.loading.lock().await;
        // A model that has stopped is loaded anew, even if nothing about it has changed.
        self.retire_closed();
        let state = self.state.borrow().clone();
        let State::Serving(old) = state else {
            self.want(config.clone());
            if matches!(state, State::Empty) {
                return Ok(Change::None);
            }
            let loaded = self.open_checked(config, reload).await.inspect_err(|error| self.fail(error))?;
            self.serve(loaded);
            return Ok(Change::Made);
        };
        if same_model(&old.config, &config) && old.files == Files::look(old.path.as_deref()).await {
            let layers_changed = old.config.layers != config.layers;
            if layers_changed {
                self.serve(old.with_layers_of(config.clone()));
            }
            self.want(config);
            return Ok(if layers_changed { Change::Made } else { Change::None });
        }
        if reload.mode == ReloadMode::UnloadThenLoad {
            self.change_after(old, config.clone(), reload).await?;
        } else {
            let new = self.open_checked(config.clone(), reload).await?;
            self.serve(new);
        }
        self.want(config);
        Ok(Change::Made)
    }

    /// Gives up the old model and then loads the new one. After an error the old one serves again, if it can.
    async fn change_after(&self, old: Arc<Loaded>, config: ModelConfig, reload: &ReloadConfig) -> Result<()> {
        let _changing = Changing(self);
        self.state.send_replace(State::Changing(Snapshot::of(&Pinned(Arc::clone(&old)))));
        let old_config = old.config.clone();
        let gone = old.gone();
        let weak = Arc::downgrade(&old);
        drop(old);
        let time = Duration::from_secs(reload.drain_seconds);
        if tokio::time::timeout(time, gone).await.is_err()
            && let Some(old) = weak.upgrade()
        {
            self.state.send_replace(State::Serving(old));
            let message = format!("requests on the old model have not ended within {} s", time.as_secs());
            return Err(Error::new(ErrorKind::Timeout, message)
                .with("model", &self.name)
                .with_operation("reload"));
        }
        let error = match self.open_checked(config, reload).await {
            Ok(new) => {
                self.serve(new);
                return Ok(());
            }
            Err(error) => error,
        };
        match self.open(old_config, Progress::none()).await {
            Ok(old) => {
                self.state.send_replace(State::Serving(old));
                Err(error)
            }
            Err(second) => {
                self.fail(&second);
                Err(error.with("old model", second))
            }
        }
    }

    async fn open_checked(&self, config: ModelConfig, reload: &ReloadConfig) -> Result<Arc<Loaded>> {
        let new = self.open(config, Progress::none()).await?;
        if let Err(error) = check(&*new.bare, reload).await.with("model", &self.name) {
            // The next attempt may need its memory.
            let gone = new.gone();
            drop(new);
            let _ = tokio::time::timeout(Duration::from_secs(reload.drain_seconds), gone).await;
            return Err(error);
        }
        Ok(new)
    }

    async fn open(&self, config: ModelConfig, progress: Progress) -> Result<Arc<Loaded>> {
        // Before gigabytes are downloaded for a backend that does not exist.
        self.registry.check(&Config::single(&*self.name, config.clone()), Some(&self.name))?;
        let local = source::local(&config, &progress).await.with("model", &self.name)?;
        let path = local.path.clone();
        // Looked at before, so that what changes while they are read is seen the next time.
        let files = Files::look(path.as_deref()).await;
        let alone = Config::single(&*self.name, local);
        let bare = self.registry.load_with_progress(&alone, Some(&self.name), progress).await?;
        Ok(Loaded::new(&self.name, config, (path, files), bare, &self.events))
    }

    fn fail(&self, error: &Error) {
        let copy = Error::new(error.kind(), error.to_string());
        self.failed_attempts.fetch_add(1, Ordering::AcqRel);
        let retry_at = Instant::now() + self.backoff().after_failure();
        let failed = Failed { error: Arc::new(copy), retry_at, snapshot: self.snapshot() };
        self.state.send_replace(State::Failed(failed));
    }

    fn serve(&self, new: Arc<Loaded>) {
        self.backoff().loaded();
        let to = new.bare.info().backend.clone();
        let model = self.name.clone();
        let old = self.state.send_replace(State::Serving(new));
        let from = match &old {
            State::Serving(old) => Some(old.bare.info().backend.clone()),
            State::Changing(snapshot) => Some(snapshot.info.backend.clone()),
            State::Empty | State::Failed(_) => None,
        };
        self.events.send(match from {
            Some(from) => ModelEvent::Swapped { model, from, to },
            None => ModelEvent::Loaded { model, backend: to },
        });
    }
}

impl Snapshot {
    fn of(model: &Pinned) -> Self {
        Self { info: model.info(), tokenizer: model.tokenizer() }
    }
}

/// A change that has given up the old model. If it is interrupted, the requests that wait for it must not wait forever.
struct Changing<'a>(&'a Slot);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.state.send_if_modified(|state| {
            let State::Changing(snapshot) = state else { return false };
            let error = Error::new(ErrorKind::Closed, "the change of the model was interrupted");
            let snapshot = Some(snapshot.clone());
            *state = State::Failed(Failed { error: Arc::new(error), retry_at: Instant::now(), snapshot });
            true
        });
    }
}

/// Whether two configurations are of one and the same model; what is around it may differ.
fn same_model(a: &ModelConfig, b: &ModelConfig) -> bool {
    let bare = |config: &ModelConfig| {
        let mut config = config.clone();
        config.fallback.clear();
        config.layers = LayersConfig::default();
        config
    };
    bare(a) == bare(b)
}

pub(super) fn interrupted(error: tokio::task::JoinError) -> Error {
    Error::new(ErrorKind::Closed, "interrupted before its end").with_source(error).with_operation("load")
}
