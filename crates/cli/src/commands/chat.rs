//! `ternion chat`: one answer, or a conversation where a person sits at the terminal.

use ternion::Message;
use ternion::config::PromptCacheConfig;

use super::{answer, conversation, load, long, unload};
use crate::App;
use crate::args::ChatArgs;
use crate::failure::{Failure, Outcome};
use crate::input::TextSource;
use crate::model::Selected;

pub(crate) async fn run(app: &App, args: &ChatArgs) -> Outcome {
    let source = TextSource::new(args.message.as_deref(), None);
    if args.long.file.is_some() && args.message.is_none() {
        return Err(Failure::usage("--file needs a message that says what to do with the text"));
    }
    if args.long.file.as_deref().is_some_and(|f| f.as_os_str() == "-") && source == TextSource::Stdin {
        return Err(Failure::usage("message and --file cannot both be standard input"));
    }
    if source == TextSource::Nobody && app.output.json {
        return Err(Failure::usage("--json prints one answer; give a message, or `-` for standard input"));
    }
    let constraint = args.constraint.read()?;
    let mut selected = Selected::for_engine(app, &args.engine)?;
    if let Some(folder) = &args.prompt_cache {
        let config = selected.model_mut()?;
        match &mut config.prompt_cache {
            Some(cache) => cache.path.clone_from(folder),
            none => *none = Some(PromptCacheConfig::in_folder(folder)),
        }
    }
    if selected.is_default {
        app.output.notice(
            "note: the model in fixtures/ is tiny and knows next to nothing; name a real one with --model",
        );
    }
    if source == TextSource::Nobody {
        let backend = load(app, &selected).await?;
        let ended = conversation::run(app, &*backend, &selected, args).await;
        unload(app, backend).await;
        return ended;
    }
    let message = source.read("message")?;
    // What `echo` or an editor puts at the end is no part of the message.
    let message = message.trim_end_matches(['\r', '\n']);
    if message.is_empty() {
        return Err(Failure::usage("the message is empty; at least one character expected"));
    }
    let messages: Vec<Message> =
        args.system.as_deref().map(Message::system).into_iter().chain([Message::user(message)]).collect();
    let mut request = answer::request(messages, &args.generation);
    request.params.constraint = constraint;
    request.params.reasoning_budget = args.thinking.reasoning_budget;
    long::apply(&selected, &args.long, &mut request)?;
    let backend = load(app, &selected).await?;
    let answer =
        answer::generate(app, &*backend, request, &args.generation, args.thinking.show_reasoning).await;
    unload(app, backend).await;
    answer?.outcome()
}
