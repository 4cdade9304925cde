//! JSON lines: an object on each line.

use std::path::Path;

use serde_json::{Map, Value};
use ternion_core::{Error, Result};

use super::{Row, read_text};

/// The rows of the file; lines of white space are passed over.
pub(crate) fn read(path: &Path) -> Result<Vec<Row>> {
    let text = read_text(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| {
            let fields: Map<String, Value> = serde_json::from_str(line).map_err(|e| {
                Error::invalid_request("a line that is no JSON object")
                    .with("file", path.display())
                    .with("row", i + 1)
                    .with_source(e)
            })?;
            Ok(Row::new(fields, path, i + 1))
        })
        .collect()
}
