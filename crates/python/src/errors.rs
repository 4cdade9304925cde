//! Errors of the library as exceptions. The classes are written in Python (`ternion/errors.py`), because most have two bases.

use pyo3::{prelude::*, types::PyDict};
use ternion::{Error, ErrorKind};

/// The exception for `error`: of the class for its kind, with operation and context as attributes.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    make(py, error).unwrap_or_else(|failure| failure)
}

fn make(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let context = PyDict::new(py);
    for (key, value) in error.context() {
        context.set_item(key, value)?;
    }
    let make = py.import("ternion.errors")?.getattr("from_native")?;
    let arguments =
        (error.kind().as_str(), error.to_string(), error.operation(), error.is_retryable(), context);
    Ok(PyErr::from_value(make.call1(arguments)?))
}

/// What a call gets on an object whose model has been closed.
pub(crate) fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the model has been closed")
}

/// The process that has made an object. The threads behind it do not exist in a fork of that process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Process(u32);

impl Process {
    pub(crate) fn current() -> Self {
        Self(std::process::id())
    }

    /// # Errors
    /// The exception for [`Closed`](ErrorKind::Closed) in a fork.
    pub(crate) fn check(self, py: Python<'_>) -> PyResult<()> {
        if std::process::id() == self.0 {
            return Ok(());
        }
        let message = "the model was loaded before this process was forked; load it after the fork";
        Err(exception(py, &Error::new(ErrorKind::Closed, message)))
    }
}
