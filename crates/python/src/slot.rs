//! A place for something that one caller at a time uses.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Holds a value that a caller takes, uses without the GIL, and puts back. No lock is held meanwhile, so that a second
/// thread gets an answer instead of waiting with the GIL in its hands.
#[derive(Debug)]
pub(crate) struct Slot<T>(Mutex<State<T>>);

#[derive(Debug)]
enum State<T> {
    Idle(T),
    Taken,
    Closed,
}

/// What [`Slot::take`] finds.
pub(crate) enum Found<T> {
    Value(T),
    /// Another thread uses the value.
    Busy,
    /// The value is gone for good.
    Closed,
}

impl<T> Slot<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Mutex::new(State::Idle(value)))
    }

    pub(crate) fn take(&self) -> Found<T> {
        let mut state = self.state();
        match std::mem::replace(&mut *state, State::Taken) {
            State::Idle(value) => Found::Value(value),
            State::Taken => Found::Busy,
            State::Closed => {
                *state = State::Closed;
                Found::Closed
            }
        }
    }

    /// Puts a value back that was taken. It is dropped if the slot has been closed meanwhile.
    pub(crate) fn put(&self, value: T) {
        let mut state = self.state();
        if matches!(*state, State::Taken) {
            *state = State::Idle(value);
        }
    }

    /// Drops the value, or makes [`put`](Self::put) drop it.
    pub(crate) fn close(&self) {
        let old = std::mem::replace(&mut *self.state(), State::Closed);
        drop(old);
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
