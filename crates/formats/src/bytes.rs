//! Bytes with a shared owner: a range of a mapped file, or memory of our own.
//!
//! Weights stay where they lie in the file. Every tensor holds its file's map alive, so a checkpoint may be taken apart
//! and its parts may outlive it.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use ternion_core::{Error, Result};

/// Read-only bytes that are cheap to clone: a range of a mapped file, or of an owned buffer.
#[derive(Clone)]
pub struct SharedBytes {
    owner: Arc<Owner>,
    range: Range<usize>,
}

enum Owner {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl SharedBytes {
    /// Maps the whole of `path`, which must be a regular file (a symbolic link to one is followed).
    ///
    /// # Errors
    /// [`NotFound`](ternion_core::ErrorKind::NotFound) or [`Io`](ternion_core::ErrorKind::Io), naming the file;
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where it is empty or no regular file.
    pub fn map(path: &Path) -> Result<Self> {
        // Asked before opening: opening a pipe would wait for its writer.
        let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if !metadata.is_file() {
            return Err(
                Error::invalid_model("is not a file, expected a regular file").with("file", path.display())
            );
        }
        if metadata.len() == 0 {
            return Err(Error::invalid_model("the file is empty").with("file", path.display()));
        }
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let map = map_file(&file).map_err(|e| Error::io(path, e))?;
        let range = 0..map.len();
        Ok(Self { owner: Arc::new(Owner::Mapped(map)), range })
    }

    /// A part of these bytes with the same owner; `None` where `range` does not lie within them.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.range.len() {
            return None;
        }
        let range = self.range.start + range.start..self.range.start + range.end;
        Some(Self { owner: Arc::clone(&self.owner), range })
    }

    /// Whether the bytes lie in a mapped file rather than in memory of our own.
    pub fn is_mapped(&self) -> bool {
        matches!(*self.owner, Owner::Mapped(_))
    }
}

#[allow(unsafe_code)]
fn map_file(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only and private to this process, and bytes are read as they are, never as a type with
    // invalid values. What cannot be excluded is another process that shortens or rewrites the file while it is
    // mapped; every program that maps models shares that condition, and a model file is replaced by renaming.
    unsafe { Mmap::map(file) }
}

impl From<Vec<u8>> for SharedBytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Arc::new(Owner::Owned(bytes)), range }
    }
}

impl Deref for SharedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &*self.owner {
            Owner::Mapped(map) => map,
            Owner::Owned(bytes) => bytes,
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
