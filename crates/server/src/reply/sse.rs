//! Server-sent events: the stream of an answer.

use std::{convert::Infallible, time::Duration};

use axum::{
    http::{HeaderValue, header},
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
};
use futures_util::{Stream, StreamExt, stream};
use serde::Serialize;

use crate::{choices::Item, error::ApiError};

/// How long a stream may be silent: proxies close connections that are silent for a minute.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Turns what happens into chunks.
pub(crate) trait Chunks: Send + 'static {
    /// The chunks before all others.
    fn begin(&mut self) -> Vec<String>;
    /// The chunks of an event of one answer.
    fn event(&mut self, index: usize, event: crate::choices::ChoiceEvent) -> Vec<String>;
    /// The last chunks.
    fn end(&mut self) -> Vec<String>;
}

/// A chunk as JSON text.
pub(crate) fn chunk(chunk: &impl Serialize) -> String {
    // Only maps with other keys than text cannot be written.
    serde_json::to_string(chunk).unwrap_or_default()
}

/// The answer that streams `items`. A stream that ended without an error closes with `[DONE]`; an error is the last event and stands
/// alone, so that no client takes the answer for a whole one.
pub(crate) fn respond(items: impl Stream<Item = Item> + Send + 'static, mut chunks: impl Chunks) -> Response {
    let begin = chunks.begin();
    let events = items.map(move |item| match item {
        Item::Event(index, event) => chunks.event(index, event),
        Item::End => {
            let mut last = chunks.end();
            last.push("[DONE]".to_owned());
            last
        }
        Item::Error(error) => vec![error_chunk(&error)],
    });
    let data = stream::iter([begin]).chain(events).flat_map(stream::iter);
    let events = data.map(|data| Ok::<_, Infallible>(Event::default().data(data)));
    let mut response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    // Of nginx: do not collect the answer before it is passed on.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

fn error_chunk(error: &ApiError) -> String {
    tracing::warn!(status = error.status().as_u16(), message = error.message(), "a stream has failed");
    chunk(&error.document())
}
