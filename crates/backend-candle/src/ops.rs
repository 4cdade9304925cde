//! The steps of a decoder layer on slices, over `ternion-kernels`.

use std::sync::Arc;

use candle_core::{CpuStorage, Layout, Result, bail};
use ternion_core::kv;
use ternion_formats::{Activation, Linear, RmsNorm, Weights};
use ternion_kernels as kernels;

use crate::residency::Place;
use crate::stream::Stream;

const _: () = assert!(kv::BLOCK == kernels::BLOCK, "attention takes the blocks of the cache");

/// The floats of a contiguous f32 tensor.
pub(crate) fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(data) = storage else { bail!("f32 expected") };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("a contiguous tensor expected"),
    }
}

/// What the input of projections becomes before it is multiplied; buffers that are used again and again.
#[derive(Default)]
pub(crate) struct Input {
    normed: Vec<f32>,
    quantized: kernels::Quantized,
}

/// Projections of the same input: `[T, K]` to `[T, sum of their rows]`.
///
/// Query, key and value (and gate and up) go together, so that the input is quantised once.
pub(crate) struct Projections {
    /// Of the input, before all of them.
    norm: Option<RmsNorm>,
    parts: Vec<(Linear, Place)>,
    rows: usize,
    stream: Option<Arc<Stream>>,
}

impl Projections {
    pub(crate) fn new(
        norm: Option<RmsNorm>,
        parts: Vec<(Linear, Place)>,
        stream: Option<&Arc<Stream>>,
    ) -> Self {
        let rows = parts.iter().map(|(part, _)| part.rows()).sum();
        Self { norm, parts, rows, stream: stream.cloned() }
    }

    /// Elements of a token's output.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Calls `compute` with the weights' bytes, wherever they are.
    fn with_bytes(
        &self,
        part: &Linear,
        place: Place,
        compute: impl FnOnce(&[u8]) -> Result<()>,
    ) -> Result<()> {
        match (place, &self.stream) {
            (Place::Streamed(piece), Some(stream)) => stream.with(piece, compute).unwrap_or_else(|| {
                // The decoder asks the stream for the cause.
                bail!("{} could not be read", part.name)
            }),
            _ => compute(part.bytes()),
        }
    }

    /// Fills `out`, `[T, rows]`, from `x`, `[T, K]`.
    pub(crate) fn forward(&self, x: &[f32], input: &mut Input, out: &mut [f32]) -> Result<()> {
        let tokens = out.len() / self.rows;
        let cols = x.len() / tokens;
        if let Some((part, _)) = self.parts.iter().find(|(part, _)| part.cols() != cols) {
            bail!("{} takes {} features, {cols} given", part.name, part.cols());
        }
        let Input { normed, quantized } = input;
        let is_plain = |part: &Linear| part.input_norm.is_some() || matches!(part.weights, Weights::Dense(_));
        // A norm is kept only where something takes its output in floats.
        let x = match &self.norm {
            Some(norm) if self.parts.iter().any(|(part, _)| is_plain(part)) => {
                normalize(x, norm, normed);
                &normed[..]
            }
            Some(norm) => {
                quantized.quantize_normed(x, &norm.weight, norm.eps);
                x
            }
            None => x,
        };
        if self.norm.is_none() || self.parts.iter().any(|(part, _)| is_plain(part)) {
            quantized.quantize(x, cols);
        }
        // Those that take the input as it is and are in memory are computed together.
        let mut together = Vec::with_capacity(self.parts.len());
        let mut offset = 0;
        for (part, place) in &self.parts {
            let mut own = Vec::new();
            if let Some(norm) = &part.input_norm {
                normalize(x, norm, &mut own);
            }
            let input = if part.input_norm.is_some() { &own[..] } else { x };
            match &part.weights {
                Weights::Dense(dense) => self.with_bytes(part, *place, |bytes| {
                    let out = &mut out[offset..];
                    kernels::dense_matmul(dense.dtype.view(bytes), part.rows(), cols, input, out, self.rows);
                    Ok(())
                })?,
                Weights::Ternary(ternary) if part.input_norm.is_none() && *place == Place::Here => {
                    let weights = ternary.view().map_err(candle_core::Error::wrap)?;
                    together.push(kernels::Product { weights, scale: ternary.scale, offset });
                }
                Weights::Ternary(ternary) => {
                    let mut other = kernels::Quantized::default();
                    let quantized = if part.input_norm.is_some() {
                        other.quantize(input, cols);
                        &other
                    } else {
                        &*quantized
                    };
                    self.with_bytes(part, *place, |bytes| {
                        let weights = ternary.view_of(bytes).map_err(candle_core::Error::wrap)?;
                        let product = kernels::Product { weights, scale: ternary.scale, offset };
                        kernels::matmul_all(&[product], quantized, out, self.rows);
                        Ok(())
                    })?;
                }
            }
            offset += part.rows();
        }
        if !together.is_empty() {
            kernels::matmul_all(&together, quantized, out, self.rows);
        }
        Ok(())
    }
}

/// RMS normalisation of tokens, `[T, K]`. candle-nn's sums in sequence, which is slower and further from transformers.
pub(crate) fn normalize(x: &[f32], norm: &RmsNorm, out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    kernels::rms_norm(x, &norm.weight, norm.eps, out);
}

/// `activation(gate) * up`, from gate and up side by side `[T, 2 F]` to `[T, F]`.
pub(crate) fn gated_unit(activation: Activation, x: &[f32], width: usize, out: &mut [f32]) {
    match activation {
        Activation::Relu2 => kernels::relu2_glu(x, width, out),
        Activation::Silu => kernels::silu_glu(x, width, out),
    }
}
