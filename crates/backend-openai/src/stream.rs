//! The task that reads one answer: from the place in the queue over attempts and chunks to the last event.
//!
//! A task, and not the reader, reads the response: a reader who stops reading keeps no sequence of the server busy, and a
//! server that stops sending is told from a reader who is slow. What a reader has not read is bounded.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_core::Stream;
use reqwest::{Response, Url};
use ternion_core::{CancellationToken, Error, Event, GenerateStream, Result, ResultExt};
use tokio::{
    sync::mpsc::{self, Receiver, Sender},
    task::JoinHandle,
};

use crate::{
    admission::Place,
    answer::Answer,
    client::Client,
    retry::Waits,
    sse::{Events, Next},
};

/// Events that may wait for their reader. The longest answers have some ten thousand.
const CAPACITY: usize = 1 << 15;

/// One request on its way.
pub(crate) struct Job {
    pub(crate) client: Arc<Client>,
    pub(crate) url: Url,
    pub(crate) body: Bytes,
    pub(crate) place: Place,
    pub(crate) answer: Answer,
    pub(crate) cancel: CancellationToken,
    pub(crate) waits: Waits,
    /// The response, if the server has accepted the request.
    pub(crate) response: Option<Response>,
    /// Events that are not sent to the reader yet.
    pub(crate) pending: VecDeque<Event>,
}

impl Job {
    /// The events of the answer, read by a task of its own. Dropping them ends the task and closes the connection.
    pub(crate) fn start(self) -> GenerateStream {
        let (sender, receiver) = mpsc::channel(CAPACITY);
        let task = tokio::spawn(self.run(sender));
        GenerateStream::new(Answering { receiver, task, ended: false })
    }

    async fn run(mut self, sender: Sender<Result<Event>>) {
        let cancel = self.cancel.clone();
        let outcome = tokio::select! {
            biased;
            () = cancel.cancelled() => None,
            outcome = self.answer(&sender) => Some(outcome),
        };
        let mut events = Vec::new();
        let end = match outcome {
            Some(Ok(())) => self.answer.end(&mut events),
            Some(Err(error)) => Err(error),
            None => Ok(self.answer.cancelled(&mut events)),
        };
        self.pending.extend(events);
        if let Ok(usage) = &end {
            self.place.count(usage);
        }
        // Who reads the last event finds the place free.
        let Self { place, mut pending, client, url, .. } = self;
        drop(place);
        if deliver(&sender, &mut pending).await
            && let Err(error) = end
        {
            let error = client.told(error, &url).with_operation("generate");
            // A reader that is gone needs no error.
            let _ = sender.send(Err(error)).await;
        }
    }

    /// Reads the answer up to its end. Cancel-safe: what has come is in `answer` and `pending`.
    async fn answer(&mut self, sender: &Sender<Result<Event>>) -> Result<()> {
        self.place.start().await;
        loop {
            let response = if let Some(response) = self.response.take() {
                response
            } else {
                self.answer.sent_now();
                self.client.open(&self.url, &self.body, &mut self.waits).await?
            };
            let (first, idle) = (self.client.first_byte(), self.client.idle);
            let mut stream = Events::new(response.bytes_stream(), first, idle);
            let failure = loop {
                match stream.next().await {
                    Ok(Next::Done) => return Ok(()),
                    Ok(Next::Chunk(chunk)) => {
                        let mut events = Vec::new();
                        let taken = self.answer.chunk(&chunk, &mut events);
                        self.pending.extend(events);
                        if !deliver(sender, &mut self.pending).await || self.answer.ended_here() {
                            return taken;
                        }
                        taken?;
                    }
                    Err(failure) => break failure,
                }
            };
            if stream.begun {
                return Err(failure.error);
            }
            // Nothing of the answer has come, so it can be asked for again.
            let delay = self.waits.next(failure)?;
            tokio::time::sleep(delay).await;
        }
    }
}

/// Gives the reader what waits for it; `false` if there is no reader any more. Cancel-safe.
async fn deliver(sender: &Sender<Result<Event>>, pending: &mut VecDeque<Event>) -> bool {
    while !pending.is_empty() {
        let Ok(permit) = sender.reserve().await else { return false };
        if let Some(event) = pending.pop_front() {
            permit.send(Ok(event));
        }
    }
    true
}

/// What the reader holds.
struct Answering {
    receiver: Receiver<Result<Event>>,
    task: JoinHandle<()>,
    ended: bool,
}

impl Stream for Answering {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = std::task::ready!(self.receiver.poll_recv(cx));
        if self.ended {
            return Poll::Ready(None);
        }
        let next = next.unwrap_or_else(|| {
            // Only a runtime that shuts down, or a panic, leaves an answer without its end.
            Err(Error::new(ternion_core::ErrorKind::Closed, "the task that reads the answer has stopped"))
                .with_operation("generate")
        });
        self.ended = matches!(next, Err(_) | Ok(Event::Done(_)));
        Poll::Ready(Some(next))
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.task.abort();
    }
}
