//! The certificates that connections trust.

use std::path::Path;

use rustls::{
    ClientConfig,
    pki_types::{CertificateDer, pem::PemObject},
};
use ternion_core::{Error, ErrorKind, Result, file::read_capped};

/// No file of certificates is larger than this.
const MAX_BYTES: u64 = 8 << 20;

/// The configuration for connections, which also trust the certificates in `ca_file`.
///
/// # Errors
/// [`InvalidConfig`](ErrorKind::InvalidConfig) where certificates cannot be read or the machine has no cryptography.
pub(crate) fn config(ca_file: Option<&Path>) -> Result<ClientConfig> {
    let provider = ternion_tls::provider().ok_or_else(|| {
        Error::invalid_config(format!(
            "{}; install a rustls `CryptoProvider` as the process's default before the model is loaded",
            ternion_tls::NO_PROVIDER
        ))
    })?;
    let extra = ca_file.map(certificates).transpose()?.unwrap_or_default();
    ternion_tls::client_config(provider, extra).map_err(|error| {
        Error::invalid_config("TLS cannot be set up with the system's certificates").with_source(error)
    })
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = read_capped(file, MAX_BYTES, ErrorKind::InvalidConfig)?;
    let read: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match read {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(Error::invalid_config("options.ca_file: has no certificate in PEM form")),
        Err(error) => {
            Err(Error::invalid_config("options.ca_file: cannot be read as PEM")
                .with_source(error.to_string()))
        }
    }
    .map_err(|error| error.with("path", file.display()))
}
