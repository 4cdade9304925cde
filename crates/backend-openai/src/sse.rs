//! The events of a response: pieces of data, with bounds on their size and on the time between them.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_core::Stream;
use futures_util::StreamExt;
use sse_stream::SseByteStream;
use ternion_core::{Error, ErrorKind};
use tokio::time::Sleep;

use crate::{
    client::no_byte,
    failure::{self, Failure},
    wire::Chunk,
};

/// Bytes of one event. An event holds a few tokens with their alternatives.
const MAX_EVENT: usize = 8 << 20;

/// What comes next in a response.
#[derive(Debug)]
pub(crate) enum Next {
    Chunk(Box<Chunk>),
    /// `[DONE]`: all has come.
    Done,
}

/// The events of one response.
pub(crate) struct Events {
    inner: SseByteStream<Guarded>,
    /// Bytes since the last event, counted by `Guarded`.
    bytes: Arc<AtomicUsize>,
    /// Whether a byte of the body has come.
    pub(crate) begun: bool,
}

impl Events {
    /// The events of `body`. Its first byte must come within `first`, each further piece within `idle`.
    pub(crate) fn new(
        body: impl Stream<Item = reqwest::Result<Bytes>> + Send + 'static,
        first: Duration,
        idle: Duration,
    ) -> Self {
        let bytes = Arc::new(AtomicUsize::new(0));
        let guarded =
            Guarded { body: Box::pin(body), limit: first, idle, sleep: None, bytes: Arc::clone(&bytes) };
        Self { inner: SseByteStream::new(guarded), bytes, begun: false }
    }

    /// The next event with data. A body that ends without `[DONE]` is an error, as the answer may be incomplete.
    ///
    /// Cancel-safe: what has come of an event is kept.
    pub(crate) async fn next(&mut self) -> Result<Next, Failure> {
        loop {
            let event = self.inner.next().await;
            self.begun |= matches!(event, Some(Ok(_))) || self.bytes.load(Ordering::Relaxed) > 0;
            let event = match event {
                None => return Err(self.cut_off()),
                Some(Err(sse_stream::Error::Body(error))) => return Err(broken(error)),
                Some(Err(error)) => {
                    let error = Error::backend("the stream of events is damaged").with_source(error);
                    return Err(Failure::lasting(error));
                }
                Some(Ok(event)) => event,
            };
            self.bytes.store(0, Ordering::Relaxed);
            // An event without data says nothing: the name of a kind, or how to reconnect.
            let Some(data) = event.data.filter(|data| !data.trim().is_empty()) else { continue };
            if data.trim() == "[DONE]" {
                return Ok(Next::Done);
            }
            return chunk(event.event.as_deref(), &data).map(|chunk| Next::Chunk(Box::new(chunk)));
        }
    }

    fn cut_off(&self) -> Failure {
        Failure::passing(Error::backend(if self.begun {
            "the server closed the connection before the end of the answer: no `[DONE]` came"
        } else {
            "the server closed the connection without an answer"
        }))
    }
}

/// The chunk in a piece of data, unless it is an error object.
fn chunk(event: Option<&str>, data: &str) -> Result<Chunk, Failure> {
    let chunk: Chunk = serde_json::from_str(data).map_err(|error| {
        let start = failure::shortened(&data.chars().take(200).collect::<String>());
        Failure::lasting(
            Error::backend(format!("the stream has a line that is no chunk: {start}")).with_source(error),
        )
    })?;
    let bare = chunk.object.as_deref() == Some("error") || event == Some("error");
    if let Some(error) = chunk.error.as_ref().or(chunk.detail.as_ref()) {
        return Err(Failure::lasting(failure::in_stream(error)));
    }
    if bare {
        let value = serde_json::from_str(data).unwrap_or_default();
        return Err(Failure::lasting(failure::in_stream(&value)));
    }
    Ok(chunk)
}

fn broken(error: Box<dyn std::error::Error + Send + Sync>) -> Failure {
    match error.downcast::<Broken>().map(|broken| *broken) {
        Ok(Broken::Transport(error)) => Failure::of_transport(error),
        Ok(Broken::Silent(limit)) => Failure::passing(no_byte(limit)),
        Ok(Broken::TooLong) => Failure::lasting(Error::backend(format!(
            "an event of the stream has more than {MAX_EVENT} bytes"
        ))),
        Err(error) => Failure::lasting(Error::new(ErrorKind::Backend, "the stream broke").with_source(error)),
    }
}

/// The bytes of a body, as long as they come in time and events end.
struct Guarded {
    body: Pin<Box<dyn Stream<Item = reqwest::Result<Bytes>> + Send>>,
    /// For the next piece.
    limit: Duration,
    /// For all after it.
    idle: Duration,
    /// Runs while the next piece is awaited.
    sleep: Option<Pin<Box<Sleep>>>,
    bytes: Arc<AtomicUsize>,
}

/// Why there are no more bytes.
#[derive(Debug)]
enum Broken {
    Transport(reqwest::Error),
    Silent(Duration),
    TooLong,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl std::error::Error for Broken {}

impl Stream for Guarded {
    type Item = Result<Bytes, Broken>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        match this.body.as_mut().poll_next(cx) {
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(Broken::Transport(error)))),
            Poll::Ready(Some(Ok(bytes))) => {
                (this.sleep, this.limit) = (None, this.idle);
                let held = this.bytes.fetch_add(bytes.len(), Ordering::Relaxed) + bytes.len();
                Poll::Ready(Some(if held > MAX_EVENT { Err(Broken::TooLong) } else { Ok(bytes) }))
            }
            Poll::Pending => {
                let limit = this.limit;
                let sleep = this.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
                match sleep.as_mut().poll(cx) {
                    Poll::Ready(()) => Poll::Ready(Some(Err(Broken::Silent(limit)))),
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    async fn all(pieces: Vec<&[u8]>) -> (Vec<String>, Option<Failure>) {
        let pieces: Vec<reqwest::Result<Bytes>> =
            pieces.into_iter().map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let mut events = Events::new(stream::iter(pieces), Duration::from_secs(1), Duration::from_secs(1));
        let mut texts = Vec::new();
        loop {
            match events.next().await {
                Ok(Next::Chunk(chunk)) => {
                    texts.extend(chunk.choices.unwrap_or_default().into_iter().filter_map(|c| c.text));
                }
                Ok(Next::Done) => return (texts, None),
                Err(failure) => return (texts, Some(failure)),
            }
        }
    }

    const STREAM: &str = ": keep-alive\r\n\r\ndata: {\"choices\":\r\ndata: [{\"text\": \"zwölf \u{1f31e}\"}]}\r\n\r\n\
                          event: ping\ndata:\n\nid: 1\ndata: {\"choices\": [{\"text\": \"b\"}]}\n\nretry: 5\n\ndata: [DONE]\n\n";

    #[tokio::test]
    async fn events_are_the_same_wherever_the_bytes_are_cut() {
        let bytes = STREAM.as_bytes();
        for at in 0..=bytes.len() {
            let (texts, failure) = all(vec![&bytes[..at], &bytes[at..]]).await;
            assert_eq!(texts, ["zwölf \u{1f31e}", "b"], "cut at {at}");
            assert!(failure.is_none());
        }
        assert_eq!(all(bytes.chunks(1).collect()).await.0, ["zwölf \u{1f31e}", "b"]);
    }

    #[tokio::test]
    async fn an_end_without_done_is_an_error() {
        let (texts, failure) = all(vec![b"data: {\"choices\": [{\"text\": \"a\"}]}\n\ndata: {\"cho"]).await;
        assert_eq!(texts, ["a"]);
        assert!(failure.unwrap().error.message().contains("no `[DONE]`"));
        let failure = all(vec![]).await.1.unwrap();
        assert!(failure.again && failure.error.message().contains("without an answer"));
    }

    #[tokio::test]
    async fn error_objects_in_the_stream_are_errors() {
        for (data, kind) in [
            (
                r#"{"error": {"message": "out of memory", "type": "server_error", "code": 500}}"#,
                ErrorKind::Backend,
            ),
            (r#"{"error": {"message": "m", "code": "context_length_exceeded"}}"#, ErrorKind::ContextOverflow),
            (r#"{"error": {"message": "m", "code": 429}}"#, ErrorKind::Busy),
            (r#"{"error": "text"}"#, ErrorKind::Backend),
            (r#"{"object": "error", "message": "old form", "code": 400}"#, ErrorKind::InvalidRequest),
            (r#"{"detail": "Internal"}"#, ErrorKind::Backend),
            ("no json", ErrorKind::Backend),
        ] {
            let line = format!("data: {data}\n\n");
            let failure = all(vec![line.as_bytes()]).await.1.unwrap();
            assert_eq!(failure.error.kind(), kind, "{data}: {}", failure.error);
        }
        let failure = all(vec![b"event: error\ndata: {\"message\": \"named\"}\n\n"]).await.1.unwrap();
        assert!(failure.error.message().contains("named"), "{}", failure.error);
    }

    #[tokio::test]
    async fn what_is_no_utf_8_or_has_no_end_is_an_error() {
        let failure = all(vec![b"data: \xff\xfe\n\n"]).await.1.unwrap();
        assert_eq!(failure.error.kind(), ErrorKind::Backend);
        let piece = vec![b'x'; 1 << 20];
        let failure = all(vec![&piece; 9]).await.1.unwrap();
        assert!(failure.error.message().contains("more than"), "{}", failure.error);
    }
}
