//! On which CPUs threads run.
//!
//! The system moves threads between CPUs, and after a move what they read is in another core's cache, or in the memory of another
//! NUMA node. A thread that is pinned stays where it is.

use std::io;
use std::marker::PhantomData;

/// The CPUs that the calling thread may use, a physical core's first one before all second ones, each in ascending order.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] where threads cannot be pinned: elsewhere than on Linux and Android.
pub fn allowed_cpus() -> io::Result<Vec<usize>> {
    let cpus = system::allowed()?;
    let siblings: Vec<Vec<usize>> = cpus.iter().map(|cpu| system::siblings(*cpu)).collect();
    Ok(first_of_each_core(&cpus, &siblings))
}

/// Orders `cpus`, with the CPUs of the same core for each, so that each core's first CPU is before all second ones.
fn first_of_each_core(cpus: &[usize], siblings: &[Vec<usize>]) -> Vec<usize> {
    let rank =
        |i: usize| siblings[i].iter().filter(|other| **other < cpus[i] && cpus.contains(other)).count();
    let mut order: Vec<usize> = (0..cpus.len()).collect();
    order.sort_by_key(|i| (rank(*i), cpus[*i]));
    order.into_iter().map(|i| cpus[i]).collect()
}

/// Keeps the calling thread, and those that it starts meanwhile, on `cpus` until the result is dropped. The threads that it has started
/// stay there.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] where the process may use none of them, [`io::ErrorKind::Unsupported`] elsewhere than on
/// Linux and Android.
pub fn confine(cpus: &[usize]) -> io::Result<Confined> {
    let before = system::allowed()?;
    system::set(cpus)?;
    Ok(Confined { before, _this_thread: PhantomData })
}

/// A thread that [`confine`] keeps on some CPUs.
#[derive(Debug)]
#[must_use = "dropping it lets the thread go"]
pub struct Confined {
    before: Vec<usize>,
    _this_thread: PhantomData<*const ()>,
}

impl Drop for Confined {
    fn drop(&mut self) {
        // The set was the thread's own a moment ago; should it not be any more, the system has set another one.
        let _ = system::set(&self.before);
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
mod system {
    use std::{fs, io};

    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    use nix::unistd::Pid;

    const THIS_THREAD: Pid = Pid::from_raw(0);

    pub(super) fn allowed() -> io::Result<Vec<usize>> {
        let set = sched_getaffinity(THIS_THREAD)?;
        Ok((0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect())
    }

    pub(super) fn set(cpus: &[usize]) -> io::Result<()> {
        let mut set = CpuSet::new();
        cpus.iter().try_for_each(|cpu| set.set(*cpu))?;
        Ok(sched_setaffinity(THIS_THREAD, &set)?)
    }

    /// The CPUs of the core that `cpu` belongs to. A system that does not tell has a core for each.
    pub(super) fn siblings(cpu: usize) -> Vec<usize> {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        fs::read_to_string(path).ok().and_then(|list| super::parse_list(&list)).unwrap_or_else(|| vec![cpu])
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod system {
    use std::io;

    const REFUSAL: &str = "threads can be pinned on Linux and Android alone";

    pub(super) fn allowed() -> io::Result<Vec<usize>> {
        Err(io::Error::new(io::ErrorKind::Unsupported, REFUSAL))
    }

    pub(super) fn set(_: &[usize]) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, REFUSAL))
    }

    pub(super) fn siblings(cpu: usize) -> Vec<usize> {
        vec![cpu]
    }
}

/// A list such as `0,64` or `0-1`, as the kernel writes it.
#[cfg_attr(not(any(target_os = "linux", target_os = "android")), allow(dead_code, reason = "used on Linux"))]
fn parse_list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_core_comes_before_second_threads() {
        // Two threads a core, numbered as on Intel servers (0 and 4, ...), and side by side (0 and 1, ...).
        let far: Vec<Vec<usize>> = (0..8).map(|cpu| vec![cpu % 4, cpu % 4 + 4]).collect();
        assert_eq!(first_of_each_core(&[0, 1, 2, 3, 4, 5, 6, 7], &far), [0, 1, 2, 3, 4, 5, 6, 7]);
        let near: Vec<Vec<usize>> = (0..8).map(|cpu| vec![cpu / 2 * 2, cpu / 2 * 2 + 1]).collect();
        assert_eq!(first_of_each_core(&[0, 1, 2, 3, 4, 5, 6, 7], &near), [0, 2, 4, 6, 1, 3, 5, 7]);
        // The first thread of the second core is not ours.
        assert_eq!(first_of_each_core(&[0, 1, 3], &[vec![0, 1], vec![0, 1], vec![2, 3]]), [0, 3, 1]);
    }

    #[test]
    fn lists_of_the_kernel_are_read() {
        assert_eq!(parse_list("0,64\n"), Some(vec![0, 64]));
        assert_eq!(parse_list("0-2,7\n"), Some(vec![0, 1, 2, 7]));
        assert_eq!(parse_list(""), None);
        assert_eq!(parse_list("0-"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_thread_is_confined_for_a_while_and_what_it_starts_for_ever() {
        let all = system::allowed().unwrap();
        let last = *all.last().unwrap();
        let confined = confine(&[last]).unwrap();
        assert_eq!(system::allowed().unwrap(), [last]);
        let (begin, begun) = std::sync::mpsc::channel();
        let child = std::thread::spawn(move || {
            begun.recv().unwrap();
            system::allowed().unwrap()
        });
        drop(confined);
        assert_eq!(system::allowed().unwrap(), all);
        begin.send(()).unwrap();
        assert_eq!(child.join().unwrap(), [last]);
        assert_eq!(allowed_cpus().unwrap().len(), all.len());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn cpus_that_do_not_exist_are_refused() {
        let before = system::allowed().unwrap();
        for cpus in [&[1000][..], &[1 << 20], &[]] {
            assert_eq!(confine(cpus).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{cpus:?}");
        }
        assert_eq!(system::allowed().unwrap(), before);
    }
}
