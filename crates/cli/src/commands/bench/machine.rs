//! What machine this is: a speed without it says nothing.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use ternion_kernels::Isa;

use crate::output::bytes;

/// More waiting work for each core than this, and the results are those of a part of the machine.
const BUSY: f64 = 0.5;

/// The machine and the program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Machine {
    /// The processor's name, as the system tells it; else its architecture.
    pub(super) cpu: String,
    /// Cores, as the system counts them.
    pub(super) cores: usize,
    /// Those that this process may use.
    pub(super) cores_available: usize,
    /// What the kernels compute with.
    pub(super) instructions: String,
    /// The system and its version.
    pub(super) os: String,
    /// Bytes.
    pub(super) memory_bytes: Option<u64>,
    /// Tasks that ran or waited to, on average over the last minute before the measurement.
    pub(super) load_average: Option<f64>,
    /// The version of Ternion.
    pub(super) ternion: String,
}

impl Machine {
    /// This one.
    pub(super) fn here() -> Self {
        let available = std::thread::available_parallelism().map_or(1, usize::from);
        Self::read(Path::new("/"), available)
    }

    fn read(root: &Path, available: usize) -> Self {
        let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
        let cpus = read("proc/cpuinfo");
        let cores = cpus.lines().filter(|line| line.split(':').next().unwrap_or("").trim() == "processor");
        let board = read("proc/device-tree/model");
        let board = board.trim_matches(['\0', '\n', ' ']);
        let cpu = value(&cpus, "model name", ':')
            .or((!board.is_empty()).then_some(board))
            .unwrap_or(std::env::consts::ARCH);
        let release = read("etc/os-release");
        let kernel = read("proc/sys/kernel/osrelease");
        let os = match value(&release, "PRETTY_NAME", '=') {
            Some(name) => format!("{}, {} {}", name.trim_matches('"'), std::env::consts::OS, kernel.trim()),
            None => format!("{} {}", std::env::consts::OS, kernel.trim()),
        };
        let memory = value(&read("proc/meminfo"), "MemTotal", ':')
            .and_then(|text| text.strip_suffix("kB")?.trim().parse::<u64>().ok());
        Self {
            cpu: cpu.to_owned(),
            cores: cores.count().max(available),
            cores_available: available,
            instructions: Isa::detect().to_string(),
            os: os.trim().to_owned(),
            memory_bytes: memory.and_then(|kib| kib.checked_mul(1024)),
            load_average: read("proc/loadavg").split_whitespace().next().and_then(|text| text.parse().ok()),
            ternion: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// What to say where others use the machine, too.
    pub(super) fn warning(&self) -> Option<String> {
        let load = self.load_average.filter(|load| *load > BUSY * self.cores as f64)?;
        Some(format!(
            "warning: the machine is busy (load average {load:.2} on {} cores); speeds will be too low and will scatter",
            self.cores
        ))
    }

    /// One line.
    pub(super) fn line(&self) -> String {
        let mut line =
            format!("{}, {} of {} cores, {}", self.cpu, self.cores_available, self.cores, self.instructions);
        if let Some(memory) = self.memory_bytes {
            line += &format!(", {}", bytes(memory));
        }
        line += &format!("; {}", self.os);
        if let Some(load) = self.load_average {
            line += &format!("; load average {load:.2}");
        }
        line + &format!("; Ternion {}", self.ternion)
    }
}

/// What follows `key` and a separator on a line of its own.
fn value<'a>(text: &'a str, key: &str, separator: char) -> Option<&'a str> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(separator));
    pairs
        .find(|(found, _)| found.trim() == key)
        .map(|(_, value)| value.trim())
        .filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> Machine {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Machine::read(root.path(), 2)
    }

    #[test]
    fn linux_tells_everything() {
        let core = |n| format!("processor\t: {n}\nmodel name\t: Some CPU @ 3 GHz\nflags\t\t: fpu\n\n");
        let found = machine(&[
            ("proc/cpuinfo", &(0..4).map(core).collect::<String>()),
            ("proc/meminfo", "MemFree:  1 kB\nMemTotal:       2048 kB\n"),
            ("proc/loadavg", "2.50 1.00 0.50 1/100 4242\n"),
            ("proc/sys/kernel/osrelease", "6.1.0\n"),
            ("etc/os-release", "NAME=\"Some\"\nPRETTY_NAME=\"Some OS 12\"\n"),
        ]);
        assert_eq!(found.cpu, "Some CPU @ 3 GHz");
        assert_eq!((found.cores, found.cores_available, found.memory_bytes), (4, 2, Some(2 << 20)));
        assert!(found.os.starts_with("Some OS 12, ") && found.os.ends_with(" 6.1.0"), "{}", found.os);
        let line = found.line();
        assert!(line.contains("2 of 4 cores") && line.contains(&Isa::detect().to_string()), "{line}");
        assert!(found.warning().unwrap().contains("2.50 on 4 cores"));
        let idle = Machine { load_average: Some(2.0), ..found };
        assert_eq!(idle.warning(), None);
    }

    #[test]
    fn what_is_not_told_is_left_out() {
        let found = machine(&[("proc/device-tree/model", "Some Board\0")]);
        assert_eq!((found.cpu.as_str(), found.cores, found.memory_bytes), ("Some Board", 2, None));
        assert_eq!((found.load_average, found.warning()), (None, None));
        let bare = machine(&[]);
        assert_eq!(bare.cpu, std::env::consts::ARCH);
        assert!(!bare.line().contains("load average"));
    }
}
