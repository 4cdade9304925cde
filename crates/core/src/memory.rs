//! What a model takes in memory, as planned before anything is allocated, and what the process takes.
//!
//! A backend that can tell makes the plan from what the files say and from the sizes that the configuration sets; with a
//! limit it also chooses those sizes that the configuration leaves open. The same plan is shown before a model is loaded
//! and is kept while it runs.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One part of a [`MemoryPlan`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MemoryPart {
    /// What takes it, in a few words.
    pub name: String,
    /// Bytes of memory, at their most.
    pub bytes: u64,
}

/// What a model takes in memory, part by part, and the sizes that this is for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MemoryPlan {
    /// The limit that is kept, in bytes, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// The parts; what takes nothing is left out.
    pub parts: Vec<MemoryPart>,
    /// Bytes of weights that are not kept in memory but read from the disk for each step.
    pub streamed_bytes: u64,
    /// Tokens of a sequence.
    pub context_length: usize,
    /// Sequences at the same time.
    pub max_sequences: usize,
    /// Tokens of a prefill chunk.
    pub prefill_chunk: usize,
    /// How keys and values are stored, such as `f32`.
    pub kv_type: String,
    /// What was chosen to keep the limit, in the order of the choices, for people.
    pub choices: Vec<String>,
}

impl MemoryPlan {
    /// A plan without parts.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a part, if it takes anything.
    pub fn add(&mut self, name: impl Into<String>, bytes: u64) {
        if bytes > 0 {
            self.parts.push(MemoryPart { name: name.into(), bytes });
        }
    }

    /// All parts together: the most that the process takes.
    pub fn total(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }
}

impl fmt::Display for MemoryPlan {
    /// One line: `398 MB of 400 MB: context 4096, 1 sequence, keys and values in int8, ...`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mega = |bytes: u64| bytes.div_ceil(1_000_000);
        write!(f, "{} MB", mega(self.total()))?;
        if let Some(limit) = self.limit {
            write!(f, " of {} MB", limit / 1_000_000)?;
        }
        let plural = if self.max_sequences == 1 { "" } else { "s" };
        write!(
            f,
            ": context {}, {} sequence{plural}, keys and values in {}, chunks of {}",
            self.context_length, self.max_sequences, self.kv_type, self.prefill_chunk
        )?;
        if self.streamed_bytes > 0 {
            write!(f, ", {} MB of weights read from the disk for each step", mega(self.streamed_bytes))?;
        }
        Ok(())
    }
}

/// The memory of this process, in bytes, as the system counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProcessMemory {
    /// In memory now, pages of mapped files among it.
    pub resident: u64,
    /// The most that was in memory at any time, where the system tells.
    pub peak: Option<u64>,
    /// The part of `resident` that belongs to no file, where the system tells.
    pub anonymous: Option<u64>,
    /// The part of `resident` that is pages of mapped files, where the system tells.
    pub mapped: Option<u64>,
}

impl ProcessMemory {
    /// Measures it: in detail on Linux, `resident` alone on macOS, Windows and others. `None` where the system does not tell.
    pub fn now() -> Option<Self> {
        let detailed = || Self::parse(&std::fs::read_to_string("/proc/self/status").ok()?);
        detailed().or_else(Self::portable)
    }

    fn portable() -> Option<Self> {
        let resident = memory_stats::memory_stats()?.physical_mem as u64;
        Some(Self { resident, peak: None, anonymous: None, mapped: None })
    }

    /// Reads Linux's `/proc/self/status`.
    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            kib.checked_mul(1024)
        };
        Some(Self {
            resident: field("VmRSS")?,
            peak: field("VmHWM"),
            anonymous: field("RssAnon"),
            mapped: field("RssFile"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_in_kib() {
        let status = "Name:\tx\nVmHWM:\t 2048 kB\nVmRSS:\t    4 kB\nRssAnon:\t   1 kB\nRssFile:\t 3 kB\n";
        let expected =
            ProcessMemory { resident: 4096, peak: Some(2 << 20), anonymous: Some(1024), mapped: Some(3072) };
        assert_eq!(ProcessMemory::parse(status), Some(expected));
        assert_eq!(ProcessMemory::parse("VmRSS:\tmany kB\n"), None);
        assert_eq!(ProcessMemory::parse("VmRSS:\t1 kB\n").unwrap().peak, None);
    }

    #[test]
    #[cfg(any(target_os = "linux", target_os = "macos", windows))]
    fn both_ways_of_measuring_agree() {
        let block = std::hint::black_box(vec![1u8; 64 << 20]);
        let (now, portable) = (ProcessMemory::now().unwrap(), ProcessMemory::portable().unwrap());
        assert!(now.resident > 64 << 20, "{now:?}");
        // Other tests run meanwhile.
        assert!(now.resident.abs_diff(portable.resident) < 48 << 20, "{now:?} {portable:?}");
        drop(block);
    }

    #[test]
    fn a_plan_is_the_sum_of_its_parts_in_one_line() {
        let mut plan = MemoryPlan::new();
        plan.add("ternary weights", 100_000_000);
        plan.add("nothing", 0);
        plan.add("keys and values", 20_000_001);
        (plan.context_length, plan.max_sequences, plan.prefill_chunk) = (4096, 1, 128);
        plan.kv_type = "f32".to_owned();
        assert_eq!((plan.parts.len(), plan.total()), (2, 120_000_001));
        assert_eq!(
            plan.to_string(),
            "121 MB: context 4096, 1 sequence, keys and values in f32, chunks of 128"
        );
        (plan.limit, plan.streamed_bytes) = (Some(400_000_000), 7_000_000);
        let line = plan.to_string();
        assert!(
            line.contains("121 MB of 400 MB")
                && line.ends_with("7 MB of weights read from the disk for each step")
        );
    }
}
