//! `ternion generate`: continues a text as it is.

use super::{answer, load, long};
use crate::App;
use crate::args::GenerateArgs;
use crate::failure::Outcome;
use crate::input::TextSource;
use crate::model::Selected;

pub(crate) async fn run(app: &App, args: &GenerateArgs) -> Outcome {
    let prompt = TextSource::new(args.prompt.as_deref(), args.prompt_file.as_deref()).read("prompt")?;
    let selected = Selected::for_engine(app, &args.engine)?;
    let mut request = answer::request(prompt, &args.generation);
    request.params.ignore_eos = args.ignore_eos;
    request.params.constraint = args.constraint.read()?;
    long::apply(&selected, &args.long, &mut request)?;
    let backend = load(app, &selected).await?;
    let answer = answer::generate(app, &*backend, request, &args.generation, false).await?;
    answer.outcome()
}
