//! `GET /`: the page to chat on. One file, embedded in the program; it asks nobody but this server.

use std::sync::LazyLock;

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use sha2::{Digest, Sha256};

const PAGE: &str = include_str!("page.html");

/// The browser runs the one script of the page and loads nothing from elsewhere, whatever a model writes.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    format!(
        "default-src 'none'; script-src '{}'; style-src '{}'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'",
        hash_of("script"),
        hash_of("style"),
    )
});

/// The hash of the contents of the page's only element of this name, as a policy names it.
fn hash_of(element: &str) -> String {
    let (open, close) = (format!("<{element}>"), format!("</{element}>"));
    let contents =
        PAGE.split_once(&open).and_then(|(_, rest)| rest.split_once(&close)).map_or("", |(inner, _)| inner);
    format!("sha256-{}", BASE64_STANDARD.encode(Sha256::digest(contents)))
}

pub(crate) async fn get() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY.as_str()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, PAGE).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_self_contained_and_never_makes_html_of_text() {
        for element in ["<script>", "</script>", "<style>", "</style>"] {
            assert_eq!(PAGE.matches(element).count(), 1, "{element}");
        }
        for forbidden in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "src=\"http",
            "href=\"http",
            "@import",
        ] {
            assert!(!PAGE.contains(forbidden), "{forbidden}");
        }
    }
}
