//! `ternion convert`: a checkpoint in another format, with the same trits and scales.

use ternion::formats::convert::{self, Options};

use super::blocking;
use crate::App;
use crate::args::ConvertArgs;
use crate::failure::{Failure, Outcome};
use crate::model::Selected;
use crate::output::bytes;

pub(crate) fn run(app: &App, args: &ConvertArgs) -> Outcome {
    let selected = Selected::for_files(app, &args.model())?;
    if selected.is_default {
        return Err(Failure::usage("no model is named to convert; name one with --model"));
    }
    let path = selected.path()?;
    let bar = app.output.bytes("read");
    let result = blocking(app, || {
        let facts = selected.facts()?;
        let checkpoint = convert::open(path, &facts, &mut |done, total| bar.set(done, total))?;
        bar.stage("write");
        let mut options = Options::new(args.to);
        options.embedding = args.embedding;
        options.overwrite = args.force;
        options.lossy = args.lossy;
        let converted = app.interrupts.writing(&args.out, || {
            convert::convert(&checkpoint, &args.out, &options, &mut |done, total| bar.set(done, total))
        })?;
        Ok::<_, Failure>((checkpoint, converted))
    });
    bar.clear();
    let (source, converted) = result?;
    for warning in &source.warnings {
        app.output.notice(&format!("warning: {warning}"));
    }
    if let Some(lost) = converted.lost {
        app.output.notice(&format!("warning: lost: {lost}"));
    }
    let size = size_of(&args.out);
    if app.output.json {
        return app.output.object(&serde_json::json!({
            "source": path.to_string_lossy(),
            "source_format": source.format,
            "out": args.out.to_string_lossy(),
            "format": args.to.to_string(),
            "embedding": args.embedding.map(|embedding| embedding.to_string()),
            "bytes": size,
            "lost": converted.lost.map(|lost| {
                serde_json::json!({"groups": lost.groups, "of": lost.of, "largest": lost.largest})
            }),
        }));
    }
    app.output.notice(&format!(
        "{}: {} from {}, {}",
        args.out.display(),
        args.to,
        source.format,
        bytes(size)
    ));
    Ok(())
}

/// Bytes of a file, or of the files in a folder.
fn size_of(path: &std::path::Path) -> u64 {
    match std::fs::read_dir(path) {
        Ok(entries) => entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|m| m.len()).sum(),
        Err(_) => std::fs::metadata(path).map_or(0, |metadata| metadata.len()),
    }
}
