//! `ternion serve`: the models of a configuration by OpenAI's HTTP API.

use std::time::Duration;

use ternion::ErrorKind;
use ternion::models::Models;
use ternion_server::Server;

use crate::App;
use crate::args::EngineArgs;
use crate::args_serve::ServeArgs;
use crate::failure::Outcome;
use crate::model::Selected;

/// What prompts may take to be written after that; less than the margin.
const WRITING: Duration = Duration::from_secs(2);
/// What a server may take after its grace time before the process ends.
const MARGIN: Duration = Duration::from_secs(3);

pub(crate) async fn run(app: &App, args: &ServeArgs) -> Outcome {
    let options = args.server.options()?;
    app.interrupts.end_in_order_within(options.grace + MARGIN);
    let selected = Selected::for_engine(app, &args.engine)?;
    let stop = app.interrupts.renew();
    let models = models(app, &selected, &args.engine).await?;
    let server = Server::new(models.clone(), options)?;
    let bound = server.bind((args.server.host.as_str(), args.server.port))?;
    let url = bound.url();
    if app.output.json {
        app.output.object(&serde_json::json!({ "url": url, "models": models.names() }))?;
    }
    if selected.is_default {
        app.output.notice("no model is named: this is the small test model of the source tree");
    }
    app.output.notice(&format!("listening on {url}: a page to chat on, and OpenAI's API at {url}/v1"));
    let watch = models.watch();

    let shutdown = stop.clone();
    let serving = tokio::spawn(bound.serve(async move { shutdown.cancelled().await }));
    let loaded = tokio::select! {
        loaded = server.load_default() => loaded,
        () = stop.cancelled() => Ok(()),
    };
    if let Err(error) = loaded {
        // A wrong model is better seen at once than by every client.
        stop.cancel();
        return Err(error.into());
    }
    let served = serving.await.map_err(|error| {
        ternion::Error::new(ErrorKind::Backend, "the server has failed")
            .with_source(error)
            .with_operation("serve")
    })?;
    let keeps_prompts = models.config().models.values().any(|model| model.prompt_cache.is_some());
    let unloaded = models.unloaded();
    drop((watch, server, models));
    if keeps_prompts {
        // The last prompts are on their way to the disk.
        let _ = tokio::time::timeout(WRITING, unloaded).await;
    }
    Ok(served?)
}

/// The models to serve. Those of a file follow it while it changes; flags that change the configuration keep it as it is.
async fn models(app: &App, selected: &Selected, flags: &EngineArgs) -> Outcome<Models> {
    let changed = flags.backend.is_some()
        || flags.threads.is_some()
        || flags.pin_threads.is_some()
        || flags.context.is_some()
        || flags.memory_limit.is_some()
        || flags.no_mmap
        || flags.model.name.is_some()
        || flags.model.facts.options() != ternion::formats::CheckpointOptions::default();
    match &selected.file {
        Some(file) if !changed => Ok(Models::load_file(file).await?),
        file => {
            if file.is_some() {
                app.output.notice("flags change the configuration, so changes of its file are not followed");
            }
            let mut config = selected.config.clone();
            config.default_model = Some(selected.name.clone());
            Ok(Models::new(config)?)
        }
    }
}
