//! `ternion synth`: a valid checkpoint with random weights in the shape of a real one, for measurements.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use ternion::Error;
use ternion::formats::Checkpoint;
use ternion::formats::convert::{Options, Target, convert};
use ternion::formats::synth::{self, Shape};

use super::blocking;
use crate::App;
use crate::args::SynthArgs;
use crate::failure::{Failure, Outcome};

pub(crate) fn run(app: &App, args: &SynthArgs) -> Outcome {
    let shape = Shape::named(&args.shape)?;
    match state(&args.out)? {
        _ if args.format != Target::Safetensors => write_gguf(app, &shape, args)?,
        State::Free => write(app, &args.out, &shape, args)?,
        // The old one stays until the new one is complete.
        State::Checkpoint if args.force => {
            let (new, old) = (beside(&args.out, "new")?, beside(&args.out, "old")?);
            write(app, &new, &shape, args)?;
            std::fs::rename(&args.out, &old).map_err(|e| Error::io(&args.out, e))?;
            std::fs::rename(&new, &args.out).map_err(|e| Error::io(&args.out, e))?;
            std::fs::remove_dir_all(&old).map_err(|e| Error::io(&old, e))?;
        }
        State::Checkpoint => return Err(taken(&args.out, "holds a checkpoint; --force replaces it")),
        // Not even by force: that could be anybody's folder.
        State::Other => return Err(taken(&args.out, "exists and is no checkpoint; name a new folder")),
    }
    if app.output.json {
        return app.output.object(&serde_json::json!({
            "out": args.out.to_string_lossy(),
            "shape": args.shape,
            "seed": args.seed,
            "format": args.format.to_string(),
        }));
    }
    app.output.notice(&format!("{}: random weights in the shape of {}", args.out.display(), args.shape));
    Ok(())
}

fn write(app: &App, folder: &Path, shape: &Shape, args: &SynthArgs) -> Outcome {
    let bar = app.output.bytes("write");
    let result = blocking(app, || {
        app.interrupts.writing(folder, || {
            synth::write(folder, shape, args.seed, &mut |done, total| bar.set(done, total))
        })
    });
    bar.clear();
    Ok(result?)
}

/// GGUF by way of a folder of safetensors beside it, which is gone afterwards: weights, metadata and tokenizer are then
/// those of any other conversion.
fn write_gguf(app: &App, shape: &Shape, args: &SynthArgs) -> Outcome {
    if args.out.exists() && !(args.force && args.out.is_file()) {
        let why = if args.out.is_file() {
            "exists; --force replaces it"
        } else {
            "exists and is no file; name a new one"
        };
        return Err(taken(&args.out, why));
    }
    let folder = beside(&args.out, "synth")?;
    let through_folder = || {
        write(app, &folder, shape, args)?;
        let bar = app.output.bytes("convert");
        let mut options = Options::new(args.format);
        options.overwrite = args.force;
        let result = blocking(app, || {
            let mut checkpoint = Checkpoint::open(&folder)?;
            checkpoint.name.clone_from(&args.shape);
            app.interrupts.writing(&args.out, || {
                convert(&checkpoint, &args.out, &options, &mut |done, total| bar.set(done, total))
            })
        });
        bar.clear();
        Ok(result?)
    };
    let result = app.interrupts.using(&folder, through_folder);
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
    }
    result
}

fn beside(path: &Path, what: &str) -> Outcome<PathBuf> {
    let mut name = path.file_name().ok_or_else(|| taken(path, "has no name; name a new folder"))?.to_owned();
    name.push(format!(".{what}-{}", std::process::id()));
    Ok(path.with_file_name(name))
}

enum State {
    /// Nothing is there, or an empty folder.
    Free,
    /// A folder with a `config.json` and files alone.
    Checkpoint,
    Other,
}

fn state(path: &Path) -> Outcome<State> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(State::Free),
        Err(e) if e.kind() == ErrorKind::NotADirectory => return Ok(State::Other),
        Err(e) => return Err(Error::io(path, e).into()),
    };
    let (mut empty, mut only_files) = (true, true);
    for entry in entries {
        let kind = entry.and_then(|entry| entry.file_type()).map_err(|e| Error::io(path, e))?;
        empty = false;
        only_files &= !kind.is_dir();
    }
    Ok(match (empty, only_files && path.join("config.json").is_file()) {
        (true, _) => State::Free,
        (false, true) => State::Checkpoint,
        (false, false) => State::Other,
    })
}

fn taken(path: &Path, why: &str) -> Failure {
    Failure::usage(format!("{}: {why}", path.display()))
}
