//! AdamW with its state in the open, so that a training can be stopped and go on, and the schedule of BitNet b1.58.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::model::Model;

/// Decay of the mean of the gradients, and of that of their squares.
const BETAS: (f32, f32) = (0.9, 0.95);
const EPSILON: f32 = 1e-8;
/// The longest gradient.
const CLIP: f64 = 1.0;
const WARM_UP: usize = 100;

/// The first step of the last part, in which the learning rate falls.
pub(crate) fn cooling(steps: usize) -> usize {
    steps * 3 / 5
}

/// Learning rate and weight decay at `step` of `steps`: a warm-up, a plateau, and a straight way down, on which there is no
/// weight decay, so that trits settle (two stages, as for BitNet b1.58). Up to the way down all is the same for any
/// number of steps: how long to train can be decided late.
pub(crate) fn schedule(step: usize, steps: usize, peak: f64) -> (f64, f64) {
    let warm = ((step + 1) as f64 / WARM_UP as f64).min(1.0);
    let left = (steps - step) as f64 / (steps - cooling(steps)) as f64;
    (peak * warm * left.min(1.0), if left > 1.0 { 0.1 } else { 0.0 })
}

/// Means of the gradients and of their squares, for each parameter.
pub(crate) struct AdamW {
    pub(crate) moments: Vec<(Vec<f32>, Vec<f32>)>,
}

impl AdamW {
    pub(crate) fn new(model: &Model) -> Self {
        let zeros = |p: &super::model::Parameter| vec![0.0; p.value.elem_count()];
        Self { moments: model.parameters.iter().map(|p| (zeros(p), zeros(p))).collect() }
    }

    /// Changes the parameters by their gradients; `step` counts from 0. Returns the length of the gradient.
    pub(crate) fn step(
        &mut self,
        model: &Model,
        gradients: &[Vec<f32>],
        step: usize,
        (rate, decay): (f64, f64),
    ) -> Result<f64> {
        let mut square = 0.0;
        for gradient in gradients {
            let pieces = gradient.par_chunks(4096).map(|g| g.iter().map(|g| f64::from(g * g)).sum());
            square += pieces.collect::<Vec<f64>>().iter().sum::<f64>();
        }
        let length = square.sqrt();
        if !length.is_finite() {
            candle_core::bail!("the gradient is infinite or not a number at step {step}");
        }
        let clip = (CLIP / length.max(CLIP)) as f32;
        let time = step as i32 + 1;
        let corrections = (1.0 - BETAS.0.powi(time), 1.0 - BETAS.1.powi(time));
        for (i, (mean, square)) in self.moments.iter_mut().enumerate() {
            let parameter = &model.parameters[i].value;
            // Norms are not pulled to 0.
            let decay = if parameter.rank() == 1 { 0.0 } else { decay };
            let keep = (1.0 - rate * decay) as f32;
            let mut values = parameter.flatten_all()?.to_vec1::<f32>()?;
            let state = mean.par_chunks_mut(4096).zip(square.par_chunks_mut(4096));
            values.par_chunks_mut(4096).zip(state).zip(gradients[i].par_chunks(4096)).for_each(
                |((values, (mean, square)), g)| {
                    for i in 0..values.len() {
                        let g = g[i] * clip;
                        mean[i] = BETAS.0 * mean[i] + (1.0 - BETAS.0) * g;
                        square[i] = BETAS.1 * square[i] + (1.0 - BETAS.1) * g * g;
                        let denominator = (square[i] / corrections.1).sqrt() + EPSILON;
                        values[i] = values[i] * keep - rate as f32 * mean[i] / corrections.0 / denominator;
                    }
                },
            );
            parameter.set(&Tensor::from_vec(values, parameter.shape(), parameter.device())?)?;
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_warms_up_and_falls_and_the_decay_ends() {
        let at = |step| schedule(step, 1000, 1.0);
        assert_eq!((at(0).0, at(99).0, at(599).0, at(800).0, at(999).0), (0.01, 1.0, 1.0, 0.5, 0.0025));
        assert_eq!((at(599).1, at(601).1), (0.1, 0.0));
        assert!((0..600).all(|step| schedule(step, 1000, 1.0) == schedule(step, 2000, 1.0)));
    }
}
