//! What the processor takes in joules, where Linux shows its counters (RAPL, of Intel and AMD) to this user.
//!
//! The counters are the machine's: what else runs is in them, and so is what an idle processor takes. They count
//! microjoules and begin again at 0 after `max_energy_range_uj`, which takes minutes at the least.

use std::fs;
use std::path::{Path, PathBuf};

/// Where Linux shows them.
pub(super) const ROOT: &str = "/sys/class/powercap";

/// The counters that together are the processor and its memory.
#[derive(Debug)]
pub(super) struct Energy {
    zones: Vec<Zone>,
}

#[derive(Debug)]
struct Zone {
    counter: PathBuf,
    /// The largest value of the counter.
    range: u64,
}

/// The state of all counters at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reading(Vec<u64>);

impl Energy {
    /// The counters below `root`; `None` where there are none, or none that may be read.
    pub(super) fn open(root: &Path) -> Option<Self> {
        let mut zones = Vec::new();
        for entry in fs::read_dir(root).ok()?.flatten() {
            // The same packages may be there once more, behind another interface (`intel-rapl-mmio:0`).
            if !entry.file_name().to_string_lossy().starts_with("intel-rapl:") {
                continue;
            }
            let folder = entry.path();
            let name = fs::read_to_string(folder.join("name")).unwrap_or_default();
            // Cores and graphics are parts of a package, and `psys` is more than the processor. A server's memory is no part of
            // its package.
            if !(name.starts_with("package") || name.trim() == "dram") {
                continue;
            }
            let counter = folder.join("energy_uj");
            if let (Some(_), Some(range)) = (number(&counter), number(&folder.join("max_energy_range_uj"))) {
                zones.push(Zone { counter, range });
            }
        }
        (!zones.is_empty()).then_some(Self { zones })
    }

    /// Reads the counters.
    pub(super) fn now(&self) -> Option<Reading> {
        self.zones.iter().map(|zone| number(&zone.counter)).collect::<Option<Vec<_>>>().map(Reading)
    }

    /// Joules between two readings; `None` if none were counted.
    pub(super) fn joules(&self, before: &Reading, after: &Reading) -> Option<f64> {
        let counts = self.zones.iter().zip(before.0.iter().zip(&after.0));
        let sum: u64 = counts
            .map(|(zone, (before, after))| match after.checked_sub(*before) {
                Some(count) => count,
                None => zone.range.saturating_sub(*before).saturating_add(*after),
            })
            .sum();
        (sum > 0).then_some(sum as f64 / 1e6)
    }
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(root: &Path, folder: &str, name: &str, counter: &str) {
        let folder = root.join(folder);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("name"), format!("{name}\n")).unwrap();
        fs::write(folder.join("max_energy_range_uj"), "1000000000\n").unwrap();
        fs::write(folder.join("energy_uj"), format!("{counter}\n")).unwrap();
    }

    #[test]
    fn packages_and_memory_are_counted_once_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let set = |folder, name, counter| zone(root.path(), folder, name, counter);
        set("intel-rapl:0", "package-0", "1000000");
        set("intel-rapl:0:0", "core", "77");
        set("intel-rapl:0:1", "dram", "500000");
        set("intel-rapl:1", "package-1", "999000000");
        set("intel-rapl:2", "psys", "88");
        set("intel-rapl-mmio:0", "package-0", "99");
        fs::create_dir(root.path().join("intel-rapl")).unwrap();
        let energy = Energy::open(root.path()).unwrap();
        assert_eq!(energy.zones.len(), 3);

        let before = energy.now().unwrap();
        assert_eq!(energy.joules(&before, &before), None);
        set("intel-rapl:0", "package-0", "3000000"); // 2 J
        set("intel-rapl:0:0", "core", "70000000");
        set("intel-rapl:0:1", "dram", "1000000"); // 0.5 J
        set("intel-rapl:1", "package-1", "4000000"); // 1 J to the end of its range, and 4 J after it
        set("intel-rapl:2", "psys", "80000000");
        let after = energy.now().unwrap();
        assert_eq!(energy.joules(&before, &after), Some(7.5));
    }

    #[test]
    fn counters_that_are_not_there_or_not_shown_are_none() {
        let root = tempfile::tempdir().unwrap();
        assert!(Energy::open(&root.path().join("nowhere")).is_none());
        assert!(Energy::open(root.path()).is_none());
        // What this user may not read cannot be told from what is not there, for root may read everything.
        zone(root.path(), "intel-rapl:0", "package-0", "1");
        fs::remove_file(root.path().join("intel-rapl:0/energy_uj")).unwrap();
        assert!(Energy::open(root.path()).is_none());
        zone(root.path(), "intel-rapl:0", "package-0", "many");
        assert!(Energy::open(root.path()).is_none());
        zone(root.path(), "intel-rapl:0", "package-0", "1");
        let energy = Energy::open(root.path()).unwrap();
        fs::remove_file(root.path().join("intel-rapl:0/energy_uj")).unwrap();
        assert!(energy.now().is_none(), "it went away");
    }
}
