//! The report of a run: figures with their errors, and a text for people.

use serde::Serialize;

use crate::{
    mmlu::Category,
    records::{Outcome, Record},
    runner::Evaluation,
    stats::{
        mean, normal_interval, pooled_standard_error, ratio, standard_error, unweighted_standard_error,
        wilson,
    },
    task::{Kind, TaskId},
};

/// A share of right answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Metric {
    /// What is measured: `strict-match`, `acc`, a subject.
    pub name: String,
    /// From 0 to 1.
    pub value: f64,
    /// As lm-evaluation-harness computes it; `None` where it cannot be told, as of one item.
    pub stderr: Option<f64>,
    /// A 95 % interval: Wilson's for items, the normal one for a mean of subjects.
    pub interval: Option<(f64, f64)>,
    /// Items.
    pub items: usize,
}

/// How probable the texts are.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Perplexity {
    /// For each word, as lm-evaluation-harness counts words and log-likelihoods.
    pub word_perplexity: f64,
    /// For each byte of UTF-8.
    pub byte_perplexity: f64,
    /// The same in bits.
    pub bits_per_byte: f64,
    /// For each token of the text; those that the tokenizer adds do not count.
    pub token_perplexity: f64,
    /// A 95 % interval of it over the windows; `None` of one window.
    pub token_interval: Option<(f64, f64)>,
    /// The text's tokens that were scored.
    pub tokens: usize,
    /// Words and bytes of unfinished texts are taken in proportion to their tokens.
    pub estimated: bool,
}

/// The figures of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The task and its settings.
    pub task: TaskId,
    /// The model's name.
    pub model: String,
    /// The backend that ran it.
    pub backend: String,
    /// The format of its files.
    pub format: String,
    /// Items that are done.
    pub items: usize,
    /// Items in all.
    pub total: usize,
    /// Not all of them are done.
    pub interrupted: bool,
    /// Items that had to do with fewer examples, because the context holds no more.
    pub fewer_shots: usize,
    /// Items whose prompts lost their beginning as well.
    pub truncated: usize,
    /// The headline figures.
    pub metrics: Vec<Metric>,
    /// MMLU's categories.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub categories: Vec<Metric>,
    /// MMLU's subjects.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub subjects: Vec<Metric>,
    /// For texts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<Perplexity>,
    /// Seconds of this run.
    pub seconds: f64,
}

impl Report {
    /// Sums a run up.
    pub fn new(run: &Evaluation) -> Self {
        let mut report = Self {
            task: run.task.clone(),
            model: run.model.name.clone(),
            backend: run.model.backend.clone(),
            format: run.model.format.clone(),
            items: run.records.len(),
            total: run.total,
            interrupted: run.interrupted,
            fewer_shots: run.records.iter().filter(|r| r.shots < run.task.shots).count(),
            truncated: run.records.iter().filter(|r| r.truncated).count(),
            metrics: Vec::new(),
            categories: Vec::new(),
            subjects: Vec::new(),
            perplexity: None,
            seconds: run.time.as_secs_f64(),
        };
        match run.task.name {
            Kind::Gsm8k | Kind::Gsm8kCot => {
                for name in ["strict-match", "flexible-extract"] {
                    let right: Vec<bool> = run.records.iter().filter_map(|r| is_right(r, name)).collect();
                    report.metrics.extend(share(name, &right));
                }
            }
            Kind::Mmlu => report.add_mmlu(&run.records),
            Kind::Perplexity => {
                report.perplexity = perplexity(run);
            }
        }
        report
    }

    fn add_mmlu(&mut self, records: &[Record]) {
        for part in records.chunk_by(|a, b| a.group == b.group) {
            let right: Vec<bool> = part.iter().filter_map(|r| is_right(r, "acc")).collect();
            self.subjects.extend(share(&part[0].group, &right));
        }
        for category in Category::ALL {
            let part: Vec<&Metric> =
                self.subjects.iter().filter(|s| Category::of(&s.name) == Some(category)).collect();
            self.categories.extend(weighted(category.name(), &part));
        }
        let all: Vec<&Metric> = self.subjects.iter().collect();
        self.metrics.extend(weighted("acc", &all));
        let values: Vec<f64> = self.subjects.iter().map(|s| s.value).collect();
        if let Some(value) = mean(&values) {
            let errors: Option<Vec<f64>> = self.subjects.iter().map(|s| s.stderr).collect();
            let stderr = errors.and_then(|e| unweighted_standard_error(&e));
            let interval = stderr.map(|e| normal_interval(value, e)).map(|(a, b)| (a.max(0.0), b.min(1.0)));
            let name = "acc, mean of subjects".to_owned();
            self.metrics.push(Metric { name, value, stderr, interval, items: self.items });
        }
    }

    /// The report as lines for a person.
    pub fn text(&self) -> String {
        let shots = match self.task.name {
            Kind::Perplexity => String::new(),
            _ => {
                format!(", {} shots{}", self.task.shots, if self.task.chat { ", chat template" } else { "" })
            }
        };
        let mut lines = vec![format!(
            "{}{shots}: {} ({}, {})",
            self.task.name.name(),
            self.model,
            self.backend,
            self.format
        )];
        if self.interrupted {
            lines.push(format!("interrupted: {} of {} items", self.items, self.total));
        } else {
            lines.push(format!("{} items in {:.1} s", self.items, self.seconds));
        }
        if self.fewer_shots > 0 {
            lines.push(format!("{} items had fewer shots: the context holds no more", self.fewer_shots));
        }
        if self.truncated > 0 {
            lines.push(format!("{} prompts lost their beginning: the context is too short", self.truncated));
        }
        let width = [&self.metrics, &self.categories, &self.subjects]
            .into_iter()
            .flatten()
            .map(|m| m.name.len())
            .max()
            .unwrap_or_default();
        for part in [&self.metrics, &self.categories, &self.subjects] {
            if !part.is_empty() {
                lines.push(String::new());
                lines.extend(part.iter().map(|metric| metric.text(width)));
            }
        }
        lines.extend(self.perplexity.iter().map(Perplexity::text));
        lines.join("\n")
    }
}

impl Metric {
    fn text(&self, width: usize) -> String {
        let mut line = format!("{:width$}  {:6.2} %", self.name, 100.0 * self.value);
        if let Some(stderr) = self.stderr {
            line += &format!(" ± {:.2}", 100.0 * stderr);
        }
        if let Some((low, high)) = self.interval {
            line += &format!("  (95 %: {:.1} to {:.1})", 100.0 * low, 100.0 * high);
        }
        line + &format!("  {} items", self.items)
    }
}

impl Perplexity {
    fn text(&self) -> String {
        let mut token = format!("token perplexity  {:.4}", self.token_perplexity);
        if let Some((low, high)) = self.token_interval {
            token += &format!("  (95 %: {low:.4} to {high:.4})");
        }
        let note = if self.estimated { "  (estimated: the texts are not finished)" } else { "" };
        format!(
            "\n{token}  {} tokens\nword perplexity   {:.4}{note}\nbyte perplexity   {:.4}{note}\n\
             bits per byte     {:.4}{note}",
            self.tokens, self.word_perplexity, self.byte_perplexity, self.bits_per_byte
        )
    }
}

/// Whether the item is right by this metric; `None` for items that are not right or wrong.
pub(crate) fn is_right(record: &Record, metric: &str) -> Option<bool> {
    match &record.outcome {
        Outcome::Generated { strict_match, flexible_match, .. } => {
            Some(if metric == "strict-match" { *strict_match } else { *flexible_match })
        }
        Outcome::Chosen { choice, gold, .. } => Some(choice == gold),
        Outcome::Scored { .. } => None,
    }
}

fn share(name: &str, right: &[bool]) -> Option<Metric> {
    let values: Vec<f64> = right.iter().map(|&r| f64::from(u8::from(r))).collect();
    let count = right.iter().filter(|&&r| r).count();
    Some(Metric {
        name: name.to_owned(),
        value: mean(&values)?,
        stderr: standard_error(&values),
        interval: wilson(count, right.len()),
        items: right.len(),
    })
}

/// The mean over subjects, each as heavy as it has items.
fn weighted(name: &str, parts: &[&Metric]) -> Option<Metric> {
    let items: usize = parts.iter().map(|p| p.items).sum();
    let right: f64 = parts.iter().map(|p| p.value * p.items as f64).sum();
    let errors: Option<Vec<(f64, usize)>> = parts.iter().map(|p| p.stderr.map(|e| (e, p.items))).collect();
    (items > 0).then(|| Metric {
        name: name.to_owned(),
        value: right / items as f64,
        stderr: errors.and_then(|e| pooled_standard_error(&e)),
        interval: wilson(right.round() as usize, items),
        items,
    })
}

/// Log-likelihood and number of the text's own tokens of each window.
pub(crate) fn own_scores(records: &[Record]) -> Vec<(f64, f64)> {
    let own = |record: &Record| match &record.outcome {
        Outcome::Scored { tokens, loglikelihood, added_tokens, added_loglikelihood } => {
            Some((loglikelihood - added_loglikelihood, tokens.saturating_sub(*added_tokens) as f64))
        }
        Outcome::Generated { .. } | Outcome::Chosen { .. } => None,
    };
    records.iter().filter_map(own).collect()
}

fn perplexity(run: &Evaluation) -> Option<Perplexity> {
    let (mut total, mut words, mut bytes) = (0.0, 0.0, 0.0);
    let mut estimated = false;
    for (document, &tokens) in run.documents.iter().zip(&run.document_tokens) {
        let records: Vec<Record> = run.records.iter().filter(|r| r.group == document.name).cloned().collect();
        for record in &records {
            if let Outcome::Scored { loglikelihood, .. } = &record.outcome {
                total += loglikelihood;
            }
        }
        let done: f64 = own_scores(&records).iter().map(|(_, tokens)| tokens).sum();
        let share = if tokens > 0 { done / tokens as f64 } else { 1.0 };
        estimated |= share < 1.0;
        words += share * document.words as f64;
        bytes += share * document.bytes as f64;
    }
    let scores = own_scores(&run.records);
    let (per_token, error) = ratio(&scores)?;
    let interval = error.map(|error| normal_interval(per_token, error));
    Some(Perplexity {
        word_perplexity: (-total / words).exp(),
        byte_perplexity: (-total / bytes).exp(),
        bits_per_byte: -total / bytes / std::f64::consts::LN_2,
        token_perplexity: (-per_token).exp(),
        token_interval: interval.map(|(low, high)| ((-high).exp(), (-low).exp())),
        tokens: scores.iter().map(|(_, tokens)| *tokens as usize).sum(),
        estimated,
    })
}
