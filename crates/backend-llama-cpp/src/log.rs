//! llama.cpp's log: to `tracing`, and its errors to the error of the call that they explain.
//!
//! Functions of llama.cpp return NULL or a number; the reason is only in the log. [`capture`] collects the errors that
//! the calling thread logs meanwhile.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};

use llama_cpp_sys_2 as sys;

/// Lines of errors that are kept for one call.
const MOST: usize = 8;

#[derive(Default)]
struct Thread {
    /// A line that has not ended, and its level.
    line: String,
    level: sys::ggml_log_level,
    /// Errors, while someone collects them.
    errors: Option<Vec<String>>,
}

thread_local! {
    static THREAD: RefCell<Thread> = RefCell::default();
}

/// Sends llama.cpp's and ggml's messages here.
pub(crate) fn install() {
    // SAFETY: The callback is a function with the signature that is asked for and uses no user data.
    unsafe { sys::llama_log_set(Some(on_message), std::ptr::null_mut()) };
}

/// Runs `f` and returns the errors that llama.cpp logged on this thread, joined; empty if there were none.
pub(crate) fn capture<T>(f: impl FnOnce() -> T) -> (T, String) {
    THREAD.with_borrow_mut(|thread| thread.errors = Some(Vec::new()));
    let result = f();
    let errors = THREAD.with_borrow_mut(|thread| thread.errors.take()).unwrap_or_default();
    (result, errors.join("; "))
}

unsafe extern "C" fn on_message(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a string that ends with NUL and lives for the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let line = THREAD.with_borrow_mut(|thread| thread.take(level, &text));
    // Out of the borrow: a subscriber may do anything, a call of llama.cpp included.
    if let Some((level, line)) = line {
        emit(level, &line);
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
            && let Some(errors) = &mut self.errors
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
        assert_eq!(errors, "error loading model: no such thing; this");
        send(sys::GGML_LOG_LEVEL_ERROR, c"nobody collects this\n");
        assert_eq!(capture(|| 1), (1, String::new()));
    }

    #[test]
    fn what_is_no_function_stays() {
        assert_eq!(without_function("tensor 'a b': too short"), "tensor 'a b': too short");
        assert_eq!(without_function("plain"), "plain");
        assert_eq!(without_function("f: "), "f: ");
    }
}
