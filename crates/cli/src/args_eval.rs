//! The options of `ternion eval`, and the one or two models that they name.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use ternion::config::ByteSize;
use ternion_eval::{Kind, Settings};

use crate::args::{CheckpointArgs, EngineArgs, ModelArgs, at_least_one};
use crate::failure::{Failure, Outcome};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum EvalTask {
    /// Word problems, of which the answer is generated (test.jsonl and train.jsonl, or the parquet files).
    Gsm8k,
    /// Questions with four choices (test/SUBJECT_test.csv and dev/SUBJECT_dev.csv, or the parquet files).
    Mmlu,
    /// How probable texts are (a .txt file, or a folder of them).
    Perplexity,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// What to measure.
    pub(crate) task: EvalTask,
    /// The data set: its folder, or for gsm8k and perplexity a file.
    #[arg(long, value_name = "PATH")]
    pub(crate) data: PathBuf,
    /// Examples before each question. Default: 5; 8 with --cot.
    #[arg(long, value_name = "N")]
    shots: Option<usize>,
    /// GSM8K with eight fixed examples that reason in words.
    #[arg(long)]
    cot: bool,
    /// Only the first N items; of MMLU of each subject, of texts documents.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    limit: Option<usize>,
    /// Draws the examples of GSM8K.
    #[arg(long, default_value_t = 1234)]
    seed: u64,
    /// Only these subjects of MMLU, with commas between them.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    subjects: Vec<String>,
    /// The most tokens of an answer.
    #[arg(long, value_name = "N", default_value = "256", value_parser = at_least_one)]
    max_tokens: usize,
    /// Put the chat template around prompts, with a turn for each example.
    #[arg(long)]
    apply_chat_template: bool,
    /// Write a record of each item here as it ends, and go on from those that are there. Twice for two models.
    #[arg(long, value_name = "FILE")]
    pub(crate) records: Vec<PathBuf>,
    /// Items at the same time. Default: as many as the model has sequences.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) concurrency: Option<usize>,

    /// A checkpoint or a configuration, as for the other commands. Twice compares two models item by item.
    #[arg(short, long, visible_alias = "config", value_name = "PATH", help_heading = "Model")]
    model: Vec<PathBuf>,
    /// The model's name within the configuration. Twice compares two of them.
    #[arg(long, help_heading = "Model")]
    name: Vec<String>,
    /// The engine. Twice compares the model on two of them.
    #[arg(long, help_heading = "Model")]
    backend: Vec<String>,
    /// Threads to compute with.
    #[arg(long, value_name = "N", help_heading = "Model")]
    threads: Option<usize>,
    /// Tokens that prompt and answer may have together.
    #[arg(long = "context-length", alias = "context", value_name = "TOKENS", help_heading = "Model")]
    context: Option<usize>,
    /// The most memory to take, such as 400MB or 1GiB. What is left open is chosen to keep it.
    #[arg(long, value_name = "SIZE", help_heading = "Model")]
    memory_limit: Option<ByteSize>,
    #[command(flatten)]
    facts: CheckpointArgs,
    /// Read weights into memory instead of mapping their files.
    #[arg(long, help_heading = "Model")]
    no_mmap: bool,
}

impl EvalArgs {
    /// Which task, and how it is set.
    pub(crate) fn task(&self) -> Outcome<(Kind, Settings)> {
        let kind = match (self.task, self.cot) {
            (EvalTask::Gsm8k, false) => Kind::Gsm8k,
            (EvalTask::Gsm8k, true) => Kind::Gsm8kCot,
            (_, true) => return Err(Failure::usage("--cot is an option of gsm8k")),
            (EvalTask::Mmlu, false) => Kind::Mmlu,
            (EvalTask::Perplexity, false) => Kind::Perplexity,
        };
        if kind == Kind::Perplexity && (self.shots.is_some() || self.apply_chat_template) {
            return Err(Failure::usage("--shots and --apply-chat-template are options of gsm8k and mmlu"));
        }
        let settings = Settings {
            shots: self.shots,
            seed: self.seed,
            limit: self.limit,
            subjects: self.subjects.clone(),
            chat: self.apply_chat_template,
            max_tokens: self.max_tokens,
        };
        Ok((kind, settings))
    }

    /// The models to run: one, or two to compare. What is said once goes for both.
    pub(crate) fn models(&self) -> Outcome<Vec<EngineArgs>> {
        let counts = [self.model.len(), self.name.len(), self.backend.len()];
        let count = counts.into_iter().max().unwrap_or_default().max(1);
        if count > 2 {
            return Err(Failure::usage(format!("{count} models are named; one or two expected")));
        }
        if !self.records.is_empty() && self.records.len() != count {
            return Err(Failure::usage(format!(
                "{} files of --records for {count} models; one for each expected",
                self.records.len()
            )));
        }
        let engine = |i: usize| EngineArgs {
            model: ModelArgs {
                model: nth(&self.model, i),
                name: nth(&self.name, i),
                facts: self.facts.clone(),
            },
            backend: nth(&self.backend, i),
            threads: self.threads,
            pin_threads: None,
            context: self.context,
            memory_limit: self.memory_limit,
            no_mmap: self.no_mmap,
        };
        Ok((0..count).map(engine).collect())
    }
}

/// The value for one of two models: its own, or the only one.
fn nth<T: Clone>(values: &[T], index: usize) -> Option<T> {
    values.get(index).or(values.first()).cloned()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn parse(args: &str) -> EvalArgs {
        let args = format!("ternion eval mmlu --data d {args}");
        match Cli::try_parse_from(args.split_whitespace()).unwrap().command {
            Command::Eval(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_said_once_goes_for_both_models() {
        let models = parse("--model a --backend x --config b --threads 3").models().unwrap();
        let found: Vec<_> =
            models.iter().map(|m| (m.model.model.clone().unwrap(), m.backend.clone().unwrap())).collect();
        assert_eq!(found, [("a".into(), "x".to_owned()), ("b".into(), "x".to_owned())]);
        assert_eq!(models[1].threads, Some(3));
        assert_eq!(parse("").models().unwrap().len(), 1);
        assert_eq!(parse("--backend x --backend y").models().unwrap().len(), 2);
    }

    #[test]
    fn more_than_two_models_and_a_record_file_for_two_are_refused() {
        let error = parse("--model a --model b --model c").models().unwrap_err();
        assert!(error.to_string().contains("3 models"), "{error}");
        let error = parse("--model a --model b --records r").models().unwrap_err();
        assert!(error.to_string().contains("one for each"), "{error}");
        assert!(parse("--cot").task().unwrap_err().to_string().contains("gsm8k"));
    }
}
