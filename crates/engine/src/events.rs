//! The reading end of a request.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering, fence},
        mpsc,
    },
    task::{Context, Poll},
};

use futures_core::Stream;
use tokio::sync::mpsc as channel;

use ternion_core::{Event, Result};

use crate::engine::{Command, Process, stopped};

/// Wakes the engine's thread when it is dropped, so that a request that nobody waits for ends soon.
pub(crate) struct WakeOnDrop(pub(crate) mpsc::Sender<Command>);

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        // Fails only if the thread has ended.
        let _ = self.0.send(Command::Wake);
    }
}

/// The events of one generation.
pub(crate) struct Events {
    events: channel::Receiver<Result<Event>>,
    /// Given up at the end, so that a finished stream does not keep the model alive.
    commands: Option<WakeOnDrop>,
    /// Whether the job waits for this reader.
    waits: Arc<AtomicBool>,
    process: Process,
}

impl Events {
    pub(crate) fn new(
        events: channel::Receiver<Result<Event>>,
        commands: mpsc::Sender<Command>,
        waits: Arc<AtomicBool>,
        process: Process,
    ) -> Self {
        Self { events, commands: Some(WakeOnDrop(commands)), waits, process }
    }

    /// The last event: nothing comes after it.
    fn end(&mut self, event: Result<Event>) -> Poll<Option<Result<Event>>> {
        self.commands = None;
        Poll::Ready(Some(event))
    }
}

impl Stream for Events {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.commands.is_none() {
            return Poll::Ready(None);
        }
        match self.events.poll_recv(cx) {
            Poll::Pending => match self.process.check() {
                Ok(()) => Poll::Pending,
                Err(error) => self.end(Err(error.during("generate"))),
            },
            Poll::Ready(Some(event)) if matches!(event, Err(_) | Ok(Event::Done { .. })) => self.end(event),
            Poll::Ready(Some(event)) => {
                // The thread sets this and then looks for room, which is made by now.
                fence(Ordering::SeqCst);
                if self.waits.load(Ordering::SeqCst)
                    && let Some(WakeOnDrop(commands)) = &self.commands
                {
                    // Fails only if the thread has ended.
                    let _ = commands.send(Command::Wake);
                }
                Poll::Ready(Some(event))
            }
            Poll::Ready(None) => self.end(Err(stopped().during("generate"))),
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // Before the thread is woken, which looks at this.
        self.events.close();
    }
}
