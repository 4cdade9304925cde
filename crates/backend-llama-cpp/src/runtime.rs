//! llama.cpp as a whole: started once in a process, and shown to compute what it must before it is used.

use std::ffi::CStr;
use std::sync::{Mutex, OnceLock, PoisonError};

use llama_cpp_sys_2 as sys;
use ternion_core::{Error, Result};

use crate::{log, selftest};

/// Starts llama.cpp if that has not been done. It is never stopped: that would free nothing but a few tables, and other
/// parts of a host may use it too.
pub(crate) fn start() {
    static STARTED: OnceLock<()> = OnceLock::new();
    STARTED.get_or_init(|| {
        log::install();
        // SAFETY: Called once; it needs nothing but to come before all other calls.
        unsafe { sys::llama_backend_init() };
    });
}

/// What the results of this process depend on: the instructions that llama.cpp and Ternion's kernels use.
pub(crate) fn description() -> String {
    static CALLED: Mutex<()> = Mutex::new(());
    let _one_at_a_time = CALLED.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: It returns a string that stays until the next call, and nobody else calls it meanwhile.
    let own = unsafe { CStr::from_ptr(sys::llama_print_system_info()) };
    format!("{} {}", own.to_string_lossy(), ternion_kernels::Isa::detect())
}

/// [`start`], for a model whose graph is hooked: an error if this build of llama.cpp does not compute what it must.
pub(crate) fn start_hooked() -> Result<()> {
    static CHECKED: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    start();
    let outcome = CHECKED.get_or_init(|| selftest::run().map_err(|e| e.to_string()));
    outcome.as_ref().map_err(|e| Error::backend(format!("llama.cpp failed its self-test: {e}"))).copied()
}
