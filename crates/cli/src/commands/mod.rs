//! One file for each subcommand, and what several of them do alike: loading a model.

pub(crate) mod answer;
mod backends;
pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod chunk;
#[cfg(feature = "conformance")]
pub(crate) mod conformance;
#[cfg(feature = "conformance")]
pub(crate) mod contract;
pub(crate) mod conversation;
pub(crate) mod convert;
pub(crate) mod count;
pub(crate) mod embed;
#[cfg(feature = "eval")]
pub(crate) mod eval;
pub(crate) mod expectation;
pub(crate) mod generate;
#[cfg(feature = "hub")]
pub(crate) mod hub;
pub(crate) mod inspect;
pub(crate) mod logits;
pub(crate) mod long;
mod overview;
mod safetensors;
pub(crate) mod schema;
#[cfg(feature = "serve")]
pub(crate) mod serve;
pub(crate) mod synth;
pub(crate) mod verify;

use std::sync::Arc;

use ternion::LlmBackend;

use crate::App;
use crate::failure::{Failure, Outcome};
use crate::model::Selected;

/// Loads a model with a bar; Ctrl-C ends the wait.
pub(crate) async fn load(app: &App, selected: &Selected) -> Outcome<Arc<dyn LlmBackend>> {
    let interrupted = app.interrupts.renew();
    let bar = app.output.bytes("load");
    let loaded = tokio::select! {
        result = ternion::load_with_progress(&selected.config, Some(&selected.name), bar.progress()) => result,
        () = interrupted.cancelled() => {
            bar.clear();
            return Err(Failure::Interrupted);
        }
    };
    bar.clear();
    app.interrupts.idle();
    let backend = loaded?;
    if let Some(plan) = backend.info().memory.as_ref().filter(|plan| plan.limit.is_some()) {
        app.output.notice(&format!("memory: {plan}"));
        for choice in &plan.choices {
            app.output.notice(&format!("memory: {choice}"));
        }
    }
    Ok(backend)
}

/// Waits until a model is gone, which has then written its prompt cache. Ctrl-C ends the wait.
pub(crate) async fn unload(app: &App, backend: Arc<dyn LlmBackend>) {
    let interrupted = app.interrupts.renew();
    let gone = backend.unloaded();
    drop(backend);
    tokio::select! {
        () = gone => {}
        () = interrupted.cancelled() => {}
    }
    app.interrupts.idle();
}

/// Runs blocking work of a command that only reads or writes files, so that Ctrl-C ends it as it ends any program.
pub(crate) fn blocking<T>(app: &App, work: impl FnOnce() -> T) -> T {
    app.interrupts.idle();
    tokio::task::block_in_place(work)
}
