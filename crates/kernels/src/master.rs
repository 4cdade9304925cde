//! Quantisation of float master weights to trits, by the mean of their absolute values.

use rayon::prelude::*;

use crate::{DenseRef, TernaryLayout, WeightsError, ternary};

/// Packs, as [`TernaryLayout::Quarters`], `clamp(round(w / m), -1, 1)` with `m = max(mean(|w|), 1e-5)`; returns the codes and `m`, by which a product is
/// to be multiplied. This is what transformers computes for models with `quantization_mode: online`.
///
/// # Errors
/// As [`TernaryRef::new`](crate::TernaryRef::new) for the shape, and if a weight is not finite.
pub fn quantize_master(w: DenseRef<'_>, rows: usize, cols: usize) -> Result<(Vec<u8>, f32), WeightsError> {
    ternary::check_shape(TernaryLayout::Quarters, rows, cols)?;
    if rows.checked_mul(cols) != Some(w.elements()) {
        return Err(WeightsError::new(format!(
            "{} weights for {rows} rows and {cols} columns",
            w.elements()
        )));
    }
    // One sum for each row, added up in order: the same bits on any number of threads.
    let sums: Vec<f64> = (0..rows)
        .into_par_iter()
        .map_init(
            || vec![0.0; cols],
            |row, r| {
                w.row(r, row);
                row.iter().map(|x| f64::from(x.abs())).sum()
            },
        )
        .collect();
    let mean = (sums.iter().sum::<f64>() / (rows * cols) as f64) as f32;
    if !mean.is_finite() {
        return Err(WeightsError::new("a weight is infinite or not a number"));
    }
    let scale = 1.0 / mean.max(1e-5);
    let quarter = rows / 4;
    let mut codes = vec![0; quarter * cols];
    codes.par_chunks_exact_mut(cols).enumerate().for_each_init(
        || vec![0.0; cols],
        |row, (r, codes)| {
            for i in 0..4 {
                w.row(i * quarter + r, row);
                for (code, x) in codes.iter_mut().zip(&*row) {
                    let trit = (x * scale).round_ties_even().clamp(-1.0, 1.0) as i8;
                    *code |= ((trit + 1) as u8) << (2 * i);
                }
            }
        },
    );
    Ok((codes, 1.0 / scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_the_threshold() {
        // mean 0.5: 0.25 is half of it and rounds to even, 0; 0.26 rounds up.
        let weights = [0.25f32, -0.26, 1.0, -0.49];
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let (codes, scale) = quantize_master(DenseRef::F32(&bytes), 4, 1).unwrap();
        assert_eq!(scale, 0.5);
        assert_eq!(
            ternary::unpack(ternary::TernaryRef::new(TernaryLayout::Quarters, &codes, 4, 1).unwrap()),
            [0, -1, 1, -1]
        );
    }

    #[test]
    fn zeros_stay_zeros_and_nan_is_refused() {
        let (codes, scale) = quantize_master(DenseRef::Bf16(&[0; 16]), 8, 1).unwrap();
        assert_eq!(codes, [0x55, 0x55]);
        assert_eq!(scale, 1e-5);
        let nan: Vec<u8> = [0.0, f32::NAN, 0.0, 0.0].iter().flat_map(|w: &f32| w.to_le_bytes()).collect();
        assert!(quantize_master(DenseRef::F32(&nan), 4, 1).is_err());
        assert!(quantize_master(DenseRef::F32(&nan), 8, 1).is_err());
    }
}
