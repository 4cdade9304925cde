//! Panics as values, for code that must not unwind: callbacks of native libraries and threads that others wait for.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `work`. A panic becomes an error with its message.
///
/// State that `work` shares with the caller may be half changed after a panic; the caller has to restore it.
///
/// ```
/// let outcome = ternion_core::catch_panic(|| -> u32 { panic!("out of cheese") });
/// assert_eq!(outcome, Err("out of cheese".to_owned()));
/// assert_eq!(ternion_core::catch_panic(|| 1), Ok(1));
/// ```
///
/// # Errors
/// The panic's message.
pub fn catch_panic<R>(work: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(message)
}

/// The message of a panic, from what `catch_unwind` returns.
fn message(payload: Box<dyn Any + Send>) -> String {
    let message = payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned());
    // The payload is any value, and dropping it may panic as well. The second payload is leaked instead of dropped.
    if let Err(second) = catch_unwind(AssertUnwindSafe(move || drop(payload))) {
        std::mem::forget(second);
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_all_kinds_are_kept() {
        let number = 7;
        assert_eq!(catch_panic(|| -> () { panic!("plain") }), Err("plain".to_owned()));
        assert_eq!(catch_panic(|| -> () { panic!("number {number}") }), Err("number 7".to_owned()));
        assert_eq!(
            catch_panic(|| std::panic::panic_any(7_u32)),
            Err::<(), _>("a panic without a message".to_owned())
        );
    }

    #[test]
    fn a_payload_that_panics_when_it_is_dropped_does_not_escape() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("second");
            }
        }
        assert!(catch_panic(|| std::panic::panic_any(Bomb)).is_err());
    }
}
