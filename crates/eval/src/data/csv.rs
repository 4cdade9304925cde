//! MMLU's CSV files, which have no header: the question, four choices and the letter of the right one.

use std::path::Path;

use serde_json::{Map, Value};
use ternion_core::{Error, Result};

use super::{Row, empty, read_text};

/// The rows of the file with their columns named as those of the parquet files: `question`, `choices`, `answer`.
pub(crate) fn read(path: &Path) -> Result<Vec<Row>> {
    let text = read_text(path)?;
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(text.as_bytes());
    let mut rows = Vec::new();
    for (i, record) in reader.records().enumerate() {
        let record = record.map_err(|e| {
            Error::invalid_request("is no CSV").with("file", path.display()).with("row", i + 1).with_source(e)
        })?;
        let columns: Vec<&str> = record.iter().collect();
        let [question, choices @ .., answer] = columns.as_slice() else {
            return Err(wrong_columns(path, i, columns.len()));
        };
        if choices.len() != 4 {
            return Err(wrong_columns(path, i, columns.len()));
        }
        let mut fields = Map::new();
        fields.insert("question".to_owned(), (*question).into());
        fields.insert("choices".to_owned(), choices.iter().map(|c| Value::from(*c)).collect());
        fields.insert("answer".to_owned(), (*answer).into());
        rows.push(Row::new(fields, path, i + 1));
    }
    if rows.is_empty() { Err(empty(path)) } else { Ok(rows) }
}

fn wrong_columns(path: &Path, index: usize, found: usize) -> Error {
    Error::invalid_request(format!(
        "{found} columns; 6 expected, without a header: question, four choices, letter"
    ))
    .with("file", path.display())
    .with("row", index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str) -> Result<Vec<Row>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x_test.csv");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn quotes_hold_commas_quotes_and_lines() {
        let rows = rows("\"a, \"\"b\"\"\nc\",1,2,\" x\",,B\n").unwrap();
        assert_eq!(rows[0].text("question").unwrap(), "a, \"b\"\nc");
        assert_eq!(rows[0].four_texts("choices").unwrap(), ["1", "2", " x", ""]);
        assert_eq!(rows[0].choice("answer").unwrap(), 1);
    }

    #[test]
    fn damage_is_told_with_its_row() {
        let error = rows("q,1,2,3,4,A\nq,1,2,3,A\n").unwrap_err().to_string();
        assert!(error.contains("5 columns; 6 expected") && error.contains("row: 2"), "{error}");
        let error = rows("q,1,2,3,4,A\n\"q,1,2,3,4,A\n").unwrap_err().to_string();
        assert!(error.contains("1 columns"), "{error}");
        assert!(rows("").unwrap_err().to_string().contains("is empty"));
        let header = rows("question,A,B,C,D,answer\n").unwrap();
        assert!(header[0].choice("answer").unwrap_err().to_string().contains("A, B, C or D"));
    }
}
