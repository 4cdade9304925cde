//! ONNX Runtime's native library: where it is looked for, and whether it will do.
//!
//! It is looked for in this order, and the first place that names one decides:
//!
//! 1. the option `library` of the configuration;
//! 2. the environment variable `ORT_DYLIB_PATH`;
//! 3. what the system's loader finds by the library's usual names.
//!
//! A library is opened and asked for its version before `ort` gets it: where `ort` finds that something is wrong with a
//! library after the fact, it panics.

use std::ffi::{CStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ort::environment::Environment;
use ort::logging::LogLevel;
use ternion_core::{Error, ErrorKind, Result, catch_panic};

/// The oldest version that is accepted, 1.x: the interface that `ort` is compiled for.
pub const MINIMUM_VERSION: u32 = ort::MINOR_VERSION;

/// How to get it, as errors say it.
const ADVICE: &str = "`pip install onnxruntime` has it as onnxruntime/capi/libonnxruntime.so.1.*; name it by \
                      `options.library` or by the variable ORT_DYLIB_PATH (in a checkout, `cargo xtask setup` gets it)";

/// What the system's loader is asked for.
#[cfg(windows)]
const NAMES: [&str; 1] = ["onnxruntime.dll"];
#[cfg(target_vendor = "apple")]
const NAMES: [&str; 1] = ["libonnxruntime.dylib"];
#[cfg(not(any(windows, target_vendor = "apple")))]
const NAMES: [&str; 2] = ["libonnxruntime.so", "libonnxruntime.so.1"];

/// The library of this process, once one has been loaded.
static LOADED: Mutex<Option<Library>> = Mutex::new(None);

/// ONNX Runtime, loaded.
#[derive(Clone)]
pub struct Library {
    path: PathBuf,
    version: String,
    minor: u32,
    environment: Arc<Environment>,
}

impl Library {
    /// The library of this process, loaded if it is not yet: the one at `path`, else by the order above.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) where there is none, with how to get it; [`Unsupported`](ErrorKind::Unsupported)
    /// for one that is too old; [`InvalidConfig`](ErrorKind::InvalidConfig) where `path` is another one than the process
    /// has loaded.
    pub fn load(path: Option<&Path>) -> Result<Self> {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(library) = &*loaded {
            return match path {
                Some(path) if !is_same(path, &library.path) => Err(Error::invalid_config(format!(
                    "options.library: {} was asked for, but this process has loaded {}; one library for all models \
                     expected",
                    path.display(),
                    library.path.display()
                ))),
                _ => Ok(library.clone()),
            };
        }
        let library = find(path, std::env::var_os("ORT_DYLIB_PATH"))?;
        tracing::info!(path = %library.path.display(), version = library.version, "ONNX Runtime loaded");
        *loaded = Some(library.clone());
        Ok(library)
    }

    /// Where it is: a path, or the name by which the system knows it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its version, such as `1.32.0`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The second number of its version.
    pub fn minor(&self) -> u32 {
        self.minor
    }

    pub(crate) fn environment(&self) -> &Environment {
        &self.environment
    }
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Library")
            .field("path", &self.path)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

fn is_same(a: &Path, b: &Path) -> bool {
    let resolved = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    resolved(a) == resolved(b)
}

fn find(option: Option<&Path>, variable: Option<OsString>) -> Result<Library> {
    let named = |path: &Path, by: &str| {
        if !path.is_file() {
            let message = format!("ONNX Runtime's library is not where {by} says; {ADVICE}");
            return Err(Error::new(ErrorKind::NotFound, message).with("path", path.display()));
        }
        // An absolute path means the same to every loader.
        let path = std::fs::canonicalize(path).map_err(|e| Error::io(path, e))?;
        start(path.clone(), probe(&path)?)
    };
    if let Some(path) = option {
        return named(path, "`options.library`");
    }
    if let Some(path) = variable.filter(|path| !path.is_empty()) {
        return named(Path::new(&path), "ORT_DYLIB_PATH");
    }
    for name in NAMES {
        // What the loader does not find is no error yet; what it finds and is no good is.
        match probe(Path::new(name)) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            probed => return start(PathBuf::from(name), probed?),
        }
    }
    Err(Error::new(ErrorKind::NotFound, format!("ONNX Runtime's library is not on this system; {ADVICE}")))
}

/// Gives a library that has been probed to `ort`.
fn start(path: PathBuf, version: String) -> Result<Library> {
    let minor = minor(&version).unwrap_or(0);
    let failed = |e: &dyn std::fmt::Display| {
        Error::backend("ONNX Runtime does not start").with("path", path.display()).with_source(one_line(e))
    };
    let builder = ort::init_from(&path).map_err(|e| failed(&e))?;
    let builder = builder.with_name("ternion").with_telemetry(false).with_logger(Arc::new(log));
    let environment = builder.build().map_err(|e| failed(&e))?;
    Ok(Library { environment: Arc::new(environment), minor, version, path })
}

/// Sends a message of the runtime to `tracing`. The host's subscriber may panic, and the runtime calls this from C++: the
/// panic ends here. It has no caller that it could fail.
fn log(level: LogLevel, _category: &str, id: &str, location: &str, message: &str) {
    let _ = catch_panic(|| match level {
        LogLevel::Fatal | LogLevel::Error => tracing::error!(target: "ort", id, location, "{message}"),
        LogLevel::Warning => tracing::warn!(target: "ort", id, location, "{message}"),
        LogLevel::Info => tracing::info!(target: "ort", id, location, "{message}"),
        LogLevel::Verbose => tracing::trace!(target: "ort", id, location, "{message}"),
    });
}

/// The interface's head, as `onnxruntime_c_api.h` has it: the same in all versions.
#[repr(C)]
struct ApiBase {
    api: Option<unsafe extern "system" fn(u32) -> *const std::ffi::c_void>,
    version: Option<unsafe extern "system" fn() -> *const std::ffi::c_char>,
}

/// The version of a library that is new enough.
fn probe(path: &Path) -> Result<String> {
    let in_library = |e: Error| e.with("path", path.display());
    // SAFETY: loading runs the library's initialisers. That is what the user asks for who names a library, and what the
    // system's loader does for its own.
    let library = unsafe { libloading::Library::new(path) }.map_err(|e| {
        // A file that is there can still lack a library that it needs.
        let message = format!("ONNX Runtime's library cannot be loaded; {ADVICE}");
        let kind = if path.is_file() { ErrorKind::Unsupported } else { ErrorKind::NotFound };
        in_library(Error::new(kind, message).with_source(one_line(&e)))
    })?;
    let foreign = || {
        let message = format!("is no ONNX Runtime: `OrtGetApiBase` is missing or gives nothing; {ADVICE}");
        in_library(Error::unsupported(message))
    };
    // SAFETY: a library that exports this name is ONNX Runtime, whose header declares it with this signature.
    let base = unsafe { library.get::<unsafe extern "system" fn() -> *const ApiBase>(b"OrtGetApiBase") };
    let base = base.map_err(|_| foreign())?;
    // SAFETY: as above. It returns a pointer to a constant of the library, which is loaded as long as `library` lives.
    let version = unsafe { base().as_ref() }.and_then(|base| base.version).ok_or_else(foreign)?;
    // SAFETY: as above; no arguments.
    let text = unsafe { version() };
    if text.is_null() {
        return Err(foreign());
    }
    // SAFETY: the header promises a text that ends in a zero byte, a constant of the library.
    let version = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    match minor(&version) {
        Some(minor) if minor >= MINIMUM_VERSION => {
            // It stays loaded: its threads and statics outlive every handle.
            std::mem::forget(library);
            Ok(version)
        }
        _ => Err(in_library(Error::unsupported(format!(
            "ONNX Runtime is {version:?}, expected 1.{MINIMUM_VERSION} or newer; {ADVICE}"
        )))),
    }
}

/// The second number of a version 1.x.
fn minor(version: &str) -> Option<u32> {
    let mut numbers = version.split('.');
    (numbers.next()? == "1").then(|| numbers.next()?.parse().ok()).flatten()
}

/// What the runtime says is wrong, on one line and not without end.
pub(crate) fn one_line(error: &dyn std::fmt::Display) -> String {
    let text = error.to_string();
    let mut line: String = text.chars().take(400).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(400).is_some() {
        line.push_str("...");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(option: Option<&Path>, variable: Option<&str>) -> Error {
        find(option, variable.map(Into::into)).unwrap_err()
    }

    #[test]
    fn the_place_that_is_named_decides() {
        let e = error(Some(Path::new("/no/such/lib.so")), Some("/another/lib.so"));
        assert_eq!(e.kind(), ErrorKind::NotFound);
        assert!(
            e.to_string().contains("options.library") && e.to_string().contains("/no/such/lib.so"),
            "{e}"
        );
        assert!(e.to_string().contains("pip install onnxruntime"), "{e}");
        let e = error(None, Some("/another/lib.so"));
        assert!(e.to_string().contains("ORT_DYLIB_PATH") && e.to_string().contains("/another/lib.so"), "{e}");
    }

    #[test]
    fn a_file_that_is_no_library_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libonnxruntime.so");
        std::fs::write(&path, b"not a library").unwrap();
        let e = error(Some(&path), None);
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert!(e.to_string().contains("cannot be loaded"), "{e}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn another_library_is_refused() {
        let e = probe(Path::new("libc.so.6")).unwrap_err();
        assert!(e.to_string().contains("is no ONNX Runtime"), "{e}");
    }

    /// A subscriber that panics at each message.
    struct Panicking;

    impl tracing::Subscriber for Panicking {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, _: &tracing::Event<'_>) {
            panic!("the host's own bug");
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }

    #[test]
    fn a_subscriber_that_panics_does_not_unwind_into_the_runtime() {
        tracing::subscriber::with_default(Panicking, || {
            for level in
                [LogLevel::Verbose, LogLevel::Info, LogLevel::Warning, LogLevel::Error, LogLevel::Fatal]
            {
                log(level, "category", "id", "location", "message");
            }
        });
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(minor("1.32.0"), Some(32));
        assert_eq!(minor("1.24.1-dev"), Some(24));
        assert_eq!((minor("2.0.0"), minor("1"), minor("")), (None, None, None));
    }
}
