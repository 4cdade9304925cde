//! A checkpoint in Hugging Face's layout of any architecture: its configuration as it stands, and its tensors by name.
//!
//! [`Checkpoint`](crate::Checkpoint) reads the families that Ternion's own decoder computes. This reads the containers alone,
//! with the same checks, for engines that have graphs of their own and for people who want to see what a file holds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ternion_core::{Result, ResultExt, SamplingDefaults};

use crate::checkpoint::{Access, Means};
use crate::huggingface::{self, CONFIG, CONFIG_CAP, GENERATION};
use crate::json::Object;
use crate::notes::Notes;
use crate::safetensors::RawTensor;
use crate::{CheckpointOptions, DenseTensor, generation};

/// A checkpoint of any architecture.
#[derive(Debug)]
#[non_exhaustive]
pub struct RawCheckpoint {
    /// `config.json`; empty where there is none, as beside an adapter.
    pub config: Object,
    /// `model_type`, by which transformers tells the architecture; empty where it is not said.
    pub architecture: String,
    /// The name of the folder or file that was opened.
    pub name: String,
    /// The folder with the configuration and the tokenizer.
    pub folder: PathBuf,
    /// The files of weights, in order.
    pub files: Vec<PathBuf>,
    /// The sampling that the model's authors ask for.
    pub sampling: SamplingDefaults,
    /// Tokens that end an answer; some may lie outside of the vocabulary.
    pub eos: Vec<u32>,
    /// Facts that no file states, and what they were concluded from.
    pub assumptions: Vec<String>,
    /// Contradictions in the files, and what they ask for that is not done.
    pub warnings: Vec<String>,
    tensors: BTreeMap<String, RawTensor>,
}

impl RawCheckpoint {
    /// Opens a folder, a `.safetensors` file or a `.safetensors.index.json`, with the configuration in the same folder. The
    /// files are mapped.
    ///
    /// # Errors
    /// [`NotFound`](ternion_core::ErrorKind::NotFound) where a file is missing,
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where one is damaged, and
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for another format.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::read(path.as_ref()).with_operation("load")
    }

    fn read(path: &Path) -> Result<Self> {
        let (folder, weights) = huggingface::locate(path)?;
        let file = folder.join(CONFIG);
        let config =
            if file.is_file() { Object::read(&file, CONFIG_CAP)? } else { Object::missing_file(&file) };
        let architecture = config.string("model_type")?.unwrap_or_default().to_owned();
        let (tensors, files) = huggingface::open_weights(&weights, Means::of(Access::Mapped))?;
        let mut notes = Notes::new(&CheckpointOptions::default())?;
        let (sampling, eos) =
            generation::read(&folder.join(GENERATION), CONFIG_CAP, Some(&config), &mut notes)?;
        let eos = match eos {
            Some(eos) => eos,
            None => config.token_ids("eos_token_id")?.unwrap_or_default(),
        };
        let (assumptions, warnings) = notes.finish();
        let name = huggingface::name_of(path, &folder);
        Ok(Self { config, architecture, name, folder, files, sampling, eos, assumptions, warnings, tensors })
    }

    /// The architecture of the checkpoint at `path`, without a look at its weights. `None` where there is none in this layout.
    ///
    /// # Errors
    /// Where `config.json` is damaged.
    pub fn architecture_at(path: impl AsRef<Path>) -> Result<Option<String>> {
        let Ok((folder, _)) = huggingface::locate(path.as_ref()) else { return Ok(None) };
        let file = folder.join(CONFIG);
        if !file.is_file() {
            return Ok(None);
        }
        let config = Object::read(&file, CONFIG_CAP)?;
        Ok(config.string("model_type")?.map(str::to_owned))
    }

    /// The names of all tensors with their shapes, element types and bytes, in the order of the names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], String, u64)> {
        self.tensors.iter().map(|(name, tensor)| {
            (name.as_str(), &*tensor.shape, format!("{:?}", tensor.dtype), tensor.bytes.len() as u64)
        })
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor of floats; `None` where there is none of this name.
    ///
    /// # Errors
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where its elements are no floats.
    pub fn dense(&self, name: &str) -> Result<Option<DenseTensor>> {
        self.tensors.get(name).map(|tensor| tensor.dense(name)).transpose()
    }
}
