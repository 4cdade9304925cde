//! Where the files of a model are: paths of the file system as they are, addresses of the hub after they were downloaded.

use ternion_core::{Result, config::ModelConfig, registry::Progress};

/// The model's configuration with a path of the file system. Downloads a model of the hub if that is needed.
///
/// # Errors
/// Those of the download, and [`Unsupported`](crate::ErrorKind::Unsupported) without the feature `hub`.
#[cfg(feature = "hub")]
pub(crate) async fn local(config: &ModelConfig, progress: &Progress) -> Result<ModelConfig> {
    let Some(address) = address(config)? else { return Ok(config.clone()) };
    let path = crate::hub::Hub::from_env()?.resolve(&address, progress).await?;
    Ok(at(config, path))
}

/// The same without the network.
///
/// # Errors
/// [`NotFound`](crate::ErrorKind::NotFound) for a model of the hub that is not in the cache.
#[cfg(feature = "hub")]
pub(crate) fn cached(config: &ModelConfig) -> Result<ModelConfig> {
    let Some(address) = address(config)? else { return Ok(config.clone()) };
    let path = crate::hub::Hub::from_env()?.cached(&address)?;
    Ok(at(config, path))
}

#[cfg(feature = "hub")]
fn address(config: &ModelConfig) -> Result<Option<crate::hub::Address>> {
    config.path.as_deref().map_or(Ok(None), crate::hub::Address::of_path)
}

#[cfg(feature = "hub")]
fn at(config: &ModelConfig, path: std::path::PathBuf) -> ModelConfig {
    let mut local = config.clone();
    local.path = Some(path);
    local
}

#[cfg(not(feature = "hub"))]
#[allow(clippy::unused_async, reason = "it is async with the feature")]
pub(crate) async fn local(config: &ModelConfig, _: &Progress) -> Result<ModelConfig> {
    cached(config)
}

#[cfg(not(feature = "hub"))]
pub(crate) fn cached(config: &ModelConfig) -> Result<ModelConfig> {
    use ternion_core::Error;

    let path = config.path.as_deref().and_then(std::path::Path::to_str);
    match path.filter(|path| path.starts_with("hf://")) {
        None => Ok(config.clone()),
        Some(path) => {
            Err(Error::unsupported("models of the hub need the cargo feature `hub`").with("path", path))
        }
    }
}
