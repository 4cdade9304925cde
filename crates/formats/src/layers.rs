//! From named tensors to layers: which tensor plays which part, and whether it is what the specification says.
//!
//! Every tensor is taken once by the part that it plays; what is left over at the end was not understood, and a model
//! that is only half understood is refused rather than run.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use ::safetensors::Dtype;
use ternion_core::{Error, Result};
use ternion_kernels::{GroupedKind, GroupedMatrix, MAX_COLS, TernaryLayout};

use crate::checkpoint::{Means, Progress};
use crate::config::MlxQuantization;
use crate::grouped::{self, Mlx, Wrong};
use crate::notes::Notes;
use crate::safetensors::RawTensor;
use crate::{
    DenseTensor, DenseType, Family, LayerTensors, Linear, ModelSpec, RmsNorm, ScaleUse, SharedBytes, Table,
    TernaryTensor, Weights, config,
};

const FINAL_NORM: &str = "model.norm.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// The two sub-norms' names: transformers', then 1bitLLM's.
const ATTN_SUB_NORM: [&str; 2] = ["attn_sub_norm", "inner_attn_ln"];
const FFN_SUB_NORM: [&str; 2] = ["ffn_sub_norm", "ffn_layernorm"];

/// Whether `name` is a sub-norm's weight.
pub(crate) fn is_sub_norm(name: &str) -> bool {
    ATTN_SUB_NORM.iter().chain(&FFN_SUB_NORM).any(|norm| {
        name.strip_suffix(".weight")
            .and_then(|name| name.strip_suffix(norm))
            .is_some_and(|s| s.ends_with('.'))
    })
}

/// What an error says beside a sub-norm that is missing.
pub(crate) const NO_SUB_NORM: &str =
    "the sub-norm is missing; for a model that has none set the option `sub_norms` to false";

/// The tensors of a checkpoint.
pub(crate) struct Parts {
    pub(crate) embed: Table,
    pub(crate) layers: Vec<LayerTensors>,
    pub(crate) final_norm: RmsNorm,
    pub(crate) head: Option<Table>,
    /// A packed ternary tensor is among them.
    pub(crate) packed: bool,
    /// Matrices of MLX are, and floats that turned out to be grouped.
    pub(crate) grouped: [bool; 2],
}

/// Takes the tensors of a checkpoint one after the other.
pub(crate) struct Reader<'a> {
    spec: &'a ModelSpec,
    tensors: BTreeMap<String, RawTensor>,
    /// What errors about missing tensors name: the file or the index.
    source: &'a Path,
    /// Floats that are quantised already keep their scale.
    keep_scale: bool,
    /// The model may lack a head.
    headless: bool,
    notes: &'a mut Notes,
    means: Means,
    progress: &'a mut Progress<'a>,
    done: u64,
    total: u64,
    packed: bool,
    mlx: Option<MlxQuantization>,
    /// Matrices that have been packed already, by their modules.
    matrices: BTreeMap<String, Arc<GroupedMatrix>>,
    /// Matrices of MLX, and floats that turned out to be grouped.
    grouped: [bool; 2],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(
        spec: &'a ModelSpec,
        tensors: BTreeMap<String, RawTensor>,
        source: &'a Path,
        notes: &'a mut Notes,
        means: Means,
        progress: &'a mut Progress<'a>,
    ) -> Self {
        let total = tensors.values().map(|t| t.bytes.len() as u64).sum();
        Self {
            spec,
            tensors,
            source,
            keep_scale: false,
            headless: false,
            notes,
            means,
            progress,
            done: 0,
            total,
            packed: false,
            mlx: None,
            matrices: BTreeMap::new(),
            grouped: [false; 2],
        }
    }

    /// Gives it matrices that have been packed already, by their modules.
    pub(crate) fn matrices(mut self, matrices: BTreeMap<String, Arc<GroupedMatrix>>) -> Self {
        self.matrices = matrices;
        self
    }

    /// How MLX has quantised matrices that have scales and biases beside them.
    pub(crate) fn mlx(mut self, mlx: Option<MlxQuantization>) -> Self {
        self.mlx = mlx;
        self
    }

    /// Lets float weights that are quantised already keep their scale.
    pub(crate) fn keep_scale(mut self, keep: bool) -> Self {
        self.keep_scale = keep;
        self
    }

    /// Lets the model lack a head.
    pub(crate) fn headless(mut self, headless: bool) -> Self {
        self.headless = headless;
        self
    }

    /// All tensors of the model.
    ///
    /// # Errors
    /// Where one is missing, is not what the specification says, or plays no part.
    pub(crate) fn read_all(mut self) -> Result<Parts> {
        let embed = self.table("model.embed_tokens")?;
        let layers = (0..self.spec.layers).map(|i| self.layer(i)).collect::<Result<Vec<_>>>()?;
        let final_norm = self.norm(FINAL_NORM, self.spec.hidden_size, self.spec.rms_eps)?;
        let head = self.head(&embed)?;
        let (packed, grouped) = (self.packed, self.grouped);
        self.finish()?;
        Ok(Parts { embed, layers, final_norm, head, packed, grouped })
    }

    /// An embedding or a head.
    fn table(&mut self, module: &str) -> Result<Table> {
        let (rows, cols) = (self.spec.vocab_size, self.spec.hidden_size);
        if let Some(matrix) = self.matrix(module, rows, cols)? {
            return Ok(Table::Grouped(matrix));
        }
        let name = format!("{module}.weight");
        let tensor = self.take(&name)?;
        let dense = self.finite(&tensor, &name, &[rows, cols])?;
        Ok(self.grouped_floats(&tensor, &name, &dense)?.map_or(Table::Dense(dense), Table::Grouped))
    }

    /// The head. Where the configuration ties it to the embedding and the file holds one all the same, a head of its
    /// own is used, as transformers does since version 5, unless it is a copy.
    fn head(&mut self, embed: &Table) -> Result<Option<Table>> {
        // A model for embeddings has no head, whatever its configuration says.
        let lacks = ![HEAD, "lm_head.scales"].iter().any(|name| self.tensors.contains_key(*name))
            && !self.matrices.contains_key("lm_head");
        if lacks && (self.spec.tied || self.headless) {
            return Ok(None);
        }
        let head = self.table("lm_head")?;
        let copy = self.spec.tied && same_table(&head, embed)?;
        if self.spec.tied && !copy {
            self.notes.warn(
                "`tie_word_embeddings` in config.json says that the head is the embedding, but the file holds another head; \
                 it is used, as by transformers 5",
            );
        }
        Ok((!copy).then_some(head))
    }

    fn layer(&mut self, index: usize) -> Result<LayerTensors> {
        let s = self.spec;
        let (hidden, inner) = (s.hidden_size, s.intermediate_size);
        let (q_width, kv_width) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let layer = format!("model.layers.{index}");
        let (attn, mlp) = (format!("{layer}.self_attn"), format!("{layer}.mlp"));
        let tensors = LayerTensors {
            input_norm: self.norm(&format!("{layer}.input_layernorm.weight"), hidden, s.rms_eps)?,
            q: self.linear(format!("{attn}.q_proj"), q_width, hidden)?,
            k: self.linear(format!("{attn}.k_proj"), kv_width, hidden)?,
            v: self.linear(format!("{attn}.v_proj"), kv_width, hidden)?,
            q_norm: self.head_norm(&format!("{attn}.q_norm.weight"))?,
            k_norm: self.head_norm(&format!("{attn}.k_norm.weight"))?,
            attn_sub_norm: self.sub_norm(&attn, ATTN_SUB_NORM, q_width)?,
            o: self.linear(format!("{attn}.o_proj"), hidden, q_width)?,
            post_attention_norm: self.norm(
                &format!("{layer}.post_attention_layernorm.weight"),
                hidden,
                s.rms_eps,
            )?,
            gate: self.linear(format!("{mlp}.gate_proj"), inner, hidden)?,
            up: self.linear(format!("{mlp}.up_proj"), inner, hidden)?,
            ffn_sub_norm: self.sub_norm(&mlp, FFN_SUB_NORM, inner)?,
            down: self.linear(format!("{mlp}.down_proj"), hidden, inner)?,
        };
        (self.progress)(self.done, self.total);
        Ok(tensors)
    }

    /// Ends the reading; an error where a tensor plays no part.
    fn finish(self) -> Result<()> {
        // Old checkpoints carry the rotary frequencies, which follow from the configuration.
        let unknown = self.tensors.iter().find(|(name, _)| !name.ends_with("rotary_emb.inv_freq"));
        if let Some(module) = self.matrices.keys().next() {
            let message = format!("the matrix has no place in a {} model", self.spec.family);
            return Err(Error::invalid_model(message)
                .with("tensor", module)
                .with("file", self.source.display()));
        }
        let Some((name, tensor)) = unknown else {
            (self.progress)(self.total, self.total);
            return Ok(());
        };
        if name.strip_suffix(".bias").is_some() {
            return Err(Error::unsupported("a bias is not supported, expected projections without")
                .with("tensor", name)
                .with("file", tensor.file.display()));
        }
        let spec = self.spec;
        let message = format!(
            "the tensor has no place in a {} model of {} layers{}",
            spec.family,
            spec.layers,
            if spec.sub_norms { "" } else { " without sub-norms" }
        );
        Err(tensor.invalid(name, message))
    }

    fn take(&mut self, name: &str) -> Result<RawTensor> {
        let tensor = self.tensors.remove(name).ok_or_else(|| {
            Error::invalid_model("the tensor is missing")
                .with("tensor", name)
                .with("file", self.source.display())
        })?;
        self.done += tensor.bytes.len() as u64;
        Ok(tensor)
    }

    /// The norm of each head of queries or keys.
    fn head_norm(&mut self, name: &str) -> Result<Option<RmsNorm>> {
        let (is_there, width, eps) = (self.spec.qk_norm, self.spec.head_dim, self.spec.rms_eps);
        is_there.then(|| self.norm(name, width, eps)).transpose()
    }

    /// The matrix of a module that is in groups; `None` where it has other weights.
    fn matrix(&mut self, module: &str, rows: usize, cols: usize) -> Result<Option<Arc<GroupedMatrix>>> {
        let Some(matrix) = self.matrices.remove(module) else { return self.mlx_matrix(module, rows, cols) };
        if [matrix.rows(), matrix.cols()] == [rows, cols] {
            return Ok(Some(matrix));
        }
        let message =
            format!("the shape is {:?}, expected {:?}", [matrix.rows(), matrix.cols()], [rows, cols]);
        Err(Error::invalid_model(message).with("tensor", module).with("file", self.source.display()))
    }

    /// The matrix of a module that MLX has quantised; `None` where it has no scales.
    fn mlx_matrix(&mut self, module: &str, rows: usize, cols: usize) -> Result<Option<Arc<GroupedMatrix>>> {
        let Some(MlxQuantization { bits, group }) = self.mlx else { return Ok(None) };
        let scales_name = format!("{module}.scales");
        if !self.tensors.contains_key(&scales_name) {
            return Ok(None);
        }
        let name = format!("{module}.weight");
        let (weight, scales) = (self.take(&name)?, self.take(&scales_name)?);
        let biases_name = format!("{module}.biases");
        let biases = self.take(&biases_name)?;
        if !cols.is_multiple_of(group) {
            let message = format!("a row has {cols} columns, expected a multiple of the group ({group})");
            return Err(weight.invalid(&name, message));
        }
        if weight.dtype != Dtype::U32 {
            let message = format!("the element type is {:?}, expected U32, words of codes", weight.dtype);
            return Err(weight.invalid(&name, message));
        }
        check_shape(&weight, &name, &[rows, cols * bits / 32])?;
        check_shape(&scales, &scales_name, &[rows, cols / group])?;
        check_shape(&biases, &biases_name, &[rows, cols / group])?;
        let (scales, biases) = (scales.loaded()?.dense(&scales_name)?, biases.loaded()?.dense(&biases_name)?);
        self.means.take(weight.bytes.len() as u64).map_err(|e| e.with("tensor", &name))?;
        let mlx = Mlx { words: &weight.bytes.untouched(), scales: &scales, biases: &biases, bits, group };
        let matrix = mlx.matrix(rows, cols).map_err(|Wrong(e)| in_tensor(e, &weight, &name))?;
        self.grouped[0] = true;
        Ok(Some(Arc::new(matrix)))
    }

    /// Whether floats may turn out to be in groups: where the family is not ternary by definition.
    fn may_be_grouped(&self) -> bool {
        matches!(self.spec.family, Family::Llama | Family::Qwen3) && self.spec.quantization.is_none()
    }

    /// A matrix of finite floats. One that may be packed is read to be looked at, so that its pages do not stay.
    fn finite(&self, tensor: &RawTensor, name: &str, shape: &[usize]) -> Result<DenseTensor> {
        if !self.may_be_grouped() {
            return finite_dense(tensor, name, shape);
        }
        let looked_at = RawTensor { bytes: tensor.bytes.untouched(), ..tensor.clone() };
        finite_dense(&looked_at, name, shape)?;
        tensor.dense(name)
    }

    /// The matrix that floats exactly are, where a family is not ternary by definition.
    fn grouped_floats(
        &mut self,
        tensor: &RawTensor,
        name: &str,
        dense: &DenseTensor,
    ) -> Result<Option<Arc<GroupedMatrix>>> {
        if !self.may_be_grouped() {
            return Ok(None);
        }
        let looked_at = DenseTensor { bytes: dense.bytes.untouched(), ..dense.clone() };
        let Some(matrix) = grouped::of_floats(&looked_at).map_err(|Wrong(e)| in_tensor(e, tensor, name))?
        else {
            return Ok(None);
        };
        self.means.take(matrix.bytes() as u64).map_err(|e| e.with("tensor", name))?;
        self.grouped[1] = true;
        self.notes.assume(format!(
            "{} weights stored as {} are exactly {}, with one scale for {} of a row; they are packed and computed as such",
            if name.contains("layers.") { "projections'" } else { "the embedding's or head's" },
            dense.dtype.name(),
            if matrix.kind() == GroupedKind::Binary { "binary" } else { "ternary" },
            matrix.group()
        ));
        Ok(Some(Arc::new(matrix)))
    }

    fn norm(&mut self, name: &str, width: usize, eps: f32) -> Result<RmsNorm> {
        let tensor = self.take(name)?.loaded()?;
        Ok(RmsNorm { weight: finite_dense(&tensor, name, &[width])?.to_f32(), eps })
    }

    fn sub_norm(&mut self, module: &str, names: [&str; 2], width: usize) -> Result<Option<RmsNorm>> {
        if !self.spec.sub_norms {
            return Ok(None);
        }
        let names = names.map(|name| format!("{module}.{name}.weight"));
        let present = names.iter().find(|name| self.tensors.contains_key(*name)).ok_or_else(|| {
            Error::invalid_model(NO_SUB_NORM).with("tensor", &names[0]).with("file", self.source.display())
        })?;
        self.norm(present, width, self.spec.rms_eps).map(Some)
    }

    fn linear(&mut self, name: String, rows: usize, cols: usize) -> Result<Linear> {
        let spec = self.spec;
        if let Some(matrix) = self.matrix(&name, rows, cols)? {
            return Ok(Linear { name, weights: Weights::Grouped(matrix), input_norm: None });
        }
        let weight_name = format!("{name}.weight");
        let weight = self.take(&weight_name)?;
        let quantization = spec.quantization.as_ref().filter(|q| !config::stays_dense(q, &name));
        let weights = match (weight.dtype, quantization) {
            (Dtype::U8, None) => {
                let message = "the element type is U8 (packed), expected floats: the configuration has no \
                               `quantization_config`, or one that keeps this module dense";
                return Err(weight.invalid(&weight_name, message));
            }
            (_, None) => {
                let dense = self.finite(&weight, &weight_name, &[rows, cols])?;
                let grouped = self.grouped_floats(&weight, &weight_name, &dense)?;
                grouped.map_or(Weights::Dense(dense), Weights::Grouped)
            }
            (dtype, Some(quantization)) => {
                check_ternary_shape(&weight, &weight_name, rows, cols)?;
                let packed = dtype == Dtype::U8;
                if !packed {
                    let codes = (rows / 4 * cols) as u64;
                    self.means.take(codes).map_err(|e| e.with("tensor", &weight_name))?;
                }
                let (codes, scale) = if !packed && quantization.online {
                    self.master(&weight.loaded()?, &weight_name, rows, cols)?
                } else {
                    self.packed |= packed;
                    let codes = if packed {
                        packed_codes(&weight, &weight_name, rows, cols)?
                    } else {
                        float_codes(&weight.loaded()?, &weight_name, rows, cols)?
                    };
                    (codes, self.scale(&format!("{name}.weight_scale"), quantization.scale_use)?)
                };
                Weights::Ternary(TernaryTensor { codes, layout: TernaryLayout::Quarters, rows, cols, scale })
            }
        };
        let input_norm = match quantization.and_then(|q| q.input_norm_eps) {
            Some(eps) => {
                let own = format!("{name}.norm.weight");
                let is_own = self.tensors.contains_key(&own);
                Some(self.norm(&if is_own { own } else { format!("{name}.rms_norm.weight") }, cols, eps)?)
            }
            None => None,
        };
        Ok(Linear { name, weights, input_norm })
    }

    /// Codes and scale of a float master, by the mean of its absolute values. Weights of a model whose configuration does
    /// not say that they are masters may be quantised already; they keep their scale.
    fn master(
        &mut self,
        tensor: &RawTensor,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<(SharedBytes, f32)> {
        check_shape(tensor, name, &[rows, cols])?;
        let dense = tensor.dense(name)?;
        let (codes, scale) = match quantized(&dense, self.keep_scale) {
            Some(packed) => {
                self.notes.assume(
                    "float weights that are 0 or of one absolute value are taken as quantised, with that value as their \
                     scale: config.json has no `quantization_config`",
                );
                packed
            }
            None => ternion_kernels::quantize_master(dense.view(), rows, cols)
                .map_err(|e| tensor.invalid(name, format!("cannot be quantised: {e}")))?,
        };
        Ok((codes.into(), scale))
    }

    /// The factor of the integer product that a `weight_scale` stands for.
    fn scale(&mut self, name: &str, scale_use: ScaleUse) -> Result<f32> {
        let tensor = self.take(name)?.loaded()?;
        let dense = tensor.dense(name)?;
        if dense.elements() != 1 {
            let message = format!("the shape is {:?}, expected one value: [1] or []", tensor.shape);
            return Err(tensor.invalid(name, message));
        }
        let stored = dense.to_f32()[0];
        let scale = match scale_use {
            ScaleUse::Multiplies => stored,
            ScaleUse::Divides => 1.0 / stored,
        };
        if stored == 0.0 || !stored.is_finite() || !scale.is_finite() {
            let message = format!("the scale is {stored:?}, expected a finite number other than 0");
            return Err(tensor.invalid(name, message));
        }
        Ok(scale)
    }
}

/// An error about a part of a tensor, with the tensor's name.
fn in_tensor(error: Error, tensor: &RawTensor, name: &str) -> Error {
    error.with("tensor", name).with("file", tensor.file.display())
}

/// Whether both tables are the same.
pub(crate) fn same_table(a: &Table, b: &Table) -> Result<bool> {
    match (a, b) {
        (Table::Dense(a), Table::Dense(b)) => Ok(a.dtype == b.dtype && a.bytes.same_as(&b.bytes)?),
        (Table::Quantized(a), Table::Quantized(b)) => Ok(a.kind() == b.kind() && a.bytes.same_as(&b.bytes)?),
        (Table::Grouped(a), Table::Grouped(b)) => Ok(**a == **b),
        _ => Ok(false),
    }
}

/// Codes and scale of weights that are quantised already.
fn quantized(dense: &DenseTensor, wanted: bool) -> Option<(Vec<u8>, f32)> {
    let [rows, cols] = dense.shape[..] else { return None };
    // What has a shape that cannot be packed is refused where it is packed.
    wanted.then(|| ternion_kernels::pack_quantized(dense.view(), rows, cols).ok().flatten()).flatten()
}

fn check_shape(tensor: &RawTensor, name: &str, expected: &[usize]) -> Result<()> {
    if tensor.shape == expected {
        return Ok(());
    }
    let found = &tensor.shape[..tensor.shape.len().min(8)];
    Err(tensor.invalid(name, format!("the shape is {found:?}, expected {expected:?}")))
}

fn finite_dense(tensor: &RawTensor, name: &str, shape: &[usize]) -> Result<DenseTensor> {
    check_shape(tensor, name, shape)?;
    let dense = tensor.dense(name)?;
    if all_finite(dense.dtype, &dense.bytes)? {
        return Ok(dense);
    }
    Err(tensor.invalid(name, "a value is infinite or not a number, expected finite numbers"))
}

/// Whether no element is infinite or not a number.
pub(crate) fn all_finite(dtype: DenseType, bytes: &SharedBytes) -> Result<bool> {
    Ok(bytes.find(|_, part| (!dtype.is_finite(part)).then_some(()))?.is_none())
}

/// The first byte of packed codes in which a code is 3, and where it is.
pub(crate) fn invalid_code(codes: &SharedBytes) -> Result<Option<(usize, u8)>> {
    codes.find(|from, part| ternion_kernels::find_invalid_code(part).map(|at| (from + at, part[at])))
}

fn check_ternary_shape(tensor: &RawTensor, name: &str, rows: usize, cols: usize) -> Result<()> {
    if !rows.is_multiple_of(4) {
        let message =
            format!("the projection has {rows} rows, expected a multiple of 4 for the packed layout");
        return Err(tensor.invalid(name, message));
    }
    if cols > MAX_COLS {
        let message = format!("the projection has {cols} columns, expected at most {MAX_COLS}");
        return Err(tensor.invalid(name, message));
    }
    Ok(())
}

/// Codes as they lie in the file.
fn packed_codes(tensor: &RawTensor, name: &str, rows: usize, cols: usize) -> Result<SharedBytes> {
    check_shape(tensor, name, &[rows / 4, cols])?;
    if let Some((at, found)) = invalid_code(&tensor.bytes)? {
        let message =
            format!("byte {at} is {found:#04x}, which holds the code 3; expected the codes 0, 1 and 2");
        return Err(tensor.invalid(name, message));
    }
    Ok(tensor.bytes.clone())
}

/// Codes of trits that are stored as floats: what transformers writes when it saves a model that it has loaded from codes.
fn float_codes(tensor: &RawTensor, name: &str, rows: usize, cols: usize) -> Result<SharedBytes> {
    check_shape(tensor, name, &[rows, cols])?;
    let values = tensor.dense(name)?.to_f32();
    if let Some(value) = values.iter().find(|x| !matches!(**x, -1.0 | 0.0 | 1.0)) {
        let message = format!(
            "the element type is {:?} and a value is {value}, expected -1, 0 or 1 where `quantization_mode` is not `online`",
            tensor.dtype
        );
        return Err(tensor.invalid(name, message));
    }
    let trits: Vec<i8> = values.iter().map(|&x| x as i8).collect();
    let codes = ternion_kernels::pack(TernaryLayout::Quarters, &trits, rows, cols)
        .map_err(|e| tensor.invalid(name, format!("cannot be packed: {e}")))?;
    Ok(codes.into())
}
