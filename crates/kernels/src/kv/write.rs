//! Writing new positions to blocks.

use half::{
    f16,
    slice::{HalfBitsSliceExt, HalfFloatSliceExt},
};

use super::{BLOCK, Head, KvBlock, KvLayout};
use crate::team;

/// For each new position what the sums of its keys, and those of its values, were multiplied by.
#[derive(Debug, Clone, Copy)]
pub struct Factors<'a> {
    /// One for each position.
    pub keys: &'a [f32],
    /// One for each position.
    pub values: &'a [f32],
}

/// Writes the keys and values of new positions, `[count, kv_heads, head_dim]` each, to `layer` of `blocks`, from position
/// `place` of the first block on. Each element is rounded here, once, so that all sequences that share a block read the
/// same.
///
/// # Panics
/// If the lengths do not agree, or if `blocks` have no room for the positions or are of [`KvType::Exact`](super::KvType::Exact).
pub fn append(blocks: &mut [&mut KvBlock], layer: usize, place: usize, keys: &[f32], values: &[f32]) {
    write(blocks, layer, place, (keys, values), None);
}

/// [`append`] of integer sums times factors, keys without their rotary embedding, to blocks of
/// [`KvType::Exact`](super::KvType::Exact): `sum as f32 * factor` of sums of at most [`MAX_SUM`](super::MAX_SUM).
///
/// # Panics
/// As [`append`], and if there is not one factor for each position. Blocks of other types panic as well.
pub fn append_sums(
    blocks: &mut [&mut KvBlock],
    layer: usize,
    place: usize,
    (keys, values): (&[f32], &[f32]),
    factors: Factors<'_>,
) {
    write(blocks, layer, place, (keys, values), Some(factors));
}

fn write(
    blocks: &mut [&mut KvBlock],
    layer: usize,
    place: usize,
    (keys, values): (&[f32], &[f32]),
    factors: Option<Factors<'_>>,
) {
    let Some(layout) = blocks.first().map(|block| block.layout) else {
        assert!(keys.is_empty() && values.is_empty(), "keys and values without a block");
        return;
    };
    let width = layout.kv_heads * layout.head_dim;
    let count = keys.len() / width;
    assert!(keys.len() == count * width && values.len() == keys.len(), "lengths of keys and values");
    assert!(place + count <= blocks.len() * BLOCK, "room in the blocks");
    if let Some(factors) = factors {
        assert!(factors.keys.len() == count && factors.values.len() == count, "one factor for each position");
    }
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
    let run = |task: &mut Task<'_>| task.run(&layout, keys, values, factors);
    // One position is too little work to divide.
    if count > 1 {
        team::for_each_mut(&mut tasks, |_, task| run(task));
    } else {
        tasks.iter_mut().for_each(run);
    }
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
    fn run(&mut self, layout: &KvLayout, keys: &[f32], values: &[f32], factors: Option<Factors<'_>>) {
        let KvLayout { kv_heads, head_dim, .. } = *layout;
        for (place, row) in (self.place..).zip(self.rows.clone()) {
            let at = (row * kv_heads + self.head) * head_dim;
            let (key, value) = (&keys[at..at + head_dim], &values[at..at + head_dim]);
            match (&mut self.to, factors) {
                (Head::F32 { keys, values }, None) => write_floats(keys, values, place, key, value),
                (Head::F16 { keys, values }, None) => {
                    write_floats(keys, values, place, &halves(key), &halves(value));
                }
                (Head::Int8 { keys, values }, None) => write_int8(keys, values, place, key, value),
                (Head::Sums { keys, values }, Some(factors)) => {
                    keys.write(place, key, factors.keys[row], place, BLOCK);
                    values.write(place, value, factors.values[row], place * head_dim, 1);
                }
                _ => panic!("sums belong to blocks of sums alone"),
            }
        }
    }
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
