//! What `ternion inspect` shows of a GGUF file that Ternion's own reader does not take.

use std::fmt::Write;
use std::path::Path;

use serde_json::json;
use ternion::Error;
use ternion::formats::gguf::{File, Overview};

use super::backends::Backends;
use super::inspect::millions;
use crate::App;
use crate::failure::Outcome;
use crate::output::bytes;

/// Shows the file, and why each engine can or cannot run it. `error` is why Ternion's reader does not take it.
pub(super) fn show(app: &App, path: &Path, error: Option<&Error>, backends: &Backends, all: bool) -> Outcome {
    let file = File::open(path)?.joined()?;
    let overview = Overview::of(&file);
    if app.output.json {
        let mut facts = json!(overview);
        facts["path"] = json!(path.to_string_lossy());
        facts["candle_error"] = json!(error.map(Error::to_string));
        facts["backends"] = backends.json();
        if all {
            let tensors = file.tensors().iter().map(|tensor| {
                json!({"name": tensor.name, "type": tensor.kind.to_string(), "dims": tensor.dims, "bytes": tensor.bytes})
            });
            facts["tensors"] = tensors.collect();
        }
        return app.output.object(&facts);
    }
    app.output.line(as_text(&overview, &file, backends, all).trim_end())
}

fn as_text(overview: &Overview, file: &File, backends: &Backends, all: bool) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let mut row = |key: &str, value: &str| {
        let _ = writeln!(text, "{key:12} {value}");
    };
    let number = |n: Option<u64>| n.map_or_else(|| "?".to_owned(), |n| n.to_string());
    let named = |name: &Option<String>| name.clone().unwrap_or_else(|| "not said".to_owned());
    row("model", &named(&overview.name));
    row("architecture", &named(&overview.architecture));
    let parts = if overview.files > 1 { format!(", {} files", overview.files) } else { String::new() };
    row("format", &format!("GGUF version {}{parts}", overview.version));
    row("parameters", &format!("{} in {}", millions(overview.parameters), bytes(overview.bytes)));
    row(
        "sizes",
        &format!(
            "{} layers, hidden {}, {} heads ({} for keys and values), vocabulary {}",
            number(overview.layers),
            number(overview.hidden_size),
            number(overview.heads),
            number(overview.kv_heads.or(overview.heads)),
            number(overview.vocab_size)
        ),
    );
    row("context", &format!("{} tokens", number(overview.context_length)));
    let pre = overview.pre_tokenizer.as_ref().map(|pre| format!(", pre-tokenizer {pre}")).unwrap_or_default();
    let template = if overview.chat_template { "with a chat template" } else { "no chat template" };
    row("tokenizer", &format!("{}{pre}, {template}", named(&overview.tokenizer)));
    for (key, value) in backends.rows(Some(overview)) {
        row(&key, &value);
    }
    text.push('\n');
    for kind in &overview.types {
        let _ = writeln!(
            text,
            "{:>5} {:8} {:>10} parameters, {:>10}",
            kind.tensors,
            kind.name,
            millions(kind.parameters),
            bytes(kind.bytes)
        );
    }
    text.push('\n');
    let width = overview.metadata.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
    for (key, value) in &overview.metadata {
        let _ = writeln!(text, "{key:width$}  {value}");
    }
    if all {
        text.push('\n');
        let width = file.tensors().iter().map(|tensor| tensor.name.len()).max().unwrap_or(0);
        for tensor in file.tensors() {
            let dims = format!("{:?}", tensor.dims);
            let (name, kind) = (&tensor.name, tensor.kind.to_string());
            let _ = writeln!(text, "{name:width$}  {kind:8} {dims:20} {:>10}", bytes(tensor.bytes));
        }
    }
    text
}
