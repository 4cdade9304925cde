//! HTTPS: certificate, key and cryptography.

use std::{fmt::Display, path::Path, sync::Arc};

use axum_server::tls_rustls::RustlsConfig;
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use ternion::{Error, Result};

use crate::options::Tls;

/// Reads the files.
///
/// # Errors
/// [`InvalidConfig`](ternion::ErrorKind::InvalidConfig) naming the file that cannot be used.
pub(crate) fn config(tls: &Tls) -> Result<RustlsConfig> {
    let bad = |path: &Path, what: &str, error: &dyn Display| {
        Error::invalid_config(format!("{what}: {error}")).with("path", path.display()).with_operation("serve")
    };
    let certificates = CertificateDer::pem_file_iter(&tls.cert)
        .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
        .map_err(|error| bad(&tls.cert, "no certificate in PEM", &error))?;
    if certificates.is_empty() {
        return Err(bad(&tls.cert, "no certificate in PEM", &"the file has none"));
    }
    let key = PrivateKeyDer::from_pem_file(&tls.key)
        .map_err(|error| bad(&tls.key, "no private key in PEM", &error))?;
    let provider = ternion_tls::provider().ok_or_else(|| {
        let message = format!("{}; put a proxy in front of the server", ternion_tls::NO_PROVIDER);
        Error::unsupported(message).with_operation("serve")
    })?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| bad(&tls.cert, "TLS cannot be set up", &error))?
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .map_err(|error| bad(&tls.cert, "certificate and key cannot be used", &error))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(RustlsConfig::from_config(Arc::new(config)))
}
