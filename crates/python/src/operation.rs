//! One result that takes time, such as a model that is loaded.

use std::{future::Future, pin::Pin, task::Poll};

use pyo3::{exceptions::PyRuntimeError, prelude::*};
use ternion::Result;

use crate::{
    errors::{Process, exception},
    slot::{Found, Slot},
    wait,
};

type ToPython = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;
type Work = Pin<Box<dyn Future<Output = Result<ToPython>> + Send>>;

/// Work with one result: a thread waits for it, or an event loop polls it.
#[pyclass(frozen, module = "ternion._native")]
pub(crate) struct Operation {
    work: Slot<Work>,
    process: Process,
}

impl Operation {
    /// The work of `future`, whose result `convert` turns into an object of Python.
    pub(crate) fn new<T: Send + 'static>(
        future: impl Future<Output = Result<T>> + Send + 'static,
        convert: impl FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> Self {
        let work = async move {
            let value = future.await?;
            let to_python: ToPython = Box::new(move |py| convert(py, value));
            Ok(to_python)
        };
        Self { work: Slot::new(Box::pin(work)), process: Process::current() }
    }

    fn take(&self, py: Python<'_>) -> PyResult<Work> {
        self.process.check(py)?;
        match self.work.take() {
            Found::Value(work) => Ok(work),
            Found::Busy | Found::Closed => {
                Err(PyRuntimeError::new_err("the result is awaited elsewhere or has been taken"))
            }
        }
    }
}

fn finish(py: Python<'_>, result: Result<ToPython>) -> PyResult<Py<PyAny>> {
    match result {
        Ok(to_python) => to_python(py),
        Err(error) => Err(exception(py, &error)),
    }
}

#[pymethods]
impl Operation {
    /// Blocks until the result is there. A signal handler that raises gives the work up.
    fn wait(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let mut work = self.take(py)?;
        self.work.close();
        let result = wait::block(py, |context| work.as_mut().poll(context))?;
        finish(py, result)
    }

    /// The result, or `...` while it is not there. Then `callback` is called once, from another thread, when it is worth to
    /// poll again.
    fn poll(&self, py: Python<'_>, callback: Py<PyAny>) -> PyResult<Py<PyAny>> {
        let mut work = self.take(py)?;
        match wait::poll_once(py, callback, |context| work.as_mut().poll(context))? {
            Poll::Ready(result) => {
                self.work.close();
                finish(py, result)
            }
            Poll::Pending => {
                self.work.put(work);
                Ok(py.Ellipsis())
            }
        }
    }

    /// Gives the work up.
    fn cancel(&self) {
        self.work.close();
    }
}
