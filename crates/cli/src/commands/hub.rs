//! `ternion pull`, `list` and `rm`: models of the Hugging Face Hub and their cache.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;
use ternion::config::ByteSize;
use ternion::hub::{Address, Fetched, Hub, KnownModel};
use ternion::registry::Progress;
use tokio::runtime::Handle;

use super::blocking;
use crate::App;
use crate::args::{PullArgs, RmArgs};
use crate::failure::{Failure, Outcome};
use crate::output::Bar;

/// A model of the hub, as the command line names it.
#[derive(Debug, Clone)]
pub(crate) struct HubModel {
    pub(crate) address: Address,
    known: Option<&'static KnownModel>,
}

impl HubModel {
    /// The model that a text names by its address or its short name; `None` if it does neither.
    pub(crate) fn named(text: &str) -> Outcome<Option<Self>> {
        if let Some(known) = KnownModel::named(text) {
            return Ok(Some(Self { address: known.address()?, known: Some(known) }));
        }
        Ok(Address::of_path(Path::new(text))?.map(|address| Self { address, known: None }))
    }

    fn expected(text: &str) -> Outcome<Self> {
        let unknown = || {
            let names: Vec<&str> = KnownModel::ALL.iter().map(|known| known.name).collect();
            Failure::usage(format!(
                "`{text}` is no model of the hub; expected hf://owner/name[@revision][/file-or-folder], or one of: {}",
                names.join(", ")
            ))
        };
        Self::named(text)?.ok_or_else(unknown)
    }

    /// What the model is called where it has no other name.
    pub(crate) fn name(&self) -> String {
        let last = |path: &str| Path::new(path).file_stem().map(|name| name.to_string_lossy().into_owned());
        let file = self.address.path.as_deref().and_then(last);
        file.unwrap_or_else(|| self.address.repo.rsplit('/').next().unwrap_or_default().to_owned())
    }

    /// Where its files are, after they were downloaded if that is needed.
    pub(crate) fn local(&self, app: &App) -> Outcome<PathBuf> {
        tokio::task::block_in_place(|| Handle::current().block_on(self.resolve(app)))
    }

    async fn resolve(&self, app: &App) -> Outcome<PathBuf> {
        let hub = Hub::from_env()?;
        let (bar, progress) = shown(app);
        let work = async {
            match self.known {
                Some(known) => hub.resolve_known(known, &progress).await,
                None => hub.resolve(&self.address, &progress).await,
            }
        };
        interruptible(app, &bar, work).await
    }

    async fn fetch(&self, app: &App) -> Outcome<Fetched> {
        let hub = Hub::from_env()?;
        let (bar, progress) = shown(app);
        let work = async {
            match self.known {
                Some(known) => hub.fetch_known(known, &progress).await,
                None => hub.fetch(&self.address, &progress).await,
            }
        };
        interruptible(app, &bar, work).await
    }
}

/// Ctrl-C ends a download. What has come stays, and the next one goes on from there.
async fn interruptible<T>(
    app: &App,
    bar: &Bar,
    work: impl Future<Output = ternion::Result<T>>,
) -> Outcome<T> {
    let interrupted = app.interrupts.renew();
    let done = tokio::select! {
        result = work => result.map_err(Failure::from),
        () = interrupted.cancelled() => Err(Failure::Interrupted),
    };
    bar.clear();
    app.interrupts.idle();
    done
}

/// How far a download is: a bar on a terminal, elsewhere a line for each tenth.
fn shown(app: &App) -> (Bar, Progress) {
    let bar = app.output.bytes("download");
    let (own, output, tenths) = (bar.clone(), app.output.clone(), AtomicU64::new(0));
    let progress = Progress::new(move |p| {
        own.stage(p.stage);
        own.set(p.done, p.total);
        if p.stage == "wait" {
            output.progress("waiting for another process that downloads the model");
            return;
        }
        let tenth = (p.done * 10).checked_div(p.total).unwrap_or(0);
        if tenths.fetch_max(tenth, Ordering::Relaxed) < tenth {
            output.progress(&format!("download: {} of {}", ByteSize(p.done), ByteSize(p.total)));
        }
    });
    (bar, progress)
}

pub(crate) async fn pull(app: &App, args: &PullArgs) -> Outcome {
    let model = HubModel::expected(&args.model)?;
    let fetched = model.fetch(app).await?;
    let total: u64 = fetched.files.iter().map(|file| file.size).sum();
    let new: u64 = fetched.files.iter().filter(|file| file.is_new).map(|file| file.size).sum();
    if app.output.json {
        let files: Vec<_> = fetched
            .files
            .iter()
            .map(|file| json!({"name": file.name, "size": file.size, "downloaded": file.is_new}))
            .collect();
        return app.output.object(&json!({
            "address": model.address.to_string(),
            "commit": fetched.commit,
            "path": fetched.path.to_string_lossy(),
            "size": total,
            "downloaded": new,
            "files": files,
        }));
    }
    app.output.notice(&format!(
        "{}: {} files, {}, of which {} downloaded now; commit {}",
        model.address,
        fetched.files.len(),
        ByteSize(total),
        ByteSize(new),
        short(&fetched.commit)
    ));
    app.output.line(&fetched.path.display().to_string())
}

pub(crate) fn list(app: &App) -> Outcome {
    let hub = Hub::from_env()?;
    let repos = blocking(app, || hub.list())?;
    if app.output.json {
        let models: Vec<_> = repos
            .iter()
            .map(|repo| {
                let revisions = repo.revisions.iter().map(|revision| {
                    json!({"commit": revision.commit, "refs": revision.refs, "files": revision.files, "size": revision.size})
                });
                json!({
                    "address": format!("hf://{}", repo.repo),
                    "path": repo.path.to_string_lossy(),
                    "size": repo.size,
                    "incomplete": repo.incomplete,
                    "revisions": revisions.collect::<Vec<_>>(),
                })
            })
            .collect();
        return app
            .output
            .object(&json!({"cache": hub.settings().cache.to_string_lossy(), "models": models}));
    }
    for repo in &repos {
        let revision = |revision: &ternion::hub::CachedRevision| match &revision.refs[..] {
            [] => short(&revision.commit).to_owned(),
            refs => format!("{} ({})", refs.join(", "), short(&revision.commit)),
        };
        let mut revisions = repo.revisions.iter().map(revision).collect::<Vec<_>>().join("; ");
        if repo.incomplete > 0 {
            revisions += &format!("; {} of a download that has not ended", ByteSize(repo.incomplete));
        }
        let address = format!("hf://{}", repo.repo);
        app.output.line(&format!("{address:<48} {:>10}  {revisions}", ByteSize(repo.size).to_string()))?;
    }
    let total = ByteSize(repos.iter().map(|repo| repo.size).sum());
    let models = if repos.len() == 1 { "model" } else { "models" };
    app.output.notice(&format!("{} {models}, {total}, in {}", repos.len(), hub.settings().cache.display()));
    Ok(())
}

pub(crate) fn rm(app: &App, args: &RmArgs) -> Outcome {
    let hub = Hub::from_env()?;
    let models = args.models.iter().map(|name| HubModel::expected(name)).collect::<Outcome<Vec<_>>>()?;
    let mut removed = Vec::new();
    for model in models {
        let mut address = model.address;
        if model.known.is_some() {
            // The short name of a file stands for its repository here.
            address.path = None;
        }
        let size = blocking(app, || hub.remove(&address))?;
        app.output.notice(&format!("{address}: {} removed", ByteSize(size)));
        removed.push(json!({"address": address.to_string(), "size": size}));
    }
    if app.output.json { app.output.object(&json!({"removed": removed})) } else { Ok(()) }
}

/// The beginning of a commit, which is enough for people.
fn short(commit: &str) -> &str {
    commit.get(..8).unwrap_or(commit)
}
