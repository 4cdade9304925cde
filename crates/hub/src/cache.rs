//! The cache in the layout of Python's `huggingface_hub`, so that both find what the other has downloaded.
//!
//! ```text
//! models--owner--name/
//!     blobs/<etag>                        contents, named by their hash
//!     blobs/<etag>.incomplete             the beginning of contents that are being downloaded
//!     refs/main                           the commit that a branch or tag is at
//!     snapshots/<commit>/config.json      a relative link to ../../blobs/<etag>
//! .locks/models--owner--name/<etag>.lock  held by the process that downloads
//! ```
//!
//! A blob gets its name when it is complete and its hash is right, and a link is made after that. So what a snapshot shows is
//! complete, file by file, whenever a process is killed.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use ternion_core::{Error, ErrorKind, Result, file::read_capped};

use crate::{address::is_commit, select::RemoteFile};

/// A reference is a commit in hexadecimal.
const MAX_REF_BYTES: u64 = 256;
/// Folders in a snapshot that are looked into.
const MAX_DEPTH: usize = 4;
/// How often a lock is tried that another process has.
const LOCK_POLL: Duration = Duration::from_millis(200);

/// The part of the cache that one repository has.
#[derive(Debug, Clone)]
pub(crate) struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(crate) fn new(cache: &Path, repo: &str) -> Self {
        let name = format!("models--{}", repo.replace('/', "--"));
        Self { folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    pub(crate) fn incomplete(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// Makes the folder of the blobs.
    pub(crate) fn create(&self) -> Result<()> {
        make_folder(&self.folder.join("blobs"))
    }

    /// The commit that a revision is at, as far as the cache knows.
    pub(crate) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let bytes =
            read_capped(&self.folder.join("refs").join(revision), MAX_REF_BYTES, ErrorKind::Io).ok()?;
        let commit = String::from_utf8(bytes).ok()?.trim().to_owned();
        is_commit(&commit).then_some(commit)
    }

    /// Notes the commit that a revision is at.
    pub(crate) fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        make_folder(path.parent().unwrap_or(&self.folder))?;
        let temporary = unique(&path);
        let write = fs::write(&temporary, commit).and_then(|()| fs::rename(&temporary, &path));
        write.map_err(|e| write_error(&path, e))
    }

    /// Whether a snapshot has a file, of this size if one is known.
    pub(crate) fn has(&self, commit: &str, file: &str, size: Option<u64>) -> bool {
        has(&self.snapshot(commit).join(file), size)
    }

    /// Whether a blob is there, of this size.
    pub(crate) fn has_blob(&self, etag: &str, size: u64) -> bool {
        has(&self.blob(etag), Some(size))
    }

    /// Shows a blob as a file of a snapshot.
    pub(crate) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<()> {
        let path = self.snapshot(commit).join(file);
        make_folder(path.parent().unwrap_or(&self.folder))?;
        // `snapshots/<commit>` and the folders of the file.
        let up = "../".repeat(2 + file.matches('/').count());
        let temporary = unique(&path);
        let made = make_link(&format!("{up}blobs/{etag}"), &self.blob(etag), &temporary);
        // In one step, in place of a link that leads nowhere.
        made.and_then(|()| fs::rename(&temporary, &path)).map_err(|e| write_error(&path, e))
    }

    /// The files of a snapshot.
    pub(crate) fn files(&self, commit: &str) -> Vec<RemoteFile> {
        let mut files = Vec::new();
        collect(&self.snapshot(commit), "", MAX_DEPTH, &mut files);
        files.sort_by(|a, b| a.name.cmp(&b.name));
        files
    }

    /// Waits for the lock on a blob, which the system releases when its holder ends in whatever way. `waiting` is called once
    /// where another process holds it. `None` where the file system has no locks.
    pub(crate) async fn lock(&self, etag: &str, waiting: impl FnOnce()) -> Result<Option<File>> {
        let path = self.locks.join(format!("{etag}.lock"));
        make_folder(&self.locks)?;
        let mut waiting = Some(waiting);
        loop {
            let file = File::options().write(true).create(true).truncate(false).open(&path);
            let file = file.map_err(|e| write_error(&path, e))?;
            match file.try_lock() {
                // Its holder may have removed the file; then others make a new one.
                Ok(()) if path.exists() => return Ok(Some(file)),
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    if let Some(waiting) = waiting.take() {
                        waiting();
                    }
                    tokio::time::sleep(LOCK_POLL).await;
                }
                Err(TryLockError::Error(error)) => {
                    tracing::warn!(%error, path = %path.display(), "the file system has no locks");
                    return Ok(None);
                }
            }
        }
    }
}

/// Whether a file is there (links are followed), of this size if one is known.
fn has(path: &Path, size: Option<u64>) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file() && size.is_none_or(|size| size == found.len()))
}

/// A name beside `path` that nobody else uses, in this process or another.
fn unique(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    name.push(format!(".{}-{count}.incomplete", std::process::id()));
    path.with_file_name(name)
}

#[cfg(unix)]
fn make_link(relative: &str, _: &Path, at: &Path) -> io::Result<()> {
    let _ = fs::remove_file(at);
    std::os::unix::fs::symlink(relative, at)
}

/// Links need rights that users seldom have. Python's library copies in their place too.
#[cfg(not(unix))]
fn make_link(_: &str, blob: &Path, at: &Path) -> io::Result<()> {
    let _ = fs::remove_file(at);
    fs::hard_link(blob, at).or_else(|_| fs::copy(blob, at).map(drop))
}

fn collect(folder: &Path, prefix: &str, depth: usize, files: &mut Vec<RemoteFile>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (Ok(name), path) = (entry.file_name().into_string(), entry.path()) else { continue };
        let name = crate::select::join(prefix, &name);
        match fs::metadata(&path) {
            Ok(found) if found.is_file() && !name.ends_with(".incomplete") => {
                files.push(RemoteFile { name, size: Some(found.len()) });
            }
            Ok(found) if found.is_dir() && depth > 0 => collect(&path, &name, depth - 1, files),
            // A link whose blob is gone.
            _ => {}
        }
    }
}

pub(crate) fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| write_error(path, e))
}

/// The error of writing to the cache.
pub(crate) fn write_error(path: &Path, error: io::Error) -> Error {
    let message = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "the disk of the cache is full; free space, remove models with `ternion rm`, or set HF_HUB_CACHE to another disk"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "the cache cannot be written; set HF_HUB_CACHE to a folder that can"
        }
        _ => "the cache cannot be written",
    };
    Error::new(ErrorKind::Io, message).with("path", path.display()).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789012345678901234567890123456789";

    #[test]
    fn a_snapshot_shows_what_is_complete() {
        let root = tempfile::tempdir().unwrap();
        let repo = RepoCache::new(root.path(), "a/b");
        repo.create().unwrap();
        fs::write(repo.blob("etag-of-the-file"), "text").unwrap();
        fs::write(repo.incomplete("etag-of-another"), "te").unwrap();
        repo.link(COMMIT, "onnx/deep/x.onnx", "etag-of-the-file").unwrap();
        repo.link(COMMIT, "gone.json", "etag-of-a-file-that-is-gone").unwrap();
        let files: Vec<String> = repo.files(COMMIT).into_iter().map(|file| file.name).collect();
        assert_eq!(files, ["onnx/deep/x.onnx"]);
        assert!(
            repo.has(COMMIT, "onnx/deep/x.onnx", Some(4)) && !repo.has(COMMIT, "onnx/deep/x.onnx", Some(5))
        );
        assert!(!repo.has(COMMIT, "gone.json", None));
        // A second link takes the place of the first.
        repo.link(COMMIT, "gone.json", "etag-of-the-file").unwrap();
        assert!(repo.has(COMMIT, "gone.json", Some(4)));
    }

    #[test]
    fn references_are_commits() {
        let root = tempfile::tempdir().unwrap();
        let repo = RepoCache::new(root.path(), "a/b");
        assert_eq!(repo.commit("main"), None);
        repo.set_commit("refs/pr/1", COMMIT).unwrap();
        assert_eq!(repo.commit("refs/pr/1").as_deref(), Some(COMMIT));
        assert_eq!(repo.commit(COMMIT).as_deref(), Some(COMMIT));
        fs::write(root.path().join("models--a--b/refs/broken"), "../../etc").unwrap();
        assert_eq!(repo.commit("broken"), None);
    }
}
