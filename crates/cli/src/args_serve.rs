//! The options of `ternion serve`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use ternion::config::ByteSize;
use ternion::{Error, Result};
use ternion_server::{ServerOptions, Tls};

use crate::args::EngineArgs;

/// The variable with an API key.
pub(crate) const KEY_VARIABLE: &str = "TERNION_API_KEY";

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

/// How it is served.
#[derive(Debug, Args)]
#[command(next_help_heading = "Server")]
pub(crate) struct ServerArgs {
    /// The address to listen on. Beyond this machine an API key is needed, or --allow-anonymous.
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// The port; 0 lets the system choose one.
    #[arg(long, default_value_t = 8080)]
    pub(crate) port: u16,
    /// A file with API keys, one on each line. A key may also stand in the variable TERNION_API_KEY.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Let everybody in who reaches the address.
    #[arg(long)]
    allow_anonymous: bool,
    /// Let web pages of this origin use the server, such as https://chat.example; * allows all. May be repeated.
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<String>,
    /// Another name for a model. May be repeated.
    #[arg(long, value_name = "NAME=MODEL", value_parser = parse_alias)]
    alias: Vec<(String, String)>,
    /// The largest body of a request, such as 8MB.
    #[arg(long, value_name = "SIZE")]
    max_body: Option<ByteSize>,
    /// The most messages of a conversation.
    #[arg(long, value_name = "N")]
    max_messages: Option<usize>,
    /// Seconds that a request may take in all; 0 for no limit.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    request_timeout: u64,
    /// Seconds that answers may take to end after SIGTERM.
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    grace: u64,
    /// The certificate of HTTPS in PEM, with those between it and the root. Needs the feature `tls`.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The private key of the certificate in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

impl ServerArgs {
    /// As options of a server, with the keys of the file and of the environment.
    pub(crate) fn options(&self) -> Result<ServerOptions> {
        let mut options = ServerOptions::default();
        if let Some(path) = &self.api_key_file {
            options.api_keys.add_file(path)?;
        }
        if let Some(key) = std::env::var_os(KEY_VARIABLE).filter(|key| !key.is_empty()) {
            let key = key
                .into_string()
                .map_err(|_| Error::invalid_config(format!("{KEY_VARIABLE} is not text")))?;
            options.api_keys.add(key.trim()).map_err(|error| error.with("variable", KEY_VARIABLE))?;
        }
        options.allow_anonymous = self.allow_anonymous;
        options.cors_origins.clone_from(&self.cors_origin);
        options.aliases = self.alias.iter().cloned().collect();
        if let Some(size) = self.max_body {
            options.max_body_bytes = usize::try_from(size.0).unwrap_or(usize::MAX);
        }
        options.max_messages = self.max_messages.unwrap_or(options.max_messages);
        options.request_timeout =
            (self.request_timeout > 0).then(|| Duration::from_secs(self.request_timeout));
        options.grace = Duration::from_secs(self.grace);
        options.tls =
            self.tls_cert.as_ref().zip(self.tls_key.as_ref()).map(|(cert, key)| Tls::new(cert, key));
        Ok(options)
    }
}

fn parse_alias(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((alias, model)) if !alias.is_empty() && !model.is_empty() => {
            Ok((alias.to_owned(), model.to_owned()))
        }
        _ => Err("expected NAME=MODEL, such as gpt-4o=bitnet".to_owned()),
    }
}
