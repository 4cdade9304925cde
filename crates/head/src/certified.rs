//! A head whose leading logits are proven: an int8 copy is read for each token, and what could be among the largest logits is
//! computed from the original weights.
//!
//! The copy is made by threads of its own after the model is loaded, so that loading takes no longer; the first answer waits for
//! what is left of it. Which logits are rounded depends on the tokens alone and never on when the copy was ready.

use std::sync::{
    Arc, Mutex, OnceLock, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
use std::thread::{self, JoinHandle};

use ternion_core::{Error, ErrorKind, Result};
use ternion_engine::{ComputeThreads, LogitsPrecision};
use ternion_kernels::{BoundedMatrix, InputBound};

use crate::HeadWeights;

/// At most one in this many rows is computed again. With more candidates the whole head is computed, in one stream.
const ROWS_PER_CANDIDATE: usize = 8;

/// A head with an int8 copy with bounds, or the making of it.
#[derive(Debug)]
pub struct CertifiedHead {
    weights: HeadWeights,
    /// `None` where it could not be made.
    copy: OnceLock<Option<BoundedMatrix>>,
    making: Mutex<Option<JoinHandle<Result<BoundedMatrix>>>>,
    /// Set where nobody needs the copy any more.
    stop: Arc<AtomicBool>,
    counts: Counts,
}

/// What it has done so far.
#[derive(Debug, Default)]
struct Counts {
    rows: AtomicU64,
    candidates: AtomicU64,
    whole: AtomicU64,
}

impl CertifiedHead {
    /// Begins to make a copy of `weights`, `[vocab_size, hidden]`, with threads of its own like these.
    pub fn start(weights: HeadWeights, threads: &ComputeThreads) -> Self {
        let own = weights.clone();
        let threads = threads.clone();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let make = move || {
            let [rows, cols] = weights.shape();
            threads.team()?.install(|| {
                BoundedMatrix::new(rows, cols, |rows, out| {
                    if stopped.load(Ordering::Relaxed) {
                        return Err(Error::new(ErrorKind::Cancelled, "the model is unloaded"));
                    }
                    weights.widen(rows, out)
                })
            })
        };
        let making = thread::Builder::new().name("ternion-head".into()).spawn(make);
        let copy = OnceLock::new();
        if let Err(error) = &making {
            tracing::warn!(%error, "the head has no certified copy: no thread can be started");
            let _ = copy.set(None);
        }
        Self { weights: own, copy, making: Mutex::new(making.ok()), stop, counts: Counts::default() }
    }

    /// The copy, once it is made. `None` where it cannot be made, which is logged.
    fn copy(&self) -> Option<&BoundedMatrix> {
        let wait = || {
            let making = self.making.lock().unwrap_or_else(PoisonError::into_inner).take()?;
            let made = making.join().unwrap_or_else(|_| Err(Error::backend("a bug in the rounding")));
            made.inspect_err(|error| tracing::warn!(%error, "the head has no certified copy")).ok()
        };
        self.copy.get_or_init(wait).as_ref()
    }

    /// The weights that the copy is made of.
    pub fn weights(&self) -> &HeadWeights {
        &self.weights
    }

    /// Logits `[rows, vocab_size]` of hidden states `[rows, hidden]`, each row with its precision.
    ///
    /// # Errors
    /// Where a row that is to be exact cannot be read.
    ///
    /// # Panics
    /// If the lengths are not those of so many rows.
    pub fn forward(&self, hidden: &[f32], precision: &[LogitsPrecision], logits: &mut [f32]) -> Result<()> {
        let weights = &self.weights;
        let [vocab, width] = weights.shape();
        assert_eq!(
            [hidden.len(), logits.len()],
            [width, vocab].map(|size| size * precision.len()),
            "rows of a head"
        );
        let leading = |precision: &LogitsPrecision| match precision {
            LogitsPrecision::Leading(count) => Some(*count),
            _ => None,
        };
        // Rows of the same kind stand together, so that each product reads its weights once.
        let mut first = 0;
        for same in precision.chunk_by(|a, b| leading(a).is_some() == leading(b).is_some()) {
            let rows = first..first + same.len();
            first = rows.end;
            let hidden = &hidden[rows.start * width..rows.end * width];
            let logits = &mut logits[rows.start * vocab..rows.end * vocab];
            let copy = if leading(&same[0]).is_some() { self.copy() } else { None };
            let Some(copy) = copy else {
                weights.multiply(weights.bytes(), hidden, logits, vocab)?;
                continue;
            };
            let bounds = copy.matmul(hidden, logits, vocab);
            let states = hidden.chunks_exact(width).zip(bounds);
            for ((logits, (hidden, bound)), precision) in logits.chunks_exact_mut(vocab).zip(states).zip(same)
            {
                self.certify(copy, (hidden, bound), leading(precision).unwrap_or(vocab), logits)?;
            }
        }
        Ok(())
    }

    /// Makes the `count` largest of rounded logits exact.
    fn certify(
        &self,
        copy: &BoundedMatrix,
        (hidden, bound): (&[f32], InputBound),
        count: usize,
        logits: &mut [f32],
    ) -> Result<()> {
        self.counts.rows.fetch_add(1, Ordering::Relaxed);
        let candidates = copy.candidates(logits, bound, count);
        if let Some(found) = candidates.filter(|found| found.len() <= logits.len() / ROWS_PER_CANDIDATE) {
            self.counts.candidates.fetch_add(found.len() as u64, Ordering::Relaxed);
            return self.weights.multiply_rows(&found, hidden, logits);
        }
        self.counts.whole.fetch_add(1, Ordering::Relaxed);
        let vocab = logits.len();
        self.weights.multiply(self.weights.bytes(), hidden, logits, vocab)
    }
}

impl Drop for CertifiedHead {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(making) = self.making.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            // What it holds of the model is gone with it.
            let _ = making.join();
        }
        let Counts { rows, candidates, whole } = &self.counts;
        let (rows, candidates) = (rows.load(Ordering::Relaxed), candidates.load(Ordering::Relaxed));
        let whole = whole.load(Ordering::Relaxed);
        if rows > 0 {
            tracing::debug!(rows, candidates, whole, "certified logits");
        }
    }
}
