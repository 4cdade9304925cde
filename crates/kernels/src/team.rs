//! Threads that work on one forward pass together.
//!
//! A pass of a decoder is some hundred steps of 20 to 500 microseconds, and each step needs all threads. Pools for larger tasks
//! put threads to sleep between steps and wake them again, which takes as long as a small step. The threads of a team spin
//! instead, for a millisecond or two, before they sleep.
//!
//! Each thread has a range of a step's pieces, which lie side by side in memory and are the same ones in each step of that size.
//! When a thread has finished its range, it takes pieces of the others' ranges. So a step does not wait for a thread that the
//! system has suspended: on a busy machine the others do its share.

use std::cell::{RefCell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{any::Any, fmt, hint, io, thread};

use crossbeam_utils::CachePadded;

use crate::affinity::confine;

/// How long a thread spins before it yields its CPU at each turn.
const SPIN: Duration = Duration::from_micros(50);

/// How long it waits for the next step before it sleeps. Longer than the time between two tokens.
const AWAKE: Duration = Duration::from_millis(2);

/// Threads that share the work of kernels: those that are called within [`install`](Self::install) are divided over them
/// and the calling thread.
///
/// One caller at a time: a second one, and a kernel that is called by a kernel, computes alone.
#[derive(Debug)]
pub struct Team {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Where the caller of `install` is pinned.
    caller_cpu: Option<usize>,
}

impl Team {
    /// A team of `threads`, the caller of [`install`](Self::install) being one of them; 0 takes [`default_threads`].
    ///
    /// # Errors
    /// Where the system starts no more threads.
    pub fn new(threads: usize) -> io::Result<Self> {
        let threads = if threads == 0 { default_threads() } else { threads };
        Self::start(threads, &[])
    }

    /// A team of a thread for each of `cpus`, which stays there. The caller of [`install`](Self::install) is on the first one until
    /// that returns. Without CPUs it is [`Team::new`]`(0)`.
    ///
    /// # Errors
    /// Where the system starts no more threads, and those of [`confine`].
    pub fn pinned(cpus: &[usize]) -> io::Result<Self> {
        let Some(first) = cpus.first() else { return Self::new(0) };
        drop(confine(&[*first])?);
        Self::start(cpus.len(), cpus)
    }

    fn start(threads: usize, cpus: &[usize]) -> io::Result<Self> {
        let shared =
            Shared { next: (0..threads).map(|_| CachePadded::default()).collect(), ..Shared::default() };
        let mut team = Self {
            shared: Arc::new(shared),
            threads: Vec::with_capacity(threads - 1),
            caller_cpu: cpus.first().copied(),
        };
        for index in 1..threads {
            let shared = Arc::clone(&team.shared);
            let thread = thread::Builder::new().name(format!("ternion-compute-{index}"));
            // A thread starts on the CPUs of the one that starts it.
            let _confined = cpus.get(index).map(|cpu| confine(&[*cpu])).transpose()?;
            // Those that have been started end when `team` is dropped.
            team.threads.push(thread.spawn(move || shared.serve(index))?);
        }
        Ok(team)
    }

    /// Threads, the caller's among them.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `work` on this thread; the kernels that it calls are divided over the team.
    pub fn install<R>(&self, work: impl FnOnce() -> R) -> R {
        // A team without this thread's CPU still computes the same.
        let _confined = self.caller_cpu.and_then(|cpu| confine(&[cpu]).ok());
        let _restore = Restore(CURRENT.with(|current| current.replace(Some(Arc::clone(&self.shared)))));
        work()
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.state.fetch_or(ENDED, Ordering::Release);
        self.shared.wake();
        for thread in self.threads.drain(..) {
            // It passes panics on to its callers and has none of its own.
            let _ = thread.join();
        }
    }
}

/// A thread for each physical core, or fewer where the process may not use so many: the two threads of a core share its vector units and
/// its path to memory, which are what bounds the kernels.
pub fn default_threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(num_cpus::get_physical()).max(1)
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Shared>>> = const { RefCell::new(None) };
}

struct Restore(Option<Arc<Shared>>);

impl Drop for Restore {
    fn drop(&mut self) {
        let before = self.0.take();
        CURRENT.with(|current| *current.borrow_mut() = before);
    }
}

/// Calls `work` for each index below `count`, on all threads of the team that the caller runs in.
///
/// A panic of `work` goes on in the caller when all have stopped.
pub(crate) fn for_each(count: usize, work: impl Fn(usize) + Sync) {
    let team = if count > 1 { CURRENT.with(|current| current.borrow().clone()) } else { None };
    match team {
        Some(team) => team.run(count, &work),
        None => (0..count).for_each(work),
    }
}

/// Calls `work` with each of `items` and its index, on all threads of the [`Team`] that the caller runs in.
///
/// A panic of `work` goes on in the caller when all have stopped.
pub fn for_each_mut<T: Send>(items: &mut [T], work: impl Fn(usize, &mut T) + Sync) {
    struct Items<T>(*mut T);
    // SAFETY: Each item is handed to one thread.
    unsafe impl<T: Send> Sync for Items<T> {}
    impl<T> Items<T> {
        fn at(&self, index: usize) -> *mut T {
            self.0.wrapping_add(index)
        }
    }
    let (count, items) = (items.len(), Items(items.as_mut_ptr()));
    // SAFETY: The index is below the length, and each is handed out once.
    for_each(count, |i| work(i, unsafe { &mut *items.at(i) }));
}

/// Threads that a kernel called from here is divided over.
pub(crate) fn threads() -> usize {
    CURRENT.with(|current| current.borrow().as_ref().map_or(1, |team| team.next.len()))
}

/// The state is a number of the step in the upper half and below it:
const STEP: u64 = 1 << 32;
/// the step may be joined,
const OPEN: u64 = 1 << 31;
/// the team has ended,
const ENDED: u64 = 1 << 30;
/// and how many threads have joined.
const JOINED: u64 = ENDED - 1;

#[derive(Default)]
struct Shared {
    state: CachePadded<AtomicU64>,
    /// For each thread, the caller's first, the next index of its range. Each has a cache line of its own.
    next: Box<[CachePadded<AtomicUsize>]>,
    /// Written only while the step is closed and nobody has joined, read only by those who have.
    step: UnsafeCell<Option<Step>>,
    /// Held by the caller during a step.
    caller: Mutex<()>,
    /// The payload of a panic in a piece of the step.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    sleep_lock: Mutex<()>,
    wakeup: Condvar,
}

/// Work for the indices below `count`. The lifetime is in truth that of the step, which ends after all who have joined.
#[derive(Clone, Copy)]
struct Step {
    work: &'static (dyn Fn(usize) + Sync),
    count: usize,
}

// SAFETY: Only `step` is not Sync by itself; its comment says how those who write and who read it keep apart.
unsafe impl Sync for Shared {}

impl Shared {
    /// One step, on the thread that asks for it and those that join.
    fn run(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        let Ok(caller) = self.caller.try_lock() else {
            // Another thread's step is under way, or this is a piece of one.
            return (0..count).for_each(work);
        };
        // SAFETY: Only the lifetime changes. It is used by this thread and by those that have joined, and this function
        // returns when they have left.
        let work =
            unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(work) };
        let step = Step { work, count };
        // SAFETY: This is the caller, the step before is closed, and all who had joined it have left.
        unsafe { *self.step.get() = Some(step) };
        for (thread, next) in self.next.iter().enumerate() {
            next.store(self.range(thread, count).start, Ordering::Relaxed);
        }
        let closed = self.state.load(Ordering::Relaxed) & !(STEP - 1);
        self.state.store(closed.wrapping_add(STEP) | OPEN, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.wake();
        }
        self.take_part(step, 0);
        let mut state = self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut backoff = Backoff::new();
        while state & JOINED > 0 {
            backoff.wait();
            state = self.state.load(Ordering::Acquire);
        }
        let panic = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            drop(caller);
            resume_unwind(panic);
        }
    }

    /// The pieces of a thread in a step of `count`.
    fn range(&self, thread: usize, count: usize) -> Range<usize> {
        let threads = self.next.len();
        count * thread / threads..count * (thread + 1) / threads
    }

    /// Computes the pieces of a thread, and then those of the others that are left.
    fn take_part(&self, step: Step, thread: usize) {
        let threads = self.next.len();
        let pieces = || {
            for owner in (thread..threads).chain(0..thread) {
                let (next, end) = (&self.next[owner], self.range(owner, step.count).end);
                // Only looks at a range that is empty, so that its cache line stays with all who look.
                while next.load(Ordering::Relaxed) < end {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index < end {
                        (step.work)(index);
                    }
                }
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(pieces)) {
            // The others find nothing more to do.
            self.next.iter().for_each(|next| next.store(step.count, Ordering::Relaxed));
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }

    /// The loop of a thread that is not the caller's, until the team ends.
    fn serve(&self, thread: usize) {
        let mut last = 0;
        let mut backoff = Backoff::new();
        loop {
            let state = self.state.load(Ordering::Acquire);
            if state & ENDED > 0 {
                return;
            }
            let is_new = state & OPEN > 0 && state / STEP != last;
            if !is_new {
                if backoff.wait() > AWAKE {
                    self.sleep(state);
                    backoff = Backoff::new();
                }
                continue;
            }
            let joined =
                self.state.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Relaxed);
            if joined.is_ok() {
                // SAFETY: This thread has joined, so nobody writes.
                if let Some(step) = unsafe { *self.step.get() } {
                    self.take_part(step, thread);
                }
                last = state / STEP;
                self.state.fetch_sub(1, Ordering::Release);
                backoff = Backoff::new();
            }
        }
    }

    /// Until the state is another than `seen`.
    fn sleep(&self, seen: u64) {
        let mut guard = self.sleep_lock.lock().unwrap_or_else(PoisonError::into_inner);
        // Either this thread sees the new state, or whoever has set it sees the sleeper.
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.state.load(Ordering::SeqCst) == seen {
            guard = self.wakeup.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake(&self) {
        // Nobody is between a look at the state and falling asleep.
        drop(self.sleep_lock.lock().unwrap_or_else(PoisonError::into_inner));
        self.wakeup.notify_all();
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("threads", &self.next.len()).finish_non_exhaustive()
    }
}

/// Busy waiting that spins at first and then yields to other programs.
struct Backoff {
    since: Option<Instant>,
    turns: u32,
}

impl Backoff {
    fn new() -> Self {
        Self { since: None, turns: 0 }
    }

    /// Waits a moment; returns how long it has been in all.
    fn wait(&mut self) -> Duration {
        self.turns = self.turns.wrapping_add(1);
        hint::spin_loop();
        if !self.turns.is_multiple_of(16) {
            return Duration::ZERO;
        }
        let waited = self.since.get_or_insert_with(Instant::now).elapsed();
        if waited > SPIN {
            thread::yield_now();
        }
        waited
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn every_index_is_taken_once() {
        for threads in [1, 2, 3, 7] {
            let team = Team::new(threads).unwrap();
            assert_eq!(team.threads(), threads);
            team.install(|| {
                assert_eq!(super::threads(), threads);
                for step in 0..2000 {
                    let taken: Vec<AtomicU32> = (0..step % 37).map(|_| AtomicU32::new(0)).collect();
                    for_each(taken.len(), |i| {
                        taken[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(taken.iter().all(|n| n.load(Ordering::Relaxed) == 1), "step {step}");
                }
            });
            assert_eq!(super::threads(), 1);
        }
    }

    #[test]
    fn by_default_there_are_no_more_threads_than_cores() {
        let available = thread::available_parallelism().unwrap().get();
        assert!((1..=available).contains(&default_threads()));
        assert_eq!(Team::new(0).unwrap().threads(), default_threads());
    }

    #[test]
    fn threads_that_have_fallen_asleep_wake_up() {
        let team = Team::new(3).unwrap();
        let met = Mutex::new(std::collections::HashSet::new());
        team.install(|| {
            let deadline = Instant::now() + Duration::from_secs(60);
            while met.lock().unwrap().len() < 3 && Instant::now() < deadline {
                thread::sleep(2 * AWAKE);
                for_each(3, |_| {
                    met.lock().unwrap().insert(thread::current().id());
                    thread::sleep(Duration::from_millis(5));
                });
            }
        });
        assert_eq!(met.into_inner().unwrap().len(), 3);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn each_pinned_thread_is_on_its_cpu_and_the_caller_only_within() {
        let cpus = crate::allowed_cpus().unwrap();
        let team = Team::pinned(&cpus).unwrap();
        assert_eq!(team.threads(), cpus.len());
        let seen = Mutex::new(std::collections::BTreeSet::new());
        team.install(|| {
            let deadline = Instant::now() + Duration::from_secs(60);
            while seen.lock().unwrap().len() < cpus.len() && Instant::now() < deadline {
                for_each(cpus.len(), |_| {
                    let own = crate::allowed_cpus().unwrap();
                    assert_eq!(own.len(), 1, "a thread stays on one CPU");
                    seen.lock().unwrap().insert(own[0]);
                    thread::sleep(Duration::from_millis(5));
                });
            }
        });
        let mut sorted = cpus.clone();
        sorted.sort_unstable();
        assert!(seen.into_inner().unwrap().into_iter().eq(sorted));
        assert_eq!(crate::allowed_cpus().unwrap(), cpus, "the caller is let go");
        assert!(Team::pinned(&[1000]).is_err());
        assert_eq!(Team::pinned(&[]).unwrap().threads(), default_threads());
    }

    #[test]
    fn steps_within_steps_and_beside_them_are_computed() {
        let team = Team::new(2).unwrap();
        let count = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    team.install(|| {
                        for_each(50, |_| {
                            for_each(10, |_| {
                                count.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    });
                });
            }
        });
        assert_eq!(count.into_inner(), 1000);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(2).unwrap();
        team.install(|| {
            for bad in [0, 99] {
                let result = catch_unwind(|| for_each(100, |i| assert_ne!(i, bad, "broken")));
                assert!(result.is_err());
            }
            let count = AtomicU32::new(0);
            for_each(100, |_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 100);
        });
    }
}
