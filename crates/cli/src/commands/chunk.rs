//! `ternion chunk`: where a long text would be cut, without running anything. Reads the tokenizer's files and no weights.

use std::path::Path;

use serde_json::json;
use ternion::text::{Chunk, ChunkKind, ChunkOptions, Tokenizer, chunks};

use super::blocking;
use crate::App;
use crate::args::ChunkArgs;
use crate::failure::{Failure, Outcome};
use crate::input::TextSource;
use crate::model::Selected;

/// Characters of a chunk that are shown.
const SHOWN: usize = 48;

pub(crate) fn run(app: &App, args: &ChunkArgs) -> Outcome {
    let selected = Selected::for_files(app, &args.model)?;
    let (text, begin) = TextSource::new(None, Some(&args.file)).read_from("text")?;
    if text.is_empty() {
        return Err(Failure::usage(format!(
            "{}: is empty; at least one character expected",
            args.file.display()
        )));
    }
    let tokenizer = Tokenizer::from_parts(selected.facts()?.tokenizer_parts(selected.path()?)?)?;
    let kind = args.kind.unwrap_or_else(|| kind_of(&args.file));
    let options = ChunkOptions::new(args.max_tokens).with_overlap(args.overlap).with_kind(kind);
    let plan = blocking(app, || chunks(&tokenizer, &text, &options))?;
    let tokens: usize = plan.iter().map(|c| c.tokens).sum();
    if app.output.json {
        let rows: Vec<_> = plan.iter().map(|chunk| as_json(chunk, &text, begin)).collect();
        return app.output.object(&json!({
            "bytes": begin + text.len(),
            "kind": kind,
            "max_tokens": args.max_tokens,
            "overlap": args.overlap,
            "tokens": tokens,
            "chunks": rows,
        }));
    }
    app.output.line(&format!(
        "{:>5} {:>10} {:>10} {:>8} {:>8}  begins with",
        "#", "start", "end", "overlap", "tokens"
    ))?;
    for (i, chunk) in plan.iter().enumerate() {
        let Chunk { overlap, tokens, .. } = chunk;
        let (start, end) = (begin + chunk.start, begin + chunk.end);
        app.output.line(&format!(
            "{i:>5} {start:>10} {end:>10} {overlap:>8} {tokens:>8}  {}",
            beginning(chunk.of(&text))
        ))?;
    }
    app.output.notice(&format!(
        "{} bytes in {} chunks of at most {} tokens; {tokens} tokens with overlaps",
        begin + text.len(),
        plan.len(),
        args.max_tokens
    ));
    Ok(())
}

/// Offsets are those in the file, in which the text begins at `begin`.
fn as_json(chunk: &Chunk, text: &str, begin: usize) -> serde_json::Value {
    json!({
        "start": begin + chunk.start,
        "end": begin + chunk.end,
        "overlap": chunk.overlap,
        "tokens": chunk.tokens,
        "beginning": chunk.of(text).chars().take(SHOWN).collect::<String>(),
    })
}

/// The first words, on one line.
fn beginning(text: &str) -> String {
    let words = text.split_whitespace().flat_map(|word| [" ", word]).skip(1).flat_map(str::chars);
    words.take(SHOWN).collect()
}

/// What a file's name says about its text.
pub(crate) fn kind_of(path: &Path) -> ChunkKind {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    match extension.as_str() {
        "md" | "markdown" => ChunkKind::Markdown,
        "c" | "cc" | "cpp" | "cs" | "go" | "h" | "hpp" | "java" | "js" | "jsx" | "kt" | "lua" | "php"
        | "py" | "rb" | "rs" | "scala" | "sh" | "sql" | "swift" | "ts" | "tsx" | "zig" => ChunkKind::Code,
        _ => ChunkKind::Text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_kind_of_text_it_is() {
        assert_eq!(kind_of(Path::new("README.MD")), ChunkKind::Markdown);
        assert_eq!(kind_of(Path::new("a/b.rs")), ChunkKind::Code);
        assert_eq!(kind_of(Path::new("notes.txt")), ChunkKind::Text);
        assert_eq!(kind_of(Path::new("-")), ChunkKind::Text);
    }

    #[test]
    fn a_beginning_is_one_line() {
        assert_eq!(beginning("  one\n\ttwo  "), "one two");
        assert_eq!(beginning(&"天".repeat(100)).chars().count(), SHOWN);
    }
}
