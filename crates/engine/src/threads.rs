//! The threads that a local model computes with.

use std::io;
use std::sync::Arc;

use ternion_core::config::{ModelConfig, PinThreads};
use ternion_core::{Error, ErrorKind, Result};
use ternion_kernels::{Team, allowed_cpus, confine, default_threads};

/// How many threads a local model computes with, and on which CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ComputeThreads {
    count: usize,
    /// One for each thread; none where they are not pinned.
    cpus: Arc<[usize]>,
}

impl Default for ComputeThreads {
    /// One for each physical core, not pinned.
    fn default() -> Self {
        Self::new(0)
    }
}

impl ComputeThreads {
    /// So many threads that the system moves as it likes; 0 takes one for each physical core.
    pub fn new(count: usize) -> Self {
        let count = if count == 0 { default_threads() } else { count };
        Self { count, cpus: Arc::default() }
    }

    /// The threads that `threads` and `pin_threads` of a configuration ask for.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] for more threads than CPUs and for CPUs that the process may not use,
    /// [`ErrorKind::Unsupported`] where threads cannot be pinned.
    pub fn of(config: &ModelConfig) -> Result<Self> {
        if config.pin_threads.is_no() {
            return Ok(Self::new(config.threads.unwrap_or(0)));
        }
        let allowed = allowed_cpus().map_err(cannot_pin)?;
        let cpus = choose(&config.pin_threads, config.threads, &allowed)?;
        Ok(Self { count: cpus.len(), cpus: cpus.into() })
    }

    /// How many, at least 1.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The CPU of each; empty if they are not pinned.
    pub fn cpus(&self) -> &[usize] {
        &self.cpus
    }

    /// Starts them as a team.
    ///
    /// # Errors
    /// [`ErrorKind::ResourceExhausted`] where they cannot be started.
    pub fn team(&self) -> Result<Team> {
        let team = if self.cpus.is_empty() { Team::new(self.count) } else { Team::pinned(&self.cpus) };
        team.map_err(no_threads)
    }

    /// Loads a model: runs `load` on a thread of a rayon pool of as many threads. If the threads are pinned, those of the pool, and all
    /// that `load` starts, stay on their CPUs as a whole. The system then takes memory from the NUMA node of these CPUs.
    ///
    /// # Errors
    /// Those of `load`; [`ErrorKind::ResourceExhausted`] where the threads cannot be started.
    pub fn load<R: Send>(&self, load: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        let confined = if self.cpus.is_empty() { Ok(None) } else { confine(&self.cpus).map(Some) };
        // The threads of the pool start on the CPUs of this one.
        let confined = confined.map_err(cannot_pin)?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.count).build().map_err(no_threads)?;
        drop(confined);
        pool.install(load)
    }
}

/// The CPU of each thread.
fn choose(pinned: &PinThreads, threads: Option<usize>, allowed: &[usize]) -> Result<Vec<usize>> {
    let refuse = |message| Err(Error::invalid_config(message));
    let mut cpus = match pinned {
        PinThreads::Cpus(cpus) => cpus.clone(),
        _ => allowed.to_vec(),
    };
    if let Some(cpu) = cpus.iter().find(|cpu| !allowed.contains(cpu)) {
        let mut sorted = allowed.to_vec();
        sorted.sort_unstable();
        let usable = PinThreads::Cpus(sorted);
        return refuse(format!("pin_threads: the process may not use CPU {cpu}, only {usable}"));
    }
    let threads = match (threads, pinned) {
        (Some(threads), _) => threads,
        (None, PinThreads::Cpus(cpus)) => cpus.len(),
        (None, _) => default_threads().min(cpus.len()),
    };
    if threads > cpus.len() {
        let there = cpus.len();
        return refuse(format!("threads: {threads} is more than the {there} CPUs that `pin_threads` has"));
    }
    cpus.truncate(threads);
    Ok(cpus)
}

fn no_threads(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::ResourceExhausted, "cannot start the threads").with_source(error)
}

fn cannot_pin(error: io::Error) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::InvalidConfig,
    };
    Error::new(kind, "pin_threads: threads cannot be pinned").with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(pinned: &str, threads: Option<usize>) -> std::result::Result<Vec<usize>, String> {
        choose(&pinned.parse().unwrap(), threads, &[0, 2, 1, 3]).map_err(|error| error.to_string())
    }

    #[test]
    fn threads_take_cores_first_or_the_list_in_its_order() {
        assert_eq!(chosen("true", Some(3)).unwrap(), [0, 2, 1]);
        assert_eq!(chosen("true", None).unwrap(), [0, 2, 1, 3][..default_threads().min(4)]);
        assert_eq!(chosen("3,0", None).unwrap(), [3, 0]);
        assert_eq!(chosen("3,0-1", Some(2)).unwrap(), [3, 0]);
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_can() {
        let error = chosen("2-4", None).unwrap_err();
        assert!(error.contains("CPU 4") && error.contains("0-3"), "{error}");
        let error = chosen("true", Some(5)).unwrap_err();
        assert!(error.contains("threads: 5") && error.contains("4 CPUs"), "{error}");
        assert!(chosen("1", Some(2)).unwrap_err().contains("1 CPUs"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_configuration_pins_a_team() {
        let all = allowed_cpus().unwrap();
        let mut config = ModelConfig::default();
        assert_eq!(ComputeThreads::of(&config).unwrap(), ComputeThreads::default());
        config.pin_threads = PinThreads::Cores;
        config.threads = Some(1);
        let threads = ComputeThreads::of(&config).unwrap();
        let first = all[0];
        assert_eq!((threads.count(), threads.cpus()), (1, &[first][..]));
        let inside = threads.team().unwrap().install(|| allowed_cpus().unwrap());
        assert_eq!(inside, [first]);
        let loading = threads.load(|| Ok((allowed_cpus().unwrap(), rayon::current_num_threads()))).unwrap();
        assert_eq!(loading, (vec![first], 1));
        assert_eq!(allowed_cpus().unwrap(), all, "this thread is let go");
    }
}
