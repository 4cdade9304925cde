//! The prompt cache on the disk: keys and values of prompts, found again after a restart.
//!
//! # Behavior
//! When a request has ended, the blocks of its sequence that the disk does not have are written, by a thread of their own, from
//! memory that they share with the KV cache: the engine's thread copies nothing. When a request comes whose beginning the
//! disk knows and the memory does not, another thread reads the blocks while other requests go on; the request then continues
//! behind them. Keys and values are stored as they are, so an answer is the same, bit for bit, with and without the cache.
//!
//! If the writing falls behind, prompts are left out rather than waited for: a cache may miss, and must not delay.

mod store;

use std::{
    path::PathBuf,
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use ternion_core::{Error, ErrorKind, Result};

use crate::{
    CausalLm, SequenceId,
    kv::{BLOCK, KvPrefix},
};
use store::{Save, Store};

/// Sequences that may wait to be written. Their blocks stay in memory so long.
const WAITING_SAVES: usize = 2;

/// Where prompts are kept, and how much of the disk they may take.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PromptCacheOptions {
    /// The folder. It is made if it does not exist. Several processes may use it at the same time.
    pub path: PathBuf,
    /// The most bytes of all models together. The blocks that were used the longest time ago make room for new ones.
    pub max_size: u64,
}

impl PromptCacheOptions {
    /// A cache in a folder with at most so many bytes.
    pub fn new(path: impl Into<PathBuf>, max_size: u64) -> Self {
        Self { path: path.into(), max_size }
    }
}

/// The cache, as the engine's thread sees it.
pub(crate) struct PromptCache {
    store: Arc<Store>,
    loads: mpsc::Sender<Load>,
    loaded: mpsc::Receiver<Loaded>,
    /// `None` when it is being closed.
    saves: Option<mpsc::SyncSender<Save>>,
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
    pub(crate) prefix: Option<KvPrefix>,
}

impl PromptCache {
    /// Opens the folder and starts the threads that read and write.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) where the model cannot save its KV cache, [`Io`](ErrorKind::Io) where the folder
    /// cannot be made or written to.
    pub(crate) fn open(options: &PromptCacheOptions, model: &dyn CausalLm) -> Result<Self> {
        let store = Arc::new(Store::open(&options.path, options.max_size, model.kv_identity()?)?);
        let (loads, requests) = mpsc::channel::<Load>();
        let (answers, loaded) = mpsc::channel();
        let reading = Arc::clone(&store);
        spawn("ternion-prompt-read", move || {
            for Load { ticket, tokens } in requests {
                let prefix = reading.read(&tokens);
                if answers.send(Loaded { ticket, prefix }).is_err() {
                    return;
                }
            }
        })?;
        let (saves, requests) = mpsc::sync_channel::<Save>(WAITING_SAVES);
        let writing = Arc::clone(&store);
        let writer = spawn("ternion-prompt-write", move || {
            for save in requests {
                if let Err(error) = writing.write(&save) {
                    tracing::warn!(%error, "a prompt is not saved");
                }
            }
        })?;
        Ok(Self { store, loads, loaded, saves: Some(saves), writer: Some(writer), next: 0 })
    }

    /// The sessions of the cache.
    pub(crate) fn sessions(&self) -> Sessions {
        Sessions(Arc::clone(&self.store))
    }

    /// Begins to read what the disk knows of `tokens`, of which `wanted` may come from a cache and `have` are in memory. Returns
    /// the ticket of the [`Loaded`] that will come; `None` if the disk has no more than the memory.
    pub(crate) fn request(&mut self, tokens: &[u32], wanted: usize, have: usize) -> Option<u64> {
        let tokens = &tokens[..wanted.min(tokens.len())];
        if tokens.len() / BLOCK <= have / BLOCK {
            return None;
        }
        let known = self.store.known(tokens) * BLOCK;
        if known <= have {
            return None;
        }
        self.next += 1;
        let load = Load { ticket: self.next, tokens: tokens[..known].to_vec() };
        // Fails only if the thread has panicked; then there is no cache.
        self.loads.send(load).ok().map(|()| self.next)
    }

    /// An answer that has come.
    pub(crate) fn loaded(&mut self) -> Option<Loaded> {
        self.loaded.try_recv().ok()
    }

    /// Begins to write what the disk does not know of a sequence, which holds `tokens`.
    pub(crate) fn save(&mut self, model: &dyn CausalLm, sequence: SequenceId, tokens: &[u32]) {
        let whole = &tokens[..tokens.len() / BLOCK * BLOCK];
        if self.store.known(whole) * BLOCK == whole.len() {
            return;
        }
        let (Ok(prefix), Some(saves)) = (model.prefix(sequence, whole.len()), &self.saves) else { return };
        if prefix.tokens() == whole.len()
            && saves.try_send(Save { tokens: whole.to_vec(), blocks: prefix.blocks().to_vec() }).is_err()
        {
            tracing::debug!(
                tokens = whole.len(),
                "the prompt is not saved: the disk has not taken the last ones yet"
            );
        }
    }
}

/// Prompts with names. Its methods block.
#[derive(Clone)]
pub(crate) struct Sessions(Arc<Store>);

impl Sessions {
    /// Writes tokens under a name, with their keys and values.
    pub(crate) fn save(&self, name: &str, tokens: Vec<u32>, prefix: &KvPrefix) -> Result<()> {
        self.0.write_session(name, &tokens)?;
        self.0.write(&Save { tokens, blocks: prefix.blocks().to_vec() })
    }

    /// The tokens of a session.
    pub(crate) fn load(&self, name: &str) -> Result<Vec<u32>> {
        self.0.read_session(name)
    }
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
