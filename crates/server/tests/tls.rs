//! HTTPS by rustls. The certificate and its key are made for this test (`openssl req -x509 -newkey ec`, for localhost) and known to all.
#![cfg(feature = "tls")]
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::{io::Write, path::PathBuf, process::Command};

use common::{ECHO, Running, config};
use ternion_server::{ServerOptions, Tls};

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/tls").join(name)
}

#[tokio::test]
async fn https_is_served_with_the_certificate_of_the_options() {
    if Command::new("curl").arg("--version").output().is_err() {
        let _ = writeln!(std::io::stderr(), "skipped: no curl");
        return;
    }
    let mut options = ServerOptions::default();
    options.tls = Some(Tls::new(file("cert.pem"), file("key.pem")));
    let server = Running::start(config(ECHO), options).await;
    assert!(server.url.starts_with("https://"), "{}", server.url);
    let curl = async |args: &[&str], path: &str| {
        let mut command = Command::new("curl");
        command.args(["-sS", "--max-time", "20"]).args(args).arg(format!("{}{path}", server.url));
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let trusted = file("cert.pem");
    let trusted = ["--cacert", trusted.to_str().unwrap()];
    let (ok, text) = curl(&trusted, "/health").await;
    assert!(ok && text.contains("ok"), "{text}");
    let body = r#"{"messages": [{"role": "user", "content": "a b"}], "stream": true}"#;
    for version in ["--http1.1", "--http2"] {
        let (ok, text) = curl(&[&trusted[..], &[version, "-d", body]].concat(), "/v1/chat/completions").await;
        assert!(ok && text.ends_with("data: [DONE]\n\n"), "{version}: {text}");
    }
    assert!(!curl(&[], "/health").await.0, "a certificate that nobody vouches for is refused");
}

#[tokio::test]
async fn files_that_are_no_certificate_are_told_by_name() {
    for (cert, key, named) in [
        ("key.pem", "key.pem", "key.pem"),
        ("cert.pem", "cert.pem", "cert.pem"),
        ("no.pem", "key.pem", "no.pem"),
    ] {
        let mut options = ServerOptions::default();
        options.tls = Some(Tls::new(file(cert), file(key)));
        let models = ternion::models::Models::new(config(ECHO)).unwrap();
        let server = ternion_server::Server::new(models, options).unwrap();
        let error = server.serve("127.0.0.1:0", std::future::pending()).await.unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
    }
}
