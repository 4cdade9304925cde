//! How a block of the KV cache holds its keys and values: in which type, and where each element lies.
//!
//! Attention reads this layout and [`append`] writes it, so that it is defined once. Which blocks make up a sequence is
//! for the caller to know.

mod sums;
mod write;

use std::{collections::TryReserveError, fmt};

pub use sums::{KeyRotation, MAX_SUM, SumBlock};
pub use write::{Factors, append, append_sums};

use sums::Sums;

/// Positions in a block.
pub const BLOCK: usize = 64;

/// The shape of the keys and values of all layers at one position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Decoder layers.
    pub layers: usize,
    /// Heads of keys and values in each layer.
    pub kv_heads: usize,
    /// Elements of a head; even, as rotary embeddings need it.
    pub head_dim: usize,
}

/// How keys and values are stored. Fewer bits are less memory, and less to read for each token of a long context.
///
/// A model whose activations are int8 amplifies any rounding: where an activation lies near a tie, it may go the other way.
/// What is said below of logits was measured on the small test models against `f32`: KL divergence, and in how many of 100
/// places the most probable token stays the same (of right implementations in f32 and f64 it is the same in about 95 where
/// there are such ties).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema),
    serde(rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum KvType {
    /// Single precision: nothing is lost.
    #[default]
    F32,
    /// Nothing is lost, in three quarters of the memory and with half as much to read: keys and values that are integer sums
    /// times a factor, as products with int8 activations are, are kept as sums of 24 bits, of which attention reads 16
    /// where these suffice. Keys are kept without their rotary embedding, which attention applies as it reads them. The
    /// results are those of `f32` to the last bit. Models whose keys or values are no such sums take `f32` instead.
    Exact,
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
            Self::Exact => "exact",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        })
    }
}

impl KvLayout {
    /// Bytes that one position takes: `2 * layers * kv_heads` heads, each of `head_dim` elements of 4 bytes (`f32`), 3
    /// (`exact`), 2 (`f16`) or 1 (`int8`), `int8` with a scale of 4 bytes, `exact` with a factor of 4 bytes and a mark of one.
    pub fn bytes_per_position(&self, kv_type: KvType) -> u64 {
        let heads = 2 * (self.layers * self.kv_heads) as u64;
        heads
            * match kv_type {
                KvType::F32 => 4 * self.head_dim as u64,
                KvType::Exact => 3 * self.head_dim as u64 + 5,
                KvType::F16 => 2 * self.head_dim as u64,
                KvType::Int8 => self.head_dim as u64 + 4,
            }
    }

    /// Bytes that attention reads of each position: in `exact` those of 16 bits, which nearly always suffice.
    pub fn bytes_read_per_position(&self, kv_type: KvType) -> u64 {
        let unread =
            if kv_type == KvType::Exact { 2 * self.layers * self.kv_heads * self.head_dim } else { 0 };
        self.bytes_per_position(kv_type) - unread as u64
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

/// The int8 keys or values of one layer in a block, and for each head and position the scale `[kv_heads, BLOCK]` that
/// they are multiplied by.
pub type Int8Block<'a> = (&'a [i8], &'a [f32]);

/// The keys and values of one layer, block by block, as [`attention`](crate::attention) reads them.
#[derive(Debug, Clone)]
pub enum KvBlocks<'a> {
    /// Single precision.
    F32 {
        /// `[kv_heads, head_dim, BLOCK]` of each block.
        keys: Vec<&'a [f32]>,
        /// `[kv_heads, BLOCK, head_dim]` of each block.
        values: Vec<&'a [f32]>,
    },
    /// The bits of half precision.
    F16 {
        /// `[kv_heads, head_dim, BLOCK]` of each block.
        keys: Vec<&'a [u16]>,
        /// `[kv_heads, BLOCK, head_dim]` of each block.
        values: Vec<&'a [u16]>,
    },
    /// 8 bits. The elements that a product adds up lie in pairs; `head_dim` is even. Attention rounds queries, and weights
    /// times the scales of the values, to 16 bits, so that its sums are exact in integers.
    Int8 {
        /// `[kv_heads, head_dim / 2, BLOCK, 2]` of each block.
        keys: Vec<Int8Block<'a>>,
        /// `[kv_heads, BLOCK / 2, head_dim, 2]` of each block.
        values: Vec<Int8Block<'a>>,
    },
    /// Integer sums with a factor for each position. Attention multiplies and rotates them as it reads them.
    Sums {
        /// Sums `[kv_heads, head_dim, BLOCK]` of each block, before the rotary embedding.
        keys: Vec<SumBlock<'a>>,
        /// Sums `[kv_heads, BLOCK, head_dim]` of each block.
        values: Vec<SumBlock<'a>>,
        /// The rotary embedding of each block's positions; see [`with_rotations`](Self::with_rotations).
        rotations: &'a [KeyRotation],
    },
}

impl<'a> KvBlocks<'a> {
    /// With the rotary embedding of the keys, block by block, which [`KvType::Exact`] needs; the others stay as they are.
    #[must_use]
    pub fn with_rotations(mut self, of_blocks: &'a [KeyRotation]) -> Self {
        if let Self::Sums { rotations, .. } = &mut self {
            *rotations = of_blocks;
        }
        self
    }
}

/// The keys and values of [`BLOCK`] positions in all layers: for each layer the keys, then the values, laid out as
/// [`KvBlocks`] says.
pub struct KvBlock {
    layout: KvLayout,
    storage: Storage,
}

enum Storage {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Int8 { elements: Vec<i8>, scales: Vec<f32> },
    Sums(Sums),
}

impl KvBlock {
    /// A block of zeros.
    ///
    /// # Errors
    /// Where there is no memory for it.
    pub fn new(layout: &KvLayout, kv_type: KvType) -> Result<Self, TryReserveError> {
        let planes = 2 * layout.layers;
        let elements = planes * layout.plane();
        let storage = match kv_type {
            KvType::F32 => Storage::F32(zeros(elements)?),
            KvType::F16 => Storage::F16(zeros(elements)?),
            KvType::Int8 => {
                Storage::Int8 { elements: zeros(elements)?, scales: zeros(planes * layout.scales())? }
            }
            KvType::Exact => Storage::Sums(Sums::new(elements, planes * layout.scales())?),
        };
        Ok(Self { layout: *layout, storage })
    }

    /// A copy.
    ///
    /// # Errors
    /// Where there is no memory for it.
    pub fn try_clone(&self) -> Result<Self, TryReserveError> {
        let storage = match &self.storage {
            Storage::F32(elements) => Storage::F32(copy(elements)?),
            Storage::F16(elements) => Storage::F16(copy(elements)?),
            Storage::Int8 { elements, scales } => {
                Storage::Int8 { elements: copy(elements)?, scales: copy(scales)? }
            }
            Storage::Sums(sums) => Storage::Sums(sums.try_clone()?),
        };
        Ok(Self { layout: self.layout, storage })
    }

    /// Bytes that are allocated.
    pub fn bytes(&self) -> usize {
        self.parts().iter().map(|part| part.len()).sum()
    }

    /// All that is stored as bytes, in the byte order of the machine. Any bytes are valid.
    pub fn parts(&self) -> [&[u8]; 4] {
        match &self.storage {
            Storage::F32(elements) => [bytemuck::cast_slice(elements), &[], &[], &[]],
            Storage::F16(elements) => [bytemuck::cast_slice(elements), &[], &[], &[]],
            Storage::Int8 { elements, scales } => {
                [bytemuck::cast_slice(elements), bytemuck::cast_slice(scales), &[], &[]]
            }
            Storage::Sums(sums) => sums.parts(),
        }
    }

    /// [`parts`](Self::parts) to be written to.
    pub fn parts_mut(&mut self) -> [&mut [u8]; 4] {
        match &mut self.storage {
            Storage::F32(elements) => [bytemuck::cast_slice_mut(elements), &mut [], &mut [], &mut []],
            Storage::F16(elements) => [bytemuck::cast_slice_mut(elements), &mut [], &mut [], &mut []],
            Storage::Int8 { elements, scales } => {
                [bytemuck::cast_slice_mut(elements), bytemuck::cast_slice_mut(scales), &mut [], &mut []]
            }
            Storage::Sums(sums) => sums.parts_mut(),
        }
    }

    /// The heads of one layer, to be written to.
    fn heads(&mut self, layer: usize) -> Vec<Head<'_>> {
        let (plane, scales_len) = (self.layout.plane(), self.layout.scales());
        let head = BLOCK * self.layout.head_dim;
        match &mut self.storage {
            Storage::F32(elements) => {
                let (keys, values) = sides_mut(elements, layer, plane);
                let heads = keys.chunks_exact_mut(head).zip(values.chunks_exact_mut(head));
                heads.map(|(keys, values)| Head::F32 { keys, values }).collect()
            }
            Storage::F16(elements) => {
                let (keys, values) = sides_mut(elements, layer, plane);
                let heads = keys.chunks_exact_mut(head).zip(values.chunks_exact_mut(head));
                heads.map(|(keys, values)| Head::F16 { keys, values }).collect()
            }
            Storage::Int8 { elements, scales } => {
                let (keys, values) = sides_mut(elements, layer, plane);
                let (key_scales, value_scales) = sides_mut(scales, layer, scales_len);
                let keys = keys.chunks_exact_mut(head).zip(key_scales.chunks_exact_mut(BLOCK));
                let values = values.chunks_exact_mut(head).zip(value_scales.chunks_exact_mut(BLOCK));
                keys.zip(values).map(|(keys, values)| Head::Int8 { keys, values }).collect()
            }
            Storage::Sums(sums) => {
                let heads = sums.heads(layer, plane, scales_len, head);
                heads.map(|(keys, values)| Head::Sums { keys, values }).collect()
            }
        }
    }
}

impl fmt::Debug for KvBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvBlock").field("layout", &self.layout).finish_non_exhaustive()
    }
}

/// The keys and values of `layer` in `blocks`, which all have this layout and type.
pub fn kv_blocks<'a>(
    blocks: impl Iterator<Item = &'a KvBlock>,
    layout: &KvLayout,
    kv_type: KvType,
    layer: usize,
) -> KvBlocks<'a> {
    let (plane, scales) = (layout.plane(), layout.scales());
    match kv_type {
        KvType::F32 => {
            let both = blocks.filter_map(|block| match &block.storage {
                Storage::F32(elements) => Some(sides(elements, layer, plane)),
                _ => None,
            });
            let (keys, values) = both.unzip();
            KvBlocks::F32 { keys, values }
        }
        KvType::F16 => {
            let both = blocks.filter_map(|block| match &block.storage {
                Storage::F16(elements) => Some(sides(elements, layer, plane)),
                _ => None,
            });
            let (keys, values) = both.unzip();
            KvBlocks::F16 { keys, values }
        }
        KvType::Int8 => {
            let both = blocks.filter_map(|block| match &block.storage {
                Storage::Int8 { elements, scales: all } => {
                    let (keys, values) = sides(elements, layer, plane);
                    let (key_scales, value_scales) = sides(all, layer, scales);
                    Some(((keys, key_scales), (values, value_scales)))
                }
                _ => None,
            });
            let (keys, values) = both.unzip();
            KvBlocks::Int8 { keys, values }
        }
        KvType::Exact => {
            let both = blocks.filter_map(|block| match &block.storage {
                Storage::Sums(sums) => Some(sums.layer(layer, plane, scales)),
                _ => None,
            });
            let (keys, values) = both.unzip();
            KvBlocks::Sums { keys, values, rotations: &[] }
        }
    }
}

/// Where one head's keys and values of a block lie.
enum Head<'a> {
    F32 { keys: &'a mut [f32], values: &'a mut [f32] },
    F16 { keys: &'a mut [u16], values: &'a mut [u16] },
    Int8 { keys: (&'a mut [i8], &'a mut [f32]), values: (&'a mut [i8], &'a mut [f32]) },
    Sums { keys: sums::Head<'a>, values: sums::Head<'a> },
}

/// The keys' part and the values' part of a layer.
fn sides<T>(all: &[T], layer: usize, plane: usize) -> (&[T], &[T]) {
    all[2 * layer * plane..2 * (layer + 1) * plane].split_at(plane)
}

fn sides_mut<T>(all: &mut [T], layer: usize, plane: usize) -> (&mut [T], &mut [T]) {
    all[2 * layer * plane..2 * (layer + 1) * plane].split_at_mut(plane)
}

fn zeros<T: Copy + Default>(count: usize) -> Result<Vec<T>, TryReserveError> {
    let mut out = Vec::new();
    out.try_reserve_exact(count)?;
    out.resize(count, T::default());
    Ok(out)
}

fn copy<T: Copy>(x: &[T]) -> Result<Vec<T>, TryReserveError> {
    let mut out = Vec::new();
    out.try_reserve_exact(x.len())?;
    out.extend_from_slice(x);
    Ok(out)
}
