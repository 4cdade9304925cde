//! The files of the prompt cache.
//!
//! Each file has the keys and values of one block of 64 tokens. Its name is a hash of the model's identity and of all tokens up to
//! the end of the block, so prompts that begin alike share their first files, and a prompt is found by its tokens without an index.
//!
//! ```text
//! <folder>/<32 digits of the model's identity>/<64 digits of the block's key>.kv
//!
//!   8 bytes   magic and version
//!  32 bytes   the model's identity
//!  32 bytes   the key of the block before, zeros for the first
//! 256 bytes   the tokens, 32 bits each
//!             keys and values as they are in memory, or as the engine writes them
//!  32 bytes   SHA-256 of all before
//! ```
//!
//! A session, `<folder>/<32 digits>/<name>.session`, has the same beginning with a magic of its own, tokens and a hash.
//!
//! Files are not trusted. The length is known beforehand and compared before anything is read, the header must be the expected one to
//! the last bit, and so must the hash. A file that is wrong is removed, and its tokens are computed again. Files are written under
//! another name and renamed, so that other processes see whole ones alone.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use sha2::{Digest, Sha256};
use ternion_core::{Error, ErrorKind, Result, file::read_capped};
use ternion_kernels::kv::KvBlock;

use crate::{
    KvForm, KvIdentity,
    kv::{BLOCK, KvPrefix, SavedBlock},
};

const MAGIC: &[u8; 8] = b"TERNKV\0\x01";
const SESSION_MAGIC: &[u8; 8] = b"TERNSE\0\x01";
/// No session is larger than this.
const MAX_SESSION: u64 = 64 << 20;
const HEADER: usize = MAGIC.len() + 32 + 32 + 4 * BLOCK;
const EXTENSION: &str = "kv";
const SESSION: &str = "session";
/// Of a file that is being written.
const UNFINISHED: &str = "partial";
/// A file that has been unfinished for so long is abandoned.
const ABANDONED: Duration = Duration::from_secs(3600);

/// The name of a block: a hash of the model's identity and of all tokens up to its end.
type Key = [u8; 32];

/// The files of one model, in a folder that other models share.
pub(super) struct Store {
    root: PathBuf,
    folder: PathBuf,
    max_size: u64,
    identity: KvIdentity,
    /// Hash of the identity with the form of the blocks.
    model: Key,
    block_bytes: u64,
}

/// A sequence to be written.
pub(super) struct Save {
    /// Of all blocks from the beginning of the sequence.
    pub(super) tokens: Vec<u32>,
    /// The blocks before this one are not written.
    pub(super) first: usize,
    pub(super) blocks: KvPrefix,
}

impl Store {
    /// # Errors
    /// [`Io`](ErrorKind::Io) where the folder cannot be made or written to.
    pub(super) fn open(root: &Path, max_size: u64, identity: KvIdentity) -> Result<Self> {
        let mut hash = Sha256::new_with_prefix(MAGIC);
        hash.update(identity.fingerprint);
        // Bytes in another order are other numbers.
        let endian = u16::from_ne_bytes([1, 0]);
        hash.update(format!("{:?} {} {BLOCK} {endian}", identity.form, identity.unit));
        let model: Key = hash.finalize().into();
        let folder = root.join(&hex(&model)[..32]);
        let store = Self {
            root: root.to_owned(),
            block_bytes: match identity.form {
                KvForm::Paged { layout, kv_type } => layout.bytes(kv_type, BLOCK),
                KvForm::Opaque { bytes } => bytes,
            },
            folder,
            max_size,
            identity,
            model,
        };
        let unusable = |e: io::Error| {
            Error::new(ErrorKind::Io, "prompt_cache: the folder cannot be written to")
                .with("path", store.folder.display())
                .with_source(e)
        };
        make_folder(&store.folder).map_err(unusable)?;
        // Found out now rather than by the first prompt.
        let probe = unfinished(&store.folder.join("probe"));
        create(&probe).and_then(|_| fs::remove_file(&probe)).map_err(unusable)?;
        Ok(store)
    }

    /// How many of the first blocks of `tokens` the disk has.
    pub(super) fn known(&self, tokens: &[u32]) -> usize {
        self.keys(tokens).take_while(|(_, key)| self.has(&self.path(key))).count()
    }

    /// Whether a file is there, as far as its length tells.
    fn has(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() == self.file_bytes())
    }

    /// The first blocks of `tokens`, as far as their files are there and whole. A file that is damaged is removed with those
    /// behind it, so that all of them are written again.
    pub(super) fn read(&self, tokens: &[u32]) -> Option<KvPrefix> {
        let mut blocks = Vec::new();
        let paths: Vec<PathBuf> = self.keys(tokens).map(|(_, key)| self.path(&key)).collect();
        for (((parent, _), part), path) in self.keys(tokens).zip(tokens.chunks_exact(BLOCK)).zip(&paths) {
            match self.read_block(path, &parent, part) {
                Ok(block) => blocks.push(block),
                Err(error) => {
                    if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) {
                        let path = path.display();
                        tracing::warn!(%error, %path, "a file of the prompt cache is damaged; it is removed");
                        for path in &paths[blocks.len()..] {
                            let _ = fs::remove_file(path);
                        }
                    }
                    // Else another process has evicted it, or there is no memory.
                    break;
                }
            }
        }
        touch(&paths[..blocks.len()]);
        (!blocks.is_empty()).then(|| KvPrefix::new(self.identity.form, blocks))
    }

    /// Writes the blocks that are not there, and makes room.
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io) where a block cannot be written; then the prompt is found up to that one.
    pub(super) fn write(&self, save: &Save) -> Result<()> {
        let mut paths = Vec::new();
        let keys = self.keys(&save.tokens).zip(save.tokens.chunks_exact(BLOCK)).enumerate();
        for (i, ((parent, key), tokens)) in keys.take(save.first + save.blocks.blocks().len()) {
            let path = self.path(&key);
            if let Some(block) = i.checked_sub(save.first).map(|i| &save.blocks.blocks()[i])
                && !self.has(&path)
            {
                self.write_block(&path, &parent, tokens, block).map_err(|e| cannot_write(&path, e))?;
            }
            paths.push(path);
        }
        touch(&paths);
        self.make_room();
        Ok(())
    }

    /// Writes tokens under a name.
    ///
    /// # Errors
    /// [`InvalidRequest`](ErrorKind::InvalidRequest) for a name that cannot be one, [`Io`](ErrorKind::Io) where it cannot be written.
    pub(super) fn write_session(&self, name: &str, tokens: &[u32]) -> Result<()> {
        let path = self.session_path(name)?;
        let mut bytes = [&SESSION_MAGIC[..], &self.model, &token_bytes(tokens)].concat();
        bytes.extend_from_slice(&Sha256::digest(&bytes));
        let temporary = unfinished(&path);
        let write = create(&temporary).and_then(|mut file| file.write_all(&bytes));
        write.and_then(|()| fs::rename(&temporary, &path)).map_err(|e| cannot_write(&path, e))
    }

    /// The tokens of a session.
    ///
    /// # Errors
    /// [`InvalidRequest`](ErrorKind::InvalidRequest) for a name that cannot be one, [`NotFound`](ErrorKind::NotFound) where there is
    /// none, [`Io`](ErrorKind::Io) where its file is damaged.
    pub(super) fn read_session(&self, name: &str) -> Result<Vec<u32>> {
        let path = self.session_path(name)?;
        let bytes = read_capped(&path, MAX_SESSION, ErrorKind::Io)?;
        let tokens = bytes.split_last_chunk::<32>().filter(|(all, sum)| Sha256::digest(all)[..] == sum[..]);
        let tokens = tokens.and_then(|(all, _)| all.strip_prefix(SESSION_MAGIC)?.strip_prefix(&self.model));
        match tokens.map(<[u8]>::as_chunks::<4>) {
            Some((tokens, [])) if !tokens.is_empty() => {
                Ok(tokens.iter().map(|b| u32::from_le_bytes(*b)).collect())
            }
            _ => Err(Error::new(ErrorKind::Io, "the session's file is damaged; save it again")
                .with("path", path.display())),
        }
    }

    fn session_path(&self, name: &str) -> Result<PathBuf> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if name.is_empty() || name.len() > 100 || !name.bytes().all(plain) {
            return Err(Error::invalid_request(format!(
                "session: `{}` is no name; letters, digits, `-`, `_` and `.` expected, at most 100",
                name.escape_debug()
            )));
        }
        Ok(self.folder.join(format!("{name}.{SESSION}")))
    }

    fn file_bytes(&self) -> u64 {
        HEADER as u64 + self.block_bytes + 32
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.folder.join(hex(key)).with_extension(EXTENSION)
    }

    /// For each whole block of `tokens` the key of the block before and its own.
    fn keys<'a>(&'a self, tokens: &'a [u32]) -> impl Iterator<Item = (Key, Key)> + 'a {
        let mut parent = [0; 32];
        tokens.chunks_exact(BLOCK).map(move |part| {
            let mut hash = Sha256::new_with_prefix(self.model);
            hash.update(parent);
            hash.update(token_bytes(part));
            let key: Key = hash.finalize().into();
            (std::mem::replace(&mut parent, key), key)
        })
    }

    fn header(&self, parent: &Key, tokens: &[u32]) -> Vec<u8> {
        [&MAGIC[..], &self.model, parent, &token_bytes(tokens)].concat()
    }

    fn read_block(&self, path: &Path, parent: &Key, tokens: &[u32]) -> io::Result<SavedBlock> {
        let wrong = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        // Asked before it is opened: opening a pipe would wait for its writer.
        let metadata = fs::metadata(path)?;
        if !metadata.is_file() || metadata.len() != self.file_bytes() {
            return wrong("it has another length");
        }
        let mut file = File::open(path)?;
        let mut header = vec![0; HEADER];
        file.read_exact(&mut header)?;
        if header != self.header(parent, tokens) {
            return wrong("it is of other tokens or of another model");
        }
        let mut hash = Sha256::new_with_prefix(&header);
        let no_memory = |e| io::Error::new(io::ErrorKind::OutOfMemory, e);
        let mut read = |part: &mut [u8]| file.read_exact(part).map(|()| hash.update(&*part));
        let block = match self.identity.form {
            KvForm::Paged { layout, kv_type } => {
                let mut block = KvBlock::new(&layout, kv_type).map_err(no_memory)?;
                block.parts_mut().into_iter().try_for_each(&mut read)?;
                SavedBlock::Paged(Arc::new(block))
            }
            KvForm::Opaque { bytes } => {
                let mut block = Vec::new();
                block.try_reserve_exact(bytes as usize).map_err(no_memory)?;
                block.resize(bytes as usize, 0);
                read(&mut block)?;
                SavedBlock::Opaque(block.into())
            }
        };
        let mut expected = [0; 32];
        file.read_exact(&mut expected)?;
        if hash.finalize()[..] == expected { Ok(block) } else { wrong("its checksum is wrong") }
    }

    fn write_block(&self, path: &Path, parent: &Key, tokens: &[u32], block: &SavedBlock) -> io::Result<()> {
        let temporary = unfinished(path);
        let write = || {
            let mut file = create(&temporary)?;
            let header = self.header(parent, tokens);
            let mut hash = Sha256::new_with_prefix(&header);
            file.write_all(&header)?;
            for part in block.parts() {
                file.write_all(part)?;
                hash.update(part);
            }
            file.write_all(&hash.finalize())?;
            fs::rename(&temporary, path)
        };
        write().inspect_err(|_| {
            let _ = fs::remove_file(&temporary);
        })
    }

    /// Removes the files that were used the longest time ago, of whatever model, until all are within the limit.
    fn make_room(&self) {
        let mut files = files_below(&self.root);
        let mut total: u64 = files.iter().map(|file| file.bytes).sum();
        files.sort_by_key(|file| file.used);
        for file in files {
            if total <= self.max_size {
                break;
            }
            if fs::remove_file(&file.path).is_ok() {
                total -= file.bytes;
            }
        }
    }
}

/// Notes that files are in use. Later blocks of a prompt count as older, since they are of no use without the first.
fn touch(paths: &[PathBuf]) {
    let now = SystemTime::now();
    for (i, path) in paths.iter().enumerate() {
        let time = now.checked_sub(Duration::from_millis(i as u64)).unwrap_or(now);
        if let Ok(file) = File::options().write(true).open(path) {
            let _ = file.set_modified(time);
        }
    }
}

struct Found {
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

/// The blocks of all models. Removes what has been abandoned half-written.
fn files_below(root: &Path) -> Vec<Found> {
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found = Vec::new();
    for entry in entries(root)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .flat_map(|f| entries(&f.path()))
    {
        let path = entry.path();
        let extension =
            path.extension().and_then(|extension| extension.to_str()).unwrap_or_default().to_owned();
        let Ok(metadata) = entry.metadata() else { continue };
        let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        if extension == EXTENSION && metadata.is_file() {
            found.push(Found { path, bytes: metadata.len(), used });
        } else if extension == UNFINISHED && used.elapsed().is_ok_and(|age| age > ABANDONED) {
            let _ = fs::remove_file(&path);
        }
    }
    found
}

/// Where a file is written until it is whole: a name that no other thread or process uses.
fn unfinished(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    path.with_extension(format!("{}-{number}.{UNFINISHED}", std::process::id()))
}

fn cannot_write(path: &Path, error: io::Error) -> Error {
    Error::new(ErrorKind::Io, "the prompt cache cannot be written to")
        .with("path", path.display())
        .with_source(error)
}

/// A new file that the user alone can read: it holds what was in prompts.
fn create(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600);
    }
    options.open(path)
}

fn make_folder(path: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::DirBuilderExt;
        builder.mode(0o700);
    }
    builder.create(path)
}

fn token_bytes(tokens: &[u32]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::{Factors, KvCache, KvLayout, KvType};

    const LAYOUT: KvLayout = KvLayout { layers: 2, kv_heads: 2, head_dim: 4 };

    fn store(root: &Path, fingerprint: u8, kv_type: KvType) -> Store {
        Store::open(root, u64::MAX, KvIdentity::paged(LAYOUT, kv_type, [fingerprint; 32])).unwrap()
    }

    /// Blocks for so many tokens, with noise in them.
    fn blocks(kv_type: KvType, tokens: &[u32]) -> KvPrefix {
        let mut cache = KvCache::new(LAYOUT, kv_type);
        let id = cache.create();
        cache.reserve(id, tokens.len()).unwrap();
        for layer in 0..2 {
            let keys: Vec<f32> =
                (0..8 * tokens.len()).map(|i| (i as f32 * 0.37 + layer as f32).sin()).collect();
            let values: Vec<f32> = keys.iter().map(|x| x * 3.0).collect();
            if kv_type == KvType::Exact {
                let factors = vec![0.125; tokens.len()];
                let factors = Factors { keys: &factors, values: &factors };
                cache.write_sums(id, layer, (&keys, &values), factors).unwrap();
            } else {
                cache.write(id, layer, &keys, &values).unwrap();
            }
        }
        cache.advance(id, tokens.len());
        cache.prefix(id, 0..tokens.len() / BLOCK).unwrap()
    }

    fn tokens(count: usize, seed: u32) -> Vec<u32> {
        (0..count as u32).map(|i| i * 7 + seed).collect()
    }

    fn save(store: &Store, tokens: &[u32]) {
        let KvForm::Paged { kv_type, .. } = store.identity.form else { panic!("no paged blocks") };
        store.write(&Save { tokens: tokens.to_vec(), first: 0, blocks: blocks(kv_type, tokens) }).unwrap();
    }

    fn files(root: &Path) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = files_below(root).into_iter().map(|file| file.path).collect();
        files.sort();
        files
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        for kv_type in [KvType::F32, KvType::Exact, KvType::F16, KvType::Int8] {
            let root = tempfile::tempdir().unwrap();
            let own = store(root.path(), 1, kv_type);
            let prompt = tokens(3 * BLOCK, 5);
            assert!(own.known(&prompt) == 0 && own.read(&prompt).is_none());
            save(&own, &prompt);
            assert_eq!(own.known(&prompt), 3);
            let read = own.read(&prompt).unwrap();
            for (a, b) in read.blocks().iter().zip(blocks(kv_type, &prompt).blocks()) {
                assert_eq!(a.parts(), b.parts());
            }
            // Another prompt shares as many blocks as it begins with.
            let mut other = prompt.clone();
            other[2 * BLOCK + 1] += 1;
            assert_eq!(own.read(&other).unwrap().tokens(), 2 * BLOCK);
            other[0] += 1;
            assert!(own.read(&other).is_none());
            // Other models do not.
            assert!(store(root.path(), 2, kv_type).read(&prompt).is_none());
        }
        let root = tempfile::tempdir().unwrap();
        save(&store(root.path(), 1, KvType::F32), &tokens(BLOCK, 5));
        assert!(store(root.path(), 1, KvType::F16).read(&tokens(BLOCK, 5)).is_none());
    }

    #[test]
    fn bytes_of_an_engine_are_kept_too_and_later_blocks_alone_may_come() {
        let root = tempfile::tempdir().unwrap();
        let store = |unit| {
            let identity = KvIdentity::opaque(1000, [7; 32]).with_unit(unit);
            Store::open(root.path(), u64::MAX, identity).unwrap()
        };
        let own = store(1);
        let prompt = tokens(3 * BLOCK, 5);
        let block = |n: u8| Arc::<[u8]>::from(vec![n; 1000]);
        let write = |tokens: &[u32], first, numbers: &[u8]| {
            let blocks = KvPrefix::opaque(1000, numbers.iter().map(|n| block(*n)).collect()).unwrap();
            own.write(&Save { tokens: tokens.to_vec(), first, blocks }).unwrap();
        };
        write(&prompt[..BLOCK], 0, &[1]);
        write(&prompt, 1, &[2, 3]);
        let read = own.read(&prompt).unwrap();
        let expected: Vec<_> = [1, 2, 3].map(block).into();
        assert_eq!(read.opaque_blocks(1000).unwrap(), expected.iter().map(|b| &b[..]).collect::<Vec<_>>());
        assert_eq!(read.opaque_blocks(999).unwrap_err().kind(), ErrorKind::Backend);
        assert!(KvPrefix::opaque(999, vec![block(1)]).is_err());
        assert!(KvCache::new(LAYOUT, KvType::F32).adopt(read).is_err());
        // Prompts that are divided into other steps are others.
        assert!(store(128).read(&prompt).is_none());
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let root = tempfile::tempdir().unwrap();
        let own = store(root.path(), 1, KvType::Int8);
        let prompt = tokens(2 * BLOCK, 5);
        save(&own, &prompt);
        let path = own.path(&own.keys(&prompt).nth(1).unwrap().1);
        let good = fs::read(&path).unwrap();
        for at in [0, 9, 41, 80, HEADER, HEADER + 1000, good.len() - 33, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 4;
            fs::write(&path, bad).unwrap();
            assert_eq!(own.read(&prompt).unwrap().tokens(), BLOCK, "byte {at}");
            assert!(!path.exists());
        }
        for length in [0, HEADER, good.len() - 1] {
            fs::write(&path, &good[..length]).unwrap();
            assert_eq!((own.known(&prompt), own.read(&prompt).unwrap().tokens()), (1, BLOCK));
        }
        // It is written again.
        save(&own, &prompt);
        assert!(fs::read(&path).unwrap() == good);
    }

    #[test]
    fn the_oldest_make_room_and_a_prompt_loses_its_end_first() {
        let root = tempfile::tempdir().unwrap();
        let mut own = store(root.path(), 1, KvType::F32);
        own.max_size = 5 * own.file_bytes();
        let (first, second) = (tokens(3 * BLOCK, 1), tokens(3 * BLOCK, 2));
        save(&own, &first);
        std::thread::sleep(Duration::from_millis(20));
        save(&own, &second);
        assert_eq!((own.known(&first), own.known(&second)), (2, 3));
        std::thread::sleep(Duration::from_millis(20));
        own.read(&first).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        save(&own, &tokens(BLOCK, 3));
        assert_eq!((own.known(&first), own.known(&second)), (2, 2));
    }

    #[test]
    fn sessions_are_tokens_with_a_name() {
        let root = tempfile::tempdir().unwrap();
        let own = store(root.path(), 1, KvType::F32);
        assert_eq!(own.read_session("a").unwrap_err().kind(), ErrorKind::NotFound);
        own.write_session("a", &[1, 2, 300_000]).unwrap();
        assert_eq!(own.read_session("a").unwrap(), [1, 2, 300_000]);
        assert_eq!(
            store(root.path(), 2, KvType::F32).read_session("a").unwrap_err().kind(),
            ErrorKind::NotFound
        );
        let path = own.session_path("a").unwrap();
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, bad).unwrap();
            assert_eq!(own.read_session("a").unwrap_err().kind(), ErrorKind::Io, "byte {at}");
        }
        for name in ["", "../a", "a/b", "a\\b", "ä"] {
            assert_eq!(
                own.write_session(name, &[1]).unwrap_err().kind(),
                ErrorKind::InvalidRequest,
                "{name}"
            );
        }
    }

    #[cfg(unix)]
    #[test]
    fn nobody_else_can_read_the_files() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let own = store(&root.path().join("deep/er"), 1, KvType::F32);
        save(&own, &tokens(BLOCK, 1));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(
            files(&root.path().join("deep/er")).iter().map(|file| mode(file)).collect::<Vec<_>>(),
            [0o600]
        );
        assert_eq!(mode(&own.folder), 0o700);
        let file = root.path().join("file");
        fs::write(&file, "x").unwrap();
        let identity = KvIdentity::paged(LAYOUT, KvType::F32, [0; 32]);
        assert_eq!(Store::open(&file, 1, identity).err().unwrap().kind(), ErrorKind::Io);
    }
}
