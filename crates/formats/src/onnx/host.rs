//! What lies beside a model's file: its configuration and its tokenizer, as Hugging Face repositories and
//! onnxruntime-genai have them.
//!
//! Exports of any decoder are read, not only of the families that this crate knows by their tensors. So only the few facts
//! are taken that the graph does not tell or that it can be checked against, and each of them may be absent.

use std::path::{Path, PathBuf};

use ternion_core::text::{Tokenizer, TokenizerParts};
use ternion_core::{Error, Result, ResultExt, SamplingDefaults};

use super::find;
use super::genai::{Genai, Names};
use crate::generation;
use crate::json::Object;
use crate::locate::{CHECKPOINT_ENGINES, Content};
use crate::notes::Notes;

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const GENAI: &str = "genai_config.json";
const CONFIG_CAP: u64 = 4 << 20;

/// A model's file and the facts in the files beside it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Host {
    /// The model's file.
    pub model: PathBuf,
    /// The folder with configuration and tokenizer.
    pub folder: PathBuf,
    /// `model_type`: `bitnet`, `llama`, `qwen2` ...
    pub architecture: Option<String>,
    /// Entries of the vocabulary.
    pub vocab_size: Option<usize>,
    /// Positions that the model was made for.
    pub context_length: Option<usize>,
    /// Decoder layers.
    pub layers: Option<usize>,
    /// Heads of keys and values, where the file says so.
    pub kv_heads: Option<usize>,
    /// Elements of a head, where the file says so.
    pub head_dim: Option<usize>,
    /// Heads of queries: as many as of keys and values, where nothing is said of those.
    pub heads: Option<usize>,
    /// Width of the hidden states: that of all heads of queries, where nothing is said of those.
    pub hidden_size: Option<usize>,
    /// The graph's names for inputs and outputs, where a genai_config.json says them. The sizes come from there then.
    pub names: Option<Names>,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    /// The sampling that the model's authors ask for.
    pub sampling: SamplingDefaults,
    /// What the files ask for that is not done.
    pub warnings: Vec<String>,
}

impl Host {
    /// Finds the model that `path` names, a folder or a `.onnx` file, and reads what is beside it.
    ///
    /// # Errors
    /// [`NotFound`](ternion_core::ErrorKind::NotFound) where there is no model,
    /// [`InvalidModel`](ternion_core::ErrorKind::InvalidModel) for a configuration that cannot be read,
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for a file of another format or a folder with several models.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        open(path.as_ref()).with_operation("load")
    }

    /// Builds the tokenizer; `vocab_size` bounds its ids.
    ///
    /// # Errors
    /// Those of [`TokenizerParts::from_folder`] and [`Tokenizer::from_parts`].
    pub fn tokenizer(&self, vocab_size: usize) -> Result<Tokenizer> {
        let parts = TokenizerParts::from_folder(&self.folder)?.with_vocab_limit(vocab_size);
        Tokenizer::from_parts(parts).with_operation("load").with("folder", self.folder.display())
    }

    /// What people call the model: the folder's name.
    pub fn name(&self) -> String {
        let resolved = self.folder.canonicalize().unwrap_or_else(|_| self.folder.clone());
        resolved.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
    }
}

fn open(path: &Path) -> Result<Host> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    let genai = |folder: &Path| {
        let file = folder.join(GENAI);
        file.is_file().then(|| Genai::read(&file, CONFIG_CAP)).transpose()
    };
    let model = if metadata.is_dir() {
        // Where there is a config.json too, the names of the files decide.
        let genai = if path.join(CONFIG).is_file() { None } else { genai(path)? };
        let named = genai.map(|genai| genai.file(path)).transpose()?.flatten();
        find::model(path, named.as_deref())?
    } else if let content @ (Content::Gguf | Content::Safetensors) = Content::of(path) {
        let what = if content == Content::Gguf { "a GGUF file" } else { "safetensors" };
        let message = format!("is {what}, which {CHECKPOINT_ENGINES} run; expected an ONNX file");
        return Err(Error::unsupported(message).with("file", path.display()));
    } else {
        path.to_owned()
    };
    let parent = match model.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    // Repositories that hold several variants keep the graphs in a folder `onnx`, and the rest above it.
    let above = parent.parent().filter(|_| parent.ends_with("onnx") && !parent.join(CONFIG).is_file());
    let folder = above.map_or_else(
        || parent.clone(),
        |above| {
            if above.as_os_str().is_empty() { PathBuf::from(".") } else { above.to_owned() }
        },
    );
    let file = folder.join(CONFIG);
    let config = if file.is_file() { Some(Object::read(&file, CONFIG_CAP)?) } else { None };
    let mut notes = Notes::default();
    let (sampling, eos) =
        generation::read(&folder.join(GENERATION), CONFIG_CAP, config.as_ref(), &mut notes)?;
    let mut host = Host {
        model,
        architecture: None,
        vocab_size: None,
        context_length: None,
        layers: None,
        kv_heads: None,
        head_dim: None,
        heads: None,
        hidden_size: None,
        names: None,
        eos: Vec::new(),
        sampling,
        warnings: Vec::new(),
        folder,
    };
    if let Some(config) = &config {
        host.read_config(config)?;
    }
    (_, host.warnings) = notes.finish();
    let has_generation = host.folder.join(GENERATION).is_file();
    host.eos = eos.unwrap_or(std::mem::take(&mut host.eos));
    if let Some(genai) = genai(&host.folder)?.filter(|_| config.is_none()) {
        genai.fill(&mut host, has_generation)?;
    }
    Ok(host)
}

impl Host {
    fn read_config(&mut self, config: &Object) -> Result<()> {
        // GPT-2 and its like have names of their own.
        let size = |names: &[&str]| -> Result<Option<usize>> {
            for name in names {
                if let Some(size) = config.integer(name, 1..=1 << 28)? {
                    return Ok(Some(size));
                }
            }
            Ok(None)
        };
        self.architecture = config.string("model_type")?.map(str::to_owned);
        self.vocab_size = size(&["vocab_size"])?;
        self.context_length = size(&["max_position_embeddings", "n_positions"])?;
        self.layers = size(&["num_hidden_layers", "n_layer"])?;
        self.kv_heads = size(&["num_key_value_heads"])?;
        self.head_dim = size(&["head_dim"])?;
        self.heads = size(&["num_attention_heads", "n_head"])?;
        self.hidden_size = size(&["hidden_size", "n_embd"])?;
        self.eos = config.token_ids("eos_token_id")?.unwrap_or_default();
        Ok(())
    }
}
