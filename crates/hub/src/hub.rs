//! The hub and its cache together: from an address to files that are there.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use futures_util::{FutureExt, StreamExt, TryStreamExt, stream};
use serde::Deserialize;
use ternion_core::{
    Error, ErrorKind, Result, ResultExt, blocking::blocking, file::read_capped, registry::Progress,
};

use crate::{
    Address, KnownModel, Settings,
    address::is_safe_path,
    cache::RepoCache,
    download::{self, Download},
    http::{FileFacts, Http, Revision},
    progress::Counter,
    select::{self, RemoteFile, Selection, select},
};

/// The largest index of shards that is read.
const MAX_INDEX: u64 = 64 << 20;
/// Files that are asked about at the same time.
const QUESTIONS: usize = 8;
/// One of these is a tokenizer.
const TOKENIZERS: [&str; 3] = ["tokenizer.json", "tokenizer.model", "vocab.json"];

/// Downloads models and finds those that are in the cache.
#[derive(Debug, Clone)]
pub struct Hub {
    pub(crate) settings: Settings,
}

/// What of an address is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Model,
    /// The tokenizer alone.
    Tokenizer,
}

impl What {
    fn select(self, all: &[RemoteFile], path: Option<&str>) -> Result<Selection> {
        match self {
            Self::Model => select(all, path),
            Self::Tokenizer => select::select_tokenizer(all, path),
        }
    }
}

/// A model whose files are in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fetched {
    /// The folder or file to open.
    pub path: PathBuf,
    /// The commit that it is of.
    pub commit: String,
    /// Its files, with their paths in the repository and their bytes.
    pub files: Vec<FetchedFile>,
}

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FetchedFile {
    /// Its path in the repository.
    pub name: String,
    /// Its bytes.
    pub size: u64,
    /// Whether it was downloaded just now.
    pub is_new: bool,
}

impl Hub {
    /// The hub and the cache of these settings. Connects to nothing.
    pub fn new(settings: Settings) -> Self {
        Self { settings }
    }

    /// The hub and the cache that the environment names.
    ///
    /// # Errors
    /// As [`Settings::from_env`].
    pub fn from_env() -> Result<Self> {
        Settings::from_env().map(Self::new)
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Where the model at `address` is, for loading it. Asks the hub for the commit that the revision is at and downloads what
    /// is missing. An address with a full commit is looked up in the cache first. Where the hub cannot be asked, a model that is in
    /// the cache is used, with a warning. Must be awaited in a tokio runtime.
    ///
    /// # Errors
    /// As [`fetch`](Self::fetch), where the cache does not have the model either.
    pub async fn resolve(&self, address: &Address, progress: &Progress) -> Result<PathBuf> {
        self.resolve_as(address, What::Model, None, progress).await
    }

    /// [`resolve`](Self::resolve) for the tokenizer of a model alone: its folder, without the weights, or the GGUF file that it is in.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    pub async fn resolve_tokenizer(&self, address: &Address, progress: &Progress) -> Result<PathBuf> {
        self.resolve_as(address, What::Tokenizer, None, progress).await
    }

    /// [`resolve`](Self::resolve) for a model with a short name, of which new files must have the hashes that are recorded for it.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve) and [`fetch_known`](Self::fetch_known).
    pub async fn resolve_known(&self, known: &'static KnownModel, progress: &Progress) -> Result<PathBuf> {
        self.resolve_as(&known.address()?, What::Model, Some(known), progress).await
    }

    async fn resolve_as(
        &self,
        address: &Address,
        what: What,
        known: Option<&'static KnownModel>,
        progress: &Progress,
    ) -> Result<PathBuf> {
        if self.settings.offline || address.is_pinned() {
            let found = self.look(address, what).await;
            if self.settings.offline || found.is_ok() {
                return found;
            }
        }
        let fetched = match known {
            Some(known) => self.fetch_known(known, progress).await,
            None => self.fetch_as(address, what, progress).await,
        };
        let error = match fetched {
            Ok(fetched) => return Ok(fetched.path),
            // Not what was asked for, wherever it is.
            Err(error) if error.kind() == ErrorKind::InvalidModel => return Err(error),
            Err(error) => error,
        };
        let Ok(path) = self.look(address, what).await else { return Err(error) };
        tracing::warn!(%address, %error, "the hub cannot be asked; the model in the cache is used");
        Ok(path)
    }

    /// [`cached`](Self::cached) where blocking is allowed.
    async fn look(&self, address: &Address, what: What) -> Result<PathBuf> {
        let (hub, address) = (self.clone(), address.clone());
        blocking("the look into the cache", move || hub.cached_as(&address, what)).await
    }

    /// Downloads the files of the model at `address` that the cache does not have. Files that have begun are completed. Dropping the
    /// future keeps what has been downloaded. Must be awaited in a tokio runtime.
    ///
    /// # Errors
    /// * [`NotFound`](ErrorKind::NotFound): no such repository, revision or file.
    /// * [`InvalidConfig`](ErrorKind::InvalidConfig): a gated repository without a token that gives access.
    /// * [`Unsupported`](ErrorKind::Unsupported): several models; the message lists them. Or `HF_HUB_OFFLINE` is set.
    /// * [`InvalidModel`](ErrorKind::InvalidModel): a file with a wrong hash.
    /// * [`Io`](ErrorKind::Io), [`Timeout`](ErrorKind::Timeout), [`Busy`](ErrorKind::Busy): the hub cannot be reached, the disk is
    ///   full.
    pub async fn fetch(&self, address: &Address, progress: &Progress) -> Result<Fetched> {
        self.fetch_as(address, What::Model, progress).await
    }

    async fn fetch_as(&self, address: &Address, what: What, progress: &Progress) -> Result<Fetched> {
        self.fetch_now(address, what, progress).await.with("address", address).with_operation("download")
    }

    /// [`fetch`](Self::fetch) for a model with a short name, whose files must have the hashes that are recorded for it.
    ///
    /// # Errors
    /// As [`fetch`](Self::fetch), and [`InvalidModel`](ErrorKind::InvalidModel) for a file with another hash.
    pub async fn fetch_known(&self, known: &'static KnownModel, progress: &Progress) -> Result<Fetched> {
        let address = known.address()?;
        let fetched = self.fetch(&address, progress).await?;
        let snapshot = self.repo(&address).snapshot(&fetched.commit);
        let names: Vec<String> = fetched.files.iter().map(|file| file.name.clone()).collect();
        let check = move || {
            let recorded = |name: &&String| known.sha256.iter().any(|(file, _)| file == name);
            names
                .iter()
                .filter(recorded)
                .try_for_each(|name| known.check(name, &download::sha256(&snapshot.join(name))?))
        };
        blocking("the look into the cache", check)
            .await
            .with("address", address)
            .with_operation("download")?;
        Ok(fetched)
    }

    /// Where the model at `address` is in the cache, without the network. Reads a few folders and an index.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) where the cache does not have all of it.
    pub fn cached(&self, address: &Address) -> Result<PathBuf> {
        self.cached_as(address, What::Model)
    }

    fn cached_as(&self, address: &Address, what: What) -> Result<PathBuf> {
        let why = if self.settings.offline { " and HF_HUB_OFFLINE is set" } else { "" };
        let missing = |what: &str| {
            Error::new(ErrorKind::NotFound, format!("{what}{why}; download it with `ternion pull {address}`"))
                .with("cache", self.settings.cache.display())
                .with_operation("load")
        };
        let repo = self.repo(address);
        let commit = repo.commit(&address.revision).filter(|commit| repo.snapshot(commit).is_dir());
        let commit = commit.ok_or_else(|| missing("the model is not in the cache"))?;
        let all = repo.files(&commit);
        let incomplete = || missing("the model is not complete in the cache");
        let selection = what.select(&all, address.path.as_deref()).map_err(|_| incomplete())?;
        if !is_complete(&repo, &commit, &all, &selection) {
            return Err(incomplete());
        }
        Ok(repo.snapshot(&commit).join(&selection.open))
    }

    pub(crate) fn repo(&self, address: &Address) -> RepoCache {
        RepoCache::new(&self.settings.cache, &address.repo)
    }

    async fn fetch_now(&self, address: &Address, what: What, progress: &Progress) -> Result<Fetched> {
        if self.settings.offline {
            return Err(Error::unsupported("HF_HUB_OFFLINE is set; nothing is downloaded"));
        }
        let http = Http::new(&self.settings)?;
        let asked = http.revision(&address.repo, &address.revision).await;
        let revision = asked.with("endpoint", &self.settings.endpoint)?;
        let selection = what.select(&revision.files, address.path.as_deref())?;
        let fetch =
            Fetch { http, repo: self.repo(address), name: &address.repo, revision: &revision, progress };
        fetch.repo.create()?;
        fetch.repo.set_commit(&address.revision, &revision.commit)?;
        let snapshot = fetch.repo.snapshot(&revision.commit);
        let mut files = Vec::new();
        let mut names = selection.files;
        if let Some(index) = &selection.index {
            // It names the others.
            files.extend(fetch.files(std::slice::from_ref(index)).await?);
            let (folder, index) = (snapshot.clone(), index.clone());
            names.retain(|name| *name != index);
            names.extend(blocking("the look into the cache", move || shards(&folder, &index)).await?);
        }
        files.extend(fetch.files(&names).await?);
        Ok(Fetched { path: snapshot.join(&selection.open), commit: revision.commit, files })
    }
}

/// Whether a snapshot has all files of a model.
fn is_complete(repo: &RepoCache, commit: &str, all: &[RemoteFile], selection: &Selection) -> bool {
    let has = |name: &str| all.iter().any(|file| file.name == name);
    let shards = match &selection.index {
        Some(index) => shards(&repo.snapshot(commit), index),
        None => Ok(Vec::new()),
    };
    let needs_tokenizer = selection.files.iter().any(|name| select::split(name).1 == "config.json");
    let has_tokenizer = selection.files.iter().any(|name| TOKENIZERS.contains(&select::split(name).1));
    shards.is_ok_and(|shards| shards.iter().all(|shard| has(shard)))
        && select::has_all_parts(&selection.files)
        && (has_tokenizer || !needs_tokenizer)
}

/// The download of one model.
struct Fetch<'a> {
    http: Http,
    repo: RepoCache,
    name: &'a str,
    revision: &'a Revision,
    progress: &'a Progress,
}

impl Fetch<'_> {
    /// A file's size, where the description of the repository has it.
    fn listed_size(&self, name: &str) -> Option<u64> {
        self.revision.files.iter().find(|file| file.name == name)?.size
    }

    /// Asks what a file is.
    async fn ask(&self, name: &str) -> Result<Download> {
        let commit = &self.revision.commit;
        let FileFacts { etag, size } = self.http.facts(self.name, commit, name).await.with("file", name)?;
        let size = size.or_else(|| self.listed_size(name)).ok_or_else(|| {
            Error::new(ErrorKind::Io, "the hub does not tell the size of the file").with("file", name)
        })?;
        Ok(Download { name: name.to_owned(), url: self.http.file_url(self.name, commit, name), etag, size })
    }

    /// Sees to it that the snapshot has these files.
    async fn files(&self, names: &[String]) -> Result<Vec<FetchedFile>> {
        let commit = &self.revision.commit;
        let (there, missing): (Vec<&String>, Vec<&String>) =
            names.iter().partition(|name| self.repo.has(commit, name, self.listed_size(name)));
        // All are asked about before the first is fetched, so that the sum of their sizes is known.
        let questions: Vec<_> = missing.into_iter().map(|name| self.ask(name).boxed()).collect();
        let mut downloads: Vec<Download> = stream::iter(questions).buffered(QUESTIONS).try_collect().await?;
        // The small ones first: if they are wrong, it shows before gigabytes have come.
        downloads.sort_by_key(|file| file.size);
        download::check_space(&self.repo, &downloads)?;
        let counter = Counter::new(downloads.iter().map(|file| file.size).sum(), self.progress);
        let mut files: Vec<FetchedFile> = Vec::new();
        for file in &downloads {
            file.run(&self.http, &self.repo, &counter, self.progress).await.with("file", &file.name)?;
            self.repo.link(commit, &file.name, &file.etag)?;
            tracing::info!(file = file.name, bytes = file.size, "downloaded");
            files.push(FetchedFile { name: file.name.clone(), size: file.size, is_new: true });
        }
        let snapshot = self.repo.snapshot(commit);
        files.extend(there.into_iter().map(|name| {
            let size = std::fs::metadata(snapshot.join(name)).map_or(0, |found| found.len());
            FetchedFile { name: name.clone(), size, is_new: false }
        }));
        Ok(files)
    }
}

/// The shards that an index names.
fn shards(snapshot: &Path, index: &str) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let path = snapshot.join(index);
    let invalid = |message: &str| Error::invalid_model(message).with("file", path.display());
    let index_bytes = read_capped(&path, MAX_INDEX, ErrorKind::InvalidModel)?;
    let read: Index = serde_json::from_slice(&index_bytes)
        .map_err(|e| invalid("the index of the shards cannot be read").with_source(e))?;
    let (folder, _) = select::split(index);
    let names: BTreeSet<String> = read.weight_map.into_values().collect();
    if let Some(name) = names.iter().find(|name| !is_safe_path(name)) {
        return Err(
            invalid("the index names a shard outside of its folder").with("shard", name.escape_debug())
        );
    }
    Ok(names.iter().map(|name| select::join(folder, name)).collect())
}
