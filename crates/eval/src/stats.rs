//! The statistics of a report: standard errors as lm-evaluation-harness computes them, intervals, and tests of pairs.

/// The 97.5 % quantile of the normal distribution: both sides of a 95 % interval.
const Z95: f64 = 1.959_963_984_540_054;

/// The mean; `None` of nothing.
pub(crate) fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The standard error of the mean, from the sample's standard deviation; `None` below two values.
pub(crate) fn standard_error(values: &[f64]) -> Option<f64> {
    let n = values.len() as f64;
    let mean = mean(values).filter(|_| values.len() > 1)?;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    Some((variance / n).sqrt())
}

/// The standard error of a mean over groups weighted by their sizes, from each group's standard error and size.
pub(crate) fn pooled_standard_error(groups: &[(f64, usize)]) -> Option<f64> {
    let total: usize = groups.iter().map(|(_, n)| n).sum();
    let freedom = total.checked_sub(groups.len()).filter(|&f| f > 0)? as f64;
    let sum: f64 = groups.iter().map(|&(se, n)| (n as f64 - 1.0) * se * se * n as f64).sum();
    Some((sum / freedom / total as f64).sqrt())
}

/// The standard error of the plain mean of the groups' means.
pub(crate) fn unweighted_standard_error(errors: &[f64]) -> Option<f64> {
    (!errors.is_empty()).then(|| errors.iter().map(|e| e * e).sum::<f64>().sqrt() / errors.len() as f64)
}

/// The 95 % interval of a proportion after Wilson (1927), which holds at 0 and 1 and for few items too.
pub(crate) fn wilson(successes: usize, n: usize) -> Option<(f64, f64)> {
    if n == 0 {
        return None;
    }
    let n = n as f64;
    let p = successes as f64 / n;
    let z2 = Z95 * Z95;
    let center = p + z2 / (2.0 * n);
    let half = Z95 * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    let scale = 1.0 + z2 / n;
    // The ends are exact; what rounding leaves there would look odd.
    let low = if successes == 0 { 0.0 } else { (center - half) / scale };
    let high = if p >= 1.0 { 1.0 } else { (center + half) / scale };
    Some((low, high))
}

/// The 95 % interval around `value` with this standard error.
pub(crate) fn normal_interval(value: f64, standard_error: f64) -> (f64, f64) {
    (value - Z95 * standard_error, value + Z95 * standard_error)
}

/// McNemar's exact test: the probability of at least as uneven a split of the items on which two models differ, if each of
/// the two were as likely to be the one that is right. Two-sided.
pub(crate) fn mcnemar(only_a: usize, only_b: usize) -> f64 {
    let n = only_a + only_b;
    let fewer = only_a.min(only_b);
    let mut log_term = -(n as f64) * std::f64::consts::LN_2;
    let mut tail = 0.0;
    for i in 0..=fewer {
        tail += log_term.exp();
        log_term += ((n - i) as f64 / (i + 1) as f64).ln();
    }
    (2.0 * tail).min(1.0)
}

/// A sum over a sum, such as log-likelihoods over tokens, with the standard error of their ratio over the pairs
/// (linearised; `None` below two pairs).
pub(crate) fn ratio(pairs: &[(f64, f64)]) -> Option<(f64, Option<f64>)> {
    let weight: f64 = pairs.iter().map(|(_, w)| w).sum();
    if weight <= 0.0 {
        return None;
    }
    let value = pairs.iter().map(|(v, _)| v).sum::<f64>() / weight;
    let n = pairs.len() as f64;
    let error = (pairs.len() > 1).then(|| {
        let squares: f64 = pairs.iter().map(|(v, w)| (v - value * w).powi(2)).sum();
        (squares * n / (n - 1.0)).sqrt() / weight
    });
    Some((value, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-9, "{a} is not {b}");
    }

    #[test]
    fn standard_errors_are_of_the_sample() {
        close(standard_error(&[1.0, 0.0, 1.0, 1.0]).unwrap(), 0.25);
        assert!(standard_error(&[1.0]).is_none());
        assert!(mean(&[]).is_none());
        // Groups of one size pool to the root of the mean square over the number of groups.
        close(pooled_standard_error(&[(0.3, 10), (0.4, 10)]).unwrap(), (0.25f64 / 4.0).sqrt());
        close(unweighted_standard_error(&[0.3, 0.4]).unwrap(), 0.25);
        assert!(pooled_standard_error(&[(0.0, 1)]).is_none());
    }

    #[test]
    fn wilson_s_interval_is_the_published_one() {
        let (low, high) = wilson(15, 148).unwrap(); // Newcombe (1998), table I, method 3: 0.0624 to 0.1605
        assert!((low - 0.0624).abs() < 5e-5 && (high - 0.1605).abs() < 5e-5, "{low} {high}");
        let (low, high) = wilson(0, 20).unwrap();
        assert!(low == 0.0 && (high - 0.1611).abs() < 5e-5, "{high}");
        assert_eq!(wilson(6, 6).unwrap().1, 1.0);
        assert_eq!(wilson(0, 6).unwrap().0, 0.0);
        assert!(wilson(0, 0).is_none());
    }

    #[test]
    fn mcnemar_s_test_is_the_binomial_one() {
        close(mcnemar(0, 0), 1.0);
        close(mcnemar(5, 5), 1.0);
        close(mcnemar(1, 9), 2.0 * 11.0 / 1024.0);
        close(mcnemar(9, 1), mcnemar(1, 9));
        assert!(mcnemar(0, 3000) < 1e-300);
        assert!(mcnemar(6900, 7100) > 0.05);
    }

    #[test]
    fn a_ratio_of_equal_weights_is_a_mean() {
        let pairs = [(1.0, 1.0), (0.0, 1.0), (1.0, 1.0), (1.0, 1.0)];
        let (value, error) = ratio(&pairs).unwrap();
        close(value, 0.75);
        close(error.unwrap(), 0.25);
        assert!(ratio(&[]).is_none());
    }
}
