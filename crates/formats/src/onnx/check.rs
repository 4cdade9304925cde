//! Whether a file means what it says: its tensors, the files that they lie in, its operators.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use ternion_core::{Error, Result};

use super::summary::{Initializer, Node, Summary};
use super::{Element, fast};

/// Domains whose operators a build of ONNX Runtime has, and our own.
const KNOWN_DOMAINS: [&str; 5] = ["", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", fast::DOMAIN];

/// The ONNX standard's revisions: what the newest runtime that was tried accepts, 1.x. Each release adds at most one.
const NEWEST: (u32, i64) = (32, 28);

/// The folder of a model, which its data must not leave.
pub(super) struct Folder {
    path: PathBuf,
    /// The same without links; made when it is first needed.
    resolved: Option<PathBuf>,
    /// The length of each file of data that has been found good.
    files: BTreeMap<String, u64>,
    /// Tensors that lie in these files.
    pub(super) external_tensors: usize,
}

impl Folder {
    /// The folder of a model's file.
    pub(super) fn of(model: &Path) -> Self {
        let path = match model.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        Self { path, resolved: None, files: BTreeMap::new(), external_tensors: 0 }
    }

    /// The files of data that have been found good.
    pub(super) fn data_files(&self) -> impl Iterator<Item = PathBuf> {
        self.files.keys().map(|location| self.path.join(location))
    }

    /// The length of a file of data, after a look at where it is.
    fn length(&mut self, location: &str) -> Result<u64> {
        if let Some(length) = self.files.get(location) {
            return Ok(*length);
        }
        let length = self.find(location).map_err(|e| e.with("data", format!("{location:?}")))?;
        self.files.insert(location.to_owned(), length);
        Ok(length)
    }

    fn find(&mut self, location: &str) -> Result<u64> {
        let plain = !location.is_empty()
            && !location.contains(['\\', ':', '\0'])
            && Path::new(location).components().all(|c| matches!(c, Component::Normal(_)));
        if !plain {
            return Err(refused("the data's location is absolute, empty or contains `..`"));
        }
        let path = self.path.join(location);
        let resolve = |path: &Path| std::fs::canonicalize(path).map_err(|e| Error::io(path, e));
        let resolved = resolve(&path)?;
        let folder = match &self.resolved {
            Some(folder) => folder,
            None => self.resolved.insert(resolve(&self.path)?),
        };
        if !resolved.starts_with(folder) {
            return Err(refused("the data's location is a symbolic link that leaves the folder"));
        }
        let metadata = std::fs::metadata(&resolved).map_err(|e| Error::io(&resolved, e))?;
        if !metadata.is_file() {
            return Err(refused("the data's location is no regular file"));
        }
        #[cfg(unix)]
        if std::os::unix::fs::MetadataExt::nlink(&metadata) > 1 {
            return Err(refused("the data's file is a hard link, which may be a file from elsewhere"));
        }
        Ok(metadata.len())
    }
}

fn refused(what: &str) -> Error {
    Error::invalid_model(format!("{what}; expected a regular file in the model's own folder"))
}

/// A tensor as a file describes it.
#[derive(Default)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) element: i32,
    pub(super) dims: Vec<i64>,
    /// Bytes of data in the field for bytes.
    pub(super) raw: Option<u64>,
    /// Elements in the fields for numbers.
    pub(super) typed: u64,
    /// The data is in another file.
    pub(super) is_external: bool,
    /// Which file, and where in it.
    pub(super) external: Vec<(String, String)>,
}

impl Tensor {
    /// The tensor, if its data is there and as long as its shape says.
    pub(super) fn check(&self, folder: &mut Folder) -> Result<Initializer> {
        let dims = self
            .dims
            .iter()
            .map(|&d| u64::try_from(d))
            .collect::<std::result::Result<Vec<u64>, _>>()
            .map_err(|_| {
                Error::invalid_model(format!("the shape is {}, a size is negative", self.shape()))
            })?;
        let elements = dims.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let elements = elements.filter(|n| i64::try_from(*n).is_ok()).ok_or_else(|| {
            Error::invalid_model(format!("the shape is {}, more elements than there can be", self.shape()))
        })?;
        let element = Element::from_number(self.element);
        let expected = element.bytes(elements);
        let mut external = None;
        if self.is_external {
            if self.raw.is_some() || self.typed > 0 {
                return Err(Error::invalid_model("has data in the file and beside it, expected one of them"));
            }
            external = Some(self.check_external(expected, folder)?);
        } else if let Some(raw) = self.raw {
            if self.typed > 0 {
                return Err(Error::invalid_model("has its data twice, expected once"));
            }
            self.check_bytes(raw, expected, element)?;
        } else if !matches!(element, Element::Other(_)) && self.typed != elements {
            return Err(Error::invalid_model(format!(
                "has {} elements of data, expected {elements} for the shape {}",
                self.typed,
                self.shape()
            )));
        }
        Ok(Initializer { name: self.name.clone(), element, dims, external })
    }

    fn check_bytes(&self, found: u64, expected: Option<u64>, element: Element) -> Result<()> {
        match expected {
            Some(expected) if expected != found => Err(Error::invalid_model(format!(
                "has {found} bytes of data, expected {expected} for the shape {} of {element}",
                self.shape()
            ))),
            None if element == Element::String => {
                Err(Error::invalid_model("holds strings as bytes, expected a list of strings"))
            }
            _ => Ok(()),
        }
    }

    /// Returns the file of the data, and where in it they begin.
    fn check_external(&self, expected: Option<u64>, folder: &mut Folder) -> Result<(PathBuf, u64)> {
        let entry = |key: &str| self.external.iter().find(|(name, _)| name == key).map(|(_, v)| v.as_str());
        let location =
            entry("location").ok_or_else(|| Error::invalid_model("has external data without a location"))?;
        let number = |key: &str| match entry(key) {
            None => Ok(None),
            Some(text) => text.parse::<u64>().map(Some).map_err(|_| {
                let shown: String = text.chars().take(40).collect();
                Error::invalid_model(format!("the {key} of its data is {shown:?}, expected a number"))
            }),
        };
        let (offset, length) = (number("offset")?.unwrap_or(0), number("length")?);
        let file = folder.length(location)?;
        let element = Element::from_number(self.element);
        let Some(expected) = expected else {
            return Err(Error::unsupported(format!("holds {element} outside the file")));
        };
        if let Some(length) = length {
            self.check_bytes(length, Some(expected), element)?;
        }
        if offset.checked_add(expected).is_none_or(|end| end > file) {
            return Err(Error::invalid_model(format!(
                "its data is bytes {offset} to {} of a file of {file} bytes",
                offset.saturating_add(expected)
            ))
            .with("data", format!("{location:?}")));
        }
        folder.external_tensors += 1;
        Ok((folder.path.join(location), offset))
    }

    fn shape(&self) -> String {
        let shown: Vec<String> = self.dims.iter().take(8).map(ToString::to_string).collect();
        format!("[{}{}]", shown.join(", "), if self.dims.len() > 8 { ", .." } else { "" })
    }
}

impl Summary {
    /// Whether ONNX Runtime 1.`runtime`, with our own operators, can be expected to have all that the file uses.
    ///
    /// # Errors
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for operators of an unknown domain or of a newer revision than the runtime
    /// has, [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) for parameters that no operator takes.
    pub fn check_operators(&self, runtime: u32) -> Result<()> {
        let in_file = |e: Error| e.with("file", self.path.display());
        self.operators(runtime).map_err(in_file)
    }

    fn operators(&self, runtime: u32) -> Result<()> {
        let Some(opset) = self.opset("") else {
            return Err(Error::invalid_model("does not say which revision of the ONNX operators it uses"));
        };
        let newest = NEWEST.1 + i64::from(runtime.saturating_sub(NEWEST.0));
        if !(1..=newest).contains(&opset) {
            return Err(Error::unsupported(format!(
                "uses revision {opset} of the ONNX operators (opset); ONNX Runtime 1.{runtime} has at most {newest}"
            )));
        }
        for node in self.nodes.iter().chain(&self.inner_nodes) {
            let known =
                KNOWN_DOMAINS.contains(&node.domain.as_str()) || self.functions.contains(&node.domain);
            if !known {
                let known: Vec<&str> =
                    KNOWN_DOMAINS.iter().map(|d| if d.is_empty() { "ai.onnx" } else { *d }).collect();
                return Err(Error::unsupported(format!(
                    "uses the operator `{}` of the domain `{}`; known domains: {}",
                    node.operator,
                    node.domain,
                    known.join(", ")
                ))
                .with("node", &node.name));
            }
            if self.opset(&node.domain).is_none() && !self.functions.contains(&node.domain) {
                return Err(Error::invalid_model(format!(
                    "uses the operator `{}` of the domain `{}` without saying which revision",
                    node.operator, node.domain
                ))
                .with("node", &node.name));
            }
            if node.domain == "com.microsoft" && node.operator == "MatMulNBits" {
                self.check_matmul_n_bits(node, runtime).map_err(|e| e.with("node", &node.name))?;
            }
        }
        Ok(())
    }

    fn check_matmul_n_bits(&self, node: &Node, runtime: u32) -> Result<()> {
        let attribute =
            |name: &str, default: Option<i64>, allowed: &dyn Fn(i64) -> bool, expected: &str| match node
                .integer(name)
                .or(default)
            {
                Some(value) if allowed(value) => Ok(value as u64),
                Some(value) => Err(Error::invalid_model(format!(
                    "the attribute `{name}` of MatMulNBits is {value}, expected {expected}"
                ))),
                None => Err(Error::invalid_model(format!(
                    "MatMulNBits has no attribute `{name}`, expected {expected}"
                ))),
            };
        let size = |n: i64| (1..=i64::from(u32::MAX)).contains(&n);
        let bits = attribute("bits", Some(4), &|n| matches!(n, 2 | 4 | 8), "2, 4 or 8")?;
        let power = |n: i64| (16..=1 << 20).contains(&n) && (n as u64).is_power_of_two();
        let block = attribute("block_size", None, &power, "a power of two from 16")?;
        let columns = attribute("K", None, &size, "the number of columns")?;
        let rows = attribute("N", None, &size, "the number of rows")?;
        let oldest = match bits {
            2 => super::portable::MINIMUM_RUNTIME,
            _ => 0,
        };
        if runtime < oldest {
            return Err(Error::unsupported(format!(
                "MatMulNBits with {bits} bits needs ONNX Runtime 1.{oldest} or newer; this one is 1.{runtime}"
            )));
        }
        let blocks = columns.div_ceil(block);
        let constant = |input: usize| node.inputs.get(input).and_then(|name| self.initializer(name));
        let shape_of = |input: usize, what: &str, expected: u64| match constant(input) {
            Some(found) if found.dims.iter().product::<u64>() != expected => {
                Err(Error::invalid_model(format!(
                    "the {what} of MatMulNBits have the shape {:?}, expected {expected} elements for K = {columns}, N = {rows}, \
                 {bits} bits in blocks of {block}",
                    found.dims
                )))
            }
            _ => Ok(()),
        };
        let scales = rows.saturating_mul(blocks);
        shape_of(1, "weights", scales.saturating_mul(block * bits / 8))?;
        shape_of(2, "scales", scales)?;
        if let Some(zeros) = constant(3) {
            let floats = matches!(zeros.element, Element::F32 | Element::F16 | Element::Bf16);
            if !floats && zeros.element != Element::U8 {
                return Err(Error::invalid_model(format!(
                    "the zero points of MatMulNBits are {}, expected uint8 or floats",
                    zeros.element
                )));
            }
            let expected = if floats { scales } else { rows.saturating_mul((blocks * bits).div_ceil(8)) };
            shape_of(3, "zero points", expected)?;
        }
        Ok(())
    }
}
