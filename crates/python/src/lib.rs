//! The native part of the Python package `ternion`: models, streams of events and tokenizers.
//!
//! What users see is written in Python (`python/ternion`), on top of the few classes here. Requests, events and results
//! cross the border as dictionaries in the serde form of the Rust types, so a new field needs no code here.
//!
//! A call that blocks does so without the GIL and lets signal handlers run (`wait`). Event loops of Python poll the same
//! objects with a callback instead.

mod conversion;
mod convert;
mod errors;
mod model;
mod operation;
mod slot;
mod source;
mod stream;
mod tokenizer;
mod wait;

use pyo3::prelude::*;

/// llama.cpp brings a static OpenMP, which cannot be a part of a shared library. The system's, which the linker sees first by
/// this reference, takes its place.
#[cfg(all(feature = "llama-cpp", target_os = "linux", target_env = "gnu"))]
mod openmp {
    #[link(name = "gomp")]
    unsafe extern "C" {
        fn omp_get_max_threads() -> std::ffi::c_int;
    }

    #[used]
    static REFERENCE: unsafe extern "C" fn() -> std::ffi::c_int = omp_get_max_threads;
}

/// What `ternion._native` holds.
#[pymodule(name = "_native")]
mod native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::conversion::convert;
    #[pymodule_export]
    use crate::model::{Model, load};
    #[pymodule_export]
    use crate::operation::Operation;
    #[pymodule_export]
    use crate::source::local_path;
    #[pymodule_export]
    use crate::stream::Stream;
    #[pymodule_export]
    use crate::tokenizer::Tokenizer;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
