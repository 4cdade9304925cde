//! How a command can fail, and the exit code that tells a script which way.

use std::{fmt, io};

use ternion::{Error, ErrorKind};

/// What ends a command early.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The library says no.
    Error(Error),
    /// The command line, or a file that it names as input, makes no sense.
    Usage(String),
    /// A check found a difference, which has been printed.
    Mismatch,
    /// Models differ by more than is allowed, or a backend breaks its contract, which has been printed.
    Beyond,
    /// Ctrl-C.
    Interrupted,
    /// Standard output cannot be written.
    Output(Error),
    /// Nobody reads standard output any more.
    BrokenPipe,
}

/// The result of a command and of what it calls.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// A usage error.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }

    /// 1: models differ; 2: what was asked is wrong; 3: the model or the configuration is; 4: it failed while it ran; 130: Ctrl-C;
    /// 141: nobody reads the output.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Error(e) => match e.kind() {
                ErrorKind::InvalidRequest | ErrorKind::ContextOverflow => 2,
                ErrorKind::NotFound
                | ErrorKind::InvalidModel
                | ErrorKind::InvalidConfig
                | ErrorKind::Unsupported => 3,
                ErrorKind::Cancelled => 130,
                _ => 4,
            },
            Self::Beyond => 1,
            Self::Usage(_) => 2,
            Self::Mismatch => 3,
            Self::Interrupted => 130,
            Self::Output(_) => 4,
            // As of a program that SIGPIPE ends, which says nothing either: `ternion ... | head -1` looks like any other.
            Self::BrokenPipe => 141,
        }
    }

    /// The one line for standard error; `None` where there is nothing to add.
    pub(crate) fn message(&self) -> Option<String> {
        let text = match self {
            Self::Error(e) if e.kind() != ErrorKind::Cancelled => e.to_string(),
            Self::Output(e) => e.to_string(),
            Self::Usage(message) => message.clone(),
            _ => return None,
        };
        // Names out of files may hold anything; the message stays one printable line.
        Some(text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message().unwrap_or_default())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// For writes to standard output only: a file's error needs its path.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::BrokenPipe
        } else {
            Self::Output(Error::new(ErrorKind::Io, "standard output cannot be written").with_source(error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_tell_usage_model_and_run_time_apart() {
        let code = |kind| Failure::from(Error::new(kind, "x")).exit_code();
        assert_eq!(code(ErrorKind::InvalidRequest), 2);
        assert_eq!(code(ErrorKind::ContextOverflow), 2);
        assert_eq!(code(ErrorKind::NotFound), 3);
        assert_eq!(code(ErrorKind::InvalidModel), 3);
        assert_eq!(code(ErrorKind::Backend), 4);
        assert_eq!(code(ErrorKind::Busy), 4);
        assert_eq!(Failure::Beyond.exit_code(), 1);
        assert_eq!(Failure::Mismatch.exit_code(), 3);
        assert_eq!(Failure::Interrupted.exit_code(), 130);
        assert_eq!(Failure::from(io::Error::from(io::ErrorKind::BrokenPipe)).exit_code(), 141);
        assert_eq!(Failure::from(io::Error::from(io::ErrorKind::StorageFull)).exit_code(), 4);
    }

    #[test]
    fn messages_are_one_line_without_control_characters() {
        let failure = Failure::from(Error::invalid_model("a\nb\u{1b}[31m"));
        assert_eq!(failure.message().unwrap(), "a b [31m");
        assert!(Failure::Mismatch.message().is_none());
        assert!(Failure::from(Error::new(ErrorKind::Cancelled, "x")).message().is_none());
    }
}
