//! A checkpoint as Hugging Face repositories lay it out: `config.json`, `generation_config.json`, one
//! `model.safetensors` or several with an index.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use ternion_core::{Error, Result, SamplingDefaults};

use crate::checkpoint::{Means, Progress};
use crate::config::{MlxQuantization, Signs};
use crate::json::{Entries, Object, cause, read_capped, show};
use crate::layers::{self, Parts, Reader};
use crate::locate::{self, Content};
use crate::notes::Notes;
use crate::safetensors::{self, RawTensor};
use crate::{Checkpoint, CheckpointOptions, Family, ModelSpec, Table, Weights, config, generation};

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const GENERATION: &str = "generation_config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const INDEX_SUFFIX: &str = ".safetensors.index.json";

pub(crate) const CONFIG_CAP: u64 = 4 << 20;
const INDEX_CAP: u64 = 64 << 20;

/// Opens the checkpoint that `path` names: a folder, a `.safetensors` file or an index.
pub(crate) fn open(
    path: &Path,
    notes: &mut Notes,
    means: Means,
    progress: &mut Progress<'_>,
) -> Result<Checkpoint> {
    let (folder, weights) = locate(path)?;
    let config = Object::read(&folder.join(CONFIG), CONFIG_CAP)?;
    let (tensors, files) = open_weights(&weights, means)?;
    let headless = tensors.contains_key("embed_tokens.weight");
    let mut tensors = with_prefix(tensors);
    let Facts { spec, sampling } = Facts::read(&folder, &config, &Signs::of(&tensors), notes)?;
    if notes.options.i2s_layout.is_some() {
        notes.warn("the option `i2s_layout` is set, but the checkpoint has no I2_S tensors");
    }
    if !spec.sub_norms && notes.options.sub_norms.is_some() {
        tensors.retain(|name, _| !layers::is_sub_norm(name));
    }
    let keep_scale = spec.family == Family::BitNet && config.value("quantization_config").is_none();
    let mlx = MlxQuantization::read(&config)?;
    let reader = Reader::new(&spec, tensors, &weights, notes, means, progress)
        .keep_scale(keep_scale)
        .headless(headless)
        .mlx(mlx);
    let Parts { embed, layers, final_norm, head, packed, grouped } = reader.read_all()?;

    let format = describe(packed, grouped, layers_are_dense(&layers), &embed);
    let name = name_of(path, &folder);
    Ok(Checkpoint {
        spec,
        embed,
        layers,
        final_norm,
        head,
        sampling,
        format,
        name,
        files,
        folder,
        assumptions: Vec::new(),
        warnings: Vec::new(),
        options: CheckpointOptions::default(),
        gguf: None,
    })
}

/// What the files beside the weights say.
pub(crate) struct Facts {
    pub(crate) spec: ModelSpec,
    pub(crate) sampling: SamplingDefaults,
}

impl Facts {
    /// Reads `config`, which is that of `folder`, and `generation_config.json`.
    pub(crate) fn read(folder: &Path, config: &Object, signs: &Signs, notes: &mut Notes) -> Result<Self> {
        let mut spec = config::read(config, signs, notes)?;
        let (sampling, eos) = generation::read(&folder.join(GENERATION), CONFIG_CAP, Some(config), notes)?;
        if let Some(eos) = eos {
            spec.eos = eos;
        }
        // Shrunken checkpoints keep the ids of the model that they were made from; such a token can never be generated.
        spec.eos.retain(|&id| (id as usize) < spec.vocab_size);
        spec.bos = spec.bos.filter(|&id| (id as usize) < spec.vocab_size);
        Ok(Self { spec, sampling })
    }
}

fn layers_are_dense(layers: &[crate::LayerTensors]) -> bool {
    layers.iter().flat_map(crate::LayerTensors::linears).all(|l| matches!(l.weights, Weights::Dense(_)))
}

fn describe(packed: bool, [mlx, unpacked]: [bool; 2], dense: bool, embed: &Table) -> String {
    if mlx {
        return "safetensors (MLX)".to_owned();
    }
    if unpacked {
        return "safetensors (unpacked weights of groups, packed at load)".to_owned();
    }
    let dtype = embed.type_name().to_lowercase();
    match (packed, dense) {
        (true, _) => "safetensors (packed 1.58-bit)".to_owned(),
        (false, true) => format!("safetensors ({dtype}, dense)"),
        (false, false) => format!("safetensors ({dtype} masters, quantised at load)"),
    }
}

/// The folder of the checkpoint and the file that leads to its weights.
pub(crate) fn locate(path: &Path) -> Result<(PathBuf, PathBuf)> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if metadata.is_dir() {
        // transformers prefers the single file where there are both.
        for name in [WEIGHTS, INDEX] {
            let file = path.join(name);
            if file.try_exists().map_err(|e| Error::io(&file, e))? {
                if Content::of(&file) == Content::LfsPointer {
                    return Err(locate::not_readable(&file));
                }
                return Ok((path.to_owned(), file));
            }
        }
        return Err(locate::no_weights(path));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let is_known = name.ends_with(".safetensors") || name.ends_with(INDEX_SUFFIX);
    let content = Content::of(path);
    if content != Content::Safetensors && (!is_known || content == Content::LfsPointer) {
        return Err(locate::not_readable(path));
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Ok((folder, path.to_owned()))
}

/// The repository's name of a snapshot in the Hugging Face cache (`models--owner--name/snapshots/<commit>`).
fn repository(snapshot: &Path) -> Option<&str> {
    let snapshots = snapshot.parent().filter(|folder| folder.ends_with("snapshots"))?;
    snapshots.parent()?.file_name()?.to_str()?.strip_prefix("models--")?.rsplit("--").next()
}

/// What people call the model: the folder's name, or the file's where it is not the usual one.
pub(crate) fn name_of(path: &Path, folder: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    if let Some(stem) = file.strip_suffix(".safetensors").filter(|stem| *stem != "model") {
        return stem.to_owned();
    }
    // `.` and `..` have a name only once they are resolved.
    let resolved = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    if let Some(name) = repository(&resolved) {
        return name.to_owned();
    }
    resolved.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

#[derive(Deserialize)]
struct Index {
    weight_map: Entries<String>,
}

/// The tensors by their names in a model with a head. Models for embeddings are saved without one, and without `model.` before the
/// names.
pub(crate) fn with_prefix(tensors: BTreeMap<String, RawTensor>) -> BTreeMap<String, RawTensor> {
    if !tensors.contains_key("embed_tokens.weight") {
        return tensors;
    }
    let name = |name: String| if name == layers::HEAD { name } else { format!("model.{name}") };
    tensors.into_iter().map(|(old, tensor)| (name(old), tensor)).collect()
}

/// All tensors that `path` leads to, and the files that hold them.
pub(crate) fn open_weights(path: &Path, means: Means) -> Result<(BTreeMap<String, RawTensor>, Vec<PathBuf>)> {
    if !path.to_string_lossy().ends_with(".index.json") {
        return Ok((safetensors::open(path, means)?, vec![path.to_owned()]));
    }
    let bytes = read_capped(path, INDEX_CAP)?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|e| {
        Error::invalid_model("is not an index of shards, expected an object with `weight_map`")
            .with("file", path.display())
            .with_source(cause(e))
    })?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut shards: BTreeMap<String, BTreeMap<String, RawTensor>> = BTreeMap::new();
    let mut tensors = BTreeMap::new();
    let mut files = Vec::new();
    // The index decides: what a shard holds beyond it is not part of the checkpoint.
    for (name, shard) in index.weight_map.0 {
        let held = match shards.entry(shard) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let file = shard_path(folder, entry.key())
                    .map_err(|e| e.with("tensor", &name).with("file", path.display()))?;
                let held = safetensors::open(&file, means)
                    .map_err(|e| e.with("tensor", &name).with("index", path.display()))?;
                files.push(file);
                entry.insert(held)
            }
        };
        let Some(tensor) = held.remove(&name) else {
            let message = "the index says that the tensor is in a shard that does not hold it";
            return Err(Error::invalid_model(message).with("tensor", &name).with("file", path.display()));
        };
        tensors.insert(name, tensor);
    }
    files.sort();
    Ok((tensors, files))
}

/// A shard lies in the index's own folder: anything but a plain file name is refused.
fn shard_path(folder: &Path, shard: &str) -> Result<PathBuf> {
    let mut components = Path::new(shard).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(name)), None) if name == shard);
    if plain && !shard.contains(['/', '\\', ':', '\0']) {
        return Ok(folder.join(shard));
    }
    Err(Error::invalid_model(format!(
        "the shard is named {}, expected a file name in the index's folder",
        show(&shard.into())
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_stay_in_their_folder() {
        let folder = Path::new("models/x");
        assert_eq!(
            shard_path(folder, "model-00001-of-00002.safetensors").unwrap(),
            folder.join("model-00001-of-00002.safetensors")
        );
        for bad in ["", ".", "..", "../a", "/etc/passwd", "a/b", "a/", "./a", "a\\b", "c:a", "a\0"] {
            assert!(shard_path(folder, bad).is_err(), "{bad:?}");
        }
    }
}
