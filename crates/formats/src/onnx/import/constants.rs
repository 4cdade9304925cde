//! The graph that is read: its nodes by what they give, and the data of its constants.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use ternion_core::{Error, Result};

use super::super::Element;
use super::super::summary::{Initializer, Node, Summary};
use crate::safetensors::RawTensor;
use crate::{DenseTensor, DenseType, SharedBytes};

/// A checked graph with the data of its constants, which stay in the mapped files.
pub(super) struct Graph<'a> {
    pub(super) summary: &'a Summary,
    nodes: BTreeMap<&'a str, &'a Node>,
    constants: BTreeMap<&'a str, &'a Initializer>,
    model: SharedBytes,
    data: BTreeMap<PathBuf, SharedBytes>,
    file: Arc<PathBuf>,
}

/// A constant with its data.
pub(super) struct Constant {
    pub(super) name: String,
    pub(super) element: Element,
    pub(super) dims: Vec<usize>,
    pub(super) bytes: SharedBytes,
    file: Arc<PathBuf>,
}

impl<'a> Graph<'a> {
    /// Maps the files that hold the constants.
    ///
    /// # Errors
    /// Those of [`SharedBytes::map`].
    pub(super) fn open(summary: &'a Summary) -> Result<Self> {
        let data = summary.data_files.iter().map(|path| Ok((path.clone(), SharedBytes::map(path)?)));
        let outputs =
            summary.nodes.iter().flat_map(|node| node.outputs.iter().map(move |o| (o.as_str(), node)));
        Ok(Self {
            nodes: outputs.collect(),
            constants: summary.initializers.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect(),
            model: SharedBytes::map(&summary.path)?,
            data: data.collect::<Result<_>>()?,
            file: Arc::new(summary.path.clone()),
            summary,
        })
    }

    /// The model's file.
    pub(super) fn file(&self) -> Arc<PathBuf> {
        Arc::clone(&self.file)
    }

    /// An error about a node or a constant of the graph.
    pub(super) fn invalid(&self, what: &'static str, name: &str, message: impl Into<String>) -> Error {
        Error::invalid_model(message).with(what, name).with("file", self.file.display())
    }

    /// The node that gives the value `name`, where one does.
    pub(super) fn find(&self, name: &str) -> Option<&'a Node> {
        self.nodes.get(name).copied()
    }

    /// The node that gives the value `name`.
    pub(super) fn node(&self, name: &str) -> Result<&'a Node> {
        self.find(name).ok_or_else(|| self.invalid("node", name, "the node is missing"))
    }

    /// Whether there is a constant of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.constants.contains_key(name)
    }

    /// The names of all constants.
    pub(super) fn names(&self) -> BTreeSet<&'a str> {
        self.constants.keys().copied().collect()
    }

    /// Input `index` of a node, which must be given.
    pub(super) fn input(&self, node: &'a Node, index: usize) -> Result<&'a str> {
        node.input(index).ok_or_else(|| {
            let message = format!("{} has no input {index}, expected a constant", node.operator);
            self.invalid("node", &node.name, message)
        })
    }

    /// An integer attribute of a node that is a size.
    pub(super) fn size(&self, node: &Node, name: &str) -> Result<usize> {
        node.integer(name).and_then(|size| usize::try_from(size).ok()).ok_or_else(|| {
            let found = node.integer(name).map_or("missing".to_owned(), |size| size.to_string());
            let message = format!("the attribute `{name}` of {} is {found}, expected a size", node.operator);
            self.invalid("node", &node.name, message)
        })
    }

    /// The constant `name` with its data.
    pub(super) fn constant(&self, name: &str) -> Result<Constant> {
        let Some(tensor) = self.constants.get(name) else {
            return Err(self.invalid("tensor", name, "the tensor is missing"));
        };
        let (owner, at, file) = match (&tensor.external, tensor.inline) {
            (Some((path, at)), _) => (self.data.get(path), *at, Arc::new(path.clone())),
            (None, Some(at)) => (Some(&self.model), at, self.file()),
            (None, None) => {
                let message = format!("its data of {} is a list of numbers, expected bytes", tensor.element);
                return Err(Error::unsupported(message)
                    .with("tensor", name)
                    .with("file", self.file.display()));
            }
        };
        let dims: Option<Vec<usize>> = tensor.dims.iter().map(|size| usize::try_from(*size).ok()).collect();
        let length = tensor.element.bytes(tensor.dims.iter().product());
        let end = length.and_then(|length| at.checked_add(length));
        let range = end.and_then(|end| Some(usize::try_from(at).ok()?..usize::try_from(end).ok()?));
        let bytes = owner.zip(range).and_then(|(owner, range)| owner.slice(range));
        match (bytes, dims) {
            (Some(bytes), Some(dims)) => {
                Ok(Constant { name: name.to_owned(), element: tensor.element, dims, bytes, file })
            }
            // The summary has checked this.
            _ => Err(self.invalid("tensor", name, "its data ends beyond the file, which has changed")),
        }
    }
}

impl Constant {
    /// An error about it.
    pub(super) fn invalid(&self, message: impl Into<String>) -> Error {
        Error::invalid_model(message).with("tensor", &self.name).with("file", self.file.display())
    }

    /// An error about something in it that is well formed and not read.
    pub(super) fn unsupported(&self, message: impl Into<String>) -> Error {
        Error::unsupported(message).with("tensor", &self.name).with("file", self.file.display())
    }

    /// Checks type and number of elements of codes.
    pub(super) fn check_codes(&self, bytes: usize) -> Result<()> {
        if self.element != Element::U8 {
            return Err(self.invalid(format!("the element type is {}, expected uint8", self.element)));
        }
        if self.bytes.len() == bytes {
            return Ok(());
        }
        Err(self.invalid(format!("the shape is {:?}, expected {bytes} bytes of codes", self.dims)))
    }

    fn dense_type(&self) -> Result<DenseType> {
        match self.element {
            Element::F32 => Ok(DenseType::F32),
            Element::F16 => Ok(DenseType::F16),
            Element::Bf16 => Ok(DenseType::Bf16),
            other => {
                Err(self.invalid(format!("the element type is {other}, expected float, float16 or bfloat16")))
            }
        }
    }

    /// The elements as a matrix or a list of floats.
    pub(super) fn dense(&self) -> Result<DenseTensor> {
        let dtype = self.dense_type()?;
        Ok(DenseTensor { dtype, shape: self.dims.clone(), bytes: self.bytes.clone() })
    }

    /// `count` floats.
    pub(super) fn floats(&self, count: usize) -> Result<Vec<f32>> {
        let dense = self.dense()?;
        if dense.elements() != count {
            return Err(self.invalid(format!("the shape is {:?}, expected {count} elements", self.dims)));
        }
        Ok(dense.to_f32())
    }

    /// The same as a tensor of a checkpoint.
    pub(super) fn raw(self) -> Result<RawTensor> {
        Ok(RawTensor::from_dense(self.dense()?, self.file))
    }
}
