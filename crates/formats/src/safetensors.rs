//! The safetensors container: a JSON header that names tensors, and their bytes in one mapped file.
//!
//! Layout: the header's length (`u64`, little-endian), the header, the data. The header is parsed here rather than by
//! the `safetensors` crate, whose errors do not say which tensor is wrong and which takes the last of two equal names; the
//! element types are the crate's. The rules are the format's: the tensors cover the data without gap or overlap, and the
//! file ends where they end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::safetensors::Dtype;
use serde::Deserialize;
use serde_json::Value;
use ternion_core::{Error, Result};

use crate::checkpoint::Means;
use crate::json::{Entries, cause, show};
use crate::{DenseTensor, DenseType, SharedBytes};

/// The longest header that is parsed. The reference implementation takes 100 MB, but a parsed header may be twenty times
/// as large as its text, and this has room for a hundred thousand tensors; large models have under 1 MB.
const HEADER_CAP: u64 = 16 << 20;

const METADATA: &str = "__metadata__";

/// A tensor as it lies in a file.
#[derive(Debug, Clone)]
pub(crate) struct RawTensor {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: SharedBytes,
    pub(crate) file: Arc<PathBuf>,
}

impl RawTensor {
    /// A dense tensor of `file`.
    pub(crate) fn from_dense(tensor: DenseTensor, file: Arc<PathBuf>) -> Self {
        let dtype = match tensor.dtype {
            DenseType::F32 => Dtype::F32,
            DenseType::F16 => Dtype::F16,
            DenseType::Bf16 => Dtype::BF16,
        };
        Self { dtype, shape: tensor.shape, bytes: tensor.bytes, file }
    }

    /// An error about this tensor.
    pub(crate) fn invalid(&self, name: &str, message: impl Into<String>) -> Error {
        Error::invalid_model(message).with("tensor", name).with("file", self.file.display())
    }

    /// The tensor with its bytes where they may be touched.
    pub(crate) fn loaded(self) -> Result<Self> {
        Ok(Self { bytes: self.bytes.loaded()?, ..self })
    }

    /// The tensor as a dense one; an error that names it where its elements are no floats.
    pub(crate) fn dense(&self, name: &str) -> Result<DenseTensor> {
        let dtype = match self.dtype {
            Dtype::F32 => DenseType::F32,
            Dtype::F16 => DenseType::F16,
            Dtype::BF16 => DenseType::Bf16,
            other => {
                let message = format!("the element type is {other:?}, expected F32, F16 or BF16");
                return Err(self.invalid(name, message));
            }
        };
        Ok(DenseTensor { dtype, shape: self.shape.clone(), bytes: self.bytes.clone() })
    }
}

/// One entry of the header, before anything of it is believed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Maps `path` and reads its header.
pub(crate) fn open(path: &Path, means: Means) -> Result<BTreeMap<String, RawTensor>> {
    parse(&means.open(path)?, path)
}

/// Reads the header of `file`, whose name is `path`.
pub(crate) fn parse(file: &SharedBytes, path: &Path) -> Result<BTreeMap<String, RawTensor>> {
    let invalid = |message: String| Error::invalid_model(message).with("file", path.display());
    let Some(prefix) = file.first_chunk::<8>() else {
        return Err(invalid(format!("the file has {} bytes, expected a safetensors header", file.len())));
    };
    let length = u64::from_le_bytes(*prefix);
    let rest = file.len() as u64 - 8;
    if length > HEADER_CAP {
        return Err(invalid(format!("the header's length is {length}, expected at most {HEADER_CAP}")));
    }
    if length > rest {
        return Err(invalid(format!(
            "the header's length is {length}, but the file has {rest} bytes after it"
        )));
    }
    let data_start = 8 + length as usize;
    let header = &file[8..data_start];
    if header.first() != Some(&b'{') {
        return Err(invalid("the header does not begin with `{`, expected a JSON object".into()));
    }
    let Entries(entries) = serde_json::from_slice::<Entries<Value>>(header).map_err(|e| {
        invalid("the header is not a JSON object that maps names to tensors".into()).with_source(cause(e))
    })?;

    let mut parsed = Vec::with_capacity(entries.len());
    for (name, value) in entries {
        if name == METADATA {
            check_metadata(&value).map_err(|e| e.with("file", path.display()))?;
        } else {
            let entry =
                parse_entry(value).map_err(|e| e.with("tensor", &name).with("file", path.display()))?;
            parsed.push((name, entry));
        }
    }
    check_cover(&mut parsed, rest - length).map_err(|e| e.with("file", path.display()))?;

    let path = Arc::new(path.to_owned());
    let mut tensors = BTreeMap::new();
    for (name, (dtype, shape, (begin, end))) in parsed {
        let bytes = file
            .slice(data_start + begin as usize..data_start + end as usize)
            .expect("invariant: check_cover found every range within the data");
        tensors.insert(name, RawTensor { dtype, shape, bytes, file: Arc::clone(&path) });
    }
    Ok(tensors)
}

type Parsed = (Dtype, Vec<usize>, (u64, u64));

fn check_metadata(value: &Value) -> Result<()> {
    let strings = value.as_object().is_some_and(|map| map.values().all(Value::is_string));
    if strings {
        return Ok(());
    }
    Err(Error::invalid_model(format!("`{METADATA}` is {}, expected an object of strings", show(value))))
}

/// Checks one entry by itself: known element type, and a range as long as its shape says.
fn parse_entry(value: Value) -> Result<Parsed> {
    let shown = show(&value);
    let entry: Entry = serde_json::from_value(value).map_err(|e| {
        Error::invalid_model(format!("the entry is {shown}, expected dtype, shape and data_offsets"))
            .with_source(cause(e))
    })?;
    let Ok(dtype) = serde_json::from_value::<Dtype>(Value::String(entry.dtype.clone())) else {
        return Err(Error::invalid_model(format!(
            "the element type is {}, expected one that safetensors defines (such as BF16, F16, F32, U8)",
            show(&Value::String(entry.dtype))
        )));
    };
    let (begin, end) = entry.data_offsets;
    if begin > end {
        return Err(Error::invalid_model(format!(
            "data_offsets are [{begin}, {end}], expected the end not before the begin"
        )));
    }
    let bits = (entry.shape.iter()).try_fold(dtype.bitsize() as u64, |product, &n| product.checked_mul(n));
    let Some(bits) = bits else {
        return Err(Error::invalid_model(format!(
            "the product of the shape {:?} overflows",
            short(&entry.shape)
        )));
    };
    if bits % 8 != 0 || bits / 8 != end - begin {
        return Err(Error::invalid_model(format!(
            "data_offsets cover {} bytes, expected {} for {dtype:?} of shape {:?}",
            end - begin,
            bits.div_ceil(8),
            short(&entry.shape)
        )));
    }
    let shape = entry.shape.iter().map(|&n| usize::try_from(n)).collect::<Result<Vec<_>, _>>();
    let shape = shape
        .map_err(|e| Error::invalid_model("a dimension is too large for this machine").with_source(e))?;
    Ok((dtype, shape, (begin, end)))
}

/// Checks all entries together: they lie behind each other and end where the data of `data_len` bytes ends.
fn check_cover(parsed: &mut [(String, Parsed)], data_len: u64) -> Result<()> {
    parsed.sort_by_key(|(_, (_, _, offsets))| *offsets);
    let mut covered = 0;
    for (name, (_, _, (begin, end))) in &*parsed {
        if *end > data_len {
            return Err(Error::invalid_model(format!(
                "data_offsets end at {end}, but the file has {data_len} bytes of data; expected a complete file"
            ))
            .with("tensor", name));
        }
        if *begin != covered {
            let what = if *begin > covered { "a gap" } else { "an overlap" };
            return Err(Error::invalid_model(format!(
                "data_offsets begin at {begin}: {what}, expected {covered}, where the tensor before ends"
            ))
            .with("tensor", name));
        }
        covered = *end;
    }
    if covered == data_len {
        return Ok(());
    }
    Err(Error::invalid_model(format!(
        "the tensors cover {covered} bytes, but the file has {data_len} bytes of data"
    )))
}

/// The first dimensions of a shape, for a message: a hostile header may name millions.
fn short(shape: &[u64]) -> &[u64] {
    &shape[..shape.len().min(8)]
}
