//! Which differences are allowed, and the verdict on each.

use serde::{Deserialize, Serialize};
use ternion_core::ModelInfo;

use super::{Agreement, Comparison};

/// The largest differences that are allowed. Token ids and rendered prompts must always be equal.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Tolerances {
    /// The largest difference of a logit.
    pub max_logit: f32,
    /// The mean of the absolute differences of logits.
    pub mean_logit: f64,
    /// The mean Kullback-Leibler divergence, in nats.
    pub mean_kl: f64,
    /// The least fraction of positions with the same most probable token.
    pub min_top1: f64,
    /// The least mean fraction of the same five most probable tokens.
    pub min_top5: f64,
    /// Where a greedy answer parts from the reference's, how much more probable the reference may find its own choice: nearly
    /// equal tokens may change places.
    pub greedy_gap: f32,
    /// The relative difference of perplexities.
    pub perplexity: f64,
}

impl Tolerances {
    /// The same arithmetic in the same order: nothing may differ.
    pub const EQUAL: Self = Self {
        max_logit: 0.0,
        mean_logit: 0.0,
        mean_kl: 0.0,
        min_top1: 1.0,
        min_top5: 1.0,
        greedy_gap: 0.0,
        perplexity: 0.0,
    };

    /// The same integers, but float sums in another order. That moves logits by 1e-5 or so, unless it carries an activation over a
    /// rounding boundary of the int8 quantisation: then the logits that follow move by up to 0.3, and tokens whose logits
    /// are closer than that may change places.
    pub const ROUNDING: Self = Self {
        max_logit: 0.5,
        mean_logit: 0.02,
        mean_kl: 1e-3,
        min_top1: 0.95,
        min_top5: 0.95,
        greedy_gap: 0.25,
        perplexity: 2e-3,
    };

    /// What is allowed unless a caller says otherwise:
    ///
    /// | engines | tolerances |
    /// | --- | --- |
    /// | candle, ONNX Runtime with the fast operators, in any pair | [`EQUAL`](Self::EQUAL): the same kernels in the same order |
    /// | one engine twice, in the same form | [`EQUAL`](Self::EQUAL) |
    /// | any other pair, such as llama.cpp or portable ONNX with another | [`ROUNDING`](Self::ROUNDING): attention or norms sum in an order of their own |
    ///
    /// An option that gives up exactness, such as an int8 head, is meant to show as a difference: nothing is allowed for it.
    pub fn for_pair(a: &ModelInfo, b: &ModelInfo) -> Self {
        if arithmetic(a) == arithmetic(b) { Self::EQUAL } else { Self::ROUNDING }
    }
}

/// Whose arithmetic a model is computed with: an engine's and its form's own, or the one that ours share.
fn arithmetic(info: &ModelInfo) -> (&str, &str) {
    match (&*info.backend, &*info.format) {
        ("candle", _) | ("onnx", "onnx (fast)") => ("ternion", ""),
        ("onnx", form) => ("onnx", form),
        (other, _) => (other, ""),
    }
}

/// The verdict on one kind of difference.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// What was compared.
    pub what: &'static str,
    /// What was found.
    pub found: String,
    /// What is allowed.
    pub allowed: String,
    /// Whether it is within that.
    pub passed: bool,
}

impl Comparison {
    /// The verdicts; a part that could not be compared has none.
    pub fn findings(&self, allowed: &Tolerances) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut all_equal = |what, agreement: &Option<Agreement>| {
            if let Some(a) = agreement {
                findings.push(Finding {
                    what,
                    found: describe(a),
                    allowed: "all equal".to_owned(),
                    passed: a.equal == a.total,
                });
            }
        };
        all_equal("token ids", &self.token_ids);
        all_equal("rendered prompts", &self.prompts);
        all_equal("chunk plans", &self.chunk_plans);
        if let Some(logits) = &self.logits {
            findings.push(at_most(
                "largest difference of logits",
                f64::from(logits.max),
                f64::from(allowed.max_logit),
            ));
            findings.push(at_most("mean difference of logits", logits.mean, allowed.mean_logit));
            findings.push(at_most("mean KL divergence", logits.mean_kl, allowed.mean_kl));
            findings.push(at_least("same best token", logits.top1, allowed.min_top1));
            findings.push(at_least("same best five tokens", logits.top5, allowed.min_top5));
        }
        if let Some(greedy) = &self.greedy {
            findings.push(Finding {
                what: "greedy answers",
                found: match greedy.largest_gap {
                    0.0 => describe(&greedy.answers),
                    gap => format!("{}; parted at a gap of {gap:.4}", describe(&greedy.answers)),
                },
                allowed: format!("a gap of {}", allowed.greedy_gap),
                passed: greedy.largest_gap <= allowed.greedy_gap,
            });
        }
        if let Some(p) = &self.perplexity {
            findings.push(Finding {
                what: "perplexity",
                found: format!("{:.4} for {:.4} ({:.2e})", p.model, p.reference, p.relative),
                allowed: format!("{:.0e} relative", allowed.perplexity),
                passed: p.relative <= allowed.perplexity,
            });
        }
        findings
    }
}

fn describe(agreement: &Agreement) -> String {
    let equal = format!("{} of {} equal", agreement.equal, agreement.total);
    match &agreement.first_difference {
        Some(name) => format!("{equal}; first: {name}"),
        None => equal,
    }
}

/// What is no number is never allowed.
fn at_most(what: &'static str, found: f64, allowed: f64) -> Finding {
    Finding {
        what,
        found: format!("{found:.3e}"),
        allowed: format!("at most {allowed}"),
        passed: found <= allowed,
    }
}

fn at_least(what: &'static str, found: f64, allowed: f64) -> Finding {
    Finding {
        what,
        found: format!("{:.2} %", found * 100.0),
        allowed: format!("at least {} %", allowed * 100.0),
        passed: found >= allowed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_arithmetic_must_be_equal() {
        let info = |backend: &str, format: &str| {
            let mut info = ModelInfo::new("m", backend);
            info.format = format.to_owned();
            info
        };
        let pair = |a: (&str, &str), b: (&str, &str)| Tolerances::for_pair(&info(a.0, a.1), &info(b.0, b.1));
        let (candle, gguf) = (("candle", "safetensors (packed 1.58-bit)"), ("candle", "GGUF (I2_S)"));
        let (fast, portable, llama) =
            (("onnx", "onnx (fast)"), ("onnx", "onnx (portable)"), ("llama-cpp", "GGUF (I2_S)"));
        for (a, b) in [(candle, gguf), (candle, fast), (portable, portable), (llama, llama)] {
            assert_eq!(pair(a, b), Tolerances::EQUAL, "{a:?} {b:?}");
        }
        for (a, b) in [(candle, llama), (candle, portable), (fast, portable), (llama, ("remote", ""))] {
            assert_eq!(pair(a, b), Tolerances::ROUNDING, "{a:?} {b:?}");
        }
    }

    #[test]
    fn what_is_no_number_does_not_pass() {
        assert!(!at_most("x", f64::NAN, 1.0).passed);
        assert!(!at_least("x", f64::NAN, 0.0).passed);
        assert!(at_most("x", 0.0, 0.0).passed && at_least("x", 1.0, 1.0).passed);
    }
}
