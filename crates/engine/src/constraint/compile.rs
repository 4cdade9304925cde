//! Compilations: each on a thread of its own with a large stack, within a time, and kept for the requests that come with the same
//! constraint: the check of a request before it is queued, the requests of a batch, the turns of a conversation.
//!
//! llguidance bounds the size of a grammar and the work of each step, but not the time of a compilation, and nothing ends a
//! thread. So a compilation that takes too long goes on without anybody who waits for it, and few of them run at the same time.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use llguidance::{CancellationHandle, Matcher, TokenParser};
use sha2::{Digest, Sha256};
use ternion_core::{Constraint, Error, ErrorKind, Result};

use super::grammar::{Factory, MAX_TEXT, refused, top_level};

/// Bytes of stack of the thread that compiles. Only what is used takes memory.
const STACK: usize = 32 << 20;

/// How long a request waits for its grammar.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Compilations of one model at the same time, with those that nobody waits for any more.
const AT_ONCE: usize = 4;

/// Grammars that are kept for one model.
const MAX_KEPT: usize = 64;

/// Bytes that those take, about.
const MAX_KEPT_BYTES: usize = 64 << 20;

/// Tokens of the answer by which a new grammar is tried.
const TRIED: usize = 16;

/// Names a constraint.
type Key = [u8; 32];

/// The compilations of one model, and what is kept of them.
#[derive(Default)]
pub(super) struct Compilations {
    state: Mutex<State>,
    /// A compilation has ended.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    /// The one used last is at the end.
    kept: Vec<Kept>,
    running: Vec<Key>,
    /// Compilations that have begun.
    begun: u64,
}

struct Kept {
    key: Key,
    bytes: usize,
    /// As it was compiled; each request takes a copy of its own. Shared, so that no copy is made under the lock.
    matcher: Arc<Mutex<Box<Matcher>>>,
}

impl Compilations {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it changes the state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many compilations have begun.
    #[cfg(test)]
    pub(super) fn begun(&self) -> u64 {
        self.lock().begun
    }

    /// How many grammars are kept, and how many bytes they take.
    #[cfg(test)]
    pub(super) fn kept(&self) -> (usize, usize) {
        let state = self.lock();
        (state.kept.len(), state.kept.iter().map(|kept| kept.bytes).sum())
    }

    /// The grammar if it is kept; else `None`, when it is time to compile it.
    fn kept_or_turn(&self, key: &Key, deadline: Instant) -> Result<Option<Box<Matcher>>> {
        let mut state = self.lock();
        loop {
            if let Some(at) = state.kept.iter().position(|kept| kept.key == *key) {
                let kept = state.kept.remove(at);
                let matcher = Arc::clone(&kept.matcher);
                state.kept.push(kept);
                drop(state);
                return Ok(Some(copy(&matcher)));
            }
            let same = state.running.contains(key);
            if !same && state.running.len() < AT_ONCE {
                state.running.push(*key);
                state.begun += 1;
                return Ok(None);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() && same {
                return Err(too_long());
            } else if left.is_zero() {
                let message = "constraint: too many constraints are being compiled; try again later";
                return Err(Error::new(ErrorKind::Busy, message));
            }
            (state, _) = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn keep(&self, key: Key, bytes: usize, matcher: Box<Matcher>) -> Box<Matcher> {
        // One alone should not drive out the others.
        if bytes > MAX_KEPT_BYTES / 4 {
            return matcher;
        }
        let matcher = Arc::new(Mutex::new(matcher));
        let copied = copy(&matcher);
        let mut state = self.lock();
        state.kept.push(Kept { key, bytes, matcher });
        let mut total: usize = state.kept.iter().map(|kept| kept.bytes).sum();
        while state.kept.len() > MAX_KEPT || total > MAX_KEPT_BYTES {
            total -= state.kept.remove(0).bytes;
        }
        copied
    }
}

/// A copy with a lexer of its own: what one answer makes of it does not count towards the limits of another.
fn copy(matcher: &Mutex<Box<Matcher>>) -> Box<Matcher> {
    Box::new(matcher.lock().unwrap_or_else(PoisonError::into_inner).deep_clone())
}

/// One compilation. Its place is free when it is dropped.
struct Running {
    factory: Arc<Factory>,
    key: Key,
}

impl Drop for Running {
    fn drop(&mut self) {
        let compilations = &self.factory.compilations;
        compilations.lock().running.retain(|key| *key != self.key);
        compilations.ended.notify_all();
    }
}

/// By which the one who waits tells a compilation that nobody does any more.
#[derive(Default)]
struct Watch {
    abandoned: AtomicBool,
    trial: OnceLock<CancellationHandle>,
}

impl Watch {
    fn abandon(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
        if let Some(trial) = self.trial.get() {
            trial.cancel();
        }
    }

    fn on_trial(&self, handle: CancellationHandle) {
        let handle = self.trial.get_or_init(|| handle);
        if self.abandoned.load(Ordering::SeqCst) {
            handle.cancel();
        }
    }
}

/// Compiles a constraint, or takes what is kept of it. Waits no longer than `patience`.
///
/// # Errors
/// [`InvalidRequest`](ErrorKind::InvalidRequest) for what cannot be understood, enforced or satisfied, and for what exceeds the
/// limits or the time; [`Busy`](ErrorKind::Busy) while too many compilations run.
pub(super) fn compile(
    factory: &Arc<Factory>,
    constraint: &Constraint,
    patience: Duration,
) -> Result<Box<Matcher>> {
    let deadline = Instant::now() + patience;
    let key = key(constraint)?;
    if let Some(kept) = factory.compilations.kept_or_turn(&key, deadline)? {
        return Ok(kept);
    }
    let running = Running { factory: Arc::clone(factory), key };
    let watch = Arc::new(Watch::default());
    let (sender, result) = mpsc::sync_channel(1);
    let compilation = {
        let (constraint, watch) = (constraint.clone(), Arc::clone(&watch));
        move || {
            let compiled = compile_here(&running.factory, &constraint, &watch);
            let compiled = compiled
                .map(|(matcher, bytes)| running.factory.compilations.keep(running.key, bytes, matcher));
            drop(running);
            // Fails where nobody waits any more.
            let _ = sender.send(compiled);
        }
    };
    let thread = thread::Builder::new().name("ternion-grammar".into()).stack_size(STACK);
    thread.spawn(compilation).map_err(|e| {
        Error::new(ErrorKind::ResourceExhausted, "cannot start a thread for the constraint").with_source(e)
    })?;
    result.recv_timeout(deadline.saturating_duration_since(Instant::now())).unwrap_or_else(|e| match e {
        mpsc::RecvTimeoutError::Timeout => {
            watch.abandon();
            Err(too_long())
        }
        mpsc::RecvTimeoutError::Disconnected => {
            Err(Error::backend("the compilation of the constraint panicked"))
        }
    })
}

fn too_long() -> Error {
    Error::invalid_request("constraint: it takes too long to compile; a simpler one expected")
}

fn key(constraint: &Constraint) -> Result<Key> {
    let text = serde_json::to_vec(constraint)
        .map_err(|e| Error::invalid_request("constraint: cannot be written as JSON").with_source(e))?;
    Ok(Sha256::digest(&text).into())
}

/// The grammar, and about how many bytes it takes.
fn compile_here(factory: &Factory, constraint: &Constraint, watch: &Watch) -> Result<(Box<Matcher>, usize)> {
    let grammar = top_level(constraint)?;
    let parser = factory.parsers.create_parser(grammar).map_err(|e| refused(constraint, &e.to_string()))?;
    let trial = parser.deep_clone();
    let tried = catch_unwind(AssertUnwindSafe(|| try_out(trial, watch)));
    tried.unwrap_or_else(|_| Err("too many items".into())).map_err(|reason| refused(constraint, &reason))?;
    // The terminals, and about what the rules take besides.
    let bytes = parser.parser.lexer_stats().num_bytes + 8 * size(constraint);
    let mut matcher = Box::new(Matcher::new(Ok(parser)));
    matcher.compute_mask().map_err(|e| refused(constraint, &e.to_string()))?;
    Ok((matcher, bytes))
}

fn size(constraint: &Constraint) -> usize {
    match constraint {
        Constraint::JsonSchema(schema) => schema.to_string().len(),
        Constraint::Regex(text) | Constraint::Lark(text) => text.len(),
        Constraint::Choice(texts) => texts.iter().map(String::len).sum(),
        _ => 0,
    }
}

/// Begins an answer with tokens that the grammar allows. What nothing satisfies is found here and not after the prompt has been
/// computed, and so is a grammar that reaches the limits of the lexer after some tokens, whichever they are.
fn try_out(mut parser: TokenParser, watch: &Watch) -> Result<(), String> {
    watch.on_trial(parser.enable_cancellation());
    parser.start_without_prompt();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for step in 0..TRIED {
        let mask = match parser.compute_mask() {
            Ok(mask) => mask,
            // Tokens may lead to where only others go on.
            Err(_) if step > 0 && parser.parser.get_error().is_none() => return Ok(()),
            Err(error) => return Err(error.to_string()),
        };
        // A forced text is taken whether the lexer has come to its end or not.
        if let Some(error) = parser.parser.get_error() {
            return Err(error.message());
        }
        if parser.force_bytes().len() > MAX_TEXT {
            return Err(format!("it forces a text of more than {MAX_TEXT} bytes"));
        }
        let mut allowed = mask.to_list();
        let ends = parser.token_env.tok_trie().eos_tokens();
        allowed.retain(|id| !ends.contains(id));
        if allowed.is_empty() {
            return Ok(());
        }
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let id = allowed[(random >> 33) as usize % allowed.len()];
        parser.consume_token(id).map_err(|e| e.to_string())?;
        if parser.check_stop().map_err(|e| e.to_string())? {
            return Ok(());
        }
    }
    Ok(())
}
