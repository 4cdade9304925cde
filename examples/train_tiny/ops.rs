//! What quantisation-aware training needs beside candle's own operations, each with its gradient.
//!
//! Rounding has no useful derivative. The straight-through estimator takes it as the identity: forward is the arithmetic of
//! inference to the last bit of a step, backward goes as if nothing had been rounded.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};
use half::bf16;
use rayon::prelude::*;
use ternion_kernels as kernels;

/// Of all norms.
pub(crate) const EPSILON: f32 = 1e-5;

pub(crate) fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(data) = storage else { bail!("f32 expected") };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("a contiguous tensor expected"),
    }
}

/// Calls `f` with the floats of `tensor`.
pub(crate) fn with_floats<T>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else { bail!("a tensor on the CPU expected") };
    Ok(f(floats(storage, layout)?))
}

fn like(tensor: &Tensor, values: Vec<f32>) -> Result<Tensor> {
    Tensor::from_vec(values, tensor.shape(), tensor.device())
}

/// A parameter as the BF16 master will have it.
pub(crate) fn rounded(values: &[f32]) -> Vec<f32> {
    values.par_iter().map(|x| bf16::from_f32(*x).to_f32()).collect()
}

/// A ternary projection's weights `[.., cols]` from its master: `clamp(round(w / m), -1, 1) * m`, where `m` is the mean of
/// `|w|`.
pub(crate) fn ternary(master: &[f32], cols: usize) -> Vec<f32> {
    let master = rounded(master);
    // Summed as `ternion_kernels::quantize_master` does, so that the threshold is the same.
    let rows = master.par_chunks_exact(cols).map(|row| row.iter().map(|x| f64::from(x.abs())).sum());
    let rows: Vec<f64> = rows.collect();
    let mean = (rows.iter().sum::<f64>() / master.len() as f64) as f32;
    let scale = 1.0 / mean.max(1e-5);
    let inverse = 1.0 / scale;
    // Half rounds to even, to 0; what is beyond 1 is 1.
    let trit = |x: f32| f32::from(i8::from(x > 0.5) - i8::from(x < -0.5));
    master.par_iter().map(|x| trit(x * scale) * inverse).collect()
}

/// RMS norm of tokens `[T, K]` with weights `[K]`, then, where `quantise`, int8 with one scale for each token and back.
pub(crate) struct Norm {
    pub(crate) quantise: bool,
}

impl CustomOp2 for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (floats(x, x_layout)?, floats(weight, weight_layout)?);
        let cols = weight.len();
        let mut out = vec![0.0; x.len()];
        kernels::rms_norm(x, weight, EPSILON, &mut out);
        if self.quantise {
            let mut quantized = kernels::Quantized::default();
            quantized.quantize(&out, cols);
            out.par_chunks_exact_mut(cols).enumerate().for_each(|(token, out)| {
                let inverse = 1.0 / quantized.scale(token);
                for (out, value) in out.iter_mut().zip(quantized.values(token)) {
                    *out = f32::from(*value) * inverse;
                }
            });
        }
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let cols = weight.elem_count();
        let (dx, dw) = with_floats(x, |xs| {
            with_floats(weight, |ws| with_floats(gradient, |gs| norm_gradient(xs, ws, gs, cols)))
        })???;
        Ok((Some(like(x, dx)?), Some(like(weight, dw)?)))
    }
}

/// The gradients of `w * x / sqrt(mean(x^2) + e)` by `x` and by `w`.
fn norm_gradient(x: &[f32], weight: &[f32], gradient: &[f32], cols: usize) -> (Vec<f32>, Vec<f32>) {
    // Pieces of a fixed size: the same sums, in the same order, on any number of threads.
    const PIECE: usize = 64;
    let mut dx = vec![0.0; x.len()];
    let pieces = dx
        .par_chunks_mut(PIECE * cols)
        .zip(x.par_chunks(PIECE * cols))
        .zip(gradient.par_chunks(PIECE * cols))
        .map(|((dx, x), gradient)| {
            let mut dw = vec![0.0f32; cols];
            let tokens = dx.chunks_exact_mut(cols).zip(x.chunks_exact(cols)).zip(gradient.chunks_exact(cols));
            for ((dx, x), gradient) in tokens {
                let square: f32 = sum(cols, |i| x[i] * x[i]);
                let inverse = 1.0 / (square / cols as f32 + EPSILON).sqrt();
                let dot: f32 = sum(cols, |i| gradient[i] * weight[i] * x[i]);
                let along = dot * inverse * inverse * inverse / cols as f32;
                for i in 0..cols {
                    dx[i] = gradient[i] * weight[i] * inverse - x[i] * along;
                    dw[i] += gradient[i] * x[i] * inverse;
                }
            }
            dw
        });
    let pieces: Vec<Vec<f32>> = pieces.collect();
    let mut dw = vec![0.0; cols];
    for piece in pieces {
        dw.iter_mut().zip(piece).for_each(|(sum, x)| *sum += x);
    }
    (dx, dw)
}

/// A sum in eight parts, which becomes vector instructions.
fn sum(count: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut parts = [0.0f32; 8];
    let whole = count / 8 * 8;
    for start in (0..whole).step_by(8) {
        for (lane, part) in parts.iter_mut().enumerate() {
            *part += term(start + lane);
        }
    }
    parts.iter().sum::<f32>() + (whole..count).map(term).sum::<f32>()
}

/// `relu(gate)^2 * up` of rows `[gate, up]`.
pub(crate) struct GatedUnit;

impl CustomOp1 for GatedUnit {
    fn name(&self) -> &'static str {
        "gated-unit"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = floats(storage, layout)?;
        let (tokens, columns) = layout.shape().dims2()?;
        let width = columns / 2;
        let mut out = vec![0.0; tokens * width];
        kernels::relu2_glu(x, width, &mut out);
        Ok((CpuStorage::F32(out), Shape::from((tokens, width))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (_, columns) = x.dims2()?;
        let width = columns / 2;
        let mut dx = vec![0.0; x.elem_count()];
        with_floats(x, |x| {
            with_floats(gradient, |gradient| {
                dx.par_chunks_exact_mut(columns)
                    .zip(x.par_chunks_exact(columns))
                    .zip(gradient.par_chunks_exact(width))
                    .for_each(|((dx, x), gradient)| {
                        let ((gate, up), (d_gate, d_up)) = (x.split_at(width), dx.split_at_mut(width));
                        for i in 0..width {
                            let positive = gate[i].max(0.0);
                            d_gate[i] = gradient[i] * 2.0 * positive * up[i];
                            d_up[i] = gradient[i] * positive * positive;
                        }
                    });
            })
        })??;
        Ok(Some(like(x, dx)?))
    }
}

/// The weighted cross entropy of logits `[T, V]`, a number.
pub(crate) struct CrossEntropy {
    pub(crate) targets: Vec<u32>,
    /// What each token counts for.
    pub(crate) weights: Vec<f32>,
    /// What the sum is divided by.
    pub(crate) total: f32,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let logits = floats(storage, layout)?;
        let (_, vocab) = layout.shape().dims2()?;
        let tokens = logits.par_chunks_exact(vocab).zip(&self.targets).zip(&self.weights);
        let losses: Vec<f64> = tokens
            .map(|((logits, target), weight)| f64::from(weight * token_loss(logits, *target)))
            .collect();
        let loss = losses.iter().sum::<f64>() / f64::from(self.total);
        Ok((CpuStorage::F32(vec![loss as f32]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (_, vocab) = logits.dims2()?;
        let factor = gradient.to_scalar::<f32>()? / self.total;
        let mut out = vec![0.0; logits.elem_count()];
        with_floats(logits, |logits| {
            let tokens = logits.par_chunks_exact(vocab).zip(&self.targets).zip(&self.weights);
            out.par_chunks_exact_mut(vocab).zip(tokens).for_each(|(out, ((logits, target), weight))| {
                // A token that does not count has no gradient.
                if *weight != 0.0 {
                    let (largest, sum) = exponential_sum(logits);
                    let factor = factor * weight;
                    for (out, x) in out.iter_mut().zip(logits) {
                        *out = (x - largest).exp() / sum * factor;
                    }
                    out[*target as usize] -= factor;
                }
            });
        })?;
        Ok(Some(like(logits, out)?))
    }
}

/// The cross entropy of one token.
pub(crate) fn token_loss(logits: &[f32], target: u32) -> f32 {
    let (largest, sum) = exponential_sum(logits);
    sum.ln() + largest - logits[target as usize]
}

/// The largest of `x`, and the sum of `exp(x - largest)`.
fn exponential_sum(x: &[f32]) -> (f32, f32) {
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (largest, x.iter().map(|x| (x - largest).exp()).sum())
}
