//! A checkpoint from a GGUF file: which tensor plays which part, and whether it is what the metadata says.
//!
//! Dense tensors of F32, F16 and BF16 and the codes of I2_S stay in the mapped file. Others are decoded or repacked into
//! memory. Quantised dense tensors (Q8_0, Q6_K, Q4_0) become F32, which alone holds their values exactly: an F16 scale
//! times a signed byte has up to 18 significant bits, an F16 has 11, a BF16 8.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use ternion_core::{Error, Result};
use ternion_kernels::{MAX_COLS, TernaryLayout};

use super::rows::{Heads, pack_i2s};
use super::ternary::{decode_tq, shared_scale};
use super::{File, I2S_GROUP, TensorInfo, TensorType, dense, keys, spec};
use crate::checkpoint::{Means, Progress};
use crate::{
    Checkpoint, DenseTensor, DenseType, Family, LayerTensors, Linear, ModelSpec, RmsNorm, RopeScaling,
    SharedBytes, TernaryTensor, Weights, generation, layers,
};

const GENERATION: &str = "generation_config.json";
const GENERATION_CAP: u64 = 4 << 20;

/// Opens the file.
pub(crate) fn open(path: &Path, means: Means, progress: &mut Progress<'_>) -> Result<Checkpoint> {
    let file = File::parse(&means.open(path)?, path)?;
    let mut spec = spec::read(&file)?;
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let mut sampling = spec::sampling(&file)?;
    if folder.join(GENERATION).exists() && file.value(keys::TEMPERATURE).is_none() {
        let (beside, eos) = generation::read(&folder.join(GENERATION), GENERATION_CAP)?;
        sampling = beside;
        if let Some(mut eos) = eos.filter(|_| file.value(keys::EOS_LIST).is_none()) {
            eos.retain(|&id| (id as usize) < spec.vocab_size);
            spec.eos = eos;
        }
    }

    let mut reader = Reader::new(&file, &spec, means, progress);
    let embed = reader.dense(keys::EMBED, &[spec.vocab_size, spec.hidden_size], None)?;
    let head = reader.head(&embed)?;
    let rope_factors = reader.rope_factors()?;
    let layers = (0..spec.layers).map(|i| reader.layer(i)).collect::<Result<Vec<_>>>()?;
    let final_norm = reader.norm(keys::FINAL_NORM, spec.hidden_size)?;
    let (ternary, keep_dense) = reader.finish()?;

    spec.tied = head.is_none();
    if let Some(factors) = rope_factors {
        spec.rope.scaling = RopeScaling::Factors(factors);
    }
    let format = match ternary {
        Some(kind) => format!("GGUF ({kind})"),
        None => format!("GGUF (dense {})", embed.dtype.name()),
    };
    match spec.quantization.as_mut().filter(|_| ternary.is_some()) {
        Some(quantization) => quantization.keep_dense = keep_dense,
        None => spec.quantization = None,
    }
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let files = vec![path.to_owned()];
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
        gguf: Some(file),
    })
}

/// Takes the tensors of a file one after the other.
struct Reader<'a> {
    file: &'a File,
    spec: &'a ModelSpec,
    left: BTreeMap<&'a str, &'a TensorInfo>,
    means: Means,
    progress: &'a mut Progress<'a>,
    done: u64,
    total: u64,
    ternary: Option<TensorType>,
    keep_dense: Vec<String>,
}

impl<'a> Reader<'a> {
    fn new(file: &'a File, spec: &'a ModelSpec, means: Means, progress: &'a mut Progress<'a>) -> Self {
        let left = file.tensors().iter().map(|t| (t.name.as_str(), t)).collect();
        let total = file.tensors().iter().map(|t| t.bytes).sum();
        Self { file, spec, left, means, progress, done: 0, total, ternary: None, keep_dense: Vec::new() }
    }

    fn error(&self, name: &str, message: impl Into<String>) -> Error {
        Error::invalid_model(message).with("tensor", name).with("file", self.file.path().display())
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<(&'a TensorInfo, SharedBytes)> {
        let tensor = self.left.remove(name).ok_or_else(|| self.error(name, "the tensor is missing"))?;
        if !tensor.dims.iter().rev().copied().eq(shape.iter().map(|&n| n as u64)) {
            let found: Vec<u64> = tensor.dims.iter().rev().copied().collect();
            return Err(self.error(name, format!("the shape is {found:?}, expected {shape:?}")));
        }
        self.done += tensor.bytes;
        Ok((tensor, self.file.data(tensor)))
    }

    /// A dense tensor; `heads` undoes the order of rows of the Llama architecture.
    fn dense(&mut self, name: &str, shape: &[usize], heads: Option<Heads>) -> Result<DenseTensor> {
        let (tensor, bytes) = self.take(name, shape)?;
        let mapped = match tensor.kind {
            TensorType::F32 => Some(DenseType::F32),
            TensorType::F16 => Some(DenseType::F16),
            TensorType::Bf16 => Some(DenseType::Bf16),
            _ => None,
        };
        let (dtype, mut bytes) = match mapped {
            Some(dtype) => (dtype, bytes),
            None => (DenseType::F32, self.decoded(tensor)?),
        };
        if let Some(heads) = heads {
            if mapped.is_some() {
                self.own(name, bytes.len())?;
            }
            bytes = ordered(&bytes.loaded()?, bytes.len() / shape[0], heads);
        }
        if !layers::all_finite(dtype, &bytes)? {
            return Err(self.error(name, "a value is infinite or not a number, expected finite numbers"));
        }
        Ok(DenseTensor { dtype, shape: shape.to_vec(), bytes })
    }

    /// Counts `bytes` for a tensor that cannot stay in the file.
    fn own(&mut self, name: &str, bytes: usize) -> Result<()> {
        self.means
            .take(bytes as u64)
            .map_err(|e| e.with("tensor", name).with("file", self.file.path().display()))
    }

    /// The elements of a tensor that is needed whole and is small.
    fn values(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let dense = self.dense(name, shape, None)?;
        Ok(DenseTensor { bytes: dense.bytes.loaded()?, ..dense }.to_f32())
    }

    fn decoded(&mut self, tensor: &TensorInfo) -> Result<SharedBytes> {
        let kind = tensor.kind;
        if !dense::is_dense(kind) {
            let message = format!("the element type is {kind}, expected F32, F16, BF16, Q8_0, Q6_K or Q4_0");
            return Err(Error::unsupported(message)
                .with("tensor", &tensor.name)
                .with("file", self.file.path().display()));
        }
        // Some thousand blocks to a task, some of these to a piece that is read.
        let (task, len) = (1024 * kind.block_bytes(), 1024 * kind.block_len());
        let size = tensor.dims.iter().product::<u64>() as usize * 4;
        self.own(&tensor.name, size)?;
        let mut out = vec![0; size];
        let mut piece = vec![0; (64 * task).min(tensor.bytes as usize)];
        let mut done = 0;
        for out in out.chunks_mut(64 * 4 * len) {
            let piece = &mut piece[..out.len() / (4 * kind.block_len()) * kind.block_bytes()];
            self.file.read(tensor, done, piece)?;
            done += piece.len() as u64;
            out.par_chunks_mut(4 * len).zip(piece.par_chunks(task)).for_each_init(
                Vec::new,
                |values, (out, bytes)| {
                    values.resize(out.len() / 4, 0.0);
                    dense::decode(kind, bytes, values).expect("invariant: whole blocks of a dense type");
                    for (out, value) in out.as_chunks_mut().0.iter_mut().zip(&*values) {
                        *out = value.to_le_bytes();
                    }
                },
            );
        }
        Ok(out.into())
    }

    fn norm(&mut self, name: &str, width: usize) -> Result<RmsNorm> {
        Ok(RmsNorm { weight: self.values(name, &[width])?, eps: self.spec.rms_eps })
    }

    /// The head, unless it is a copy of the embedding.
    fn head(&mut self, embed: &DenseTensor) -> Result<Option<DenseTensor>> {
        if !self.left.contains_key(keys::HEAD) {
            return Ok(None);
        }
        let head = self.dense(keys::HEAD, &[self.spec.vocab_size, self.spec.hidden_size], None)?;
        let copy = head.dtype == embed.dtype && head.bytes.same_as(&embed.bytes)?;
        Ok((!copy).then_some(head))
    }

    fn rope_factors(&mut self) -> Result<Option<Vec<f32>>> {
        let name = keys::ROPE_FACTORS;
        if !self.left.contains_key(name) {
            return Ok(None);
        }
        let factors = self.values(name, &[self.spec.head_dim / 2])?;
        match factors.iter().find(|x| **x <= 0.0) {
            Some(x) => Err(self.error(name, format!("a factor is {x:?}, expected positive numbers"))),
            None => Ok(Some(factors)),
        }
    }

    fn layer(&mut self, index: usize) -> Result<LayerTensors> {
        let s = self.spec;
        let (hidden, inner) = (s.hidden_size, s.intermediate_size);
        let (q_width, kv_width) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        let shapes = [
            [q_width, hidden],
            [kv_width, hidden],
            [kv_width, hidden],
            [hidden, q_width],
            [inner, hidden],
            [inner, hidden],
            [hidden, inner],
        ];
        let mut linears = Vec::with_capacity(7);
        for ((part, module), shape) in keys::PROJECTIONS.into_iter().zip(shapes) {
            let module = format!("model.layers.{index}.{module}");
            linears.push(self.linear(&format!("blk.{index}.{part}"), module, shape)?);
        }
        let [q, k, v, o, gate, up, down] =
            <[Linear; 7]>::try_from(linears).expect("invariant: one for each of the projections");
        let tensors = LayerTensors {
            input_norm: self.norm(&name("attn_norm"), hidden)?,
            q,
            k,
            v,
            attn_sub_norm: s.sub_norms.then(|| self.norm(&name("attn_sub_norm"), q_width)).transpose()?,
            o,
            post_attention_norm: self.norm(&name("ffn_norm"), hidden)?,
            gate,
            up,
            ffn_sub_norm: s.sub_norms.then(|| self.norm(&name("ffn_sub_norm"), inner)).transpose()?,
            down,
        };
        (self.progress)(self.done, self.total);
        Ok(tensors)
    }

    fn linear(&mut self, part: &str, module: String, shape: [usize; 2]) -> Result<Linear> {
        let name = format!("{part}.weight");
        let rotated = part.ends_with(".attn_q") || part.ends_with(".attn_k");
        let heads = (self.spec.family == Family::Llama && rotated).then_some(Heads(self.spec.head_dim));
        let is_ternary = self.left.get(name.as_str()).is_some_and(|t| t.kind.is_ternary());
        let weights = if is_ternary {
            Weights::Ternary(self.ternary(&name, part, shape, heads)?)
        } else {
            self.keep_dense.push(module.clone());
            Weights::Dense(self.dense(&name, &shape, heads)?)
        };
        Ok(Linear { name: module, weights, input_norm: None })
    }

    fn ternary(
        &mut self,
        name: &str,
        part: &str,
        shape: [usize; 2],
        heads: Option<Heads>,
    ) -> Result<TernaryTensor> {
        let [rows, cols] = shape;
        let (tensor, bytes) = self.take(name, &shape)?;
        let kind = tensor.kind;
        if cols > MAX_COLS {
            return Err(
                self.error(name, format!("the projection has {cols} columns, expected at most {MAX_COLS}"))
            );
        }
        if !rows.is_multiple_of(4) {
            return Err(self.error(name, format!("the projection has {rows} rows, expected a multiple of 4")));
        }
        let invalid = "a weight has the code 3; expected the codes 0, 1 and 2";
        let (codes, stored) = if kind == TensorType::I2S {
            debug_assert!(cols.is_multiple_of(I2S_GROUP), "a row is a whole number of groups");
            let end = rows * cols / 4;
            let codes = bytes.slice(0..end).ok_or_else(|| self.error(name, "the codes are incomplete"))?;
            if let Some((at, found)) = layers::invalid_code(&codes)? {
                let message = format!(
                    "byte {at} is {found:#04x}, which holds the code 3; expected the codes 0, 1 and 2"
                );
                return Err(self.error(name, message));
            }
            let mut scale = [0; 4];
            bytes
                .read_at(end, &mut scale)
                .map_err(|e| self.error(name, "the scale after the codes is missing").with_source(e))?;
            (codes, f32::from_le_bytes(scale))
        } else {
            self.own(name, rows * cols / 4)?;
            // Read rather than mapped: the pages would stay resident beside what is made of them.
            let mut bytes = vec![0; tensor.bytes as usize];
            self.file.read(tensor, 0, &mut bytes)?;
            let stored = shared_scale(kind, &bytes)
                .map_err(|e| e.with("tensor", name).with("file", self.file.path().display()))?;
            let width = bytes.len() / rows;
            let broken = std::sync::atomic::AtomicBool::new(false);
            let codes = pack_i2s(rows, cols, |row, codes| {
                if decode_tq(kind, &bytes[row * width..(row + 1) * width], codes) {
                    broken.store(true, std::sync::atomic::Ordering::Relaxed);
                }
            });
            if broken.into_inner() {
                return Err(self.error(name, invalid));
            }
            (codes.into(), stored)
        };
        let scale = self.scale(name, part, stored)?;
        self.ternary.get_or_insert(kind);
        let codes = match heads {
            Some(heads) => {
                if codes.is_mapped() {
                    self.own(name, codes.len())?;
                }
                ordered(&codes.loaded()?, cols / 4, heads)
            }
            None => codes,
        };
        Ok(TernaryTensor { codes, layout: TernaryLayout::I2s, rows, cols, scale })
    }

    /// The factor of the integer product: the scale in the tensor, times the one beside it where there is one.
    fn scale(&mut self, name: &str, part: &str, stored: f32) -> Result<f32> {
        let beside = format!("{part}.scale");
        let factor =
            if self.left.contains_key(beside.as_str()) { self.values(&beside, &[1])?[0] } else { 1.0 };
        let scale = stored * factor;
        if scale == 0.0 || !scale.is_finite() {
            return Err(
                self.error(name, format!("the scale is {scale:?}, expected a finite number other than 0"))
            );
        }
        Ok(scale)
    }

    /// Ends the reading; an error where a tensor plays no part. Returns the type of the ternary tensors, and the
    /// modules that are dense.
    fn finish(self) -> Result<(Option<TensorType>, Vec<String>)> {
        let Some((name, _)) = self.left.first_key_value() else {
            (self.progress)(self.total, self.total);
            return Ok((self.ternary, self.keep_dense));
        };
        if name.strip_suffix(".bias").is_some() {
            return Err(Error::unsupported("a bias is not supported, expected projections without")
                .with("tensor", name)
                .with("file", self.file.path().display()));
        }
        let spec = self.spec;
        Err(self.error(
            name,
            format!("the tensor has no place in a {} model of {} layers", spec.family, spec.layers),
        ))
    }
}

/// Rows of `width` bytes in the model's order.
fn ordered(bytes: &SharedBytes, width: usize, heads: Heads) -> SharedBytes {
    let mut out = vec![0; bytes.len()];
    out.par_chunks_exact_mut(width).enumerate().for_each(|(row, out)| {
        let at = heads.in_file(row) * width;
        out.copy_from_slice(&bytes[at..at + width]);
    });
    out.into()
}
