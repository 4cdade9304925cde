//! llama.cpp as a whole: started once in a process, and shown to compute what it must before it is used.

use std::ffi::CStr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use llama_cpp_sys_2 as sys;
use ternion_core::{Error, ErrorKind, Result};
use ternion_engine::ComputeThreads;

use crate::{log, selftest};

/// Starts llama.cpp if that has not been done. It is never stopped: that would free nothing but a few tables, and other
/// parts of a host may use it too.
pub(crate) fn start() {
    static STARTED: OnceLock<()> = OnceLock::new();
    STARTED.get_or_init(|| {
        log::install();
        let is_set = |name| std::env::var_os(name).is_some();
        if !is_set("GOMP_SPINCOUNT") && !is_set("OMP_WAIT_POLICY") {
            let done = wait_briefly();
            tracing::debug!(done, "threads of llama.cpp are told to wait awake only briefly");
        }
        // SAFETY: Called once; it needs nothing but to come before all other calls.
        unsafe { sys::llama_backend_init() };
    });
}

/// Makes threads of llama.cpp spin for tens of microseconds and then sleep when they wait for each other, which they do hundreds of
/// times for each token. Threads that sleep at once take too long to wake up; threads that spin for long keep the core from the thread
/// that they wait for. Returns `false` if the OpenMP that is linked cannot be set.
#[cfg(gnu_openmp)]
fn wait_briefly() -> bool {
    const TURNS: u64 = 4000;
    unsafe extern "C" {
        fn ternion_openmp_spin(turns: u64) -> bool;
    }
    // SAFETY: It sets two variables of the OpenMP that is linked into this library, which no thread reads before llama.cpp is started.
    unsafe { ternion_openmp_spin(TURNS) }
}

#[cfg(not(gnu_openmp))]
fn wait_briefly() -> bool {
    false
}

/// The threads that compute: those that are `wanted`, at most one for each CPU.
pub(crate) fn threads(wanted: &ComputeThreads) -> ComputeThreads {
    let most = thread::available_parallelism().map_or(1, usize::from);
    if wanted.count() > most { ComputeThreads::new(most) } else { wanted.clone() }
}

/// A pool of llama.cpp's. Without one, ggml would start its threads anew for every graph.
///
/// # Errors
/// [`ErrorKind::ResourceExhausted`] where they cannot be started.
pub(crate) fn thread_pool(threads: &ComputeThreads) -> Result<sys::ggml_threadpool_t> {
    // SAFETY: It returns a plain structure.
    let mut params = unsafe { sys::ggml_threadpool_params_default(threads.count() as i32) };
    let cpus = threads.cpus();
    // With CPUs beyond ggml's mask, threads stay on the list as a whole: the thread that starts them does.
    if !cpus.is_empty() && cpus.iter().all(|cpu| *cpu < params.cpumask.len()) {
        for cpu in cpus {
            params.cpumask[*cpu] = true;
        }
        params.strict_cpu = true;
    }
    // SAFETY: The parameters are valid for the call.
    let pool = unsafe { sys::ggml_threadpool_new(&raw mut params) };
    if pool.is_null() {
        return Err(Error::new(ErrorKind::ResourceExhausted, "llama.cpp cannot start its threads"));
    }
    Ok(pool)
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

#[cfg(test)]
mod tests {
    /// The variables are no interface: another version of the library may not have them.
    #[cfg(gnu_openmp)]
    #[test]
    fn the_openmp_that_is_linked_can_be_told_how_long_to_wait() {
        assert!(super::wait_briefly());
    }
}
