//! Text and files that the user names as input.

use std::io::{self, IsTerminal, Read};
use std::path::Path;

use ternion::formats::Unfinished;
use ternion::{Error, ErrorKind};

use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupts;

/// More text than any context holds; a stream without an end must not fill the memory.
const MAX_BYTES: u64 = 64 << 20;

/// Editors on Windows put it in front of UTF-8. It says how the file is encoded and is no part of the text.
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

    /// Reads the text without the byte order mark that it may begin with; `what` names it in errors. Line ends stay as they are.
    pub(crate) fn read(&self, what: &str) -> Outcome<String> {
        Ok(self.read_from(what)?.0)
    }

    /// As [`read`](Self::read), with the offset at which the text begins in its file.
    pub(crate) fn read_from(&self, what: &str) -> Outcome<(String, usize)> {
        match self {
            Self::Argument(text) => Ok(((*text).to_owned(), 0)),
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

fn read_text(reader: impl Read, name: &str) -> Outcome<(String, usize)> {
    let mut bytes = Vec::new();
    reader.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| unreadable(name, &e))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Failure::usage(format!("{name}: longer than {} MiB", MAX_BYTES >> 20)));
    }
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err(Failure::usage(format!(
            "{name}: byte 0 begins a mark of UTF-16; save the text as UTF-8"
        )));
    }
    let mut text = String::from_utf8(bytes)
        .map_err(|e| Failure::usage(format!("{name}: byte {} is not UTF-8", e.utf8_error().valid_up_to())))?;
    let begin = if text.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len_utf8() } else { 0 };
    text.drain(..begin);
    Ok((text, begin))
}

fn unreadable(name: &str, error: &io::Error) -> Failure {
    Failure::usage(format!("{name}: cannot be read: {error}"))
}

/// Writes a file completely or not at all: `write` makes it under a temporary name beside `path`, then it is renamed.
pub(crate) fn write_atomically<E>(
    interrupts: &Interrupts,
    path: &Path,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Outcome
where
    E: std::error::Error + Send + Sync + 'static,
{
    let error = || Error::new(ErrorKind::Io, "cannot be written").with("path", path.display());
    // A device or a pipe must not be replaced by a file.
    if path.metadata().is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        return Ok(write(path).map_err(|e| error().with_source(e))?);
    }
    interrupts.writing(path, || {
        let unfinished = Unfinished::file(path).map_err(|e| error().with_source(e))?;
        write(unfinished.path()).map_err(|e| error().with_source(e))?;
        Ok(unfinished.finish().map_err(|e| error().with_source(e))?)
    })
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
        // The offset is one in the file, with its mark.
        let error = read_text(&b"\xef\xbb\xbfab\xff"[..], "x").unwrap_err();
        assert_eq!(error.message().unwrap(), "x: byte 5 is not UTF-8");
        for text in [&b"\xff\xfea\0"[..], b"\xfe\xff\0a"] {
            assert!(read_text(text, "x").unwrap_err().message().unwrap().contains("UTF-16"));
        }
    }

    #[test]
    fn one_byte_order_mark_is_left_out_and_line_ends_stay() {
        let read = |bytes: &[u8]| read_text(bytes, "x").unwrap().0;
        assert_eq!(read(b"\xef\xbb\xbfa\r\nb\r\n"), "a\r\nb\r\n");
        assert_eq!(read(b"\xef\xbb\xbf"), "");
        // Further inside it is a character (a zero-width no-break space).
        assert_eq!(read(b"\xef\xbb\xbf\xef\xbb\xbfa\xef\xbb\xbf"), "\u{feff}a\u{feff}");
    }

    #[test]
    fn a_file_is_written_whole_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let (path, none) = (folder.path().join("out"), Interrupts::default());
        write_atomically(&none, &path, |p| std::fs::write(p, b"first")).unwrap();
        write_atomically(&none, &path, |p| std::fs::write(p, b"second")).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"second");
        let taken = folder.path().join("taken");
        std::fs::create_dir(&taken).unwrap();
        let failure = write_atomically(&none, &taken, |p| std::fs::write(p, b"x")).unwrap_err();
        assert_eq!(failure.exit_code(), 4, "a folder is in the way");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
