//! Keeps panics out of llama.cpp.
//!
//! A panic that leaves an `extern "C"` function ends the process. Every callback therefore runs under a [`Guard`], which
//! catches the panic and remembers it. Whoever called into llama.cpp asks the guard afterwards and returns the error.

use std::sync::{Mutex, PoisonError};

use ternion_core::{Error, Result, catch_panic};

/// The first panic or error of the callbacks that share this guard.
#[derive(Default)]
pub(crate) struct Guard {
    first: Mutex<Option<String>>,
    /// The callback that is to panic.
    #[cfg(test)]
    injected: Mutex<Option<&'static str>>,
}

impl Guard {
    /// Runs the body of a callback, `name` in errors. Returns `None` after a panic.
    pub(crate) fn run<R>(&self, name: &'static str, body: impl FnOnce() -> R) -> Option<R> {
        let body = || {
            #[cfg(test)]
            self.panic_if_injected(name);
            body()
        };
        match catch_panic(body) {
            Ok(result) => Some(result),
            Err(panic) => {
                let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert_with(|| format!("{name} panicked: {panic}"));
                None
            }
        }
    }

    /// Remembers that the callback `name` has failed.
    pub(crate) fn fail(&self, name: &str, error: &Error) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| format!("{name}: {error}"));
    }

    /// An error if a callback has panicked or failed since the last call.
    ///
    /// # Errors
    /// [`Backend`](ternion_core::ErrorKind::Backend) with the name of the callback and the message of the panic or error.
    pub(crate) fn check(&self) -> Result<()> {
        match self.first.lock().unwrap_or_else(PoisonError::into_inner).take() {
            None => Ok(()),
            Some(panic) => Err(Error::backend(panic)),
        }
    }

    /// Makes the callback `name` panic from now on; `None` ends that.
    #[cfg(test)]
    pub(crate) fn inject(&self, name: Option<&'static str>) {
        *self.injected.lock().unwrap_or_else(PoisonError::into_inner) = name;
    }

    #[cfg(test)]
    fn panic_if_injected(&self, name: &str) {
        let injected = *self.injected.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(injected != Some(name), "injected");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_panic_is_reported_once() {
        let guard = Guard::default();
        assert_eq!(guard.run("one", || 1), Some(1));
        assert_eq!(guard.run("two", || -> u32 { panic!("first") }), None);
        assert_eq!(guard.run("three", || -> u32 { panic!("second") }), None);
        assert_eq!(guard.check().unwrap_err().to_string(), "two panicked: first");
        assert!(guard.check().is_ok());
    }
}
