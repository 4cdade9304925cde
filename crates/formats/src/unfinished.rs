//! Output under a temporary name: it gets its own name when it is complete, and is removed if that never happens.
//!
//! A process that is killed cannot remove what it has begun. On Unix the output is therefore locked while it is written:
//! what nobody holds a lock on is abandoned, and the next run that writes to the same target removes it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use ternion_core::{Error, Result};

/// Between the name of the target and the number of the process that writes it.
const INFIX: &str = ".partial-";

/// Where the output for `target` is written until it is complete; `None` if `target` has no name.
pub fn partial_path(target: &Path) -> Option<PathBuf> {
    let mut name = target.file_name()?.to_owned();
    name.push(format!("{INFIX}{}", std::process::id()));
    Some(target.with_file_name(name))
}

/// A file or folder that is being written.
///
/// Dropped before [`finish`](Self::finish), it removes what has been written.
#[derive(Debug)]
pub struct Unfinished {
    path: PathBuf,
    target: PathBuf,
    /// Held until the output has its name; `None` where the system has no such locks.
    _lock: Option<File>,
}

impl Unfinished {
    /// A temporary file beside `target`. Removes what earlier runs have abandoned.
    ///
    /// # Errors
    /// Where `target` has no name, another process writes to the same place, or nothing can be written there.
    pub fn file(target: &Path) -> Result<Self> {
        Self::begin(target, |path| {
            File::options().write(true).create(true).truncate(false).open(path).map(Some)
        })
    }

    /// A temporary folder beside `target`, with the folders above it. Removes what earlier runs have abandoned.
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub fn folder(target: &Path) -> Result<Self> {
        Self::begin(target, |path| {
            fs::create_dir_all(path)?;
            lock::open_folder(path)
        })
    }

    fn begin(target: &Path, create: impl Fn(&Path) -> io::Result<Option<File>>) -> Result<Self> {
        let path = partial_path(target).ok_or_else(|| {
            Error::invalid_request("the output has no name, expected a new one")
                .with("path", target.display())
        })?;
        remove_abandoned(target);
        let lock = lock::claim(&path, || create(&path))?;
        Ok(Self { path, target: target.to_owned(), _lock: lock })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the output its name, in place of the file or folder that has it now.
    ///
    /// # Errors
    /// Where it cannot be renamed, or what it replaces cannot be removed.
    pub fn finish(self) -> Result<()> {
        let target = &self.target;
        let io = |e| Error::io(target, e);
        if target.is_dir() && self.path.is_dir() && fs::remove_dir(target).is_err() {
            // A folder that is not empty cannot be replaced in one step. The old one stays until the new one is there.
            let mut old = self.path.clone().into_os_string();
            old.push(".old");
            let old = PathBuf::from(old);
            fs::rename(target, &old).map_err(io)?;
            fs::rename(&self.path, target).map_err(io)?;
            match fs::remove_dir_all(&old) {
                // Another run has taken it for abandoned.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(|e| Error::io(&old, e))?,
            }
        } else {
            fs::rename(&self.path, target).map_err(io)?;
        }
        sync_parent(target);
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // A failure is not reported: the error that led here is already on its way.
        let _ = remove(&self.path);
    }
}

fn remove(path: &Path) -> io::Result<()> {
    if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes a rename last. Not every system lets a folder be synchronised; the data itself is.
fn sync_parent(path: &Path) {
    if let Ok(folder) = File::open(parent_of(path)) {
        let _ = folder.sync_all();
    }
}

/// Removes partial output for `target` that no process writes any more. What cannot be removed stays.
fn remove_abandoned(target: &Path) {
    let (Some(name), Ok(entries)) = (target.file_name(), fs::read_dir(parent_of(target))) else { return };
    for entry in entries.flatten() {
        let regular = entry.file_type().is_ok_and(|kind| kind.is_file() || kind.is_dir());
        let path = entry.path();
        match leftover(&entry.file_name(), name) {
            Some(Leftover::Partial) if regular => lock::if_unlocked(&path, || {
                let _ = remove(&path);
            }),
            // Without the target, this is the only copy of what was to be replaced.
            Some(Leftover::Old) if regular && target.exists() => {
                let _ = remove(&path);
            }
            _ => {}
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Leftover {
    /// Incomplete output.
    Partial,
    /// The folder that a complete one has replaced.
    Old,
}

/// What a file called `name` is to a target called `target`.
fn leftover(name: &OsStr, target: &OsStr) -> Option<Leftover> {
    let rest = name.as_encoded_bytes().strip_prefix(target.as_encoded_bytes())?;
    let rest = rest.strip_prefix(INFIX.as_bytes())?;
    let (number, kind) = match rest.strip_suffix(b".old") {
        Some(number) => (number, Leftover::Old),
        None => (rest, Leftover::Partial),
    };
    (!number.is_empty() && number.iter().all(u8::is_ascii_digit)).then_some(kind)
}

/// Locks on files and folders, which the system releases when the process ends in whatever way.
#[cfg(unix)]
mod lock {
    use std::fs::{self, File, TryLockError};
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;
    use std::time::Duration;
    use std::{io, thread};

    use ternion_core::{Error, ErrorKind, Result};

    /// A run that looks for abandoned output holds a lock for a moment.
    const ATTEMPTS: u32 = 50;
    const PAUSE: Duration = Duration::from_millis(10);

    pub(super) fn open_folder(path: &Path) -> io::Result<Option<File>> {
        File::open(path).map(Some)
    }

    /// Creates `path` and locks it; `None` where the file system has no locks.
    pub(super) fn claim(path: &Path, create: impl Fn() -> io::Result<Option<File>>) -> Result<Option<File>> {
        for _ in 0..ATTEMPTS {
            let file = match create() {
                Ok(Some(file)) => file,
                Ok(None) => return Ok(None),
                // Removed between two steps of its creation.
                Err(e) if e.kind() == io::ErrorKind::NotFound && super::parent_of(path).is_dir() => continue,
                Err(e) => return Err(Error::io(path, e)),
            };
            match file.try_lock() {
                Ok(()) if is_at(&file, path) => return Ok(Some(file)),
                // Another run has removed it before it was locked.
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => thread::sleep(PAUSE),
                Err(TryLockError::Error(_)) => return Ok(None),
            }
        }
        Err(Error::new(ErrorKind::Busy, "another process is writing to it").with("path", path.display()))
    }

    /// Calls `then` with the lock on `path`, unless somebody else has it.
    pub(super) fn if_unlocked(path: &Path, then: impl FnOnce()) {
        if let Ok(file) = File::open(path)
            && file.try_lock().is_ok()
        {
            then();
        }
    }

    fn is_at(file: &File, path: &Path) -> bool {
        let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        file.metadata().ok().map(id).is_some_and(|found| fs::metadata(path).ok().map(id) == Some(found))
    }
}

/// No locks: elsewhere they keep the process itself from writing by another handle.
#[cfg(not(unix))]
mod lock {
    use std::fs::File;
    use std::io;
    use std::path::Path;

    use ternion_core::{Error, Result};

    #[allow(clippy::unnecessary_wraps, reason = "as on Unix")]
    pub(super) fn open_folder(_: &Path) -> io::Result<Option<File>> {
        Ok(None)
    }

    pub(super) fn claim(path: &Path, create: impl Fn() -> io::Result<Option<File>>) -> Result<Option<File>> {
        create().map(|_| None).map_err(|e| Error::io(path, e))
    }

    pub(super) fn if_unlocked(_: &Path, _: impl FnOnce()) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_leftovers_are_told_from_others() {
        let of = |name: &str| leftover(OsStr::new(name), OsStr::new("x.gguf"));
        assert_eq!(of("x.gguf.partial-12"), Some(Leftover::Partial));
        assert_eq!(of("x.gguf.partial-12.old"), Some(Leftover::Old));
        for other in
            ["x.gguf", "x.gguf.partial-", "x.gguf.partial-1a", "y.gguf.partial-1", "x.gguf.partial-1.bak"]
        {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn output_gets_its_name_when_it_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let unfinished = Unfinished::file(&target).unwrap();
        fs::write(unfinished.path(), "text").unwrap();
        assert!(!target.exists());
        unfinished.finish().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"text");
        drop(Unfinished::file(&target).unwrap());
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(left, ["out"]);
    }

    #[cfg(unix)]
    #[test]
    fn abandoned_output_is_removed_and_that_of_a_running_process_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let target = at("out");
        fs::create_dir_all(at("out.partial-1/deep")).unwrap();
        fs::write(at("out.partial-2"), "half").unwrap();
        fs::write(at("out.partial-3"), "half").unwrap();
        fs::create_dir(at("out.partial-4.old")).unwrap();
        fs::write(at("out.partial-x"), "a file of somebody").unwrap();
        let running = File::open(at("out.partial-3")).unwrap();
        running.lock().unwrap();

        let unfinished = Unfinished::folder(&target).unwrap();
        assert!(!at("out.partial-1").exists() && !at("out.partial-2").exists());
        assert!(at("out.partial-3").exists() && at("out.partial-x").exists());
        assert!(at("out.partial-4.old").exists(), "the only copy of what was to be replaced");
        unfinished.finish().unwrap();
        drop(Unfinished::folder(&target).unwrap());
        assert!(!at("out.partial-4.old").exists());
        drop(running);
        drop(Unfinished::folder(&target).unwrap());
        assert!(!at("out.partial-3").exists());
    }

    /// In containers the number of the process is often the same.
    #[cfg(unix)]
    #[test]
    fn nothing_of_an_earlier_process_with_the_same_number_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let stale = partial_path(&target).unwrap();
        fs::create_dir(&stale).unwrap();
        fs::write(stale.join("model-00009-of-00009.safetensors"), "stale").unwrap();
        let unfinished = Unfinished::folder(&target).unwrap();
        assert_eq!(fs::read_dir(unfinished.path()).unwrap().count(), 0);
        let second = Unfinished::folder(&target).unwrap_err().to_string();
        assert!(second.contains("another process is writing"), "{second}");
    }
}
