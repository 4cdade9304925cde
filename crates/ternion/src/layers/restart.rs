//! A stream that is begun again, by a retry or on another model, as long as no token of it was delivered.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use async_trait::async_trait;
use futures_core::Stream;
use ternion_core::{Error, Event, GenerateStream, PrefillEvent, Result};

/// Where another stream comes from when one has failed.
#[async_trait]
pub(crate) trait Attempts: Send {
    /// The stream of the next attempt after one that failed with `error`.
    ///
    /// # Errors
    /// The error that the caller is to see, if there is no further attempt.
    async fn again(&mut self, error: Error) -> Result<GenerateStream>;
}

/// A stream over all `attempts`; `first` is the outcome of the one that was made already.
pub(crate) async fn start(
    mut attempts: Box<dyn Attempts>,
    first: Result<GenerateStream>,
) -> Result<GenerateStream> {
    let current = match first {
        Ok(stream) => stream,
        Err(error) => attempts.again(error).await?,
    };
    let state = State::Reading { current, attempts: Some(attempts) };
    Ok(GenerateStream::new(Restartable { state, prefilled: 0 }))
}

type Beginning = Pin<Box<dyn Future<Output = (Box<dyn Attempts>, Result<GenerateStream>)> + Send>>;

enum State {
    /// `attempts` is given up at the first token.
    Reading {
        current: GenerateStream,
        attempts: Option<Box<dyn Attempts>>,
    },
    Beginning(Beginning),
    Ended,
}

struct Restartable {
    state: State,
    /// Prompt tokens that were reported as computed: a new beginning does not count backwards.
    prefilled: usize,
}

impl Stream for Restartable {
    type Item = Result<Event>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            match &mut this.state {
                State::Ended => return Poll::Ready(None),
                State::Beginning(beginning) => match ready!(beginning.as_mut().poll(cx)) {
                    (attempts, Ok(current)) => {
                        this.state = State::Reading { current, attempts: Some(attempts) };
                    }
                    (_, Err(error)) => {
                        this.state = State::Ended;
                        return Poll::Ready(Some(Err(error)));
                    }
                },
                State::Reading { current, attempts } => match ready!(Pin::new(current).poll_next(cx)) {
                    Some(Ok(Event::Prefill(PrefillEvent { done, .. }))) if done <= this.prefilled => {}
                    Some(Ok(event)) => {
                        match &event {
                            Event::Prefill(PrefillEvent { done, .. }) => this.prefilled = *done,
                            _ => *attempts = None,
                        }
                        return Poll::Ready(Some(Ok(event)));
                    }
                    Some(Err(error)) => {
                        if let Some(mut attempts) = attempts.take() {
                            this.state = State::Beginning(Box::pin(async move {
                                let outcome = attempts.again(error).await;
                                (attempts, outcome)
                            }));
                        } else {
                            this.state = State::Ended;
                            return Poll::Ready(Some(Err(error)));
                        }
                    }
                    None => {
                        this.state = State::Ended;
                        return Poll::Ready(None);
                    }
                },
            }
        }
    }
}
