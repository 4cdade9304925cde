//! Text and files that the user names as input.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Read};
use std::path::Path;

use ternion::{Error, ErrorKind};

use crate::failure::{Failure, Outcome};

/// More text than any context holds; a stream without an end must not fill the memory.
const MAX_BYTES: u64 = 64 << 20;

const BYTE_ORDER_MARK: char = '\u{feff}';

/// Where a text comes from.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum TextSource<'a> {
    /// The command line.
    Argument(&'a str),
    /// A file.
    File(&'a Path),
    /// Standard input.
    Stdin,
    /// Nowhere: nothing is said and a person sits at the terminal.
    Nobody,
}

impl<'a> TextSource<'a> {
    /// What `ARGUMENT`, `--file` and the state of standard input mean together.
    pub(crate) fn new(argument: Option<&'a str>, file: Option<&'a Path>) -> Self {
        Self::choose(argument, file, io::stdin().is_terminal())
    }

    fn choose(argument: Option<&'a str>, file: Option<&'a Path>, stdin_is_terminal: bool) -> Self {
        match (argument, file) {
            (Some("-"), _) => Self::Stdin,
            (Some(text), _) => Self::Argument(text),
            (None, Some(path)) if path.as_os_str() == "-" => Self::Stdin,
            (None, Some(path)) => Self::File(path),
            (None, None) if stdin_is_terminal => Self::Nobody,
            (None, None) => Self::Stdin,
        }
    }

    /// Reads the text; `what` names it in errors.
    pub(crate) fn read(&self, what: &str) -> Outcome<String> {
        match self {
            Self::Argument(text) => Ok((*text).to_owned()),
            Self::File(path) => {
                let name = path.display().to_string();
                let file = std::fs::File::open(path).map_err(|e| unreadable(&name, &e))?;
                read_text(file, &name)
            }
            Self::Stdin => read_text(io::stdin().lock(), "standard input"),
            Self::Nobody => {
                Err(Failure::usage(format!("no {what}; give it as an argument, or `-` for standard input")))
            }
        }
    }
}

fn read_text(reader: impl Read, name: &str) -> Outcome<String> {
    let mut bytes = Vec::new();
    reader.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| unreadable(name, &e))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Failure::usage(format!("{name}: longer than {} MiB", MAX_BYTES >> 20)));
    }
    let mut text = String::from_utf8(bytes)
        .map_err(|e| Failure::usage(format!("{name}: byte {} is not UTF-8", e.utf8_error().valid_up_to())))?;
    // A byte order mark, as some editors write it, says how the file is encoded. It is no part of the text.
    if text.starts_with(BYTE_ORDER_MARK) {
        text.drain(..BYTE_ORDER_MARK.len_utf8());
    }
    Ok(text)
}

fn unreadable(name: &str, error: &io::Error) -> Failure {
    Failure::usage(format!("{name}: cannot be read: {error}"))
}

/// Writes a file whole or not at all: `write` makes it under a temporary name beside `path`, then it is renamed.
pub(crate) fn write_atomically<E>(path: &Path, write: impl FnOnce(&Path) -> Result<(), E>) -> Outcome
where
    E: std::error::Error + Send + Sync + 'static,
{
    let mut name = OsString::from(".");
    name.push(
        path.file_name().ok_or_else(|| Failure::usage(format!("{}: is no file name", path.display())))?,
    );
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let error = || Error::new(ErrorKind::Io, "cannot be written").with("path", path.display());
    let result = write(&temporary)
        .map_err(|e| error().with_source(e))
        .and_then(|()| std::fs::rename(&temporary, path).map_err(|e| error().with_source(e)));
    if result.is_err() {
        // What is there of it is of no use; that it cannot be removed would only hide the first error.
        let _ = std::fs::remove_file(&temporary);
    }
    Ok(result?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_of_a_text() {
        let file = Path::new("f");
        assert_eq!(TextSource::choose(Some("hi"), None, false), TextSource::Argument("hi"));
        assert_eq!(TextSource::choose(Some("-"), None, true), TextSource::Stdin);
        assert_eq!(TextSource::choose(None, Some(file), false), TextSource::File(file));
        assert_eq!(TextSource::choose(None, Some(Path::new("-")), true), TextSource::Stdin);
        assert_eq!(TextSource::choose(None, None, false), TextSource::Stdin);
        assert_eq!(TextSource::choose(None, None, true), TextSource::Nobody);
    }

    #[test]
    fn text_that_is_not_utf8_is_a_usage_error() {
        let error = read_text(&b"ab\xff"[..], "x").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert_eq!(error.message().unwrap(), "x: byte 2 is not UTF-8");
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_text() {
        assert_eq!(read_text(&b"\xef\xbb\xbfab"[..], "x").unwrap(), "ab");
        assert_eq!(read_text(&b"a\xef\xbb\xbfb"[..], "x").unwrap(), "a\u{feff}b");
    }

    #[test]
    fn a_file_is_written_whole_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        write_atomically(&path, |p| std::fs::write(p, b"first")).unwrap();
        write_atomically(&path, |p| std::fs::write(p, b"second")).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"second");
        let taken = folder.path().join("taken");
        std::fs::create_dir(&taken).unwrap();
        let failure = write_atomically(&taken, |p| std::fs::write(p, b"x")).unwrap_err();
        assert_eq!(failure.exit_code(), 4, "a folder is in the way");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
