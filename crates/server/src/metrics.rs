//! `GET /metrics`: what the facade `metrics` has counted, for Prometheus.

use std::{
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use metrics::gauge;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use ternion::{Error, LlmBackend, ProcessMemory, Result};

use crate::state::App;

/// Seconds, from the first token of a small model to the end of a long answer.
const BUCKETS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// How often samples of histograms are added up.
const UPKEEP: Duration = Duration::from_secs(5);

/// The recorder of this process. The facade has one for all; several servers in one process share it.
///
/// # Errors
/// If the host has installed another recorder.
pub(crate) fn recorder() -> Result<PrometheusHandle> {
    static INSTALLED: OnceLock<PrometheusHandle> = OnceLock::new();
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(handle) = INSTALLED.get() {
        return Ok(handle.clone());
    }
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &BUCKETS)
        .map_err(|error| {
            Error::invalid_config("the buckets of histograms are not valid").with_source(error)
        })?;
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    // A host with a recorder of its own keeps it and reads the numbers there.
    if metrics::set_global_recorder(recorder).is_err() {
        tracing::warn!(
            "the process has a recorder of metrics already; `/metrics` of this server stays empty"
        );
    }
    let handle = INSTALLED.get_or_init(|| handle).clone();
    // Samples of histograms are kept until somebody adds them up, and it may be that nobody asks for the metrics.
    let upkeep = handle.clone();
    let add_up = move || {
        loop {
            std::thread::sleep(UPKEEP);
            upkeep.run_upkeep();
        }
    };
    let thread = std::thread::Builder::new().name("ternion-metrics".to_owned());
    if let Err(error) = thread.spawn(add_up) {
        tracing::warn!(%error, "metrics are added up only when they are asked for");
    }
    Ok(handle)
}

pub(crate) async fn get(State(app): State<App>) -> Response {
    for name in app.models().names() {
        if let Some(model) = app.loaded(&name) {
            let stats = model.stats();
            gauge!("ternion_sequences_active", "model" => name.clone()).set(stats.active as f64);
            gauge!("ternion_sequences_queued", "model" => name).set(stats.queued as f64);
        }
    }
    if let Some(bytes) = ProcessMemory::now().and_then(|memory| memory.anonymous) {
        gauge!("ternion_process_anonymous_bytes").set(bytes as f64);
    }
    app.metrics().run_upkeep();
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], app.metrics().render()).into_response()
}
