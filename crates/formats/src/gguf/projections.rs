//! The projections of a GGUF file: ternary tensors in any of their types, and floats.

use rayon::prelude::*;
use ternion_core::{ErrorKind, Result};
use ternion_kernels::{MAX_COLS, TernaryLayout};

use super::open::Reader;
use super::rows::{Heads, pack_i2s, pack_quarters};
use super::ternary::{decode_i2s_as, decode_tq, shared_scale};
use super::{I2S_GROUP, TensorType, keys};
use crate::{DenseTensor, Family, I2sLayout, Linear, RmsNorm, SharedBytes, TernaryTensor, Weights, layers};

impl Reader<'_> {
    pub(super) fn linear(&mut self, part: &str, module: String, shape: [usize; 2]) -> Result<Linear> {
        let name = format!("{part}.weight");
        let input_norm = self.input_norm(part, shape[1])?;
        let rotated = part.ends_with(".attn_q") || part.ends_with(".attn_k");
        let heads = (self.spec.architecture == "llama" && rotated).then_some(Heads(self.spec.head_dim));
        let kind = self.left.get(name.as_str()).map(|tensor| tensor.kind);
        let is_ternary = kind.is_some_and(TensorType::is_ternary);
        let in_groups = kind.is_some_and(TensorType::is_grouped)
            || (is_ternary && kind != Some(TensorType::I2S) && self.takes_groups(&name, part)?);
        let weights = if in_groups {
            Weights::Grouped(self.grouped(&name, shape, heads)?)
        } else if is_ternary {
            Weights::Ternary(self.ternary(&name, part, shape, heads)?)
        } else {
            self.floats(&name, &module, shape, heads, input_norm.is_some())?
        };
        Ok(Linear { name: module, weights, input_norm })
    }

    /// A norm on a projection's own input, as BitNet-embedding has.
    fn input_norm(&mut self, part: &str, width: usize) -> Result<Option<RmsNorm>> {
        let name = format!("{part}{}.weight", keys::INPUT_NORM);
        self.left.contains_key(name.as_str()).then(|| self.norm(&name, width)).transpose()
    }

    /// A projection that is stored as floats. Of a BitNet, these are its quantised weights, 0 or of one absolute value, or
    /// the masters that they are made from; either way the projection is ternary and its input int8.
    fn floats(
        &mut self,
        name: &str,
        module: &str,
        shape: [usize; 2],
        heads: Option<Heads>,
        normed: bool,
    ) -> Result<Weights> {
        let kind = self.left.get(name).map(|tensor| tensor.kind);
        let dense = self.dense(name, &shape, heads)?;
        let [rows, cols] = shape;
        let is_bitnet =
            normed || self.spec.architecture.starts_with("bitnet") || self.spec.family.is_bitnet();
        let Some(kind) = kind.filter(|_| is_bitnet) else {
            if let Some(matrix) = self.grouped_floats(name, &dense)? {
                return Ok(Weights::Grouped(matrix));
            }
            self.found.keep_dense.push(module.to_owned());
            return Ok(Weights::Dense(dense));
        };
        self.check_ternary(name, shape)?;
        self.own(name, rows / 4 * cols)?;
        let loaded = DenseTensor { bytes: dense.bytes.loaded()?, ..dense.clone() };
        let failed = |e| self.error(name, format!("cannot be packed: {e}"));
        let packed = ternion_kernels::pack_quantized(loaded.view(), rows, cols).map_err(failed)?;
        let is_float = matches!(kind, TensorType::F32 | TensorType::F16 | TensorType::Bf16);
        let (codes, scale) = match packed {
            Some(packed) => {
                self.notes.assume(format!(
                    "projections are ternary and their inputs int8: they are stored as {kind} that is 0 or of one absolute \
                     value, which is taken as the scale"
                ));
                packed
            }
            None if is_float => {
                let made = ternion_kernels::quantize_master(loaded.view(), rows, cols).map_err(failed)?;
                self.notes.assume(format!(
                    "projections are ternary and their inputs int8: they are stored as {kind} of many values, which are taken \
                     as masters and quantised by their mean, as transformers does it"
                ));
                made
            }
            None => {
                self.notes.warn(format!(
                    "projections of {kind} that do not hold three values stay dense and their inputs floats, as in \
                     llama.cpp; BitNet's arithmetic needs I2_S, TQ1_0, TQ2_0 or a float type"
                ));
                self.found.keep_dense.push(module.to_owned());
                return Ok(Weights::Dense(dense));
            }
        };
        self.found.floats.get_or_insert(kind);
        Ok(Weights::Ternary(TernaryTensor {
            codes: codes.into(),
            layout: TernaryLayout::Quarters,
            rows,
            cols,
            scale: self.scale(name, name.strip_suffix(".weight").unwrap_or(name), scale)?,
        }))
    }

    /// Whether a TQ1_0 or TQ2_0 tensor is one with a scale for each group: of a family whose inputs are not rounded to int8, or
    /// with several scales.
    /// One with a scale beside it is as Ternion writes those that have one scale.
    fn takes_groups(&self, name: &str, part: &str) -> Result<bool> {
        if self.left.contains_key(format!("{part}.scale").as_str()) {
            return Ok(false);
        }
        let normed = self.file.tensor(&format!("{part}{}.weight", keys::INPUT_NORM)).is_some();
        if self.spec.family == Family::Qwen3 && !normed {
            return Ok(true);
        }
        let Some(tensor) = self.left.get(name) else { return Ok(false) };
        let bytes = self.file.data(tensor).loaded()?;
        Ok(shared_scale(tensor.kind, &bytes).is_err_and(|e| e.kind() == ErrorKind::Unsupported))
    }

    fn check_ternary(&self, name: &str, [rows, cols]: [usize; 2]) -> Result<()> {
        let message = if cols > MAX_COLS {
            format!("the projection has {cols} columns, expected at most {MAX_COLS}")
        } else if !rows.is_multiple_of(4) {
            format!("the projection has {rows} rows, expected a multiple of 4")
        } else {
            return Ok(());
        };
        Err(self.error(name, message))
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
        self.check_ternary(name, shape)?;
        let (codes, layout, stored) = if kind == TensorType::I2S {
            self.i2s(name, &bytes, shape, heads)?
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
                let row = heads.map_or(row, |heads| heads.in_file(row));
                if decode_tq(kind, &bytes[row * width..(row + 1) * width], codes) {
                    broken.store(true, std::sync::atomic::Ordering::Relaxed);
                }
            });
            if broken.into_inner() {
                let message = "a weight has the code 3; expected the codes 0, 1 and 2";
                return Err(self.error(name, message));
            }
            (codes.into(), TernaryLayout::I2s, stored)
        };
        let scale = self.scale(name, part, stored)?;
        self.found.ternary.get_or_insert(kind);
        Ok(TernaryTensor { codes, layout, rows, cols, scale })
    }

    /// Codes, their layout and the scale of an I2_S tensor.
    fn i2s(
        &mut self,
        name: &str,
        bytes: &SharedBytes,
        [rows, cols]: [usize; 2],
        heads: Option<Heads>,
    ) -> Result<(SharedBytes, TernaryLayout, f32)> {
        let end = rows * cols / 4;
        let codes = bytes.slice(0..end).ok_or_else(|| self.error(name, "the codes are incomplete"))?;
        if let Some((at, found)) = layers::invalid_code(&codes)? {
            let message =
                format!("byte {at} is {found:#04x}, which holds the code 3; expected the codes 0, 1 and 2");
            return Err(self.error(name, message));
        }
        let mut scale = [0; 4];
        bytes
            .read_at(end, &mut scale)
            .map_err(|e| self.error(name, "the scale after the codes is missing").with_source(e))?;
        let scale = f32::from_le_bytes(scale);
        let layout = if let Some(layout) = self.notes.options.i2s_layout {
            layout
        } else {
            self.notes.assume(
                    "I2_S holds 128 weights of a row in 32 bytes, as bitnet.cpp writes it on x86; files that it wrote on ARM \
                     need the option `i2s_layout` = `arm`, which no file states",
                );
            I2sLayout::X86
        };
        let whole_groups = cols.is_multiple_of(I2S_GROUP);
        if layout != I2sLayout::X86 {
            self.own(name, end)?;
            let codes = codes.loaded()?;
            let decode = |row: usize, out: &mut [u8]| {
                let row = heads.map_or(row, |heads| heads.in_file(row));
                decode_i2s_as(layout, &codes, row, out);
            };
            return Ok(if whole_groups {
                (pack_i2s(rows, cols, decode).into(), TernaryLayout::I2s, scale)
            } else {
                (pack_quarters(rows, cols, decode).into(), TernaryLayout::Quarters, scale)
            });
        }
        if !whole_groups {
            return Err(self.error(
                name,
                format!(
                    "a row has {cols} elements, expected a multiple of {I2S_GROUP} for I2_S as written on x86; for a file \
                     written on ARM set the option `i2s_layout` to `arm`"
                ),
            ));
        }
        let Some(heads) = heads else { return Ok((codes, TernaryLayout::I2s, scale)) };
        if codes.is_mapped() {
            self.own(name, codes.len())?;
        }
        Ok((ordered(&codes.loaded()?, cols / 4, heads), TernaryLayout::I2s, scale))
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
}

/// Rows of `width` bytes in the model's order.
pub(super) fn ordered(bytes: &SharedBytes, width: usize, heads: Heads) -> SharedBytes {
    let mut out = vec![0; bytes.len()];
    out.par_chunks_exact_mut(width).enumerate().for_each(|(row, out)| {
        let at = heads.in_file(row) * width;
        out.copy_from_slice(&bytes[at..at + width]);
    });
    out.into()
}
