//! `ternion logits`: the raw logits at every position, for comparisons with other implementations.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use ternion::LogitsRequest;

use super::load;
use crate::App;
use crate::args::LogitsArgs;
use crate::failure::{Failure, Outcome};
use crate::input::{TextSource, write_atomically};
use crate::model::Selected;

pub(crate) async fn run(app: &App, args: &LogitsArgs) -> Outcome {
    let ids = read_ids(&args.ids)?;
    if args.chunk == Some(0) {
        return Err(Failure::usage("--chunk 0 is out of range; at least 1 expected"));
    }
    let mut selected = Selected::for_engine(&args.engine)?;
    let model = selected.model_mut()?;
    model.prefill_chunk = args.chunk.or(model.prefill_chunk);
    let backend = load(app, &selected).await?;

    let tokens = ids.len();
    let mut request = LogitsRequest::new(ids);
    request.cancel = app.interrupts.renew();
    let logits = backend.logits(request).await?;
    let vocab = logits.len() / tokens;
    write(app, &args.out, logits, tokens, vocab)?;
    if app.output.json {
        app.output.object(&serde_json::json!({
            "model": backend.info().name,
            "backend": backend.info().backend,
            "tokens": tokens,
            "vocab_size": vocab,
            "out": args.out.to_string_lossy(),
        }))?;
    } else {
        app.output.notice(&format!("{}: logits of {tokens} tokens x {vocab}", args.out.display()));
    }
    Ok(())
}

fn read_ids(path: &Path) -> Outcome<Vec<u32>> {
    let text = TextSource::new(None, Some(path)).read("token ids")?;
    let ids: Vec<u32> = serde_json::from_str(&text).map_err(|e| {
        Failure::usage(format!(
            "{}: {e}; a JSON array of token ids expected, such as [1, 2, 3]",
            path.display()
        ))
    })?;
    if ids.is_empty() {
        return Err(Failure::usage(format!("{}: no token ids; at least one expected", path.display())));
    }
    Ok(ids)
}

fn write(app: &App, path: &Path, mut logits: Vec<f32>, tokens: usize, vocab: usize) -> Outcome {
    // All rows may be as much as the memory holds once, so they are written from where they are. The file is
    // little-endian; where the machine is as well, nothing changes here.
    for logit in &mut logits {
        *logit = f32::from_bits(logit.to_bits().to_le());
    }
    let bytes: &[u8] = bytemuck::cast_slice(&logits);
    write_atomically(&app.interrupts, path, |temporary| {
        let view = TensorView::new(Dtype::F32, vec![tokens, vocab], bytes)?;
        safetensors::serialize_to_file([("logits", view)], None, temporary)
    })
}
