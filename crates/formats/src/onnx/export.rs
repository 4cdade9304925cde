//! Writing a checkpoint as an ONNX model with its data beside it.

use std::path::Path;

use ternion_core::{Error, Result};

use super::graph::Builder;
use super::{fast, portable};
use crate::checkpoint::Progress;
use crate::{Checkpoint, Table};

const MODEL: &str = "model.onnx";
const DATA: &str = "model.onnx.data";

/// Which operators a file uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Variant {
    /// Those of the ONNX standard and of ONNX Runtime 1.24 and newer: runs anywhere.
    #[default]
    Portable,
    /// Our own ([`fast`]): runs in `ternion-backend-onnx` alone, several times faster.
    Fast,
}

/// How the portable variant holds the head. The fast one holds it as the checkpoint does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Head {
    /// In single precision: exact.
    #[default]
    Full,
    /// In 8 bits, a scale for each 32 columns, and the hidden states likewise when they are multiplied: a quarter of the
    /// size, and logits that are off by about a hundredth of their spread.
    Bits8,
}

/// How a checkpoint is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// Which operators are used.
    pub(crate) variant: Variant,
    /// How the portable variant holds the head.
    pub(crate) head: Head,
}

impl Options {
    /// The options for a variant.
    pub(crate) fn new(variant: Variant) -> Self {
        Self { variant, ..Self::default() }
    }

    /// The same with this head.
    pub(crate) fn with_head(mut self, head: Head) -> Self {
        self.head = head;
        self
    }
}

/// Writes the model and its data into `folder`. `progress` gets the bytes of data that have been written and about how
/// many there will be.
pub(crate) fn write(
    checkpoint: &Checkpoint,
    folder: &Path,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let weights: usize =
        checkpoint.layers.iter().flat_map(crate::LayerTensors::linears).map(crate::Linear::size).sum();
    if options.head == Head::Bits8 && checkpoint.head_or_embed().dense().is_err() {
        return Err(Error::invalid_request(
            "the head has a scale for each group of a row, in two bits or one; expected no type for the embedding, which keeps it",
        ));
    }
    let head = match (options.variant, checkpoint.head_or_embed(), options.head) {
        (Variant::Fast, ..) | (_, Table::Grouped(_), _) => checkpoint.head.as_ref().map_or(0, Table::size),
        (Variant::Portable, head, Head::Bits8) => head.elements() * 9 / 8,
        (Variant::Portable, head, Head::Full) => head.elements() * 4,
    };
    let total = weights + checkpoint.embed.size() + head;
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
