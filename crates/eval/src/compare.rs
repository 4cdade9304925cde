//! Two models item by item: whether a swap has lost anything.

use std::collections::HashMap;

use serde::Serialize;
use ternion_core::{Error, Result};

use crate::{
    records::{Outcome, Record},
    report::{is_right, own_scores},
    runner::Evaluation,
    stats::{mcnemar, normal_interval, ratio},
    task::Kind,
};

/// The most items that the text lists; JSON has all.
const LISTED: usize = 20;

/// How two models compare on the same items.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Comparison {
    /// The first model: name and backend.
    pub a: String,
    /// The second.
    pub b: String,
    /// Items that both have done.
    pub items: usize,
    /// For each metric of right and wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub agreement: Vec<Agreement>,
    /// The items on which they are not both right or both wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub differing: Vec<Difference>,
    /// For texts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<PairedDifference>,
}

/// The four-fold table of a metric.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Agreement {
    /// The metric.
    pub metric: &'static str,
    /// Items that both have right.
    pub both: usize,
    /// Items that only the first has right.
    pub only_a: usize,
    /// Items that only the second has right.
    pub only_b: usize,
    /// Items that both have wrong.
    pub neither: usize,
    /// McNemar's exact test, two-sided: below 0.05 one of them is better, beyond what chance explains.
    pub p_value: f64,
    /// Items with the very same answer, right or wrong.
    pub same_answer: usize,
}

/// An item on which the two differ.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Difference {
    /// The item.
    pub id: String,
    /// The metric.
    pub metric: &'static str,
    /// The first model's answer.
    pub a: String,
    /// The second's.
    pub b: String,
    /// The right one.
    pub gold: String,
}

/// How much more probable the first model finds the texts.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PairedDifference {
    /// What it is counted by: `token` where both have the same windows, else `byte`.
    pub unit: &'static str,
    /// Windows or texts that are compared.
    pub pairs: usize,
    /// The first model's natural logarithm of the probability of a unit, less the second's: positive means that the first
    /// is better.
    pub difference: f64,
    /// Its standard error over the pairs.
    pub stderr: Option<f64>,
    /// A 95 % interval.
    pub interval: Option<(f64, f64)>,
    /// The first model's perplexity divided by the second's.
    pub perplexity_ratio: f64,
}

impl Comparison {
    /// Compares two runs of one task on the same data.
    ///
    /// # Errors
    /// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) where they are not of one task on the same data, or have no
    /// item in common.
    pub fn new(a: &Evaluation, b: &Evaluation) -> Result<Self> {
        if a.task.name != b.task.name || a.data != b.data {
            return Err(Error::invalid_request("the two runs are not of one task on the same data"));
        }
        let of_b: HashMap<&str, &Record> = b.records.iter().map(|r| (r.id.as_str(), r)).collect();
        let pairs: Vec<(&Record, &Record)> =
            a.records.iter().filter_map(|r| Some((r, *of_b.get(r.id.as_str())?))).collect();
        let metrics: &[&'static str] = match a.task.name {
            Kind::Gsm8k | Kind::Gsm8kCot => &["strict-match", "flexible-extract"],
            Kind::Mmlu => &["acc"],
            Kind::Perplexity => &[],
        };
        let perplexity = if metrics.is_empty() { paired_difference(a, b, &pairs) } else { None };
        if perplexity.is_none() && (pairs.is_empty() || metrics.is_empty()) {
            return Err(Error::invalid_request("the two runs have no item in common to compare"));
        }
        let name = |run: &Evaluation| format!("{} ({})", run.model.name, run.model.backend);
        let mut comparison = Self {
            a: name(a),
            b: name(b),
            items: pairs.len(),
            agreement: Vec::new(),
            differing: Vec::new(),
            perplexity,
        };
        for metric in metrics {
            comparison.add(metric, &pairs);
        }
        Ok(comparison)
    }

    fn add(&mut self, metric: &'static str, pairs: &[(&Record, &Record)]) {
        let mut counts = [0; 4];
        let mut same_answer = 0;
        for (a, b) in pairs {
            let (Some(right_a), Some(right_b)) = (is_right(a, metric), is_right(b, metric)) else { continue };
            counts[usize::from(right_a) * 2 + usize::from(right_b)] += 1;
            let (answer_a, gold) = answer(a, metric);
            let (answer_b, _) = answer(b, metric);
            same_answer += usize::from(answer_a == answer_b);
            if right_a != right_b {
                let id = a.id.clone();
                self.differing.push(Difference { id, metric, a: answer_a, b: answer_b, gold });
            }
        }
        let [neither, only_b, only_a, both] = counts;
        let p_value = mcnemar(only_a, only_b);
        self.agreement.push(Agreement { metric, both, only_a, only_b, neither, p_value, same_answer });
    }

    /// The comparison as lines for a person.
    pub fn text(&self) -> String {
        let mut lines = vec![format!("A: {}", self.a), format!("B: {}", self.b)];
        for part in &self.agreement {
            lines.push(String::new());
            lines.push(format!(
                "{}: {} items, {} with the same answer",
                part.metric, self.items, part.same_answer
            ));
            lines.push(format!(
                "both right {}, only A {}, only B {}, neither {}",
                part.both, part.only_a, part.only_b, part.neither
            ));
            let verdict = if part.p_value < 0.05 { "they differ" } else { "no difference beyond chance" };
            lines.push(format!("McNemar's exact test: p = {:.4}: {verdict}", part.p_value));
        }
        if !self.differing.is_empty() {
            lines.push(String::new());
        }
        for item in self.differing.iter().take(LISTED) {
            lines.push(format!(
                "{} ({}): A {}, B {}, right {}",
                item.id, item.metric, item.a, item.b, item.gold
            ));
        }
        if self.differing.len() > LISTED {
            lines.push(format!("and {} more; --json lists all", self.differing.len() - LISTED));
        }
        lines.extend(self.perplexity.iter().map(PairedDifference::text));
        lines.join("\n")
    }
}

impl PairedDifference {
    fn text(&self) -> String {
        let mut line = format!(
            "\nlog-likelihood for each {}, A less B: {:+.6} over {} pairs",
            self.unit, self.difference, self.pairs
        );
        if let Some((low, high)) = self.interval {
            let verdict = if low > 0.0 {
                "A is better"
            } else if high < 0.0 {
                "B is better"
            } else {
                "no difference beyond chance"
            };
            line += &format!("  (95 %: {low:+.6} to {high:+.6}: {verdict})");
        }
        line + &format!("\nperplexity of A by that of B: {:.6}", self.perplexity_ratio)
    }
}

/// The answer of an item by a metric, and the right one.
fn answer(record: &Record, metric: &str) -> (String, String) {
    match &record.outcome {
        Outcome::Generated { strict, flexible, gold, .. } => {
            (if metric == "strict-match" { strict } else { flexible }.clone(), gold.clone())
        }
        Outcome::Chosen { choice, gold, .. } => {
            let letter = |&i: &usize| char::from(b'A' + i.min(25) as u8).to_string();
            (letter(choice), letter(gold))
        }
        Outcome::Scored { .. } => Default::default(),
    }
}

/// The difference over the same windows; where the models cut the texts otherwise, over whole texts.
fn paired_difference(
    a: &Evaluation,
    b: &Evaluation,
    pairs: &[(&Record, &Record)],
) -> Option<PairedDifference> {
    let mut differences = Vec::new();
    for (a, b) in pairs {
        let (a, b) = (own_scores(std::slice::from_ref(*a)), own_scores(std::slice::from_ref(*b)));
        if let ([(la, ta)], [(lb, tb)]) = (a.as_slice(), b.as_slice())
            && ta == tb
        {
            differences.push((la - lb, *ta));
        }
    }
    let same_windows = differences.len() == pairs.len()
        && a.document_tokens == b.document_tokens
        && a.model.context_length == b.model.context_length
        && a.model.vocab_size == b.model.vocab_size;
    if !same_windows {
        let total = |run: &Evaluation, name: &str| {
            let records: Vec<Record> = run.records.iter().filter(|r| r.group == name).cloned().collect();
            own_scores(&records).iter().map(|(l, _)| l).sum::<f64>()
        };
        let whole = !a.interrupted && !b.interrupted;
        differences = a
            .documents
            .iter()
            .filter(|d| whole && b.documents.contains(d))
            .map(|d| (total(a, &d.name) - total(b, &d.name), d.bytes as f64))
            .collect();
    }
    let (difference, stderr) = ratio(&differences)?;
    Some(PairedDifference {
        unit: if same_windows { "token" } else { "byte" },
        pairs: differences.len(),
        difference,
        stderr,
        interval: stderr.map(|error| normal_interval(difference, error)),
        perplexity_ratio: (-difference).exp(),
    })
}
