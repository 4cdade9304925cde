//! `ternion logits`: the raw logits at every position, for comparisons with other implementations.

use std::io::{ErrorKind, Write};
use std::path::Path;

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
    let mut selected = Selected::for_engine(app, &args.engine)?;
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
    let header = header(tokens, vocab, bytes.len());
    // Not by the crate `safetensors`, whose temporary file would stay behind when a signal ends the process.
    write_atomically(&app.interrupts, path, |temporary| {
        let mut file = std::fs::File::create(temporary)?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        file.write_all(bytes)?;
        match file.sync_all() {
            // A pipe cannot be synchronised.
            Err(e) if e.kind() == ErrorKind::InvalidInput => Ok(()),
            synced => synced,
        }
    })
}

/// The header of a safetensors file, whose data begins at a multiple of 8 bytes.
fn header(tokens: usize, vocab: usize, bytes: usize) -> String {
    let tensor = serde_json::json!({ "dtype": "F32", "shape": [tokens, vocab], "data_offsets": [0, bytes] });
    let mut header = serde_json::json!({ "logits": tensor }).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    header
}

#[cfg(test)]
mod tests {
    use safetensors::{Dtype, SafeTensors};

    use super::*;

    #[test]
    fn a_reader_of_safetensors_finds_the_logits() {
        for (tokens, vocab) in [(1, 3), (17, 320)] {
            let data = vec![7u8; 4 * tokens * vocab];
            let header = header(tokens, vocab, data.len());
            let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
            let read = SafeTensors::deserialize(&file).unwrap();
            let tensor = read.tensor("logits").unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, &[tokens, vocab][..]));
            assert_eq!((tensor.data(), (8 + header.len()) % 8), (&data[..], 0));
        }
    }
}
