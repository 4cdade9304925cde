//! How a server is run.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};
use ternion::{Error, Result};

/// The largest file of keys that is read.
const MAX_KEY_FILE: u64 = 1 << 20;

/// How a server is run. The default suits one person on one machine.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServerOptions {
    /// Names that stand for models of the configuration: clients that ask for `gpt-4o` get another model.
    pub aliases: BTreeMap<String, String>,
    /// Who may use the server. Empty: everybody who reaches it.
    pub api_keys: ApiKeys,
    /// Listen beyond loopback although there is no key.
    pub allow_anonymous: bool,
    /// Web pages of these origins may use the server, such as `https://chat.example`; `*` allows all.
    pub cors_origins: Vec<String>,
    /// The most bytes of a request's body.
    pub max_body_bytes: usize,
    /// The most messages of a conversation.
    pub max_messages: usize,
    /// The time in which a request's headers have to arrive.
    pub header_timeout: Duration,
    /// The time in which a request's body has to arrive.
    pub body_timeout: Duration,
    /// The longest time from a request to the end of its answer; `None` for no limit.
    pub request_timeout: Option<Duration>,
    /// The time that answers have to end after a shutdown has begun.
    pub grace: Duration,
    /// HTTPS; needs the feature `tls`.
    pub tls: Option<Tls>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            aliases: BTreeMap::new(),
            api_keys: ApiKeys::default(),
            allow_anonymous: false,
            cors_origins: Vec::new(),
            max_body_bytes: 8 << 20,
            max_messages: 4096,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(60),
            request_timeout: Some(Duration::from_secs(600)),
            grace: Duration::from_secs(20),
            tls: None,
        }
    }
}

/// The certificate and the private key of HTTPS, both in PEM.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Tls {
    /// The file of the certificate, with those between it and the root.
    pub cert: PathBuf,
    /// The file of its private key.
    pub key: PathBuf,
}

impl Tls {
    /// HTTPS with these files.
    pub fn new(cert: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Self { cert: cert.into(), key: key.into() }
    }
}

/// Keys that a client sends as `Authorization: Bearer KEY`. Only their hashes are kept, and `Debug` shows none.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<[u8; 32]>);

impl ApiKeys {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds one key.
    ///
    /// # Errors
    /// [`InvalidConfig`](ternion::ErrorKind::InvalidConfig) where it could not be sent in a header.
    pub fn add(&mut self, key: &str) -> Result<()> {
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Error::invalid_config(
                "an API key is empty or has characters other than printable ASCII",
            ));
        }
        self.0.push(hash(key));
        Ok(())
    }

    /// Adds the keys of a file: one on each line. Empty lines, and lines that begin with `#`, are left out.
    ///
    /// # Errors
    /// Where the file cannot be read, has no key or one that is not valid.
    pub fn add_file(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let size = std::fs::metadata(path).map_err(|error| Error::io(path, error))?.len();
        if size > MAX_KEY_FILE {
            return Err(
                Error::invalid_config("the file of API keys is too large").with("path", path.display())
            );
        }
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
        let before = self.0.len();
        for (index, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            let line = line.trim();
            if !line.is_empty() && !line.starts_with('#') {
                self.add(line).map_err(|error| error.with("path", path.display()).with("line", index + 1))?;
            }
        }
        if self.0.len() == before {
            return Err(Error::invalid_config("the file has no API key").with("path", path.display()));
        }
        Ok(())
    }

    /// Whether `key` is one of these. Takes the same time for every key of the same length.
    pub(crate) fn contains(&self, key: &str) -> bool {
        let presented = hash(key);
        let found = self.0.iter().fold(Choice::from(0), |found, known| found | known.ct_eq(&presented));
        found.into()
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeys({})", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_from_a_file_and_are_not_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        std::fs::write(&path, "# team\nsk-one\n\n  sk-two  \r\n").unwrap();
        let mut keys = ApiKeys::default();
        keys.add_file(&path).unwrap();
        assert!(keys.contains("sk-one") && keys.contains("sk-two"));
        assert!(!keys.contains("sk-on") && !keys.contains("") && !keys.contains("# team"));
        assert_eq!(format!("{keys:?}"), "ApiKeys(2)");
        std::fs::write(&path, "# nothing\n").unwrap();
        assert!(keys.add_file(&path).unwrap_err().to_string().contains("no API key"));
        std::fs::write(&path, "sk one\n").unwrap();
        let error = keys.add_file(&path).unwrap_err().to_string();
        assert!(error.contains("line: 1") && !error.contains("sk one"), "{error}");
    }
}
