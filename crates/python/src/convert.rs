//! Values between Python and the serde forms of the library's types.

use pyo3::prelude::*;
use pythonize::Depythonizer;
use serde::{Serialize, de::DeserializeOwned};
use ternion::Error;

use crate::errors::exception;

/// Reads a value; an error names the place, such as `sampling.top_k`.
///
/// # Errors
/// The exception for [`InvalidRequest`](ternion::ErrorKind::InvalidRequest).
pub(crate) fn from_python<T: DeserializeOwned>(value: &Bound<'_, PyAny>) -> PyResult<T> {
    serde_path_to_error::deserialize(&mut Depythonizer::from_object(value)).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.inner().to_string();
        // Python's own errors begin with their class.
        let what = match inner.split_once(": ") {
            Some(("OverflowError", _)) => "the number is out of range",
            Some((class, rest)) if class.ends_with("Error") => rest,
            _ => &inner,
        };
        let message = match path.as_str() {
            "." => what.to_owned(),
            _ => format!("{path}: {what}"),
        };
        exception(value.py(), &Error::invalid_request(message))
    })
}

/// A value as dictionaries, lists, strings and numbers.
///
/// # Errors
/// Where Python has no memory for it.
pub(crate) fn to_python<T: Serialize>(py: Python<'_>, value: &T) -> PyResult<Py<PyAny>> {
    Ok(pythonize::pythonize(py, value)?.unbind())
}
