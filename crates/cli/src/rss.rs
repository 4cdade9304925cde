//! How much memory this process takes, as the kernel counts it.

use serde::{Deserialize, Serialize};
use ternion::ProcessMemory;

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

/// `None` where the system does not tell all of it, which only Linux does.
pub(crate) fn memory() -> Option<Memory> {
    let now = ProcessMemory::now()?;
    Some(Memory { peak: now.peak?, anonymous: now.anonymous?, mapped: now.mapped? })
}

/// Begins to count the peak anew, from what is resident now; `false` where the system does not do that.
pub(crate) fn forget_peak() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

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
