//! A proxy in the test's own process: it forwards plain requests and refuses tunnels, and remembers both.

use std::sync::{Arc, Mutex};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
};

/// A host that only the proxy knows.
pub(crate) const HOST: &str = "hub.invalid";

/// The running proxy.
pub(crate) struct Proxy {
    pub(crate) url: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    /// Starts it. Requests to [`HOST`] go to `target`, others where they say. Must be called in a tokio runtime, which serves it.
    pub(crate) async fn start(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (asked, target) = (Arc::<Mutex<Vec<String>>>::default(), target.to_owned());
        let seen = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                // An error breaks this connection, as the client sees.
                tokio::spawn(serve(client, target.clone(), Arc::clone(&seen)));
            }
        });
        Self { url, asked }
    }

    /// The first lines of the requests so far, which are forgotten.
    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

async fn serve(mut client: TcpStream, target: String, asked: Arc<Mutex<Vec<String>>>) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let (first, fields) = head.split_once("\r\n").unwrap_or_default();
    asked.lock().unwrap().push(first.to_owned());
    let mut words = first.split(' ');
    let (method, address) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let Some(rest) = address.strip_prefix("http://").filter(|_| method != "CONNECT") else {
        return client.write_all(b"HTTP/1.1 502 No tunnels here\r\ncontent-length: 0\r\n\r\n").await;
    };
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let mut server = TcpStream::connect(if host == HOST { &target } else { host }).await?;
    // Each connection serves one request.
    server
        .write_all(format!("{method} /{path} HTTP/1.1\r\nconnection: close\r\n{fields}").as_bytes())
        .await?;
    copy_bidirectional(&mut client, &mut server).await.map(drop)
}
