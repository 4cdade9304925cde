//! A checkpoint, whatever format it was read from.
//!
//! A reader of a format fills a [`Checkpoint`]; everything else in the workspace takes it from there. What
//! [`open`](Checkpoint::open) returns has been checked: shapes agree with the specification, all ternary codes are
//! valid, scales and norms are finite.

use std::path::{Path, PathBuf};
use std::time::Instant;

use ternion_core::text::{Tokenizer, TokenizerParts};
use ternion_core::{Error, ErrorKind, Result, ResultExt, SamplingDefaults};
use ternion_kernels::kv::KvType;

use crate::locate::{gguf_file, warn_of_others};
use crate::notes::Notes;
use crate::{
    CheckpointOptions, FileWatch, LayerTensors, Linear, ModelSpec, RmsNorm, SharedBytes, Table, gguf,
    huggingface, onnx,
};

const TOKENIZER: &str = "tokenizer.json";

/// Called while a checkpoint is opened, with the bytes of weights that have been read and their sum.
pub type Progress<'a> = dyn FnMut(u64, u64) + 'a;

/// How the files of weights are read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Access {
    /// They are mapped, and weights are used where they lie.
    #[default]
    Mapped,
    /// They are mapped, but no page of the maps is touched while the checkpoint is opened: the checks read the files through
    /// a buffer of some megabytes.
    Untouched,
    /// They are read into memory, and closed.
    InMemory,
}

/// What a checkpoint may take while it is opened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Means {
    access: Access,
    /// Bytes that tensors may take which cannot stay in the file.
    memory: u64,
}

impl Means {
    /// As much as it needs.
    const ALL: Self = Self { access: Access::Mapped, memory: u64::MAX };

    /// As much as it needs, with files read in this way.
    pub(crate) fn of(access: Access) -> Self {
        Self { access, ..Self::ALL }
    }

    /// The bytes of a file of weights.
    pub(crate) fn open(self, path: &Path) -> Result<SharedBytes> {
        match self.access {
            Access::Mapped => SharedBytes::map(path),
            Access::Untouched => SharedBytes::map_untouched(path),
            Access::InMemory => SharedBytes::read(path),
        }
    }

    /// Counts `bytes` for a tensor that cannot stay in the file.
    ///
    /// # Errors
    /// [`ResourceExhausted`](ErrorKind::ResourceExhausted) where there are fewer left.
    pub(crate) fn take(&mut self, bytes: u64) -> Result<()> {
        if let Some(left) = self.memory.checked_sub(bytes) {
            self.memory = left;
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::ResourceExhausted,
            format!(
                "the tensor has to be converted when it is loaded, which takes {bytes} bytes more than the memory limit \
                 leaves ({}); convert the checkpoint once (`ternion convert`), then its weights can stay in the file",
                self.memory
            ),
        ))
    }
}

/// A model that has been read: its facts, its tensors and where its tokenizer is.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Checkpoint {
    /// The facts that an engine needs.
    pub spec: ModelSpec,
    /// The embedding: `[vocab_size, hidden_size]`.
    pub embed: Table,
    /// The decoder layers, first to last.
    pub layers: Vec<LayerTensors>,
    /// The norm before the head: `[hidden_size]`.
    pub final_norm: RmsNorm,
    /// The head: `[vocab_size, hidden_size]`. `None`: it is the embedding.
    pub head: Option<Table>,
    /// The sampling that the model's authors ask for.
    pub sampling: SamplingDefaults,
    /// The format, for people: `safetensors (packed 1.58-bit)`.
    pub format: String,
    /// The name of the folder or file that was opened, without its extension.
    pub name: String,
    /// The files of weights that were read, in order.
    pub files: Vec<PathBuf>,
    /// The folder that it was read from; the tokenizer's files are there.
    pub folder: PathBuf,
    /// Facts that no file states, and what they were concluded from.
    pub assumptions: Vec<String>,
    /// Contradictions in the files that may make answers wrong; each names the option that decides.
    pub warnings: Vec<String>,
    /// The options that it was opened with.
    pub(crate) options: CheckpointOptions,
    /// The GGUF file, where it was one.
    pub(crate) gguf: Option<gguf::File>,
}

impl Checkpoint {
    /// Opens a GGUF file, a `.safetensors` file or a `.safetensors.index.json`, with the configuration in the same folder,
    /// or a folder with one of these. GGUF and safetensors are told by their content, whatever the names. Of a GGUF model
    /// in several parts, name the first.
    ///
    /// Packed ternary weights, the embedding and the head stay in the mapped files as far as their layout is one that is
    /// computed with; float masters are quantised. All of the ternary codes are looked at once, on all threads of the
    /// current rayon pool.
    ///
    /// # Errors
    /// [`NotFound`](ternion_core::ErrorKind::NotFound) where a file is missing,
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) where a file is damaged or files contradict each other, and
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for a model that asks for what is not implemented. The
    /// message names the file, the tensor or key, what was found and what was expected.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, &mut |_, _| {})
    }

    /// [`open`](Self::open) that tells how far it is, layer by layer.
    ///
    /// # Errors
    /// Those of [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, progress: &mut Progress<'_>) -> Result<Self> {
        Self::open_as(path.as_ref(), &CheckpointOptions::default(), progress)
    }

    pub(crate) fn open_as(
        path: &Path,
        options: &CheckpointOptions,
        progress: &mut Progress<'_>,
    ) -> Result<Self> {
        Self::read(path, options, Means::ALL, progress)
    }

    /// [`open_with`](Self::open_with) for a process that has little memory. The files are mapped, but no page of their
    /// weights is touched: the checks read them through a buffer of some megabytes. Tensors that have to be converted
    /// when they are loaded (float masters, TQ1_0, a quantised head) may take `memory` bytes together.
    ///
    /// # Errors
    /// Those of [`open`](Self::open), and [`ResourceExhausted`](ErrorKind::ResourceExhausted) naming the tensor for which
    /// `memory` is too little, before it is converted.
    pub fn open_within(path: impl AsRef<Path>, memory: u64, progress: &mut Progress<'_>) -> Result<Self> {
        Self::open_within_as(path.as_ref(), memory, &CheckpointOptions::default(), progress)
    }

    pub(crate) fn open_within_as(
        path: &Path,
        memory: u64,
        options: &CheckpointOptions,
        progress: &mut Progress<'_>,
    ) -> Result<Self> {
        Self::read(path, options, Means { access: Access::Untouched, memory }, progress)
    }

    /// [`open_with`](Self::open_with) and [`tokenizer`](Self::tokenizer) side by side: for a large model each takes some
    /// tenths of a second.
    ///
    /// # Errors
    /// Those of both, of the checkpoint where both fail; [`ResourceExhausted`](ErrorKind::ResourceExhausted) where no
    /// thread can be started.
    pub fn open_with_tokenizer(
        path: impl AsRef<Path>,
        access: Access,
        progress: &mut Progress<'_>,
    ) -> Result<(Self, Tokenizer)> {
        Self::open_with_tokenizer_as(path.as_ref(), access, &CheckpointOptions::default(), progress)
    }

    pub(crate) fn open_with_tokenizer_as(
        path: &Path,
        access: Access,
        options: &CheckpointOptions,
        progress: &mut Progress<'_>,
    ) -> Result<(Self, Tokenizer)> {
        std::thread::scope(|scope| {
            let read = || {
                let parts = Self::tokenizer_parts_as(path, options)?;
                Tokenizer::from_parts(parts).with_operation("load")
            };
            let thread = std::thread::Builder::new().name("ternion-tokenizer".to_owned());
            let tokenizer = thread.spawn_scoped(scope, read).map_err(|e| {
                Error::new(ErrorKind::ResourceExhausted, "cannot start a thread for the tokenizer")
                    .with_source(e)
            })?;
            let checkpoint = Self::read(path, options, Means::of(access), progress)?;
            let tokenizer = tokenizer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let tokenizer = tokenizer.and_then(|tokenizer| {
                tokenizer.check_limit(checkpoint.spec.vocab_size).with_operation("load")?;
                Ok(tokenizer)
            });
            tokenizer.with("folder", checkpoint.folder.display()).map(|tokenizer| (checkpoint, tokenizer))
        })
    }

    /// Opens an ONNX model to be converted.
    pub(crate) fn open_onnx(
        path: &Path,
        options: &CheckpointOptions,
        progress: &mut Progress<'_>,
    ) -> Result<Self> {
        Self::read_by(options, |notes| onnx::open(path, notes, progress))
    }

    fn read(
        path: &Path,
        options: &CheckpointOptions,
        means: Means,
        progress: &mut Progress<'_>,
    ) -> Result<Self> {
        Self::read_by(options, |notes| {
            let file = gguf_file(path)?;
            warn_of_others(path, file.as_deref());
            match file {
                Some(file) => gguf::open(&file, notes, means, progress),
                None => huggingface::open(path, notes, means, progress),
            }
        })
    }

    fn read_by(options: &CheckpointOptions, read: impl FnOnce(&mut Notes) -> Result<Self>) -> Result<Self> {
        let start = Instant::now();
        let mut notes = Notes::new(options)?;
        let checkpoint = read(&mut notes);
        let mut checkpoint = checkpoint.with_operation("load")?;
        (checkpoint.assumptions, checkpoint.warnings) = notes.finish();
        checkpoint.options = options.clone();
        tracing::info!(
            name = checkpoint.name,
            format = checkpoint.format,
            milliseconds = start.elapsed().as_millis() as u64,
            "checkpoint opened"
        );
        Ok(checkpoint)
    }

    /// Logs the warnings, and the assumptions for information. Reading alone logs neither; a backend that loads the model
    /// calls this.
    pub fn log_notes(&self) {
        for assumption in &self.assumptions {
            tracing::info!(name = self.name, "{assumption}");
        }
        for warning in &self.warnings {
            tracing::warn!(name = self.name, "{warning}");
        }
    }

    /// Reads the tokenizer's files, or where there is no `tokenizer.json` beside a GGUF file what is in that, with the
    /// vocabulary's size as a limit of the token ids.
    ///
    /// # Errors
    /// Those of [`TokenizerParts::from_folder`] and [`gguf::tokenizer_parts`].
    pub fn tokenizer_parts(&self) -> Result<TokenizerParts> {
        let file = self.gguf.as_ref().filter(|_| !self.folder.join(TOKENIZER).exists());
        let mut parts = tokenizer_parts(file, &self.folder, &self.options).with_operation("load")?;
        parts.vocab_limit = Some(self.spec.vocab_size);
        Ok(parts)
    }

    /// Builds the tokenizer.
    ///
    /// # Errors
    /// Those of [`TokenizerParts::from_folder`] and [`Tokenizer::from_parts`], among them a token whose id lies outside
    /// the model's vocabulary.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Tokenizer::from_parts(self.tokenizer_parts()?)
            .with_operation("load")
            .with("folder", self.folder.display())
    }

    /// The tokenizer of the checkpoint at `path`, without a look at its weights.
    ///
    /// # Errors
    /// Those of [`tokenizer_parts`](Self::tokenizer_parts), and of reading a GGUF file's metadata.
    pub fn tokenizer_parts_at(path: impl AsRef<Path>) -> Result<TokenizerParts> {
        Self::tokenizer_parts_as(path.as_ref(), &CheckpointOptions::default())
    }

    pub(crate) fn tokenizer_parts_as(path: &Path, options: &CheckpointOptions) -> Result<TokenizerParts> {
        let file = gguf_file(path)?;
        let is_file = path.is_file();
        let folder = match path.parent() {
            Some(parent) if is_file && parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) if is_file => parent,
            _ => path,
        };
        let file = file.filter(|_| !folder.join(TOKENIZER).exists());
        let file = file.map(gguf::File::open).transpose().with_operation("load")?;
        tokenizer_parts(file.as_ref(), folder, options).with_operation("load")
    }

    /// Watches the files in which tensors lie; see [`FileWatch`].
    ///
    /// # Errors
    /// Those of [`FileWatch::of`].
    pub fn watch(&self) -> Result<FileWatch> {
        let linears = self.layers.iter().flat_map(LayerTensors::linears).filter_map(Linear::bytes);
        let tables = [&self.embed, self.head_or_embed()].into_iter().filter_map(Table::bytes);
        FileWatch::of(linears.chain(tables))
    }

    /// How keys and values are stored if `wanted` is asked for: [`KvType::Exact`], which is the default, only where all of them are sums.
    pub fn kv_type(&self, wanted: Option<KvType>) -> KvType {
        match wanted {
            Some(other) if other != KvType::Exact => other,
            _ if self.layers.iter().all(LayerTensors::has_integer_kv) => KvType::Exact,
            _ => KvType::F32,
        }
    }

    /// The matrix that turns hidden states into logits: the head, or the embedding where they are tied.
    pub fn head_or_embed(&self) -> &Table {
        self.head.as_ref().unwrap_or(&self.embed)
    }
}

/// The tokenizer of a GGUF file, or of a folder where there is none.
fn tokenizer_parts(
    file: Option<&gguf::File>,
    folder: &Path,
    options: &CheckpointOptions,
) -> Result<TokenizerParts> {
    let parts = match file {
        Some(file) => gguf::tokenizer_parts_as(file, options),
        None => TokenizerParts::from_folder(folder),
    }?;
    Ok(options.applied_to(parts, file.is_some_and(gguf::names_rule)))
}
