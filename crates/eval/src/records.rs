//! What became of each item, one JSON line in a file as soon as it is known: a killed run goes on from there.
//!
//! The first line says what the records are of. They may be continued with another limit or other subjects, but not with
//! another task, other data or another model.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions, TryLockError},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use ternion_core::{Error, ErrorKind, Result};

use crate::{
    model::Fingerprint,
    task::{DataId, TaskId},
};

/// The layout of the file.
const VERSION: u32 = 1;

/// The first line of a file of records.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Header {
    /// The version of the layout.
    pub ternion_eval: u32,
    /// The task and its settings.
    pub task: TaskId,
    /// The data.
    pub data: DataId,
    /// The model.
    pub model: Fingerprint,
}

impl Header {
    pub(crate) fn new(task: TaskId, data: DataId, model: Fingerprint) -> Self {
        Self { ternion_eval: VERSION, task, data, model }
    }

    /// Whether records of `self` may be continued by a run of `other`.
    fn check(&self, other: &Self) -> Result<()> {
        let (a, b) = (&self.task, &other.task);
        let differences = [
            ("layout", self.ternion_eval.to_string(), other.ternion_eval.to_string()),
            ("task", a.name.name().to_owned(), b.name.name().to_owned()),
            ("shots", a.shots.to_string(), b.shots.to_string()),
            ("seed", a.seed.to_string(), b.seed.to_string()),
            ("chat", a.chat.to_string(), b.chat.to_string()),
            ("max_tokens", a.max_tokens.to_string(), b.max_tokens.to_string()),
            ("items", self.data.items.to_string(), other.data.items.to_string()),
            ("data", self.data.sha256.clone(), other.data.sha256.clone()),
        ];
        let settings = differences.into_iter().find(|(_, a, b)| a != b);
        match settings.or_else(|| self.model.difference(&other.model)) {
            None => Ok(()),
            Some((field, found, expected)) => Err(Error::invalid_request(format!(
                "the records are of another run: {field} is {found} there and {expected} here; name another file"
            ))),
        }
    }
}

/// What became of one item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Record {
    /// The item.
    pub id: String,
    /// Its subject or document.
    pub group: String,
    /// Examples in its prompt: fewer than the task has where they do not fit into the context.
    pub shots: usize,
    /// The prompt did not fit without examples either and has lost its beginning.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
    /// The result.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// The result of one item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Outcome {
    /// An answer was generated.
    Generated {
        /// The whole answer.
        text: String,
        /// The number in it that has the form asked for.
        strict: String,
        /// The last number in it.
        flexible: String,
        /// The right one.
        gold: String,
        /// `strict` is right.
        strict_match: bool,
        /// `flexible` is right.
        flexible_match: bool,
    },
    /// One of four letters was chosen.
    Chosen {
        /// Natural logarithms of the probabilities of the four.
        loglikelihoods: Vec<f64>,
        /// The index of the most probable.
        choice: usize,
        /// The index of the right one.
        gold: usize,
    },
    /// A part of a text was scored.
    Scored {
        /// Tokens scored.
        tokens: usize,
        /// The natural logarithm of their probability.
        loglikelihood: f64,
        /// Those of them that are not the text's but the tokenizer's.
        added_tokens: usize,
        /// Their part of `loglikelihood`.
        added_loglikelihood: f64,
    },
}

/// A file of records that a run appends to. Nobody else can meanwhile.
#[derive(Debug)]
pub(crate) struct Records {
    file: File,
    path: PathBuf,
    /// Bytes of whole lines.
    length: u64,
    known: HashMap<String, Record>,
}

impl Records {
    /// Opens or makes the file. A last line that is not whole is dropped.
    pub(crate) fn open(path: &Path, header: &Header) -> Result<Self> {
        let refused = |message: String| Error::invalid_request(message).with("path", path.display());
        if path.exists() && !path.is_file() {
            return Err(refused("is no file; records are written to a regular file".to_owned()));
        }
        let io = |e| Error::io(path, e);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(refused("another run writes to these records".to_owned()));
            }
            Err(TryLockError::Error(e)) => return Err(io(e)),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io)?;
        let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
        let mut records = Self { file, path: path.to_owned(), length: whole as u64, known: HashMap::new() };
        if whole == 0 && !bytes.is_empty() && !bytes.starts_with(b"{\"ternion_eval\":") {
            return Err(refused(
                "is no file of records; name another, or one that does not exist".to_owned(),
            ));
        }
        if whole == 0 {
            records.append_line(header)?;
            return Ok(records);
        }
        for (i, line) in bytes[..whole - 1].split(|&b| b == b'\n').enumerate() {
            let damaged = |e: serde_json::Error| {
                let what = if i == 0 { "is no file of records" } else { "holds a line that is no record" };
                refused(what.to_owned()).with("line", i + 1).with_source(e)
            };
            if i == 0 {
                let found: Header = serde_json::from_slice(line).map_err(damaged)?;
                found.check(header).map_err(|e| e.with("path", path.display()))?;
            } else {
                let record: Record = serde_json::from_slice(line).map_err(damaged)?;
                records.known.insert(record.id.clone(), record);
            }
        }
        records.rewind().map_err(io)?;
        Ok(records)
    }

    /// Takes what is known of an item.
    pub(crate) fn take(&mut self, id: &str) -> Option<Record> {
        self.known.remove(id)
    }

    /// Appends a record.
    pub(crate) fn append(&mut self, record: &Record) -> Result<()> {
        self.append_line(record)
    }

    /// Appends a line; where that fails, as on a full disk, the lines before are all that stays.
    fn append_line(&mut self, value: &impl Serialize) -> Result<()> {
        let path = self.path.clone();
        let error = |e: std::io::Error| {
            let message = "a record cannot be written; the run can go on from those before it";
            Error::new(ErrorKind::Io, message).with("path", path.display()).with_source(e)
        };
        let mut line = serde_json::to_vec(value).map_err(|e| error(e.into()))?;
        line.push(b'\n');
        if let Err(e) = self.rewind().and_then(|()| self.file.write_all(&line)) {
            // The error that is reported is the first; a part of a line that stays is dropped by the next run.
            let _ = self.rewind();
            return Err(error(e));
        }
        self.length += line.len() as u64;
        Ok(())
    }

    /// To the end of the last whole line, without what follows it.
    fn rewind(&mut self) -> std::io::Result<()> {
        self.file.set_len(self.length)?;
        self.file.seek(SeekFrom::Start(self.length)).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{DataHash, Kind};

    fn header(shots: usize) -> Header {
        let task = TaskId { name: Kind::Mmlu, shots, seed: 1, chat: false, max_tokens: 256 };
        let model = serde_json::from_str(
            r#"{"name": "m", "backend": "b", "architecture": "a", "format": "f", "parameters": 1,
                "context_length": 8, "vocab_size": 9, "probe": [-1.5]}"#,
        );
        Header::new(task, DataHash::default().finish(3), model.unwrap())
    }

    fn record(id: &str) -> Record {
        Record {
            id: id.to_owned(),
            group: "g".to_owned(),
            shots: 5,
            truncated: false,
            outcome: Outcome::Chosen { loglikelihoods: vec![-1.25, -2.0, -3.5, -0.1], choice: 3, gold: 0 },
        }
    }

    #[test]
    fn a_half_written_line_is_dropped_and_the_rest_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.jsonl");
        let mut records = Records::open(&path, &header(5)).unwrap();
        records.append(&record("a")).unwrap();
        records.append(&record("b")).unwrap();
        drop(records);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 7]).unwrap();
        let mut records = Records::open(&path, &header(5)).unwrap();
        assert_eq!(records.take("a").unwrap(), record("a"));
        assert!(records.take("b").is_none());
        records.append(&record("b")).unwrap();
        drop(records);
        assert_eq!(std::fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn another_run_s_records_are_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.jsonl");
        let records = Records::open(&path, &header(5)).unwrap();
        let error = Records::open(&path, &header(5)).unwrap_err().to_string();
        assert!(error.contains("another run writes"), "{error}");
        drop(records);
        let error = Records::open(&path, &header(4)).unwrap_err().to_string();
        assert!(error.contains("shots is 5 there and 4 here"), "{error}");
        std::fs::write(folder.path().join("notes.txt"), "my notes\n").unwrap();
        let error = Records::open(&folder.path().join("notes.txt"), &header(5)).unwrap_err().to_string();
        assert!(error.contains("is no file of records"), "{error}");
        std::fs::write(folder.path().join("notes.txt"), "my notes").unwrap();
        assert!(Records::open(&folder.path().join("notes.txt"), &header(5)).is_err());
        assert_eq!(std::fs::read(folder.path().join("notes.txt")).unwrap(), b"my notes");
        assert!(Records::open(folder.path(), &header(5)).unwrap_err().to_string().contains("no file"));
    }

    #[test]
    fn a_damaged_line_in_the_middle_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.jsonl");
        drop(Records::open(&path, &header(5)).unwrap());
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("{\"id\":\"a\"\n{}\n");
        std::fs::write(&path, text).unwrap();
        let error = Records::open(&path, &header(5)).unwrap_err().to_string();
        assert!(error.contains("line: 2"), "{error}");
    }
}
