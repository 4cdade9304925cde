//! `ternion count`: exact token counts. Reads the tokenizer's files and nothing else of a checkpoint.

use ternion::Message;
use ternion::formats::Checkpoint;
use ternion::text::Tokenizer;

use crate::App;
use crate::args::CountArgs;
use crate::failure::Outcome;
use crate::input::TextSource;
use crate::model::Selected;

pub(crate) fn run(app: &App, args: &CountArgs) -> Outcome {
    let selected = Selected::for_files(&args.model)?;
    let text = TextSource::new(args.text.as_deref(), args.file.as_deref()).read("text")?;
    let tokenizer = Tokenizer::from_parts(Checkpoint::tokenizer_parts_at(selected.path()?)?)?;

    let plain = tokenizer.encode_plain(&text)?;
    let of_text = plain.len();
    let ids = if args.chat {
        tokenizer.encode_chat(&[Message::new(&args.role, &text)], true)?
    } else if args.prompt {
        tokenizer.encode(&text, true)?
    } else {
        plain
    };

    if app.output.json {
        return app.output.object(&serde_json::json!({
            "tokens": ids.len(),
            "text_tokens": of_text,
            "template_tokens": args.chat.then(|| ids.len().saturating_sub(of_text)),
            "ids": args.ids.then_some(&ids),
        }));
    }
    if args.ids {
        app.output.line(&serde_json::to_string(&ids).map_err(std::io::Error::from)?)?;
    } else {
        app.output.line(&ids.len().to_string())?;
    }
    if args.chat {
        app.output.notice(&format!(
            "{of_text} of the text, {} of the chat template",
            ids.len().saturating_sub(of_text)
        ));
    }
    Ok(())
}
