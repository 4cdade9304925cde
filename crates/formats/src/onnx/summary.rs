//! What a file is about, without its data: inputs, outputs, nodes, and where the constants are.
//!
//! All of a file is walked through, graphs within nodes and functions included, and every tensor in it is checked: what it
//! says of its data must be what is there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use ternion_core::{Error, Result, ResultExt};

use super::Element;
use super::check::{DataFile, Folder, Tensor};
use super::wire::{self, Message};
use crate::SharedBytes;

/// Protobuf's own limit.
const MAX_FILE: u64 = 1 << 31;

/// Nodes, tensors, names and attributes of a file, all together: a real decoder has some ten thousand. Bounds the memory
/// that a file of tiny entries can ask for.
const MAX_ITEMS: usize = 1 << 21;

/// Characters of a name.
const MAX_NAME: u64 = 1024;

/// A model's file as far as it matters to who wants to run it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Summary {
    /// The file.
    pub path: PathBuf,
    /// Who wrote it.
    pub producer: String,
    /// The sets of operators that it uses, and their versions. The ONNX standard's own is called ``.
    pub opsets: Vec<(String, i64)>,
    /// Domains of functions that the file itself defines.
    pub functions: BTreeSet<String>,
    /// Inputs of the graph, those with a value of their own ([`initializers`](Self::initializers)) among them.
    pub inputs: Vec<Value>,
    /// Outputs of the graph.
    pub outputs: Vec<Value>,
    /// Constant tensors of the graph.
    pub initializers: Vec<Initializer>,
    /// The nodes of the graph, in their order.
    pub nodes: Vec<Node>,
    /// The nodes of graphs within nodes, and of functions.
    pub inner_nodes: Vec<Node>,
    /// Keys and values that the writer added.
    pub metadata: Vec<(String, String)>,
    /// Files beside it that hold constants, which a runtime maps.
    pub data_files: Vec<PathBuf>,
    /// Tensors that lie in these files; more than [`initializers`](Self::initializers) where graphs within nodes have some.
    pub external_tensors: usize,
    /// The model's file and those of its data.
    checked: Vec<DataFile>,
}

/// An input or output.
#[derive(Debug, Clone, PartialEq)]
pub struct Value {
    /// Its name.
    pub name: String,
    /// Type of its elements; `None` where it is no tensor.
    pub element: Option<Element>,
    /// Its dimensions, the outermost first; `None` where even their number is open.
    pub dims: Option<Vec<Size>>,
}

/// A dimension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Size {
    /// Always this size.
    Known(i64),
    /// Whatever is given, the same wherever the name occurs.
    Named(String),
    /// Whatever is given.
    Open,
}

/// A constant tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Initializer {
    /// Its name.
    pub name: String,
    /// Type of its elements.
    pub element: Element,
    /// Its dimensions, the outermost first.
    pub dims: Vec<u64>,
    /// The file beside the model's that holds its elements, and where in it they begin.
    pub external: Option<(PathBuf, u64)>,
    /// Where its elements begin in the model's own file, where they lie there one after the other.
    pub(super) inline: Option<u64>,
}

/// One operation.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Node {
    /// The name of the node; may be empty.
    pub name: String,
    /// The name of the operator.
    pub operator: String,
    /// The operator's domain; empty for the ONNX standard.
    pub domain: String,
    /// Names of its inputs; empty where one is left out.
    pub inputs: Vec<String>,
    /// Names of its outputs.
    pub outputs: Vec<String>,
    /// Its attributes by name.
    pub attributes: Vec<(String, Attribute)>,
}

impl Node {
    /// The integer attribute `name`.
    pub fn integer(&self, name: &str) -> Option<i64> {
        self.attributes.iter().find_map(|(key, value)| match value {
            Attribute::Integer(i) if key == name => Some(*i),
            _ => None,
        })
    }

    /// The float attribute `name`.
    pub fn float(&self, name: &str) -> Option<f32> {
        self.attributes.iter().find_map(|(key, value)| match value {
            Attribute::Float(x) if key == name => Some(*x),
            _ => None,
        })
    }

    /// The attribute `name`, a list of floats; empty where there is none.
    pub fn floats(&self, name: &str) -> &[f32] {
        let found = self.attributes.iter().find_map(|(key, value)| match value {
            Attribute::Floats(floats) if key == name => Some(&floats[..]),
            _ => None,
        });
        found.unwrap_or_default()
    }

    /// The attribute `name`, a short text.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find_map(|(key, value)| match value {
            Attribute::Text(text) if key == name => Some(text.as_str()),
            _ => None,
        })
    }

    /// Input `index`; `None` where it is left out.
    pub fn input(&self, index: usize) -> Option<&str> {
        self.inputs.get(index).map(String::as_str).filter(|name| !name.is_empty())
    }
}

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Attribute {
    /// An integer.
    Integer(i64),
    /// A float.
    Float(f32),
    /// Several floats.
    Floats(Vec<f32>),
    /// A short text.
    Text(String),
    /// Anything else.
    Other,
}

impl Summary {
    /// Reads and checks a file. Its tensors' data is not read, only looked for.
    ///
    /// # Errors
    /// [`NotFound`](ternion_core::ErrorKind::NotFound) for a file or its data that is not there,
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) naming what is damaged, contradicts itself or leaves the
    /// folder or repository.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        read(path).with("file", path.display()).with_operation("load")
    }

    /// Whether the model's file and its data are still those that were checked: for after a runtime has opened them by
    /// their names.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) naming a file that is another one now.
    pub fn check_unchanged(&self) -> Result<()> {
        self.checked.iter().try_for_each(DataFile::check_unchanged).with_operation("load")
    }

    /// The version of a set of operators that is used; `""` is the ONNX standard's own.
    pub fn opset(&self, domain: &str) -> Option<i64> {
        self.opsets.iter().find(|(name, _)| name == domain).map(|(_, version)| *version)
    }

    /// The input `name`.
    pub fn input(&self, name: &str) -> Option<&Value> {
        self.inputs.iter().find(|v| v.name == name)
    }

    /// The output `name`.
    pub fn output(&self, name: &str) -> Option<&Value> {
        self.outputs.iter().find(|v| v.name == name)
    }

    /// The constant `name`.
    pub fn initializer(&self, name: &str) -> Option<&Initializer> {
        self.initializers.iter().find(|t| t.name == name)
    }

    /// Bytes of all constants of the graph.
    pub fn data_bytes(&self) -> u64 {
        let bytes = |t: &Initializer| t.element.bytes(t.dims.iter().product()).unwrap_or(0);
        self.initializers.iter().map(bytes).fold(0, u64::saturating_add)
    }

    /// What the writer says of `key`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }
}

fn read(path: &Path) -> Result<Summary> {
    let bytes = SharedBytes::map(path)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::invalid_model(format!(
            "the file has {} bytes, expected at most 2 GiB: larger tensors belong into a file beside it",
            bytes.len()
        )));
    }
    let mut walk = Walk { folder: Folder::of(path), items: 0, functions: BTreeSet::new(), inner: Vec::new() };
    let mut summary = Summary {
        path: path.to_owned(),
        producer: String::new(),
        opsets: Vec::new(),
        functions: BTreeSet::new(),
        inputs: Vec::new(),
        outputs: Vec::new(),
        initializers: Vec::new(),
        nodes: Vec::new(),
        inner_nodes: Vec::new(),
        metadata: Vec::new(),
        data_files: Vec::new(),
        external_tensors: 0,
        checked: vec![DataFile::of(path)?],
    };
    let mut graph = None;
    let mut message = Message::whole(&bytes);
    while let Some((number, value)) = message.next()? {
        let wire::Value::Bytes(field) = value else { continue };
        match number {
            2 => summary.producer = walk.name(field)?,
            7 => graph = Some(field.enter()?),
            8 => {
                walk.count(1)?;
                summary.opsets.push(opset(field.enter()?)?);
            }
            14 => summary.metadata.push(walk.entry(field.enter()?)?),
            20 => {
                return Err(Error::unsupported("holds training information; a model for inference expected"));
            }
            25 => walk.function(field.enter()?)?,
            _ => {}
        }
    }
    let graph = graph.ok_or_else(|| Error::invalid_model("holds no graph"))?;
    let graph = walk.graph(graph)?;
    summary.inputs = graph.inputs;
    summary.outputs = graph.outputs;
    summary.initializers = graph.initializers;
    summary.nodes = graph.nodes;
    summary.functions = walk.functions;
    summary.inner_nodes = walk.inner;
    summary.data_files = walk.folder.data_files().map(|file| file.path().to_owned()).collect();
    summary.external_tensors = walk.folder.external_tensors;
    summary.checked.extend(walk.folder.data_files().cloned());
    Ok(summary)
}

#[derive(Default)]
struct Graph {
    inputs: Vec<Value>,
    outputs: Vec<Value>,
    initializers: Vec<Initializer>,
    nodes: Vec<Node>,
}

/// A walk through a file.
struct Walk {
    folder: Folder,
    items: usize,
    functions: BTreeSet<String>,
    inner: Vec<Node>,
}

impl Walk {
    fn count(&mut self, items: usize) -> Result<()> {
        self.items += items;
        if self.items > MAX_ITEMS {
            return Err(Error::invalid_model(format!("has more than {MAX_ITEMS} nodes, tensors and names")));
        }
        Ok(())
    }

    fn name(&mut self, field: Message<'_>) -> Result<String> {
        self.count(1)?;
        if field.len() > MAX_NAME {
            return Err(Error::invalid_model(format!(
                "a name has {} bytes, expected at most {MAX_NAME}",
                field.len()
            )));
        }
        let name = field.text()?;
        if name.contains('\0') {
            return Err(Error::invalid_model(format!("the name {name:?} has a zero byte")));
        }
        Ok(name.to_owned())
    }

    fn entry(&mut self, mut message: Message<'_>) -> Result<(String, String)> {
        let mut entry = (String::new(), String::new());
        while let Some((number, value)) = message.next()? {
            match (number, value) {
                (1, wire::Value::Bytes(field)) => entry.0 = self.name(field)?,
                // Exporters keep whole JSON documents here; what is longer than a name is not for us.
                (2, wire::Value::Bytes(field)) if field.len() <= MAX_NAME => entry.1 = self.name(field)?,
                _ => {}
            }
        }
        Ok(entry)
    }

    fn graph(&mut self, mut message: Message<'_>) -> Result<Graph> {
        let mut graph = Graph::default();
        while let Some((number, value)) = message.next()? {
            let wire::Value::Bytes(field) = value else { continue };
            match number {
                1 => graph.nodes.push(self.node(field.enter()?)?),
                5 => graph.initializers.push(self.initializer(field.enter()?)?),
                11 => graph.inputs.push(self.value(field.enter()?)?),
                12 => graph.outputs.push(self.value(field.enter()?)?),
                15 => self.sparse(field.enter()?)?,
                _ => {}
            }
        }
        Ok(graph)
    }

    fn node(&mut self, mut message: Message<'_>) -> Result<Node> {
        self.count(1)?;
        let mut node = Node::default();
        while let Some((number, value)) = message.next()? {
            let wire::Value::Bytes(field) = value else { continue };
            match number {
                1 => node.inputs.push(self.name(field)?),
                2 => node.outputs.push(self.name(field)?),
                3 => node.name = self.name(field)?,
                4 => node.operator = self.name(field)?,
                5 => node.attributes.push(self.attribute(field.enter()?)?),
                7 => node.domain = self.name(field)?,
                _ => {}
            }
        }
        if node.operator.is_empty() {
            return Err(Error::invalid_model(format!("the node `{}` has no operator", node.name)));
        }
        if node.domain == "ai.onnx" {
            node.domain.clear();
        }
        Ok(node)
    }

    fn attribute(&mut self, mut message: Message<'_>) -> Result<(String, Attribute)> {
        let (mut name, mut attribute) = (String::new(), Attribute::Other);
        let mut floats = Vec::new();
        while let Some((number, value)) = message.next()? {
            match (number, value) {
                (1, wire::Value::Bytes(field)) => name = self.name(field)?,
                (2, wire::Value::Fixed32(bits)) => attribute = Attribute::Float(f32::from_bits(bits)),
                // A longer one may be anything.
                (4, wire::Value::Bytes(field)) if field.len() <= MAX_NAME => {
                    attribute =
                        field.text().map_or(Attribute::Other, |text| Attribute::Text(text.to_owned()));
                }
                (7, wire::Value::Fixed32(bits)) => floats.push(f32::from_bits(bits)),
                (7, wire::Value::Bytes(mut packed)) => {
                    floats.extend(std::iter::from_fn(|| packed.next_float()));
                }
                (3, wire::Value::Integer(value)) => attribute = Attribute::Integer(value as i64),
                (5 | 10, wire::Value::Bytes(field)) => {
                    self.initializer(field.enter()?)?;
                }
                (6 | 11, wire::Value::Bytes(field)) => {
                    let graph = self.graph(field.enter()?)?;
                    self.inner.extend(graph.nodes);
                }
                (22 | 23, wire::Value::Bytes(field)) => self.sparse(field.enter()?)?,
                _ => {}
            }
        }
        if !floats.is_empty() {
            attribute = Attribute::Floats(floats);
        }
        Ok((name, attribute))
    }

    /// A function: nodes that a node of its name stands for.
    fn function(&mut self, mut message: Message<'_>) -> Result<()> {
        while let Some((number, value)) = message.next()? {
            let wire::Value::Bytes(field) = value else { continue };
            match number {
                7 => {
                    let node = self.node(field.enter()?)?;
                    self.inner.push(node);
                }
                10 => {
                    let domain = self.name(field)?;
                    self.functions.insert(domain);
                }
                11 => {
                    self.attribute(field.enter()?)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn sparse(&mut self, mut message: Message<'_>) -> Result<()> {
        while let Some((number, value)) = message.next()? {
            if let (1 | 2, wire::Value::Bytes(field)) = (number, value) {
                self.initializer(field.enter()?)?;
            }
        }
        Ok(())
    }

    fn initializer(&mut self, mut message: Message<'_>) -> Result<Initializer> {
        self.count(1)?;
        let mut tensor = Tensor::default();
        while let Some((number, value)) = message.next()? {
            match (number, value) {
                (1, wire::Value::Integer(size)) => tensor.dims.push(size as i64),
                (1, wire::Value::Bytes(mut packed)) => {
                    while let Some(size) = packed.next_integer()? {
                        self.count(1)?;
                        tensor.dims.push(size as i64);
                    }
                }
                (2, wire::Value::Integer(number)) => tensor.element = number as i32,
                (4, wire::Value::Bytes(packed)) => {
                    tensor.floats = (tensor.typed == 0).then_some(packed.offset() as u64);
                    tensor.typed += packed.len() / 4;
                }
                (5 | 7 | 11, wire::Value::Bytes(packed)) => tensor.typed += packed.count_integers(),
                (10, wire::Value::Bytes(packed)) => tensor.typed += packed.len() / 8,
                (4 | 5 | 6 | 7 | 10 | 11, _) => {
                    (tensor.typed, tensor.floats) = (tensor.typed + 1, None);
                }
                (8, wire::Value::Bytes(field)) => tensor.name = self.name(field)?,
                (9, wire::Value::Bytes(raw)) => {
                    (tensor.raw, tensor.raw_at) = (Some(raw.len()), raw.offset() as u64);
                }
                (13, wire::Value::Bytes(field)) => {
                    let entry = self.entry(field.enter()?)?;
                    tensor.external.push(entry);
                }
                (14, wire::Value::Integer(location)) => tensor.is_external = location == 1,
                _ => {}
            }
        }
        tensor.check(&mut self.folder).with("tensor", &tensor.name)
    }

    fn value(&mut self, mut message: Message<'_>) -> Result<Value> {
        self.count(1)?;
        let mut result = Value { name: String::new(), element: None, dims: None };
        while let Some((number, value)) = message.next()? {
            let wire::Value::Bytes(field) = value else { continue };
            match number {
                1 => result.name = self.name(field)?,
                2 => self.tensor_type(field.enter()?, &mut result)?,
                _ => {}
            }
        }
        if result.name.is_empty() {
            return Err(Error::invalid_model("an input or output of the graph has no name"));
        }
        Ok(result)
    }

    fn tensor_type(&mut self, mut message: Message<'_>, result: &mut Value) -> Result<()> {
        while let Some((number, value)) = message.next()? {
            let (1, wire::Value::Bytes(tensor)) = (number, value) else { continue };
            let mut tensor = tensor.enter()?;
            while let Some((number, value)) = tensor.next()? {
                match (number, value) {
                    (1, wire::Value::Integer(n)) => result.element = Some(Element::from_number(n as i32)),
                    (2, wire::Value::Bytes(shape)) => result.dims = Some(self.shape(shape.enter()?)?),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn shape(&mut self, mut message: Message<'_>) -> Result<Vec<Size>> {
        let mut dims = Vec::new();
        while let Some((number, value)) = message.next()? {
            let (1, wire::Value::Bytes(dim)) = (number, value) else { continue };
            self.count(1)?;
            let mut dim = dim.enter()?;
            let mut size = Size::Open;
            while let Some((number, value)) = dim.next()? {
                match (number, value) {
                    (1, wire::Value::Integer(n)) => size = Size::Known(n as i64),
                    (2, wire::Value::Bytes(name)) => size = Size::Named(self.name(name)?),
                    _ => {}
                }
            }
            dims.push(size);
        }
        Ok(dims)
    }
}

fn opset(mut message: Message<'_>) -> Result<(String, i64)> {
    let mut opset = (String::new(), 0);
    while let Some((number, value)) = message.next()? {
        match (number, value) {
            (1, wire::Value::Bytes(domain)) if domain.len() <= MAX_NAME => {
                domain.text()?.clone_into(&mut opset.0);
            }
            (2, wire::Value::Integer(version)) => opset.1 = version as i64,
            _ => {}
        }
    }
    if opset.0 == "ai.onnx" {
        opset.0.clear();
    }
    Ok(opset)
}
