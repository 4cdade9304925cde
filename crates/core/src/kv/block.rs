//! How a block of the KV cache holds its keys and values: in which type, and where each element lies.

use std::fmt;

use half::{
    f16,
    slice::{HalfBitsSliceExt, HalfFloatSliceExt},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BLOCK, Layout};
use crate::{Error, ErrorKind, Result};

/// How keys and values are stored. Fewer bits are less memory, and less to read for each token of a long context.
///
/// A model whose activations are int8 amplifies any rounding: where an activation lies near a tie, it may go the other way.
/// What is said below of logits was measured on the small test models against `f32`: KL divergence, and in how many of 100
/// places the most probable token stays the same (of right implementations in f32 and f64 it is the same in about 95 where
/// there are such ties).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum KvType {
    /// Single precision: nothing is lost.
    #[default]
    F32,
    /// Half precision (IEEE 754 binary16), rounded to nearest: half the memory. What is beyond its range becomes its
    /// largest number, 65504. KL divergence 1.6e-3, the same token in 97 places, the same greedy answer in 59 of 75.
    F16,
    /// 8 bits, with one scale for each head's key and one for its value at each position (`max(|x|) / 127`, symmetric, rounded to
    /// nearest): a quarter of the memory. KL divergence 3.6e-3, the same token in 95 places, the same greedy answer in 48 of 75.
    ///
    /// The root mean square error of normally distributed heads of 128 is 0.65 % of theirs.
    /// A scale for every 32 elements would make it 0.54 % and take 9 % more memory; one for each dimension would have to
    /// wait for a whole block.
    Int8,
}

impl fmt::Display for KvType {
    /// As in a configuration.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        })
    }
}

impl Layout {
    /// Bytes that one position takes: `2 * layers * kv_heads` heads, each of `head_dim` elements of 4 bytes (`f32`), 2
    /// (`f16`) or 1 (`int8`), the last with a scale of 4 bytes.
    pub fn bytes_per_position(&self, kv_type: KvType) -> u64 {
        let heads = 2 * (self.layers * self.kv_heads) as u64;
        heads
            * match kv_type {
                KvType::F32 => 4 * self.head_dim as u64,
                KvType::F16 => 2 * self.head_dim as u64,
                KvType::Int8 => self.head_dim as u64 + 4,
            }
    }

    /// Bytes that a sequence of `positions` takes: whole blocks.
    pub fn bytes(&self, kv_type: KvType, positions: usize) -> u64 {
        let positions = positions.div_ceil(BLOCK).saturating_mul(BLOCK) as u64;
        positions.saturating_mul(self.bytes_per_position(kv_type))
    }

    /// Elements of the keys, or of the values, of one layer.
    fn plane(&self) -> usize {
        self.kv_heads * BLOCK * self.head_dim
    }

    /// Scales of them.
    fn scales(&self) -> usize {
        self.kv_heads * BLOCK
    }
}

/// The int8 keys, or values, of one layer in a block, and their scales `[kv_heads, BLOCK]`.
pub type Int8Plane<'a> = (&'a [i8], &'a [f32]);

/// The keys and the values of one layer, block by block, as `ternion_kernels::attention` takes them.
///
/// In floats a block has keys `[kv_heads, head_dim, BLOCK]` and values `[kv_heads, BLOCK, head_dim]`. In int8, pairs of
/// what is summed over lie together: keys `[kv_heads, head_dim / 2, BLOCK, 2]`, values `[kv_heads, BLOCK / 2, head_dim, 2]`.
#[derive(Debug)]
pub enum Planes<'a> {
    /// Single precision.
    F32 {
        /// Of each block.
        keys: Vec<&'a [f32]>,
        /// Of each block.
        values: Vec<&'a [f32]>,
    },
    /// The bits of half precision.
    F16 {
        /// Of each block.
        keys: Vec<&'a [u16]>,
        /// Of each block.
        values: Vec<&'a [u16]>,
    },
    /// An element is its int8 times the scale of its head and position.
    Int8 {
        /// Of each block.
        keys: Vec<Int8Plane<'a>>,
        /// Of each block.
        values: Vec<Int8Plane<'a>>,
    },
}

/// The keys and values of [`BLOCK`] positions: for each layer the keys, then the values, as in [`Planes`].
pub(super) enum Block {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Int8 { elements: Vec<i8>, scales: Vec<f32> },
}

impl Block {
    /// A block of zeros.
    pub(super) fn new(layout: &Layout, kv_type: KvType) -> Result<Self> {
        let planes = 2 * layout.layers;
        let elements = planes * layout.plane();
        Ok(match kv_type {
            KvType::F32 => Self::F32(zeros(elements)?),
            KvType::F16 => Self::F16(zeros(elements)?),
            KvType::Int8 => {
                Self::Int8 { elements: zeros(elements)?, scales: zeros(planes * layout.scales())? }
            }
        })
    }

    pub(super) fn try_clone(&self) -> Result<Self> {
        Ok(match self {
            Self::F32(elements) => Self::F32(copy(elements)?),
            Self::F16(elements) => Self::F16(copy(elements)?),
            Self::Int8 { elements, scales } => {
                Self::Int8 { elements: copy(elements)?, scales: copy(scales)? }
            }
        })
    }

    /// Writes a key and a value `[kv_heads, head_dim]` at `place`. An element is rounded here, once, so that all who
    /// share the block read the same.
    pub(super) fn write(&mut self, layout: &Layout, layer: usize, place: usize, key: &[f32], value: &[f32]) {
        let plane = layout.plane();
        let part = 2 * layer * plane..2 * (layer + 1) * plane;
        match self {
            Self::F32(elements) => floats(&mut elements[part], layout, place, key, value),
            Self::F16(elements) => {
                floats(&mut elements[part], layout, place, &halves(key), &halves(value));
            }
            Self::Int8 { elements, scales } => {
                let scales = &mut scales[2 * layer * layout.scales()..][..2 * layout.scales()];
                int8s(&mut elements[part], scales, layout, place, key, value);
            }
        }
    }
}

/// The planes of `layer` in blocks of `kv_type`.
pub(super) fn planes<'a>(
    blocks: impl Iterator<Item = &'a Block>,
    layout: &Layout,
    kv_type: KvType,
    layer: usize,
) -> Planes<'a> {
    let (plane, scales) = (layout.plane(), layout.scales());
    match kv_type {
        KvType::F32 => {
            let both = blocks.filter_map(|block| match block {
                Block::F32(elements) => Some(sides(elements, layer, plane)),
                _ => None,
            });
            let (keys, values) = both.unzip();
            Planes::F32 { keys, values }
        }
        KvType::F16 => {
            let both = blocks.filter_map(|block| match block {
                Block::F16(elements) => Some(sides(elements, layer, plane)),
                _ => None,
            });
            let (keys, values) = both.unzip();
            Planes::F16 { keys, values }
        }
        KvType::Int8 => {
            let both = blocks.filter_map(|block| match block {
                Block::Int8 { elements, scales: all } => {
                    let (keys, values) = sides(elements, layer, plane);
                    let (key_scales, value_scales) = sides(all, layer, scales);
                    Some(((keys, key_scales), (values, value_scales)))
                }
                _ => None,
            });
            let (keys, values) = both.unzip();
            Planes::Int8 { keys, values }
        }
    }
}

/// The keys' part and the values' part of a layer.
fn sides<T>(all: &[T], layer: usize, plane: usize) -> (&[T], &[T]) {
    all[2 * layer * plane..2 * (layer + 1) * plane].split_at(plane)
}

/// Keys with the positions side by side, values with the dimensions side by side.
fn floats<T: Copy>(both: &mut [T], layout: &Layout, place: usize, key: &[T], value: &[T]) {
    let Layout { kv_heads, head_dim, .. } = *layout;
    let (keys, values) = both.split_at_mut(layout.plane());
    for head in 0..kv_heads {
        let from = head * head_dim..(head + 1) * head_dim;
        let column = keys[head * head_dim * BLOCK + place..].iter_mut().step_by(BLOCK);
        column.zip(&key[from.clone()]).for_each(|(to, x)| *to = *x);
        let at = (head * BLOCK + place) * head_dim;
        values[at..at + head_dim].copy_from_slice(&value[from]);
    }
}

/// As [`floats`], but keys in pairs of dimensions and values in pairs of positions.
fn int8s(both: &mut [i8], scales: &mut [f32], layout: &Layout, place: usize, key: &[f32], value: &[f32]) {
    let Layout { kv_heads, head_dim, .. } = *layout;
    let (keys, values) = both.split_at_mut(layout.plane());
    let (key_scales, value_scales) = scales.split_at_mut(layout.scales());
    for head in 0..kv_heads {
        let from = head * head_dim..(head + 1) * head_dim;
        let (factor, scale) = int8_scale(&key[from.clone()]);
        key_scales[head * BLOCK + place] = scale;
        let columns = keys[head * head_dim * BLOCK..].chunks_exact_mut(2 * BLOCK);
        for (pairs, x) in columns.zip(key[from.clone()].chunks_exact(2)) {
            pairs[2 * place] = int8(x[0] * factor);
            pairs[2 * place + 1] = int8(x[1] * factor);
        }
        let (factor, scale) = int8_scale(&value[from.clone()]);
        value_scales[head * BLOCK + place] = scale;
        let at = (head * BLOCK + place / 2 * 2) * head_dim + place % 2;
        let row = values[at..].iter_mut().step_by(2);
        row.zip(&value[from]).for_each(|(to, x)| *to = int8(x * factor));
    }
}

/// What elements are multiplied by before they are rounded, and the scale that undoes it: the largest becomes 127. Both
/// are 0 for elements of nearly nothing; the scale is NaN if an element is infinite or NaN, so that it is seen in the logits.
fn int8_scale(x: &[f32]) -> (f32, f32) {
    // The bits of positive floats are in the order of the floats, with those of infinity and what is not a number last.
    let largest = f32::from_bits(x.iter().fold(0, |most, x| most.max(x.abs().to_bits())));
    if !largest.is_finite() {
        return (0.0, f32::NAN);
    }
    if largest < 1e-30 { (0.0, 0.0) } else { (127.0 / largest, largest / 127.0) }
}

/// The nearest integer, of two the even one: a sum with 1.5 * 2^23 has no bits below 1. `round_ties_even` is a call of a
/// function where the CPU is not known.
fn int8(x: f32) -> i8 {
    const SHIFT: f32 = 12_582_912.0;
    // The product may be rounded up beyond 127.
    let shifted = x.clamp(-127.0, 127.0) + SHIFT;
    (shifted.to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32) as i8
}

fn halves(x: &[f32]) -> Vec<u16> {
    let most = f32::from(f16::MAX);
    let within = |x: &f32| if x.is_infinite() { *x } else { x.clamp(-most, most) };
    let x: Vec<f32> = x.iter().map(within).collect();
    let mut out = vec![0u16; x.len()];
    out.reinterpret_cast_mut::<f16>().convert_from_f32_slice(&x);
    out
}

fn zeros<T: Copy + Default>(count: usize) -> Result<Vec<T>> {
    let mut out = reserve(count)?;
    out.resize(count, T::default());
    Ok(out)
}

fn copy<T: Copy>(x: &[T]) -> Result<Vec<T>> {
    let mut out = reserve(x.len())?;
    out.extend_from_slice(x);
    Ok(out)
}

fn reserve<T>(count: usize) -> Result<Vec<T>> {
    let mut out = Vec::new();
    out.try_reserve_exact(count).map_err(|e| {
        let bytes = count * size_of::<T>();
        Error::new(ErrorKind::ResourceExhausted, format!("no memory for {bytes} bytes of KV cache"))
            .with_source(e)
    })?;
    Ok(out)
}
