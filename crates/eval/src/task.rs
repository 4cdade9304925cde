//! A task: a data set with the prompts that are made of it and what is expected of the answers.

use std::{fmt::Write, path::Path};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use ternion_core::{Error, ErrorKind, Result, ResultExt};

use crate::{gsm8k, mmlu, model::Model, perplexity, prompt::FewShot};

/// Which task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Grade-school mathematics: the answer is generated, and its last number counts.
    Gsm8k,
    /// The same with eight fixed examples that reason in words (Wei et al. 2022).
    Gsm8kCot,
    /// Questions of 57 subjects with four choices: the most probable letter counts.
    Mmlu,
    /// How probable the model finds a text.
    Perplexity,
}

impl Kind {
    /// The name that lm-evaluation-harness has for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gsm8k => "gsm8k",
            Self::Gsm8kCot => "gsm8k_cot",
            Self::Mmlu => "mmlu",
            Self::Perplexity => "perplexity",
        }
    }

    fn default_shots(self) -> usize {
        match self {
            Self::Gsm8k | Self::Mmlu => 5,
            Self::Gsm8kCot => gsm8k::COT_SHOTS,
            Self::Perplexity => 0,
        }
    }
}

/// How a task is set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Examples before the question; `None` takes the task's own number: 5, and 8 with chains of thought.
    pub shots: Option<usize>,
    /// Draws GSM8K's examples; lm-evaluation-harness has 1234.
    pub seed: u64,
    /// The first so many items only; of MMLU of each subject, of texts documents.
    pub limit: Option<usize>,
    /// MMLU's subjects; empty takes all.
    pub subjects: Vec<String>,
    /// Put the chat template around prompts, a turn for each example.
    pub chat: bool,
    /// The most tokens of an answer; lm-evaluation-harness has 256.
    pub max_tokens: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { shots: None, seed: 1234, limit: None, subjects: Vec::new(), chat: false, max_tokens: 256 }
    }
}

/// What of the settings every record depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TaskId {
    /// The task.
    pub name: Kind,
    /// Examples before a question that fits.
    pub shots: usize,
    /// The seed of their draw.
    pub seed: u64,
    /// Whether the chat template is applied.
    pub chat: bool,
    /// The most tokens of an answer.
    pub max_tokens: usize,
}

/// Which data: all of it, before any limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DataId {
    /// Items or documents.
    pub items: usize,
    /// The hash of all texts, the examples' too.
    pub sha256: String,
}

/// Hashes the texts of a data set.
#[derive(Default)]
pub(crate) struct DataHash(Sha256);

impl DataHash {
    pub(crate) fn text(&mut self, text: &str) {
        self.0.update((text.len() as u64).to_le_bytes());
        self.0.update(text);
    }

    pub(crate) fn finish(self, items: usize) -> DataId {
        let sha256 = self.0.finalize().iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}"); // a String takes everything
            hex
        });
        DataId { items, sha256 }
    }
}

/// One thing to ask the model.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Item {
    /// Its name within the data set: `gsm8k/7`, `anatomy/12`, `wiki.txt/3`.
    pub id: String,
    /// The subject or document; for GSM8K the task.
    pub group: String,
    /// What to do.
    pub work: Work,
}

/// What is to be done for an item.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Work {
    /// Generate an answer.
    Generate {
        /// What to continue.
        prompt: FewShot,
        /// The right answer as the data set has it.
        gold: String,
        /// Chain of thought: other stop strings, and another form of the answer.
        cot: bool,
    },
    /// Choose one of A, B, C and D.
    Choose {
        /// What stands before the letter.
        prompt: FewShot,
        /// The index of the right one.
        gold: usize,
    },
    /// Score a window of a text.
    Score {
        /// What to feed, and the last token that is scored.
        tokens: Vec<u32>,
        /// The first scored token.
        start: usize,
        /// How many of the scored tokens the tokenizer has added to the text.
        added: usize,
    },
}

/// A text of the perplexity task.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Document {
    /// Its file's name.
    pub name: String,
    /// Pieces between runs of white space, as lm-evaluation-harness counts words.
    pub words: usize,
    /// Bytes of UTF-8.
    pub bytes: usize,
}

/// A data set that has been read, with its settings.
#[derive(Debug)]
pub struct Task {
    pub(crate) id: TaskId,
    pub(crate) data: DataId,
    pub(crate) documents: Vec<Document>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Items(Vec<Item>),
    Texts(Vec<String>),
}

impl Task {
    /// Reads the data set at `path`: a folder as it is distributed, or a file of it.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) and [`Io`](ErrorKind::Io) where files are missing or unreadable,
    /// [`InvalidRequest`](ErrorKind::InvalidRequest) naming file and row where one is not what the task needs, and for
    /// settings that do not fit the data.
    pub fn open(kind: Kind, path: &Path, settings: &Settings) -> Result<Self> {
        Self::read(kind, path, settings).with_operation(kind.name())
    }

    fn read(kind: Kind, path: &Path, settings: &Settings) -> Result<Self> {
        if !path.exists() {
            return Err(
                Error::new(ErrorKind::NotFound, "no such file or folder").with("path", path.display())
            );
        }
        if !settings.subjects.is_empty() && kind != Kind::Mmlu {
            return Err(Error::invalid_request("only mmlu has subjects"));
        }
        if settings.max_tokens == 0 || settings.limit == Some(0) {
            return Err(Error::invalid_request("max_tokens and limit: at least 1 expected"));
        }
        let id = TaskId {
            name: kind,
            shots: settings.shots.unwrap_or(kind.default_shots()),
            seed: settings.seed,
            chat: settings.chat,
            max_tokens: settings.max_tokens,
        };
        let mut documents = Vec::new();
        let (source, data) = match kind {
            Kind::Gsm8k | Kind::Gsm8kCot => {
                let (mut items, data) = gsm8k::read(path, &id)?;
                items.truncate(settings.limit.unwrap_or(usize::MAX));
                (Source::Items(items), data)
            }
            Kind::Mmlu => {
                let (items, data) = mmlu::read(path, &id, &settings.subjects, settings.limit)?;
                (Source::Items(items), data)
            }
            Kind::Perplexity => {
                let (found, mut texts, data) = perplexity::read(path)?;
                texts.truncate(settings.limit.unwrap_or(usize::MAX));
                documents = found;
                documents.truncate(texts.len());
                (Source::Texts(texts), data)
            }
        };
        Ok(Self { id, data, documents, source })
    }

    /// What of the settings the results depend on.
    pub fn id(&self) -> &TaskId {
        &self.id
    }

    /// The items in their order. For perplexity they are windows as long as the model's context.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) where the model cannot do what the task needs, and those of its tokenizer.
    pub fn items(&self, model: &Model) -> Result<Vec<Item>> {
        if self.id.name != Kind::Gsm8k && self.id.name != Kind::Gsm8kCot {
            model.scoring(self.id.name.name())?;
        }
        match &self.source {
            Source::Items(items) => Ok(items.clone()),
            Source::Texts(texts) => perplexity::items(&self.documents, texts, model),
        }
    }
}
