//! Weights that are not kept in memory: a thread reads them from the disk, piece by piece, a little ahead of the pass
//! that computes with them.
//!
//! A few buffers go round: the pass sends an empty one with the number of the piece that it will need, the thread sends it
//! back full. Which piece is needed when is known (layer by layer, then the head), so the pass asks ahead as long as it
//! has empty buffers, and from its end on for the beginning of the next pass. Nothing is read twice within a pass, and
//! what is in flight never takes more than the buffers.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};

use ternion_core::{Error, ErrorKind, Result, catch_panic};
use ternion_formats::SharedBytes;

/// How many pieces are read ahead, the one that is computed with among them.
pub(crate) const BUFFERS: usize = 4;

/// Where the bytes of a piece come from.
pub(crate) trait Source: Send + Sync {
    /// How many there are.
    fn size(&self) -> usize;

    /// Reads all of them into a buffer of that length.
    ///
    /// # Errors
    /// Naming the file.
    fn read(&self, out: &mut [u8]) -> Result<()>;
}

impl Source for SharedBytes {
    fn size(&self) -> usize {
        self.len()
    }

    fn read(&self, out: &mut [u8]) -> Result<()> {
        self.read_at(0, out)
    }
}

/// A piece to be read into a buffer, and the same on its way back.
struct Request {
    piece: usize,
    buffer: Vec<u8>,
}

struct Filled {
    buffer: Vec<u8>,
    outcome: Result<()>,
}

/// The pieces that are streamed, with the thread that reads them. It ends when this is dropped.
pub(crate) struct Stream {
    sizes: Vec<usize>,
    /// The first piece of the head; passes without logits end before it.
    head: usize,
    state: Mutex<State>,
}

struct State {
    requests: mpsc::Sender<Request>,
    filled: mpsc::Receiver<Filled>,
    /// The pieces that have been asked for and not taken, in order.
    ahead: VecDeque<usize>,
    empty: Vec<Vec<u8>>,
    /// Where the pass ends that is computed.
    end: usize,
    failure: Option<Error>,
}

impl Stream {
    /// Starts the thread. `pieces` are in the order of a pass, those from `head` on are the head's.
    ///
    /// # Errors
    /// [`ResourceExhausted`](ErrorKind::ResourceExhausted) where it cannot be started.
    pub(crate) fn start(pieces: Vec<Box<dyn Source>>, head: usize) -> Result<Self> {
        let sizes: Vec<usize> = pieces.iter().map(|piece| piece.size()).collect();
        let largest = sizes.iter().copied().max().unwrap_or(0);
        let empty = (0..BUFFERS.min(pieces.len())).map(|_| vec![0; largest]).collect();
        let (requests, inbox) = mpsc::channel::<Request>();
        let (outbox, filled) = mpsc::channel();
        let read = move || {
            while let Ok(Request { piece, mut buffer }) = inbox.recv() {
                let source = &pieces[piece];
                // The thread goes on after a panic, and the buffer goes back.
                let outcome = catch_panic(|| source.read(&mut buffer[..source.size()]));
                let outcome = outcome.unwrap_or_else(|panic| {
                    Err(Error::backend(format!("the thread that reads weights panicked: {panic}")))
                });
                if outbox.send(Filled { buffer, outcome }).is_err() {
                    break;
                }
            }
        };
        std::thread::Builder::new().name("ternion-read".into()).spawn(read).map_err(|e| {
            Error::new(ErrorKind::ResourceExhausted, "cannot start the thread that reads weights")
                .with_source(e)
        })?;
        let state = State { requests, filled, ahead: VecDeque::new(), empty, end: 0, failure: None };
        Ok(Self { sizes, head, state: Mutex::new(state) })
    }

    /// A pass begins: which pieces it will take is known from here on.
    pub(crate) fn begin(&self, with_head: bool) {
        let mut state = self.state();
        state.end = if with_head { self.sizes.len() } else { self.head };
        state.failure = None;
        let last = state.ahead.back().copied();
        state.ask_ahead(last);
    }

    /// Calls `compute` with the bytes of a piece. `None` if it cannot be read: [`failure`](Self::failure) says why. The next
    /// pass begins anew, and reads it again.
    pub(crate) fn with<R>(&self, piece: usize, compute: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let taken = self.state().take(piece);
        let buffer = match taken {
            Ok(buffer) => buffer,
            Err(error) => {
                let mut state = self.state();
                // Nothing stays in flight, so that the next pass finds its own beginning.
                state.recall();
                state.failure = Some(error);
                return None;
            }
        };
        let lent = Lent { stream: self, piece, buffer };
        Some(compute(&lent.buffer[..self.sizes[piece]]))
    }

    /// The failure that ended the pass, where it was one of reading.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.state().failure.take()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that may panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer that a computation uses. It goes back when this is dropped, after a panic too.
struct Lent<'a> {
    stream: &'a Stream,
    piece: usize,
    buffer: Vec<u8>,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut state = self.stream.state();
        state.empty.push(std::mem::take(&mut self.buffer));
        let last = state.ahead.back().copied().unwrap_or(self.piece);
        state.ask_ahead(Some(last));
    }
}

impl State {
    fn take(&mut self, piece: usize) -> Result<Vec<u8>> {
        if self.ahead.front().is_some_and(|next| *next != piece) {
            // Another pass was expected.
            self.recall();
        }
        let was_ahead = !self.ahead.is_empty();
        if !was_ahead {
            self.ask(piece);
        }
        let mut filled = self.receive()?;
        if was_ahead && filled.outcome.is_err() {
            // It was read before this pass looked at the file, so the reason may be over.
            self.empty.push(filled.buffer);
            self.recall();
            self.ask(piece);
            filled = self.receive()?;
        }
        match filled.outcome {
            Ok(()) => Ok(filled.buffer),
            Err(error) => {
                self.empty.push(filled.buffer);
                Err(error)
            }
        }
    }

    /// Asks for the pieces behind `last`, as many as there are empty buffers.
    fn ask_ahead(&mut self, last: Option<usize>) {
        let mut last = last;
        while self.end > 0 && !self.empty.is_empty() {
            let next = last.map_or(0, |last| if last + 1 < self.end { last + 1 } else { 0 });
            self.ask(next);
            last = Some(next);
        }
    }

    fn ask(&mut self, piece: usize) {
        if let Some(buffer) = self.empty.pop()
            && self.requests.send(Request { piece, buffer }).is_ok()
        {
            self.ahead.push_back(piece);
        }
    }

    fn receive(&mut self) -> Result<Filled> {
        let stopped = || Error::backend("the thread that reads weights has stopped");
        self.ahead.pop_front().ok_or_else(stopped)?;
        self.filled.recv().map_err(|_| stopped())
    }

    /// Waits for what is in flight and forgets it.
    fn recall(&mut self) {
        while !self.ahead.is_empty() {
            let Ok(filled) = self.receive() else { break };
            self.empty.push(filled.buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    };

    use super::*;

    /// Bytes that all have the piece's number; reading the piece `broken` fails while `fails` is set.
    struct Numbered {
        number: usize,
        reads: Arc<AtomicUsize>,
        fails: Arc<AtomicBool>,
        broken: usize,
        /// Panics instead of an error.
        panics: bool,
    }

    impl Source for Numbered {
        fn size(&self) -> usize {
            10 + self.number
        }

        fn read(&self, out: &mut [u8]) -> Result<()> {
            self.reads.fetch_add(1, Ordering::SeqCst);
            out.fill(self.number as u8);
            if self.number == self.broken && self.fails.load(Ordering::SeqCst) {
                assert!(!self.panics, "the source is broken");
                return Err(Error::new(ErrorKind::Io, "the disk is on fire").with("path", "weights"));
            }
            Ok(())
        }
    }

    struct Bench {
        stream: Stream,
        reads: Arc<AtomicUsize>,
        fails: Arc<AtomicBool>,
    }

    fn bench(count: usize, head: usize, broken: usize) -> Bench {
        bench_of(count, head, broken, false)
    }

    fn bench_of(count: usize, head: usize, broken: usize, panics: bool) -> Bench {
        let (reads, fails) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let piece = |number| -> Box<dyn Source> {
            let (reads, fails) = (Arc::clone(&reads), Arc::clone(&fails));
            Box::new(Numbered { number, reads, fails, broken, panics })
        };
        let stream = Stream::start((0..count).map(piece).collect(), head).unwrap();
        Bench { stream, reads, fails }
    }

    fn pass(stream: &Stream, pieces: std::ops::Range<usize>, with_head: bool) -> Option<()> {
        stream.begin(with_head);
        for piece in pieces {
            stream.with(piece, |bytes| assert_eq!(bytes, vec![piece as u8; 10 + piece]))?;
        }
        Some(())
    }

    #[test]
    fn pieces_come_in_order_pass_after_pass_and_each_is_read_once() {
        for count in [1, 2, 3, 4, 5, 17] {
            let Bench { stream, reads, .. } = bench(count, count, usize::MAX);
            for _ in 0..5 {
                pass(&stream, 0..count, true).unwrap();
            }
            let read = reads.load(Ordering::SeqCst);
            assert!((5 * count..=5 * count + BUFFERS).contains(&read), "{count} pieces: {read} reads");
        }
    }

    #[test]
    fn passes_with_and_without_the_head_may_alternate() {
        for head in [0, 1, 3, 9] {
            let Bench { stream, .. } = bench(12, head, usize::MAX);
            for turn in 0..6 {
                let with_head = turn % 3 == 2;
                pass(&stream, 0..if with_head { 12 } else { head }, with_head).unwrap();
            }
        }
    }

    #[test]
    fn a_pass_that_is_not_as_expected_gets_what_it_asks_for() {
        let Bench { stream, .. } = bench(8, 8, usize::MAX);
        stream.begin(true);
        for piece in [0, 1, 5, 2, 7, 7, 0] {
            stream.with(piece, |bytes| assert_eq!(bytes[0], piece as u8)).unwrap();
        }
        pass(&stream, 0..8, true).unwrap();
    }

    #[test]
    fn a_failure_ends_the_pass_alone() {
        let Bench { stream, fails, .. } = bench(9, 7, 5);
        pass(&stream, 0..9, true).unwrap();
        fails.store(true, Ordering::SeqCst);
        for _ in 0..3 {
            assert!(pass(&stream, 0..9, true).is_none());
            let error = stream.failure().unwrap();
            assert_eq!(error.to_string(), "the disk is on fire (path: weights)");
            assert!(stream.failure().is_none());
        }
        fails.store(false, Ordering::SeqCst);
        // What was read ahead while the disk failed is not used.
        pass(&stream, 0..9, true).unwrap();
        pass(&stream, 0..7, false).unwrap();
    }

    #[test]
    fn a_failure_of_reading_ahead_that_is_over_does_not_show() {
        let Bench { stream, reads, fails } = bench(4, 4, 0);
        fails.store(true, Ordering::SeqCst);
        stream.begin(true);
        while reads.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        fails.store(false, Ordering::SeqCst);
        pass(&stream, 0..4, true).unwrap();
    }

    #[test]
    fn a_computation_that_panics_gives_its_buffer_back() {
        let Bench { stream, .. } = bench(6, 6, usize::MAX);
        // More often than there are buffers.
        for turn in 0..3 * BUFFERS {
            stream.begin(true);
            let panic = catch_panic(|| stream.with(turn % 2, |_| -> () { panic!("turn {turn}") }));
            assert_eq!(panic, Err(format!("turn {turn}")));
            pass(&stream, 0..6, true).unwrap();
            let state = stream.state();
            assert_eq!(state.empty.len() + state.ahead.len(), BUFFERS, "turn {turn}");
        }
    }

    #[test]
    fn a_source_that_panics_is_an_error() {
        let Bench { stream, fails, .. } = bench_of(9, 7, 5, true);
        fails.store(true, Ordering::SeqCst);
        for _ in 0..3 {
            assert!(pass(&stream, 0..9, true).is_none());
            let error = stream.failure().unwrap().to_string();
            assert_eq!(error, "the thread that reads weights panicked: the source is broken");
        }
        fails.store(false, Ordering::SeqCst);
        pass(&stream, 0..9, true).unwrap();
    }
}
