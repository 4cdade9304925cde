//! What `ternion inspect` shows of safetensors that Ternion's own reader does not take: a dense model, an adapter, anything.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Value, json};
use ternion::Error;
use ternion::formats::RawCheckpoint;

use super::backends::Backends;
use super::inspect::millions;
use crate::App;
use crate::failure::Outcome;
use crate::output::bytes;

/// Shows the tensors. `error` is why Ternion's reader does not take them.
pub(super) fn show(
    app: &App,
    checkpoint: &RawCheckpoint,
    error: &Error,
    backends: &Backends,
    all: bool,
) -> Outcome {
    // Tensors, elements and bytes of each element type.
    let mut types: BTreeMap<String, (usize, u64, u64)> = BTreeMap::new();
    for (_, shape, dtype, bytes) in checkpoint.tensors() {
        let of_type = types.entry(dtype).or_default();
        of_type.0 += 1;
        of_type.1 += shape.iter().product::<usize>() as u64;
        of_type.2 += bytes;
    }
    let total = |of: fn(&(usize, u64, u64)) -> u64| types.values().map(of).sum::<u64>();
    let (parameters, size) = (total(|of_type| of_type.1), total(|of_type| of_type.2));
    let files = || checkpoint.files.iter().map(|file| file.to_string_lossy());
    if app.output.json {
        let tensors = checkpoint.tensors().map(|(name, shape, dtype, bytes)| {
            json!({"name": name, "type": dtype, "shape": shape, "bytes": bytes})
        });
        let types = types.iter().map(|(name, (tensors, parameters, bytes))| {
            json!({"name": name, "tensors": tensors, "parameters": parameters, "bytes": bytes})
        });
        return app.output.object(&json!({
            "name": checkpoint.name,
            "architecture": checkpoint.architecture,
            "format": "safetensors",
            "files": files().collect::<Vec<_>>(),
            "parameters": parameters,
            "bytes": size,
            "eos": checkpoint.eos,
            "sampling": checkpoint.sampling,
            "candle_error": error.to_string(),
            "backends": backends.json(),
            "types": types.collect::<Value>(),
            "tensors": all.then(|| tensors.collect::<Value>()),
        }));
    }
    let mut text = String::new();
    // Writing to a string cannot fail.
    let mut row = |key: &str, value: &str| {
        let _ = writeln!(text, "{key:12} {value}");
    };
    let architecture = if checkpoint.architecture.is_empty() { "not said" } else { &checkpoint.architecture };
    row("model", &checkpoint.name);
    row("architecture", architecture);
    row("format", &format!("safetensors, {} files", checkpoint.files.len()));
    row("parameters", &format!("{} in {}", millions(parameters), bytes(size)));
    for (key, value) in backends.rows(None) {
        row(&key, &value);
    }
    text.push('\n');
    for (name, (tensors, parameters, size)) in &types {
        let _ = writeln!(
            text,
            "{tensors:>5} {name:8} {:>10} parameters, {:>10}",
            millions(*parameters),
            bytes(*size)
        );
    }
    if all {
        text.push('\n');
        let width = checkpoint.tensors().map(|(name, ..)| name.len()).max().unwrap_or(0);
        for (name, shape, dtype, size) in checkpoint.tensors() {
            let shape = format!("{shape:?}");
            let _ = writeln!(text, "{name:width$}  {dtype:8} {shape:20} {:>10}", bytes(size));
        }
    }
    app.output.line(text.trim_end())
}
