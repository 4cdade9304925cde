//! How fast this machine reads memory: the ceiling of decoding, which reads all weights for every token.
//!
//! The kernels' own wide loads read the model's file where it is mapped, or a buffer if the model is small enough for the
//! caches. This is done before, between and after the passes of the model, by threads that are there already. The best pass
//! counts: whatever else runs on the machine can only slow one down.

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Instant;

use ternion::formats::SharedBytes;
use ternion_kernels::{Team, read_through};

/// The first pass also brings the pages into the process.
const PASSES: usize = 4;
/// A file below that may lie in the caches.
const SMALL: u64 = 64 << 20;

/// What is read, and the best result so far.
pub(super) struct Bandwidth {
    team: Team,
    /// The file that holds most of the model.
    file: Option<PathBuf>,
    bytes: usize,
    best: Option<f64>,
}

impl Bandwidth {
    /// Reads with `threads` threads, and at most `bytes`, of the model at `path`. `None` if the threads cannot be started.
    pub(super) fn new(path: Option<&Path>, bytes: usize, threads: usize) -> Option<Self> {
        let file = path.and_then(largest).filter(|(_, size)| *size >= SMALL).map(|(file, _)| file);
        Some(Self { team: Team::new(threads).ok()?, file, bytes, best: None })
    }

    /// Measures once more. The memory for it is released at the end.
    pub(super) fn measure(&mut self) {
        // A mapping of its own: the engine's cannot be reached from here, and both show the same pages.
        let mapped = self.file.as_deref().and_then(|file| SharedBytes::map(file).ok());
        let found = match mapped {
            Some(map) => self.read(&map[..map.len().min(self.bytes)]),
            None => buffer(self.bytes).and_then(|buffer| self.read(&buffer)),
        };
        // `f64::max` passes over NaN, and one measurement that failed leaves the others.
        self.best = found.into_iter().chain(self.best).reduce(f64::max);
    }

    /// Bytes per second; `None` if there was no memory for it.
    pub(super) fn best(&self) -> Option<f64> {
        self.best
    }

    fn read(&self, bytes: &[u8]) -> Option<f64> {
        let mut fastest = f64::INFINITY;
        for _ in 0..PASSES {
            let start = Instant::now();
            black_box(self.team.install(|| read_through(black_box(bytes))));
            fastest = fastest.min(start.elapsed().as_secs_f64());
        }
        Some(bytes.len() as f64 / fastest).filter(|rate| rate.is_finite() && *rate > 0.0)
    }
}

/// Memory of which every page is written, so that none is the kernel's page of zeros.
fn buffer(bytes: usize) -> Option<Vec<u8>> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(bytes).ok()?;
    buffer.resize(bytes, 1);
    Some(buffer)
}

/// The largest file of a model that is one file or a folder, and its size.
fn largest(path: &Path) -> Option<(PathBuf, u64)> {
    let size = |path: PathBuf| {
        let found = path.metadata().ok().filter(std::fs::Metadata::is_file)?;
        Some((path, found.len()))
    };
    match std::fs::read_dir(path) {
        Ok(entries) => entries.flatten().filter_map(|entry| size(entry.path())).max_by_key(|(_, size)| *size),
        Err(_) => size(path.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_is_a_plausible_number_and_the_best_one_counts() {
        for threads in [1, 2, 7] {
            let mut bandwidth = Bandwidth::new(None, 1 << 20, threads).unwrap();
            assert_eq!(bandwidth.best(), None);
            bandwidth.measure();
            let first = bandwidth.best().unwrap();
            assert!(first > 1e6 && first.is_finite(), "{threads}: {first}");
            bandwidth.measure();
            assert!(bandwidth.best().unwrap() >= first);
        }
    }

    #[test]
    fn the_largest_file_of_a_model_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("config.json"), "{}").unwrap();
        std::fs::File::create(at("model.safetensors")).unwrap().set_len(SMALL).unwrap();
        std::fs::create_dir(at("folder")).unwrap();
        let expected = (at("model.safetensors"), SMALL);
        assert_eq!(largest(folder.path()), Some(expected.clone()));
        assert_eq!(largest(&expected.0), Some(expected.clone()));
        assert_eq!(largest(&at("none")), None);
        let of = |path: &Path| Bandwidth::new(Some(path), 1 << 20, 1).unwrap();
        assert_eq!(of(folder.path()).file, Some(expected.0));
        assert_eq!(of(&at("config.json")).file, None, "it would be read from a cache");
        let mut bandwidth = of(folder.path());
        bandwidth.measure();
        assert!(bandwidth.best().is_some());
    }
}
