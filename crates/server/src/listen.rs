//! The server itself: its address, its connections and its end.

use std::{
    future::Future,
    net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs},
    time::Duration,
};

use axum::Router;
use axum_server::Handle;
use hyper_util::rt::TokioTimer;
use ternion::{Error, ErrorKind, LlmBackend, Result, ResultExt, models::Models};

use crate::{metrics, options::ServerOptions, router, state::App};

/// What connections get after the grace time to write the last error.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Serves the models of a configuration. Cheap to clone; all clones are the same.
#[derive(Clone)]
pub struct Server {
    app: App,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("models", self.app.models()).finish_non_exhaustive()
    }
}

impl Server {
    /// A server of these models, none of which is loaded by this. Installs a recorder of metrics for the process, if there is
    /// none.
    ///
    /// # Errors
    /// An alias that stands for no model, or that is a model's name.
    pub fn new(models: Models, options: ServerOptions) -> Result<Self> {
        let config = models.config();
        for (alias, name) in &options.aliases {
            config.model(Some(name)).with("alias", alias)?;
            if config.models.contains_key(alias) {
                return Err(Error::invalid_config(format!("the alias `{alias}` is the name of a model")));
            }
        }
        let recorder = metrics::recorder()?;
        Ok(Self { app: App::new(models, options, recorder) })
    }

    /// The routes, for a host with an axum application of its own. The host then looks after addresses, timeouts of connections and
    /// the shutdown.
    pub fn router(&self) -> Router {
        router::router(&self.app)
    }

    /// Loads the default model, so that the first request does not wait for it. `/ready` says no until then.
    ///
    /// # Errors
    /// What loading returns. A configuration of several models without a default has nothing to load.
    pub async fn load_default(&self) -> Result<()> {
        let config = self.app.models().config();
        let Ok((name, _)) = config.model(None) else { return Ok(()) };
        let handle = self.app.models().get(name).await?;
        let info = handle.info();
        tracing::info!(
            model = name,
            backend = info.backend,
            context = info.limits.context_length,
            "the default model is loaded"
        );
        self.app.keep(name, handle);
        Ok(())
    }

    /// Binds the address without accepting connections yet, so that a mistake is seen before a model is loaded.
    ///
    /// # Errors
    /// An address beyond loopback without a key, one that cannot be resolved or is taken, or TLS without its feature.
    pub fn bind(&self, address: impl ToSocketAddrs) -> Result<Bound> {
        let addresses: Vec<SocketAddr> =
            address.to_socket_addrs().map_err(|e| not_bound(e, "the address"))?.collect();
        let options = self.app.options();
        let is_open = options.api_keys.is_empty() && !options.allow_anonymous;
        if let Some(address) = addresses.iter().find(|address| is_open && !is_loopback(address.ip())) {
            return Err(Error::invalid_config(format!(
                "{address} can be reached from other machines, and there is no API key; set a key, or allow everybody with --allow-anonymous"
            )));
        }
        if cfg!(not(feature = "tls")) && options.tls.is_some() {
            return Err(Error::unsupported(
                "TLS is not compiled in; build with the feature `tls`, or put a proxy in front",
            ));
        }
        let listener = TcpListener::bind(&addresses[..]).map_err(|e| not_bound(e, "the address"))?;
        listener.set_nonblocking(true).map_err(|e| not_bound(e, "the socket"))?;
        let address = listener.local_addr().map_err(|e| not_bound(e, "the socket"))?;
        Ok(Bound { app: self.app.clone(), listener, address })
    }

    /// Serves until `shutdown` ends and the answers have ended or their grace time is over. Must be awaited in a tokio runtime.
    ///
    /// # Errors
    /// As [`bind`](Self::bind), and files of TLS that cannot be used.
    pub async fn serve(
        &self,
        address: impl ToSocketAddrs,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<()> {
        self.bind(address)?.serve(shutdown).await
    }
}

/// A server with its address.
#[derive(Debug)]
pub struct Bound {
    app: App,
    listener: TcpListener,
    address: SocketAddr,
}

impl Bound {
    /// The address, with the port that the system has chosen for port 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address as a browser takes it.
    pub fn url(&self) -> String {
        let scheme = if self.app.options().tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// As [`Server::serve`].
    ///
    /// # Errors
    /// As [`Server::serve`].
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        let handle = Handle::<SocketAddr>::new();
        let app = self.app.clone();
        let ending = tokio::spawn(end(app.clone(), handle.clone(), shutdown));
        let service = router::router(&app).into_make_service();
        let served = match app.options().tls.clone() {
            None => {
                let mut server = axum_server::from_tcp(self.listener)
                    .map_err(|e| not_bound(e, "the socket"))?
                    .handle(handle)
                    .first_request_timeout(app.options().header_timeout);
                bound_connections(server.http_builder(), &app);
                server.serve(service).await
            }
            #[cfg(feature = "tls")]
            Some(tls) => {
                let config = crate::tls::config(&tls)?;
                let mut server = axum_server::from_tcp_rustls(self.listener, config)
                    .map_err(|e| not_bound(e, "the socket"))?
                    .handle(handle)
                    .first_request_timeout(app.options().header_timeout);
                bound_connections(server.http_builder(), &app);
                server.serve(service).await
            }
            #[cfg(not(feature = "tls"))]
            Some(_) => return Err(Error::unsupported("TLS is not compiled in").with_operation("serve")),
        };
        ending.abort();
        served.map_err(|e| not_bound(e, "the server"))
    }
}

/// Bounds what a connection may do before its request is read.
fn bound_connections(
    builder: &mut hyper_util::server::conn::auto::Builder<hyper_util::rt::TokioExecutor>,
    app: &App,
) {
    let timeout = app.options().header_timeout;
    builder.http1().timer(TokioTimer::new()).header_read_timeout(timeout).max_buf_size(64 << 10);
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(128);
}

/// Waits for the shutdown. From then on no request is accepted; what is left after the grace time ends with an error.
async fn end(app: App, handle: Handle<SocketAddr>, shutdown: impl Future<Output = ()>) {
    shutdown.await;
    let grace = app.options().grace;
    tracing::info!(connections = handle.connection_count(), grace_seconds = grace.as_secs(), "shutting down");
    app.drain();
    handle.graceful_shutdown(Some(grace + LAST_WORDS));
    tokio::time::sleep(grace).await;
    app.stopping().cancel();
}

fn is_loopback(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_loopback(),
        IpAddr::V6(address) => address.to_ipv4_mapped().map_or(address.is_loopback(), |v4| v4.is_loopback()),
    }
}

fn not_bound(error: std::io::Error, what: &str) -> Error {
    Error::new(ErrorKind::Io, format!("{what} cannot be used")).with_source(error).with_operation("serve")
}
