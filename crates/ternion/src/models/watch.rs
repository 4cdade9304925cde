//! Looks at the configuration file from time to time and makes its changes take effect.
//!
//! The file is read and compared with what it was, rather than asking the system for notifications: that sees the same
//! on every file system (network folders and mounted volumes send none), and needs no care for editors that put a new
//! file in the old one's place or for links that point elsewhere. A configuration is a page of text; reading it twice a
//! second costs nothing that can be measured.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use ternion_core::{Error, ErrorKind, Result, file::read_capped};
use tokio::task::JoinHandle;

use super::{Inner, Models};

/// Watches the configuration file of a [`Models`] until it is dropped.
#[derive(Debug)]
#[must_use = "the file is watched until this is dropped"]
pub struct Watch(JoinHandle<()>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Models {
    /// Watches the file that the models come from, and [reloads](Self::reload) when it changes. A look is taken every
    /// `reload.poll_ms`; a change takes effect when two looks have found the same, so that a file which is just being
    /// written is left alone. Must be called in a tokio runtime.
    ///
    /// A model that has stopped by itself is loaded again at the next look.
    ///
    /// A file that cannot be read or is no valid configuration changes nothing; it is reported once, as an
    /// [event](Self::events), and its next change is tried again.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) if the models do not come from a file.
    pub fn watch(&self) -> Result<Watch> {
        let Some(path) = self.0.path.clone() else {
            return Err(Error::unsupported("these models come from no file that could be watched")
                .with_operation("watch"));
        };
        Ok(Watch(tokio::spawn(watch(path, Arc::downgrade(&self.0)))))
    }
}

/// What was seen of the file.
type Look = std::result::Result<Vec<u8>, ErrorKind>;

async fn watch(path: PathBuf, models: Weak<Inner>) {
    // The first look that is confirmed is acted on: the file may have changed since it was loaded.
    let mut acted_on: Option<Look> = None;
    let mut last: Option<Look> = None;
    loop {
        let Some(inner) = models.upgrade() else { return };
        let interval = Duration::from_millis(inner.poll_ms());
        let seen = look(&path).await;
        let confirmed = last.as_ref() == Some(&seen);
        if confirmed && acted_on.as_ref() != Some(&seen) {
            acted_on = Some(seen.clone());
            // Its failure is an event already.
            let _ = Models(Arc::clone(&inner)).reload().await;
        } else {
            inner.revive().await;
        }
        drop(inner);
        last = Some(seen);
        tokio::time::sleep(interval).await;
    }
}

async fn look(path: &Path) -> Look {
    let path = path.to_owned();
    // More than a configuration may have is not looked at; the reload will say so.
    let read = move || read_capped(&path, 2 << 20, ErrorKind::InvalidConfig).map_err(|e| e.kind());
    tokio::task::spawn_blocking(read).await.unwrap_or(Err(ErrorKind::Io))
}
