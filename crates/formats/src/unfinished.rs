//! Output under a temporary name: it gets its own when it is whole, and is removed where that never comes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use ternion_core::{Error, Result};

/// Where what is written to `target` lies until it is whole; `None` where `target` has no name. A process that is ended
/// in the middle leaves it there.
pub fn partial_path(target: &Path) -> Option<PathBuf> {
    let name = target.file_name()?.to_string_lossy();
    Some(target.with_file_name(format!("{name}.partial-{}", std::process::id())))
}

/// A file or folder that is being written.
pub(crate) struct Unfinished {
    path: PathBuf,
    target: PathBuf,
}

impl Unfinished {
    /// A temporary name beside `target`, where nothing is yet.
    pub(crate) fn new(target: &Path) -> Result<Self> {
        let path = partial_path(target).ok_or_else(|| {
            Error::invalid_request("the output has no name, expected a new one")
                .with("path", target.display())
        })?;
        Ok(Self { path, target: target.to_owned() })
    }

    /// A new folder, with the folders above it.
    pub(crate) fn folder(target: &Path) -> Result<Self> {
        let unfinished = Self::new(target)?;
        fs::create_dir_all(&unfinished.path).map_err(|e| Error::io(&unfinished.path, e))?;
        Ok(unfinished)
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its name, in place of the file or checkpoint that may have it.
    pub(crate) fn finish(self) -> Result<()> {
        let target = &self.target;
        let io = |e| Error::io(target, e);
        if target.is_dir() && self.path.is_dir() && fs::remove_dir(target).is_err() {
            // A folder that is not empty cannot be replaced in one step. The old one stays until the new one is there.
            let mut old = self.path.clone().into_os_string();
            old.push(".old");
            let old = PathBuf::from(old);
            fs::rename(target, &old).map_err(io)?;
            fs::rename(&self.path, target).map_err(io)?;
            fs::remove_dir_all(&old).map_err(|e| Error::io(&old, e))?;
        } else {
            fs::rename(&self.path, target).map_err(io)?;
        }
        sync_parent(target);
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Nothing better can be done with a failure here: the error that led here is already on its way.
        if self.path.is_dir() {
            let _ = fs::remove_dir_all(&self.path);
        } else if self.path.exists() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes a rename last. Not every system lets a folder be synchronised; the data itself is.
fn sync_parent(path: &Path) {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if let Ok(folder) = File::open(parent) {
        let _ = folder.sync_all();
    }
}
