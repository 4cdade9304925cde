//! How much memory this process takes, as the kernel counts it.

use serde::{Deserialize, Serialize};

/// Resident memory in bytes, ordered by its peak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Memory {
    /// The most that was resident at any time, pages of mapped files included.
    pub(crate) peak: u64,
    /// Resident now and backed by no file: what the process really takes from others.
    pub(crate) anonymous: u64,
    /// Resident now as pages of mapped files, which the kernel may drop at any time.
    pub(crate) mapped: u64,
}

/// Reads `/proc/self/status`; `None` where there is no such file.
pub(crate) fn memory() -> Option<Memory> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// Begins to count the peak anew, from what is resident now; `false` where the system does not do that.
pub(crate) fn forget_peak() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn parse(status: &str) -> Option<Memory> {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    Some(Memory { peak: field("VmHWM")?, anonymous: field("RssAnon")?, mapped: field("RssFile")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_in_kib() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nRssAnon:\t       1 kB\nRssFile:\t     3 kB\n";
        assert_eq!(parse(status), Some(Memory { peak: 2 << 20, anonymous: 1024, mapped: 3072 }));
        assert_eq!(parse("VmHWM:\tmany kB\n"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_has_a_peak() {
        let memory = memory().unwrap();
        assert!(memory.peak >= memory.anonymous && memory.peak > 1 << 18, "{memory:?}");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_peak_can_be_forgotten() {
        let size = 256 << 20;
        drop(std::hint::black_box(vec![1u8; size]));
        let peak = || memory().unwrap().peak;
        assert!(peak() > size as u64);
        // Some kernels are built without it.
        if forget_peak() {
            assert!(peak() < size as u64, "{}", peak());
        }
    }
}
