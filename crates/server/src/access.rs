//! The access log, and the counters of HTTP requests.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{MatchedPath, Request},
    http::Method,
    middleware::Next,
    response::Response,
};
use http_body::{Frame, SizeHint};
use metrics::{counter, gauge, histogram};

/// Writes one line for each request when its answer has ended, or when the client has gone.
pub(crate) async fn log(request: Request, next: Next) -> Response {
    let path = request.uri().path();
    // A label has few values: the route, and not what a client has written.
    let route = request.extensions().get::<MatchedPath>().map_or("unknown", |path| path.as_str()).to_owned();
    let id = request.headers().get("x-request-id").and_then(|id| id.to_str().ok());
    let mut line = Line {
        method: request.method().clone(),
        path: path.chars().take(200).collect(),
        route,
        id: id.unwrap_or_default().to_owned(),
        begun: Instant::now(),
        status: 0,
        bytes: 0,
        complete: false,
    };
    gauge!("ternion_http_requests_active").increment(1.0);
    let response = next.run(request).await;
    line.status = response.status().as_u16();
    // A body without content is never polled.
    line.complete = response.body().is_end_stream();
    response.map(|inner| Body::new(Logged { inner, line }))
}

/// One request. Its line is written when it is dropped.
struct Line {
    method: Method,
    path: String,
    route: String,
    id: String,
    begun: Instant,
    /// 0 if the client went before there was an answer.
    status: u16,
    bytes: u64,
    complete: bool,
}

impl Drop for Line {
    fn drop(&mut self) {
        let time = self.begun.elapsed();
        let outcome = if self.complete { "complete" } else { "client went" };
        gauge!("ternion_http_requests_active").decrement(1.0);
        let route = self.route.clone();
        histogram!("ternion_http_request_duration_seconds", "route" => route.clone()).record(time);
        let status = self.status.to_string();
        counter!("ternion_http_requests_total", "route" => route, "status" => status, "outcome" => outcome)
            .increment(1);
        tracing::info!(
            target: "ternion_server::access",
            method = %self.method,
            path = self.path,
            status = self.status,
            bytes = self.bytes,
            ms = time.as_millis() as u64,
            request_id = self.id,
            outcome,
        );
    }
}

struct Logged {
    inner: Body,
    line: Line,
}

impl HttpBody for Logged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.inner).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => self.line.bytes += frame.data_ref().map_or(0, |data| data.len() as u64),
            Some(Err(_)) => {}
            None => self.line.complete = true,
        }
        self.line.complete |= self.inner.is_end_stream();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
