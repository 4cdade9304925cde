//! The reading end of a request.

use std::{
    collections::VecDeque,
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

use ternion_core::{
    DoneEvent, Error, Event, FinishReason, Result, TokenEvent, answer::AnswerParser, context::ContextStep,
};

use crate::engine::{Command, Process, stopped};

/// Wakes the engine's thread when it is dropped, so that a request that nobody waits for ends soon.
pub(crate) struct WakeOnDrop(pub(crate) mpsc::Sender<Command>);

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        // Fails only if the thread has ended.
        let _ = self.0.send(Command::Wake);
    }
}

/// What the engine's thread sends to a reader: one message for each step, which may be several events.
pub(crate) enum Message {
    Event(Event),
    /// The tokens of a step, at least one: the one that the model chose, and those that follow it without a choice. Each with the
    /// text that is certain with it.
    Tokens(Vec<(TokenEvent, String)>),
    /// The end: the text that was held back, what was done to fit the input, and the last event.
    End(String, Option<ContextStep>, DoneEvent),
}

/// The events of one generation.
pub(crate) struct Events {
    messages: channel::Receiver<Result<Message>>,
    /// Tells thoughts and calls from text.
    parser: AnswerParser,
    /// Events of a message that are still to be read.
    pending: VecDeque<Event>,
    /// Given up at the end, so that a finished stream does not keep the model alive.
    commands: Option<WakeOnDrop>,
    /// Whether the job waits for this reader.
    waits: Arc<AtomicBool>,
    process: Process,
}

impl Events {
    pub(crate) fn new(
        messages: channel::Receiver<Result<Message>>,
        parser: AnswerParser,
        commands: mpsc::Sender<Command>,
        waits: Arc<AtomicBool>,
        process: Process,
    ) -> Self {
        Self {
            messages,
            parser,
            pending: VecDeque::new(),
            commands: Some(WakeOnDrop(commands)),
            waits,
            process,
        }
    }

    /// Takes a message apart and returns its first event.
    fn read(&mut self, message: Message) -> Event {
        match message {
            Message::Event(event) => event,
            Message::Tokens(tokens) => {
                for (token, piece) in tokens {
                    self.pending.push_back(Event::Token(token));
                    self.pending.extend(self.parser.push(&piece));
                }
                self.pending.pop_front().expect("invariant: a step has at least one token")
            }
            Message::End(piece, report, mut done) => {
                self.commands = None;
                let mut events = self.parser.push(&piece);
                events.extend(self.parser.finish());
                events.extend(report.map(Event::Context));
                if done.finish_reason == FinishReason::EndOfSequence && self.parser.calls() > 0 {
                    done.finish_reason = FinishReason::ToolCalls;
                }
                self.pending.extend(events);
                match self.pending.pop_front() {
                    Some(first) => {
                        self.pending.push_back(Event::Done(done));
                        first
                    }
                    None => Event::Done(done),
                }
            }
        }
    }

    /// An error, after which nothing comes.
    fn fail(&mut self, error: Error) -> Poll<Option<Result<Event>>> {
        self.commands = None;
        Poll::Ready(Some(Err(error.with_operation("generate"))))
    }
}

impl Stream for Events {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(event) = self.pending.pop_front() {
            return Poll::Ready(Some(Ok(event)));
        }
        if self.commands.is_none() {
            return Poll::Ready(None);
        }
        match self.messages.poll_recv(cx) {
            Poll::Pending => match self.process.check() {
                Ok(()) => Poll::Pending,
                Err(error) => self.fail(error),
            },
            Poll::Ready(Some(Err(error))) => self.fail(error),
            Poll::Ready(Some(Ok(message))) => {
                // The thread sets this and then looks for room, which is made by now.
                fence(Ordering::SeqCst);
                if self.waits.load(Ordering::SeqCst)
                    && let Some(WakeOnDrop(commands)) = &self.commands
                {
                    // Fails only if the thread has ended.
                    let _ = commands.send(Command::Wake);
                }
                Poll::Ready(Some(Ok(self.read(message))))
            }
            Poll::Ready(None) => self.fail(stopped()),
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // Before the thread is woken, which looks at this.
        self.messages.close();
    }
}
