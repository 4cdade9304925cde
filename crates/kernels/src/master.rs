//! Quantisation of float master weights to trits, by the mean of their absolute values.

use rayon::prelude::*;

use crate::{DenseRef, TernaryLayout, WeightsError, ternary};

/// Packs, as [`TernaryLayout::Quarters`], `clamp(round(w / m), -1, 1)` with `m = max(mean(|w|), 1e-5)`; returns the codes and `m`, by which a product is
/// to be multiplied. This is what transformers computes for models with `quantization_mode: online`.
///
/// # Errors
/// As [`TernaryRef::new`](crate::TernaryRef::new) for the shape, and if a weight is not finite.
pub fn quantize_master(w: DenseRef<'_>, rows: usize, cols: usize) -> Result<(Vec<u8>, f32), WeightsError> {
    check(w, rows, cols)?;
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

/// Packs a float matrix `[rows, cols]` that is already quantised: each weight is `-scale`, 0 or `scale`. Returns the codes in
/// [`TernaryLayout::Quarters`] and the scale; `None` where there are other weights, or only zeros.
///
/// # Errors
/// As [`quantize_master`], except that a weight which is not finite only makes the result `None`.
pub fn pack_quantized(
    w: DenseRef<'_>,
    rows: usize,
    cols: usize,
) -> Result<Option<(Vec<u8>, f32)>, WeightsError> {
    check(w, rows, cols)?;
    let mut row = vec![0.0; cols];
    let first = (0..rows).find_map(|r| {
        w.row(r, &mut row);
        row.iter().copied().find(|x| *x != 0.0)
    });
    let Some(scale) = first.map(f32::abs).filter(|scale| scale.is_finite()) else { return Ok(None) };
    let quarter = rows / 4;
    let mut codes = vec![0; quarter * cols];
    let packed = codes.par_chunks_exact_mut(cols).enumerate().try_for_each_init(
        || vec![0.0; cols],
        |row, (r, codes)| {
            for i in 0..4 {
                w.row(i * quarter + r, row);
                for (code, x) in codes.iter_mut().zip(&*row) {
                    let trit = if *x == 0.0 {
                        1
                    } else if *x == scale {
                        2
                    } else if *x == -scale {
                        0
                    } else {
                        return None;
                    };
                    *code |= trit << (2 * i);
                }
            }
            Some(())
        },
    );
    Ok(packed.map(|()| (codes, scale)))
}

fn check(w: DenseRef<'_>, rows: usize, cols: usize) -> Result<(), WeightsError> {
    ternary::check_shape(TernaryLayout::Quarters, rows, cols)?;
    if rows.checked_mul(cols) == Some(w.elements()) {
        return Ok(());
    }
    Err(WeightsError::new(format!("{} weights for {rows} rows and {cols} columns", w.elements())))
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
    fn weights_of_three_values_keep_their_scale() {
        let bytes = |weights: &[f32]| weights.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let of = |weights: &[f32]| pack_quantized(DenseRef::F32(&bytes(weights)), 4, 2).unwrap();
        let (codes, scale) = of(&[0.0, 0.3, -0.3, 0.3, -0.0, 0.0, 0.3, -0.3]).unwrap();
        assert_eq!(scale, 0.3);
        let packed = ternary::TernaryRef::new(TernaryLayout::Quarters, &codes, 4, 2).unwrap();
        assert_eq!(ternary::unpack(packed), [0, 1, -1, 1, 0, 0, 1, -1]);
        assert!(of(&[0.0, 0.3, -0.3, 0.3, 0.0, 0.0, 0.3, -0.31]).is_none(), "a fourth value");
        assert!(of(&[0.0; 8]).is_none(), "no scale");
        assert!(of(&[0.0, f32::NAN, 0.3, 0.3, 0.0, 0.0, 0.0, 0.0]).is_none());
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
