//! Whether a KV cache fits into memory, asked before llama.cpp allocates it: a failed allocation there ends the process.

use ternion_core::{Error, ErrorKind, Result};

/// An error where `bytes` are more than the system has to give at the moment. Where it does not say how much that is,
/// nothing is refused.
pub(crate) fn check(bytes: u64, what: &str) -> Result<()> {
    match available() {
        Some(available) if bytes > available => Err(Error::new(
            ErrorKind::ResourceExhausted,
            format!(
                "{what} takes {} MiB, and {} MiB of memory are available; a smaller `context_length` takes less",
                bytes >> 20,
                available >> 20
            ),
        )),
        _ => Ok(()),
    }
}

/// Memory that can be had without swapping, in bytes.
fn available() -> Option<u64> {
    parse(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_says_what_is_available() {
        assert_eq!(parse("MemTotal:  9 kB\nMemAvailable:   24 kB\n"), Some(24 << 10));
        assert_eq!(parse("MemTotal:  9 kB\n"), None);
        assert_eq!(parse("MemAvailable: many kB\n"), None);
    }

    #[test]
    fn more_than_there_is_is_refused() {
        assert!(check(1, "a byte").is_ok());
        if available().is_some() {
            let error = check(u64::MAX, "the KV cache").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        }
    }
}
