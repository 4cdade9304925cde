//! GGUF models that llama.cpp knows: loaded by its own loader, with its own arithmetic.

use std::ffi::{CStr, CString, c_void};
use std::path::{Path, PathBuf};

use llama_cpp_sys_2 as sys;
use ternion_core::{
    Error, ModelInfo, Pooling, Result, ResultExt,
    registry::{LoadProgress, Progress},
};
use ternion_formats::FileWatch;

use crate::{LlamaCpp, ModelOptions, embed::Embedder, ffi::Model, guard::Guard, model::KvShape, runtime};

/// A GGUF model with what a host is told of it.
pub(crate) struct Loaded {
    pub(crate) model: LlamaCpp,
    pub(crate) info: ModelInfo,
    /// Tokens that end an answer.
    pub(crate) eos: Vec<u32>,
}

/// Loads the model in the file `path`, which has been checked and which the host calls `name`.
///
/// # Errors
/// What llama.cpp says of a model that it cannot load, and those of [`LlamaCpp::native`].
pub(crate) fn load(path: &Path, name: &str, options: &ModelOptions, progress: &Progress) -> Result<Loaded> {
    let (model, watch) = read(path, options, progress)?;
    let facts = Facts::of(&model)?;
    let info = facts.info(&model, name);
    let eos = end_tokens(&model);
    let model = LlamaCpp::native(model, parts(path), watch, &facts.shape()?, facts.can_cut, options)
        .with("file", path.display())?;
    Ok(Loaded { model, info, eos })
}

/// Loads a model for embeddings.
///
/// # Errors
/// What llama.cpp says of a model that it cannot load, and those of [`Embedder::new`].
pub(crate) fn load_embedder(
    path: &Path,
    name: &str,
    pooling: Option<Pooling>,
    options: &ModelOptions,
    progress: &Progress,
) -> Result<(Embedder, ModelInfo)> {
    let (model, watch) = read(path, options, progress)?;
    let info = Facts::of(&model)?.info(&model, name);
    let embedder = Embedder::new(model, watch, pooling, options).with("file", path.display())?;
    Ok((embedder, info))
}

/// Lets llama.cpp read the file.
fn read(path: &Path, options: &ModelOptions, progress: &Progress) -> Result<(Model, FileWatch)> {
    let file = path
        .to_str()
        .and_then(|path| CString::new(path).ok())
        .ok_or_else(|| Error::invalid_config("the path is not UTF-8").with("file", path.display()))?;
    runtime::start();
    // Opened before llama.cpp maps them, so that a change in between is noticed.
    let watch = if options.mmap { FileWatch::open(parts(path))? } else { FileWatch::default() };
    let mut listener = Listener { progress: progress.clone(), guard: Guard::default() };
    // SAFETY: The path is a string that ends with NUL; it and the listener live for the call.
    let model = Model::load(|| unsafe {
        let mut params = sys::llama_model_default_params();
        params.n_gpu_layers = 0;
        if !options.mmap {
            params.load_mode = sys::LLAMA_LOAD_MODE_NONE;
        }
        params.progress_callback = Some(on_progress);
        params.progress_callback_user_data = std::ptr::from_mut(&mut listener).cast();
        sys::llama_model_load_from_file(file.as_ptr(), params)
    });
    listener.guard.check()?;
    Ok((model.with("file", path.display())?, watch))
}

/// The files of a model: the parts of one that is split (`name-00001-of-00003.gguf`), or the file itself.
fn parts(path: &Path) -> Vec<PathBuf> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let split = name.strip_suffix(".gguf").and_then(|name| name.rsplit_once("-00001-of-"));
    match split
        .and_then(|(prefix, count)| Some((prefix, count.parse().ok().filter(|count: &u32| *count <= 4096)?)))
    {
        Some((prefix, count)) => (1..=count)
            .map(|part| path.with_file_name(format!("{prefix}-{part:05}-of-{count:05}.gguf")))
            .filter(|part| part.is_file())
            .collect(),
        None => vec![path.to_owned()],
    }
}

/// The host's listener, which may panic.
struct Listener {
    progress: Progress,
    guard: Guard,
}

/// Returns `false` after a panic of the listener: llama.cpp then gives up the load.
///
/// # Safety
/// `data` points to a [`Listener`].
unsafe extern "C" fn on_progress(done: f32, data: *mut c_void) -> bool {
    const STEPS: u64 = 1000;
    // SAFETY: The caller's promise.
    let Listener { progress, guard } = unsafe { &*data.cast::<Listener>() };
    let report = || {
        progress.report(LoadProgress::new("weights", (done.clamp(0.0, 1.0) * STEPS as f32) as u64, STEPS));
    };
    guard.run("loading", report).is_some()
}

/// What llama.cpp says of a model.
struct Facts {
    /// Layers, heads of keys, heads, width, context, and the width of a head.
    sizes: [usize; 6],
    description: String,
    parameters: u64,
    bytes: u64,
    /// It is a decoder without an encoder.
    decodes: bool,
    can_cut: bool,
}

impl Facts {
    fn of(model: &Model) -> Result<Self> {
        let raw = model.as_ptr();
        let architecture = text(model, "general.architecture").unwrap_or_default();
        let mut description = [0; 128];
        // SAFETY: The model is alive, and the buffer is as long as is said.
        let (sizes, parameters, bytes, decodes, keeps_state) = unsafe {
            sys::llama_model_desc(raw, description.as_mut_ptr(), description.len());
            (
                [
                    sys::llama_model_n_layer(raw),
                    sys::llama_model_n_head_kv(raw),
                    sys::llama_model_n_head(raw),
                    sys::llama_model_n_embd(raw),
                    sys::llama_model_n_ctx_train(raw),
                ],
                sys::llama_model_n_params(raw),
                sys::llama_model_size(raw),
                sys::llama_model_has_decoder(raw) && !sys::llama_model_has_encoder(raw),
                sys::llama_model_is_recurrent(raw) || sys::llama_model_is_hybrid(raw),
            )
        };
        let [layers, kv_heads, heads, width, context_length] =
            sizes.map(|size| usize::try_from(size).unwrap_or(0));
        if layers == 0 || context_length == 0 {
            return Err(Error::invalid_model("the model says of itself that it has no layers or context"));
        }
        let head_dim = text(model, &format!("{architecture}.attention.key_length"))
            .and_then(|length| length.parse().ok())
            .unwrap_or(width / heads.max(1));
        Ok(Self {
            sizes: [layers, kv_heads, heads, width, context_length, head_dim],
            description: c_text(&description),
            parameters,
            bytes,
            decodes,
            can_cut: !keeps_state,
        })
    }

    /// The shape of the KV cache of a model that generates.
    fn shape(&self) -> Result<KvShape> {
        let [layers, kv_heads, heads, _, context_length, head_dim] = self.sizes;
        if !self.decodes {
            return Err(Error::unsupported("the model has an encoder, expected a decoder alone"));
        }
        // A model without attention keeps a state instead of keys and values.
        if heads == 0 && self.can_cut {
            return Err(Error::invalid_model("the model says of itself that it has no heads"));
        }
        Ok(KvShape { layers, kv_heads, head_dim, context_length })
    }

    fn info(&self, model: &Model, name: &str) -> ModelInfo {
        let mut info = ModelInfo::new(name, "llama-cpp");
        info.architecture = text(model, "general.architecture").unwrap_or_default();
        info.format = format!("GGUF ({})", self.description);
        info.parameters = self.parameters;
        info.weight_bytes = self.bytes;
        info
    }
}

/// A value of the model's metadata, as text.
pub(crate) fn text(model: &Model, key: &str) -> Option<String> {
    let key = CString::new(key).ok()?;
    let mut value = [0; 256];
    // SAFETY: The model is alive, the key ends with NUL, and the buffer is as long as is said.
    let length = unsafe {
        sys::llama_model_meta_val_str(model.as_ptr(), key.as_ptr(), value.as_mut_ptr(), value.len())
    };
    (length >= 0).then(|| c_text(&value))
}

/// The text in a buffer up to its NUL.
fn c_text(buffer: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = buffer.iter().map(|c| *c as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}

fn end_tokens(model: &Model) -> Vec<u32> {
    // SAFETY: The model is alive, its vocabulary lives as long, and every id is in range.
    unsafe {
        let vocab = sys::llama_model_get_vocab(model.as_ptr());
        let tokens = 0..sys::llama_vocab_n_tokens(vocab);
        tokens.filter(|&id| sys::llama_vocab_is_eog(vocab, id)).map(|id| id as u32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_parts_of_a_split_model_are_watched() {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> =
            (1..=3).map(|part| folder.path().join(format!("m-{part:05}-of-00003.gguf"))).collect();
        for path in &paths {
            std::fs::write(path, "GGUF").unwrap();
        }
        assert_eq!(parts(&paths[0]), paths);
        for name in ["m.gguf", "m-00002-of-00003.gguf", "m-00001-of-x.gguf"] {
            assert_eq!(parts(Path::new(name)), [Path::new(name)]);
        }
    }
}
