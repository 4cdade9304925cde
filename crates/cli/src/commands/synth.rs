//! `ternion synth`: a valid checkpoint with random weights in the shape of a real one, for measurements.

use std::io::ErrorKind;
use std::path::Path;

use ternion::Error;
use ternion::formats::convert::{Options, Target, convert};
use ternion::formats::synth::{self, Shape};
use ternion::formats::{Checkpoint, Progress, Unfinished};

use super::blocking;
use crate::App;
use crate::args::SynthArgs;
use crate::failure::{Failure, Outcome};

pub(crate) fn run(app: &App, args: &SynthArgs) -> Outcome {
    let shape = Shape::named(&args.shape)?;
    match state(&args.out)? {
        _ if args.format != Target::Safetensors => write_gguf(app, &shape, args)?,
        State::Free => write(app, &args.out, &shape, args, synth::write)?,
        State::Checkpoint if args.force => write(app, &args.out, &shape, args, synth::replace)?,
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

type Write = fn(&Path, &Shape, u64, &mut Progress<'_>) -> ternion::Result<()>;

fn write(app: &App, folder: &Path, shape: &Shape, args: &SynthArgs, write: Write) -> Outcome {
    let bar = app.output.bytes("write");
    let result = blocking(app, || {
        app.interrupts
            .writing(folder, || write(folder, shape, args.seed, &mut |done, total| bar.set(done, total)))
    });
    bar.clear();
    Ok(result?)
}

/// Writes safetensors to a temporary folder and converts them, so that weights, metadata and tokenizer are those of any
/// other conversion.
fn write_gguf(app: &App, shape: &Shape, args: &SynthArgs) -> Outcome {
    if args.out.exists() && !(args.force && args.out.is_file()) {
        let why = if args.out.is_file() {
            "exists; --force replaces it"
        } else {
            "exists and is no file; name a new one"
        };
        return Err(taken(&args.out, why));
    }
    let mut name =
        args.out.file_name().ok_or_else(|| taken(&args.out, "has no name; name a new one"))?.to_owned();
    name.push(".synth");
    let scratch = Unfinished::folder(&args.out.with_file_name(name))?;
    app.interrupts.using(scratch.path(), || {
        let folder = scratch.path().join("model");
        write(app, &folder, shape, args, synth::write)?;
        let bar = app.output.bytes("convert");
        let mut options = Options::new(args.format);
        options.overwrite = args.force;
        let result = blocking(app, || {
            let mut checkpoint = Checkpoint::open(&folder)?;
            checkpoint.name.clone_from(&args.shape);
            app.interrupts.writing(&args.out, || {
                convert(&checkpoint, &args.out, &options, &mut |done, total| bar.set(done, total)).map(drop)
            })
        });
        bar.clear();
        Ok(result?)
    })
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
