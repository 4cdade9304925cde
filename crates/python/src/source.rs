//! Where files are: paths of this machine as they are, models of the Hugging Face Hub in the cache, after they were downloaded.

use std::path::{Path, PathBuf};

use pyo3::prelude::*;
use ternion::{
    Result,
    hub::{Address, Hub},
    registry::Progress,
};

/// What of a model is needed.
#[derive(Clone, Copy)]
pub(crate) enum Need {
    Model,
    Tokenizer,
}

/// A path of this machine, after what is needed was downloaded.
///
/// # Errors
/// Those of the download.
pub(crate) async fn local(path: PathBuf, need: Need) -> Result<PathBuf> {
    let Some(address) = Address::of_path(&path)? else { return Ok(path) };
    let (hub, progress) = (Hub::from_env()?, Progress::none());
    match need {
        Need::Model => hub.resolve(&address, &progress).await,
        Need::Tokenizer => hub.resolve_tokenizer(&address, &progress).await,
    }
}

/// Where a model is on this machine, without the network; `None` for a model of the hub that is not in the cache.
#[pyfunction]
pub(crate) fn local_path(path: PathBuf) -> Option<PathBuf> {
    let cached = |path: &Path| Hub::from_env()?.cached(&path.display().to_string().parse()?);
    if Address::is_one(&path) { cached(&path).ok() } else { Some(path) }
}
