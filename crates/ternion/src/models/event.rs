//! What happens to the models while a host runs.

use std::fmt;

use ternion_core::{Error, ErrorKind};
use tokio::sync::broadcast;

/// Something that happened to the models of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ModelEvent {
    /// A model was loaded for the first time, or again after it had failed.
    Loaded {
        /// Its name.
        model: String,
        /// The backend that runs it.
        backend: String,
    },
    /// A new model has taken the place of the old one.
    Swapped {
        /// Its name.
        model: String,
        /// The backend that ran it.
        from: String,
        /// The backend that runs it now.
        to: String,
    },
    /// A model was given up: nobody wants it any more, and its last request has ended.
    Unloaded {
        /// Its name.
        model: String,
        /// The backend that ran it.
        backend: String,
    },
    /// A model has stopped by itself, as when its engine's thread has died. It is loaded again when it is next wanted.
    Stopped {
        /// Its name.
        model: String,
        /// The backend that ran it.
        backend: String,
    },
    /// A request goes on to another model.
    FellOver {
        /// The model that the host asked.
        model: String,
        /// The model that failed.
        from: String,
        /// The model that is tried next.
        to: String,
        /// How it failed.
        kind: ErrorKind,
        /// The error's one line.
        error: String,
    },
    /// A new configuration, or the new configuration of a model, could not take effect. What was there before goes on.
    ReloadFailed {
        /// The model; `None` if the configuration as a whole was refused.
        model: Option<String>,
        /// How it failed.
        kind: ErrorKind,
        /// The error's one line.
        error: String,
    },
}

impl fmt::Display for ModelEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loaded { model, backend } => write!(f, "`{model}` is loaded, on {backend}"),
            Self::Swapped { model, from, to } => write!(f, "`{model}` is swapped, from {from} to {to}"),
            Self::Unloaded { model, backend } => write!(f, "`{model}` on {backend} is given up"),
            Self::Stopped { model, backend } => write!(f, "`{model}` on {backend} has stopped by itself"),
            Self::FellOver { model, from, to, error, .. } => {
                write!(f, "a request to `{model}` goes on from `{from}` to `{to}`: {error}")
            }
            Self::ReloadFailed { model: Some(model), error, .. } => {
                write!(f, "`{model}` stays as it was: {error}")
            }
            Self::ReloadFailed { model: None, error, .. } => {
                write!(f, "all models stay as they were: {error}")
            }
        }
    }
}

/// Where events go: to `tracing`, and to whoever has subscribed.
#[derive(Clone)]
pub(super) struct Events(broadcast::Sender<ModelEvent>);

/// Events that a slow subscriber may be behind before it misses some.
const CAPACITY: usize = 256;

impl Events {
    pub(super) fn new() -> Self {
        Self(broadcast::channel(CAPACITY).0)
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<ModelEvent> {
        self.0.subscribe()
    }

    pub(super) fn send(&self, event: ModelEvent) {
        match &event {
            ModelEvent::FellOver { .. } | ModelEvent::ReloadFailed { .. } | ModelEvent::Stopped { .. } => {
                tracing::warn!("{event}");
            }
            _ => tracing::info!("{event}"),
        }
        // That nobody has subscribed is no failure.
        let _ = self.0.send(event);
    }

    pub(super) fn reload_failed(&self, model: Option<&str>, error: &Error) {
        let (model, kind) = (model.map(str::to_owned), error.kind());
        self.send(ModelEvent::ReloadFailed { model, kind, error: error.to_string() });
    }
}
