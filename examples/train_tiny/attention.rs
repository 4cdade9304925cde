//! Attention over rows in which documents stand one after the other: each sees itself alone, from position 0 on.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::ops::{floats, with_floats};

/// Where the tokens of a batch stand in their documents.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    /// Length of a row.
    pub(crate) length: usize,
    /// For each token of all rows, where in its row its document starts.
    pub(crate) starts: Arc<Vec<usize>>,
}

impl Places {
    /// Position of a token in its document.
    pub(crate) fn position(&self, token: usize) -> usize {
        token % self.length - self.starts[token]
    }
}

/// The rotary embedding in NeoX form, of `[T, heads * head_dim]`.
#[derive(Clone)]
pub(crate) struct Rope {
    /// Cosines and sines `[T, head_dim / 2]`.
    pub(crate) cos: Arc<Vec<f32>>,
    pub(crate) sin: Arc<Vec<f32>>,
    pub(crate) head_dim: usize,
}

impl Rope {
    pub(crate) fn new(places: &Places, theta: f32, head_dim: usize) -> Self {
        let frequencies: Vec<f32> = (0..head_dim / 2)
            .map(|i| 1.0 / f64::from(theta).powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32)
            .collect();
        let angles: Vec<f32> = (0..places.starts.len())
            .flat_map(|token| {
                let position = places.position(token) as f32;
                frequencies.iter().map(move |f| position * f)
            })
            .collect();
        Self {
            cos: Arc::new(angles.iter().map(|a| a.cos()).collect()),
            sin: Arc::new(angles.iter().map(|a| a.sin()).collect()),
            head_dim,
        }
    }

    /// Rotates by the angles times `direction`, which is 1 or -1.
    fn rotate(&self, x: &[f32], direction: f32) -> Vec<f32> {
        let half = self.head_dim / 2;
        let tokens = self.cos.len() / half;
        let width = x.len() / tokens;
        let mut out = vec![0.0; x.len()];
        out.par_chunks_exact_mut(width).zip(x.par_chunks_exact(width)).enumerate().for_each(
            |(token, (out, x))| {
                let angles = token * half..(token + 1) * half;
                let (cos, sin) = (&self.cos[angles.clone()], &self.sin[angles]);
                let heads = out.chunks_exact_mut(self.head_dim).zip(x.chunks_exact(self.head_dim));
                for (out, x) in heads {
                    let ((a, b), (out_a, out_b)) = (x.split_at(half), out.split_at_mut(half));
                    for i in 0..half {
                        let sin = sin[i] * direction;
                        out_a[i] = a[i] * cos[i] - b[i] * sin;
                        out_b[i] = b[i] * cos[i] + a[i] * sin;
                    }
                }
            },
        );
        out
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.rotate(floats(storage, layout)?, 1.0)), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let rotated = with_floats(gradient, |gradient| self.rotate(gradient, -1.0))?;
        Ok(Some(Tensor::from_vec(rotated, gradient.shape(), gradient.device())?))
    }
}

/// Softmax of scores `[rows, kv_heads, group * L, L]` times a scale, each token over its document up to itself.
pub(crate) struct DocumentSoftmax {
    pub(crate) places: Places,
    pub(crate) scale: f32,
}

impl DocumentSoftmax {
    /// The columns that score row `index` of all is about.
    fn seen(&self, index: usize, per_batch_row: usize) -> std::ops::Range<usize> {
        let length = self.places.length;
        let token = index / per_batch_row * length + index % length;
        self.places.starts[token]..index % length + 1
    }

    /// Score rows that belong to one row of the batch.
    fn per_batch_row(&self, shape: &Shape) -> usize {
        shape.elem_count() / self.places.length / (self.places.starts.len() / self.places.length)
    }
}

impl CustomOp1 for DocumentSoftmax {
    fn name(&self) -> &'static str {
        "document-softmax"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = floats(storage, layout)?;
        let (length, per_batch_row) = (self.places.length, self.per_batch_row(layout.shape()));
        let mut out = vec![0.0; x.len()];
        out.par_chunks_exact_mut(length).zip(x.par_chunks_exact(length)).enumerate().for_each(
            |(index, (out, x))| {
                let seen = self.seen(index, per_batch_row);
                let (out, x) = (&mut out[seen.clone()], &x[seen]);
                let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let mut sum = 0.0;
                for (out, x) in out.iter_mut().zip(x) {
                    *out = ((x - largest) * self.scale).exp();
                    sum += *out;
                }
                for p in out.iter_mut() {
                    *p /= sum;
                }
            },
        );
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, probabilities: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (length, per_batch_row) = (self.places.length, self.per_batch_row(x.shape()));
        let mut out = vec![0.0; x.elem_count()];
        with_floats(probabilities, |p| {
            with_floats(gradient, |g| {
                out.par_chunks_exact_mut(length)
                    .zip(p.par_chunks_exact(length))
                    .zip(g.par_chunks_exact(length))
                    .enumerate()
                    .for_each(|(index, ((out, p), g))| {
                        let seen = self.seen(index, per_batch_row);
                        let (out, p, g) = (&mut out[seen.clone()], &p[seen.clone()], &g[seen]);
                        let dot: f32 = p.iter().zip(g).map(|(p, g)| p * g).sum();
                        for ((out, p), g) in out.iter_mut().zip(p).zip(g) {
                            *out = self.scale * p * (g - dot);
                        }
                    });
            })
        })??;
        Ok(Some(Tensor::from_vec(out, x.shape(), x.device())?))
    }
}
