//! Attention over a cache of cells, as llama.cpp has it: a cell holds the heads of one position side by side, a sequence is any
//! set of cells, and a mask says which of them each token sees.
//!
//! Blocks are put together from the cells that a token sees: all that an earlier token of the same sequence sees, in the order
//! of their numbers, and then those that are new. So the tokens of a sequence see the same blocks, each up to its own length.

use std::ops::Range;

use super::{
    Attention, BLOCK, SEGMENT, VECTORS, Work,
    blocks::{self, Blocks, Place, Source, reached},
    float::{Element, Floats, Values, weigh_values},
    softmax::{self, Row, Softmax},
    split,
};
use crate::{
    Isa,
    lanes::{self, LANES, Lanes},
    vector::Vector,
};

/// Tokens of one task: enough for the copy of a block to cost little.
const TASK_TOKENS: usize = 32;

/// The elements of the keys, or of the values, of one layer.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum CellFloats<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// The bits of half precision (IEEE 754 binary16).
    F16(&'a [u16]),
}

/// The keys, or the values, of one layer: for each cell `[kv_heads, head_dim]`.
#[derive(Debug, Clone, Copy)]
pub struct CellRows<'a> {
    /// From the first element of the first cell on.
    pub elements: CellFloats<'a>,
    /// Elements from a cell to the next one.
    pub stride: usize,
}

impl CellRows<'_> {
    /// Whether there are so many cells of `width` elements.
    fn are(&self, cells: usize, width: usize) -> bool {
        let elements = match self.elements {
            CellFloats::F32(elements) => elements.len(),
            CellFloats::F16(elements) => elements.len(),
        };
        let needed =
            cells.checked_sub(1).map_or(Some(0), |rest| rest.checked_mul(self.stride)?.checked_add(width));
        self.stride >= width && needed.is_some_and(|needed| needed <= elements)
    }
}

/// [`CellRows`] of one type.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, T> {
    elements: &'a [T],
    stride: usize,
}

impl<'a, T: Element> Rows<'a, T> {
    /// `count` elements of a cell from `first` on.
    #[inline(always)]
    fn get(&self, cell: u32, first: usize, count: usize) -> &'a [T] {
        &self.elements[cell as usize * self.stride + first..][..count]
    }

    /// Prefetches elements of a cell.
    #[inline(always)]
    fn prefetch(&self, cell: u32, elements: Range<usize>) {
        let at = cell as usize * self.stride + elements.start;
        lanes::prefetch_all(self.elements.as_ptr().wrapping_add(at), elements.len());
    }

    /// Writes `head_dim` elements of each cell from `first` on to `out`, `[BLOCK, head_dim]`.
    #[inline(always)]
    fn copy(&self, cells: &[u32], first: usize, head_dim: usize, out: &mut [f32]) {
        for (cell, out) in cells.iter().zip(out.chunks_exact_mut(head_dim)) {
            let row = self.get(*cell, first, head_dim);
            out.iter_mut().zip(row).for_each(|(out, element)| *out = element.widen());
        }
    }

    /// As [`copy`](Self::copy), to `out` as `[head_dim, BLOCK]`. Columns behind the last cell repeat it.
    #[inline(always)]
    fn transpose(&self, cells: &[u32], first: usize, head_dim: usize, out: &mut [f32]) {
        let Some(last) = cells.last() else { return };
        for (column, cells) in cells.chunks(LANES).enumerate() {
            let rows: [&[T]; LANES] =
                std::array::from_fn(|i| self.get(*cells.get(i).unwrap_or(last), first, head_dim));
            for (d, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
                out.as_chunks_mut::<LANES>().0[column] = std::array::from_fn(|i| rows[i][d].widen());
            }
        }
    }
}

/// The cells that the tokens of a batch see.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VisibleCells {
    /// Cells that the mask speaks of.
    cells: usize,
    runs: Vec<Run>,
}

/// Successive tokens of which each sees all that the one before it sees.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Run {
    /// The cells of the last token. Each token sees the first ones of them.
    cells: Vec<u32>,
    /// How many cells each token sees.
    lengths: Vec<usize>,
}

impl VisibleCells {
    /// Reads a mask `[tokens, cells]` of halves: 0 where a token sees a cell, minus infinity where it does not. `None` if it
    /// has other values, or no whole number of tokens.
    pub fn of(mask: &[u16], cells: usize) -> Option<Self> {
        const HIDDEN: u16 = 0xfc00;
        if cells == 0 || !mask.len().is_multiple_of(cells) || u32::try_from(cells).is_err() {
            return None;
        }
        let mut runs: Vec<Run> = Vec::new();
        let mut before = vec![0u64; cells.div_ceil(64)];
        let mut sees = before.clone();
        for mask in mask.chunks_exact(cells) {
            for (word, mask) in sees.iter_mut().zip(mask.chunks(64)) {
                let (mut visible, mut other) = (0, false);
                for (i, value) in mask.iter().enumerate() {
                    visible |= u64::from(*value == 0) << i;
                    other |= *value != 0 && *value != HIDDEN;
                }
                if other {
                    return None;
                }
                *word = visible;
            }
            let follows = before.iter().zip(&sees).all(|(before, sees)| before & !sees == 0);
            if runs.is_empty() || !follows {
                runs.push(Run::default());
                before.fill(0);
            }
            if let Some(run) = runs.last_mut() {
                run.cells.extend(new_bits(&before, &sees));
                run.lengths.push(run.cells.len());
            }
            std::mem::swap(&mut before, &mut sees);
        }
        Some(Self { cells, runs })
    }

    /// The number of tokens.
    pub fn tokens(&self) -> usize {
        self.runs.iter().map(|run| run.lengths.len()).sum()
    }
}

/// The bits that are set in `after` and not in `before`, in ascending order.
fn new_bits<'a>(before: &'a [u64], after: &'a [u64]) -> impl Iterator<Item = u32> + 'a {
    before.iter().zip(after).enumerate().flat_map(|(word, (before, after))| {
        let mut bits = after & !before;
        std::iter::from_fn(move || {
            let bit = (bits != 0).then(|| bits.trailing_zeros())?;
            bits &= bits - 1;
            Some(64 * word as u32 + bit)
        })
    })
}

/// Keys and values of the cells of a run, in their order.
#[derive(Clone, Copy)]
pub(super) struct Cells<'a, T> {
    keys: Rows<'a, T>,
    values: Rows<'a, T>,
    cells: &'a [u32],
    /// Whether each block is read for one token, whose few queries do not repay a copy of it.
    is_single: bool,
}

impl<T: Element> Source for Cells<'_, T> {
    type Query<'a> = &'a [f32];

    #[inline(always)]
    fn query<V: Vector>(q: &[f32]) -> &[f32] {
        q
    }

    #[inline(always)]
    fn segment<V: Vector>(
        self,
        shape: &Attention,
        head: usize,
        range: Range<usize>,
        rows: &mut [Row<'_>],
        queries: &[&[f32]],
    ) {
        let head_dim = shape.head_dim;
        let plane = head_dim * BLOCK;
        if self.is_single {
            for block in reached(range, rows) {
                let place = Place { block, head, ahead: true };
                softmax::block::<V, _>(shape.scale, InPlace(self), place, block * BLOCK, rows, queries);
            }
            return;
        }
        let mut floats = blocks::take_floats(plane);
        for block in reached(range, rows) {
            let (keys, values) = floats.as_flattened_mut()[..2 * plane].split_at_mut(plane);
            let first = block * BLOCK;
            let cells = self.of_block(block);
            self.keys.transpose(cells, head * head_dim, head_dim, keys);
            self.values.copy(cells, head * head_dim, head_dim, values);
            let floats = Floats { keys: &[&*keys], values: &[&*values] };
            let place = Place { block: 0, head: 0, ahead: false };
            softmax::block::<V, _>(shape.scale, floats, place, first, rows, queries);
        }
        blocks::put_floats(floats);
    }
}

impl<'a, T> Cells<'a, T> {
    /// The cells of a block; none behind the last one.
    #[inline(always)]
    fn of_block(&self, block: usize) -> &'a [u32] {
        let end = self.cells.len();
        &self.cells[end.min(block * BLOCK)..end.min((block + 1) * BLOCK)]
    }
}

/// Cells that are multiplied where they lie.
#[derive(Clone, Copy)]
struct InPlace<'a, T>(Cells<'a, T>);

impl<T: Element> Blocks for InPlace<'_, T> {
    type Query<'a> = &'a [f32];

    #[inline(always)]
    fn query<V: Vector>(q: &[f32]) -> &[f32] {
        q
    }

    #[inline(always)]
    fn scores<V: Vector, const R: usize>(
        self,
        Place { block, head, ahead }: Place,
        queries: &[&[f32]; R],
    ) -> [[V; VECTORS]; R] {
        let (width, keys) = (queries[0].len(), &self.0.keys);
        let next = if ahead { self.0.of_block(block + 1) } else { &[] };
        let first = head * width;
        let mut scores = [[[0.0; LANES]; VECTORS]; R];
        for (i, cell) in self.0.of_block(block).iter().enumerate() {
            if let Some(next) = next.get(i) {
                keys.prefetch(*next, first..first + width);
            }
            let mut sums = [V::splat(0.0); R];
            for at in (0..width - width % LANES).step_by(LANES) {
                let key: V = T::load(&keys.get(*cell, first + at, LANES).as_chunks().0[0]);
                for r in 0..R {
                    let q: &Lanes = &queries[r][at..].as_chunks().0[0];
                    sums[r] = V::load(q).mul_add(key, sums[r]);
                }
            }
            for r in 0..R {
                let rest = (width - width % LANES..width)
                    .map(|at| queries[r][at] * keys.get(*cell, first + at, 1)[0].widen());
                scores[r][i / LANES][i % LANES] = rest.fold(sums[r].sum(), |sum, product| sum + product);
            }
        }
        scores.map(|row| row.map(|lanes| V::load(&lanes)))
    }

    #[inline(always)]
    fn weigh<V: Vector, const R: usize>(
        self,
        Place { block, head, ahead }: Place,
        weights: &[[f32; BLOCK]; R],
        correction: &[f32; R],
        visible: usize,
        out: &mut [&mut [f32]; R],
    ) {
        let width = out[0].len();
        let next = if ahead { self.0.of_block(block + 1) } else { &[] };
        for cell in next {
            self.0.values.prefetch(*cell, head * width..(head + 1) * width);
        }
        let values =
            CellValues { rows: self.0.values, cells: self.0.of_block(block), first: head * width, width };
        weigh_values::<V, _, R>(values, None, weights, correction, visible, out);
    }
}

/// The values of one head in cells.
#[derive(Clone, Copy)]
struct CellValues<'a, T> {
    rows: Rows<'a, T>,
    cells: &'a [u32],
    /// The head's first element in a cell.
    first: usize,
    /// Its elements.
    width: usize,
}

impl<T: Element> Values for CellValues<'_, T> {
    type Stored = T;

    #[inline(always)]
    fn load<V: Vector, const N: usize>(self, position: usize, at: usize) -> [V; N] {
        let first = self.first + at - position * self.width;
        let row = self.rows.get(self.cells[position], first, N * LANES).as_chunks::<LANES>().0;
        std::array::from_fn(|v| T::load(&row[v]))
    }

    #[inline(always)]
    fn element(self, position: usize, at: usize) -> f32 {
        self.rows.get(self.cells[position], self.first + at - position * self.width, 1)[0].widen()
    }
}

/// A part, `(part, of)`, of `softmax(scale * q k^T) v` for the tokens of `visible`, each over the cells that it sees. A token that
/// sees none has zeros. The `past` of `shape` is not used.
///
/// Queries and `out` are `[tokens, heads, head_dim]`. A result has the same bits in whichever part it is computed. The last bits of a
/// token's result may depend on how many tokens of its sequence are computed with it: a token alone has another order of
/// additions.
///
/// # Panics
/// If the lengths do not agree with the shape, the shape has no elements or more than a slice can have, or keys and values are
/// of different types.
///
/// # Safety
/// `out` is valid for writes of as many floats as there are in `q`, and no one but the other parts uses them meanwhile.
pub unsafe fn cells_attention_part(
    shape: &Attention,
    visible: &VisibleCells,
    q: &[f32],
    [keys, values]: [CellRows<'_>; 2],
    out: *mut f32,
    part: (usize, usize),
) {
    let Attention { heads, kv_heads, .. } = *shape;
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads over {kv_heads}");
    let (width, kv_width) = shape.widths();
    assert_eq!(visible.tokens().checked_mul(width), Some(q.len()), "the length of the queries");
    assert!([keys, values].iter().all(|rows| rows.are(visible.cells, kv_width)), "cells of the KV cache");
    let strides = [keys.stride, values.stride];
    match (keys.elements, values.elements) {
        // SAFETY: The caller's promise, and the queries have been checked.
        (CellFloats::F32(keys), CellFloats::F32(values)) => unsafe {
            let kv = rows([keys, values], strides);
            tasks(shape, visible, q, kv, super::single_cells, out, part);
        },
        // SAFETY: As above.
        (CellFloats::F16(keys), CellFloats::F16(values)) => unsafe {
            let kv = rows([keys, values], strides);
            tasks(shape, visible, q, kv, super::half_cells, out, part);
        },
        _ => panic!("keys and values of different types"),
    }
}

/// Keys and values of one type.
fn rows<T>([keys, values]: [&[T]; 2], strides: [usize; 2]) -> [Rows<'_, T>; 2] {
    [Rows { elements: keys, stride: strides[0] }, Rows { elements: values, stride: strides[1] }]
}

/// [`cells_attention_part`] by `run_task`, after its checks.
///
/// # Safety
/// As there, and `q` has the queries of all tokens of `visible`.
unsafe fn tasks<T: Element>(
    shape: &Attention,
    visible: &VisibleCells,
    q: &[f32],
    [keys, values]: [Rows<'_, T>; 2],
    run_task: impl Fn(Isa, &Attention, Cells<'_, T>, &mut Work<'_>),
    out: *mut f32,
    (part, of): (usize, usize),
) {
    let Attention { heads, kv_heads, head_dim, .. } = *shape;
    let width = heads * head_dim;
    let group = heads / kv_heads;
    let whole: usize =
        visible.runs.iter().map(|run| run.lengths.len().div_ceil(TASK_TOKENS) * kv_heads).sum();
    // Query heads that are computed apart read the same keys and values, which costs more than some threads that wait.
    let is_even = whole.div_ceil(of).saturating_mul(of) <= whole + whole / 3;
    let split = if is_even { 1 } else { split(whole, group, of) };
    let own_heads = group / split;
    let (isa, mut parts, mut before) = (Isa::detect(), (0..of).cycle(), 0);
    for run in &visible.runs {
        for (lengths, token) in run.lengths.chunks(TASK_TOKENS).zip((before..).step_by(TASK_TOKENS)) {
            let is_single = lengths.len() == 1;
            for first_head in (0..heads).step_by(own_heads) {
                if parts.next() != Some(part) {
                    continue;
                }
                let mut rows = Vec::with_capacity(lengths.len() * own_heads);
                for (token, length) in (token..).zip(lengths) {
                    for head in first_head..first_head + own_heads {
                        let at = token * width + head * head_dim;
                        // SAFETY: The caller's promise. `at` is within the queries, and no other row or task has the same.
                        let out = unsafe { std::slice::from_raw_parts_mut(out.add(at), head_dim) };
                        let q = &q[at..at + head_dim];
                        if *length == 0 {
                            out.fill(0.0);
                        } else {
                            rows.push(Row { q, out, length: *length, sum: Softmax::EMPTY });
                        }
                    }
                }
                let segments = 0..rows.last().map_or(0, |row| row.length.div_ceil(SEGMENT * BLOCK));
                let kv_head = first_head / group;
                let kv = Cells { keys, values, cells: &run.cells, is_single };
                run_task(isa, shape, kv, &mut Work { kv_head, segments, is_whole: true, rows });
            }
        }
        before += run.lengths.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{attention::attention, kv::KvBlocks};

    const SHAPE: Attention = Attention { heads: 6, kv_heads: 2, head_dim: 24, past: 0, scale: 0.4 };

    fn floats(seed: u32, count: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn mask(tokens: &[&[u32]], cells: usize) -> Vec<u16> {
        let row = |sees: &&[u32]| {
            let sees: Vec<u32> = sees.to_vec();
            (0..cells as u32)
                .map(move |cell| if sees.contains(&cell) { 0 } else { 0xfc00 })
                .collect::<Vec<u16>>()
        };
        tokens.iter().flat_map(row).collect()
    }

    /// All parts, one after the other.
    fn compute(isa: Isa, visible: &VisibleCells, q: &[f32], kv: [CellRows<'_>; 2], of: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; q.len()];
        for part in 0..of {
            // SAFETY: `out` is as long as `q`, and the parts are computed in turn.
            isa.force(|| unsafe {
                cells_attention_part(&SHAPE, visible, q, kv, out.as_mut_ptr(), (part, of));
            });
        }
        out
    }

    #[test]
    fn tokens_that_see_more_and_more_are_a_run() {
        let tokens: [&[u32]; 7] = [&[3, 70], &[1, 3, 70], &[1, 3, 70, 71], &[2], &[2, 0], &[], &[5]];
        let visible = VisibleCells::of(&mask(&tokens, 80), 80).unwrap();
        let runs: Vec<(&[u32], &[usize])> =
            visible.runs.iter().map(|run| (&run.cells[..], &run.lengths[..])).collect();
        assert_eq!(
            runs,
            [(&[3, 70, 1, 71][..], &[2, 3, 4][..]), (&[2, 0][..], &[1, 2][..]), (&[5][..], &[0, 1][..])]
        );
        assert_eq!(visible.tokens(), 7);
    }

    #[test]
    fn other_masks_are_refused() {
        assert_eq!(VisibleCells::of(&[0, 0x3c00], 2), None, "a bias");
        assert_eq!(VisibleCells::of(&[0, 0, 0], 2), None, "half a token");
        assert_eq!(VisibleCells::of(&[], 0), None, "no cells");
        assert_eq!(VisibleCells::of(&[], 2).unwrap().tokens(), 0);
    }

    /// Cells in any order, those of several sequences between each other, against sums in f64.
    #[test]
    fn each_token_attends_to_what_it_sees() {
        let Attention { heads, kv_heads, head_dim, scale, .. } = SHAPE;
        let (cells, width, stride) = (700, kv_heads * head_dim, kv_heads * head_dim + 8);
        // Sequences of all even cells, downwards, and of some odd ones; a token that sees all, and one that sees nothing.
        let even: Vec<u32> = (0..350).map(|i| 698 - 2 * i).collect();
        let odd: Vec<u32> = (0..90).map(|i| 6 * i + 1).collect();
        let all: Vec<u32> = (0..cells as u32).collect();
        let mut tokens: Vec<&[u32]> = vec![&odd[..77]];
        tokens.extend((300..=350).map(|n| &even[..n]));
        tokens.extend((60..=90).map(|n| &odd[..n]));
        tokens.extend([&all[..], &[]]);
        let visible = VisibleCells::of(&mask(&tokens, cells), cells).unwrap();
        assert_eq!(visible.runs.len(), 4);
        assert_eq!(visible.runs[0].lengths, [77], "a token alone");
        let q = floats(1, tokens.len() * heads * head_dim);
        let [keys, values] = [2, 3].map(|seed| floats(seed, (cells - 1) * stride + width));
        let halves = [&keys, &values]
            .map(|side| side.iter().map(|x| half::f16::from_f32(*x).to_bits()).collect::<Vec<_>>());
        let singles = [&keys, &values].map(|side| CellRows { elements: CellFloats::F32(side), stride });
        let widened = halves.each_ref().map(|side| side.iter().map(|x| lanes::half(*x)).collect::<Vec<_>>());
        let halves = halves.each_ref().map(|side| CellRows { elements: CellFloats::F16(side), stride });
        for (kv, [keys, values]) in [(singles, [&keys, &values]), (halves, widened.each_ref())] {
            let expected: Vec<f64> = (0..tokens.len() * heads * head_dim)
                .map(|i| {
                    let (token, head, d) = (i / (heads * head_dim), i / head_dim % heads, i % head_dim);
                    let at = |cell: u32| cell as usize * stride + head / (heads / kv_heads) * head_dim;
                    let query = &q[(i / head_dim) * head_dim..][..head_dim];
                    let weights = tokens[token].iter().map(|cell| {
                        let key = &keys[at(*cell)..][..head_dim];
                        let score: f64 =
                            query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                        (f64::from(scale) * score).exp()
                    });
                    let (total, sum) =
                        weights.zip(tokens[token]).fold((0.0, 0.0), |(total, sum), (weight, cell)| {
                            (total + weight, sum + weight * f64::from(values[at(*cell) + d]))
                        });
                    if total == 0.0 { 0.0 } else { sum / total }
                })
                .collect();
            for isa in Isa::available() {
                let out = compute(isa, &visible, &q, kv, 1);
                for (i, (out, expected)) in out.iter().zip(&expected).enumerate() {
                    assert!((f64::from(*out) - expected).abs() < 2e-6, "{isa}, {i}: {out} {expected}");
                }
                for of in [2, 3, 16] {
                    assert_eq!(compute(isa, &visible, &q, kv, of), out, "{isa}, {of} parts");
                }
            }
        }
    }

    /// Where the cells lie in order, the bits are those of attention over blocks.
    #[test]
    fn cells_in_order_are_blocks() {
        let Attention { heads, kv_heads, head_dim, .. } = SHAPE;
        let (past, new, width) = (590, 40, kv_heads * head_dim);
        let cells = past + new;
        let [keys, values] = [5, 6].map(|seed| floats(seed, cells * width));
        let q = floats(7, new * heads * head_dim);
        let order: Vec<u32> = (0..cells as u32).collect();
        let tokens: Vec<&[u32]> = (past + 1..=cells).map(|n| &order[..n]).collect();
        let visible = VisibleCells::of(&mask(&tokens, cells), cells).unwrap();
        let blocks = cells.div_ceil(BLOCK);
        let mut planes = [vec![0.0; blocks * width * BLOCK], vec![0.0; blocks * width * BLOCK]];
        for cell in 0..cells {
            let (block, place) = (cell / BLOCK, cell % BLOCK);
            for i in 0..width {
                let (head, d) = (i / head_dim, i % head_dim);
                let first = (block * kv_heads + head) * head_dim * BLOCK;
                planes[0][first + d * BLOCK + place] = keys[cell * width + i];
                planes[1][first + place * head_dim + d] = values[cell * width + i];
            }
        }
        let [k, v] = planes.each_ref().map(|side| side.chunks_exact(width * BLOCK).collect::<Vec<_>>());
        let kv = [&keys, &values].map(|side| CellRows { elements: CellFloats::F32(side), stride: width });
        for isa in Isa::available() {
            let mut expected = vec![0.0; q.len()];
            let blocks = KvBlocks::F32 { keys: k.clone(), values: v.clone() };
            isa.force(|| attention(Attention { past, ..SHAPE }, &q, &blocks, &mut expected));
            assert_eq!(compute(isa, &visible, &q, kv, 2), expected, "{isa}");
        }
    }

    #[test]
    fn lengths_that_do_not_agree_are_refused() {
        let visible = VisibleCells::of(&mask(&[&[0], &[0, 1]], 2), 2).unwrap();
        let (q, kv) = (floats(1, 2 * 144), floats(2, 2 * 48));
        let rows = |elements, stride| CellRows { elements: CellFloats::F32(elements), stride };
        let refused = |q: &[f32], keys, values| {
            let compute =
                std::panic::AssertUnwindSafe(|| compute(Isa::Scalar, &visible, q, [keys, values], 1));
            assert!(std::panic::catch_unwind(compute).is_err());
        };
        let good = rows(&kv, 48);
        compute(Isa::Scalar, &visible, &q, [good, good], 1);
        refused(&q[1..], good, good);
        refused(&q, rows(&kv[1..], 48), good);
        refused(&q, good, rows(&kv, 49));
        refused(&q, good, rows(&kv, 47));
        refused(&q, rows(&kv, usize::MAX), good);
    }
}
