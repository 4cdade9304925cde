//! Builds GGUF files byte by byte, right or wrong.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::path::Path;

use ternion_core::{Error, Result};
use ternion_formats::convert::{Options, Target, convert};
use ternion_formats::gguf::{Array, File, Value, ValueType};
use ternion_formats::{Checkpoint, SharedBytes};

#[derive(Clone)]
pub(crate) struct RawTensor {
    pub(crate) name: Vec<u8>,
    pub(crate) dims: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
    /// `None`: where it follows from the tensors before.
    pub(crate) offset: Option<u64>,
}

/// A file whose every number can be set.
pub(crate) struct Raw {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    pub(crate) tensor_count: Option<u64>,
    pub(crate) pair_count: Option<u64>,
    /// Key, type, value.
    pub(crate) pairs: Vec<(Vec<u8>, u32, Vec<u8>)>,
    pub(crate) tensors: Vec<RawTensor>,
    pub(crate) alignment: usize,
    pub(crate) trailing: Vec<u8>,
}

impl Raw {
    pub(crate) fn new() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            pair_count: None,
            pairs: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
            trailing: Vec::new(),
        }
    }

    /// A fixture, converted.
    pub(crate) fn fixture(name: &str, target: Target) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gguf");
        let checkpoint = Checkpoint::open(super::fixture(name)).unwrap();
        convert(&checkpoint, &path, &Options::new(target), &mut |_, _| {}).unwrap();
        Self::read(&path)
    }

    pub(crate) fn read(path: &Path) -> Self {
        let file = File::open(path).unwrap();
        let mut raw = Self::new();
        for (key, value) in file.metadata() {
            raw.set(key, value.clone());
        }
        for tensor in file.tensors() {
            raw.tensors.push(RawTensor {
                name: tensor.name.clone().into_bytes(),
                dims: tensor.dims.clone(),
                kind: tensor.kind.id(),
                data: file.data(tensor).to_vec(),
                offset: None,
            });
        }
        raw
    }

    pub(crate) fn pair(&mut self, key: &[u8], kind: u32, value: Vec<u8>) {
        self.pairs.retain(|(known, _, _)| known != key);
        self.pairs.push((key.to_vec(), kind, value));
    }

    pub(crate) fn set(&mut self, key: &str, value: impl Into<Value>) {
        let value = value.into();
        self.pair(key.as_bytes(), value.kind() as u32, bytes_of(&value));
    }

    pub(crate) fn remove(&mut self, key: &str) {
        let before = self.pairs.len();
        self.pairs.retain(|(known, _, _)| known != key.as_bytes());
        assert!(self.pairs.len() < before, "{key} was not there");
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut RawTensor {
        self.tensors.iter_mut().find(|t| t.name == name.as_bytes()).unwrap_or_else(|| panic!("no {name}"))
    }

    pub(crate) fn add(&mut self, name: &str, dims: &[u64], kind: u32, data: Vec<u8>) {
        let tensor = RawTensor { name: name.into(), dims: dims.into(), kind, data, offset: None };
        self.tensors.push(tensor);
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.pair_count.unwrap_or(self.pairs.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.pairs {
            out.extend((key.len() as u64).to_le_bytes());
            out.extend(key);
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut at = 0u64;
        for tensor in &self.tensors {
            out.extend((tensor.name.len() as u64).to_le_bytes());
            out.extend(&tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(at).to_le_bytes());
            at = (at + tensor.data.len() as u64).next_multiple_of(self.alignment as u64);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&tensor.data);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(&self.trailing);
        out
    }

    pub(crate) fn parse(&self) -> Result<File> {
        File::parse(&SharedBytes::from(self.bytes()), "x.gguf")
    }

    pub(crate) fn error(&self) -> Error {
        self.parse().map(|_| ()).expect_err("accepted")
    }

    pub(crate) fn open(&self) -> Result<Checkpoint> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gguf");
        std::fs::write(&path, self.bytes()).unwrap();
        Checkpoint::open(&path)
    }

    pub(crate) fn open_error(&self) -> Error {
        self.open().map(|_| ()).expect_err("accepted")
    }
}

pub(crate) fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

/// An array's type, length and elements.
pub(crate) fn array(kind: ValueType, len: u64, bytes: &[u8]) -> Vec<u8> {
    [&(kind as u32).to_le_bytes()[..], &len.to_le_bytes(), bytes].concat()
}

fn bytes_of(value: &Value) -> Vec<u8> {
    match value {
        Value::U8(n) => vec![*n],
        Value::I8(n) => n.to_le_bytes().to_vec(),
        Value::U16(n) => n.to_le_bytes().to_vec(),
        Value::I16(n) => n.to_le_bytes().to_vec(),
        Value::U32(n) => n.to_le_bytes().to_vec(),
        Value::I32(n) => n.to_le_bytes().to_vec(),
        Value::F32(x) => x.to_le_bytes().to_vec(),
        Value::Bool(value) => vec![u8::from(*value)],
        Value::String(text) => string(text.as_bytes()),
        Value::Array(items) => bytes_of_array(items),
        Value::U64(n) => n.to_le_bytes().to_vec(),
        Value::I64(n) => n.to_le_bytes().to_vec(),
        Value::F64(x) => x.to_le_bytes().to_vec(),
    }
}

fn bytes_of_array(items: &Array) -> Vec<u8> {
    let elements: Vec<u8> = match items.as_strings() {
        Some(strings) => strings.flat_map(|text| string(text.as_bytes())).collect(),
        None => items.as_scalars().unwrap().flat_map(|value| bytes_of(&value)).collect(),
    };
    array(items.kind(), items.len() as u64, &elements)
}
