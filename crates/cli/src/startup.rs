//! What the process found when it was started, looked at before `main`.
//!
//! Rust's runtime opens `/dev/null` in place of a closed standard stream. After that nothing tells `ternion ... >&-` from
//! `ternion ... > /dev/null`, and the output would be lost without an error.

use std::sync::atomic::{AtomicBool, Ordering};

static STDOUT_IS_CLOSED: AtomicBool = AtomicBool::new(false);
#[cfg(unix)]
static HANGUP_IS_IGNORED: AtomicBool = AtomicBool::new(false);

/// Whether standard output was closed.
pub(crate) fn stdout_is_closed() -> bool {
    STDOUT_IS_CLOSED.load(Ordering::Relaxed)
}

/// Whether SIGHUP was ignored, as `nohup` does it.
#[cfg(unix)]
pub(crate) fn hangup_is_ignored() -> bool {
    HANGUP_IS_IGNORED.load(Ordering::Relaxed)
}

/// The system calls the functions in this section before `main`.
#[cfg(unix)]
#[used]
#[cfg_attr(target_vendor = "apple", unsafe(link_section = "__DATA,__mod_init_func"))]
#[cfg_attr(not(target_vendor = "apple"), unsafe(link_section = ".init_array"))]
static LOOK: extern "C" fn() = look;

#[cfg(unix)]
extern "C" fn look() {
    // SAFETY: The call asks for the flags of a descriptor and changes nothing.
    let flags = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) };
    STDOUT_IS_CLOSED.store(flags == -1, Ordering::Relaxed);

    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: Without a new action the call only writes the present one to `action`, which has room for it.
    let found = unsafe { libc::sigaction(libc::SIGHUP, std::ptr::null(), action.as_mut_ptr()) } == 0;
    // SAFETY: All bytes are initialised, and integers and pointers to functions that may be null have no invalid values.
    let handler = unsafe { action.assume_init() }.sa_sigaction;
    HANGUP_IS_IGNORED.store(found && handler == libc::SIG_IGN, Ordering::Relaxed);
}
