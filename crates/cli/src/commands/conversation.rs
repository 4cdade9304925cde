//! The conversation of `ternion chat` on a terminal: a line editor with history, and a few commands.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustyline::config::Behavior;
use rustyline::error::ReadlineError;
use rustyline::{
    Cmd, ConditionalEventHandler, Config, DefaultEditor, Event, EventContext, EventHandler, KeyEvent,
    Movement, RepeatCount,
};
use ternion::{Error, ErrorKind, LlmBackend, Message};

use super::{answer, long};
use crate::App;
use crate::args::ChatArgs;
use crate::failure::{Failure, Outcome};
use crate::input::write_atomically;
use crate::interrupt::Interrupts;
use crate::model::Selected;
use crate::output::complain;

const HELP: &str = "\
/help          this text
/reset         forget the conversation
/system TEXT   forget the conversation and set these instructions (none: remove them)
/save FILE     write the conversation as JSON
/quit          leave (also Ctrl-D, or Ctrl-C twice on an empty line)
A `\\` at the end of a line continues it on the next. Ctrl-C while the model answers stops that answer.";

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Input<'a> {
    Nothing,
    Say(&'a str),
    Help,
    Reset,
    System(&'a str),
    Save(&'a str),
    Quit,
    Unknown(&'a str),
}

impl<'a> Input<'a> {
    fn parse(line: &'a str) -> Self {
        let text = line.trim();
        if text.is_empty() {
            return Self::Nothing;
        }
        // A space before the slash makes it a message.
        if !line.starts_with('/') {
            return Self::Say(text);
        }
        let (command, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        match (command, rest.trim()) {
            ("/help" | "/?", _) => Self::Help,
            ("/reset", _) => Self::Reset,
            ("/system", instructions) => Self::System(instructions),
            ("/save", file) => Self::Save(file),
            ("/quit" | "/exit", _) => Self::Quit,
            _ => Self::Unknown(command),
        }
    }
}

/// Holds a conversation until the user leaves. Errors of one answer are told and do not end it.
pub(crate) async fn run(
    app: &App,
    backend: &dyn LlmBackend,
    selected: &Selected,
    args: &ChatArgs,
) -> Outcome {
    let mut messages = opening(args.system.as_deref().unwrap_or_default());
    let mut reader = Reader::new(app)?;
    app.output.notice(&format!("{}: /help lists the commands, Ctrl-D leaves", backend.info().name));
    while let Some(line) = tokio::task::block_in_place(|| reader.read(app))? {
        match Input::parse(&line) {
            Input::Nothing => {}
            Input::Help => app.output.notice(HELP),
            Input::Reset => {
                messages.retain(|m| m.role == "system");
                app.output.notice("forgotten");
            }
            Input::System(instructions) => {
                messages = opening(instructions);
                app.output.notice("forgotten, with new instructions");
            }
            Input::Save(file) => match save(&app.interrupts, file, &messages) {
                Ok(()) => app.output.notice(&format!("saved {file}")),
                Err(failure) => complain(&failure.to_string()),
            },
            Input::Quit => break,
            Input::Unknown(command) => {
                app.output.notice(&format!(
                    "no command {command}; /help lists them (a space before `/` makes it a message)"
                ));
            }
            Input::Say(text) => {
                messages.push(Message::user(text));
                answer_to(app, backend, selected, args, &mut messages).await?;
                if app.interrupts.ended_by().is_some() {
                    return Err(Failure::Interrupted);
                }
            }
        }
    }
    Ok(())
}

fn opening(instructions: &str) -> Vec<Message> {
    if instructions.is_empty() { Vec::new() } else { vec![Message::system(instructions)] }
}

/// Adds the answer to the conversation; where there is none, takes back the message that it would have answered.
async fn answer_to(
    app: &App,
    backend: &dyn LlmBackend,
    selected: &Selected,
    args: &ChatArgs,
    messages: &mut Vec<Message>,
) -> Outcome {
    let mut request = answer::request(messages.clone(), &args.generation);
    request.params.constraint = args.constraint.read()?;
    request.params.reasoning_budget = args.thinking.reasoning_budget;
    long::apply(selected, &args.long, &mut request)?;
    match answer::generate(app, backend, request, &args.generation, args.thinking.show_reasoning).await {
        Ok(answer) if answer.text.is_empty() && answer.is_cancelled() => {
            messages.pop();
        }
        Ok(answer) => {
            let mut message = Message::assistant(answer.text);
            // The chat template decides what it shows of earlier thoughts.
            message.reasoning = Some(answer.reasoning).filter(|reasoning| !reasoning.is_empty());
            messages.push(message);
        }
        Err(failure @ (Failure::Output(_) | Failure::BrokenPipe | Failure::Interrupted)) => {
            return Err(failure);
        }
        Err(failure) => {
            messages.pop();
            complain(&failure.to_string());
            if matches!(&failure, Failure::Error(e) if e.kind() == ErrorKind::ContextOverflow) {
                app.output.notice("/reset forgets the conversation and makes room");
            }
        }
    }
    Ok(())
}

fn save(interrupts: &Interrupts, file: &str, messages: &[Message]) -> Outcome {
    if file.is_empty() {
        return Err(Failure::usage("/save needs the name of a file"));
    }
    let mut text = serde_json::to_vec_pretty(messages).map_err(io::Error::from)?;
    text.push(b'\n');
    write_atomically(interrupts, Path::new(file), |path| std::fs::write(path, &text))
}

/// The line editor with its history file. It writes to the terminal itself, so that standard output holds answers alone.
struct Reader {
    editor: DefaultEditor,
    history: Option<PathBuf>,
    /// The terminal cannot move its cursor: lines are read as they are typed.
    plain: bool,
    line_cleared: Arc<AtomicBool>,
}

impl Reader {
    fn new(app: &App) -> Outcome<Self> {
        let plain = cfg!(unix) && is_plain(&std::env::var("TERM").unwrap_or_default());
        if !plain && !io::stdout().is_terminal() && !has_terminal() {
            return Err(Failure::usage(
                "a conversation needs a terminal to write to, and standard output is none; give a message, or `-` for standard input",
            ));
        }
        let config = Config::builder()
            .auto_add_history(false)
            .behavior(Behavior::PreferTerm)
            .max_history_size(1000)
            .and_then(|c| c.history_ignore_dups(true));
        let config = config.map_err(|e| terminal(&e))?.build();
        let mut editor = DefaultEditor::with_config(config).map_err(|e| terminal(&e))?;
        let line_cleared = Arc::new(AtomicBool::new(false));
        let clear = ClearLine(Arc::clone(&line_cleared));
        editor.bind_sequence(KeyEvent::ctrl('c'), EventHandler::Conditional(Box::new(clear)));
        if !plain {
            app.interrupts.guard_terminal();
        }
        let history = history_file();
        if let Some(path) = &history {
            // There is none the first time.
            let _ = editor.load_history(path);
        }
        Ok(Self { editor, history, plain, line_cleared })
    }

    /// The next message, continued lines joined; `None` at the end.
    fn read(&mut self, app: &App) -> Outcome<Option<String>> {
        app.interrupts.idle();
        let mut text = String::new();
        let mut interrupted = false;
        loop {
            match self.line(if text.is_empty() { "> " } else { ". " }) {
                Ok(line) => {
                    interrupted = false;
                    if let Some(line) = line.strip_suffix('\\') {
                        text.push_str(line);
                        text.push('\n');
                        continue;
                    }
                    text.push_str(&line);
                    if !text.trim().is_empty() {
                        self.remember(&text);
                    }
                    return Ok(Some(text));
                }
                Err(ReadlineError::Interrupted) if !text.is_empty() => text.clear(),
                Err(ReadlineError::Interrupted) => {
                    // Something was typed after the first one.
                    let typed = self.line_cleared.swap(false, Ordering::Relaxed);
                    if interrupted && !typed {
                        return Ok(None);
                    }
                    interrupted = true;
                    app.output.notice("Ctrl-C again leaves");
                }
                Err(ReadlineError::Eof) => return Ok(None),
                Err(e) => return Err(terminal(&e)),
            }
        }
    }

    fn line(&mut self, prompt: &str) -> Result<String, ReadlineError> {
        if !self.plain {
            return self.editor.readline(prompt);
        }
        // The editor would write the prompt to standard output.
        let mut stderr = io::stderr();
        stderr.write_all(prompt.as_bytes())?;
        let mut line = String::new();
        if io::stdin().read_line(&mut line)? == 0 {
            return Err(ReadlineError::Eof);
        }
        line.truncate(line.trim_end_matches(['\r', '\n']).len());
        Ok(line)
    }

    /// Adds a message to the history and to its file at once, so that it is there however the conversation ends.
    fn remember(&mut self, text: &str) {
        // A history that cannot grow is no reason to stop.
        let _ = self.editor.add_history_entry(text);
        if let Some(path) = self.history.take() {
            let folder = path.parent().map_or(Ok(()), std::fs::create_dir_all);
            match folder.map_err(ReadlineError::from).and_then(|()| self.editor.append_history(&path)) {
                Ok(()) => self.history = Some(path),
                // Told once; from then on there is no file.
                Err(e) => complain(&format!("the history cannot be saved to {}: {e}", path.display())),
            }
        }
    }
}

/// Ctrl-C on a line with text clears it; on an empty line it stays what it is.
struct ClearLine(Arc<AtomicBool>);

impl ConditionalEventHandler for ClearLine {
    fn handle(&self, _: &Event, _: RepeatCount, _: bool, context: &EventContext<'_>) -> Option<Cmd> {
        let has_text = !context.line().is_empty();
        self.0.fetch_or(has_text, Ordering::Relaxed);
        has_text.then_some(Cmd::Kill(Movement::WholeBuffer))
    }
}

/// Whether this is a terminal that the editor does not support.
fn is_plain(term: &str) -> bool {
    ["dumb", "cons25", "emacs"].iter().any(|known| term.eq_ignore_ascii_case(known))
}

/// Whether the process has a terminal, wherever its standard streams lead.
fn has_terminal() -> bool {
    cfg!(windows) || File::options().read(true).write(true).open("/dev/tty").is_ok()
}

fn terminal(error: &ReadlineError) -> Failure {
    Error::new(ErrorKind::Io, format!("the terminal cannot be read: {error}")).into()
}

/// In the user's data folder, as the XDG base directory specification has it. None where there is no home.
fn history_file() -> Option<PathBuf> {
    if !io::stdin().is_terminal() {
        return None;
    }
    let folder = |key| std::env::var_os(key).map(PathBuf::from).filter(|path| path.is_absolute());
    let data = folder("XDG_DATA_HOME")
        .or_else(|| folder("HOME").map(|home| home.join(".local/share")))
        .or_else(|| folder("APPDATA"))?;
    Some(data.join("ternion").join("history"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_or_commands() {
        assert_eq!(Input::parse("  \n"), Input::Nothing);
        assert_eq!(Input::parse(" hello there "), Input::Say("hello there"));
        assert_eq!(Input::parse(" /etc/hosts is a file"), Input::Say("/etc/hosts is a file"));
        assert_eq!(Input::parse("/system  be brief "), Input::System("be brief"));
        assert_eq!(Input::parse("/system"), Input::System(""));
        assert_eq!(Input::parse("/save my file.json"), Input::Save("my file.json"));
        assert_eq!(Input::parse("/quit"), Input::Quit);
        assert_eq!(Input::parse("/quiet"), Input::Unknown("/quiet"));
    }

    #[test]
    fn a_conversation_is_saved_as_json() {
        let folder = tempfile::tempdir().unwrap();
        let (path, none) = (folder.path().join("c.json"), Interrupts::default());
        save(&none, path.to_str().unwrap(), &[Message::user("hi"), Message::assistant("ho")]).unwrap();
        let messages: Vec<Message> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(messages, [Message::user("hi"), Message::assistant("ho")]);
        assert_eq!(save(&none, "", &[]).unwrap_err().exit_code(), 2);
    }
}
