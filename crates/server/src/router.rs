//! Paths, and what goes around their handlers.

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request},
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::{from_fn, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowOrigin, CorsLayer},
    request_id::{MakeRequestId, PropagateRequestIdLayer, RequestId, SetRequestIdLayer},
};

use crate::{
    access, auth,
    error::ApiError,
    handlers::{chat, completions, embeddings, health, models, tokens},
    metrics, openapi, page,
    reply::common::new_id,
    state::App,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// All paths. The layers stand in the order in which a request meets them, from the last to the first.
pub(crate) fn router(app: &App) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(chat::post))
        .route("/v1/completions", post(completions::post))
        .route("/v1/embeddings", post(embeddings::post))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::get))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/tokenizer_info", get(tokens::info))
        .route("/metrics", get(metrics::get))
        .route("/openapi.json", get(openapi::get))
        .route_layer(from_fn_with_state(app.clone(), auth::require_key));
    let open = Router::new()
        .route("/", get(page::get))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready));
    guarded
        .merge(open)
        .fallback(no_such_path)
        .method_not_allowed_fallback(wrong_method)
        // The bodies are read by our own extractor, which has the limit of the options.
        .layer(DefaultBodyLimit::disable())
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(app.clone(), auth::refuse_foreign_pages))
        .layer(cors(&app.options().cors_origins))
        .layer(from_fn(access::log))
        .layer(PropagateRequestIdLayer::new(REQUEST_ID))
        .layer(SetRequestIdLayer::new(REQUEST_ID, NewRequestId))
        .layer(from_fn(check_request_id))
        .with_state(app.clone())
}

/// With no origin, no header of CORS is sent and browsers refuse all other pages.
fn cors(origins: &[String]) -> CorsLayer {
    let layer = CorsLayer::new();
    if origins.is_empty() {
        return layer;
    }
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    layer
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE, REQUEST_ID])
        .expose_headers([REQUEST_ID, header::RETRY_AFTER])
}

#[derive(Clone, Copy)]
struct NewRequestId;

impl MakeRequestId for NewRequestId {
    fn make_request_id<B>(&mut self, _: &axum::http::Request<B>) -> Option<RequestId> {
        HeaderValue::from_str(&new_id("req")).ok().map(RequestId::new)
    }
}

/// A client may name its request. What could not stand in a line of the log is replaced by an id of the server.
async fn check_request_id(mut request: Request, next: axum::middleware::Next) -> Response {
    let is_fine = |id: &HeaderValue| id.len() <= 128 && id.as_bytes().iter().all(u8::is_ascii_graphic);
    if request.headers().get(&REQUEST_ID).is_some_and(|id| !is_fine(id)) {
        request.headers_mut().remove(&REQUEST_ID);
    }
    next.run(request).await
}

async fn no_such_path(request: Request) -> ApiError {
    let path: String = request.uri().path().chars().take(100).collect();
    let message = format!("there is no path `{path}`; `/openapi.json` lists all");
    ApiError::new(StatusCode::NOT_FOUND, "unknown_path", message)
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("the path does not take the method {}", request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

#[expect(clippy::needless_pass_by_value, reason = "the layer asks for this form")]
fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    tracing::error!(panic = text.unwrap_or_default(), "a handler has panicked");
    ApiError::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "internal_error",
        "the server has failed; its log says why",
    )
    .into_response()
}
