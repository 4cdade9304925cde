//! What is measured: every combination of threads, sequences and tokens of context that is asked for.

use ternion::Limits;

use crate::args_bench::BenchArgs;
use crate::failure::{Failure, Outcome};

/// Depths that a plot shows where none are given: doubled from the first to the last, as far as the context goes.
const SHALLOWEST: usize = 128;
const DEEPEST: usize = 4096;

/// One combination, for one number of threads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Case {
    /// Sequences at the same time.
    pub(super) batch: usize,
    /// Tokens of the prompt of each.
    pub(super) prompt: usize,
    /// Each run has new prompts, whose speed counts, too. Else all runs go on from one that is computed once.
    pub(super) fresh: bool,
}

/// How many threads, in the order in which they are measured; `default` is what the configuration says, or a thread for each physical core.
pub(super) fn thread_counts(args: &BenchArgs, default: usize, cores: usize) -> Vec<usize> {
    let mut counts = args.threads.clone();
    if counts.is_empty() && args.plot.is_some() {
        counts = std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|n| *n < cores).collect();
        counts.push(cores);
    }
    if counts.is_empty() {
        counts.push(default);
    }
    without_repeats(counts)
}

/// The cases for one number of threads, `last` if it is the last of several.
///
/// # Errors
/// For more tokens than the context holds, or more sequences than the backend works on at the same time.
pub(super) fn cases(args: &BenchArgs, limits: &Limits, backend: &str, last: bool) -> Outcome<Vec<Case>> {
    let context = limits.context_length;
    let fits = |tokens: usize| tokens.saturating_add(args.decode) <= context;
    for (option, tokens) in
        [("--prompt", args.prompt)].into_iter().chain(args.depth.iter().map(|d| ("--depth", *d)))
    {
        if !fits(tokens) {
            return Err(Failure::usage(format!(
                "{option} {tokens} and --decode {} are more than the context of {context} tokens; at most {} together expected",
                args.decode, context
            )));
        }
    }
    let most = args.most_sequences();
    if most > limits.max_sequences {
        return Err(Failure::usage(format!(
            "--batch {most}: backend `{backend}` works on {} at the same time; at most that many expected",
            limits.max_sequences
        )));
    }
    let mut depths = args.depth.clone();
    // To compute long prompts with few threads takes long, and tells nothing of the machine's limit.
    if depths.is_empty() && args.plot.is_some() && last {
        let doubled = std::iter::successors(Some(SHALLOWEST), |n| Some(2 * n));
        depths = doubled.take_while(|n| *n <= DEEPEST && fits(*n)).collect();
    }
    // A deeper prompt begins with the one before it, which is in the KV cache then.
    depths.sort_unstable();
    let mut prompts = vec![args.prompt];
    prompts.extend(depths);
    let prompts = without_repeats(prompts);
    let batches = without_repeats(args.batch.iter().map(|n| *n as usize).collect());
    Ok(batches
        .iter()
        .flat_map(|&batch| {
            prompts.iter().map(move |&prompt| Case { batch, prompt, fresh: prompt == args.prompt })
        })
        .collect())
}

fn without_repeats(values: Vec<usize>) -> Vec<usize> {
    let mut found = Vec::new();
    for value in values {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn args(text: &str) -> BenchArgs {
        match Cli::parse_from(format!("ternion bench {text}").split_whitespace()).command {
            Command::Bench(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn found(text: &str, context: usize, last: bool) -> Outcome<Vec<(usize, usize, bool)>> {
        let mut limits = Limits::default();
        (limits.context_length, limits.max_sequences) = (context, 8);
        let cases = cases(&args(text), &limits, "b", last)?;
        Ok(cases.into_iter().map(|case| (case.batch, case.prompt, case.fresh)).collect())
    }

    #[test]
    fn every_combination_is_measured_once() {
        assert_eq!(found("", 4096, true).unwrap(), [(1, 512, true)]);
        assert_eq!(
            found("--depth 100,50,7,50 --batch 1,8,1 --prompt 7", 4096, false).unwrap(),
            [(1, 7, true), (1, 50, false), (1, 100, false), (8, 7, true), (8, 50, false), (8, 100, false)]
        );
        assert_eq!(thread_counts(&args("--threads 2,1,2"), 4, 4), [2, 1]);
        assert_eq!(thread_counts(&args(""), 3, 4), [3]);
    }

    #[test]
    fn a_plot_chooses_what_is_left_open() {
        assert_eq!(thread_counts(&args("--plot p"), 3, 6), [1, 2, 4, 6]);
        assert_eq!(thread_counts(&args("--plot p"), 1, 1), [1]);
        assert_eq!(thread_counts(&args("--plot p --threads 3"), 1, 8), [3]);
        let depths =
            |text: &str, last| found(text, 1024, last).unwrap().iter().map(|case| case.1).collect::<Vec<_>>();
        assert_eq!(depths("--plot p --decode 64", true), [512, 128, 256]);
        assert_eq!(depths("--plot p --decode 64", false), [512]);
        assert_eq!(depths("--plot p --depth 9", false), [512, 9]);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_option() {
        let error = |text: &str| found(text, 600, true).unwrap_err().to_string();
        assert!(error("--prompt 537 --decode 64").contains("--prompt 537"));
        assert!(found("--prompt 536 --decode 64", 600, true).is_ok());
        let deep = error("--prompt 1 --depth 3,18446744073709551615");
        assert!(deep.contains("--depth 18446744073709551615") && deep.contains("600 tokens"), "{deep}");
        let many = error("--batch 2,9");
        assert!(many.contains("--batch 9") && many.contains("`b`") && many.contains("on 8"), "{many}");
    }
}
