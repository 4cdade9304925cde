//! Building a graph: nodes, constants, and the file beside the model that holds the large ones.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use prost::Message;
use ternion_core::{Error, Result};

use super::proto::{
    Attribute, Dimension, Entry, Graph, Model, Node, OperatorSet, Shape, Size, Tensor, TensorType, Type,
    ValueInfo,
};
use super::{ALIGNMENT, Element};

/// Constants below this many bytes stay in the model's file: shape inference wants to see them.
const INLINE: usize = 1024;

/// The revision of the file format, not of the operators; 10 came with ONNX 1.16 and has all that is used here.
const IR_VERSION: i64 = 10;

/// A dimension of an input or output.
pub(crate) enum Dim {
    Known(usize),
    Named(&'static str),
}

/// A graph that grows node by node.
pub(crate) struct Builder {
    graph: Graph,
    opsets: Vec<OperatorSet>,
    /// Small constants by what they hold, so that each exists once.
    constants: BTreeMap<(i32, Vec<i64>, Vec<u8>), String>,
    data: DataFile,
}

impl Builder {
    /// An empty graph whose large tensors go into `data`, a new file in `folder`.
    pub(crate) fn new(folder: &Path, data: &str, opsets: &[(&str, i64)]) -> Result<Self> {
        Ok(Self {
            graph: Graph { name: "decoder".to_owned(), ..Graph::default() },
            opsets: opsets
                .iter()
                .map(|&(domain, version)| OperatorSet { domain: domain.to_owned(), version })
                .collect(),
            constants: BTreeMap::new(),
            data: DataFile::create(folder, data)?,
        })
    }

    /// Adds an input of the graph.
    pub(crate) fn input(&mut self, name: &str, element: Element, dims: &[Dim]) {
        self.graph.input.push(value_info(name, element, dims));
    }

    /// Adds an output of the graph.
    pub(crate) fn output(&mut self, name: &str, element: Element, dims: &[Dim]) {
        self.graph.output.push(value_info(name, element, dims));
    }

    /// Adds a node with one output, which gets the node's name. An empty input stands for one that is left out.
    pub(crate) fn node(
        &mut self,
        name: impl Into<String>,
        operator: Operator<'_>,
        inputs: &[&str],
        attributes: Vec<Attribute>,
    ) -> String {
        let name = name.into();
        self.node_with_outputs(&name, operator, inputs, &[&name], attributes);
        name
    }

    /// Adds a node with these outputs.
    pub(crate) fn node_with_outputs(
        &mut self,
        name: &str,
        operator: Operator<'_>,
        inputs: &[&str],
        outputs: &[&str],
        attributes: Vec<Attribute>,
    ) {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        self.graph.node.push(Node {
            input: owned(inputs),
            output: owned(outputs),
            name: name.to_owned(),
            op_type: operator.name.to_owned(),
            attribute: attributes,
            domain: operator.domain.to_owned(),
        });
    }

    /// Adds a constant tensor, in the data file unless it is small.
    pub(crate) fn tensor(
        &mut self,
        name: &str,
        element: Element,
        dims: &[usize],
        bytes: &[u8],
    ) -> Result<()> {
        let mut tensor = Tensor {
            dims: dims.iter().map(|&d| d as i64).collect(),
            element: element.number(),
            name: name.to_owned(),
            ..Tensor::default()
        };
        if bytes.len() < INLINE {
            tensor.raw = Some(bytes.to_vec());
        } else {
            let offset = self.data.append(bytes)?;
            let entry = |key: &str, value: String| Entry { key: key.to_owned(), value };
            tensor.external = vec![
                entry("location", self.data.name.clone()),
                entry("offset", offset.to_string()),
                entry("length", bytes.len().to_string()),
            ];
            tensor.location = 1;
        }
        self.graph.initializer.push(tensor);
        Ok(())
    }

    /// Adds a constant tensor of floats.
    pub(crate) fn floats(&mut self, name: &str, dims: &[usize], values: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensor(name, Element::F32, dims, &bytes)
    }

    /// The name of a small constant; the same for the same value.
    pub(crate) fn integers(&mut self, dims: &[usize], values: &[i64]) -> Result<String> {
        self.constant(Element::I64, dims, values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    /// The name of a single float; the same for the same value.
    pub(crate) fn float(&mut self, value: f32) -> Result<String> {
        self.constant(Element::F32, &[], value.to_le_bytes().to_vec())
    }

    fn constant(&mut self, element: Element, dims: &[usize], bytes: Vec<u8>) -> Result<String> {
        let key = (element.number(), dims.iter().map(|&d| d as i64).collect(), bytes);
        if let Some(name) = self.constants.get(&key) {
            return Ok(name.clone());
        }
        let name = format!("constant.{}", self.constants.len());
        self.tensor(&name, element, dims, &key.2)?;
        self.constants.insert(key, name.clone());
        Ok(name)
    }

    /// Whether a constant tensor has this name.
    pub(crate) fn has_tensor(&self, name: &str) -> bool {
        self.graph.initializer.iter().any(|t| t.name == name)
    }

    /// Bytes of the data file so far.
    pub(crate) fn written(&self) -> u64 {
        self.data.length
    }

    /// Writes the model's file and ends the data file.
    pub(crate) fn finish(self, path: &Path, metadata: &[(&str, String)]) -> Result<()> {
        let model = Model {
            ir_version: IR_VERSION,
            producer_name: "ternion".to_owned(),
            producer_version: env!("CARGO_PKG_VERSION").to_owned(),
            graph: Some(self.graph),
            opset_import: self.opsets,
            metadata: metadata
                .iter()
                .map(|(key, value)| Entry { key: (*key).to_owned(), value: value.clone() })
                .collect(),
        };
        self.data.finish()?;
        let file = File::create(path).map_err(|e| Error::io(path, e))?;
        let write = |mut file: File| -> std::io::Result<()> {
            file.write_all(&model.encode_to_vec())?;
            file.sync_all()
        };
        write(file).map_err(|e| Error::io(path, e))
    }
}

/// An operator and the domain that it belongs to.
#[derive(Clone, Copy)]
pub(crate) struct Operator<'a> {
    pub(crate) domain: &'a str,
    pub(crate) name: &'a str,
}

/// An operator of the ONNX standard.
pub(crate) const fn onnx(name: &str) -> Operator<'_> {
    Operator { domain: "", name }
}

fn value_info(name: &str, element: Element, dims: &[Dim]) -> ValueInfo {
    let dim = |dim: &Dim| Dimension {
        size: Some(match *dim {
            Dim::Known(size) => Size::Known(size as i64),
            Dim::Named(name) => Size::Named(name.to_owned()),
        }),
    };
    let shape = Shape { dim: dims.iter().map(dim).collect() };
    let tensor = TensorType { element: element.number(), shape: Some(shape) };
    ValueInfo { name: name.to_owned(), r#type: Some(Type { tensor: Some(tensor) }) }
}

/// The file of large tensors. Each begins at a multiple of [`ALIGNMENT`], so that it can be mapped.
struct DataFile {
    name: String,
    path: PathBuf,
    file: BufWriter<File>,
    length: u64,
}

impl DataFile {
    fn create(folder: &Path, name: &str) -> Result<Self> {
        let path = folder.join(name);
        let file = BufWriter::new(File::create(&path).map_err(|e| Error::io(&path, e))?);
        Ok(Self { name: name.to_owned(), path, file, length: 0 })
    }

    /// Writes a tensor and returns where it begins.
    fn append(&mut self, bytes: &[u8]) -> Result<u64> {
        let padding = self.length.next_multiple_of(ALIGNMENT) - self.length;
        let offset = self.length + padding;
        let mut write = || -> std::io::Result<()> {
            self.file.write_all(&[0; ALIGNMENT as usize][..padding as usize])?;
            self.file.write_all(bytes)
        };
        write().map_err(|e| Error::io(&self.path, e))?;
        self.length = offset + bytes.len() as u64;
        Ok(offset)
    }

    fn finish(self) -> Result<()> {
        let finish = || -> std::io::Result<()> {
            self.file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
        };
        finish().map_err(|e| Error::io(&self.path, e))
    }
}
