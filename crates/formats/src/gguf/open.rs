//! A checkpoint from a GGUF file: which tensor plays which part, and whether it is what the metadata says.
//!
//! Dense tensors of F32, F16 and BF16, the codes of I2_S and an embedding or head of a quantised type (Q8_0, Q4_K and the like)
//! stay in the mapped file. Others are decoded or repacked into memory. Float projections of a BitNet are ternary weights
//! before or after their quantisation; they are packed. Quantised dense projections become F32, which alone holds their
//! values exactly: an F16 scale times a signed byte has up to 18 significant bits, an F16 has 11, a BF16 8.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use ternion_core::{Error, Result};
use ternion_kernels::GroupedMatrix;

use super::projections::ordered;
use super::rows::Heads;
use super::{File, TensorInfo, TensorType, dense, grouped, keys, spec, support};
use crate::checkpoint::{Means, Progress};
use crate::grouped::{Wrong, of_floats};
use crate::notes::Notes;
use crate::{
    Checkpoint, CheckpointOptions, DenseTensor, DenseType, Family, LayerTensors, Linear, ModelSpec,
    QuantizedTensor, Recognised, RmsNorm, RopeScaling, SharedBytes, Table, generation, layers,
};

const GENERATION: &str = "generation_config.json";
const GENERATION_CAP: u64 = 4 << 20;

/// Rows of a quantised table that are looked at for what it is.
const LOOKED_AT: usize = 64;

/// Opens the file, and the other parts of a model that is split.
pub(crate) fn open(
    path: &Path,
    notes: &mut Notes,
    means: Means,
    progress: &mut Progress<'_>,
) -> Result<Checkpoint> {
    let file = File::parse(&means.open(path)?, path)?.joined_by(&mut |part| means.open(part))?;
    read(&file, notes, means, progress).map_err(|error| support::with_engine(error, &file))
}

/// Whether the file is one that is read, and how.
pub(crate) fn recognise(file: &File, notes: &mut Notes) -> Result<Recognised> {
    spec_of(file, notes).map_err(|error| support::with_engine(error, file))?;
    let is_known = |kind: TensorType| kind.is_ternary() || kind.is_grouped();
    let is_plain = |kind| matches!(kind, TensorType::F32 | TensorType::F16 | TensorType::Bf16);
    let mut kinds = file.tensors().iter().map(|tensor| tensor.kind);
    // The embedding of a ternary model may be quantised.
    if kinds.clone().any(is_known) || kinds.all(is_plain) {
        return Ok(Recognised::AsItLies);
    }
    Ok(Recognised::Decoded)
}

fn spec_of(file: &File, notes: &mut Notes) -> Result<ModelSpec> {
    for tensor in file.tensors() {
        if let TensorType::Foreign(foreign) = tensor.kind {
            return Err(foreign.error().with("tensor", &tensor.name).with("file", file.path().display()));
        }
    }
    spec::read(file, notes)
}

fn read(file: &File, notes: &mut Notes, means: Means, progress: &mut Progress<'_>) -> Result<Checkpoint> {
    let path = file.path();
    let mut spec = spec_of(file, notes)?;
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let beside = folder.join(GENERATION);
    let sampling = if beside.exists() && file.value(keys::TEMPERATURE).is_none() {
        let (sampling, eos) = generation::read(&beside, GENERATION_CAP, None, notes)?;
        if let Some(mut eos) = eos.filter(|_| file.value(keys::EOS_LIST).is_none()) {
            eos.retain(|&id| (id as usize) < spec.vocab_size);
            spec.eos = eos;
        }
        sampling
    } else {
        spec::sampling(file, notes)?
    };

    let mut reader = Reader::new(file, &spec, notes, means, progress);
    let embed = reader.table(keys::EMBED)?;
    let head = reader.head(&embed)?;
    let rope_factors = reader.rope_factors()?;
    let layers = (0..spec.layers).map(|i| reader.layer(i)).collect::<Result<Vec<_>>>()?;
    let final_norm = reader.norm(keys::FINAL_NORM, spec.hidden_size)?;
    let Found { ternary, grouped, floats, keep_dense } = reader.finish()?;

    spec.tied = head.is_none();
    if let Some(factors) = rope_factors {
        spec.rope.scaling = RopeScaling::Factors(factors);
    }
    let format = match (ternary.or(grouped), floats) {
        (Some(kind), _) => format!("GGUF ({kind})"),
        (None, Some(kind)) => format!("GGUF ({kind}, quantised at load)"),
        (None, None) => format!("GGUF (dense {})", embed.type_name()),
    };
    match spec.quantization.as_mut().filter(|_| ternary.or(floats).is_some()) {
        Some(quantization) => {
            quantization.keep_dense = keep_dense;
            quantization.online = floats.is_some();
        }
        None => spec.quantization = None,
    }
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let files = file.paths().map(Path::to_owned).collect();
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
        gguf: Some(file.clone()),
    })
}

/// What the projections are.
#[derive(Default)]
pub(super) struct Found {
    /// The type of the ternary tensors.
    pub(super) ternary: Option<TensorType>,
    /// The type of tensors with a scale for each group.
    pub(super) grouped: Option<TensorType>,
    /// The type of float tensors that were packed.
    pub(super) floats: Option<TensorType>,
    /// The modules that stay dense.
    pub(super) keep_dense: Vec<String>,
}

/// Takes the tensors of a file one after the other.
pub(super) struct Reader<'a> {
    pub(super) file: &'a File,
    pub(super) spec: &'a ModelSpec,
    pub(super) left: BTreeMap<&'a str, &'a TensorInfo>,
    pub(super) notes: &'a mut Notes,
    means: Means,
    progress: &'a mut Progress<'a>,
    done: u64,
    total: u64,
    pub(super) found: Found,
}

impl<'a> Reader<'a> {
    fn new(
        file: &'a File,
        spec: &'a ModelSpec,
        notes: &'a mut Notes,
        means: Means,
        progress: &'a mut Progress<'a>,
    ) -> Self {
        let mut left: BTreeMap<_, _> = file.tensors().iter().map(|t| (t.name.as_str(), t)).collect();
        if notes.options.sub_norms == Some(false) {
            left.retain(|name, _| !name.ends_with("_sub_norm.weight"));
        }
        let total = file.tensors().iter().map(|t| t.bytes).sum();
        Self { file, spec, left, notes, means, progress, done: 0, total, found: Found::default() }
    }

    pub(super) fn error(&self, name: &str, message: impl Into<String>) -> Error {
        Error::invalid_model(message).with("tensor", name).with("file", self.file.path().display())
    }

    pub(super) fn take(&mut self, name: &str, shape: &[usize]) -> Result<(&'a TensorInfo, SharedBytes)> {
        let tensor = self.left.remove(name).ok_or_else(|| self.error(name, "the tensor is missing"))?;
        if !tensor.dims.iter().rev().copied().eq(shape.iter().map(|&n| n as u64)) {
            let found: Vec<u64> = tensor.dims.iter().rev().copied().collect();
            return Err(self.error(name, format!("the shape is {found:?}, expected {shape:?}")));
        }
        self.done += tensor.bytes;
        Ok((tensor, self.file.data(tensor)))
    }

    /// A dense tensor; `heads` undoes the order of rows of the Llama architecture.
    pub(super) fn dense(&mut self, name: &str, shape: &[usize], heads: Option<Heads>) -> Result<DenseTensor> {
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
    pub(super) fn own(&mut self, name: &str, bytes: usize) -> Result<()> {
        self.means
            .take(bytes as u64)
            .map_err(|e| e.with("tensor", name).with("file", self.file.path().display()))
    }

    /// The elements of a tensor that is needed whole and is small.
    pub(super) fn values(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let dense = self.dense(name, shape, None)?;
        Ok(DenseTensor { bytes: dense.bytes.loaded()?, ..dense }.to_f32())
    }

    fn decoded(&mut self, tensor: &TensorInfo) -> Result<SharedBytes> {
        let kind = tensor.kind;
        if !dense::is_dense(kind) {
            let message = format!("the element type is {kind}, expected one of: {}", dense::dense_names());
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

    pub(super) fn norm(&mut self, name: &str, width: usize) -> Result<RmsNorm> {
        Ok(RmsNorm { weight: self.values(name, &[width])?, eps: self.spec.rms_eps })
    }

    /// The norm of each head of queries or keys.
    fn head_norm(&mut self, name: &str) -> Result<Option<RmsNorm>> {
        let (is_there, width) = (self.spec.qk_norm, self.spec.head_dim);
        is_there.then(|| self.norm(name, width)).transpose()
    }

    fn sub_norm(&mut self, name: &str, width: usize) -> Result<Option<RmsNorm>> {
        if !self.spec.sub_norms {
            return Ok(None);
        }
        if !self.left.contains_key(name) {
            return Err(self.error(name, layers::NO_SUB_NORM));
        }
        self.norm(name, width).map(Some)
    }

    /// An embedding or a head.
    fn table(&mut self, name: &str) -> Result<Table> {
        let shape = [self.spec.vocab_size, self.spec.hidden_size];
        let kind = self.left.get(name).map(|tensor| tensor.kind);
        if kind.is_some_and(|kind| kind.is_grouped() || matches!(kind, TensorType::Tq1_0 | TensorType::Tq2_0))
        {
            return self.grouped(name, shape, None).map(Table::Grouped);
        }
        if kind.is_some_and(QuantizedTensor::is_kind) && !self.may_be_grouped(name)? {
            let (tensor, bytes) = self.take(name, &shape)?;
            return match QuantizedTensor::new(tensor.kind, shape, bytes)? {
                Ok(table) => Ok(Table::Quantized(table)),
                Err(row) => {
                    let message =
                        format!("row {row}: a value is infinite or not a number, expected finite numbers");
                    Err(self.error(name, message))
                }
            };
        }
        let dense = self.dense(name, &shape, None)?;
        Ok(self.grouped_floats(name, &dense)?.map_or(Table::Dense(dense), Table::Grouped))
    }

    /// Whether some rows of a quantised table are ternary or binary by group, in a family of which all may be.
    fn may_be_grouped(&self, name: &str) -> Result<bool> {
        let Some(tensor) = self.left.get(name).filter(|_| self.spec.family == Family::Qwen3) else {
            return Ok(false);
        };
        let (rows, cols) = (self.spec.vocab_size, self.spec.hidden_size);
        let Some(width) = tensor.kind.row_bytes(cols).filter(|width| (width * rows) as u64 == tensor.bytes)
        else {
            return Ok(false);
        };
        let (mut blocks, mut values) = (vec![0; width], vec![0.0; cols]);
        let mut bytes = Vec::new();
        for row in (0..rows).step_by(rows.div_ceil(LOOKED_AT)) {
            self.file.read(tensor, (row * width) as u64, &mut blocks)?;
            dense::decode(tensor.kind, &blocks, &mut values)?;
            bytes.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        }
        let shape = vec![bytes.len() / (4 * cols), cols];
        let sample = DenseTensor { dtype: DenseType::F32, shape, bytes: bytes.into() };
        // Almost ternary ones are looked at whole, too.
        Ok(!matches!(of_floats(&sample), Ok(None)))
    }

    /// A matrix with a scale for each group.
    pub(super) fn grouped(
        &mut self,
        name: &str,
        shape: [usize; 2],
        heads: Option<Heads>,
    ) -> Result<Arc<GroupedMatrix>> {
        let (tensor, bytes) = self.take(name, &shape)?;
        let kind = tensor.kind;
        self.own(name, bytes.len())?;
        let in_file = |row| heads.map_or(row, |heads| heads.in_file(row));
        let matrix = grouped::matrix(kind, &bytes, shape, in_file);
        let matrix =
            matrix.map_err(|Wrong(e)| e.with("tensor", name).with("file", self.file.path().display()))?;
        self.found.grouped.get_or_insert(kind);
        Ok(Arc::new(matrix))
    }

    /// The matrix that floats exactly are, in a family whose inputs are not rounded to int8.
    pub(super) fn grouped_floats(
        &mut self,
        name: &str,
        dense: &DenseTensor,
    ) -> Result<Option<Arc<GroupedMatrix>>> {
        if self.spec.family != Family::Qwen3 {
            return Ok(None);
        }
        let in_tensor = |Wrong(e): Wrong| e.with("tensor", name).with("file", self.file.path().display());
        let Some(matrix) = of_floats(dense).map_err(in_tensor)? else { return Ok(None) };
        self.own(name, matrix.bytes())?;
        self.notes.assume(format!(
            "weights stored as floats are exactly ternary or binary, with one scale for {} of a row; they are packed and \
             computed as such",
            matrix.group()
        ));
        Ok(Some(Arc::new(matrix)))
    }

    /// The head, unless it is a copy of the embedding.
    fn head(&mut self, embed: &Table) -> Result<Option<Table>> {
        if !self.left.contains_key(keys::HEAD) {
            return Ok(None);
        }
        let head = self.table(keys::HEAD)?;
        let copy = layers::same_table(&head, embed)?;
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
            q_norm: self.head_norm(&name("attn_q_norm"))?,
            k_norm: self.head_norm(&name("attn_k_norm"))?,
            attn_sub_norm: self.sub_norm(&name("attn_sub_norm"), q_width)?,
            o,
            post_attention_norm: self.norm(&name("ffn_norm"), hidden)?,
            gate,
            up,
            ffn_sub_norm: self.sub_norm(&name("ffn_sub_norm"), inner)?,
            down,
        };
        (self.progress)(self.done, self.total);
        Ok(tensors)
    }

    /// Ends the reading; an error where a tensor plays no part.
    fn finish(self) -> Result<Found> {
        let Some((name, _)) = self.left.first_key_value() else {
            if self.notes.options.i2s_layout.is_some() && self.found.ternary != Some(TensorType::I2S) {
                self.notes.warn("the option `i2s_layout` is set, but the file has no I2_S tensors");
            }
            (self.progress)(self.total, self.total);
            return Ok(self.found);
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
