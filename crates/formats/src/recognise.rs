//! Whether a checkpoint is one that [`Checkpoint`](crate::Checkpoint) reads, judged by its metadata and the table of its tensors.

use std::path::Path;

use ternion_core::Result;

use crate::checkpoint::{Access, Means};
use crate::config::{self, Signs};
use crate::json::Object;
use crate::locate::gguf_file;
use crate::notes::Notes;
use crate::{CheckpointOptions, gguf, huggingface};

/// How the weights of a checkpoint become those that are computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recognised {
    /// They are ternary, or plain floats that are used where they lie.
    AsItLies,
    /// They are dense and quantised, and are decoded to floats when they are loaded.
    Decoded,
}

impl CheckpointOptions {
    /// Whether [`Checkpoint::open`](crate::Checkpoint::open) with these options reads what is at `path`. A file that is recognised may still turn out to
    /// be damaged, or to hold a tensor that has no place.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`](crate::Checkpoint::open) that need no look at the weights.
    pub fn recognise(&self, path: impl AsRef<Path>) -> Result<Recognised> {
        recognise(path.as_ref(), self)
    }
}

fn recognise(path: &Path, options: &CheckpointOptions) -> Result<Recognised> {
    let mut notes = Notes::new(options)?;
    if let Some(file) = gguf_file(path)? {
        return gguf::recognise(&gguf::File::open(file)?.joined()?, &mut notes);
    }
    let (folder, weights) = huggingface::locate(path)?;
    let config = Object::read(&folder.join(huggingface::CONFIG), huggingface::CONFIG_CAP)?;
    let (tensors, _) = huggingface::open_weights(&weights, Means::of(Access::Untouched))?;
    config::read(&config, &Signs::of(&huggingface::with_prefix(tensors)), &mut notes)?;
    Ok(Recognised::AsItLies)
}
