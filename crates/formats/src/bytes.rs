//! Bytes with a shared owner: a range of a mapped file, or memory of our own.
//!
//! Weights stay where they lie in the file. Every tensor holds its file's map alive, so a checkpoint may be taken apart
//! and its parts may outlive it.
//!
//! A page of a map counts as this process's memory from the moment that it is touched. Under a limit of memory nothing
//! is touched that need not be: bytes that are only looked at once go through a small buffer, and what an engine streams
//! it reads with [`read_at`](SharedBytes::read_at). Either way the bytes are the same.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use memmap2::{Mmap, MmapMut};
use rayon::prelude::*;
use ternion_core::{Error, ErrorKind, Result};

use crate::watch::OpenFile;

/// Bytes that are read at a time where a file is not to be touched; a whole number of elements of every type.
const PIECE: usize = 4 << 20;

/// Fewer bytes are read by one thread, into memory of the allocator.
const LARGE: usize = 1 << 20;

/// Read-only bytes that are cheap to clone: a range of a mapped file, or of an owned buffer.
#[derive(Clone)]
pub struct SharedBytes {
    owner: Arc<Owner>,
    range: Range<usize>,
    /// No page of the map is to be touched, where there is one.
    untouched: bool,
}

enum Owner {
    Mapped(Mapped),
    Owned(Vec<u8>),
    /// Memory for weights that were read from a file.
    Read(MmapMut),
}

struct Mapped {
    map: Mmap,
    file: Arc<OpenFile>,
}

impl SharedBytes {
    /// Maps the whole of `path`, which must be a regular file (a symbolic link to one is followed).
    ///
    /// # Errors
    /// [`NotFound`](ternion_core::ErrorKind::NotFound) or [`Io`](ternion_core::ErrorKind::Io), naming the file;
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where it is empty or no regular file.
    pub fn map(path: &Path) -> Result<Self> {
        Self::open(path, false)
    }

    /// [`map`](Self::map) for a process with little memory: `pieces` and [`loaded`](Self::loaded) read
    /// the file instead of touching the map.
    ///
    /// # Errors
    /// As [`map`](Self::map).
    pub fn map_untouched(path: &Path) -> Result<Self> {
        Self::open(path, true)
    }

    fn open(path: &Path, untouched: bool) -> Result<Self> {
        let file = OpenFile::open(path)?;
        let map = map_file(&file.file).map_err(|e| Error::io(path, e))?;
        let range = 0..map.len();
        let mapped = Mapped { map, file: Arc::new(file) };
        Ok(Self { owner: Arc::new(Owner::Mapped(mapped)), range, untouched })
    }

    /// Reads the whole of `path` into memory. What becomes of the file later does not matter then.
    ///
    /// # Errors
    /// As [`map`](Self::map), and [`ResourceExhausted`](ErrorKind::ResourceExhausted) without memory.
    pub fn read(path: &Path) -> Result<Self> {
        let file = OpenFile::open(path)?;
        let length = usize::try_from(file.length()).unwrap_or(usize::MAX);
        let mut bytes = reserved(length).map_err(|e| e.with("file", path.display()))?;
        read_parts(&file.file, &mut bytes[..length]).map_err(|e| Error::io(path, e))?;
        Ok(Self::of_memory(bytes, length))
    }

    fn of_memory(bytes: MmapMut, length: usize) -> Self {
        Self { owner: Arc::new(Owner::Read(bytes)), range: 0..length, untouched: false }
    }

    /// The file that these bytes are a part of.
    pub(crate) fn file(&self) -> Option<&Arc<OpenFile>> {
        match &*self.owner {
            Owner::Mapped(mapped) => Some(&mapped.file),
            Owner::Owned(_) | Owner::Read(_) => None,
        }
    }

    /// A part of these bytes with the same owner; `None` where `range` does not lie within them.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.range.len() {
            return None;
        }
        let range = self.range.start + range.start..self.range.start + range.end;
        Some(Self { owner: Arc::clone(&self.owner), range, untouched: self.untouched })
    }

    /// Whether the bytes lie in a mapped file rather than in memory of our own.
    pub fn is_mapped(&self) -> bool {
        matches!(*self.owner, Owner::Mapped(_))
    }

    /// Copies the bytes from `from` on into `out`. Those of a file are read from it without touching its map; a file that
    /// has become shorter gives an error.
    ///
    /// # Errors
    /// [`InvalidRequest`](ErrorKind::InvalidRequest) beyond the end, [`Io`](ErrorKind::Io) where reading fails, naming
    /// the file.
    pub fn read_at(&self, from: usize, out: &mut [u8]) -> Result<()> {
        let end = from.checked_add(out.len()).filter(|end| *end <= self.range.len());
        let end = end.ok_or_else(|| {
            let length = self.range.len();
            Error::invalid_request(format!("{} bytes from {from} on, but there are {length}", out.len()))
        })?;
        match &*self.owner {
            Owner::Owned(_) | Owner::Read(_) => out.copy_from_slice(&self[from..end]),
            Owner::Mapped(mapped) => {
                let at = (self.range.start + from) as u64;
                let OpenFile { file, path, .. } = &*mapped.file;
                read_exact_at(file, at, out).map_err(|e| Error::io(path, e))?;
            }
        }
        Ok(())
    }

    /// Calls `look` with all bytes, piece by piece and in order, and with where each begins, until it returns `false`.
    /// A piece but the last is a whole number of elements of any type.
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io) where reading fails.
    pub(crate) fn pieces(&self, mut look: impl FnMut(usize, &[u8]) -> bool) -> Result<()> {
        if !self.is_untouched() {
            look(0, self);
            return Ok(());
        }
        let mut buffer = vec![0; PIECE.min(self.range.len())];
        for from in (0..self.range.len()).step_by(PIECE) {
            let piece = &mut buffer[..PIECE.min(self.range.len() - from)];
            self.read_at(from, piece)?;
            if !look(from, piece) {
                break;
            }
        }
        Ok(())
    }

    /// What `look` finds in the first part in which it finds something; it is told where each begins. All threads look, each
    /// at parts of its own, which are a whole number of elements of any type.
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io) where reading fails.
    pub(crate) fn find<R: Send>(&self, look: impl Fn(usize, &[u8]) -> Option<R> + Sync) -> Result<Option<R>> {
        const PART: usize = 1 << 20;
        let length = self.range.len();
        let look_at = |buffer: &mut Vec<u8>, part: usize| {
            let range = part * PART..length.min((part + 1) * PART);
            if !self.is_untouched() {
                return Ok(look(range.start, &self[range]));
            }
            buffer.resize(range.len(), 0);
            self.read_at(range.start, buffer)?;
            Ok(look(range.start, buffer))
        };
        let parts = (0..length.div_ceil(PART)).into_par_iter().map_init(Vec::new, look_at);
        let found = parts.find_map_first(|found| match found {
            Ok(None) => None,
            other => Some(other),
        });
        found.transpose().map(Option::flatten)
    }

    /// The bytes where they may be touched: a copy in memory of those of [`map_untouched`](Self::map_untouched), for any
    /// others these themselves.
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io) where reading fails, [`ResourceExhausted`](ErrorKind::ResourceExhausted) without memory.
    pub fn loaded(&self) -> Result<Self> {
        if self.is_untouched() { self.to_memory() } else { Ok(self.clone()) }
    }

    /// A copy in memory.
    ///
    /// # Errors
    /// As [`loaded`](Self::loaded).
    pub fn to_memory(&self) -> Result<Self> {
        let length = self.range.len();
        if length < LARGE {
            let mut bytes = vec![0; length];
            self.read_at(0, &mut bytes)?;
            return Ok(bytes.into());
        }
        let mut bytes = reserved(length)?;
        let parts = bytes[..length].par_chunks_mut(PIECE).enumerate();
        parts.try_for_each(|(i, part)| self.read_at(i * PIECE, part))?;
        Ok(Self::of_memory(bytes, length))
    }

    /// Whether both are the same bytes.
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io) where reading fails.
    pub(crate) fn same_as(&self, other: &Self) -> Result<bool> {
        let mut same = self.range.len() == other.range.len();
        let mut failed = Ok(());
        if same {
            let mut theirs = Vec::new();
            self.pieces(|from, ours| {
                if !other.is_untouched() {
                    same = other[from..from + ours.len()] == *ours;
                    return same;
                }
                theirs.resize(ours.len(), 0);
                failed = other.read_at(from, &mut theirs);
                same = theirs == ours;
                same && failed.is_ok()
            })?;
        }
        failed.map(|()| same)
    }

    pub(crate) fn is_untouched(&self) -> bool {
        self.untouched && self.is_mapped()
    }

    /// The same bytes, read from the file instead of touching its map: for weights that are looked at once. Pages of a map stay
    /// beside what has been made of them until the system wants them back.
    pub(crate) fn untouched(&self) -> Self {
        Self { untouched: true, ..self.clone() }
    }
}

/// Memory for at least `length` bytes, or an error where there is none. Its pages are made by the threads that first write to them. Huge
/// pages are not asked for: the system may take seconds to make room for them, and weights are read no faster.
fn reserved(length: usize) -> Result<MmapMut> {
    MmapMut::map_anon(length.max(1)).map_err(|e| {
        let message = format!("no memory for {length} bytes of weights");
        Error::new(ErrorKind::ResourceExhausted, message).with_source(e)
    })
}

/// Fills `out` with the beginning of a file, on all threads.
fn read_parts(file: &File, out: &mut [u8]) -> std::io::Result<()> {
    let parts = out.par_chunks_mut(PIECE).enumerate();
    parts.try_for_each(|(i, part)| read_exact_at(file, (i * PIECE) as u64, part))
}

#[cfg(unix)]
pub(crate) fn read_exact_at(file: &File, at: u64, out: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, at)
}

#[cfg(not(unix))]
pub(crate) fn read_exact_at(mut file: &File, at: u64, out: &mut [u8]) -> std::io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    // Two threads must not move the position between each other's seek and read.
    static POSITION: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _own = POSITION.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(out))
}

#[allow(unsafe_code)]
fn map_file(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only and private to this process, and bytes are read as they are, never as a type with
    // invalid values. What cannot be excluded is another process that shortens or rewrites the file while it is
    // mapped. `FileWatch` notices that before the next use, but not during one; the documentation says so, and that
    // files are replaced by renaming.
    unsafe { Mmap::map(file) }
}

impl From<Vec<u8>> for SharedBytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Arc::new(Owner::Owned(bytes)), range, untouched: false }
    }
}

impl Deref for SharedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &*self.owner {
            Owner::Mapped(mapped) => &mapped.map,
            Owner::Owned(bytes) => bytes,
            Owner::Read(bytes) => bytes,
        };
        &all[self.range.clone()]
    }
}

impl std::fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = if self.is_mapped() { "mapped" } else { "owned" };
        write!(f, "SharedBytes({kind}, {} bytes)", self.range.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_stay_within_their_parent() {
        let bytes = SharedBytes::from(vec![0, 1, 2, 3, 4, 5]);
        let middle = bytes.slice(2..5).unwrap();
        assert_eq!(&*middle, [2, 3, 4]);
        assert_eq!(&*middle.slice(1..3).unwrap(), [3, 4]);
        assert_eq!(&*middle.slice(3..3).unwrap(), [0u8; 0]);
        assert!(middle.slice(1..4).is_none(), "the parent goes on, the slice does not");
        assert!(middle.slice(usize::MAX..usize::MAX).is_none());
    }

    #[test]
    fn a_file_that_is_not_touched_has_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        let written: Vec<u8> = (0..PIECE + 1000).map(|i| (i * 7 % 251) as u8).collect();
        std::fs::write(&path, &written).unwrap();
        let touched = SharedBytes::map(&path).unwrap().slice(10..PIECE + 900).unwrap();
        let untouched = SharedBytes::map_untouched(&path).unwrap().slice(10..PIECE + 900).unwrap();
        assert!(touched.loaded().unwrap().is_mapped() && !untouched.loaded().unwrap().is_mapped());
        assert_eq!(untouched.loaded().unwrap()[..], written[10..PIECE + 900]);
        for bytes in [&touched, &untouched] {
            let mut seen = Vec::new();
            bytes
                .pieces(|from, piece| {
                    assert_eq!(from, seen.len());
                    seen.extend_from_slice(piece);
                    true
                })
                .unwrap();
            assert!(seen == written[10..PIECE + 900]);
            assert!(bytes.same_as(&touched).unwrap() && bytes.same_as(&untouched).unwrap());
            let other = touched.slice(1..touched.len()).unwrap();
            assert!(!bytes.same_as(&other).unwrap());
        }
        let mut out = [0; 8];
        untouched.read_at(PIECE + 800, &mut out).unwrap();
        assert_eq!(out[..], written[PIECE + 810..PIECE + 818]);
        assert!(untouched.read_at(PIECE + 886, &mut out).unwrap_err().to_string().contains("bytes from"));
        assert!(untouched.read_at(usize::MAX, &mut out).is_err());
    }

    #[test]
    fn a_file_that_has_become_shorter_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, [1; 100]).unwrap();
        let bytes = SharedBytes::map_untouched(&path).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(50).unwrap();
        let error = bytes.read_at(40, &mut [0; 20]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("weights"), "{error}");
        assert!(bytes.loaded().is_err());
    }

    #[test]
    fn a_file_that_is_read_is_no_longer_needed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, [1, 2, 3]).unwrap();
        let bytes = SharedBytes::read(&path).unwrap();
        std::fs::write(&path, b"").unwrap();
        assert!(!bytes.is_mapped() && bytes[..] == [1, 2, 3]);
        assert!(SharedBytes::read(&path).unwrap_err().to_string().contains("empty"));
        assert!(SharedBytes::read(folder.path()).unwrap_err().to_string().contains("is not a file"));
    }

    #[test]
    fn what_cannot_be_mapped_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(SharedBytes::map(folder.path()).unwrap_err().to_string().contains("is not a file"));
        let empty = folder.path().join("empty");
        std::fs::write(&empty, b"").unwrap();
        assert!(SharedBytes::map(&empty).unwrap_err().to_string().contains("empty"));
        assert!(
            SharedBytes::map(&folder.path().join("none")).unwrap_err().to_string().contains("no such file")
        );
    }
}
