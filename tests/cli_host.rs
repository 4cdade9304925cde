//! The `ternion` command between a shell, a terminal and a container: signals, what goes to the terminal and what to standard
//! output, and output that cannot be written.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "cli/common.rs"]
mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{failure, fixture_arg, stderr, stdout, ternion};
use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, tcgetattr};

const TERNION: &str = env!("CARGO_BIN_EXE_ternion");
const PATIENCE: Duration = Duration::from_secs(60);
const ECHO: [&str; 2] = ["--backend", "echo"];

/// A run of another program that may start `ternion`, with none of the user's settings.
fn command(program: &str, args: &[&str], folder: &Path) -> Command {
    let mut command = Command::new(program);
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("TERNION_") || key == "RUST_LOG" {
            command.env_remove(key);
        }
    }
    command.args(args).current_dir(folder).env("HOME", folder).env_remove("XDG_DATA_HOME");
    command
}

/// A run with pipes for its output.
fn start(program: &str, args: &[&str], folder: &Path) -> Child {
    let mut command = command(program, args, folder);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn send(signal: &str, process: u32) {
    assert!(Command::new("kill").args([signal, &process.to_string()]).status().unwrap().success());
}

/// Waits until `done`, and gives up on a process that has ended or takes too long.
fn wait_for(child: &mut Child, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        assert!(started.elapsed() < PATIENCE, "it takes too long");
        sleep(Duration::from_millis(2));
    }
}

/// Waits for the end, which must come.
fn output(mut child: Child) -> Output {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("it does not end");
        }
        sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A model that says a word every 20 ms.
fn slow_echo(folder: &Path) {
    let config = "[models.slow]\nbackend = \"echo\"\noptions = { delay_ms = 20 }\n";
    std::fs::write(folder.join("ternion.toml"), config).unwrap();
}

fn words() -> String {
    "word ".repeat(1000)
}

fn first_words(child: &mut Child) {
    let mut text = vec![0; "word word".len()];
    child.stdout.as_mut().unwrap().read_exact(&mut text).unwrap();
}

#[test]
fn sigterm_and_sighup_end_an_answer_with_its_line() {
    for (signal, code) in [("-TERM", 143), ("-HUP", 129)] {
        let folder = tempfile::tempdir().unwrap();
        slow_echo(folder.path());
        let mut child = start(TERNION, &["chat", &words(), "--max-tokens", "5000"], folder.path());
        first_words(&mut child);
        send(signal, child.id());
        let output = output(child);
        assert_eq!(output.status.code(), Some(code), "{signal}: {}", stderr(&output));
        let rest = stdout(&output);
        assert!(rest.ends_with('\n') && rest.len() < 2000, "{signal}: {rest}");
        assert!(!stderr(&output).contains("error"), "{signal}: {}", stderr(&output));
    }
}

#[test]
fn sigterm_and_sighup_leave_nothing_half_written() {
    let model = ["synth", "--shape", "bitnet-large", "--out"];
    for (signal, code, rest) in [
        ("-TERM", 143, &["large.gguf", "--format", "gguf-tq1"][..]),
        ("-HUP", 129, &["large.gguf", "--format", "gguf-i2s"]),
        ("-TERM", 143, &["large"]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut child = start(TERNION, &[&model[..], rest].concat(), folder.path());
        wait_for(&mut child, || names(folder.path()).iter().any(|name| name.contains(".partial-")));
        sleep(Duration::from_millis(200));
        send(signal, child.id());
        let output = output(child);
        assert_eq!(output.status.code(), Some(code), "{rest:?}: {}", stderr(&output));
        assert!(names(folder.path()).is_empty(), "{rest:?}: {:?}", names(folder.path()));
    }
}

/// What cannot be tidied up by the process itself.
#[test]
fn what_a_killed_run_has_left_is_removed_by_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let out = ["--out", "large.gguf", "--format", "gguf-i2s"];
    let mut child =
        start(TERNION, &[&["synth", "--shape", "bitnet-large"], &out[..]].concat(), folder.path());
    wait_for(&mut child, || names(folder.path()).iter().any(|name| name.contains(".partial-")));
    send("-KILL", child.id());
    output(child);
    assert!(!names(folder.path()).is_empty());
    let next = output(start(TERNION, &[&["synth", "--shape", "nano"], &out[..]].concat(), folder.path()));
    assert!(next.status.success(), "{}", stderr(&next));
    assert_eq!(names(folder.path()), ["large.gguf"]);
}

/// `nohup` asks for it.
#[test]
fn sighup_stays_ignored() {
    let folder = tempfile::tempdir().unwrap();
    slow_echo(folder.path());
    let script = "trap '' HUP; exec \"$0\" chat 'word word word word word word' -q";
    let mut child = start("sh", &["-c", script, TERNION], folder.path());
    first_words(&mut child);
    send("-HUP", child.id());
    let output = output(child);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

/// The system ignores a signal that process 1 of a container does not handle.
#[test]
fn the_only_process_of_a_container_stops() {
    let folder = tempfile::tempdir().unwrap();
    slow_echo(folder.path());
    let root = ["--pid", "--fork", "--kill-child"];
    let user = ["--user", "--map-root-user", "--pid", "--fork", "--kill-child"];
    let may = |flags: &[&str]| {
        let tried = command("unshare", &[flags, &["true"]].concat(), folder.path()).output();
        tried.is_ok_and(|output| output.status.success())
    };
    let Some(flags) = [&root[..], &user].into_iter().find(|flags| may(flags)) else {
        // Past the harness, which would keep it to itself; `cargo xtask test` counts these lines.
        let mut stdout = std::io::stdout();
        writeln!(stdout, "skipped: no namespace of processes can be made").unwrap();
        return;
    };
    for (signal, code) in [("-TERM", 143), ("-HUP", 129), ("-INT", 130)] {
        let chat = [TERNION, "chat", &words(), "--max-tokens", "5000"];
        let mut child = start("unshare", &[flags, &chat].concat(), folder.path());
        first_words(&mut child);
        let children = format!("/proc/{0}/task/{0}/children", child.id());
        let inner = std::fs::read_to_string(children).unwrap();
        send(signal, inner.trim().parse().unwrap());
        let output = output(child);
        assert_eq!(output.status.code(), Some(code), "{signal}: {}", stderr(&output));
    }
}

/// A conversation on a terminal of its own, with standard output in a file.
struct Conversation {
    child: Child,
    /// The other end of the terminal.
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    terminal: OwnedFd,
    folder: tempfile::TempDir,
}

impl Conversation {
    fn begin(term: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pty = openpty(None, None).unwrap();
        let out = File::create(folder.path().join("out")).unwrap();
        let stream = || Stdio::from(pty.slave.try_clone().unwrap());
        let args = [&["--ctty", TERNION, "chat"][..], &ECHO].concat();
        let mut command = command("setsid", &args, folder.path());
        command.env("TERM", term).stdin(stream()).stdout(out).stderr(stream());
        let child = command.spawn().unwrap();
        let keyboard = File::from(pty.master);
        let (mut shown, (sender, screen)) = (keyboard.try_clone().unwrap(), channel());
        // A read of its own thread, so that the test can give up.
        std::thread::spawn(move || {
            let mut piece = [0; 1024];
            while let Ok(count) = shown.read(&mut piece) {
                if sender.send(piece[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { child, keyboard, screen, terminal: pty.slave, folder }
    }

    /// Whether the terminal passes on lines and shows what is typed, as a shell leaves it.
    fn is_usual(&self) -> bool {
        let usual = LocalFlags::ICANON | LocalFlags::ECHO;
        tcgetattr(&self.terminal).unwrap().local_flags.contains(usual)
    }

    /// Types when the editor waits for it.
    fn types(&mut self, keys: &str) {
        let terminal = self.terminal.try_clone().unwrap();
        let raw = || !tcgetattr(&terminal).unwrap().local_flags.contains(LocalFlags::ICANON);
        wait_for(&mut self.child, raw);
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Reads what the terminal shows until `text` comes.
    fn sees(&mut self, text: &str) -> String {
        let mut seen = Vec::new();
        loop {
            let shown = String::from_utf8_lossy(&seen).into_owned();
            if shown.contains(text) {
                return shown;
            }
            let piece = self.screen.recv_timeout(PATIENCE);
            seen.extend(piece.unwrap_or_else(|e| panic!("`{text}` does not come ({e}): {shown:?}")));
        }
    }

    fn answers(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("out")).unwrap()
    }

    /// The exit code.
    fn ends(mut self) -> (Option<i32>, Self) {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status.code(), self);
            }
            assert!(started.elapsed() < PATIENCE, "it does not end");
            sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

#[test]
fn a_conversation_is_on_the_terminal_and_its_answers_on_standard_output() {
    let mut talk = Conversation::begin("xterm");
    talk.sees("Ctrl-D leaves");
    talk.types("hello there\r");
    talk.sees("tokens in");
    talk.types("\u{4}");
    let (code, talk) = talk.ends();
    assert_eq!((code, talk.answers().as_str()), (Some(0), "hello there\n"));
    assert!(talk.is_usual());
}

#[test]
fn a_plain_terminal_does_not_write_to_standard_output_either() {
    let mut talk = Conversation::begin("dumb");
    talk.sees("> ");
    talk.keyboard.write_all(b"hello there\n").unwrap();
    talk.sees("tokens in");
    talk.keyboard.write_all(b"/quit\n").unwrap();
    let (code, talk) = talk.ends();
    assert_eq!((code, talk.answers().as_str()), (Some(0), "hello there\n"));
}

#[test]
fn ctrl_c_clears_the_line_and_leaves_only_twice_on_an_empty_one() {
    let mut talk = Conversation::begin("xterm");
    talk.sees("Ctrl-D leaves");
    talk.types("never sent\u{3}\u{3}");
    talk.sees("Ctrl-C again leaves");
    // Typing takes the first one back.
    talk.types("nor this\u{3}\u{3}");
    talk.sees("Ctrl-C again leaves");
    talk.types("sent\r");
    talk.sees("token in");
    talk.types("\u{3}");
    talk.sees("Ctrl-C again leaves");
    talk.types("\u{3}");
    let (code, talk) = talk.ends();
    assert_eq!((code, talk.answers().as_str()), (Some(0), "sent\n"));
}

#[test]
fn a_signal_at_the_prompt_restores_the_terminal() {
    for (signal, expected) in [("-TERM", 143), ("-HUP", 129)] {
        let mut talk = Conversation::begin("xterm");
        assert!(talk.is_usual());
        talk.sees("Ctrl-D leaves");
        talk.types("half a li");
        talk.sees("half a li");
        assert!(!talk.is_usual());
        send(signal, talk.child.id());
        let (code, mut talk) = talk.ends();
        assert_eq!(code, Some(expected));
        assert!(talk.is_usual());
        talk.sees("\u{1b}[?2004l");
    }
}

#[test]
fn a_conversation_without_a_terminal_to_write_to_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let pty = openpty(None, None).unwrap();
    let args = [&[TERNION, "chat"][..], &ECHO].concat();
    // A session without a terminal of its own.
    let mut command = command("setsid", &args, folder.path());
    command.stdin(Stdio::from(pty.slave)).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = output(command.spawn().unwrap());
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(output.stdout.is_empty());
    assert!(stderr(&output).contains("needs a terminal"), "{}", stderr(&output));
}

/// Every command that prints, in a form that ends soon.
fn printing(folder: &Path) -> Vec<Vec<String>> {
    let model = fixture_arg("nano-packed");
    let lines = [
        "chat hi --backend echo",
        "generate hi --backend echo",
        "count hi -m MODEL",
        "chunk TEXT -m MODEL",
        "inspect -m MODEL",
        "schema",
        "conformance -m MODEL -m MODEL --positions 4 --answer-tokens 2",
        "bench -m MODEL --prompt 4 --decode 2 --repeat 1 --warm-up 0 --buffer 0",
        "eval perplexity --data TEXT -m MODEL --limit 1 --context-length 64",
    ];
    let text = folder.join("text.txt").to_str().unwrap().to_owned();
    std::fs::write(&text, "Once upon a time there was a small model. ".repeat(20)).unwrap();
    let word = |word: &str| match word {
        "MODEL" => model.clone(),
        "TEXT" => text.clone(),
        other => other.to_owned(),
    };
    lines.iter().map(|line| line.split(' ').map(word).collect()).collect()
}

#[test]
fn output_that_cannot_be_written_is_an_error_of_every_command() {
    let folder = tempfile::tempdir().unwrap();
    for args in printing(folder.path()) {
        for json in [false, true] {
            for redirect in [">&-", ">/dev/full"] {
                let script = format!("exec \"$0\" \"$@\" {redirect}");
                let mut all = vec!["-c", &script, TERNION];
                all.extend(args.iter().map(String::as_str));
                all.extend(json.then_some("--json"));
                let output = output(start("sh", &all, folder.path()));
                let said = stderr(&output);
                assert_eq!(output.status.code(), Some(4), "{all:?}: {said}");
                let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error: ")).collect();
                assert_eq!(errors.len(), 1, "{all:?}: {said}");
                assert!(errors[0].contains("standard output cannot be written"), "{said}");
            }
        }
    }
}

#[test]
fn help_and_version_that_cannot_be_written_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    for args in ["--help", "--version", "chat --help"] {
        for redirect in [">&-", ">/dev/full"] {
            let script = format!("exec \"$0\" {args} {redirect}");
            let output = output(start("sh", &["-c", &script, TERNION], folder.path()));
            assert_eq!(output.status.code(), Some(4), "{script}: {}", stderr(&output));
        }
    }
}

#[test]
fn a_command_that_prints_nothing_does_not_need_standard_output() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("exec \"$0\" convert {} --to gguf-i2s --out x.gguf >&-", fixture_arg("nano-packed"));
    let done = output(start("sh", &["-c", &script, TERNION], folder.path()));
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    // And where it is open, `/dev/null` is as good as any.
    let script = format!("exec \"$0\" count hi -m {} >/dev/null", fixture_arg("nano-packed"));
    assert!(output(start("sh", &["-c", &script, TERNION], folder.path())).status.success());
}

#[test]
fn a_reader_that_goes_away_ends_the_command_without_a_word() {
    let folder = tempfile::tempdir().unwrap();
    // As a program that SIGPIPE ends.
    let script = "exec 3>&1; { \"$0\" \"$@\"; echo $? >&3; } | head -1 >/dev/null";
    for (long, code) in [(true, "141\n"), (false, "0\n")] {
        // More than a pipe holds, in few tokens.
        let text = if long { format!("{}\n", "word".repeat(100)).repeat(1000) } else { "a line".to_owned() };
        std::fs::write(folder.path().join("text"), text).unwrap();
        let args = ["-c", script, TERNION, "generate", "--prompt-file", "text", "--max-tokens", "2000"];
        let output = output(start("sh", &[&args[..], &ECHO, &["-q"]].concat(), folder.path()));
        assert_eq!((stdout(&output).as_str(), stderr(&output).as_str()), (code, ""), "{long}");
    }
}

#[test]
fn a_device_is_written_to_and_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let ids = folder.path().join("ids");
    std::fs::write(&ids, "[1, 2]").unwrap();
    let model = fixture_arg("nano-packed");
    let args = ["logits", "-m", &model, "--ids", ids.to_str().unwrap(), "--out", pipe.to_str().unwrap()];
    let child = start(TERNION, &args, folder.path());
    let reader = start("cat", &[pipe.to_str().unwrap()], folder.path());
    let written = output(child);
    assert!(written.status.success(), "{}", stderr(&written));
    let read = output(reader).stdout;
    assert!(read.len() > 8 && read[8] == b'{', "a safetensors file");
    failure(
        ternion(&["logits", "-m", &model, "--ids", ids.to_str().unwrap(), "--out", "/dev/full"]),
        4,
        &["/dev/full"],
    );
}
