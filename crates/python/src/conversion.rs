//! Checkpoints in another format.

use std::path::PathBuf;

use pyo3::prelude::*;
use ternion::{
    Error,
    formats::{self, Checkpoint, convert::Options},
};

use crate::{
    errors::exception,
    operation::Operation,
    source::{self, Need},
};

/// Writes the checkpoint at `path` to `out` in the format with this name.
#[pyfunction]
pub(crate) fn convert(
    path: PathBuf,
    out: PathBuf,
    format: &str,
    overwrite: bool,
    py: Python<'_>,
) -> PyResult<Operation> {
    let mut options = Options::new(format.parse().map_err(|error| exception(py, &error))?);
    options.overwrite = overwrite;
    let work = async move {
        let path = source::local(path, Need::Model).await?;
        let convert = move || {
            let checkpoint = Checkpoint::open(path)?;
            formats::convert::convert(&checkpoint, &out, &options, &mut |_, _| {})
        };
        tokio::task::spawn_blocking(convert)
            .await
            .unwrap_or_else(|e| Err(Error::backend("the conversion panicked").with_source(e)))
    };
    Ok(Operation::new(work, |py, _| Ok(py.None())))
}
