//! TLS for the HTTP clients and the server: rustls, with cryptography that builds without a C compiler.
#![forbid(unsafe_code)]

use std::sync::Arc;

use rustls::{ClientConfig, client::danger::ServerCertVerifier, crypto::CryptoProvider};
use rustls_platform_verifier::Verifier;

/// What [`provider`] returns `None` for, in words that fit into an error.
pub const NO_PROVIDER: &str = "the built-in cryptography for TLS does not run on this CPU";

/// The cryptography that the process has installed as its default, else graviola; `None` on a CPU that lacks the instructions
/// that graviola needs.
pub fn provider() -> Option<Arc<CryptoProvider>> {
    CryptoProvider::get_default().cloned().or_else(built_in)
}

/// The configuration of a client with this provider. It trusts the certificates that the system trusts, and those in `extra`.
///
/// # Errors
/// Where the system's certificates cannot be read.
pub fn client_config(
    provider: Arc<CryptoProvider>,
    extra: Vec<rustls::pki_types::CertificateDer<'static>>,
) -> Result<ClientConfig, rustls::Error> {
    let verifier: Arc<dyn ServerCertVerifier> = Arc::new(if extra.is_empty() {
        Verifier::new(Arc::clone(&provider))?
    } else {
        Verifier::new_with_extra_roots(extra, Arc::clone(&provider))?
    });
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous() // the name of rustls for any verifier that is given, also the system's
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth())
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
