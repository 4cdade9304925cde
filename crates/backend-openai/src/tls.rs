//! TLS by rustls, with the certificates that the system trusts.

use std::{path::Path, sync::Arc};

use rustls::{
    ClientConfig,
    client::danger::ServerCertVerifier,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, pem::PemObject},
};
use rustls_platform_verifier::Verifier;
use ternion_core::{Error, ErrorKind, Result, file::read_capped};

/// No file of certificates is larger than this.
const MAX_BYTES: u64 = 8 << 20;

/// The configuration for connections, which also trust the certificates in `ca_file`.
///
/// # Errors
/// [`InvalidConfig`](ErrorKind::InvalidConfig) where certificates cannot be read or the machine has no cryptography.
pub(crate) fn config(ca_file: Option<&Path>) -> Result<ClientConfig> {
    let failed = |error: rustls::Error| {
        Error::invalid_config("TLS cannot be set up with the system's certificates").with_source(error)
    };
    let provider = provider()?;
    let extra = ca_file.map(certificates).transpose()?.unwrap_or_default();
    let verifier: Arc<dyn ServerCertVerifier> = Arc::new(if extra.is_empty() {
        Verifier::new(Arc::clone(&provider)).map_err(failed)?
    } else {
        Verifier::new_with_extra_roots(extra, Arc::clone(&provider)).map_err(failed)?
    });
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(failed)?
        .dangerous() // the name of rustls for any verifier that is given, also the system's
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth())
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

/// What the process has installed, else graviola, which needs no C compiler to build.
fn provider() -> Result<Arc<CryptoProvider>> {
    if let Some(installed) = CryptoProvider::get_default() {
        return Ok(Arc::clone(installed));
    }
    built_in().ok_or_else(|| {
        Error::invalid_config(
            "the built-in cryptography for TLS does not run on this CPU; install a rustls `CryptoProvider` as the process's \
             default before the model is loaded",
        )
    })
}

/// Graviola, where the CPU has all instructions that it needs: without them it panics.
#[cfg(target_arch = "x86_64")]
fn built_in() -> Option<Arc<CryptoProvider>> {
    use std::arch::is_x86_feature_detected as has;
    let able = has!("aes")
        && has!("ssse3")
        && has!("pclmulqdq")
        && has!("avx")
        && has!("avx2")
        && has!("adx")
        && has!("bmi1")
        && has!("bmi2");
    able.then(|| Arc::new(rustls_graviola::default_provider()))
}

/// Graviola, where the CPU has all instructions that it needs: without them it panics.
#[cfg(target_arch = "aarch64")]
fn built_in() -> Option<Arc<CryptoProvider>> {
    use std::arch::is_aarch64_feature_detected as has;
    let able = has!("neon") && has!("aes") && has!("pmull") && has!("sha2");
    able.then(|| Arc::new(rustls_graviola::default_provider()))
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn built_in() -> Option<Arc<CryptoProvider>> {
    None
}
