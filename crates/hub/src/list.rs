//! What is in the cache, and removing it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use ternion_core::{Error, ErrorKind, Result};

use crate::{Address, Hub, address::is_commit, cache::write_error};

/// A repository in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CachedRepo {
    /// `owner/name`.
    pub repo: String,
    /// Its folder.
    pub path: PathBuf,
    /// Bytes that it takes on the disk, with downloads that have begun.
    pub size: u64,
    /// Bytes of downloads that have begun and not ended.
    pub incomplete: u64,
    /// Its revisions.
    pub revisions: Vec<CachedRevision>,
}

/// A revision of a repository in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CachedRevision {
    /// The commit.
    pub commit: String,
    /// The branches and tags that were at it when they were last asked about.
    pub refs: Vec<String>,
    /// Files that are there.
    pub files: usize,
    /// Bytes of them. Revisions share files that are the same.
    pub size: u64,
}

impl Hub {
    /// The models in the cache, by name. Those that Python's library has downloaded are among them.
    ///
    /// # Errors
    /// Where the cache cannot be read. A cache that does not exist is empty.
    pub fn list(&self) -> Result<Vec<CachedRepo>> {
        let mut repos = Vec::new();
        for name in names(&self.settings.cache)? {
            if let Some(repo) = name.strip_prefix("models--").and_then(|rest| rest.split_once("--")) {
                let (owner, name) = repo;
                repos.push(self.describe(&format!("{owner}/{name}")));
            }
        }
        repos.sort_by(|a, b| a.repo.cmp(&b.repo));
        Ok(repos)
    }

    fn describe(&self, repo: &str) -> CachedRepo {
        let cache = crate::cache::RepoCache::new(&self.settings.cache, repo);
        let folder = cache.folder().to_owned();
        let mut refs = Vec::new();
        collect_refs(&folder.join("refs"), "", &mut refs);
        let blobs = names(&folder.join("blobs")).unwrap_or_default();
        let size_of =
            |name: &String| fs::metadata(folder.join("blobs").join(name)).map_or(0, |blob| blob.len());
        let mut commits: Vec<String> = names(&folder.join("snapshots"))
            .unwrap_or_default()
            .into_iter()
            .filter(|name| is_commit(name))
            .collect();
        commits.sort();
        let revisions = commits.into_iter().map(|commit| {
            let files = cache.files(&commit);
            let own = refs.iter().filter(|(_, at)| *at == commit).map(|(name, _)| name.clone()).collect();
            let size = files.iter().filter_map(|file| file.size).sum();
            CachedRevision { commit, refs: own, files: files.len(), size }
        });
        CachedRepo {
            repo: repo.to_owned(),
            size: blobs.iter().map(size_of).sum(),
            incomplete: blobs.iter().filter(|name| name.ends_with(".incomplete")).map(size_of).sum(),
            revisions: revisions.collect(),
            path: folder,
        }
    }

    /// Removes a repository from the cache, with all its revisions and what has been downloaded of others. A process that has
    /// the model loaded keeps its files on Unix. Returns the bytes that are free now.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) where the cache does not have it, [`InvalidConfig`](ErrorKind::InvalidConfig) for an address
    /// of a single file or revision, and those of removing files.
    pub fn remove(&self, address: &Address) -> Result<u64> {
        if address.path.is_some() || address.revision != crate::address::DEFAULT_REVISION {
            return Err(Error::invalid_config(
                "only whole repositories can be removed; expected hf://owner/name",
            )
            .with("address", address));
        }
        let found = self.describe(&address.repo);
        if !found.path.is_dir() {
            return Err(Error::new(ErrorKind::NotFound, "the model is not in the cache")
                .with("address", address)
                .with("cache", self.settings.cache.display()));
        }
        // In this order nothing seems to be there whose contents are gone, if the process is killed meanwhile.
        for name in ["refs", "snapshots", ""] {
            let folder = found.path.join(name);
            match fs::remove_dir_all(&folder) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(write_error(&folder, e)),
                _ => {}
            }
        }
        Ok(found.size)
    }
}

/// The names in a folder; none where it does not exist.
fn names(folder: &Path) -> Result<Vec<String>> {
    match fs::read_dir(folder) {
        Ok(entries) => {
            Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::io(folder, e)),
    }
}

fn collect_refs(folder: &Path, prefix: &str, refs: &mut Vec<(String, String)>) {
    for name in names(folder).unwrap_or_default() {
        let (path, full) = (folder.join(&name), crate::select::join(prefix, &name));
        if path.is_dir() {
            // `refs/pr/1` is three deep.
            if full.matches('/').count() < 4 {
                collect_refs(&path, &full, refs);
            }
        } else if let Ok(commit) = fs::read_to_string(&path) {
            refs.push((full, commit.trim().to_owned()));
        }
    }
}
