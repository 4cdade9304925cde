//! What all requests share: the models, the options, and whether the server is about to stop.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use axum::http::StatusCode;
use metrics_exporter_prometheus::PrometheusHandle;
use ternion::{
    CancellationToken, Error, LlmBackend,
    layers::{LayerExt, MetricsLayer},
    models::{ModelHandle, Models},
};

use crate::{error::ApiError, options::ServerOptions};

/// How long a model that could not be loaded is not tried again.
const LOAD_PAUSE: Duration = Duration::from_secs(5);

/// How long `/ready` waits for a model that is being loaded again.
const READY_TIME: Duration = Duration::from_millis(500);

/// The state of a server; cheap to clone.
#[derive(Clone)]
pub(crate) struct App(Arc<Inner>);

struct Inner {
    models: Models,
    options: ServerOptions,
    /// Cancelled when answers must end.
    stopping: CancellationToken,
    /// No request is accepted any more.
    draining: AtomicBool,
    /// When models could not be loaded, and how the error is told.
    failures: Mutex<HashMap<String, (Instant, ApiError)>>,
    /// Handles of the models that have been loaded.
    loaded: Mutex<HashMap<String, ModelHandle>>,
    metrics: PrometheusHandle,
    created: u64,
}

/// Bounds of a request's body.
pub(crate) struct Limits {
    pub(crate) body: usize,
    pub(crate) body_time: Duration,
    pub(crate) messages: usize,
}

/// The model of a request.
pub(crate) struct Model {
    /// What the configuration calls it.
    pub(crate) name: String,
    pub(crate) backend: Arc<dyn LlmBackend>,
}

impl App {
    pub(crate) fn new(models: Models, options: ServerOptions, metrics: PrometheusHandle) -> Self {
        let created = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_secs());
        Self(Arc::new(Inner {
            models,
            options,
            stopping: CancellationToken::new(),
            draining: AtomicBool::new(false),
            failures: Mutex::default(),
            loaded: Mutex::default(),
            metrics,
            created,
        }))
    }

    pub(crate) fn options(&self) -> &ServerOptions {
        &self.0.options
    }

    pub(crate) fn models(&self) -> &Models {
        &self.0.models
    }

    pub(crate) fn metrics(&self) -> &PrometheusHandle {
        &self.0.metrics
    }

    /// When the server was started, in seconds since 1970.
    pub(crate) fn created(&self) -> u64 {
        self.0.created
    }

    pub(crate) fn limits(&self) -> Limits {
        let options = &self.0.options;
        Limits {
            body: options.max_body_bytes,
            body_time: options.body_timeout,
            messages: options.max_messages,
        }
    }

    /// When an answer that begins now has to be complete.
    pub(crate) fn deadline(&self) -> Option<(tokio::time::Instant, Duration)> {
        let limit = self.0.options.request_timeout?;
        Some((tokio::time::Instant::now().checked_add(limit)?, limit))
    }

    /// Ends all answers.
    pub(crate) fn stopping(&self) -> &CancellationToken {
        &self.0.stopping
    }

    /// No request is accepted from now on.
    pub(crate) fn drain(&self) {
        self.0.draining.store(true, Ordering::Release);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::Acquire)
    }

    /// The model that a request names, which is loaded if need be.
    ///
    /// # Errors
    /// 404 for a name that does not exist, 503 for a model that cannot be loaded.
    pub(crate) async fn model(&self, asked: Option<&str>) -> Result<Model, ApiError> {
        if self.is_draining() {
            return Err(ApiError::shutting_down());
        }
        let config = self.0.models.config();
        let asked = asked.filter(|name| !name.is_empty());
        let wanted = asked.map(|name| self.0.options.aliases.get(name).map_or(name, String::as_str));
        let Ok((name, model)) = config.model(wanted) else {
            return Err(unknown(asked, config.models.keys().map(String::as_str)));
        };
        if let Some(error) = self.recent_failure(name) {
            return Err(error);
        }
        let handle = match self.0.models.get(name).await {
            Ok(handle) => handle,
            Err(error) => return Err(self.failed(name, &error)),
        };
        self.keep(name, handle.clone());
        let backend: Arc<dyn LlmBackend> = Arc::new(handle);
        // Where the configuration has this layer, it is there already.
        let backend = if model.layers.metrics { backend } else { backend.layer(&MetricsLayer::new()) };
        Ok(Model { name: name.to_owned(), backend })
    }

    /// Keeps the handle of a model that has been loaded.
    pub(crate) fn keep(&self, name: &str, handle: ModelHandle) {
        self.handles().entry(name.to_owned()).or_insert(handle);
    }

    /// A model, if it has been loaded.
    pub(crate) fn loaded(&self, name: &str) -> Option<ModelHandle> {
        self.handles().get(name).cloned()
    }

    /// The name of the default model, empty where there is none; why the server cannot answer, where it cannot.
    pub(crate) async fn ready(&self) -> Result<String, String> {
        let config = self.0.models.config();
        let name = match config.model(None) {
            Ok((name, _)) => name.to_owned(),
            // Without a default every request names its model, which is loaded when it is first asked for.
            Err(_) if !config.models.is_empty() => return Ok(String::new()),
            Err(error) => return Err(error.message().to_owned()),
        };
        let Some(handle) = self.loaded(&name) else {
            return Err(format!("the model `{name}` is not loaded yet"));
        };
        // A model that has stopped is loaded again by this. The load goes on if the question is given up.
        let pinned = tokio::spawn(async move { handle.pinned().await.map(drop) });
        match tokio::time::timeout(READY_TIME, pinned).await {
            Ok(Ok(Ok(()))) => Ok(name),
            Ok(Ok(Err(error))) => {
                tracing::warn!(model = name, %error, "the default model cannot answer");
                Err(format!("the model `{name}` cannot answer"))
            }
            _ => Err(format!("the model `{name}` is being loaded")),
        }
    }

    fn handles(&self) -> MutexGuard<'_, HashMap<String, ModelHandle>> {
        self.0.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failures(&self) -> MutexGuard<'_, HashMap<String, (Instant, ApiError)>> {
        self.0.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recent_failure(&self, name: &str) -> Option<ApiError> {
        let failures = self.failures();
        failures.get(name).filter(|(at, _)| at.elapsed() < LOAD_PAUSE).map(|(_, error)| error.clone())
    }

    fn failed(&self, name: &str, error: &Error) -> ApiError {
        tracing::error!(model = name, %error, "a model cannot be loaded");
        let error = ApiError::of(error, "model");
        // What is wrong with a model is no fault of the request.
        let error = if error.status().is_client_error() {
            let message = format!("the model `{name}` cannot be loaded; the log of the server says why");
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "model_unavailable", message)
                .with_retry_after(LOAD_PAUSE)
        } else {
            error
        };
        self.failures().insert(name.to_owned(), (Instant::now(), error.clone()));
        error
    }
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("App").field(&self.0.models).finish()
    }
}

fn unknown<'a>(asked: Option<&str>, names: impl Iterator<Item = &'a str>) -> ApiError {
    let names = names.collect::<Vec<_>>().join(", ");
    match asked {
        Some(asked) => {
            let shown: String = asked.chars().take(100).collect();
            let message = format!("model: no model `{shown}`; there are: {names}");
            ApiError::new(StatusCode::NOT_FOUND, "model_not_found", message).with_param("model")
        }
        None => ApiError::field(
            "model",
            format!("is missing, and no model is the default; one of these expected: {names}"),
        ),
    }
}
