//! What ends a command from outside.
//!
//! The first Ctrl-C cancels the current work, the second ends the process. Where nothing can be cancelled, such as the
//! wait for standard input, the first ends it. SIGTERM, and SIGHUP when the terminal is closed, do both: what can be cancelled
//! has a moment to end in order. An end by a signal removes partial files and restores the terminal.
//!
//! At the prompt of a conversation the line editor reads Ctrl-C as a key, so it sends no signal.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use ternion::formats::partial_path;
use tokio_util::sync::CancellationToken;

use crate::terminal::Terminal;

/// How long cancelled work may take to end after SIGTERM. A container is killed some seconds later.
const GRACE: Duration = Duration::from_millis(500);

/// Why the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// Ctrl-C, SIGINT.
    Interrupt,
    /// SIGTERM, or on Windows the end of the session.
    Terminate,
    /// SIGHUP.
    #[cfg_attr(windows, expect(dead_code, reason = "a closed console counts as the end of the session"))]
    HangUp,
}

impl Signal {
    /// 128 and the signal's number, as shells report it.
    pub(crate) fn exit_code(self) -> u8 {
        128 + match self {
            Self::HangUp => 1,
            Self::Interrupt => 2,
            Self::Terminate => 15,
        }
    }
}

/// The work that a signal cancels at the moment, and what it must tidy up.
#[derive(Clone, Default)]
pub(crate) struct Interrupts {
    current: Arc<Mutex<CancellationToken>>,
    leftovers: Arc<Mutex<Vec<PathBuf>>>,
    terminal: Arc<Mutex<Option<Terminal>>>,
    ended_by: Arc<OnceLock<Signal>>,
    /// The work ends in order by itself after a signal, in at most this time.
    patience: Arc<OnceLock<Duration>>,
}

impl Interrupts {
    /// Starts to listen. Must be called within the runtime.
    pub(crate) fn listen() -> Self {
        let interrupts = Self::default();
        interrupts.idle();
        let listener = interrupts.clone();
        // The handlers are installed here and not in the task: a signal before it runs must not be lost.
        let mut signals = source::Signals::listen();
        tokio::spawn(async move {
            while let Some(signal) = signals.next().await {
                listener.on(signal);
            }
        });
        interrupts
    }

    fn on(&self, signal: Signal) {
        let ends = signal != Signal::Interrupt;
        if ends && self.ended_by.set(signal).is_err() {
            // The grace period of the first one goes on.
            return;
        }
        if self.is_cancelled() {
            self.end(signal);
        }
        self.current().cancel();
        if ends {
            let interrupts = self.clone();
            let grace = self.patience.get().copied().unwrap_or(GRACE);
            std::thread::spawn(move || {
                std::thread::sleep(grace);
                interrupts.end(signal);
            });
        }
    }

    /// Tidies up and ends the process.
    fn end(&self, signal: Signal) -> ! {
        self.remove_leftovers();
        if let Some(terminal) = &*self.terminal.lock().unwrap_or_else(PoisonError::into_inner) {
            terminal.restore();
        }
        std::process::exit(i32::from(signal.exit_code()));
    }

    /// The signal that ends the process as soon as the current work has stopped.
    pub(crate) fn ended_by(&self) -> Option<Signal> {
        self.ended_by.get().copied()
    }

    /// Gives the work this time to end after SIGTERM. A server that ends in order has done what it was told to do, so the exit code
    /// is then that of the command.
    pub(crate) fn end_in_order_within(&self, patience: Duration) {
        let _ = self.patience.set(patience);
    }

    /// The signal that the exit code tells of.
    pub(crate) fn exit_signal(&self) -> Option<Signal> {
        self.ended_by().filter(|_| self.patience.get().is_none())
    }

    /// A new token for the next piece of work.
    pub(crate) fn renew(&self) -> CancellationToken {
        let token = CancellationToken::new();
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = token.clone();
        if self.ended_by().is_some() {
            token.cancel();
        }
        token
    }

    /// No work looks at a token.
    pub(crate) fn idle(&self) {
        self.renew().cancel();
    }

    /// Restores the terminal to its present state when a signal ends the process.
    pub(crate) fn guard_terminal(&self) {
        *self.terminal.lock().unwrap_or_else(PoisonError::into_inner) = Terminal::now();
    }

    /// While `work` writes to `target`, an end by a signal removes what has been written of it.
    pub(crate) fn writing<T>(&self, target: &Path, work: impl FnOnce() -> T) -> T {
        match partial_path(target) {
            Some(path) => self.using(&path, work),
            None => work(),
        }
    }

    /// While `work` needs the file or folder `path`, an end by a signal removes it.
    pub(crate) fn using<T>(&self, path: &Path, work: impl FnOnce() -> T) -> T {
        let leftovers = || self.leftovers.lock().unwrap_or_else(PoisonError::into_inner);
        leftovers().push(path.to_owned());
        let result = work();
        leftovers().retain(|left| left != path);
        result
    }

    fn remove_leftovers(&self) {
        // Not released again: work that ends at this moment must not begin another file.
        let leftovers = self.leftovers.lock().unwrap_or_else(PoisonError::into_inner);
        for path in &*leftovers {
            // The work goes on meanwhile and may add a file to a folder. What still cannot be removed then stays.
            for _ in 0..3 {
                let _ =
                    if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
            }
        }
        std::mem::forget(leftovers);
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

#[cfg(unix)]
mod source {
    use std::future::pending;

    use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

    use super::Signal;
    use crate::startup;

    /// Where a signal cannot be had, it keeps the system's meaning.
    pub(super) struct Signals {
        interrupt: Option<Stream>,
        terminate: Option<Stream>,
        hang_up: Option<Stream>,
    }

    impl Signals {
        pub(super) fn listen() -> Self {
            let listen = |kind| signal(kind).ok();
            Self {
                interrupt: listen(SignalKind::interrupt()),
                terminate: listen(SignalKind::terminate()),
                // `nohup` asks for it to be ignored.
                hang_up: if startup::hangup_is_ignored() { None } else { listen(SignalKind::hangup()) },
            }
        }

        pub(super) async fn next(&mut self) -> Option<Signal> {
            tokio::select! {
                () = received(&mut self.interrupt) => Some(Signal::Interrupt),
                () = received(&mut self.terminate) => Some(Signal::Terminate),
                () = received(&mut self.hang_up) => Some(Signal::HangUp),
            }
        }
    }

    async fn received(stream: &mut Option<Stream>) {
        let received = match stream {
            Some(stream) => stream.recv().await,
            None => None,
        };
        if received.is_none() {
            pending::<()>().await;
        }
    }
}

#[cfg(windows)]
mod source {
    use std::future::pending;

    use tokio::signal::windows::{
        CtrlBreak, CtrlC, CtrlClose, CtrlShutdown, ctrl_break, ctrl_c, ctrl_close, ctrl_shutdown,
    };

    use super::Signal;

    /// Where an event cannot be had, it keeps the system's meaning.
    pub(super) struct Signals {
        interrupt: Option<CtrlC>,
        stop: Option<CtrlBreak>,
        close: Option<CtrlClose>,
        shutdown: Option<CtrlShutdown>,
    }

    /// Waits for one kind of event, for ever where it cannot be had.
    macro_rules! received {
        ($stream:expr) => {
            async {
                let received = match $stream {
                    Some(stream) => stream.recv().await,
                    None => None,
                };
                if received.is_none() {
                    pending::<()>().await;
                }
            }
        };
    }

    impl Signals {
        pub(super) fn listen() -> Self {
            Self {
                interrupt: ctrl_c().ok(),
                stop: ctrl_break().ok(),
                close: ctrl_close().ok(),
                shutdown: ctrl_shutdown().ok(),
            }
        }

        pub(super) async fn next(&mut self) -> Option<Signal> {
            tokio::select! {
                () = received!(&mut self.interrupt) => Some(Signal::Interrupt),
                () = received!(&mut self.stop) => Some(Signal::Interrupt),
                () = received!(&mut self.close) => Some(Signal::Terminate),
                () = received!(&mut self.shutdown) => Some(Signal::Terminate),
            }
        }
    }
}
