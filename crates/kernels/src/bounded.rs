//! A copy of plain weights in int8 whose products come with bounds, so that the largest of a whole product are known after a
//! few rows were computed from the original weights.
//!
//! Let `w` be a row, `v` its copy, `x` the activations and `y` what they are rounded to. By the triangle inequality and that of
//! Cauchy and Schwarz `|w x - v y| <= |w - v| |y| + |w| |x - y|`. The norms of a row are kept with it, those of the activations
//! are computed with each product. Activations are the sum of two int8 vectors, the second of which holds what the rounding to the
//! first has lost, so nearly all of the bound is the rounding of the weights.

use std::ops::Range;

use crate::{
    Isa, Quantized,
    compact::{CompactBits, CompactMatrix, Inputs},
    dense,
    isa::multiversion,
    lanes::{self, LANES},
    leading,
    leading::{CHUNK, chunk_maxima},
};

/// More than any relative error of the sums of squares below, which are sums in 16 lanes.
const NORM_SLACK: f32 = 1.001;

/// Norms below this may be those of squares that vanish in `f32`.
const TINY: f32 = 1e-15;

/// A matrix `[rows, cols]` in int8 with the norms that bound the error of its products.
#[derive(Debug, Clone)]
pub struct BoundedMatrix {
    copy: CompactMatrix,
    /// Of each row at least the norm of what rounding has lost.
    errors: Vec<f32>,
    /// Of each row at least its norm.
    norms: Vec<f32>,
}

/// What bounds the errors of the products of one token: times the error of a row, and times its norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InputBound {
    error_factor: f32,
    norm_factor: f32,
}

impl BoundedMatrix {
    /// Rounds what `read` fills in for ranges of rows, as [`CompactMatrix::new`].
    ///
    /// # Errors
    /// The first of `read`, for whichever rows.
    pub fn new<E: Send>(
        rows: usize,
        cols: usize,
        read: impl Fn(Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let (copy, bounds) = CompactMatrix::with_notes(CompactBits::Eight, rows, cols, read, row_norms)?;
        let (errors, norms) = bounds.into_iter().unzip();
        Ok(Self { copy, errors, norms })
    }

    /// Bytes that `rows` rows of `cols` weights take.
    pub fn bytes(rows: usize, cols: usize) -> usize {
        CompactBits::Eight.bytes(rows, cols) + 2 * rows * size_of::<f32>()
    }

    /// `out[t * stride + n]` is about `sum_k w[n, k] * x[t, k]`. Returns for each token what its errors are bounded by.
    ///
    /// # Panics
    /// If `x` is no whole number of tokens, or `out` is too short for the last one.
    pub fn matmul(&self, x: &[f32], out: &mut [f32], stride: usize) -> Vec<InputBound> {
        self.matmul_with(Isa::detect(), x, out, stride)
    }

    /// [`matmul`](Self::matmul) with given instructions, for tests and measurements.
    ///
    /// # Panics
    /// As there, and if the CPU does not have them.
    pub fn matmul_with(&self, isa: Isa, x: &[f32], out: &mut [f32], stride: usize) -> Vec<InputBound> {
        let (rows, cols) = (self.errors.len(), self.copy.cols());
        assert!(x.len().is_multiple_of(cols), "{} activations in rows of {cols}", x.len());
        let tokens = x.len() / cols;
        let mut rounded = Quantized::default();
        rounded.quantize(x, cols);
        let mut lost = vec![0.0; x.len()];
        subtract(&rounded, x, &mut lost);
        let mut remainder = Quantized::default();
        remainder.quantize(&lost, cols);
        let bounds = (0..tokens).map(|t| {
            let x = &x[t * cols..][..cols];
            let (high, low) = (1.0 / rounded.scale(t), 1.0 / remainder.scale(t));
            let values = rounded.values(t).iter().zip(remainder.values(t));
            InputBound::new(x, values.map(|(h, l)| part(*h, high) + part(*l, low)))
        });
        let bounds = bounds.collect();

        // The tokens, and after them what their rounding has lost.
        let inputs = Inputs::of(CompactBits::Eight, &[&rounded, &remainder], cols);
        dense::by_rows(rows, tokens, out, stride, |first, out| {
            let count = out.first().map_or(0, |out| out.len());
            let mut low = vec![0.0; tokens * count];
            let mut parts: Vec<&mut [f32]> =
                out.iter_mut().map(|out| &mut **out).chain(low.chunks_mut(count.max(1))).collect();
            self.copy.compute(isa, first, &inputs, &mut parts);
            for (out, low) in out.iter_mut().zip(low.chunks(count.max(1))) {
                out.iter_mut().zip(low).for_each(|(out, low)| *out += low);
            }
        });
        bounds
    }

    /// The rows that may be among the `count` largest exact products of a token, in ascending order, given its `products` by
    /// [`matmul`](Self::matmul). All others are smaller than each of these `count`, by their exact and by their rounded product.
    ///
    /// `None` where that cannot be told, for a product or bound is not finite.
    ///
    /// # Panics
    /// If there is not one product for each row.
    pub fn candidates(&self, products: &[f32], bound: InputBound, count: usize) -> Option<Vec<u32>> {
        assert_eq!(products.len(), self.errors.len(), "products of the matrix");
        let mut limits = vec![0.0; products.len()];
        let InputBound { error_factor, norm_factor } = bound;
        limit(products, &self.errors, &self.norms, (-error_factor, -norm_factor), &mut limits);
        let largest = leading(&limits, count);
        if largest.len() < count.min(products.len()) || !(error_factor.is_finite() && norm_factor.is_finite())
        {
            return None;
        }
        let least = largest.iter().map(|row| limits[*row as usize]).fold(f32::INFINITY, f32::min);
        limit(products, &self.errors, &self.norms, (error_factor, norm_factor), &mut limits);
        let mut maxima = vec![f32::NEG_INFINITY; limits.len().div_ceil(CHUNK)];
        chunk_maxima(&limits, &mut maxima);
        let mut found = Vec::new();
        for (i, (chunk, most)) in limits.chunks(CHUNK).zip(&maxima).enumerate() {
            if *most >= least {
                let rows = chunk.iter().enumerate().filter(|(_, limit)| **limit >= least);
                found.extend(rows.map(|(k, _)| (i * CHUNK + k) as u32));
            }
        }
        Some(found)
    }
}

impl InputBound {
    /// Of activations and what they are rounded to.
    fn new(x: &[f32], rounded: impl Iterator<Item = f64>) -> Self {
        let (mut norm, mut lost) = (0.0_f64, 0.0_f64);
        for (x, y) in x.iter().zip(rounded) {
            let x = f64::from(*x);
            norm += x * x;
            lost += (x - y) * (x - y);
        }
        let (norm, lost) = (norm.sqrt(), lost.sqrt());
        // Rounding of the sums of floats on both sides: of the exact product in 16 lanes with two roundings for each weight, of
        // the product of integers in fewer steps.
        let steps = x.len() as f64 / 8.0 + 64.0;
        let sums = steps * f64::from(f32::EPSILON) * norm;
        let up = |x: f64| x as f32 * NORM_SLACK;
        Self { error_factor: up(norm + lost), norm_factor: up(lost + sums) }
    }
}

fn part(value: i8, step: f32) -> f64 {
    f64::from(value) * f64::from(step)
}

/// `lost = x - rounded`.
fn subtract(rounded: &Quantized, x: &[f32], lost: &mut [f32]) {
    let cols = x.len() / rounded.tokens().max(1);
    for (t, (x, lost)) in x.chunks_exact(cols.max(1)).zip(lost.chunks_exact_mut(cols.max(1))).enumerate() {
        let step = 1.0 / rounded.scale(t);
        for ((lost, x), value) in lost.iter_mut().zip(x).zip(rounded.values(t)) {
            *lost = (f64::from(*x) - part(*value, step)) as f32;
        }
    }
}

/// At least the norm of what a row has lost and that of the row; infinite where they are not finite.
fn row_norms(weights: &[f32], codes: &[u8], scales: &[f32]) -> (f32, f32) {
    let mut squares = [0.0; 2];
    sums_of_squares(weights, codes, scales[0], &mut squares);
    let [lost, norm] = squares.map(|square| if square.is_finite() { square.sqrt() } else { f32::INFINITY });
    let norm = norm * NORM_SLACK + TINY;
    // A difference of floats is rounded too.
    (lost * NORM_SLACK + norm * f32::EPSILON * 4.0, norm)
}

multiversion! {
    pub(crate) fn sums_of_squares(weights: &[f32], codes: &[u8], scale: f32, sums: &mut [f32; 2]) = squares_body;
}

#[inline(always)]
pub(crate) fn squares_body<const FMA: bool>(weights: &[f32], codes: &[u8], scale: f32, sums: &mut [f32; 2]) {
    let (groups, rest) = weights.as_chunks::<LANES>();
    let (mut lost, mut norm) = ([0.0; LANES], [0.0; LANES]);
    let difference = |w: f32, code: u8| w - (i32::from(code) - 128) as f32 * scale;
    for (w, codes) in groups.iter().zip(codes.as_chunks::<LANES>().0) {
        let mut d = [0.0; LANES];
        for i in 0..LANES {
            d[i] = difference(w[i], codes[i]);
        }
        lanes::accumulate::<FMA>(&mut lost, &d, &d);
        lanes::accumulate::<FMA>(&mut norm, w, w);
    }
    for (i, (w, code)) in rest.iter().zip(&codes[groups.len() * LANES..]).enumerate() {
        let d = difference(*w, *code);
        lost[i] += d * d;
        norm[i] += w * w;
    }
    *sums = [lanes::sum(lost), lanes::sum(norm)];
}

multiversion! {
    pub(crate) fn limit(
        products: &[f32], errors: &[f32], norms: &[f32], factors: (f32, f32), out: &mut [f32],
    ) = limit_body;
}

/// `products + errors * factors.0 + norms * factors.1`.
#[inline(always)]
pub(crate) fn limit_body<const FMA: bool>(
    products: &[f32],
    errors: &[f32],
    norms: &[f32],
    factors: (f32, f32),
    out: &mut [f32],
) {
    for ((out, product), (error, norm)) in out.iter_mut().zip(products).zip(errors.iter().zip(norms)) {
        let bound = error * factors.0 + norm * factors.1;
        *out = product + bound;
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::{DenseRef, dense_matmul};

    fn noise(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Nearly a normal distribution.
            (0..4).map(|i| ((state >> (i * 16)) & 0xffff) as f32 / 32768.0 - 1.0).sum::<f32>()
        };
        (0..count).map(|_| next()).collect()
    }

    fn bounded(weights: &[f32], cols: usize) -> BoundedMatrix {
        let read = |rows: Range<usize>, out: &mut [f32]| -> Result<(), Infallible> {
            out.copy_from_slice(&weights[rows.start * cols..rows.end * cols]);
            Ok(())
        };
        let Ok(matrix) = BoundedMatrix::new(weights.len() / cols, cols, read);
        matrix
    }

    fn exact(weights: &[f32], cols: usize, x: &[f32]) -> Vec<f32> {
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let rows = weights.len() / cols;
        let mut out = vec![0.0; x.len() / cols * rows];
        dense_matmul(DenseRef::F32(&bytes), rows, cols, x, &mut out, rows);
        out
    }

    /// Weights and activations with outliers, zeros and rows of all sizes.
    fn cases() -> Vec<(Vec<f32>, usize, Vec<f32>)> {
        let mut cases = Vec::new();
        for (seed, (rows, cols, tokens)) in
            [(700, 640, 3), (1000, 70, 1), (300, 128, 9), (5, 16, 2), (64, 1, 2), (2000, 300, 1)]
                .into_iter()
                .enumerate()
        {
            let mut weights = noise(seed as u64 + 1, rows * cols);
            for (row, weights) in weights.chunks_exact_mut(cols).enumerate() {
                let size = [1.0, 0.1, 3.0, 1e-6, 0.0][row % 5];
                for w in &mut *weights {
                    *w *= size;
                }
                weights[row % cols] *= if row % 7 == 0 { 40.0 } else { 1.0 };
            }
            let mut x = noise(seed as u64 + 100, tokens * cols);
            x.iter_mut().step_by(37).for_each(|x| *x *= 60.0);
            if tokens > 1 {
                x[..cols].fill(0.0);
            }
            cases.push((weights, cols, x));
        }
        cases
    }

    #[test]
    fn errors_are_within_their_bounds() {
        for (weights, cols, x) in cases() {
            let (matrix, rows) = (bounded(&weights, cols), weights.len() / cols);
            let mut products = vec![0.0; x.len() / cols * rows];
            let bounds = matrix.matmul(&x, &mut products, rows);
            let exact = exact(&weights, cols, &x);
            for (t, bound) in bounds.iter().enumerate() {
                for n in 0..rows {
                    let most = matrix.errors[n] * bound.error_factor + matrix.norms[n] * bound.norm_factor;
                    let (found, exact) = (products[t * rows + n], exact[t * rows + n]);
                    assert!((found - exact).abs() <= most, "row {n}: {found} {exact} {most}");
                    // In f64, so that the rounding of the reference plays no part.
                    let places = weights[n * cols..][..cols].iter().zip(&x[t * cols..][..cols]);
                    let true_value: f64 = places.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                    assert!(
                        (f64::from(found) - true_value).abs() <= f64::from(most),
                        "row {n}: {true_value}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_largest_are_among_the_candidates_and_nothing_else_is_larger() {
        for (weights, cols, x) in cases() {
            let (matrix, rows) = (bounded(&weights, cols), weights.len() / cols);
            let mut products = vec![0.0; x.len() / cols * rows];
            let bounds = matrix.matmul(&x, &mut products, rows);
            let exact = exact(&weights, cols, &x);
            for (t, bound) in bounds.into_iter().enumerate() {
                let (products, exact) = (&products[t * rows..][..rows], &exact[t * rows..][..rows]);
                for count in [1, 5, 64, 10_000] {
                    let found = matrix.candidates(products, bound, count).unwrap();
                    let mut logits = products.to_vec();
                    for row in &found {
                        logits[*row as usize] = exact[*row as usize];
                    }
                    let mut order: Vec<usize> = (0..rows).collect();
                    order.sort_by(|a, b| exact[*b].total_cmp(&exact[*a]));
                    let mut mixed: Vec<usize> = (0..rows).collect();
                    mixed.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
                    let most = count.min(rows);
                    let values =
                        |order: &[usize]| order[..most].iter().map(|i| exact[*i]).collect::<Vec<_>>();
                    assert_eq!(values(&mixed), values(&order), "{rows} x {cols}, the first {count}");
                }
                if rows == 2000 {
                    assert!(matrix.candidates(products, bound, 1).unwrap().len() < 200);
                }
            }
        }
    }

    #[test]
    fn products_are_the_same_on_all_instructions_and_in_all_batches() {
        for (weights, cols, x) in cases() {
            let (matrix, rows) = (bounded(&weights, cols), weights.len() / cols);
            let mut expected = vec![0.0; x.len() / cols * rows];
            let bounds = matrix.matmul(&x, &mut expected, rows);
            for isa in Isa::available().into_iter().filter(|isa| isa.is_fused()) {
                let mut found = vec![0.0; expected.len()];
                assert_eq!(matrix.matmul_with(isa, &x, &mut found, rows), bounds);
                assert_eq!(found, expected, "{isa}");
                for (t, x) in x.chunks_exact(cols).enumerate() {
                    let mut one = vec![0.0; rows];
                    assert_eq!(matrix.matmul_with(isa, x, &mut one, rows), bounds[t..=t]);
                    assert_eq!(one, expected[t * rows..][..rows], "token {t} alone");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_not_decided() {
        let (rows, cols) = (40, 32);
        let mut weights = noise(3, rows * cols);
        let mut x = noise(4, cols);
        let candidates = |weights: &[f32], x: &[f32]| {
            let matrix = bounded(weights, cols);
            let mut products = vec![0.0; rows];
            let bounds = matrix.matmul(x, &mut products, rows);
            matrix.candidates(&products, bounds[0], 3)
        };
        assert!(candidates(&weights, &x).is_some());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let good = std::mem::replace(&mut x[5], bad);
            assert_eq!(candidates(&weights, &x), None, "{bad}");
            x[5] = good;
        }
        // The sum of the squares of a row overflows: nothing is known of it, so it is always computed.
        weights[7 * cols] = 1e30;
        assert!(candidates(&weights, &x).unwrap().contains(&7));
    }
}
