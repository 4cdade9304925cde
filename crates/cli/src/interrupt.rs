//! Ctrl-C: the first cancels what is going on, the second ends the process. Where nothing is going on that can be
//! cancelled, such as reading standard input, the first ends it.
//!
//! At the prompt of a conversation the line editor reads Ctrl-C as a key, so no signal comes here then.

use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

/// The piece of work that Ctrl-C cancels at the moment.
#[derive(Clone, Default)]
pub(crate) struct Interrupts {
    current: Arc<Mutex<CancellationToken>>,
}

impl Interrupts {
    /// Starts to listen. Must be called within the runtime.
    pub(crate) fn listen() -> Self {
        let interrupts = Self::default();
        interrupts.idle();
        let listener = interrupts.clone();
        tokio::spawn(async move {
            // Where signals cannot be had, Ctrl-C keeps what the system makes of it.
            while tokio::signal::ctrl_c().await.is_ok() {
                if listener.is_cancelled() {
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

    /// The token of the current piece of work.
    pub(crate) fn current(&self) -> CancellationToken {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the current piece of work has been cancelled.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.current().is_cancelled()
    }
}
