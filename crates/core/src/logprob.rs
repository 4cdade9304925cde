//! Log-probabilities of tokens under raw logits.

/// The natural logarithm of the probability of `token` under these logits, summed in f64.
pub fn log_softmax_at(logits: &[f32], token: usize) -> f32 {
    (f64::from(logits[token]) - log_sum_exp(logits)) as f32
}

/// `ln(sum(exp(logits)))` in f64.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let sum: f64 = logits.iter().map(|&l| f64::from((l - max).exp())).sum();
    f64::from(max) + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_softmax_sums_to_one() {
        let logits = [1000.0, 999.0, -5.0];
        let sum: f64 = (0..3).map(|i| f64::from(log_softmax_at(&logits, i)).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
    }
}
