//! The operations that candle does not have, as candle custom operations over `ternion-kernels`.

use std::{cell::RefCell, sync::Arc};

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor, bail};
use ternion_core::{
    batch::Span,
    kv::{self, KvCache, Planes},
};
use ternion_formats::{Activation, Linear, RmsNorm, Weights};
use ternion_kernels::{self as kernels, KvBlocks};

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

/// Projections of the same input: `[T, K]` to `[T, sum of their rows]`.
///
/// Query, key and value (and gate and up) go together, so that the input is quantised once.
pub(crate) struct Projections {
    parts: Vec<(Linear, Place)>,
    rows: usize,
    stream: Option<Arc<Stream>>,
}

impl Projections {
    pub(crate) fn new(parts: Vec<(Linear, Place)>, stream: Option<&Arc<Stream>>) -> Self {
        let rows = parts.iter().map(|(part, _)| part.rows()).sum();
        Self { parts, rows, stream: stream.cloned() }
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

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }
}

impl CustomOp1 for Projections {
    fn name(&self) -> &'static str {
        "ternary-projections"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = floats(storage, layout)?;
        let (tokens, cols) = layout.shape().dims2()?;
        let mut out = vec![0.0; tokens * self.rows];
        // Those that take the input as it is and are in memory are computed together.
        let mut together = Vec::new();
        let mut quantized = None;
        let mut offset = 0;
        for (part, place) in &self.parts {
            if part.cols() != cols {
                bail!("{} takes {} features, {cols} given", part.name, part.cols());
            }
            let normed = part.input_norm.as_ref().map(|norm| normalize(x, norm));
            let input = normed.as_deref().unwrap_or(x);
            match &part.weights {
                Weights::Dense(dense) => self.with_bytes(part, *place, |bytes| {
                    let out = &mut out[offset..];
                    kernels::dense_matmul(dense.dtype.view(bytes), part.rows(), cols, input, out, self.rows);
                    Ok(())
                })?,
                Weights::Ternary(ternary) if normed.is_none() && *place == Place::Here => {
                    let weights = ternary.view().map_err(candle_core::Error::wrap)?;
                    together.push(kernels::Product { weights, scale: ternary.scale, offset });
                }
                Weights::Ternary(ternary) => {
                    let own = normed.as_deref().map(|normed| quantize(normed, cols));
                    let input =
                        own.as_ref().unwrap_or_else(|| quantized.get_or_insert_with(|| quantize(x, cols)));
                    self.with_bytes(part, *place, |bytes| {
                        let weights = ternary.view_of(bytes).map_err(candle_core::Error::wrap)?;
                        let product = kernels::Product { weights, scale: ternary.scale, offset };
                        kernels::matmul_all(&[product], input, &mut out, self.rows);
                        Ok(())
                    })?;
                }
            }
            offset += part.rows();
        }
        if !together.is_empty() {
            let input = quantized.get_or_insert_with(|| quantize(x, cols));
            kernels::matmul_all(&together, input, &mut out, self.rows);
        }
        Ok((CpuStorage::F32(out), Shape::from((tokens, self.rows))))
    }
}

fn quantize(x: &[f32], cols: usize) -> kernels::Quantized {
    let mut quantized = kernels::Quantized::default();
    quantized.quantize(x, cols);
    quantized
}

fn normalize(x: &[f32], norm: &RmsNorm) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    kernels::rms_norm(x, &norm.weight, norm.eps, &mut out);
    out
}

/// RMS normalisation over the last dimension. candle-nn's sums in sequence, which is slower and further from
/// transformers.
pub(crate) struct Norm(pub(crate) RmsNorm);

impl Norm {
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }
}

impl CustomOp1 for Norm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = floats(storage, layout)?;
        Ok((CpuStorage::F32(normalize(x, &self.0)), layout.shape().clone()))
    }
}

/// `activation(gate) * up`, from gate and up side by side `[T, 2 F]` to `[T, F]`.
pub(crate) struct GatedUnit(pub(crate) Activation);

impl CustomOp1 for GatedUnit {
    fn name(&self) -> &'static str {
        "gated-unit"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = floats(storage, layout)?;
        let (tokens, both) = layout.shape().dims2()?;
        let width = both / 2;
        let mut out = vec![0.0; tokens * width];
        let unit = match self.0 {
            Activation::Relu2 => kernels::relu2_glu,
            Activation::Silu => kernels::silu_glu,
        };
        unit(x, width, &mut out);
        Ok((CpuStorage::F32(out), Shape::from((tokens, width))))
    }
}

/// Appends keys and values to the KV cache of one layer and attends: queries `[T, heads * head_dim]`, keys and values
/// `[T, kv_heads * head_dim]` to `[T, heads * head_dim]`.
pub(crate) struct CachedAttention<'a> {
    pub(crate) cache: RefCell<&'a mut KvCache>,
    pub(crate) layer: usize,
    pub(crate) spans: &'a [Span],
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl CustomOp3 for CachedAttention<'_> {
    fn name(&self) -> &'static str {
        "cached-attention"
    }

    fn cpu_fwd(
        &self,
        queries: &CpuStorage,
        queries_layout: &Layout,
        keys: &CpuStorage,
        keys_layout: &Layout,
        values: &CpuStorage,
        values_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let q = floats(queries, queries_layout)?;
        let k = floats(keys, keys_layout)?;
        let v = floats(values, values_layout)?;
        let (width, kv_width) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut out = vec![0.0; q.len()];
        let mut cache = self.cache.borrow_mut();
        for span in self.spans {
            let (start, end) = (span.start, span.start + span.count);
            let kv = start * kv_width..end * kv_width;
            cache
                .write(span.sequence, self.layer, &k[kv.clone()], &v[kv])
                .map_err(candle_core::Error::wrap)?;
            let shape = kernels::Attention {
                heads: self.heads,
                kv_heads: self.kv_heads,
                head_dim: self.head_dim,
                past: span.past,
                scale: 1.0 / (self.head_dim as f32).sqrt(),
            };
            let (q, out) = (&q[start * width..end * width], &mut out[start * width..end * width]);
            let planes = cache.layer(span.sequence, self.layer).map_err(candle_core::Error::wrap)?;
            let kv = match &planes {
                Planes::F32 { keys, values } => KvBlocks::F32 { keys, values },
                Planes::F16 { keys, values } => KvBlocks::F16 { keys, values },
                Planes::Int8 { keys, values } => KvBlocks::Int8 { keys, values },
            };
            kernels::attention(shape, q, kv, out);
        }
        Ok((CpuStorage::F32(out), Shape::from((q.len() / width, width))))
    }
}
