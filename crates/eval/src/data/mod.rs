//! The files of data sets as they are distributed: JSON lines, CSV, parquet and plain text, as rows of named columns.

mod csv;
mod jsonl;
#[cfg(feature = "parquet")]
mod parquet;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use ternion_core::{Error, ErrorKind, Result, file::read_capped};

pub(crate) use self::csv::read as read_csv;

/// The largest file that is read; the largest of the data sets have 50 MB.
const MAX_BYTES: u64 = 512 << 20;

/// A row of a data set, and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) fields: Map<String, Value>,
    path: PathBuf,
    /// From 1.
    line: usize,
}

impl Row {
    pub(crate) fn new(fields: Map<String, Value>, path: &Path, line: usize) -> Self {
        Self { fields, path: path.to_owned(), line }
    }

    /// An error about this row.
    pub(crate) fn wrong(&self, message: impl Into<String>) -> Error {
        Error::invalid_request(message).with("file", self.path.display()).with("row", self.line)
    }

    fn value(&self, column: &str) -> Result<&Value> {
        self.fields.get(column).ok_or_else(|| {
            let found: Vec<_> = self.fields.keys().map(String::as_str).collect();
            self.wrong(format!("no column `{column}`; the row has {}", found.join(", ")))
        })
    }

    /// The text of a column.
    pub(crate) fn text(&self, column: &str) -> Result<&str> {
        let value = self.value(column)?;
        value
            .as_str()
            .ok_or_else(|| self.wrong(format!("column `{column}` is {}; a text expected", kind(value))))
    }

    /// The four texts of a column of choices.
    pub(crate) fn four_texts(&self, column: &str) -> Result<[String; 4]> {
        let value = self.value(column)?;
        let texts: Option<Vec<String>> =
            value.as_array().and_then(|list| list.iter().map(|v| v.as_str().map(str::to_owned)).collect());
        let found = texts.as_ref().map_or_else(|| kind(value).to_owned(), |t| format!("{} texts", t.len()));
        texts
            .and_then(|texts| texts.try_into().ok())
            .ok_or_else(|| self.wrong(format!("column `{column}` is {found}; a list of 4 texts expected")))
    }

    /// The choice that a column says is right: a letter, or an index from 0.
    pub(crate) fn choice(&self, column: &str) -> Result<usize> {
        let value = self.value(column)?;
        let index = match value {
            Value::String(letter) => ["A", "B", "C", "D"].iter().position(|l| l == letter),
            other => other.as_u64().filter(|&i| i < 4).map(|i| i as usize),
        };
        index.ok_or_else(|| {
            self.wrong(format!(
                "column `{column}` is {value}; A, B, C or D, or a number from 0 to 3 expected"
            ))
        })
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "empty",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list of other values",
        Value::Object(_) => "a record",
    }
}

/// The rows of JSON lines or parquet files, one after another; at least one.
pub(crate) fn read(paths: &[PathBuf]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for path in paths {
        let found = match extension(path).as_str() {
            "jsonl" | "json" => jsonl::read(path)?,
            "parquet" => parquet_rows(path)?,
            other => {
                let message = format!("`.{other}` is not known; .jsonl or .parquet expected");
                return Err(Error::invalid_request(message).with("file", path.display()));
            }
        };
        if found.is_empty() {
            return Err(empty(path));
        }
        rows.extend(found);
    }
    Ok(rows)
}

#[cfg(feature = "parquet")]
fn parquet_rows(path: &Path) -> Result<Vec<Row>> {
    parquet::read(path)
}

#[cfg(not(feature = "parquet"))]
fn parquet_rows(path: &Path) -> Result<Vec<Row>> {
    Err(Error::unsupported("parquet files need the feature `parquet`").with("file", path.display()))
}

/// The error about a file without rows or text.
pub(crate) fn empty(path: &Path) -> Error {
    Error::invalid_request("is empty").with("file", path.display())
}

/// The text of a file, without the byte order mark that editors on Windows put in front of it.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let bytes = read_capped(path, MAX_BYTES, ErrorKind::InvalidRequest)?;
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        let message = "byte 0 begins a mark of UTF-16; save the text as UTF-8";
        return Err(Error::invalid_request(message).with("file", path.display()));
    }
    let mut text = String::from_utf8(bytes).map_err(|e| {
        let message = format!("byte {} is not UTF-8", e.utf8_error().valid_up_to());
        Error::invalid_request(message).with("file", path.display())
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// The files in `folder` that hold `split`: `SPLIT.jsonl`, else all shards `SPLIT-*.parquet` in their order.
pub(crate) fn split_files(folder: &Path, split: &str) -> Result<Vec<PathBuf>> {
    let lines = folder.join(format!("{split}.jsonl"));
    if lines.is_file() {
        return Ok(vec![lines]);
    }
    let mut shards = list(folder)?;
    shards.retain(|path| {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        extension(path) == "parquet"
            && (name.starts_with(&format!("{split}-")) || name == format!("{split}.parquet"))
    });
    Ok(shards)
}

/// What is in a folder, in the order of the names.
pub(crate) fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(|e| Error::io(folder, e))?.path());
    }
    paths.sort();
    Ok(paths)
}

/// The extension in lower case.
pub(crate) fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_of_encodings_are_no_text() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("test.jsonl");
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            read(std::slice::from_ref(&path))
        };
        let plain = b"{\"question\": \"a\"}\r\n\r\n{\"question\": \"b\"}\r\n";
        let marked = [&b"\xef\xbb\xbf"[..], plain].concat();
        for text in [&plain[..], &marked] {
            assert_eq!(read(text).unwrap().len(), 2);
        }
        let error = read(b"\xff\xfe{\0").unwrap_err().to_string();
        assert!(error.contains("UTF-16") && error.contains("test.jsonl"), "{error}");
        let error = read(b"\xef\xbb\xbf{\xff}").unwrap_err().to_string();
        assert!(error.contains("byte 4") && error.contains("test.jsonl"), "{error}");
    }

    fn row(json: &str) -> Row {
        Row::new(serde_json::from_str(json).unwrap(), Path::new("f.jsonl"), 3)
    }

    #[test]
    fn a_wrong_column_is_named_with_what_is_there() {
        let error = row(r#"{"q": "x", "a": "y"}"#).text("question").unwrap_err().to_string();
        assert_eq!(error, "no column `question`; the row has q, a (file: f.jsonl, row: 3)");
        let error = row(r#"{"question": 7}"#).text("question").unwrap_err().to_string();
        assert!(error.contains("`question` is a number; a text expected"), "{error}");
        let error = row(r#"{"choices": ["a", "b"]}"#).four_texts("choices").unwrap_err().to_string();
        assert!(error.contains("is 2 texts; a list of 4 texts expected"), "{error}");
    }

    #[test]
    fn a_choice_is_a_letter_or_an_index() {
        assert_eq!(row(r#"{"answer": "C"}"#).choice("answer").unwrap(), 2);
        assert_eq!(row(r#"{"answer": 3}"#).choice("answer").unwrap(), 3);
        for wrong in ["4", "\"E\"", "-1", "1.5", "null"] {
            let error = row(&format!(r#"{{"answer": {wrong}}}"#)).choice("answer").unwrap_err().to_string();
            assert!(error.contains(&format!("is {wrong};")), "{error}");
        }
    }
}
