//! The container: header, metadata, tensor table, data. Everything is checked when the file is opened.
//!
//! The rules are those of ggml's own reader (`gguf.cpp`), and a few that it leaves to what comes after: names are not
//! empty, tensors have at least one element, and the data ends with the last tensor (module `layout`).
//!
//! Element types of other programs are no error here: a file of them can be looked at, but not run.

use std::collections::{HashMap, HashSet};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use ternion_core::{Error, Result};

use super::layout::{self, Entry};
use super::parts;
use super::types::TensorType;
use super::value::{Array, Value, ValueType};
use crate::SharedBytes;
use crate::json::shorten;
use crate::locate::{LFS_MESSAGE, LFS_POINTER};

const MAGIC: &[u8; 4] = b"GGUF";
const VERSIONS: RangeInclusive<u32> = 2..=3;
const ALIGNMENT: &str = "general.alignment";
pub(super) const DEFAULT_ALIGNMENT: u64 = 32;

// Bounds that no real file comes near: the largest mixtures of experts have some ten thousand tensors.
const MAX_PAIRS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 16;
const MAX_KEY: u64 = 256;
const MAX_STRING: u64 = 64 << 20;
const MAX_ARRAY: u64 = 1 << 28;
const MAX_ALIGNMENT: u64 = 1 << 20;

/// The longest name of a tensor; ggml's has a terminating zero in 64 bytes.
pub(super) const MAX_NAME: usize = 63;
pub(super) const MAX_DIMS: u32 = 4;

/// A tensor as the table of a file describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorInfo {
    /// Its name; at most 63 bytes.
    pub name: String,
    /// Its element type.
    pub kind: TensorType,
    /// One to four dimensions, innermost first: a matrix of `rows` by `cols` has `[cols, rows]`.
    pub dims: Vec<u64>,
    /// Where its data begins, counted from the begin of all data.
    pub offset: u64,
    /// Bytes of its data.
    pub bytes: u64,
    /// Which part of a split model holds it.
    pub(super) part: usize,
}

/// A GGUF file whose container has been checked: all of its tensors lie within it. Of a model that is split it is the
/// first part, which may have been [joined](Self::joined) with the others.
#[derive(Debug, Clone)]
pub struct File {
    path: PathBuf,
    other_paths: Vec<PathBuf>,
    version: u32,
    alignment: u64,
    metadata: Vec<(String, Value)>,
    keys: HashMap<String, usize>,
    tensors: Vec<TensorInfo>,
    names: HashMap<String, usize>,
    /// The tensors' data, of each part.
    data: Vec<SharedBytes>,
}

impl File {
    /// Maps a file and checks its container.
    ///
    /// # Errors
    /// [`NotFound`](ternion_core::ErrorKind::NotFound) or [`Io`](ternion_core::ErrorKind::Io) where it cannot be read;
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for another version or byte order; [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where it is damaged.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::parse(&SharedBytes::map(path)?, path)
    }

    /// Checks the container in `bytes`; errors name `path`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn parse(bytes: &SharedBytes, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        parse(bytes, path).map_err(|e| e.with("file", path.display()))
    }

    /// This file with the tensors of the model's other parts, where it is the first of several.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) for another than the first part, and where parts
    /// contradict each other; those of opening the other parts.
    pub fn joined(self) -> Result<Self> {
        self.joined_by(&mut SharedBytes::map)
    }

    /// [`joined`](Self::joined) with a way to map the other parts.
    pub(crate) fn joined_by(mut self, map: &mut dyn FnMut(&Path) -> Result<SharedBytes>) -> Result<Self> {
        for other in parts::others(&self, map)? {
            let part = self.data.len();
            self.data.extend(other.data);
            self.other_paths.push(other.path);
            for tensor in other.tensors {
                self.names.insert(tensor.name.clone(), self.tensors.len());
                self.tensors.push(TensorInfo { part, ..tensor });
            }
        }
        Ok(self)
    }

    /// The file's name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of this file and of the parts that it was joined with.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        [&self.path].into_iter().chain(&self.other_paths).map(PathBuf::as_path)
    }

    /// The version of the container.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Tensors begin at multiples of this.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// All pairs of metadata in the file's order.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// All tensors in the file's order, or that of the parts.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.names.get(name).map(|&i| &self.tensors[i])
    }

    /// The data of a tensor of this file; empty bytes for any other.
    pub fn data(&self, tensor: &TensorInfo) -> SharedBytes {
        let (begin, end) = (tensor.offset as usize, tensor.offset.saturating_add(tensor.bytes) as usize);
        let data = self.data.get(tensor.part).and_then(|data| data.slice(begin..end));
        data.unwrap_or_else(|| Vec::new().into())
    }

    /// Reads a part of a tensor's data from `from` on, without its pages becoming this process's as those of
    /// [`data`](Self::data) do when they are touched. A file that has become shorter gives an error.
    ///
    /// # Errors
    /// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) beyond the tensor's end,
    /// [`Io`](ternion_core::ErrorKind::Io) where reading fails.
    pub fn read(&self, tensor: &TensorInfo, from: u64, out: &mut [u8]) -> Result<()> {
        let end = from.checked_add(out.len() as u64).filter(|end| *end <= tensor.bytes);
        let end = end.ok_or_else(|| {
            let message = format!("{} bytes from {from} on, but it has {}", out.len(), tensor.bytes);
            Error::invalid_request(message).with("tensor", &tensor.name)
        })?;
        self.data
            .get(tensor.part)
            .and_then(|data| data.slice(tensor.offset as usize..tensor.offset.saturating_add(end) as usize))
            .ok_or_else(|| Error::invalid_request("a tensor of another file"))
            .and_then(|bytes| bytes.read_at(from as usize, out))
            .map_err(|e| e.with("tensor", &tensor.name))
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).map(|&i| &self.metadata[i].1)
    }

    /// The architecture, which every model names.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where it is missing or no string.
    pub fn architecture(&self) -> Result<&str> {
        let key = "general.architecture";
        self.string(key)?.ok_or_else(|| self.missing(key, "a string"))
    }

    /// An integer of any width within `range`, or `None` where there is none.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) for any other value.
    pub fn integer(&self, key: &str, range: RangeInclusive<u64>) -> Result<Option<u64>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_integer().and_then(|n| u64::try_from(n).ok()) {
            Some(n) if range.contains(&n) => Ok(Some(n)),
            _ => {
                let expected = format!("an integer from {} to {}", range.start(), range.end());
                Err(self.invalid(key, &expected))
            }
        }
    }

    /// An [`integer`](Self::integer) that must be there.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where it is not, or for any other value.
    pub fn required_integer(&self, key: &str, range: RangeInclusive<u64>) -> Result<u64> {
        let expected = format!("an integer from {} to {}", range.start(), range.end());
        self.integer(key, range)?.ok_or_else(|| self.missing(key, &expected))
    }

    /// A number within `range`, or `None` where there is none.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) for any other value.
    pub fn number(&self, key: &str, range: RangeInclusive<f32>) -> Result<Option<f32>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_float().map(|x| x as f32) {
            Some(x) if range.contains(&x) => Ok(Some(x)),
            _ => {
                let expected = format!("a float from {:?} to {:?}", range.start(), range.end());
                Err(self.invalid(key, &expected))
            }
        }
    }

    /// A string, or `None` where there is none.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) for any other value.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.invalid(key, "a string"))
    }

    /// A boolean, or `None` where there is none.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) for any other value.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.invalid(key, "true or false"))
    }

    /// An array, or `None` where there is none.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) for any other value.
    pub fn array(&self, key: &str) -> Result<Option<&Array>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_array().map(Some).ok_or_else(|| self.invalid(key, "an array"))
    }

    /// An error about the value of a key: what was found and what was expected.
    pub fn invalid(&self, key: &str, expected: &str) -> Error {
        let found = self.value(key).map_or("missing".to_owned(), |value| shorten(value));
        Error::invalid_model(format!("`{key}` is {found}, expected {expected}"))
            .with("file", self.path.display())
    }

    /// As [`invalid`](Self::invalid), for what is well-formed but not implemented.
    pub(crate) fn unsupported(&self, key: &str, supported: &str) -> Error {
        let found = self.value(key).map_or("missing".to_owned(), |value| shorten(value));
        Error::unsupported(format!("`{key}` is {found}, which is not supported; supported: {supported}"))
            .with("file", self.path.display())
    }

    fn missing(&self, key: &str, expected: &str) -> Error {
        Error::invalid_model(format!("`{key}` is missing, expected {expected}"))
            .with("file", self.path.display())
    }
}

/// What has not been read yet of the part before the data.
struct Cursor<'a> {
    all: &'a SharedBytes,
    at: usize,
}

impl Cursor<'_> {
    fn truncated(&self, what: &str, wanted: u64) -> Error {
        let left = self.all.len() - self.at;
        Error::invalid_model(format!(
            "the file ends within {what}: {wanted} bytes expected at {}, but {left} are left",
            self.at
        ))
    }

    fn take(&mut self, count: u64, what: &str) -> Result<&[u8]> {
        let left = (self.all.len() - self.at) as u64;
        if count > left {
            return Err(self.truncated(what, count));
        }
        let begin = self.at;
        self.at += count as usize;
        Ok(&self.all[begin..self.at])
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        let bytes = self.take(4, what)?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("invariant: 4 bytes were taken")))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        let bytes = self.take(8, what)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("invariant: 8 bytes were taken")))
    }

    /// A count of entries, each of which takes at least `least` bytes.
    fn count(&mut self, what: &str, max: u64, least: u64) -> Result<usize> {
        let count = self.u64(what)?;
        if count > max {
            return Err(Error::invalid_model(format!("{what} is {count}, expected at most {max}")));
        }
        if count * least > (self.all.len() - self.at) as u64 {
            return Err(self.truncated(what, count * least));
        }
        Ok(count as usize)
    }

    fn string(&mut self, max: u64, what: &str) -> Result<&str> {
        let length = self.u64(what)?;
        if length > max {
            return Err(Error::invalid_model(format!(
                "the length of {what} is {length}, expected at most {max}"
            )));
        }
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes)
            .map_err(|e| Error::invalid_model(format!("{what} is not UTF-8")).with_source(e))
    }
}

fn parse(bytes: &SharedBytes, path: &Path) -> Result<File> {
    let mut cursor = Cursor { all: bytes, at: 0 };
    let version = header(&mut cursor)?;
    // A tensor has a name's length, dimensions' number, one dimension, type and offset; a pair two lengths and a type.
    let tensor_count = cursor.count("the number of tensors", MAX_TENSORS, 0)?;
    let pair_count = cursor.count("the number of metadata pairs", MAX_PAIRS, 13)?;

    let mut metadata: Vec<(String, Value)> = Vec::new();
    let mut keys = HashMap::new();
    for index in 0..pair_count {
        let key = cursor.string(MAX_KEY, &format!("key {index}"))?.to_owned();
        if key.is_empty() {
            return Err(Error::invalid_model(format!("key {index} is empty")));
        }
        let value = value(&mut cursor, &key).map_err(|e| e.with("key", shorten(&key)))?;
        if keys.insert(key.clone(), index).is_some() {
            return Err(Error::invalid_model("the key occurs twice").with("key", shorten(&key)));
        }
        metadata.push((key, value));
    }
    let alignment = alignment(keys.get(ALIGNMENT).map(|&i| &metadata[i].1))?;
    if tensor_count as u64 * 32 > (bytes.len() - cursor.at) as u64 {
        return Err(cursor.truncated("the table of tensors", tensor_count as u64 * 32));
    }

    let mut entries = Vec::new();
    let mut names = HashMap::new();
    for index in 0..tensor_count {
        let entry = tensor(&mut cursor, index)?;
        if names.insert(entry.name.clone(), index).is_some() {
            return Err(Error::invalid_model("the tensor occurs twice").with("tensor", &entry.name));
        }
        entries.push(entry);
    }
    let begin = (cursor.at as u64).next_multiple_of(alignment).min(bytes.len() as u64);
    let (tensors, end) = layout::place(entries, bytes.len() as u64 - begin, alignment)?;
    let data = bytes
        .slice(begin as usize..(begin + end) as usize)
        .expect("invariant: the last tensor ends within the file");
    Ok(File {
        path: path.to_owned(),
        other_paths: Vec::new(),
        version,
        alignment,
        metadata,
        keys,
        tensors,
        names,
        data: vec![data],
    })
}

fn header(cursor: &mut Cursor<'_>) -> Result<u32> {
    if cursor.all.starts_with(LFS_POINTER) {
        return Err(Error::invalid_model(LFS_MESSAGE));
    }
    let magic = cursor.take(4, "the header")?;
    if magic != MAGIC {
        let found = shorten(&String::from_utf8_lossy(magic));
        return Err(Error::invalid_model(format!("the file begins with `{found}`, expected `GGUF`")));
    }
    let version = cursor.u32("the header")?;
    if VERSIONS.contains(&version) {
        return Ok(version);
    }
    if VERSIONS.contains(&version.swap_bytes()) {
        return Err(Error::unsupported(
            "the file is big-endian, which is not supported; supported: little-endian",
        ));
    }
    Err(Error::unsupported(format!("the version is {version}, which is not supported; supported: 2, 3")))
}

fn value(cursor: &mut Cursor<'_>, key: &str) -> Result<Value> {
    let kind = value_type(cursor)?;
    match kind {
        ValueType::String => Ok(Value::String(cursor.string(MAX_STRING, &format!("`{key}`"))?.to_owned())),
        ValueType::Array => array(cursor, key).map(Value::Array),
        scalar => {
            let size = scalar.size().expect("invariant: only strings and arrays have none") as u64;
            let bytes = cursor.take(size, &format!("`{key}`"))?;
            if scalar == ValueType::Bool && bytes[0] > 1 {
                return Err(Error::invalid_model(format!("the boolean is {}, expected 0 or 1", bytes[0])));
            }
            Ok(Value::decode(scalar, bytes).expect("invariant: a scalar of its own size"))
        }
    }
}

fn value_type(cursor: &mut Cursor<'_>) -> Result<ValueType> {
    let id = cursor.u32("the type of a value")?;
    ValueType::from_id(id)
        .ok_or_else(|| Error::invalid_model(format!("the type of the value is {id}, expected 0 to 12")))
}

fn array(cursor: &mut Cursor<'_>, key: &str) -> Result<Array> {
    let kind = value_type(cursor)?;
    if kind == ValueType::Array {
        return Err(Error::unsupported(
            "an array of arrays is not supported; supported: arrays of strings and numbers",
        ));
    }
    let what = format!("the array `{key}`");
    // A string has at least its length.
    let len = cursor.count(&what, MAX_ARRAY, kind.size().unwrap_or(8) as u64)?;
    let begin = cursor.at;
    if let Some(size) = kind.size() {
        cursor.take((len * size) as u64, &what)?;
    } else {
        for _ in 0..len {
            cursor.string(MAX_STRING, &what)?;
        }
    }
    let bytes = cursor.all.slice(begin..cursor.at).expect("invariant: the cursor lies within the bytes");
    Ok(Array { kind, len, bytes })
}

fn alignment(value: Option<&Value>) -> Result<u64> {
    let wrong = |value: &Value| {
        let expected = format!("a power of two up to {MAX_ALIGNMENT} as u32");
        let found = shorten(value);
        Err(Error::invalid_model(format!("`{ALIGNMENT}` is {found} ({}), expected {expected}", value.kind())))
    };
    match value {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::U32(n)) if n.is_power_of_two() && u64::from(n) <= MAX_ALIGNMENT => Ok(n.into()),
        Some(other) => wrong(other),
    }
}

fn tensor(cursor: &mut Cursor<'_>, index: usize) -> Result<Entry> {
    let name = cursor.string(MAX_NAME as u64, &format!("the name of tensor {index}"))?.to_owned();
    if name.is_empty() || name.contains(char::is_control) {
        let shown = shorten(&name);
        return Err(Error::invalid_model(format!(
            "tensor {index} is named `{shown}`, expected a printable name"
        )));
    }
    let described = (|| {
        let what = "the table of tensors";
        let count = cursor.u32(what)?;
        if !(1..=MAX_DIMS).contains(&count) {
            return Err(Error::invalid_model(format!(
                "the tensor has {count} dimensions, expected 1 to {MAX_DIMS}"
            )));
        }
        let dims = (0..count).map(|_| cursor.u64(what)).collect::<Result<Vec<_>>>()?;
        if dims.iter().any(|&n| n == 0 || n > i64::MAX as u64) {
            let max = i64::MAX;
            return Err(Error::invalid_model(format!(
                "the dimensions are {dims:?}, expected each from 1 to {max}"
            )));
        }
        Ok((dims, cursor.u32(what)?, cursor.u64(what)?))
    })();
    let (dims, id, offset) = described.map_err(|e: Error| e.with("tensor", &name))?;
    Ok(Entry { name, dims, id, offset })
}

/// The first name that occurs twice.
pub(super) fn duplicate<'a>(names: impl Iterator<Item = &'a str>) -> Option<(usize, &'a str)> {
    let mut seen = HashSet::new();
    names.enumerate().find(|(_, name)| !seen.insert(*name))
}
