//! The options of `ternion conformance`.

use std::path::PathBuf;

use clap::Args;
use ternion_conformance::compare::Tolerances;

#[derive(Debug, Args)]
pub(crate) struct ConformanceArgs {
    /// A checkpoint or a configuration, as for the other commands. The first is the reference that the others are compared with.
    #[arg(short, long = "model", visible_alias = "config", value_name = "PATH", help_heading = "Model")]
    pub(crate) models: Vec<PathBuf>,
    /// A model of the configuration, if only one configuration is named; the first is the reference.
    #[arg(long = "name", value_name = "NAME", help_heading = "Model")]
    pub(crate) names: Vec<String>,
    /// Compare the perplexity of this text, too.
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// The most positions to compare logits at.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) positions: usize,
    /// Tokens of each greedy answer.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) answer_tokens: usize,
    /// Write a page with the results and plots of each position.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) tolerances: ToleranceArgs,
}

/// What may differ. The defaults are nothing where the arithmetic is the same (candle and the fast operators of ONNX; an
/// engine and itself), else what the rounding of float sums does to int8 activations.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Tolerances")]
pub(crate) struct ToleranceArgs {
    /// The largest difference of a logit. Default: 0, or 0.5.
    #[arg(long, value_name = "X")]
    max_logit: Option<f32>,
    /// The mean difference of logits. Default: 0 or 0.02.
    #[arg(long, value_name = "X")]
    mean_logit: Option<f64>,
    /// The mean Kullback-Leibler divergence. Default: 0 or 0.001.
    #[arg(long, value_name = "NATS")]
    mean_kl: Option<f64>,
    /// The least fraction of positions with the same best token. Default: 1 or 0.95.
    #[arg(long, value_name = "FRACTION")]
    min_top1: Option<f64>,
    /// The least fraction of the same best five tokens. Default: 1 or 0.95.
    #[arg(long, value_name = "FRACTION")]
    min_top5: Option<f64>,
    /// How much less probable than the reference's a token may be with which a greedy answer parts. Default: 0 or 0.25.
    #[arg(long, value_name = "X")]
    greedy_gap: Option<f32>,
    /// The relative difference of perplexities. Default: 0 or 0.002.
    #[arg(long, value_name = "X")]
    perplexity: Option<f64>,
}

impl ToleranceArgs {
    /// `base`, with what the command line says.
    pub(crate) fn over(&self, base: Tolerances) -> Tolerances {
        let mut all = base;
        all.max_logit = self.max_logit.unwrap_or(base.max_logit);
        all.mean_logit = self.mean_logit.unwrap_or(base.mean_logit);
        all.mean_kl = self.mean_kl.unwrap_or(base.mean_kl);
        all.min_top1 = self.min_top1.unwrap_or(base.min_top1);
        all.min_top5 = self.min_top5.unwrap_or(base.min_top5);
        all.greedy_gap = self.greedy_gap.unwrap_or(base.greedy_gap);
        all.perplexity = self.perplexity.unwrap_or(base.perplexity);
        all
    }
}
