//! Reading small files that somebody else has made, whole and within a bound.

use std::{fs::File, io::Read, path::Path};

use crate::{Error, ErrorKind, Result};

/// The bytes of the regular file `path` (a symbolic link to one is followed), which has at most `cap` bytes.
///
/// # Errors
/// [`NotFound`](ErrorKind::NotFound) or [`Io`](ErrorKind::Io) where it cannot be read; `kind` where it is no regular
/// file, such as a folder, a pipe or a device, or has more bytes.
pub fn read_capped(path: &Path, cap: u64, kind: ErrorKind) -> Result<Vec<u8>> {
    // Asked before opening: opening a pipe would wait for its writer.
    let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    let refused = |message: String| Error::new(kind, message).with("path", path.display());
    if !metadata.is_file() {
        return Err(refused("is not a file, expected a regular file".to_owned()));
    }
    let too_large = |found: u64| refused(format!("the file has {found} bytes, expected at most {cap}"));
    if metadata.len() > cap {
        return Err(too_large(metadata.len()));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    // Some files, as those of /proc, have more bytes than they say.
    file.take(cap + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > cap {
        return Err(too_large(bytes.len() as u64));
    }
    Ok(bytes)
}

/// The text without the byte order mark that some editors write at its beginning. It is no part of the text.
pub fn without_bom(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// As [`without_bom`], for the bytes of a file that is expected to be UTF-8.
pub fn bytes_without_bom(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.starts_with("\u{feff}".as_bytes()) {
        bytes.drain(..'\u{feff}'.len_utf8());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_leading_byte_order_mark_is_dropped() {
        assert_eq!(
            bytes_without_bom("\u{feff}{\"a\": \"\u{feff}\"}".into()),
            "{\"a\": \"\u{feff}\"}".as_bytes()
        );
        assert_eq!(bytes_without_bom(b"\xef\xbb".to_vec()), b"\xef\xbb");
        assert!(bytes_without_bom("\u{feff}".into()).is_empty());
    }

    #[test]
    fn files_are_read_up_to_the_cap() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"12345").unwrap();
        assert_eq!(read_capped(&path, 5, ErrorKind::InvalidModel).unwrap(), b"12345");
        let error = read_capped(&path, 4, ErrorKind::InvalidModel).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidModel);
        assert!(error.to_string().contains("has 5 bytes, expected at most 4 (path: "), "{error}");
        let missing = read_capped(&folder.path().join("none"), 4, ErrorKind::InvalidModel).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn what_is_no_file_is_refused_without_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let error = read_capped(folder.path(), 4, ErrorKind::InvalidConfig).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(error.to_string().contains("is not a file"), "{error}");
    }
}
