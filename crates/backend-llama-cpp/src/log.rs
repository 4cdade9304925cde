//! llama.cpp's log: to `tracing`, and its errors to the error of the call that they explain.
//!
//! Functions of llama.cpp return NULL or a number; the reason is only in the log. [`capture`] collects the errors that
//! the calling thread logs meanwhile. A message goes to the host's subscriber of `tracing`, which may panic: that ends the
//! call that logged the message with an error, not the process.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};

use llama_cpp_sys_2 as sys;
use ternion_core::{Error, Result, catch_panic};

/// Lines of errors that are kept for one call.
const MOST: usize = 8;

#[derive(Default)]
struct Thread {
    /// A line that has not ended, and its level.
    line: String,
    level: sys::ggml_log_level,
    /// What is collected, while someone does.
    captured: Option<Captured>,
}

/// What happened on the log during a call.
#[derive(Default)]
pub(crate) struct Captured {
    /// The first errors.
    errors: Vec<String>,
    /// The first panic of the host's subscriber.
    panic: Option<String>,
}

impl Captured {
    /// The errors that were logged, joined.
    pub(crate) fn why(&self) -> String {
        if self.errors.is_empty() { "it does not say why".to_owned() } else { self.errors.join("; ") }
    }

    /// An error if the host's subscriber panicked.
    pub(crate) fn check_panics(&self) -> Result<()> {
        match &self.panic {
            None => Ok(()),
            Some(panic) => Err(Error::backend(format!("the listener to llama.cpp's log panicked: {panic}"))),
        }
    }
}

thread_local! {
    static THREAD: RefCell<Thread> = RefCell::default();
}

/// Sends llama.cpp's and ggml's messages here.
pub(crate) fn install() {
    // SAFETY: The callback is a function with the signature that is asked for and uses no user data.
    unsafe { sys::llama_log_set(Some(on_message), std::ptr::null_mut()) };
}

/// Runs `f` and returns what llama.cpp logged on this thread meanwhile.
pub(crate) fn capture<T>(f: impl FnOnce() -> T) -> (T, Captured) {
    THREAD.with_borrow_mut(|thread| thread.captured = Some(Captured::default()));
    let result = f();
    let captured = THREAD.with_borrow_mut(|thread| thread.captured.take());
    (result, captured.unwrap_or_default())
}

unsafe extern "C" fn on_message(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() {
        return;
    }
    let outcome = catch_panic(|| {
        // SAFETY: llama.cpp passes a string that ends with NUL and lives for the call.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        let line = THREAD.with_borrow_mut(|thread| thread.take(level, &text));
        // Out of the borrow: a subscriber may do anything, a call of llama.cpp included.
        if let Some((level, line)) = line {
            emit(level, &line);
        }
    });
    if let Err(panic) = outcome {
        // Fails while the thread ends. Nobody waits for its messages then.
        let _ = THREAD.try_with(|thread| {
            if let Ok(mut thread) = thread.try_borrow_mut()
                && let Some(captured) = &mut thread.captured
            {
                captured.panic.get_or_insert(panic);
            }
        });
    }
}

impl Thread {
    /// Adds a message; returns the line that it completes.
    fn take(&mut self, level: sys::ggml_log_level, text: &str) -> Option<(sys::ggml_log_level, String)> {
        if level != sys::GGML_LOG_LEVEL_CONT {
            self.level = level;
        }
        self.line.push_str(text);
        if !text.ends_with('\n') {
            return None;
        }
        let line = std::mem::take(&mut self.line).trim_end().to_owned();
        if self.level == sys::GGML_LOG_LEVEL_ERROR
            && let Some(Captured { errors, .. }) = &mut self.captured
            && errors.len() < MOST
        {
            errors.push(without_function(&line).to_owned());
        }
        Some((self.level, line))
    }
}

/// llama.cpp begins its lines with the name of a function, which says nothing to who reads an error.
fn without_function(line: &str) -> &str {
    match line.split_once(": ") {
        Some((name, rest))
            if !rest.is_empty() && name.chars().all(|c| c == '_' || c.is_ascii_alphanumeric()) =>
        {
            rest
        }
        _ => line,
    }
}

/// What llama.cpp warns of wherever a model comes without its tokenizer, as all that are made from checkpoints do.
const EXPECTED: &str = "dummy tokens";

/// Loading a model takes a hundred lines that llama.cpp calls information; a host sees them when it looks for them.
fn emit(level: sys::ggml_log_level, line: &str) {
    match level {
        _ if line.is_empty() || line.chars().all(|c| c == '.') => {}
        sys::GGML_LOG_LEVEL_ERROR => tracing::error!(target: "llama_cpp", "{line}"),
        sys::GGML_LOG_LEVEL_WARN if line.ends_with(EXPECTED) => {
            tracing::debug!(target: "llama_cpp", "{line}");
        }
        sys::GGML_LOG_LEVEL_WARN => tracing::warn!(target: "llama_cpp", "{line}"),
        sys::GGML_LOG_LEVEL_INFO => tracing::debug!(target: "llama_cpp", "{line}"),
        _ => tracing::trace!(target: "llama_cpp", "{line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send(level: sys::ggml_log_level, text: &CStr) {
        // SAFETY: The text is a string that ends with NUL.
        unsafe { on_message(level, text.as_ptr(), std::ptr::null_mut()) };
    }

    #[test]
    fn errors_are_collected_line_by_line() {
        let ((), errors) = capture(|| {
            send(sys::GGML_LOG_LEVEL_INFO, c"load: all is well\n");
            send(sys::GGML_LOG_LEVEL_ERROR, c"llama_model_load: error loading model: ");
            send(sys::GGML_LOG_LEVEL_CONT, c"no such thing\n");
            send(sys::GGML_LOG_LEVEL_ERROR, c"and: this\n");
        });
        assert_eq!(errors.why(), "error loading model: no such thing; this");
        send(sys::GGML_LOG_LEVEL_ERROR, c"nobody collects this\n");
        let (one, log) = capture(|| 1);
        assert_eq!((one, log.why().as_str()), (1, "it does not say why"));
    }

    /// A subscriber that panics at each message of llama.cpp.
    struct Panicking;

    impl tracing::Subscriber for Panicking {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, _: &tracing::Event<'_>) {
            panic!("the host's own bug");
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }

    #[test]
    fn a_subscriber_that_panics_fails_the_call() {
        let ((), log) = tracing::subscriber::with_default(Panicking, || {
            capture(|| {
                send(sys::GGML_LOG_LEVEL_WARN, c"one\n");
                send(sys::GGML_LOG_LEVEL_ERROR, c"load: two\n");
            })
        });
        let error = log.check_panics().unwrap_err().to_string();
        assert_eq!(error, "the listener to llama.cpp's log panicked: the host's own bug");
        assert_eq!(log.why(), "two");
        // Nothing is left for the next call.
        assert!(capture(|| send(sys::GGML_LOG_LEVEL_WARN, c"three\n")).1.check_panics().is_ok());
    }

    #[test]
    fn what_is_no_function_stays() {
        assert_eq!(without_function("tensor 'a b': too short"), "tensor 'a b': too short");
        assert_eq!(without_function("plain"), "plain");
        assert_eq!(without_function("f: "), "f: ");
    }
}
