//! The events of one generation.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::{Stream as _, TryStreamExt as _, stream};
use pyo3::{exceptions::PyValueError, prelude::*};
use ternion::{
    CancellationToken, Error, Event, GenerateParams, GenerateRequest, GenerateStream, LlmBackend, Result,
};
use tokio::task::JoinError;
use tokio_util::sync::DropGuard;

use crate::{
    convert,
    errors::{Process, exception},
    operation::Operation,
    slot::{Found, Slot},
    wait,
};

/// The events of a generation, which ends when this object is dropped.
#[pyclass(frozen, module = "ternion._native")]
pub(crate) struct Stream {
    events: Slot<Events>,
    cancel: CancellationToken,
    process: Process,
}

struct Events {
    stream: GenerateStream,
    /// Whether events are shown that tell only how far the work is.
    with_progress: bool,
    /// Cancels the request, also while its prompt is still encoded.
    guard: DropGuard,
}

impl Stream {
    /// Starts a generation on the runtime's threads. Errors of the request come with the first event.
    pub(crate) fn start(
        py: Python<'_>,
        backend: Arc<dyn LlmBackend>,
        params: GenerateParams,
        with_progress: bool,
    ) -> PyResult<Self> {
        let request = GenerateRequest::from(params);
        let cancel = request.cancel.clone();
        let guard = cancel.clone().drop_guard();
        let started = wait::runtime(py)?.spawn(async move { backend.generate(request).await });
        let started = async { started.await.unwrap_or_else(panicked) };
        let stream = GenerateStream::new(stream::once(started).try_flatten());
        let events = Events { stream, with_progress, guard };
        Ok(Self { events: Slot::new(events), cancel, process: Process::current() })
    }

    /// `None` at the end.
    fn take(&self, py: Python<'_>) -> PyResult<Option<Events>> {
        self.process.check(py)?;
        match self.events.take() {
            Found::Value(events) => Ok(Some(events)),
            Found::Closed => Ok(None),
            Found::Busy => Err(PyValueError::new_err("the stream is being read by another thread")),
        }
    }

    /// Puts the stream back after an event. After the last one, or an error, it is dropped.
    fn deliver(
        &self,
        py: Python<'_>,
        events: Events,
        item: Option<Result<Event>>,
    ) -> PyResult<Option<Py<PyAny>>> {
        match item {
            Some(Ok(event)) => {
                self.events.put(events);
                convert::to_python(py, &event).map(Some)
            }
            Some(Err(error)) => {
                self.events.close();
                Err(exception(py, &error))
            }
            None => {
                self.events.close();
                Ok(None)
            }
        }
    }
}

impl Events {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Event>>> {
        loop {
            let next = Pin::new(&mut self.stream).poll_next(context);
            match next {
                Poll::Ready(Some(Ok(Event::Token(_) | Event::Prefill(_) | Event::Context(_))))
                    if !self.with_progress => {}
                next => return next,
            }
        }
    }
}

/// The error of a task that did not end by itself.
fn panicked<T>(error: JoinError) -> Result<T> {
    Err(Error::backend("the request panicked").with_source(error))
}

#[pymethods]
impl Stream {
    /// Blocks until the next event is there; `None` at the end. A signal handler that raises ends the generation.
    fn next(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let Some(mut events) = self.take(py)? else { return Ok(None) };
        match wait::block(py, |context| events.poll(context)) {
            Ok(item) => self.deliver(py, events, item),
            Err(raised) => {
                self.close();
                Err(raised)
            }
        }
    }

    /// The next event, `None` at the end, or `...` while there is none. Then `callback` is called once, from another thread,
    /// when it is worth to poll again.
    fn poll(&self, py: Python<'_>, callback: Py<PyAny>) -> PyResult<Option<Py<PyAny>>> {
        let Some(mut events) = self.take(py)? else { return Ok(None) };
        match wait::poll_once(py, callback, |context| events.poll(context))? {
            Poll::Ready(item) => self.deliver(py, events, item),
            Poll::Pending => {
                self.events.put(events);
                Ok(Some(py.Ellipsis()))
            }
        }
    }

    /// The whole answer, from here on.
    fn collect(&self, py: Python<'_>) -> PyResult<Operation> {
        let Some(events) = self.take(py)? else {
            return Err(PyValueError::new_err("the stream has ended"));
        };
        self.events.close();
        let Events { stream, guard, .. } = events;
        // On the runtime, so that several answers come at the same time though one is waited for.
        let collected = wait::runtime(py)?.spawn(stream.collect());
        let answer = async move {
            let _guard = guard;
            collected.await.unwrap_or_else(panicked)
        };
        Ok(Operation::new(answer, |py, answer| convert::to_python(py, &answer)))
    }

    /// Ends the generation.
    fn close(&self) {
        self.cancel.cancel();
        self.events.close();
    }
}
