//! The native part of the Python package `ternion`: models, streams of events and tokenizers.
//!
//! What users see is written in Python (`python/ternion`), on top of the few classes here. Requests, events and results
//! cross the border as dictionaries in the serde form of the Rust types, so a new field needs no code here.
//!
//! A call that blocks does so without the GIL and lets signal handlers run ([`wait`]). Event loops of Python poll the same
//! objects with a callback instead.

mod convert;
mod errors;
mod model;
mod operation;
mod slot;
mod stream;
mod tokenizer;
mod wait;

use pyo3::prelude::*;

/// What `ternion._native` holds.
#[pymodule(name = "_native")]
mod native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::model::{Model, load};
    #[pymodule_export]
    use crate::operation::Operation;
    #[pymodule_export]
    use crate::stream::Stream;
    #[pymodule_export]
    use crate::tokenizer::Tokenizer;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
