//! The prompt cache on the disk: keys and values of prompts, found again after a restart.
//!
//! # Behavior
//! When a request has ended, the blocks of its sequence that the disk does not have are written, by a thread of their own, from
//! memory that they share with the KV cache; only engines that have a KV cache of their own copy them. When a request comes whose beginning the
//! disk knows and the memory does not, another thread reads the blocks while other requests go on; the request then continues
//! behind them. Keys and values are stored as they are, so an answer is the same, bit for bit, with and without the cache. An engine
//! whose results depend on how a prompt is divided into steps gets prompts back in multiples of its steps, and nothing that it has
//! computed otherwise is kept: neither answers nor prompts of which a part was in memory up to within a step.
//!
//! How many prompts are in memory on their way is bounded. Where the bound is reached, reading waits, and what was to be written is
//! left out: a cache may miss, and must not delay.

mod store;

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use ternion_core::{Error, ErrorKind, Result, config::PromptCacheConfig};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    CausalLm, SequenceId,
    kv::{BLOCK, KvPrefix},
};
use store::{Save, Store};

/// Prompts that may be on their way in each direction, where nothing else is said.
const IN_MEMORY: usize = 2;

/// Where prompts are kept, and how much of the disk they may take.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PromptCacheOptions {
    /// The folder. It is made if it does not exist. Several processes may use it at the same time.
    pub path: PathBuf,
    /// The most bytes of all models together. The blocks that were used the longest time ago make room for new ones.
    pub max_size: u64,
    /// Prompts that may be in memory on their way from the disk, and as many on their way to it; at least 1. Each takes at most
    /// what a sequence takes in the KV cache.
    pub in_memory: usize,
}

impl PromptCacheOptions {
    /// A cache in a folder with at most so many bytes, and two prompts on their way in each direction.
    pub fn new(path: impl Into<PathBuf>, max_size: u64) -> Self {
        Self { path: path.into(), max_size, in_memory: IN_MEMORY }
    }

    /// What a configuration says.
    pub fn of(config: &PromptCacheConfig) -> Self {
        Self::new(&config.path, config.max_size.0)
    }

    /// The most memory that prompts on their way take, where a sequence takes so many bytes.
    pub fn memory(&self, sequence: u64) -> u64 {
        sequence.saturating_mul(2 * self.in_memory.max(1) as u64)
    }
}

/// The cache, as the engine's thread sees it.
pub(crate) struct PromptCache {
    store: Arc<Store>,
    /// Tokens of which a prompt is kept in multiples.
    unit: usize,
    loads: mpsc::Sender<(Load, OwnedSemaphorePermit)>,
    loaded: mpsc::Receiver<Loaded>,
    /// What is not read yet, because as many prompts as may be in memory are.
    waiting: VecDeque<Load>,
    /// The tickets of what is being read, in the order in which the answers come.
    asked: VecDeque<u64>,
    reading: Arc<Semaphore>,
    /// `None` when it is being closed.
    saves: Option<mpsc::Sender<(Save, OwnedSemaphorePermit)>>,
    writing: Arc<Semaphore>,
    writer: Option<JoinHandle<()>>,
    next: u64,
}

/// Blocks that a request waits for.
struct Load {
    ticket: u64,
    tokens: Vec<u32>,
}

/// The answer to a [`Load`]: the blocks that were whole, if there were any.
pub(crate) struct Loaded {
    pub(crate) ticket: u64,
    pub(crate) restored: Option<Restored>,
}

/// Blocks from the disk, which count as being on their way until the model has them.
pub(crate) struct Restored {
    pub(crate) prefix: KvPrefix,
    _permit: OwnedSemaphorePermit,
}

impl PromptCache {
    /// Opens the folder and starts the threads that read and write.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) where the model cannot save its KV cache, [`Io`](ErrorKind::Io) where the folder
    /// cannot be made or written to.
    pub(crate) fn open(options: &PromptCacheOptions, model: &dyn CausalLm) -> Result<Self> {
        let identity = model.kv_identity()?;
        let unit = least_common_multiple(BLOCK, identity.unit.max(1));
        let store = Arc::new(Store::open(&options.path, options.max_size, identity)?);
        let (loads, requests) = mpsc::channel::<(Load, _)>();
        let (answers, loaded) = mpsc::channel();
        let source = Arc::clone(&store);
        spawn("ternion-prompt-read", move || {
            for (Load { ticket, tokens }, permit) in requests {
                let prefix = source.read(&tokens).and_then(|mut prefix| {
                    prefix.truncate(prefix.tokens() / unit * unit / BLOCK);
                    (prefix.tokens() > 0).then_some(prefix)
                });
                let restored = prefix.map(|prefix| Restored { prefix, _permit: permit });
                if answers.send(Loaded { ticket, restored }).is_err() {
                    return;
                }
            }
        })?;
        let (saves, requests) = mpsc::channel::<(Save, OwnedSemaphorePermit)>();
        let target = Arc::clone(&store);
        let writer = spawn("ternion-prompt-write", move || {
            for (save, permit) in requests {
                if let Err(error) = target.write(&save) {
                    tracing::warn!(%error, "a prompt is not saved");
                }
                drop(save);
                drop(permit);
            }
        })?;
        let permits = || Arc::new(Semaphore::new(options.in_memory.max(1)));
        Ok(Self {
            store,
            unit,
            loads,
            loaded,
            waiting: VecDeque::new(),
            asked: VecDeque::new(),
            reading: permits(),
            saves: Some(saves),
            writing: permits(),
            writer: Some(writer),
            next: 0,
        })
    }

    /// The sessions of the cache.
    pub(crate) fn sessions(&self) -> Sessions {
        Sessions { store: Arc::clone(&self.store), writing: Arc::clone(&self.writing) }
    }

    /// Begins to read what the disk knows of `tokens`, of which `wanted` may come from a cache and `have` are in memory. Returns
    /// the ticket of the [`Loaded`] that will come; `None` if the disk has no more than the memory.
    pub(crate) fn request(&mut self, tokens: &[u32], wanted: usize, have: usize) -> Option<u64> {
        let tokens = &tokens[..wanted.min(tokens.len()) / self.unit * self.unit];
        if tokens.len() <= have {
            return None;
        }
        let known = self.store.known(tokens) * BLOCK / self.unit * self.unit;
        if known <= have {
            return None;
        }
        self.next += 1;
        self.waiting.push_back(Load { ticket: self.next, tokens: tokens[..known].to_vec() });
        self.read_on();
        Some(self.next)
    }

    /// Reads what waits, as far as there may be more in memory.
    fn read_on(&mut self) {
        while !self.waiting.is_empty()
            && let Ok(permit) = Arc::clone(&self.reading).try_acquire_owned()
            && let Some(load) = self.waiting.pop_front()
        {
            self.asked.push_back(load.ticket);
            // Fails only if the thread has panicked, which `loaded` sees.
            let _ = self.loads.send((load, permit));
        }
    }

    /// An answer that has come.
    pub(crate) fn loaded(&mut self) -> Option<Loaded> {
        self.read_on();
        let loaded = match self.loaded.try_recv() {
            Ok(loaded) => loaded,
            Err(mpsc::TryRecvError::Empty) => return None,
            // The thread has panicked: there is no cache any more.
            Err(mpsc::TryRecvError::Disconnected) => {
                let ticket = self.asked.front().copied()?;
                Loaded { ticket, restored: None }
            }
        };
        self.asked.pop_front();
        Some(loaded)
    }

    /// How many of the first tokens of a sequence of `length` may be kept: of a prompt, of which `cached` were in memory before,
    /// and an answer behind it.
    pub(crate) fn keepable(&self, length: usize, prompt: usize, cached: usize) -> usize {
        if self.unit == BLOCK {
            length / BLOCK * BLOCK
        } else if cached.is_multiple_of(self.unit) {
            prompt.min(length) / self.unit * self.unit
        } else {
            0
        }
    }

    /// Begins to write what the disk does not know of the first tokens of a sequence, which are [`keepable`](Self::keepable).
    pub(crate) fn save(&mut self, model: &mut dyn CausalLm, sequence: SequenceId, tokens: &[u32]) {
        let whole = tokens.len();
        let first = self.store.known(tokens);
        if first * BLOCK == whole {
            return;
        }
        let Ok(permit) = Arc::clone(&self.writing).try_acquire_owned() else {
            tracing::debug!(
                tokens = whole,
                "the prompt is not saved: the disk has not taken the last ones yet"
            );
            return;
        };
        match model.prefix(sequence, first..whole / BLOCK) {
            Ok(blocks) if first * BLOCK + blocks.tokens() == whole => {
                let save = Save { tokens: tokens.to_vec(), first, blocks };
                // Fails only if the thread has panicked; then nothing is saved any more.
                let _ = self.saves.as_ref().map(|saves| saves.send((save, permit)));
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "a prompt is not saved"),
        }
    }
}

/// Prompts with names. Its methods block.
#[derive(Clone)]
pub(crate) struct Sessions {
    store: Arc<Store>,
    writing: Arc<Semaphore>,
}

impl Sessions {
    /// Waits until one more prompt may be on its way to the disk.
    ///
    /// # Errors
    /// None: the permits are never closed.
    pub(crate) async fn permit(&self) -> Result<OwnedSemaphorePermit> {
        let permit = Arc::clone(&self.writing).acquire_owned().await;
        permit.map_err(|e| Error::new(ErrorKind::Closed, "the prompt cache is closed").with_source(e))
    }

    /// Writes tokens under a name, with their keys and values.
    pub(crate) fn save(&self, name: &str, tokens: Vec<u32>, blocks: KvPrefix) -> Result<()> {
        self.store.write_session(name, &tokens)?;
        self.store.write(&Save { tokens, first: 0, blocks })
    }

    /// The tokens of a session.
    pub(crate) fn load(&self, name: &str) -> Result<Vec<u32>> {
        self.store.read_session(name)
    }
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

impl Drop for PromptCache {
    /// Waits until all is written.
    fn drop(&mut self) {
        self.saves = None;
        if let Some(writer) = self.writer.take() {
            // A panic of the thread has lost a prompt, and nothing else.
            let _ = writer.join();
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map_err(|e| {
        Error::new(ErrorKind::ResourceExhausted, "cannot start a thread for the prompt cache").with_source(e)
    })
}
