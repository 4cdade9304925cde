//! How a block of the KV cache holds its keys and values: in which type, and where each element lies.
//!
//! Attention reads this layout and [`append`] writes it, so that it is defined once. Which blocks make up a sequence is
//! for the caller to know.

use std::{collections::TryReserveError, fmt};

use half::{
    f16,
    slice::{HalfBitsSliceExt, HalfFloatSliceExt},
};

use crate::team;

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

impl KvLayout {
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
        };
        Ok(Self { layout: self.layout, storage })
    }

    /// Bytes that are allocated.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::F32(elements) => size_of_val(&elements[..]),
            Storage::F16(elements) => size_of_val(&elements[..]),
            Storage::Int8 { elements, scales } => elements.len() + size_of_val(&scales[..]),
        }
    }

    /// All keys, values and scales as bytes, in the byte order of the machine. Any bytes are valid.
    pub fn parts(&self) -> [&[u8]; 2] {
        match &self.storage {
            Storage::F32(elements) => [bytemuck::cast_slice(elements), &[]],
            Storage::F16(elements) => [bytemuck::cast_slice(elements), &[]],
            Storage::Int8 { elements, scales } => {
                [bytemuck::cast_slice(elements), bytemuck::cast_slice(scales)]
            }
        }
    }

    /// [`parts`](Self::parts) to be written to.
    pub fn parts_mut(&mut self) -> [&mut [u8]; 2] {
        match &mut self.storage {
            Storage::F32(elements) => [bytemuck::cast_slice_mut(elements), &mut []],
            Storage::F16(elements) => [bytemuck::cast_slice_mut(elements), &mut []],
            Storage::Int8 { elements, scales } => {
                [bytemuck::cast_slice_mut(elements), bytemuck::cast_slice_mut(scales)]
            }
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
    }
}

/// Writes the keys and values of new positions, `[count, kv_heads, head_dim]` each, to `layer` of `blocks`, from position
/// `place` of the first block on. Each element is rounded here, once, so that all sequences that share a block read the
/// same.
///
/// # Panics
/// If the lengths do not agree, or if `blocks` have no room for the positions.
pub fn append(blocks: &mut [&mut KvBlock], layer: usize, place: usize, keys: &[f32], values: &[f32]) {
    let Some(layout) = blocks.first().map(|block| block.layout) else {
        assert!(keys.is_empty() && values.is_empty(), "keys and values without a block");
        return;
    };
    let width = layout.kv_heads * layout.head_dim;
    let count = keys.len() / width;
    assert!(keys.len() == count * width && values.len() == keys.len(), "lengths of keys and values");
    assert!(place + count <= blocks.len() * BLOCK, "room in the blocks");
    let mut tasks = Vec::with_capacity(blocks.len() * layout.kv_heads);
    for (index, block) in blocks.iter_mut().enumerate() {
        let first = (index * BLOCK).max(place);
        let end = ((index + 1) * BLOCK).min(place + count);
        if first < end {
            let rows = first - place..end - place;
            let heads = block.heads(layer).into_iter().enumerate();
            tasks.extend(heads.map(|(head, to)| Task { head, place: first % BLOCK, rows: rows.clone(), to }));
        }
    }
    let run = |task: &mut Task<'_>| task.run(&layout, keys, values);
    // One position is too little work to divide.
    if count > 1 {
        team::for_each_mut(&mut tasks, |_, task| run(task));
    } else {
        tasks.iter_mut().for_each(run);
    }
}

/// Where one head's keys and values of a block lie.
enum Head<'a> {
    F32 { keys: &'a mut [f32], values: &'a mut [f32] },
    F16 { keys: &'a mut [u16], values: &'a mut [u16] },
    Int8 { keys: (&'a mut [i8], &'a mut [f32]), values: (&'a mut [i8], &'a mut [f32]) },
}

/// Positions of one head that go to one block.
struct Task<'a> {
    head: usize,
    /// The place of the first one in the block.
    place: usize,
    rows: std::ops::Range<usize>,
    to: Head<'a>,
}

impl Task<'_> {
    fn run(&mut self, layout: &KvLayout, keys: &[f32], values: &[f32]) {
        let KvLayout { kv_heads, head_dim, .. } = *layout;
        for (place, row) in (self.place..).zip(self.rows.clone()) {
            let at = (row * kv_heads + self.head) * head_dim;
            let (key, value) = (&keys[at..at + head_dim], &values[at..at + head_dim]);
            match &mut self.to {
                Head::F32 { keys, values } => write_floats(keys, values, place, key, value),
                Head::F16 { keys, values } => {
                    write_floats(keys, values, place, &halves(key), &halves(value));
                }
                Head::Int8 { keys, values } => write_int8(keys, values, place, key, value),
            }
        }
    }
}

/// The keys' part and the values' part of a layer.
fn sides<T>(all: &[T], layer: usize, plane: usize) -> (&[T], &[T]) {
    all[2 * layer * plane..2 * (layer + 1) * plane].split_at(plane)
}

fn sides_mut<T>(all: &mut [T], layer: usize, plane: usize) -> (&mut [T], &mut [T]) {
    all[2 * layer * plane..2 * (layer + 1) * plane].split_at_mut(plane)
}

/// Keys with the positions side by side, values with the dimensions side by side.
fn write_floats<T: Copy>(keys: &mut [T], values: &mut [T], place: usize, key: &[T], value: &[T]) {
    let column = keys[place..].iter_mut().step_by(BLOCK);
    column.zip(key).for_each(|(to, x)| *to = *x);
    values[place * value.len()..][..value.len()].copy_from_slice(value);
}

/// As [`write_floats`], but keys in pairs of dimensions and values in pairs of positions.
fn write_int8(
    (keys, key_scales): &mut (&mut [i8], &mut [f32]),
    (values, value_scales): &mut (&mut [i8], &mut [f32]),
    place: usize,
    key: &[f32],
    value: &[f32],
) {
    let (factor, scale) = int8_scale(key);
    key_scales[place] = scale;
    for (pairs, x) in keys.chunks_exact_mut(2 * BLOCK).zip(key.chunks_exact(2)) {
        pairs[2 * place] = int8(x[0] * factor);
        pairs[2 * place + 1] = int8(x[1] * factor);
    }
    let (factor, scale) = int8_scale(value);
    value_scales[place] = scale;
    let row = values[place / 2 * 2 * value.len() + place % 2..].iter_mut().step_by(2);
    row.zip(value).for_each(|(to, x)| *to = int8(x * factor));
}

/// The factor that elements are multiplied by before they are rounded, so that the largest becomes 127, and the scale that
/// undoes it. Both are 0 where all elements are close to 0. The scale is NaN where an element is infinite or NaN, so that
/// the logits show it.
fn int8_scale(x: &[f32]) -> (f32, f32) {
    // The bits of positive floats have the order of the floats, with infinity and NaN last.
    let largest = f32::from_bits(x.iter().fold(0, |most, x| most.max(x.abs().to_bits())));
    if !largest.is_finite() {
        return (0.0, f32::NAN);
    }
    if largest < 1e-30 { (0.0, 0.0) } else { (127.0 / largest, largest / 127.0) }
}

/// Rounds to the nearest integer, ties to even: the sum with 1.5 * 2^23 has no bits below 1. `round_ties_even` would be a
/// function call on CPUs without an instruction for it.
fn int8(x: f32) -> i8 {
    const SHIFT: f32 = 12_582_912.0;
    // Rounding may carry the product beyond 127.
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
