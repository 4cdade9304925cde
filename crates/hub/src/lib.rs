//! Models from the Hugging Face Hub: `hf://owner/name[@revision][/file-or-folder]`.
//!
//! ```no_run
//! use ternion_core::registry::Progress;
//! use ternion_hub::Hub;
//!
//! # async fn run() -> ternion_core::Result<()> {
//! let address = "hf://microsoft/bitnet-b1.58-2B-4T".parse()?;
//! let path = Hub::from_env()?.resolve(&address, &Progress::none()).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Files go into the cache that Python's `huggingface_hub` uses, in its layout, and each of the two finds what the other has
//! downloaded. The environment variables are the same too: see [`Settings`]. Proxies are taken from `HTTPS_PROXY` and the like.
//!
//! * Only the files that the model needs are downloaded: see the module `select`.
//! * A download that was interrupted goes on where it was, large files in parts side by side.
//! * Each file is compared with the hash that the hub gives (SHA-256 of large files, Git's hash of small ones) before it is shown
//!   under its name, so nothing incomplete or damaged is ever loaded.
//! * Processes that want the same file wait for the one that downloads it.
//!
//! # Why not the crate `hf-hub`
//!
//! Version 1.0 always builds the client of the Xet storage, whose TLS needs a C compiler, and it neither resumes a download nor
//! compares hashes.
#![forbid(unsafe_code)]

mod address;
mod cache;
mod download;
mod failure;
mod http;
mod hub;
mod list;
mod names;
mod progress;
mod select;
mod settings;

pub use address::Address;
pub use hub::{Fetched, FetchedFile, Hub};
pub use list::{CachedRepo, CachedRevision};
pub use names::KnownModel;
pub use settings::Settings;
