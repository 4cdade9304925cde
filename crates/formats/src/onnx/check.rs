//! Whether a file means what it says: its tensors, the files that they lie in, its operators.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::time::SystemTime;

use ternion_core::{Error, Result};

use super::summary::{Initializer, Node, Summary};
use super::{Element, fast};

/// Domains whose operators a build of ONNX Runtime has, and our own.
const KNOWN_DOMAINS: [&str; 5] = ["", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", fast::DOMAIN];

/// The ONNX standard's revisions: what the newest runtime that was tried accepts, 1.x. Each release adds at most one.
const NEWEST: (u32, i64) = (32, 28);

/// The folder of a model, with the places where its data may be.
pub(super) struct Folder {
    model: PathBuf,
    path: PathBuf,
    /// Folders without links in them that data must lie in; found when they are first needed.
    allowed: Vec<PathBuf>,
    /// The files of data that have been found good, by what the model calls them.
    files: BTreeMap<String, DataFile>,
    /// Tensors that lie in these files.
    pub(super) external_tensors: usize,
}

/// A file as it was when it was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DataFile {
    /// Where it is named.
    path: PathBuf,
    /// Where it is, after all links.
    resolved: PathBuf,
    length: u64,
    modified: Option<SystemTime>,
    /// Device and number on it; none where the system does not tell.
    identity: Option<(u64, u64)>,
}

impl DataFile {
    /// Where it is named.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// # Errors
    /// Those of looking at the file, and where it is no regular file.
    pub(super) fn of(path: &Path) -> Result<Self> {
        let resolved = std::fs::canonicalize(path).map_err(|e| Error::io(path, e))?;
        let metadata = std::fs::metadata(&resolved).map_err(|e| Error::io(&resolved, e))?;
        if !metadata.is_file() {
            return Err(refused("the data's location is no regular file"));
        }
        #[cfg(unix)]
        let identity = {
            use std::os::unix::fs::MetadataExt;
            Some((metadata.dev(), metadata.ino()))
        };
        #[cfg(not(unix))]
        let identity = None;
        Ok(Self {
            path: path.to_owned(),
            resolved,
            length: metadata.len(),
            modified: metadata.modified().ok(),
            identity,
        })
    }

    /// Whether the file is still the one that was checked. A runtime opens files by their names, so one that was
    /// replaced in between would be read unchecked.
    pub(super) fn check_unchanged(&self) -> Result<()> {
        if Self::of(&self.path)? == *self {
            return Ok(());
        }
        Err(Error::invalid_model(
            "the file changed while the model was loaded; expected one that stays as it is",
        )
        .with("path", self.path.display()))
    }
}

impl Folder {
    /// The folder of a model's file.
    pub(super) fn of(model: &Path) -> Self {
        let path = match model.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        Self {
            model: model.to_owned(),
            path,
            allowed: Vec::new(),
            files: BTreeMap::new(),
            external_tensors: 0,
        }
    }

    /// The files of data that have been found good.
    pub(super) fn data_files(&self) -> impl Iterator<Item = &DataFile> {
        self.files.values()
    }

    /// The length of a file of data, after a look at where it is.
    fn length(&mut self, location: &str) -> Result<u64> {
        if let Some(file) = self.files.get(location) {
            return Ok(file.length);
        }
        let file = self.find(location).map_err(|e| e.with("data", format!("{location:?}")))?;
        let length = file.length;
        self.files.insert(location.to_owned(), file);
        Ok(length)
    }

    fn find(&mut self, location: &str) -> Result<DataFile> {
        let plain = !location.is_empty()
            && !location.contains(['\\', ':', '\0'])
            && Path::new(location).components().all(|c| matches!(c, Component::Normal(_)));
        if !plain {
            return Err(refused("the data's location is absolute, empty or contains `..`"));
        }
        if self.allowed.is_empty() {
            self.allowed = allowed(&self.path, &self.model)?;
        }
        let file = DataFile::of(&self.path.join(location))?;
        if !self.allowed.iter().any(|folder| file.resolved.starts_with(folder)) {
            return Err(refused("the data's location is a symbolic link that leaves the folder"));
        }
        #[cfg(unix)]
        if std::fs::metadata(&file.resolved)
            .is_ok_and(|metadata| std::os::unix::fs::MetadataExt::nlink(&metadata) > 1)
        {
            return Err(refused("the data's file is a hard link, which may be a file from elsewhere"));
        }
        Ok(file)
    }
}

/// The folders that a model's data may lie in: its own, that of the real file where the model is a link, and in the
/// Hugging Face cache, where all files are links (`models--owner--name/snapshots/revision/file` to
/// `models--owner--name/blobs/hash`), that of the repository.
fn allowed(folder: &Path, model: &Path) -> Result<Vec<PathBuf>> {
    let resolve = |path: &Path| std::fs::canonicalize(path).map_err(|e| Error::io(path, e));
    let own = resolve(folder)?;
    let mut allowed = Vec::new();
    if let Some(snapshots) = own.ancestors().find(|path| path.ends_with("snapshots"))
        && let Some(repository) = snapshots.parent()
        && repository.file_name().is_some_and(|name| name.to_string_lossy().starts_with("models--"))
    {
        allowed.push(repository.join("blobs"));
    }
    if let Some(real) = resolve(model)?.parent() {
        allowed.push(real.to_owned());
    }
    allowed.push(own);
    Ok(allowed)
}

fn refused(what: &str) -> Error {
    Error::invalid_model(format!("{what}; expected a regular file in the model's own folder or repository"))
}

/// A tensor as a file describes it.
#[derive(Default)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) element: i32,
    pub(super) dims: Vec<i64>,
    /// Bytes of data in the field for bytes.
    pub(super) raw: Option<u64>,
    /// Where these begin in the file.
    pub(super) raw_at: u64,
    /// Elements in the fields for numbers.
    pub(super) typed: u64,
    /// Where those begin that are packed floats in one piece.
    pub(super) floats: Option<u64>,
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
        let floats = self.floats.filter(|_| element == Element::F32);
        let inline = if external.is_some() { None } else { self.raw.map(|_| self.raw_at).or(floats) };
        Ok(Initializer { name: self.name.clone(), element, dims, external, inline })
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
