//! Writing a checkpoint as a folder with an ONNX model that stands alone.

use std::path::Path;

use ternion_core::{Error, Result, ResultExt};

use super::graph::Builder;
use super::{fast, portable};
use crate::Checkpoint;
use crate::checkpoint::Progress;
use crate::convert::safetensors;
use crate::unfinished::Unfinished;

const MODEL: &str = "model.onnx";
const DATA: &str = "model.onnx.data";

/// Which operators a file uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Variant {
    /// Those of the ONNX standard and of ONNX Runtime 1.24 and newer: runs anywhere.
    #[default]
    Portable,
    /// Our own ([`fast`]): runs in `ternion-backend-onnx` alone, several times faster.
    Fast,
}

/// How the portable variant holds the head. The fast one holds it as the checkpoint does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Head {
    /// In single precision: exact.
    #[default]
    Full,
    /// In 8 bits, a scale for each 32 columns, and the hidden states likewise when they are multiplied: a quarter of the
    /// size, and logits that are off by about a hundredth of their spread.
    Bits8,
}

/// How a checkpoint is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Which operators are used.
    pub variant: Variant,
    /// How the portable variant holds the head.
    pub head: Head,
}

impl Options {
    /// The options for a variant.
    pub fn new(variant: Variant) -> Self {
        Self { variant, ..Self::default() }
    }

    /// The same with this head.
    pub fn with_head(mut self, head: Head) -> Self {
        self.head = head;
        self
    }
}

/// Writes `checkpoint` into the new folder `folder`: the model, its data beside it, configuration, tokenizer and template.
///
/// Everything is written into a folder beside it, which takes its name when it is whole. `progress` gets the bytes of
/// data that have been written and about how many there will be.
///
/// # Errors
/// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) where `folder` exists and is not empty,
/// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for what the variant cannot express, [`Io`](ternion_core::ErrorKind::Io).
pub fn export(
    checkpoint: &Checkpoint,
    folder: impl AsRef<Path>,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let folder = folder.as_ref();
    write(checkpoint, folder, options, progress).with("folder", folder.display()).during("export")
}

fn write(
    checkpoint: &Checkpoint,
    folder: &Path,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let is_empty =
        |folder: &Path| std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
    let exists = std::fs::symlink_metadata(folder).is_ok();
    if exists && !is_empty(folder) {
        return Err(Error::invalid_request("exists already; a new or an empty folder expected"));
    }
    let unfinished = Unfinished::folder(folder)?;
    build(checkpoint, unfinished.path(), options, progress)?;
    safetensors::beside(checkpoint, unfinished.path())?;
    unfinished.finish()
}

fn build(
    checkpoint: &Checkpoint,
    folder: &Path,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let weights: usize =
        checkpoint.layers.iter().flat_map(crate::LayerTensors::linears).map(|l| l.bytes().len()).sum();
    let head = checkpoint.head_or_embed();
    let total = weights
        + match (options.variant, options.head) {
            (Variant::Fast, _) => {
                checkpoint.embed.bytes.len() + checkpoint.head.as_ref().map_or(0, |h| h.bytes.len())
            }
            (Variant::Portable, Head::Bits8) => checkpoint.embed.bytes.len() + head.elements() * 9 / 8,
            (Variant::Portable, Head::Full) => checkpoint.embed.bytes.len() + head.elements() * 4,
        };
    // The estimate leaves padding and small tensors out; nobody should see more than all.
    let mut report = |written: u64| progress(written.min(total as u64), total as u64);
    let (opsets, variant, runtime): (&[(&str, i64)], _, _) = match options.variant {
        Variant::Portable => {
            (&[("", portable::OPSET), ("com.microsoft", 1)], "portable", portable::MINIMUM_RUNTIME)
        }
        Variant::Fast => (&[("", 14), (fast::DOMAIN, fast::VERSION as i64)], "fast", 17),
    };
    let mut builder = Builder::new(folder, DATA, opsets)?;
    match options.variant {
        Variant::Portable => portable::build(checkpoint, options.head, &mut builder, &mut report)?,
        Variant::Fast => fast::build(checkpoint, &mut builder, &mut report)?,
    }
    let metadata = [
        ("ternion.variant", variant.to_owned()),
        ("ternion.minimum_onnxruntime", format!("1.{runtime}")),
        ("ternion.source", checkpoint.format.clone()),
        ("ternion.parameters", checkpoint.report().parameters.to_string()),
    ];
    builder.finish(&folder.join(MODEL), &metadata)?;
    progress(total as u64, total as u64);
    Ok(())
}
