//! From any checkpoint, ONNX among them, to any format: packed safetensors, GGUF with I2_S, TQ1_0 or TQ2_0, or ONNX; and where weights have a scale for
//! each group of a row GGUF with Q2_0, PQ2_0, PTQ1_0 or Q1_0, MLX, or plain floats in safetensors.
//!
//! Trits and scales come out bit by bit as they went in, whatever the layouts. A form that cannot hold them is refused, unless
//! [`Options::lossy`] allows it to round. What is written appears under its name only
//! when it is whole and on the disk.

mod gguf;
pub(crate) mod grouped;
mod metadata;
pub(crate) mod safetensors;
mod vocabulary;

use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use ternion_core::{Error, ErrorKind, Result, ResultExt};

pub use grouped::Lost;

use crate::checkpoint::Progress;
use crate::gguf::TensorType;
use crate::onnx::{self, Head, Variant};
use crate::unfinished::Unfinished;
use crate::{Checkpoint, CheckpointOptions, Table, locate};

/// Bytes that are converted and written at a time.
const PIECE: usize = 8 << 20;

/// A format that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Target {
    /// A folder as Hugging Face has it, with ternary weights of two bits in a `model.safetensors`; those with a scale for each
    /// group of a row as plain floats.
    Safetensors,
    /// A GGUF file as Microsoft's official one: I2_S. Rows in a multiple of 128.
    GgufI2s,
    /// A GGUF file with llama.cpp's TQ1_0, 1.69 bits a weight. Rows in a multiple of 256.
    GgufTq1,
    /// A GGUF file with llama.cpp's TQ2_0, 2.06 bits a weight. Rows in a multiple of 256.
    GgufTq2,
    /// A GGUF file with llama.cpp's Q2_0: groups of 64.
    GgufQ2,
    /// A GGUF file with Q2_0 in groups of 128, as PrismML's fork of llama.cpp first had it under the same id.
    GgufQ2G128,
    /// A GGUF file with PQ2_0 of PrismML's fork of llama.cpp: groups of 128.
    GgufPq2,
    /// A GGUF file with PTQ1_0 of that fork: groups of 128 in 1.75 bits a weight.
    GgufPtq1,
    /// A GGUF file with llama.cpp's Q1_0: binary weights in groups of 128.
    GgufQ1,
    /// A folder as MLX has it, with 2 bits a weight, or 1 where all weights are binary.
    Mlx,
    /// A folder with an ONNX file of the operators of the ONNX standard and of ONNX Runtime: runs in any of 1.24 or newer.
    Onnx,
    /// A folder with an ONNX file of our own operators ([`fast`](crate::onnx::fast)): runs in `ternion-backend-onnx` alone,
    /// several times faster.
    OnnxFast,
}

impl Target {
    /// All of them with their names.
    pub const ALL: [(&'static str, Self); 12] = [
        ("safetensors", Self::Safetensors),
        ("gguf-i2s", Self::GgufI2s),
        ("gguf-tq1", Self::GgufTq1),
        ("gguf-tq2", Self::GgufTq2),
        ("gguf-q2", Self::GgufQ2),
        ("gguf-q2-g128", Self::GgufQ2G128),
        ("gguf-pq2", Self::GgufPq2),
        ("gguf-ptq1", Self::GgufPtq1),
        ("gguf-q1", Self::GgufQ1),
        ("mlx", Self::Mlx),
        ("onnx", Self::Onnx),
        ("onnx-fast", Self::OnnxFast),
    ];

    /// Whether it is a file rather than a folder.
    fn is_file(self) -> bool {
        self.element_type().is_some()
    }

    /// The type of ternary or binary tensors in a GGUF file.
    fn element_type(self) -> Option<TensorType> {
        match self {
            Self::GgufI2s => Some(TensorType::I2S),
            Self::GgufTq1 => Some(TensorType::Tq1_0),
            Self::GgufTq2 => Some(TensorType::Tq2_0),
            Self::GgufQ2 => Some(TensorType::Q2_0),
            Self::GgufQ2G128 => Some(TensorType::Q2_0G128),
            Self::GgufPq2 => Some(TensorType::Pq2_0),
            Self::GgufPtq1 => Some(TensorType::Ptq1_0),
            Self::GgufQ1 => Some(TensorType::Q1_0),
            Self::Safetensors | Self::Mlx | Self::Onnx | Self::OnnxFast => None,
        }
    }
}

/// The element type of the embedding and of a head of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the names are those of the types")]
pub enum Embedding {
    F32,
    F16,
    Bf16,
    /// GGUF, and the head in portable ONNX.
    Q8_0,
    /// GGUF only; the width of the model must be a multiple of 256.
    Q6K,
}

impl Embedding {
    /// All of them with their names.
    pub const ALL: [(&'static str, Self); 5] = [
        ("f16", Self::F16),
        ("q8_0", Self::Q8_0),
        ("q6_k", Self::Q6K),
        ("bf16", Self::Bf16),
        ("f32", Self::F32),
    ];

    fn kind(self) -> TensorType {
        match self {
            Self::F32 => TensorType::F32,
            Self::F16 => TensorType::F16,
            Self::Bf16 => TensorType::Bf16,
            Self::Q8_0 => TensorType::Q8_0,
            Self::Q6K => TensorType::Q6K,
        }
    }
}

macro_rules! named {
    ($type:ty, $what:literal) => {
        impl FromStr for $type {
            type Err = Error;

            fn from_str(name: &str) -> Result<Self> {
                let found = Self::ALL.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| *value).ok_or_else(|| {
                    let known = Self::ALL.map(|(known, _)| known).join(", ");
                    Error::invalid_request(format!("unknown {} `{name}`; known: {known}", $what))
                })
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let found = Self::ALL.iter().find(|(_, value)| value == self);
                f.write_str(found.expect("invariant: ALL has every value").0)
            }
        }
    };
}

named!(Target, "format");
named!(Embedding, "embedding type");

/// How a checkpoint is to be converted.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// The format.
    pub target: Target,
    /// The type of the embedding; `None` keeps the source's.
    pub embedding: Option<Embedding>,
    /// Whether scales of groups may be rounded to what the format holds. Otherwise a format that cannot hold them is refused.
    pub lossy: bool,
    /// Whether a file or a checkpoint's folder that is in the place of the output is replaced.
    pub overwrite: bool,
}

impl Options {
    /// To `target`, keeping the type of the embedding, never replacing anything.
    pub fn new(target: Target) -> Self {
        Self { target, embedding: None, lossy: false, overwrite: false }
    }
}

/// What has been written.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct Converted {
    /// What the format could not hold; `None` unless [`Options::lossy`] allows it.
    pub lost: Option<Lost>,
}

/// Opens what can be converted: what [`Checkpoint::open`] reads, and decoders in ONNX that this crate has written or whose products are
/// `MatMulNBits` with two bits. `path` may name an ONNX file, or a folder with one that holds neither safetensors nor GGUF. What the graph
/// does not say comes from `config.json` and the tokenizer's files beside it.
///
/// # Errors
/// Those of [`Checkpoint::open`]; for ONNX [`InvalidModel`](ErrorKind::InvalidModel) also where the configuration contradicts the graph,
/// and [`Unsupported`](ErrorKind::Unsupported) where weights are not ternary, or not named as in exports of Hugging Face models.
pub fn open(path: &Path, options: &CheckpointOptions, progress: &mut Progress<'_>) -> Result<Checkpoint> {
    if locate::is_onnx(path)? {
        Checkpoint::open_onnx(path, options, progress)
    } else {
        options.open(path, progress)
    }
}

/// Converts `checkpoint` to `out`: a file for GGUF, a folder for the others. `progress` is told the bytes that have
/// been written of the tensors, and their sum.
///
/// # Errors
/// [`InvalidRequest`](ErrorKind::InvalidRequest) where the output exists (or may not be replaced) or the embedding does
/// not fit into its type; [`InvalidModel`](ErrorKind::InvalidModel) or [`Unsupported`](ErrorKind::Unsupported) where the
/// format cannot hold the model, naming the tensor; [`Io`](ErrorKind::Io) where writing fails.
pub fn convert(
    checkpoint: &Checkpoint,
    out: &Path,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<Converted> {
    write(checkpoint, out, options, progress).with_operation("convert")
}

fn write(
    checkpoint: &Checkpoint,
    out: &Path,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<Converted> {
    check_output(out, options)?;
    let checkpoint = &with_plain_tables(checkpoint);
    let Some(ternary) = options.target.element_type() else {
        let onnx = match options.target {
            Target::Onnx | Target::OnnxFast => Some(onnx_options(options)?),
            _ => None,
        };
        let unfinished = Unfinished::folder(out)?;
        if let Some(onnx) = onnx {
            onnx::write(checkpoint, unfinished.path(), &onnx, progress)?;
            safetensors::beside(checkpoint, None, unfinished.path())?;
        } else {
            safetensors::write(checkpoint, unfinished.path(), options, progress)?;
        }
        return unfinished.finish().map(|()| Converted::default());
    };
    let plan = gguf::Plan::new(checkpoint, ternary, options)?;
    if let Some(parent) = out.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
    }
    let unfinished = Unfinished::file(out)?;
    let lost = plan.write(unfinished.path(), progress)?;
    unfinished.finish().map(|()| Converted { lost })
}

/// The checkpoint with quantised tables in F32: what writers take. (GGUF files keep the blocks of a GGUF source.)
fn with_plain_tables(checkpoint: &Checkpoint) -> Cow<'_, Checkpoint> {
    let is_quantized = |table: &Table| matches!(table, Table::Quantized(_));
    if !is_quantized(&checkpoint.embed) && !checkpoint.head.as_ref().is_some_and(is_quantized) {
        return Cow::Borrowed(checkpoint);
    }
    let plain = |table: &Table| match table {
        Table::Quantized(quantized) => Table::Dense(quantized.to_dense()),
        other => other.clone(),
    };
    let mut owned = checkpoint.clone();
    owned.head = owned.head.as_ref().map(plain);
    owned.embed = plain(&owned.embed);
    Cow::Owned(owned)
}

fn onnx_options(options: &Options) -> Result<onnx::Options> {
    let portable = options.target == Target::Onnx;
    let variant = if portable { Variant::Portable } else { Variant::Fast };
    match options.embedding {
        None => Ok(onnx::Options::new(variant)),
        Some(Embedding::Q8_0) if portable => Ok(onnx::Options::new(variant).with_head(Head::Bits8)),
        Some(other) => {
            let expected = if portable { "q8_0, or none for full precision" } else { "none" };
            Err(Error::invalid_request(format!(
                "{} cannot hold an embedding of {other}; expected {expected}",
                options.target
            )))
        }
    }
}

fn check_output(out: &Path, options: &Options) -> Result<()> {
    let taken = |why: &str| Err(Error::invalid_request(why).with("path", out.display()));
    let Ok(metadata) = fs::symlink_metadata(out) else { return Ok(()) };
    if options.target.is_file() {
        return match (metadata.is_file(), options.overwrite) {
            (true, true) => Ok(()),
            (true, false) => taken("the output exists, expected a new name"),
            (false, _) => taken("the output is no regular file, expected a new name"),
        };
    }
    if !metadata.is_dir() {
        return taken("the output is no folder, expected a new or empty folder");
    }
    let (mut empty, mut only_files) = (true, true);
    for entry in fs::read_dir(out).map_err(|e| Error::io(out, e))? {
        let kind = entry.and_then(|entry| entry.file_type()).map_err(|e| Error::io(out, e))?;
        empty = false;
        only_files &= !kind.is_dir();
    }
    match (empty, only_files && out.join("config.json").is_file()) {
        (true, _) => Ok(()),
        (false, true) if options.overwrite => Ok(()),
        (false, true) => taken("the output exists, expected a new or empty folder"),
        // That could be anybody's folder.
        (false, false) => taken("the output exists and is no checkpoint, expected a new or empty folder"),
    }
}

fn not_written(path: &Path, source: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, "cannot be written").with("path", path.display()).with_source(source)
}
