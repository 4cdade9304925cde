//! Waiting for the library's futures from Python: a thread blocks without the GIL, an event loop is called back.

use std::{
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use pyo3::prelude::*;
use ternion::{Error, ErrorKind};
use tokio::runtime::{Builder, Runtime};

use crate::errors::exception;

/// How often a blocked thread lets Python run its signal handlers, so that Ctrl-C takes effect.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(10);

/// The tokio runtime of this process.
///
/// A fork gets a new one, because it has none of its parent's threads. No runtime is ever dropped: that would wait for
/// threads that do not exist in a fork, and for ones that wait for the GIL when Python exits.
///
/// # Errors
/// The exception for [`ResourceExhausted`](ErrorKind::ResourceExhausted) if its threads cannot be started.
pub(crate) fn runtime(py: Python<'_>) -> PyResult<&'static Runtime> {
    static RUNTIME: Mutex<Option<(u32, &'static Runtime)>> = Mutex::new(None);
    let process = std::process::id();
    let mut current = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((owner, runtime)) = *current
        && owner == process
    {
        return Ok(runtime);
    }
    let built = Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("ternion-python")
        .enable_all()
        .build()
        .map_err(|e| {
            let error = Error::new(ErrorKind::ResourceExhausted, "cannot start a tokio runtime");
            exception(py, &error.with_source(e))
        })?;
    let runtime: &'static Runtime = Box::leak(Box::new(built));
    *current = Some((process, runtime));
    Ok(runtime)
}

/// Blocks this thread until `poll` is ready. Other threads of Python run meanwhile.
///
/// # Errors
/// What a signal handler raises, such as `KeyboardInterrupt`.
pub(crate) fn block<T: Send>(
    py: Python<'_>,
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<T> + Send,
) -> PyResult<T> {
    let _runtime = runtime(py)?.enter();
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        let ready = py.detach(|| {
            let mut context = Context::from_waker(&waker);
            let pause = Instant::now() + SIGNAL_INTERVAL;
            loop {
                if let Poll::Ready(value) = poll(&mut context) {
                    return Some(value);
                }
                let left = pause.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return None;
                }
                thread::park_timeout(left);
            }
        });
        match ready {
            Some(value) => return Ok(value),
            None => py.check_signals()?,
        }
    }
}

/// Polls once. If the value is not ready, `callback` is called without arguments when it is worth to poll again: once, and
/// from another thread.
///
/// # Errors
/// If the runtime cannot be started.
pub(crate) fn poll_once<T: Send>(
    py: Python<'_>,
    callback: Py<PyAny>,
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<T> + Send,
) -> PyResult<Poll<T>> {
    let runtime = runtime(py)?;
    let _entered = runtime.enter();
    let waker = Waker::from(Arc::new(Callback { function: Mutex::new(Some(callback)), runtime }));
    Ok(py.detach(|| poll(&mut Context::from_waker(&waker))))
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

struct Callback {
    function: Mutex<Option<Py<PyAny>>>,
    runtime: &'static Runtime,
}

impl Wake for Callback {
    fn wake(self: Arc<Self>) {
        let function = self.function.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(function) = function else { return };
        // On a thread for blocking work: the thread of the engine must not wait for the GIL.
        self.runtime.spawn_blocking(move || {
            // `None` when Python exits; nobody waits any more.
            Python::try_attach(|py| {
                if let Err(error) = function.call0(py) {
                    error.write_unraisable(py, None);
                }
            });
        });
    }
}
