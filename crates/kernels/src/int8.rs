//! An int8 copy of plain weights: half the bytes of half-precision ones, for a head that is read whole for every token.

use rayon::prelude::*;

use crate::{DenseRef, dense};

/// A matrix `[rows, cols]` of int8 with a scale for each row: `w[n, k]` is about `values[n, k] * scales[n]`.
#[derive(Debug, Clone)]
pub struct Int8Matrix {
    values: Vec<[u8; 1]>,
    scales: Vec<f32>,
    cols: usize,
}

impl Int8Matrix {
    /// Rounds `w`; a row's largest weight becomes 127.
    ///
    /// # Panics
    /// If `w` is not `rows * cols` weights.
    pub fn new(w: DenseRef<'_>, rows: usize, cols: usize) -> Self {
        assert!(cols > 0 && w.elements() == rows * cols, "{} weights for {rows} x {cols}", w.elements());
        let mut values = vec![[0]; rows * cols];
        let mut scales = vec![0.0; rows];
        values.par_chunks_exact_mut(cols).zip(&mut scales).enumerate().for_each_init(
            || vec![0.0; cols],
            |row, (n, (values, scale))| {
                w.row(n, row);
                let largest = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                *scale = largest / 127.0;
                let factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                for (value, x) in values.iter_mut().zip(&*row) {
                    *value = ((x * factor).round_ties_even() as i8).to_le_bytes();
                }
            },
        );
        Self { values, scales, cols }
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.values.len() + size_of_val(&self.scales[..])
    }

    /// `out[t * stride + n] = sum_k w[n, k] * x[t, k]`, as [`dense_matmul`](crate::dense_matmul).
    ///
    /// # Panics
    /// If `x` is no whole number of tokens, or `out` is too short for the last one.
    pub fn matmul(&self, x: &[f32], out: &mut [f32], stride: usize) {
        let cols = self.cols;
        assert!(x.len().is_multiple_of(cols), "{} activations in rows of {cols}", x.len());
        dense::by_rows(self.scales.len(), x.len() / cols, out, stride, |first, out| {
            dense::bytes(&self.values[first * cols..], x, cols, out);
            for out in out {
                for (y, scale) in out.iter_mut().zip(&self.scales[first..]) {
                    *y *= scale;
                }
            }
        });
    }
}
