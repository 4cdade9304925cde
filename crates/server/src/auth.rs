//! Who may use the server: API keys, and web pages from elsewhere.

use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode, Uri, header},
    middleware::Next,
    response::Response,
};

use crate::{error::ApiError, state::App};

/// Refuses a request without a valid key, where there are keys.
pub(crate) async fn require_key(
    State(app): State<App>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let keys = &app.options().api_keys;
    if keys.is_empty() || bearer(request.headers()).is_some_and(|key| keys.contains(key)) {
        return Ok(next.run(request).await);
    }
    let message = match request.headers().get(header::AUTHORIZATION) {
        None => "no API key is given; a header `Authorization: Bearer KEY` expected",
        Some(_) => "the API key is not valid",
    };
    Err(ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message))
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

/// Refuses what a web page from elsewhere makes the browser of its reader send. CORS alone keeps such a page only from reading the
/// answer, and not even that if its name resolves to this machine.
pub(crate) async fn refuse_foreign_pages(
    State(app): State<App>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let options = app.options();
    let headers = request.headers();
    let host = host(headers, request.uri());
    if let Some(origin) = headers.get(header::ORIGIN) {
        let origin = origin.to_str().unwrap_or("null");
        let is_own = origin.split_once("://").is_some_and(|(_, place)| Some(place) == host);
        let is_allowed = options.cors_origins.iter().any(|allowed| allowed == "*" || allowed == origin);
        if !is_own && !is_allowed {
            let message =
                "web pages of this origin may not use the server; its option `--cors-origin` allows them";
            return Err(ApiError::new(StatusCode::FORBIDDEN, "origin_not_allowed", message));
        }
    }
    // Beyond loopback a name is the operator's choice, and a key protects.
    if options.api_keys.is_empty() && !options.allow_anonymous && !host.is_none_or(is_loopback) {
        let message = "without an API key the server answers only to the names of this machine: localhost, 127.0.0.1 or [::1]";
        return Err(ApiError::new(StatusCode::FORBIDDEN, "host_not_allowed", message));
    }
    Ok(next.run(request).await)
}

fn host<'a>(headers: &'a HeaderMap, uri: &'a Uri) -> Option<&'a str> {
    let header = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    header.or_else(|| uri.authority().map(axum::http::uri::Authority::as_str))
}

/// Whether a `Host` is this machine, with any port.
fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || address.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_machine_are_known() {
        for host in ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "127.1.2.3", "[::1]:8080", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["evil.example", "evil.example:8080", "localhost.evil.example", "10.0.0.1:80", ""] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn a_key_stands_after_its_scheme() {
        let headers = |value: &str| HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
        assert_eq!(bearer(&headers("Bearer abc")), Some("abc"));
        assert_eq!(bearer(&headers("bearer  abc ")), Some("abc"));
        assert_eq!(bearer(&headers("Basic abc")), None);
        assert_eq!(bearer(&headers("abc")), None);
    }
}
