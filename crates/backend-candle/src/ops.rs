//! The steps of a decoder layer on slices, over `ternion-kernels`.

use std::sync::Arc;

use candle_core::{CpuStorage, Layout, Result, bail};
use ternion_formats::{Activation, Linear, RmsNorm, TernaryTensor, Weights};
use ternion_kernels::{self as kernels, ActivationType};

use crate::residency::Place;
use crate::stream::Stream;

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
    grouped: kernels::GroupedInput,
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
    /// How those with grouped weights take the input.
    activations: ActivationType,
}

impl Projections {
    pub(crate) fn new(
        norm: Option<RmsNorm>,
        parts: Vec<(Linear, Place)>,
        stream: Option<&Arc<Stream>>,
        activations: ActivationType,
    ) -> Self {
        let rows = parts.iter().map(|(part, _)| part.rows()).sum();
        Self { norm, parts, rows, stream: stream.cloned(), activations }
    }

    /// Elements of a token's output.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// What the integer sums of the part `index`, which is ternary, were multiplied by in the last [`forward`](Self::forward) with
    /// this `input`: one factor for each token.
    pub(crate) fn factors<'a>(&self, index: usize, input: &'a Input) -> impl Iterator<Item = f32> + use<'a> {
        let scale = match self.parts.get(index) {
            Some((Linear { weights: Weights::Ternary(ternary), .. }, _)) => ternary.scale,
            _ => f32::NAN,
        };
        input.quantized.factors(scale)
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
            _ => match part.bytes() {
                Some(bytes) => compute(bytes),
                None => bail!("{} has no bytes of a file", part.name),
            },
        }
    }

    /// Whether all take the input as it is, and their codes are in memory.
    fn are_simple(&self) -> bool {
        self.parts.iter().all(|(part, place)| takes_int8(part) && *place == Place::Here)
    }

    /// Fills `out`, `[T, F]`, with the gated unit of gate and up, which these projections are, from `x`, `[T, K]`.
    pub(crate) fn gated(
        &self,
        activation: Activation,
        x: &[f32],
        input: &mut Input,
        wide: &mut Vec<f32>,
        out: &mut [f32],
    ) -> Result<()> {
        let width = self.rows / 2;
        let tokens = out.len() / width;
        if let [
            (Linear { weights: Weights::Ternary(gate), .. }, _),
            (Linear { weights: Weights::Ternary(up), .. }, _),
        ] = &self.parts[..]
            && self.are_simple()
            && gate.layout == up.layout
        {
            self.check(x.len() / tokens)?;
            self.quantize(x, x.len() / tokens, input);
            let unit = match activation {
                Activation::Relu2 => kernels::GatedUnit::Relu2,
                Activation::Silu => kernels::GatedUnit::Silu,
            };
            let (gate, up) = ((view(gate)?, gate.scale), (view(up)?, up.scale));
            kernels::gated_matmul(unit, gate, up, &input.quantized, out);
            return Ok(());
        }
        let wide = sized(wide, tokens * self.rows);
        self.forward(x, input, wide)?;
        match activation {
            Activation::Relu2 => kernels::relu2_glu(wide, width, out),
            Activation::Silu => kernels::silu_glu(wide, width, out),
        }
        Ok(())
    }

    fn check(&self, cols: usize) -> Result<()> {
        match self.parts.iter().find(|(part, _)| part.cols() != cols) {
            Some((part, _)) => bail!("{} takes {} features, {cols} given", part.name, part.cols()),
            None => Ok(()),
        }
    }

    /// The input, normalised if there is a norm, in int8.
    fn quantize(&self, x: &[f32], cols: usize, input: &mut Input) {
        match &self.norm {
            Some(norm) => input.quantized.quantize_normed(x, &norm.weight, norm.eps),
            None => input.quantized.quantize(x, cols),
        }
    }

    /// Fills `out`, `[T, rows]`, from `x`, `[T, K]`.
    pub(crate) fn forward(&self, x: &[f32], input: &mut Input, out: &mut [f32]) -> Result<()> {
        let cols = x.len() / (out.len() / self.rows);
        self.check(cols)?;
        if self.parts.iter().any(|(part, _)| takes_int8(part)) {
            self.quantize(x, cols, input);
        }
        let Input { normed, quantized, grouped } = input;
        let x = match &self.norm {
            Some(norm) if !self.parts.iter().all(|(part, _)| takes_int8(part)) => {
                normalize(x, norm, normed);
                &normed[..]
            }
            _ => x,
        };
        // Those that take the input as it is and are in memory are computed together.
        let mut together = Vec::with_capacity(self.parts.len());
        let mut groups: Vec<kernels::GroupedProduct<'_>> = Vec::new();
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
                Weights::Grouped(weights) => groups.push(kernels::GroupedProduct { weights, offset }),
                Weights::Ternary(ternary) if part.input_norm.is_none() && *place == Place::Here => {
                    let weights = view(ternary)?;
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
        kernels::grouped_matmul_all(&groups, x, self.activations, grouped, out, self.rows);
        if !together.is_empty() {
            kernels::matmul_all(&together, quantized, out, self.rows);
        }
        Ok(())
    }
}

/// Whether it takes the shared input in int8; others take its floats.
fn takes_int8(part: &Linear) -> bool {
    part.input_norm.is_none() && matches!(part.weights, Weights::Ternary(_))
}

fn view(ternary: &TernaryTensor) -> Result<kernels::TernaryRef<'_>> {
    ternary.view().map_err(candle_core::Error::wrap)
}

/// RMS normalisation of tokens, `[T, K]`. candle-nn's sums in sequence, which is slower and further from transformers.
pub(crate) fn normalize(x: &[f32], norm: &RmsNorm, out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    kernels::rms_norm(x, &norm.weight, norm.eps, out);
}

/// The first `count` floats of a buffer that grows to that.
pub(crate) fn sized(buffer: &mut Vec<f32>, count: usize) -> &mut [f32] {
    if buffer.len() < count {
        buffer.resize(count, 0.0);
    }
    &mut buffer[..count]
}
