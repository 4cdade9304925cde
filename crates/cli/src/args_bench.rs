//! The options of `ternion bench`.

use std::path::PathBuf;

use clap::Args;
use ternion::config::{ByteSize, PinThreads};

use crate::args::{EngineArgs, ModelArgs, at_least_one};

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Tokens of prompt.
    #[arg(long, value_name = "N", default_value = "512", value_parser = at_least_one)]
    pub(crate) prompt: usize,
    /// Tokens to generate.
    #[arg(long, value_name = "N", default_value = "64", value_parser = at_least_one)]
    pub(crate) decode: usize,
    /// Measure decoding after so many tokens of context, too. Several with commas between them.
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = at_least_one)]
    pub(crate) depth: Vec<usize>,
    /// Sequences at the same time, each with a prompt of its own; speeds are those of all together. Several with commas.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) batch: Vec<u32>,
    /// How often each is measured.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) repeat: u32,
    /// Runs of each before those that count.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub(crate) warm_up: u32,
    /// How much memory is read to measure its bandwidth, in MiB; 0 leaves that out.
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(0..=65536))]
    pub(crate) buffer: u64,
    /// Write the result to a file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) save: Option<PathBuf>,
    /// Draw speed by depth, by threads and by sequences, with the limit of the machine's memory (SVG). Depths and threads that
    /// are not given are chosen.
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
    /// Measure nothing; compare two results that --save has written.
    #[arg(long, value_names = ["OLD", "NEW"], num_args = 2, conflicts_with_all = [
        "prompt", "decode", "depth", "batch", "repeat", "warm_up", "buffer", "save", "plot", "model", "name", "backend",
        "threads", "pin_threads", "context", "memory_limit", "no_mmap",
    ])]
    pub(crate) compare: Option<Vec<PathBuf>>,

    #[command(flatten)]
    model: ModelArgs,
    /// The engine.
    #[arg(long, help_heading = "Model")]
    backend: Option<String>,
    /// Threads to compute with. Several with commas: the model is loaded for each. Default: one for each physical core.
    #[arg(long, value_name = "N", value_delimiter = ',', help_heading = "Model", value_parser = at_least_one)]
    pub(crate) threads: Vec<usize>,
    /// Keep each thread on a physical core of its own, or on these CPUs, such as 0-7.
    #[arg(
        long,
        value_name = "CPUS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Model"
    )]
    pin_threads: Option<PinThreads>,
    /// Tokens that prompt and answer may have together.
    #[arg(long = "context-length", alias = "context", value_name = "TOKENS", help_heading = "Model")]
    context: Option<usize>,
    /// The most memory to take, such as 400MB or 1GiB. What is left open is chosen to keep it.
    #[arg(long, value_name = "SIZE", help_heading = "Model")]
    memory_limit: Option<ByteSize>,
    /// Read weights into memory instead of mapping their files.
    #[arg(long, help_heading = "Model")]
    no_mmap: bool,
}

impl BenchArgs {
    /// Which model on which engine; the threads are set for each load.
    pub(crate) fn engine(&self) -> EngineArgs {
        EngineArgs {
            model: self.model.clone(),
            backend: self.backend.clone(),
            threads: None,
            pin_threads: self.pin_threads.clone(),
            context: self.context,
            memory_limit: self.memory_limit,
            no_mmap: self.no_mmap,
        }
    }

    /// The most sequences at the same time.
    pub(crate) fn most_sequences(&self) -> usize {
        self.batch.iter().max().map_or(1, |most| *most as usize)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn parse(args: &str) -> Result<BenchArgs, clap::Error> {
        let args = format!("ternion bench {args}");
        Cli::try_parse_from(args.split_whitespace()).map(|cli| match cli.command {
            Command::Bench(args) => args,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn lists_have_commas_and_the_plain_command_has_one_point() {
        let plain = parse("").unwrap();
        assert_eq!((plain.prompt, plain.decode, plain.repeat, plain.warm_up), (512, 64, 3, 1));
        assert_eq!((plain.batch.as_slice(), plain.depth.len(), plain.threads.len()), (&[1][..], 0, 0));
        let many = parse("--threads 1,2 --batch 1,8,2 --depth 16,32").unwrap();
        assert_eq!((many.threads, many.depth), (vec![1, 2], vec![16, 32]));
        assert_eq!(parse("--batch 1,8,2").unwrap().most_sequences(), 8);
        for wrong in ["--threads 0", "--threads 1,,2", "--batch 0", "--batch 5000", "--depth x", "--prompt 0"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_comparison_takes_two_files_and_no_other_option() {
        let files = parse("--compare a b --json").unwrap().compare.unwrap();
        assert_eq!(files, [PathBuf::from("a"), PathBuf::from("b")]);
        for wrong in ["--compare a", "--compare a b --decode 3", "--compare a b --model m", "--compare a b c"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
