//! `ternion count`: exact token counts, of a text or of each message of a conversation. Reads the tokenizer's files and nothing else of a checkpoint.

use ternion::Message;
use ternion::context::TokenBudget;
use ternion::text::Tokenizer;

use crate::App;
use crate::args::CountArgs;
use crate::failure::{Failure, Outcome};
use crate::input::TextSource;
use crate::model::Selected;

pub(crate) fn run(app: &App, args: &CountArgs) -> Outcome {
    let selected = Selected::for_files(app, &args.model)?;
    if args.messages.is_some() {
        return conversation(app, args, &selected);
    }
    let text = TextSource::new(args.text.as_deref(), args.file.as_deref()).read("text")?;
    let tokenizer = Tokenizer::from_parts(selected.facts()?.tokenizer_parts(selected.path()?)?)?;

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

/// What each message of a conversation takes, and what is left.
fn conversation(app: &App, args: &CountArgs, selected: &Selected) -> Outcome {
    let source = TextSource::new(None, args.messages.as_deref());
    let messages: Vec<Message> = serde_json::from_str(&source.read("conversation")?).map_err(|e| {
        Failure::usage(format!("--messages: a JSON array of objects with `role` and `content` expected: {e}"))
    })?;
    if messages.is_empty() {
        return Err(Failure::usage("--messages: there are none; at least one expected"));
    }
    let tokenizer = Tokenizer::from_parts(selected.facts()?.tokenizer_parts(selected.path()?)?)?;
    let context = args.context.or(selected.model()?.context_length);
    let budget = TokenBudget::for_chat(&tokenizer, &messages, context, args.max_tokens.unwrap_or(0))?;
    if app.output.json {
        return app.output.object(&serde_json::json!({
            "tokens": budget.prompt,
            "template": budget.template(),
            "system": budget.system(),
            "history": budget.history(),
            "input": budget.input(),
            "reserved": budget.reserved,
            "context": budget.context,
            "free": budget.free(),
            "opening": budget.opening,
            "answer_header": budget.answer_header,
            "messages": budget.messages,
        }));
    }
    let row = |i: &str, role: &str, text: &str, template: i64, total: i64| {
        app.output.line(&format!("{i:>5}  {role:<14} {text:>8} {template:>9} {total:>8}"))
    };
    app.output
        .line(&format!("{:>5}  {:<14} {:>8} {:>9} {:>8}", "#", "role", "text", "template", "tokens"))?;
    if budget.opening > 0 {
        row("", "(opening)", "", budget.opening as i64, budget.opening as i64)?;
    }
    for (i, message) in budget.messages.iter().enumerate() {
        row(&i.to_string(), &message.role, &message.text.to_string(), message.template, message.total())?;
    }
    row("", "(answer)", "", budget.answer_header, budget.answer_header)?;
    let texts = budget.system() + budget.history() + budget.input();
    row("", "(prompt)", &texts.to_string(), budget.template(), budget.prompt as i64)?;
    app.output.notice(&format!(
        "{} of the chat template, {} of system messages, {} of the history, {} of the input",
        budget.template(),
        budget.system(),
        budget.history(),
        budget.input()
    ));
    if let (Some(context), Some(free)) = (budget.context, budget.free()) {
        app.output.notice(&format!(
            "context of {context}: {} reserved for the answer, {free} left",
            budget.reserved
        ));
    }
    Ok(())
}
