//! Writing GGUF: which tensors, in which types and order, and their data piece by piece.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use half::f16;
use rayon::prelude::*;
use ternion_core::{Error, Result};
use ternion_kernels::{GroupedKind, GroupedMatrix};

use super::grouped::{Form, Lost, Rewrite};
use super::{Options, PIECE, metadata, not_written};
use crate::checkpoint::Progress;
use crate::gguf::grouped::encode as encode_groups;
use crate::gguf::rows::{Heads, codes_of};
use crate::gguf::ternary::{encode_i2s, encode_tq};
use crate::gguf::{self, I2S_TRAILER, TensorType, Writer, keys};
use crate::{
    Checkpoint, DenseTensor, DenseType, Family, LayerTensors, Linear, RopeScaling, Table, TernaryTensor,
    Weights,
};

/// A tensor and where its data comes from.
struct Planned<'a> {
    name: String,
    kind: TensorType,
    content: Content<'a>,
}

enum Content<'a> {
    /// Bytes as the source has them.
    Raw(crate::SharedBytes),
    Dense(&'a DenseTensor, Option<Heads>),
    Ternary(&'a TernaryTensor, Option<Heads>),
    /// Rewritten for the type.
    Grouped(&'a GroupedMatrix, Option<Heads>, Form),
    /// Widened to floats, of which the type is one.
    Widened(&'a GroupedMatrix),
    Floats(Vec<f32>),
}

/// All that will be written, checked before the first byte is.
pub(super) struct Plan<'a> {
    writer: Writer,
    tensors: Vec<Planned<'a>>,
    rewrite: Rewrite,
}

/// How a type holds matrices with scales of groups.
fn form(kind: TensorType) -> Result<Form> {
    let weights = match kind {
        TensorType::I2S => return Err(crate::tensors::not_written()),
        TensorType::Q1_0 => GroupedKind::Binary,
        _ => GroupedKind::Ternary,
    };
    Ok(Form { name: kind.name(), kind: weights, group: kind.block_len(), halves: true })
}

impl<'a> Plan<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, ternary: TensorType, options: &Options) -> Result<Self> {
        let writer = metadata::metadata(checkpoint, ternary)?;
        let mut plan = Self { writer, tensors: Vec::new(), rewrite: Rewrite::new(options.lossy) };
        let embedding = options.embedding.map(super::Embedding::kind);
        plan.table(keys::EMBED, &checkpoint.embed, embedding, checkpoint, ternary)?;
        if let RopeScaling::Factors(_) | RopeScaling::Llama3 { .. } = checkpoint.spec.rope.scaling {
            plan.floats(keys::ROPE_FACTORS.to_owned(), rope_factors(checkpoint))?;
        }
        for (index, layer) in checkpoint.layers.iter().enumerate() {
            plan.layer(index, layer, checkpoint, ternary)?;
        }
        plan.floats(keys::FINAL_NORM.to_owned(), checkpoint.final_norm.weight.clone())?;
        if let Some(head) = &checkpoint.head {
            plan.table(keys::HEAD, head, embedding, checkpoint, ternary)?;
        }
        Ok(plan)
    }

    fn add(&mut self, name: String, kind: TensorType, dims: &[usize], content: Content<'a>) -> Result<()> {
        let dims: Vec<u64> = dims.iter().map(|&n| n as u64).collect();
        self.writer.tensor(&name, kind, &dims)?;
        self.tensors.push(Planned { name, kind, content });
        Ok(())
    }

    fn floats(&mut self, name: String, values: Vec<f32>) -> Result<()> {
        self.add(name, TensorType::F32, &[values.len()], Content::Floats(values))
    }

    /// The embedding or the head.
    fn table(
        &mut self,
        name: &str,
        table: &'a Table,
        wanted: Option<TensorType>,
        checkpoint: &Checkpoint,
        ternary: TensorType,
    ) -> Result<()> {
        let matrix = match table {
            Table::Dense(tensor) => return self.matrix(name, tensor, wanted, checkpoint),
            Table::Quantized(_) => unreachable!("invariant: writers are given plain tables"),
            Table::Grouped(matrix) => matrix,
        };
        let dims = [matrix.cols(), matrix.rows()];
        if let Some(kind) = wanted {
            self.add(name.to_owned(), kind, &dims, Content::Widened(matrix))
        } else {
            let form = form(ternary).map_err(|e| e.with("tensor", name))?;
            self.add(name.to_owned(), ternary, &dims, Content::Grouped(matrix, None, form))
        }
    }

    /// Plain weights of the embedding or the head. What is quantised already and is to stay so is copied.
    fn matrix(
        &mut self,
        name: &str,
        tensor: &'a DenseTensor,
        wanted: Option<TensorType>,
        checkpoint: &Checkpoint,
    ) -> Result<()> {
        let dims = [tensor.shape[1], tensor.shape[0]];
        let source = checkpoint.gguf.as_ref().and_then(|file| Some((file, file.tensor(name)?)));
        match source {
            Some((file, info)) if wanted.is_none_or(|kind| kind == info.kind) => {
                self.add(name.to_owned(), info.kind, &dims, Content::Raw(file.data(info)))
            }
            _ => {
                let kind = wanted.unwrap_or(type_of(tensor.dtype));
                self.add(name.to_owned(), kind, &dims, Content::Dense(tensor, None))
            }
        }
    }

    fn layer(
        &mut self,
        index: usize,
        layer: &'a LayerTensors,
        checkpoint: &Checkpoint,
        ternary: TensorType,
    ) -> Result<()> {
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        self.floats(name("attn_norm"), layer.input_norm.weight.clone())?;
        self.floats(name("ffn_norm"), layer.post_attention_norm.weight.clone())?;
        if let (Some(q), Some(k)) = (&layer.q_norm, &layer.k_norm) {
            self.floats(name("attn_q_norm"), q.weight.clone())?;
            self.floats(name("attn_k_norm"), k.weight.clone())?;
        }
        if let Some(norm) = &layer.attn_sub_norm {
            self.floats(name("attn_sub_norm"), norm.weight.clone())?;
        }
        if let Some(norm) = &layer.ffn_sub_norm {
            self.floats(name("ffn_sub_norm"), norm.weight.clone())?;
        }
        for ((part, _), linear) in keys::PROJECTIONS.into_iter().zip(layer.linears()) {
            // Only the Llama architecture has its rows in another order.
            let is_llama = layer.attn_sub_norm.is_none() && layer.q_norm.is_none();
            let rotated = matches!(part, "attn_q" | "attn_k") && is_llama;
            let heads = rotated.then_some(Heads(checkpoint.spec.head_dim));
            self.linear(&format!("blk.{index}.{part}"), linear, heads, ternary, checkpoint)?;
        }
        Ok(())
    }

    fn linear(
        &mut self,
        part: &str,
        linear: &'a Linear,
        heads: Option<Heads>,
        ternary: TensorType,
        checkpoint: &Checkpoint,
    ) -> Result<()> {
        if let Some(norm) = &linear.input_norm {
            if checkpoint.spec.family != Family::Qwen3 {
                return Err(Error::unsupported(
                    "GGUF has no place for a norm on a projection's input but in BitNet-embedding",
                )
                .with("tensor", &linear.name));
            }
            self.floats(format!("{part}{}.weight", keys::INPUT_NORM), norm.weight.clone())?;
        }
        let (name, dims) = (format!("{part}.weight"), [linear.cols(), linear.rows()]);
        match &linear.weights {
            Weights::Dense(tensor) => {
                self.add(name, type_of(tensor.dtype), &dims, Content::Dense(tensor, heads))
            }
            Weights::Grouped(matrix) => {
                let form = form(ternary).map_err(|e| e.with("tensor", &linear.name))?;
                self.add(name, ternary, &dims, Content::Grouped(matrix, heads, form))
            }
            Weights::Ternary(_) if ternary.is_grouped() => Err(Error::unsupported(format!(
                "the projection has one scale and rounds its input to int8, which {ternary} does not stand for; supported: \
                 gguf-i2s, gguf-tq1, gguf-tq2, safetensors"
            ))
            .with("tensor", &linear.name)),
            Weights::Ternary(tensor) => {
                self.add(name, ternary, &dims, Content::Ternary(tensor, heads))?;
                if ternary == TensorType::I2S {
                    return Ok(());
                }
                // A block's scale has 11 bits. It is 1, and the whole scale stands beside the tensor.
                self.floats(format!("{part}.scale"), vec![tensor.scale])
            }
        }
    }

    /// Writes the file; returns what was lost.
    pub(super) fn write(self, path: &Path, progress: &mut Progress<'_>) -> Result<Option<Lost>> {
        let total = self.writer.data_bytes();
        let file = File::create(path).map_err(|e| not_written(path, e))?;
        let mut out = self.writer.begin(BufWriter::new(file)).map_err(|e| not_written(path, e))?;
        let mut done = 0;
        for tensor in &self.tensors {
            // What is wrong with a tensor's values, kept beside the error of writing.
            let mut wrong = None;
            let result = out.tensor(&tensor.name, |out| {
                let mut out = Progressing { out, done: &mut done, total, progress };
                tensor.write(&self.rewrite, &mut out).unwrap_or_else(|e| {
                    wrong = Some(e);
                    Err(io::Error::other("a tensor could not be encoded"))
                })
            });
            if let Some(error) = wrong {
                return Err(error.with("tensor", &tensor.name));
            }
            result.map_err(|e| not_written(path, e))?;
        }
        let file = out.finish().and_then(|out| out.into_inner().map_err(io::IntoInnerError::into_error));
        file.and_then(|file| file.sync_all()).map_err(|e| not_written(path, e))?;
        progress(total, total);
        Ok(self.rewrite.lost())
    }
}

impl Planned<'_> {
    fn write(&self, rewrite: &Rewrite, out: &mut dyn Write) -> Result<io::Result<()>> {
        match &self.content {
            Content::Grouped(matrix, heads, form) => {
                self.rows(matrix.rows(), matrix.cols(), out, |row, bytes| {
                    let row = heads.map_or(row, |heads| heads.in_model(row));
                    let (words, scales) = rewrite.row(matrix, row, *form)?;
                    let scales: Vec<f16> = scales.iter().map(|scale| f16::from_f32(*scale)).collect();
                    encode_groups(self.kind, &words, &scales, bytes);
                    Ok(())
                })
            }
            Content::Widened(matrix) => self.rows(matrix.rows(), matrix.cols(), out, |row, bytes| {
                let mut values = vec![0.0; matrix.cols()];
                matrix.row(row, &mut values);
                gguf::encode(self.kind, &values, bytes)
            }),
            Content::Raw(bytes) => Ok(bytes.chunks(PIECE).try_for_each(|piece| out.write_all(piece))),
            Content::Floats(values) => {
                let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                Ok(out.write_all(&bytes))
            }
            Content::Dense(tensor, heads) => {
                let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
                let kind = self.kind;
                self.rows(rows, cols, out, |row, bytes| {
                    let row = heads.map_or(row, |heads| heads.in_model(row));
                    let mut values = vec![0.0; cols];
                    tensor.view().row(row, &mut values);
                    gguf::encode(kind, &values, bytes)
                })
            }
            Content::Ternary(tensor, heads) => {
                let kind = self.kind;
                let written = self.rows(tensor.rows, tensor.cols, out, |row, bytes| {
                    let row = heads.map_or(row, |heads| heads.in_model(row));
                    let mut codes = vec![0; tensor.cols];
                    codes_of(tensor, row, &mut codes);
                    if kind == TensorType::I2S {
                        encode_i2s(&codes, bytes);
                    } else {
                        encode_tq(kind, &codes, bytes);
                    }
                    Ok(())
                })?;
                if kind != TensorType::I2S || written.is_err() {
                    return Ok(written);
                }
                let mut trailer = [0; I2S_TRAILER as usize];
                trailer[..4].copy_from_slice(&tensor.scale.to_le_bytes());
                Ok(out.write_all(&trailer))
            }
        }
    }

    /// Encodes rows on all threads and writes them, a piece at a time.
    fn rows(
        &self,
        rows: usize,
        cols: usize,
        out: &mut dyn Write,
        encode: impl Fn(usize, &mut [u8]) -> Result<()> + Sync,
    ) -> Result<io::Result<()>> {
        let width = self.kind.row_bytes(cols).expect("invariant: the writer has checked the dimensions");
        let step = (PIECE / width).clamp(1, rows);
        let mut piece = vec![0; step * width];
        for first in (0..rows).step_by(step) {
            let piece = &mut piece[..step.min(rows - first) * width];
            piece
                .par_chunks_exact_mut(width)
                .enumerate()
                .try_for_each(|(i, bytes)| encode(first + i, bytes))?;
            if let Err(e) = out.write_all(piece) {
                return Ok(Err(e));
            }
        }
        Ok(Ok(()))
    }
}

fn type_of(dtype: DenseType) -> TensorType {
    match dtype {
        DenseType::F32 => TensorType::F32,
        DenseType::F16 => TensorType::F16,
        DenseType::Bf16 => TensorType::Bf16,
    }
}

/// What the plain frequencies are divided by.
fn rope_factors(checkpoint: &Checkpoint) -> Vec<f32> {
    let spec = &checkpoint.spec;
    if let RopeScaling::Factors(factors) = &spec.rope.scaling {
        return factors.clone();
    }
    let mut plain = spec.rope.clone();
    plain.scaling = RopeScaling::None;
    let scaled = spec.rope.frequencies(spec.head_dim);
    plain.frequencies(spec.head_dim).iter().zip(scaled).map(|(plain, scaled)| plain / scaled).collect()
}

/// Reports what passes through.
struct Progressing<'a, 'b> {
    out: &'a mut dyn Write,
    done: &'a mut u64,
    total: u64,
    progress: &'a mut Progress<'b>,
}

impl Write for Progressing<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.out.write(bytes)?;
        *self.done += count as u64;
        (self.progress)(*self.done, self.total);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
