//! `ternion embed`: vectors of texts, one line of JSON for each.

use ternion::{EmbedRequest, InputTruncation};

use super::load;
use crate::App;
use crate::args::EmbedArgs;
use crate::failure::{Failure, Outcome};
use crate::input::TextSource;
use crate::model::Selected;

pub(crate) async fn run(app: &App, args: &EmbedArgs) -> Outcome {
    let texts = texts(args)?;
    let selected = Selected::for_engine(app, &args.engine)?;
    let backend = load(app, &selected).await?;
    let mut request = EmbedRequest::new(texts);
    request.dimensions = args.dimensions;
    if args.truncate {
        request = request.with_truncation(InputTruncation::End);
    }
    request.cancel = app.interrupts.renew();
    let embeddings = backend.embed(request).await?;
    let cut = embeddings.items.iter().filter(|item| item.truncated).count();
    if cut > 0 {
        app.output.notice(&format!("the end of {cut} texts was left out"));
    }
    if app.output.json {
        let info = backend.info();
        let vectors: Vec<&[f32]> = embeddings.items.iter().map(|item| &*item.values).collect();
        return app.output.object(&serde_json::json!({
            "model": info.name,
            "backend": info.backend,
            "embedding": info.embedding,
            "tokens": embeddings.usage.prompt_tokens,
            "embeddings": vectors,
        }));
    }
    for item in &embeddings.items {
        app.output.line(&serde_json::to_string(&item.values).map_err(std::io::Error::from)?)?;
    }
    Ok(())
}

/// The texts of the command line, or the lines of a file or of standard input.
fn texts(args: &EmbedArgs) -> Outcome<Vec<String>> {
    let from_stdin = matches!(&args.texts[..], [only] if only == "-");
    if !args.texts.is_empty() && !from_stdin {
        return Ok(args.texts.clone());
    }
    let source = TextSource::new(from_stdin.then_some("-"), args.file.as_deref());
    let texts: Vec<String> =
        source.read("texts")?.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect();
    if texts.is_empty() {
        return Err(Failure::usage("there is no text; at least one expected"));
    }
    Ok(texts)
}
