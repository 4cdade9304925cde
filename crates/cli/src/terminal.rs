//! The state of the terminal, to be restored when a signal ends the process while the line editor has changed it.

#[cfg(unix)]
pub(crate) use unix::Terminal;

#[cfg(not(unix))]
pub(crate) use other::Terminal;

#[cfg(unix)]
mod unix {
    use std::fs::File;
    use std::io::{self, Write};
    use std::os::fd::AsFd;

    use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};
    use nix::unistd::{getpgrp, tcgetpgrp};

    /// Ends the mode in which pasted text is marked, and the line of the prompt.
    const LEAVE_EDITOR: &[u8] = b"\x1b[?2004l\r\n";

    pub(crate) struct Terminal {
        file: File,
        modes: Termios,
    }

    impl Terminal {
        /// The terminal that the line editor uses, and its present state; `None` where there is none.
        pub(crate) fn now() -> Option<Self> {
            let controlling = File::options().read(true).write(true).open("/dev/tty").ok();
            let file =
                controlling.or_else(|| io::stdin().as_fd().try_clone_to_owned().ok().map(File::from))?;
            let modes = tcgetattr(&file).ok()?;
            Some(Self { file, modes })
        }

        /// Sets that state again. Failures are ignored: the terminal may be gone.
        pub(crate) fn restore(&self) {
            // A process in the background that changes the terminal is stopped by the system.
            if tcgetpgrp(&self.file).is_ok_and(|foreground| foreground == getpgrp()) {
                let _ = tcsetattr(&self.file, SetArg::TCSANOW, &self.modes);
                let _ = (&self.file).write_all(LEAVE_EDITOR);
            }
        }
    }
}

#[cfg(not(unix))]
mod other {
    /// The console of Windows belongs to the process that reads it, so there is nothing to restore.
    pub(crate) struct Terminal;

    impl Terminal {
        pub(crate) fn now() -> Option<Self> {
            None
        }

        #[expect(clippy::unused_self, reason = "as on Unix")]
        pub(crate) fn restore(&self) {}
    }
}
