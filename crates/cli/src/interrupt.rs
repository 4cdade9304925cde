//! Ctrl-C: the first cancels what is going on, the second ends the process. Where nothing is going on that can be
//! cancelled, such as reading standard input, the first ends it.
//!
//! At the prompt of a conversation the line editor reads Ctrl-C as a key, so no signal comes here then.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ternion::formats::partial_path;

use tokio_util::sync::CancellationToken;

/// The piece of work that Ctrl-C cancels at the moment.
#[derive(Clone, Default)]
pub(crate) struct Interrupts {
    current: Arc<Mutex<CancellationToken>>,
    leftovers: Arc<Mutex<Vec<PathBuf>>>,
}

impl Interrupts {
    /// Starts to listen. Must be called within the runtime.
    pub(crate) fn listen() -> Self {
        let interrupts = Self::default();
        interrupts.idle();
        let listener = interrupts.clone();
        // From here on, not only from when the task runs: the first signal would end the process without a word.
        #[cfg(unix)]
        let signals = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt());
        #[cfg(windows)]
        let signals = tokio::signal::windows::ctrl_c();
        // Where signals cannot be had, Ctrl-C keeps what the system makes of it.
        let Ok(mut signals) = signals else { return interrupts };
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                if listener.is_cancelled() {
                    listener.remove_leftovers();
                    std::process::exit(130);
                }
                listener.current().cancel();
            }
        });
        interrupts
    }

    /// A new token for the next piece of work.
    pub(crate) fn renew(&self) -> CancellationToken {
        let token = CancellationToken::new();
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = token.clone();
        token
    }

    /// Nothing that looks at a token is going on.
    pub(crate) fn idle(&self) {
        self.renew().cancel();
    }

    /// While `work` writes to `target`, an end by Ctrl-C removes what has been written of it.
    pub(crate) fn writing<T>(&self, target: &Path, work: impl FnOnce() -> T) -> T {
        match partial_path(target) {
            Some(path) => self.using(&path, work),
            None => work(),
        }
    }

    /// While `work` needs the file or folder `path`, an end by Ctrl-C removes it.
    pub(crate) fn using<T>(&self, path: &Path, work: impl FnOnce() -> T) -> T {
        let leftovers = || self.leftovers.lock().unwrap_or_else(PoisonError::into_inner);
        leftovers().push(path.to_owned());
        let result = work();
        leftovers().retain(|left| left != path);
        result
    }

    fn remove_leftovers(&self) {
        for path in &*self.leftovers.lock().unwrap_or_else(PoisonError::into_inner) {
            // It may not be there yet, and there is nobody left to tell that it cannot be removed.
            let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
        }
    }

    /// The token of the current piece of work.
    pub(crate) fn current(&self) -> CancellationToken {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the current piece of work has been cancelled.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.current().is_cancelled()
    }
}
