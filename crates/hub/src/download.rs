//! One file, from the hub to the cache.
//!
//! Parts of a large file are fetched side by side and written in order, so that an incomplete file is always the beginning of the
//! whole: whoever comes next, after a kill or on another day, hashes what is there and goes on. Python's library reads and
//! leaves the same.

use std::{
    fmt::Write as _,
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
};

use futures_util::{FutureExt, StreamExt, TryStreamExt, stream};
use reqwest::Url;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use ternion_core::{
    Error, ErrorKind, Result,
    blocking::{blocking, failed},
    config::ByteSize,
    registry::{LoadProgress, Progress},
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    cache::{RepoCache, write_error},
    http::Http,
    progress::Counter,
};

/// The fewest bytes of a part. A file that is not larger is fetched whole.
const LEAST_PART: u64 = 2 << 20;
/// The most bytes of a part.
const MOST_PART: u64 = 16 << 20;
/// Parts of a file, if their size allows it: the hub limits the rate of requests.
const PARTS: u64 = 256;
/// Parts that are fetched at the same time. Each is in memory until it is written.
const PARALLEL: usize = 4;
/// Digits of Git's hash.
const GIT_DIGITS: usize = 40;
/// What errors call the work with files.
const WORK: &str = "the download";

/// A file that has to be fetched.
pub(crate) struct Download {
    pub(crate) name: String,
    pub(crate) url: Url,
    pub(crate) etag: String,
    pub(crate) size: u64,
}

impl Download {
    /// Fetches the file, unless another process does so meanwhile.
    pub(crate) async fn run(
        &self,
        http: &Http,
        repo: &RepoCache,
        counter: &Counter,
        progress: &Progress,
    ) -> Result<()> {
        let waiting = || {
            tracing::info!(file = self.name, "another process downloads the file; waiting for it");
            progress.report(LoadProgress::new("wait", 0, self.size));
        };
        let _lock = repo.lock(&self.etag, waiting).await?;
        if repo.has_blob(&self.etag, self.size) {
            counter.add(self.size);
            return Ok(());
        }
        // What was there before may be wrong from its beginning; then the file is fetched once more as a whole.
        let begun = match self.fetch(http, repo, counter).await {
            Err(Fault::Hash { begun: true, error }) => {
                tracing::warn!(file = self.name, %error, "the beginning of the file was damaged; it is fetched again");
                counter.take_back(self.size);
                self.fetch(http, repo, counter).await
            }
            other => other,
        };
        begun.map_err(Fault::into_error)
    }

    /// Whether the file is fetched whole: the hub need not serve parts of what it keeps in Git, which is named by Git's hash.
    fn is_small(&self) -> bool {
        self.size <= LEAST_PART || self.etag.len() == GIT_DIGITS
    }

    async fn fetch(&self, http: &Http, repo: &RepoCache, counter: &Counter) -> Result<(), Fault> {
        let path = repo.incomplete(&self.etag);
        let is_whole = self.is_small();
        let mut partial = blocking(WORK, {
            let (path, etag, size) = (path.clone(), self.etag.clone(), self.size);
            move || Partial::open(&path, &etag, size, !is_whole)
        })
        .await?;
        let begun = partial.length > 0;
        counter.add(partial.length);
        let part = if is_whole { self.size.max(1) } else { (self.size / PARTS).clamp(LEAST_PART, MOST_PART) };
        let starts = (partial.length..self.size).step_by(part as usize);
        let parts: Vec<_> = starts
            .map(|start| {
                let (http, url, counter) = (http.clone(), self.url.clone(), counter.clone());
                let range = start..(start + part).min(self.size);
                let fetch = async move { http.bytes(&url, range, is_whole, &counter).await };
                async move {
                    // A task of its own, so that it is read while others are written.
                    let task = AbortOnDropHandle::new(tokio::spawn(fetch));
                    task.await.unwrap_or_else(|e| Err(failed(WORK, e)))
                }
                .boxed()
            })
            .collect();
        let mut parts = stream::iter(parts).buffered(PARALLEL);
        while let Some(part) = parts.try_next().await? {
            let target = path.clone();
            partial =
                blocking(WORK, move || partial.append(&part).map_err(|e| write_error(&target, e))).await?;
        }
        let (blob, etag) = (repo.blob(&self.etag), self.etag.clone());
        blocking(WORK, move || Ok(partial.finish(&path, &blob, &etag, begun))).await?
    }
}

/// Why a file could not be fetched.
enum Fault {
    /// Its hash is wrong, and it has been removed.
    Hash {
        /// It had been begun before.
        begun: bool,
        error: Error,
    },
    Other(Error),
}

impl Fault {
    fn into_error(self) -> Error {
        match self {
            Self::Hash { error, .. } | Self::Other(error) => error,
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// The beginning of a file.
struct Partial {
    file: File,
    length: u64,
    hash: Hash,
}

impl Partial {
    /// Opens what is there, and hashes it. Begins anew where it is not to be kept, or cannot be the beginning of `size` bytes.
    fn open(path: &Path, etag: &str, size: u64, keep: bool) -> Result<Self> {
        let io = |e| write_error(path, e);
        let mut file =
            File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        let mut length = file.metadata().map_err(io)?.len();
        if length > size || !keep {
            file.set_len(0).map_err(io)?;
            length = 0;
        }
        let mut hash = Hash::of_etag(etag, size);
        let mut buffer = vec![0; 1 << 20];
        let mut reader = (&mut file).take(length);
        loop {
            match reader.read(&mut buffer).map_err(io)? {
                0 => break,
                count => hash.update(&buffer[..count]),
            }
        }
        Ok(Self { file, length, hash })
    }

    /// At its place rather than at the end, so that two processes without a lock between them write the same.
    fn append(mut self, part: &[u8]) -> std::io::Result<Self> {
        self.file.seek(SeekFrom::Start(self.length))?;
        self.file.write_all(part)?;
        self.hash.update(part);
        self.length += part.len() as u64;
        Ok(self)
    }

    /// Gives the file its name if its hash is right, and removes it if not.
    fn finish(self, path: &Path, blob: &Path, etag: &str, begun: bool) -> Result<(), Fault> {
        let found = self.hash.finish();
        if found.as_deref().is_some_and(|found| !found.eq_ignore_ascii_case(etag)) {
            drop(self.file);
            let _ = std::fs::remove_file(path);
            let error = Error::invalid_model(format!(
                "the file that was downloaded has the hash {}, the hub says {etag}; it has been removed, download it again",
                found.unwrap_or_default()
            ));
            return Err(Fault::Hash { begun, error });
        }
        self.file.sync_all().map_err(|e| write_error(path, e))?;
        drop(self.file);
        std::fs::rename(path, blob).map_err(|e| write_error(blob, e))?;
        Ok(())
    }
}

/// The hash by which the hub names a file.
enum Hash {
    Sha256(Sha256),
    /// Git's: SHA-1 of a header with the length, and the contents.
    Git(Sha1),
    /// A mirror's own. Only the size can be checked.
    Unknown,
}

impl Hash {
    fn of_etag(etag: &str, size: u64) -> Self {
        let is_hex = etag.bytes().all(|b| b.is_ascii_hexdigit());
        match etag.len() {
            64 if is_hex => Self::Sha256(Sha256::new()),
            GIT_DIGITS if is_hex => Self::Git(Sha1::new_with_prefix(format!("blob {size}\0"))),
            _ => Self::Unknown,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git(hash) => hash.update(bytes),
            Self::Unknown => {}
        }
    }

    fn finish(self) -> Option<String> {
        match self {
            Self::Sha256(hash) => Some(hex(&hash.finalize())),
            Self::Git(hash) => Some(hex(&hash.finalize())),
            Self::Unknown => None,
        }
    }
}

/// The SHA-256 of a file, in hexadecimal.
pub(crate) fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(|e| Error::io(path, e))? {
            0 => return Ok(hex(&hash.finalize())),
            count => hash.update(&buffer[..count]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Refuses downloads for which there is no space, before the first begins.
pub(crate) fn check_space(repo: &RepoCache, downloads: &[Download]) -> Result<()> {
    let begun = |etag: &str| std::fs::metadata(repo.incomplete(etag)).map_or(0, |file| file.len());
    let missing = downloads.iter().filter(|file| !repo.has_blob(&file.etag, file.size));
    let needed: u64 = missing.map(|file| file.size.saturating_sub(begun(&file.etag))).sum();
    match fs4::available_space(repo.folder()) {
        Ok(free) if free < needed => Err(Error::new(
            ErrorKind::Io,
            format!(
                "the disk of the cache has {} left, and {} are needed; free space, remove models with `ternion rm`, or set \
                 HF_HUB_CACHE to another disk",
                ByteSize(free),
                ByteSize(needed)
            ),
        )
        .with("path", repo.folder().display())),
        // A file system that cannot tell may have enough.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_files_have_the_hash_of_git() {
        let mut hash = Hash::of_etag("ce013625030ba8dba906f756967f9e9ca394464a", 6);
        hash.update(b"hello\n");
        assert_eq!(hash.finish().as_deref(), Some("ce013625030ba8dba906f756967f9e9ca394464a"));
        assert!(matches!(Hash::of_etag("0123456789abcdef", 1), Hash::Unknown));
    }

    #[test]
    fn a_beginning_that_is_too_long_is_no_beginning() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let opened = |size, keep| {
            std::fs::write(&path, "0123456789").unwrap();
            Partial::open(&path, "0123456789abcdef", size, keep).unwrap().length
        };
        assert_eq!((opened(11, true), opened(10, true), opened(9, true)), (10, 10, 0));
        assert_eq!(opened(11, false), 0);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    }
}
