//! The command line: subcommands and options, with their help texts.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use ternion::Sampling;
use ternion::config::{ByteSize, PinThreads};
use ternion::context::ContextPolicy;
use ternion::formats::convert::{Embedding, Target};
use ternion::formats::{Activation, CheckpointOptions, I2sLayout};
#[cfg(feature = "hub")]
use ternion::hub::KnownModel;
use ternion::text::{ChunkKind, TokenName};

use crate::args_bench::BenchArgs;
#[cfg(feature = "conformance")]
use crate::args_conformance::ConformanceArgs;
use crate::args_constraint::ConstraintArgs;
#[cfg(feature = "eval")]
use crate::args_eval::EvalArgs;
#[cfg(feature = "serve")]
use crate::args_serve::ServeArgs;

/// Chat with, inspect, verify and measure ternary language models on plain CPUs.
#[derive(Debug, Parser)]
#[command(name = "ternion", version, propagate_version = true, arg_required_else_help = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 models differ (`conformance`), 2 wrong usage, 3 bad model or configuration (or `verify` found a \
                        difference), 4 failure at run time, 130 Ctrl-C, 129 \
                        SIGHUP, 143 SIGTERM, 141 nobody reads the output."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answer a message, or hold a conversation on the terminal.
    Chat(ChatArgs),
    /// Continue a text as it is, without a chat template.
    Generate(GenerateArgs),
    /// Count the tokens of a text, with or without the chat template. Loads no weights.
    Count(CountArgs),
    /// Show where a long text would be cut into chunks. Loads no weights.
    Chunk(ChunkArgs),
    /// Show what a checkpoint is, its tensors and what it takes in memory.
    Inspect(InspectArgs),
    /// Compare a model with known file hashes, logits and text (default: BitNet b1.58 2B4T).
    Verify(VerifyArgs),
    /// Compare models that should be the same one: in other formats, on other engines, with other options. With one model, try
    /// whether its backend keeps the contract.
    #[cfg(feature = "conformance")]
    Conformance(ConformanceArgs),
    /// Write the logits at every position of a sequence of tokens.
    Logits(LogitsArgs),
    /// Make vectors of texts, with a model that is made for it.
    Embed(EmbedArgs),
    /// Write a valid checkpoint with random ternary weights, for measurements.
    Synth(SynthArgs),
    /// Write a checkpoint in another format: packed safetensors, or GGUF with I2_S, TQ1_0 or TQ2_0.
    Convert(ConvertArgs),
    /// Measure prefill and decode speed, memory and energy beside the machine's limits, or compare two such results.
    Bench(BenchArgs),
    /// Measure how good the answers are (GSM8K, MMLU, perplexity), of one model or of two in comparison.
    #[cfg(feature = "eval")]
    Eval(EvalArgs),
    /// Serve models by OpenAI's HTTP API, with a page to chat on.
    #[cfg(feature = "serve")]
    Serve(ServeArgs),
    /// Download a model from the Hugging Face Hub, or complete a download, and print where it is.
    #[cfg(feature = "hub")]
    Pull(PullArgs),
    /// List the models in the cache of the Hugging Face Hub, with their sizes.
    #[cfg(feature = "hub")]
    List,
    /// Remove models from the cache of the Hugging Face Hub.
    #[cfg(feature = "hub")]
    Rm(RmArgs),
    /// Print the JSON schema of the configuration.
    Schema,
}

#[cfg(feature = "hub")]
#[derive(Debug, Args)]
#[command(after_help = short_names())]
pub(crate) struct PullArgs {
    /// An address hf://owner/name[@revision][/file-or-folder], or a short name.
    pub(crate) model: String,
}

#[cfg(feature = "hub")]
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Addresses hf://owner/name, or short names. All revisions are removed, those that other programs have downloaded among them.
    #[arg(required = true, value_name = "MODEL")]
    pub(crate) models: Vec<String>,
}

/// The short names of models, for a help text.
#[cfg(feature = "hub")]
fn short_names() -> String {
    let mut text = "Short names:\n".to_owned();
    for known in KnownModel::ALL {
        text += &format!("  {:<17} {} ({})\n", known.name, known.description, known.address);
    }
    text
}

/// What is written, for every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct OutputArgs {
    /// Print one JSON object on standard output instead of text.
    #[arg(long, global = true, help_heading = "Output")]
    pub(crate) json: bool,
    /// Log to standard error; twice for more. RUST_LOG is honoured.
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Output")]
    pub(crate) verbose: u8,
    /// Nothing on standard error but errors.
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Output")]
    pub(crate) quiet: bool,
}

/// Which model.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// A checkpoint's folder or file (.gguf, .safetensors), an address on the hub (hf://owner/name) or a short name (see `pull`), or
    /// a configuration (.toml, .json, .yaml). Default: $TERNION_MODEL, $TERNION_CONFIG, ./ternion.toml, then the small test model
    /// of the source tree.
    #[arg(short, long, visible_alias = "config", value_name = "PATH")]
    pub(crate) model: Option<PathBuf>,
    /// The model's name within the configuration.
    #[arg(long)]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) facts: CheckpointArgs,
}

/// Facts that a checkpoint's files may not state. They win over what the files say.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Checkpoint")]
pub(crate) struct CheckpointArgs {
    /// The activation of the feed-forward network: relu2 or silu. Default: as the files say or tell.
    #[arg(long, value_name = "NAME", value_parser = parse_activation)]
    activation: Option<Activation>,
    /// Whether there are norms before the last projection of attention and feed-forward network: auto, true or false.
    #[arg(long, value_name = "WHETHER", value_parser = parse_sub_norms)]
    sub_norms: Option<SubNorms>,
    /// The base of the rotary embedding's frequencies. Default: as the files say or tell.
    #[arg(long, value_name = "BASE")]
    rope_theta: Option<f32>,
    /// The order of weights in I2_S tensors: x86, arm or x86-4rows, by the build of bitnet.cpp that wrote them. Default: x86.
    #[arg(long, value_name = "LAYOUT", value_parser = parse_i2s_layout)]
    i2s_layout: Option<I2sLayout>,
    /// Whether the tokenizer puts a BOS before a text: true or false. Default: as the files say.
    #[arg(long, value_name = "WHETHER")]
    add_bos: Option<bool>,
    /// The id of the BOS. Default: as the files say.
    #[arg(long, value_name = "ID")]
    bos: Option<u32>,
    /// The rule by which the tokenizer of a GGUF file splits a text: llama-bpe, qwen2 and so on. Default: as the file says.
    #[arg(long, value_name = "NAME")]
    pre_tokenizer: Option<String>,
}

/// `--sub-norms`; `None` is `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SubNorms(Option<bool>);

impl CheckpointArgs {
    /// As options of a checkpoint.
    pub(crate) fn options(&self) -> CheckpointOptions {
        let mut options = CheckpointOptions::default();
        options.activation = self.activation;
        options.sub_norms = self.sub_norms.and_then(|value| value.0);
        options.rope_theta = self.rope_theta;
        options.i2s_layout = self.i2s_layout;
        options.add_bos = self.add_bos;
        options.bos = self.bos;
        options.pre_tokenizer.clone_from(&self.pre_tokenizer);
        options
    }
}

/// How it is run.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct EngineArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// The engine; `auto` is the one that suits the files best.
    #[arg(long)]
    pub(crate) backend: Option<String>,
    /// Threads to compute with.
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Keep each thread on a physical core of its own, or on these CPUs, such as 0-7.
    #[arg(long, value_name = "CPUS", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) pin_threads: Option<PinThreads>,
    /// Tokens that prompt and answer may have together.
    #[arg(long = "context-length", alias = "context", value_name = "TOKENS")]
    pub(crate) context: Option<usize>,
    /// The most memory to take, such as 400MB or 1GiB. What is left open is chosen to keep it.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory_limit: Option<ByteSize>,
    /// Read weights into memory instead of mapping their files.
    #[arg(long)]
    pub(crate) no_mmap: bool,
}

/// How an answer is generated.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Generation")]
pub(crate) struct GenerationArgs {
    /// The most tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub(crate) max_tokens: usize,
    /// 0 takes the most probable token; higher is more varied. Default: the model's own, as for all of these.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Keep the K most probable tokens; 0 keeps all.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Keep the smallest set of tokens whose probabilities sum to P.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Keep tokens at least P times as probable as the best.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Over 1 makes tokens of prompt and answer less likely to come again.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Subtracted once from the logit of each token that the answer has.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Subtracted from a token's logit each time that the answer has it.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Add VALUE to a token's logit; -inf forbids it. May be repeated.
    #[arg(long, value_name = "ID=VALUE", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Draw the same tokens each time.
    #[arg(long)]
    seed: Option<u64>,
    /// End before this text appears; names of special tokens count. May be repeated.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// End with this token, given by its id or its text in the vocabulary. May be repeated.
    #[arg(long, value_name = "TOKEN")]
    pub(crate) stop_token: Vec<TokenName>,
    /// Report the log-probability of each token.
    #[arg(long)]
    pub(crate) logprobs: bool,
}

impl GenerationArgs {
    /// The sampling that was asked for; the rest is the model's own.
    pub(crate) fn sampling(&self) -> Sampling {
        let mut sampling = Sampling::default();
        sampling.temperature = self.temperature;
        sampling.top_k = self.top_k;
        sampling.top_p = self.top_p;
        sampling.min_p = self.min_p;
        sampling.repetition_penalty = self.repetition_penalty;
        sampling.presence_penalty = self.presence_penalty;
        sampling.frequency_penalty = self.frequency_penalty;
        sampling.logit_bias = self.logit_bias.iter().copied().collect();
        sampling.seed = self.seed;
        sampling
    }
}

/// What is done with a model's thoughts.
#[derive(Debug, Clone, Args)]
pub(crate) struct ThinkingArgs {
    /// Show on standard error what the model thinks before it answers.
    #[arg(long)]
    pub(crate) show_reasoning: bool,
    /// The most tokens of thought; 0 answers at once.
    #[arg(long, value_name = "N")]
    pub(crate) reasoning_budget: Option<usize>,
}

/// A policy as the command line names it.
#[derive(Debug, Clone)]
pub(crate) struct PolicyArg {
    policy: ContextPolicy,
    /// The name says which part is dropped, as `truncate-oldest-turns` does and `truncate` does not.
    names_part: bool,
}

impl std::str::FromStr for PolicyArg {
    type Err = ternion::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let names_part = text.replace('_', "-").starts_with("truncate-");
        Ok(Self { policy: text.parse()?, names_part })
    }
}

impl PolicyArg {
    /// This policy, with the options of the configured one if both are of the same kind.
    pub(crate) fn over(&self, configured: &ContextPolicy) -> ContextPolicy {
        match (&self.policy, configured) {
            (ContextPolicy::Truncate(asked), ContextPolicy::Truncate(configured)) => {
                let mut truncate = configured.clone();
                if self.names_part {
                    truncate.drop = asked.drop;
                }
                ContextPolicy::Truncate(truncate)
            }
            (asked, configured) if asked.name() == configured.name() => configured.clone(),
            (asked, _) => asked.clone(),
        }
    }
}

/// A long text, and what is done if it does not fit into the context.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Long inputs")]
pub(crate) struct LongArgs {
    /// A long text that it is about; `-` reads standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// What is done if it does not fit: reject, truncate-oldest-turns, -head, -tail or -middle, sliding, map-reduce or
    /// refine; truncate drops what the configuration says, else the oldest turns. Default: the configuration's, else reject.
    #[arg(long, value_name = "POLICY")]
    pub(crate) policy: Option<PolicyArg>,
    /// The most tokens of a chunk. Default: as many as fit.
    #[arg(long, value_name = "N")]
    pub(crate) chunk_tokens: Option<usize>,
    /// The most tokens that a chunk repeats of the one before.
    #[arg(long, value_name = "N")]
    pub(crate) overlap: Option<usize>,
    /// Where chunks are best cut: text, markdown or code. Default: what the file's name says.
    #[arg(long)]
    pub(crate) kind: Option<ChunkKind>,
}

fn parse_activation(text: &str) -> Result<Activation, String> {
    match text {
        "relu2" => Ok(Activation::Relu2),
        "silu" => Ok(Activation::Silu),
        _ => Err("expected relu2 or silu".to_owned()),
    }
}

fn parse_sub_norms(text: &str) -> Result<SubNorms, String> {
    match text {
        "auto" => Ok(SubNorms(None)),
        "true" => Ok(SubNorms(Some(true))),
        "false" => Ok(SubNorms(Some(false))),
        _ => Err("expected auto, true or false".to_owned()),
    }
}

fn parse_i2s_layout(text: &str) -> Result<I2sLayout, String> {
    let found = I2sLayout::ALL.into_iter().find(|layout| layout.name() == text);
    found.ok_or_else(|| format!("expected one of: {}", I2sLayout::ALL.map(I2sLayout::name).join(", ")))
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let (id, value) = text.split_once('=').ok_or("expected ID=VALUE, such as 42=-1.5")?;
    let id = id.trim().parse().map_err(|_| format!("`{id}` is no token id"))?;
    let value = value.trim().parse().map_err(|_| format!("`{value}` is no number"))?;
    Ok((id, value))
}

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// What to say; `-` reads standard input. Without it: standard input if that is a pipe, else a conversation.
    pub(crate) message: Option<String>,
    /// Instructions that stand before the conversation.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,
    /// Keep the KV cache of prompts in this folder, so that what is asked about the same text later need not compute it again.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) prompt_cache: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) constraint: ConstraintArgs,
    #[command(flatten)]
    pub(crate) long: LongArgs,
    #[command(flatten)]
    pub(crate) thinking: ThinkingArgs,
    #[command(flatten)]
    pub(crate) generation: GenerationArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// The text to continue; special tokens in it count. `-`, or nothing in a pipe, reads standard input.
    #[arg(conflicts_with = "prompt_file")]
    pub(crate) prompt: Option<String>,
    /// Read the text from a file. Line ends and white space stay as they are.
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// Go on past the model's end-of-sequence tokens.
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    #[command(flatten)]
    pub(crate) constraint: ConstraintArgs,
    #[command(flatten)]
    pub(crate) long: LongArgs,
    #[command(flatten)]
    pub(crate) generation: GenerationArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CountArgs {
    /// The text; `-`, or nothing in a pipe, reads standard input.
    #[arg(conflicts_with = "file")]
    pub(crate) text: Option<String>,
    /// Read the text from a file. Line ends and white space stay as they are.
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Count it as a message of a conversation, with all that the chat template adds.
    #[arg(long)]
    pub(crate) chat: bool,
    /// Count a conversation, message by message: a JSON array of objects with `role` and `content`, as `/save` writes it.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["text", "file", "chat", "prompt", "ids"])]
    pub(crate) messages: Option<PathBuf>,
    /// The context that it is to fit into. Default: the configuration's.
    #[arg(long = "context-length", alias = "context", value_name = "TOKENS", requires = "messages")]
    pub(crate) context: Option<usize>,
    /// Tokens of it that are kept free for the answer.
    #[arg(long, value_name = "N", requires = "messages")]
    pub(crate) max_tokens: Option<usize>,
    /// The message's role.
    #[arg(long, default_value = "user", requires = "chat")]
    pub(crate) role: String,
    /// Count it as `generate` takes it: special tokens in it count, and what the tokenizer adds.
    #[arg(long, conflicts_with = "chat")]
    pub(crate) prompt: bool,
    /// Print the token ids as a JSON array instead of their number.
    #[arg(long)]
    pub(crate) ids: bool,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ChunkArgs {
    /// The text; `-` reads standard input.
    pub(crate) file: PathBuf,
    /// The most tokens of a chunk.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub(crate) max_tokens: usize,
    /// The most tokens that a chunk repeats of the one before.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) overlap: usize,
    /// Where it is best cut: text, markdown or code. Default: what the file's name says.
    #[arg(long)]
    pub(crate) kind: Option<ChunkKind>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// List every tensor instead of one line for each type.
    #[arg(long)]
    pub(crate) tensors: bool,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Compare with these expectations (JSON, as crates/cli/data/bitnet-2b4t.json) instead of those of the 2B4T.
    #[arg(long, value_name = "FILE")]
    pub(crate) expect: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

#[derive(Debug, Args)]
pub(crate) struct LogitsArgs {
    /// A JSON array of token ids; `-` reads standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) ids: PathBuf,
    /// The safetensors file to write: `logits`, F32, [tokens, vocabulary].
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Tokens of one prefill chunk.
    #[arg(long, value_name = "N")]
    pub(crate) chunk: Option<usize>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

#[derive(Debug, Args)]
pub(crate) struct EmbedArgs {
    /// The texts; `-`, or nothing in a pipe, reads one text for each line of standard input.
    #[arg(conflicts_with = "file")]
    pub(crate) texts: Vec<String>,
    /// Read one text for each line of a file.
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// The length of the vectors, for models that are trained for shorter ones.
    #[arg(long, value_name = "N")]
    pub(crate) dimensions: Option<usize>,
    /// Leave out the end of a text that is longer than the model takes, rather than refusing it.
    #[arg(long)]
    pub(crate) truncate: bool,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

#[derive(Debug, Args)]
pub(crate) struct SynthArgs {
    /// The shape's name, such as bitnet-2b4t.
    #[arg(long)]
    pub(crate) shape: String,
    /// The folder to write, or the file for GGUF.
    #[arg(long, value_name = "PATH")]
    pub(crate) out: PathBuf,
    /// The format: safetensors, gguf-i2s, gguf-tq1, gguf-tq2, onnx (for any ONNX Runtime) or onnx-fast (our own operators); for
    /// weights with a scale for each group of a row safetensors (as floats), mlx, gguf-q2, gguf-q2-g128, gguf-pq2, gguf-ptq1 or, where
    /// they are binary, gguf-q1.
    #[arg(long, default_value = "safetensors")]
    pub(crate) format: Target,
    /// Chooses the weights.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Replace what is there, if it is a checkpoint.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// The checkpoint: a folder, a .gguf file or a .safetensors file; or an .onnx file that this command has written or whose products
    /// are MatMulNBits with two bits, with config.json and tokenizer beside it. The same as --model.
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    source: Option<PathBuf>,
    /// The format: safetensors, gguf-i2s, gguf-tq1, gguf-tq2, onnx (for any ONNX Runtime) or onnx-fast (our own operators); for
    /// weights with a scale for each group of a row safetensors (as floats), mlx, gguf-q2, gguf-q2-g128, gguf-pq2, gguf-ptq1 or, where
    /// they are binary, gguf-q1.
    #[arg(long, value_name = "FORMAT")]
    pub(crate) to: Target,
    /// The folder to write, or the file for GGUF.
    #[arg(long, value_name = "PATH")]
    pub(crate) out: PathBuf,
    /// The type of the embedding: f16, bf16, f32, for GGUF also q8_0 and q6_k, for onnx q8_0 alone. Default: the source's.
    #[arg(long, value_name = "TYPE")]
    pub(crate) embedding: Option<Embedding>,
    /// Round scales of groups that the format cannot hold, such as two of 128 in one of 256, and say what is lost.
    #[arg(long)]
    pub(crate) lossy: bool,
    /// Replace what is there, if it is a file (for GGUF) or a checkpoint's folder.
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    model: ModelArgs,
}

impl ConvertArgs {
    /// The model, named in either way.
    pub(crate) fn model(&self) -> ModelArgs {
        ModelArgs { model: self.source.clone().or_else(|| self.model.model.clone()), ..self.model.clone() }
    }
}

/// A count of which there must be one.
pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1 expected".to_owned()),
        Ok(number) => Ok(number),
        Err(e) => Err(format!("{e}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_bias_is_an_id_and_a_number() {
        assert_eq!(parse_bias("42=-1.5"), Ok((42, -1.5)));
        assert_eq!(parse_bias("7=-inf"), Ok((7, f32::NEG_INFINITY)));
        assert!(parse_bias("42").unwrap_err().contains("ID=VALUE"));
        assert!(parse_bias("x=1").unwrap_err().contains("`x`"));
        assert!(parse_bias("1=y").unwrap_err().contains("`y`"));
    }
}
