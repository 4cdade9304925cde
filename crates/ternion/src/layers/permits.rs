//! The places of a limit: which requests have one, which wait, and which lose theirs because nobody reads them.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use ternion_core::{Error, ErrorKind, Result};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

/// How long a reader may leave an event unread before a waiting request gets the place.
const UNREAD: Duration = Duration::from_millis(500);

/// How often this is looked at while requests wait.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A place when its turn has come.
pub(super) type Turn = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit>> + Send>>;

#[derive(Debug)]
pub(super) struct PermitPool {
    free: Arc<Semaphore>,
    /// Requests that wait for a place.
    waiting: AtomicUsize,
    held: Mutex<Vec<Weak<SharedPermit>>>,
    /// Whether a task looks for places that nobody reads from.
    watched: AtomicBool,
}

/// The place of a request that runs.
#[derive(Debug)]
struct SharedPermit(Mutex<PermitState>);

#[derive(Debug)]
struct PermitState {
    permit: Option<OwnedSemaphorePermit>,
    /// Since when the reader has an event and has not asked for the next; `None` while it waits for one.
    unread: Option<Instant>,
}

impl SharedPermit {
    fn lock(&self) -> MutexGuard<'_, PermitState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of those that wait, for as long as it does.
struct Waiting(Arc<PermitPool>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl PermitPool {
    pub(super) fn new(count: usize) -> Arc<Self> {
        Arc::new(Self {
            free: Arc::new(Semaphore::new(count)),
            waiting: AtomicUsize::new(0),
            held: Mutex::default(),
            watched: AtomicBool::new(false),
        })
    }

    /// How many requests wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Acquire)
    }

    /// A free place, unless others wait for one: it is theirs.
    pub(super) fn try_take(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.free).try_acquire_owned().ok()
    }

    /// Waits in turn; `None` if as many as `most` wait already. The turn has its place in the queue when it is first polled.
    pub(super) fn wait(self: &Arc<Self>, most: usize) -> Option<Turn> {
        self.waiting
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < most).then_some(n + 1))
            .ok()?;
        let waiting = Waiting(Arc::clone(self));
        let free = Arc::clone(&self.free);
        self.watch();
        Some(Box::pin(async move {
            let permit = free.acquire_owned().await;
            drop(waiting);
            permit.map_err(|e| Error::new(ErrorKind::Closed, "no places are given any more").with_source(e))
        }))
    }

    /// Starts the task that looks for unread streams. It ends when nobody waits.
    fn watch(self: &Arc<Self>) {
        if self.watched.swap(true, Ordering::AcqRel) {
            return;
        }
        let pool = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                pool.take_back();
                if pool.waiting() > 0 {
                    continue;
                }
                pool.watched.store(false, Ordering::Release);
                // One may have come in between, which saw that there is a task.
                if pool.waiting() == 0 || pool.watched.swap(true, Ordering::AcqRel) {
                    return;
                }
            }
        });
    }

    /// Gives the places of requests that nobody reads to those that wait, of the longest unread ones first.
    fn take_back(&self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|place| place.strong_count() > 0);
        let mut unread: Vec<(Instant, Arc<SharedPermit>)> = held
            .iter()
            .filter_map(Weak::upgrade)
            .filter_map(|place| {
                let since = place.lock().unread.filter(|since| since.elapsed() >= UNREAD)?;
                Some((since, place))
            })
            .collect();
        unread.sort_by_key(|(since, _)| *since);
        for (_, place) in unread.into_iter().take(self.waiting()) {
            let mut taken = place.lock();
            if taken.unread.is_some() {
                taken.permit = None;
            }
        }
    }
}

/// A place after the first one; `None` if the request is cancelled before.
type Again = Pin<Box<dyn Future<Output = Option<OwnedSemaphorePermit>> + Send>>;

/// Holds the place of a request that runs. It is given back when this is dropped or the request is cancelled, as the
/// backend gives up a cancelled request even if nobody reads its end; and while nobody reads, if others wait.
pub(super) struct Permit {
    pool: Arc<PermitPool>,
    place: Arc<SharedPermit>,
    cancel: CancellationToken,
    watching: JoinHandle<()>,
    /// The wait for another place, after it was given to others.
    again: Option<Again>,
}

impl Permit {
    pub(super) fn new(
        pool: &Arc<PermitPool>,
        permit: OwnedSemaphorePermit,
        cancel: CancellationToken,
    ) -> Self {
        let taken = PermitState { permit: Some(permit), unread: Some(Instant::now()) };
        let place = Arc::new(SharedPermit(Mutex::new(taken)));
        pool.held.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&place));
        let watching = tokio::spawn({
            let (place, cancel) = (Arc::clone(&place), cancel.clone());
            async move {
                cancel.cancelled().await;
                place.lock().permit = None;
            }
        });
        Self { pool: Arc::clone(pool), place, cancel, watching, again: None }
    }

    /// The reader waits for an event. Ready when the request has a place, which others may have had meanwhile.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        {
            let mut taken = self.place.lock();
            taken.unread = None;
            if taken.permit.is_some() || self.cancel.is_cancelled() {
                return Poll::Ready(());
            }
        }
        if self.again.is_none() {
            self.again = self.pool.wait(usize::MAX).map(|turn| {
                let cancel = self.cancel.clone();
                Box::pin(async move { cancel.run_until_cancelled(turn).await?.ok() }) as Again
            });
        }
        let Some(again) = &mut self.again else { return Poll::Ready(()) };
        let permit = ready!(again.as_mut().poll(cx));
        self.again = None;
        let mut taken = self.place.lock();
        // The task that watches the token may have run before.
        taken.permit = permit.filter(|_| !self.cancel.is_cancelled());
        Poll::Ready(())
    }

    /// The reader has an event.
    pub(super) fn has_event(&self) {
        self.place.lock().unread = Some(Instant::now());
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.watching.abort();
        self.place.lock().permit = None;
    }
}
