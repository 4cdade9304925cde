//! What goes where: answers to standard output; progress, notices and the closing line to standard error.
//!
//! Bars are drawn only where a person looks: standard error is a terminal and `--quiet` is not given.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use ternion::registry::Progress;
use ternion::{Timing, Usage};

use crate::args::{Command, OutputArgs};
use crate::failure::Outcome;
use crate::startup;

/// Where and how a command writes.
#[derive(Debug, Clone)]
pub(crate) struct Output {
    /// One JSON object instead of text.
    pub(crate) json: bool,
    quiet: bool,
    bars: bool,
    /// Standard output is a terminal: what a model writes must not steer it.
    terminal: bool,
}

impl Output {
    pub(crate) fn new(args: &OutputArgs) -> Self {
        Self {
            json: args.json,
            quiet: args.quiet,
            bars: !args.quiet && io::stderr().is_terminal(),
            terminal: io::stdout().is_terminal(),
        }
    }

    /// Fails where a command would compute something only to find standard output closed.
    pub(crate) fn can_print(&self, command: &Command) -> Outcome {
        let writes_files = match command {
            Command::Convert(_) | Command::Synth(_) | Command::Logits(_) => true,
            #[cfg(feature = "serve")]
            Command::Serve(_) => true,
            _ => false,
        };
        if self.json || !writes_files {
            drop(open_stdout()?);
        }
        Ok(())
    }

    /// Prints a piece of an answer and shows it at once.
    pub(crate) fn piece(&self, text: &str) -> Outcome {
        let text = if self.terminal { Cow::Owned(visible(text)) } else { Cow::Borrowed(text) };
        let mut stdout = open_stdout()?;
        stdout.write_all(text.as_bytes())?;
        Ok(stdout.flush()?)
    }

    /// Prints a line.
    pub(crate) fn line(&self, text: &str) -> Outcome {
        self.piece(&format!("{text}\n"))
    }

    /// Prints a value as one JSON object.
    pub(crate) fn object(&self, value: &impl Serialize) -> Outcome {
        let text = serde_json::to_string_pretty(value).map_err(io::Error::from)?;
        self.line(&text)
    }

    /// A line for the person at the terminal; not with `--quiet`.
    pub(crate) fn notice(&self, text: &str) {
        if !self.quiet {
            // A closed standard error is no reason to fail.
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// Text beside the answer, as it comes: dimmed on a terminal. Not with `--quiet`.
    pub(crate) fn aside(&self, text: &str) {
        if !self.quiet {
            let mut stderr = io::stderr();
            // A closed standard error is no reason to fail.
            let _ = if stderr.is_terminal() {
                write!(stderr, "\x1b[2m{text}\x1b[0m")
            } else {
                write!(stderr, "{text}")
            };
        }
    }

    /// News of work that a bar would show where there is one.
    pub(crate) fn progress(&self, text: &str) {
        if !self.bars {
            self.notice(text);
        }
    }

    /// The last line of an answer: its speed.
    pub(crate) fn closing(&self, usage: &Usage, timing: &Timing) {
        self.notice(&closing_line(usage, timing));
    }

    /// A bar for bytes.
    pub(crate) fn bytes(&self, what: &'static str) -> Bar {
        self.bar(what, "{prefix} {wide_bar} {bytes}/{total_bytes} {eta}")
    }

    /// A bar for other units.
    pub(crate) fn steps(&self, what: &'static str) -> Bar {
        self.bar(what, "{prefix} {wide_bar} {pos}/{len}")
    }

    /// A bar for items with a result so far and the time left.
    pub(crate) fn evaluation(&self) -> Bar {
        self.bar("eval", "{prefix} {wide_bar} {pos}/{len} {msg} {eta} left")
    }

    fn bar(&self, what: &'static str, template: &str) -> Bar {
        if !self.bars {
            return Bar(None);
        }
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(what);
        Bar(Some(bar))
    }
}

/// Standard output, or the error that Rust's standard library does not report: it was closed from the beginning.
pub(crate) fn open_stdout() -> io::Result<io::StdoutLock<'static>> {
    if startup::stdout_is_closed() {
        return Err(io::Error::other("it is closed"));
    }
    Ok(io::stdout().lock())
}

/// An error, for the person at the terminal. A closed standard error does not change how the command ends.
pub(crate) fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "error: {message}");
}

/// A progress bar, or nothing where none is wanted. It is gone from the screen when it is dropped or cleared.
#[derive(Debug, Clone)]
pub(crate) struct Bar(Option<ProgressBar>);

impl Bar {
    /// Shows `done` of `total`.
    pub(crate) fn set(&self, done: u64, total: u64) {
        if let Some(bar) = &self.0 {
            bar.set_length(total);
            bar.set_position(done);
        }
    }

    /// Shows what is being done.
    pub(crate) fn stage(&self, what: &'static str) {
        if let Some(bar) = &self.0 {
            bar.set_prefix(what);
        }
    }

    /// Shows what is known so far.
    pub(crate) fn message(&self, text: String) {
        if let Some(bar) = &self.0 {
            bar.set_message(text);
        }
    }

    /// The time left is reckoned from here: what is done by now took no time.
    pub(crate) fn begin_here(&self) {
        if let Some(bar) = &self.0 {
            bar.reset_eta();
        }
    }

    /// Removes it from the screen.
    pub(crate) fn clear(&self) {
        if let Some(bar) = &self.0
            && !bar.is_finished()
        {
            bar.finish_and_clear();
        }
    }

    /// The callback that shows how far loading is.
    pub(crate) fn progress(&self) -> Progress {
        let bar = self.clone();
        Progress::new(move |p| {
            bar.stage(p.stage);
            bar.set(p.done, p.total);
        })
    }
}

fn closing_line(usage: &Usage, timing: &Timing) -> String {
    let tokens = usage.completion_tokens;
    let mut line = format!(
        "{tokens} {} in {}",
        if tokens == 1 { "token" } else { "tokens" },
        seconds(timing.prefill + timing.decode)
    );
    if let Some(rate) = timing.decode_rate(usage) {
        line += &format!(": {rate:.1} tokens/s");
    }
    if let Some(first) = timing.first_token {
        line += &format!(", first token after {}", seconds(first));
    }
    if usage.accepted_tokens > 0 {
        line += &format!(" ({} drafted)", usage.accepted_tokens);
    }
    line + &format!(", prompt {} tokens ({} cached)", usage.prompt_tokens, usage.cached_tokens)
}

/// A duration with as many digits as one wants to read.
pub(crate) fn seconds(time: Duration) -> String {
    let s = time.as_secs_f64();
    if s < 1.0 {
        format!("{s:.3} s")
    } else if s < 10.0 {
        format!("{s:.2} s")
    } else {
        format!("{s:.1} s")
    }
}

/// Bytes in the unit that fits.
pub(crate) fn bytes(count: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| count >= 1 << shift) {
        Some((unit, shift)) => format!("{:.1} {unit}", count as f64 / f64::from(1u32 << shift)),
        None => format!("{count} bytes"),
    }
}

/// The text with control characters, which could move the cursor or worse, as the pictures that Unicode has of them.
fn visible(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\t' => c,
            '\0'..='\u{1f}' => char::from_u32(0x2400 + u32::from(c)).unwrap_or(char::REPLACEMENT_CHARACTER),
            '\u{7f}' => '\u{2421}',
            '\u{80}'..='\u{9f}' => char::REPLACEMENT_CHARACTER,
            _ => c,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_become_pictures() {
        assert_eq!(visible("a\tb\n\u{1b}[2J\r\0\u{7f}\u{9b}é🦀"), "a\tb\n␛[2J␍␀␡\u{fffd}é🦀");
    }

    #[test]
    fn sizes_and_times_are_short() {
        assert_eq!(bytes(0), "0 bytes");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(5 << 30), "5.0 GiB");
        assert_eq!(seconds(Duration::from_millis(120)), "0.120 s");
        assert_eq!(seconds(Duration::from_millis(1500)), "1.50 s");
        assert_eq!(seconds(Duration::from_secs(75)), "75.0 s");
    }

    #[test]
    fn the_closing_line_leaves_out_what_is_not_known() {
        assert_eq!(
            closing_line(&Usage::default(), &Timing::default()),
            "0 tokens in 0.000 s, prompt 0 tokens (0 cached)"
        );
    }
}
