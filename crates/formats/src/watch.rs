//! Files of weights that are in use: whether they are still what they were when they were opened.
//!
//! A mapped file is read for as long as its model lives. If another process writes into it, the model computes with a mixture
//! of old and new weights, and if another process shortens it, a read beyond its end kills this one (SIGBUS). So the
//! file is looked at before each step: its length and times cost less than a microsecond. Only where these differ, and
//! once in a while, samples of its contents are hashed too.
//!
//! A file that is replaced by renaming another one into its place, or deleted, does not change: the map keeps the old file.

use std::fs::{File, Metadata};
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ternion_core::{Error, Result, ResultExt};

use crate::SharedBytes;
use crate::bytes::read_exact_at;

/// Files up to this length are hashed whole.
const WHOLE: u64 = 8 << 20;

/// Of longer files so many samples of so many bytes are hashed, from the first bytes to the last.
const SAMPLES: u64 = 256;
const SAMPLE: u64 = 4096;

/// How often the contents are hashed where length and times are as before.
const REHASH: Duration = Duration::from_secs(30);

/// How long the contents are hashed at each check after the times have changed. A write changes the times before it has
/// copied its bytes, so contents that are still the same right after prove nothing.
const SETTLE: Duration = Duration::from_secs(1);

/// What to do, as errors say it.
const ADVICE: &str =
    "load the model again; replace its files by renaming new ones into place, or set `mmap = false`";

/// An open file, and what its metadata were when it was opened.
pub(crate) struct OpenFile {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    opened: Stamp,
}

/// What changes with the contents of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    length: u64,
    modified: Option<SystemTime>,
    /// When the metadata changed, which a program cannot set: seconds and nanoseconds.
    changed: Option<(i64, i64)>,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        let changed = {
            use std::os::unix::fs::MetadataExt;
            Some((metadata.ctime(), metadata.ctime_nsec()))
        };
        #[cfg(not(unix))]
        let changed = None;
        Self { length: metadata.len(), modified: metadata.modified().ok(), changed }
    }
}

impl OpenFile {
    /// Opens a regular file (a symbolic link to one is followed) that is not empty.
    ///
    /// # Errors
    /// [`NotFound`](ternion_core::ErrorKind::NotFound) or [`Io`](ternion_core::ErrorKind::Io), naming the file;
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where it is empty or no regular file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let invalid = |message: &str| Err(Error::invalid_model(message).with("file", path.display()));
        // Checks before opening: opening a pipe waits for its writer.
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return invalid("is not a file, expected a regular file");
        }
        let file = File::open(path).map_err(io)?;
        let opened = Stamp::of(&file.metadata().map_err(io)?);
        if opened.length == 0 {
            return invalid("the file is empty");
        }
        Ok(Self { file, path: path.to_owned(), opened })
    }

    /// Its length when it was opened.
    pub(crate) fn length(&self) -> u64 {
        self.opened.length
    }

    fn stamp(&self) -> Result<Stamp> {
        self.file.metadata().map(|metadata| Stamp::of(&metadata)).map_err(|e| Error::io(&self.path, e))
    }

    fn changed(&self, how: &str) -> Error {
        Error::invalid_model(format!("the file has changed while its model was in use: {how}; {ADVICE}"))
            .with("file", self.path.display())
    }

    fn check_length(&self, stamp: Stamp) -> Result<()> {
        if stamp.length == self.opened.length {
            return Ok(());
        }
        Err(self.changed(&format!("it has {} bytes and had {}", stamp.length, self.opened.length)))
    }

    /// The hash of the whole file, or of samples.
    fn hash(&self) -> Result<u64> {
        let length = self.opened.length;
        let mut hasher = DefaultHasher::new();
        let mut read = |at: u64, count: u64| -> Result<()> {
            let mut buffer = vec![0; count as usize];
            read_exact_at(&self.file, at, &mut buffer).map_err(|e| Error::io(&self.path, e))?;
            hasher.write(&buffer);
            Ok(())
        };
        if length <= WHOLE {
            read(0, length)?;
        } else {
            for i in 0..SAMPLES {
                // Multiplies in 128 bits, because a length may be any 64-bit number.
                let at = u128::from(length - SAMPLE) * u128::from(i) / u128::from(SAMPLES - 1);
                read(at as u64, SAMPLE)?;
            }
        }
        Ok(hasher.finish())
    }
}

/// Watches the files that a model reads its weights from.
///
/// ```no_run
/// use ternion_formats::Checkpoint;
///
/// # fn main() -> ternion_core::Result<()> {
/// let checkpoint = Checkpoint::open("models/bitnet")?;
/// let mut watch = checkpoint.watch()?;
/// // Before each use of the weights:
/// watch.check()?;
/// # Ok(())
/// # }
/// ```
#[derive(Default)]
pub struct FileWatch(Vec<Watched>);

struct Watched {
    file: Arc<OpenFile>,
    hash: u64,
    /// The metadata with which the contents were found to be the same.
    seen: Stamp,
    hashed: Instant,
    /// New metadata, and when a check first found it.
    pending: Option<(Stamp, Instant)>,
}

impl FileWatch {
    /// Watches these files.
    ///
    /// # Errors
    /// Where a file cannot be opened or read.
    pub fn open(paths: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<Self> {
        let files = paths.into_iter().map(|path| OpenFile::open(path.as_ref()).map(Arc::new));
        Self::new(files.collect::<Result<_>>()?)
    }

    /// Watches the files that these bytes are parts of; bytes in memory of our own need no watch.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) if a file has changed since it was opened;
    /// [`Io`](ternion_core::ErrorKind::Io) if it cannot be read.
    pub fn of<'a>(bytes: impl IntoIterator<Item = &'a SharedBytes>) -> Result<Self> {
        let mut files: Vec<Arc<OpenFile>> = Vec::new();
        for file in bytes.into_iter().filter_map(SharedBytes::file) {
            if !files.iter().any(|known| Arc::ptr_eq(known, file)) {
                files.push(Arc::clone(file));
            }
        }
        Self::new(files)
    }

    fn new(files: Vec<Arc<OpenFile>>) -> Result<Self> {
        let watch = |file: Arc<OpenFile>| {
            let hash = file.hash()?;
            // Detects changes during the load and during the hash.
            let seen = file.stamp()?;
            file.check_length(seen)?;
            if seen.modified != file.opened.modified {
                return Err(file.changed("it was written to while it was loaded"));
            }
            Ok(Watched { file, hash, seen, hashed: Instant::now(), pending: None })
        };
        files.into_iter().map(watch).collect::<Result<_>>().map(Self).with_operation("load")
    }

    /// How many files are watched.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no file is watched.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What tells apart the contents of files: the lengths and hashes of the files, in order. Of a file over 8 MiB only samples
    /// count. Names and times do not, so that a copy is the same. Another version of the compiler may give other hashes.
    pub fn fingerprint(&self) -> Vec<u8> {
        self.0.iter().flat_map(|one| [one.file.opened.length, one.hash]).flat_map(u64::to_le_bytes).collect()
    }

    /// An error if one of the files is no longer what it was. A file whose times alone have changed is the same.
    ///
    /// A program that shortens a file right after this check still ends the process with SIGBUS when the lost part is
    /// read. A change of a few bytes in a file over 8 MiB may lie between the samples.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) naming the file, what has changed and what to do;
    /// [`Io`](ternion_core::ErrorKind::Io) if it cannot be looked at.
    pub fn check(&mut self) -> Result<()> {
        self.0.iter_mut().try_for_each(Watched::check)
    }
}

impl Watched {
    fn check(&mut self) -> Result<()> {
        let now = self.file.stamp()?;
        if now == self.seen && self.hashed.elapsed() < REHASH {
            return Ok(());
        }
        self.file.check_length(now)?;
        if self.file.hash()? != self.hash {
            return Err(self.file.changed("its contents are others"));
        }
        match self.pending {
            _ if now == self.seen => self.hashed = Instant::now(),
            Some((stamp, first)) if stamp == now => {
                if first.elapsed() >= SETTLE {
                    (self.seen, self.hashed, self.pending) = (now, Instant::now(), None);
                }
            }
            _ => self.pending = Some((now, Instant::now())),
        }
        Ok(())
    }
}

impl std::fmt::Debug for FileWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|watched| &watched.file.path)).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Seek, SeekFrom, Write};

    use ternion_core::ErrorKind;

    use super::*;

    struct Case {
        _folder: tempfile::TempDir,
        path: PathBuf,
    }

    fn case(length: u64) -> Case {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let bytes: Vec<u8> = (0..length).map(|i| (i * 7 % 251) as u8).collect();
        fs::write(&path, bytes).unwrap();
        Case { _folder: folder, path }
    }

    fn write_at(path: &Path, at: u64, bytes: &[u8]) {
        let mut file = File::options().write(true).open(path).unwrap();
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(bytes).unwrap();
    }

    fn refused(watch: &mut FileWatch, words: &str) {
        for _ in 0..2 {
            let error = watch.check().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidModel);
            let said = error.to_string();
            for words in [words, "model.safetensors", "mmap = false", "renaming"] {
                assert!(said.contains(words), "{said}");
            }
        }
    }

    #[test]
    fn a_file_that_stays_is_the_same() {
        let case = case(1000);
        let mut watch = FileWatch::open([&case.path]).unwrap();
        assert_eq!((watch.len(), watch.is_empty()), (1, false));
        watch.check().unwrap();
        // Other times, the same contents.
        let other = SystemTime::now() - Duration::from_secs(1000);
        File::options().write(true).open(&case.path).unwrap().set_modified(other).unwrap();
        watch.check().unwrap();
        fs::write(&case.path, fs::read(&case.path).unwrap()).unwrap();
        watch.check().unwrap();
        assert!(FileWatch::default().is_empty());
        FileWatch::default().check().unwrap();
    }

    #[test]
    fn every_change_of_length_or_contents_is_noticed() {
        for length in [1000, WHOLE, WHOLE + 1, 3 * WHOLE] {
            let case = case(length);
            let good = fs::read(&case.path).unwrap();
            let mut watch = FileWatch::open([&case.path]).unwrap();
            for (shorter, words) in [(length - 1, "bytes and had"), (0, "it has 0 bytes")] {
                File::options().write(true).open(&case.path).unwrap().set_len(shorter).unwrap();
                refused(&mut watch, words);
            }
            fs::write(&case.path, [&good[..], b"x"].concat()).unwrap();
            refused(&mut watch, "bytes and had");
            fs::write(&case.path, good.iter().map(|byte| !byte).collect::<Vec<_>>()).unwrap();
            refused(&mut watch, "its contents are others");
            // The contents that it had.
            fs::write(&case.path, &good).unwrap();
            watch.check().unwrap();
            for at in [0, length - 1] {
                write_at(&case.path, at, &[!good[at as usize]]);
                refused(&mut watch, "its contents are others");
                write_at(&case.path, at, &[good[at as usize]]);
                watch.check().unwrap();
            }
        }
    }

    /// A part as long as the distance of two samples, wherever it lies.
    #[test]
    fn a_part_of_a_long_file_is_noticed() {
        let length = 5 * WHOLE;
        let case = case(length);
        let mut watch = FileWatch::open([&case.path]).unwrap();
        let part = length / (SAMPLES - 1) + 1;
        let good = fs::read(&case.path).unwrap();
        for at in [1, length / 3, length / 2 + 5, length - part] {
            let range = at as usize..(at + part) as usize;
            let other: Vec<u8> = good[range.clone()].iter().map(|byte| byte ^ 1).collect();
            write_at(&case.path, at, &other);
            refused(&mut watch, "its contents are others");
            write_at(&case.path, at, &good[range]);
            watch.check().unwrap();
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_is_renamed_over_or_deleted_stays() {
        let case = case(1000);
        let mut watch = FileWatch::open([&case.path]).unwrap();
        let other = case.path.with_extension("new");
        fs::write(&other, [1; 500]).unwrap();
        fs::rename(&other, &case.path).unwrap();
        watch.check().unwrap();
        fs::remove_file(&case.path).unwrap();
        watch.check().unwrap();
    }

    #[test]
    fn a_change_before_the_watch_begins_is_noticed() {
        let case = case(1000);
        let bytes = SharedBytes::map(&case.path).unwrap();
        write_at(&case.path, 5, &[0xff]);
        // Not every file system tells times this short apart.
        File::options().write(true).open(&case.path).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let error = FileWatch::of([&bytes]).unwrap_err().to_string();
        assert!(error.contains("while it was loaded"), "{error}");
    }

    #[test]
    fn files_are_watched_once() {
        let case = case(1000);
        let (one, other) = (SharedBytes::map(&case.path).unwrap(), SharedBytes::from(vec![1; 10]));
        let parts = [one.slice(0..10).unwrap(), one.slice(10..20).unwrap(), other];
        assert_eq!(FileWatch::of(&parts).unwrap().len(), 1);
        assert_eq!(FileWatch::of(&parts[2..]).unwrap().len(), 0);
    }
}
