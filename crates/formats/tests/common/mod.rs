//! Builds checkpoints that are wrong in one respect: a fixture is read into memory, changed and written elsewhere.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

pub(crate) mod gguf;

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use tempfile::TempDir;
use ternion_core::{Error, ErrorKind};
use ternion_formats::Checkpoint;
pub(crate) use ternion_test_support::fixture;

/// A tensor as it will be written.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// A checkpoint in memory.
pub(crate) struct Model {
    pub(crate) config: Value,
    pub(crate) tensors: Vec<Tensor>,
}

impl Model {
    /// Reads a fixture with the reference implementation of safetensors.
    pub(crate) fn fixture(name: &str) -> Self {
        let folder = fixture(name);
        let config = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        let bytes = fs::read(folder.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file
            .iter()
            .map(|(name, view)| Tensor {
                name: name.to_owned(),
                dtype: format!("{:?}", view.dtype()),
                shape: view.shape().to_vec(),
                bytes: view.data().to_vec(),
            })
            .collect();
        Self { config, tensors }
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    pub(crate) fn remove(&mut self, name: &str) -> Tensor {
        let at =
            self.tensors.iter().position(|t| t.name == name).unwrap_or_else(|| panic!("no tensor {name}"));
        self.tensors.remove(at)
    }

    pub(crate) fn add(&mut self, name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>) {
        self.tensors.push(Tensor { name: name.into(), dtype: dtype.into(), shape: shape.into(), bytes });
    }

    /// Writes it to a new folder as a single file.
    pub(crate) fn write(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), self.config.to_string()).unwrap();
        fs::write(folder.path().join("model.safetensors"), container(&self.tensors)).unwrap();
        folder
    }

    /// Writes it, opens it and returns the error.
    pub(crate) fn error(&self) -> Error {
        let folder = self.write();
        open_error(folder.path())
    }
}

/// The error of opening `path`.
pub(crate) fn open_error(path: &Path) -> Error {
    match Checkpoint::open(path) {
        Ok(checkpoint) => panic!("accepted: {:?}", checkpoint.spec),
        Err(error) => error,
    }
}

/// Asserts that an error is of this kind and that its line has all these parts.
#[track_caller]
pub(crate) fn assert_says(error: &Error, kind: ErrorKind, parts: &[&str]) {
    let line = error.to_string();
    assert_eq!(error.kind(), kind, "{line}");
    for part in parts {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
    assert!(!line.contains('\n') && line.len() < 600, "not one short line: {line}");
}

/// The bytes of a safetensors file with these tensors in this order.
pub(crate) fn container(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut data = Vec::new();
    for tensor in tensors {
        let begin = data.len();
        data.extend_from_slice(&tensor.bytes);
        let entry =
            json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, data.len()]});
        header.insert(tensor.name.clone(), entry);
    }
    with_header(Value::Object(header).to_string().as_bytes(), &data)
}

/// The bytes of a safetensors file with this header and these data, whatever they are.
pub(crate) fn with_header(header: &[u8], data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.extend_from_slice(data);
    bytes
}

/// bf16 bytes of these values.
pub(crate) fn bf16(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()
}

/// The weights of a ternary tensor, row by row.
pub(crate) fn trits(tensor: &ternion_formats::TernaryTensor) -> Vec<i8> {
    ternion_kernels::unpack(tensor.view().unwrap())
}
