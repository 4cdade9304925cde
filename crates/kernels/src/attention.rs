//! Causal grouped-query attention over a KV cache of blocks.
//!
//! Keys lie with the positions side by side and values with the dimensions side by side, so that both products run
//! along vectors and neither adds up lanes. The softmax is computed block by block with a running maximum. Every
//! [`SEGMENT`] blocks it begins anew, and the segments are merged in order, so that several threads can share a long
//! sequence. Blocks and segments stand at fixed positions: a token's result has the same bits whatever tokens are computed
//! with it, and on however many threads.

mod blocks;
mod cells;
mod float;
mod int8;
mod softmax;
mod sums;

use std::ops::Range;

use crate::{
    Isa,
    isa::vectorized,
    kv::{BLOCK, KvBlocks},
    lanes::LANES,
    team,
    vector::Vector,
};
use blocks::{Direct, Source};
use cells::Cells;
use float::Floats;
use int8::Int8s;
use softmax::{Row, Softmax};
use sums::Sums;

pub use cells::{CellFloats, CellRows, VisibleCells, cells_attention_part};

/// Vectors of a row of scores.
const VECTORS: usize = BLOCK / LANES;

/// Tokens of one task.
const TASK_TOKENS: usize = 16;

/// Blocks whose softmax is computed on its own.
const SEGMENT: usize = 8;

/// The shape of an attention.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    /// Heads of the queries.
    pub heads: usize,
    /// Heads of keys and values; query head `i` uses head `i / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Position of the first query.
    pub past: usize,
    /// Multiplies the products of queries and keys.
    pub scale: f32,
}

impl Attention {
    /// Elements of a token's queries, and of its keys.
    ///
    /// # Panics
    /// If there are none, or more than a slice can have.
    pub(crate) fn widths(&self) -> (usize, usize) {
        let width = |heads: usize| match heads.checked_mul(self.head_dim) {
            Some(width) if (1..=isize::MAX as usize / BLOCK / 4).contains(&width) => width,
            _ => panic!("{heads} heads of {}", self.head_dim),
        };
        (width(self.heads), width(self.kv_heads))
    }
}

/// A sequence whose new tokens attend to it.
#[derive(Debug, Clone)]
pub struct AttentionSequence<'a> {
    /// Position of the first query.
    pub past: usize,
    /// Queries, at successive positions.
    pub tokens: usize,
    /// Keys and values up to the last query's position.
    pub kv: KvBlocks<'a>,
}

/// `softmax(scale * q k^T) v` for queries at the positions `past..past + tokens`, each over all positions up to its own.
///
/// Queries and `out` are `[tokens, heads, head_dim]`; the blocks hold the positions in order.
///
/// # Panics
/// If the lengths do not agree with the shape, or the shape has no elements or more than a slice can have.
pub fn attention(shape: Attention, q: &[f32], kv: &KvBlocks<'_>, out: &mut [f32]) {
    attention_with(Isa::detect(), shape, q, kv, out);
}

/// [`attention`] with given instructions, for tests and measurements.
///
/// # Panics
/// As [`attention`], and if the CPU does not have them.
pub fn attention_with(isa: Isa, shape: Attention, q: &[f32], kv: &KvBlocks<'_>, out: &mut [f32]) {
    let (width, _) = shape.widths();
    assert!(q.len().is_multiple_of(width), "lengths of queries and output");
    let sequence = AttentionSequence { past: shape.past, tokens: q.len() / width, kv: kv.clone() };
    attention_all_with(isa, &shape, &[sequence], q, out);
}

/// [`attention`] of several sequences, as one piece of work for the threads. Queries and `out` are those of all, one sequence
/// after the other; the `past` of `shape` is not used.
///
/// # Panics
/// As [`attention`].
pub fn attention_all(shape: &Attention, sequences: &[AttentionSequence<'_>], q: &[f32], out: &mut [f32]) {
    attention_all_with(Isa::detect(), shape, sequences, q, out);
}

fn attention_all_with(
    isa: Isa,
    shape: &Attention,
    sequences: &[AttentionSequence<'_>],
    q: &[f32],
    out: &mut [f32],
) {
    let (run, merge) = (
        |task: &mut Task<'_>| run(isa, shape, task),
        |into: &mut Row<'_>, from: &Row<'_>| merge(isa, into, from),
    );
    attention_by(shape, sequences, q, out, (run, merge));
}

/// `run` computes tasks and `merge` puts segments together, with certain instructions.
fn attention_by(
    shape: &Attention,
    sequences: &[AttentionSequence<'_>],
    q: &[f32],
    out: &mut [f32],
    (run, merge): (impl Fn(&mut Task<'_>) + Sync, impl Fn(&mut Row<'_>, &Row<'_>)),
) {
    let Attention { heads, kv_heads, head_dim, .. } = *shape;
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads over {kv_heads}");
    let (width, _) = shape.widths();
    let tokens = sequences.iter().try_fold(0usize, |sum, s| sum.checked_add(s.tokens));
    let elements = tokens.and_then(|tokens| tokens.checked_mul(width));
    assert!(elements == Some(q.len()) && q.len() == out.len(), "lengths of queries and output");
    // From here on sizes are bounded by the lengths of slices.
    for sequence in sequences.iter().filter(|s| s.tokens > 0) {
        let end = sequence.past.checked_add(sequence.tokens).expect("the positions of the queries overflow");
        assert!(sequence.kv.are(end.div_ceil(BLOCK), kv_heads, head_dim), "blocks of the KV cache");
    }
    let (group, threads) = (heads / kv_heads, team::threads());
    let whole: usize = sequences.iter().map(|s| s.tokens.div_ceil(TASK_TOKENS) * kv_heads).sum();
    // Where there are few tokens, threads share a sequence: by its segments, or by query heads if it has but one.
    let shares = whole < threads.saturating_mul(4);
    let split = split(whole, group, threads);
    let parts_of = |s: &AttentionSequence<'_>| {
        let segments = (s.past + s.tokens).div_ceil(SEGMENT * BLOCK);
        if shares { segments.max(1) } else { 1 }
    };
    let further = sequences.iter().map(|s| (parts_of(s) - 1) * s.tokens * width).sum();
    let mut partial = vec![0.0; further];
    let (mut q, mut out, mut partial) = (q, out, &mut partial[..]);
    let mut tasks: Vec<Task<'_>> = Vec::new();
    // For each sequence its first task, and how many tasks have a part of the segments.
    let mut divided = Vec::with_capacity(sequences.len());
    for sequence in sequences.iter().filter(|s| s.tokens > 0) {
        let AttentionSequence { past, tokens, kv } = sequence;
        let segments = (past + tokens).div_ceil(SEGMENT * BLOCK);
        let parts = parts_of(sequence);
        let split = if parts > 1 { 1 } else { split };
        let (first, count) = (tasks.len(), tokens.div_ceil(TASK_TOKENS) * kv_heads * split);
        // Tasks of the same positions follow each other: they share the rotary embedding.
        for part in 0..parts {
            for task in 0..count {
                let segments = if parts > 1 { part..part + 1 } else { 0..segments };
                let kv_head = task % (kv_heads * split) / split;
                let rows = Vec::with_capacity(TASK_TOKENS.min(*tokens) * group / split);
                tasks.push(Task { kv, work: Work { kv_head, segments, is_whole: parts == 1, rows } });
            }
        }
        divided.push((first, count));
        let (own_q, rest_q) = q.split_at(tokens * width);
        let (own_out, rest_out) = std::mem::take(&mut out).split_at_mut(tokens * width);
        let (own_partial, rest) = std::mem::take(&mut partial).split_at_mut((parts - 1) * tokens * width);
        (q, out, partial) = (rest_q, rest_out, rest);
        let outs = [own_out].into_iter().chain(own_partial.chunks_exact_mut(tokens * width));
        for (part, out) in outs.enumerate() {
            for (i, (q, out)) in own_q.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)).enumerate()
            {
                let (token, head) = (i / heads, i % heads);
                let task = token / TASK_TOKENS * (kv_heads * split) + head / (group / split);
                let row = Row { q, out, length: past + token + 1, sum: Softmax::EMPTY };
                tasks[first + part * count + task].work.rows.push(row);
            }
        }
    }
    team::for_each_mut(&mut tasks, |_, task| run(task));
    let mut tasks = &mut tasks[..];
    for (first, count) in divided.into_iter().rev() {
        let (before, own) = std::mem::take(&mut tasks).split_at_mut(first);
        tasks = before;
        let (whole, others) = own.split_at_mut(count);
        for (i, other) in others.iter().enumerate() {
            for (row, part) in whole[i % count].work.rows.iter_mut().zip(&other.work.rows) {
                merge(row, part);
            }
        }
        if !others.is_empty() {
            whole.iter_mut().flat_map(|task| &mut task.work.rows).for_each(Row::finish);
        }
    }
}

/// Into how many parts the query heads of a key-value head are divided, so that all threads have the same to do: the keys
/// and values are read as often, but mostly from a cache.
fn split(tasks: usize, group: usize, threads: usize) -> usize {
    if tasks >= threads.saturating_mul(4) {
        return 1;
    }
    // `tasks * n` is a multiple of `threads`, without the product.
    let least = threads / gcd(tasks, threads);
    let even = (1..=group).find(|n| group.is_multiple_of(*n) && n.is_multiple_of(least));
    even.unwrap_or(group)
}

/// The greatest common divisor; `b` is not 0.
fn gcd(a: usize, b: usize) -> usize {
    if a == 0 { b } else { gcd(b % a, a) }
}

/// Work over blocks.
struct Task<'a> {
    kv: &'a KvBlocks<'a>,
    work: Work<'a>,
}

/// Some tokens for query heads that share a head of keys and values, over some segments.
struct Work<'a> {
    kv_head: usize,
    segments: Range<usize>,
    /// Whether these are all segments, so that rows can be finished.
    is_whole: bool,
    /// In the order of their lengths.
    rows: Vec<Row<'a>>,
}

fn run(isa: Isa, shape: &Attention, Task { kv, work }: &mut Task<'_>) {
    match kv {
        KvBlocks::F32 { keys, values } => floats(isa, shape, Direct(Floats { keys, values }), work),
        KvBlocks::F16 { keys, values } => halves(isa, shape, Direct(Floats { keys, values }), work),
        KvBlocks::Int8 { keys, values } => int8s(isa, shape, Direct(Int8s { keys, values }), work),
        KvBlocks::Sums { keys, values, rotations } => {
            sums(isa, shape, Sums { keys, values, rotations }, work);
        }
    }
}

// A function for each type: the compiler takes more than twice as long for one of twice the size.
vectorized! {
    fn floats(isa: Isa, shape: &Attention, kv: Direct<Floats<'_, f32>>, work: &mut Work<'_>) = run_body;
}
vectorized! {
    fn halves(isa: Isa, shape: &Attention, kv: Direct<Floats<'_, u16>>, work: &mut Work<'_>) = run_body;
}
vectorized! {
    fn int8s(isa: Isa, shape: &Attention, kv: Direct<Int8s<'_>>, work: &mut Work<'_>) = run_body;
}
vectorized! {
    fn sums(isa: Isa, shape: &Attention, kv: Sums<'_>, work: &mut Work<'_>) = run_body;
}
vectorized! {
    fn single_cells(isa: Isa, shape: &Attention, kv: Cells<'_, f32>, work: &mut Work<'_>) = run_body;
}
vectorized! {
    fn half_cells(isa: Isa, shape: &Attention, kv: Cells<'_, u16>, work: &mut Work<'_>) = run_body;
}

#[inline(always)]
fn run_body<V: Vector>(shape: &Attention, kv: impl Source, work: &mut Work<'_>) {
    segments::<V, _>(shape, kv, work);
}

vectorized! {
    fn merge(isa: Isa, into: &mut Row<'_>, from: &Row<'_>) = merge_body;
}

#[inline(always)]
fn merge_body<V: Vector>(into: &mut Row<'_>, from: &Row<'_>) {
    into.merge::<V>(from.out, from.sum);
}

/// The segments of some work, which are merged.
#[inline(always)]
fn segments<V: Vector, S: Source>(shape: &Attention, kv: S, work: &mut Work<'_>) {
    let Work { kv_head, segments, is_whole, rows } = work;
    let mut queries = Vec::with_capacity(rows.len());
    for row in rows.iter_mut() {
        row.out.fill(0.0);
        queries.push(S::query::<V>(row.q));
    }
    let width = shape.head_dim;
    let mut scratch = vec![0.0; if segments.len() < 2 { 0 } else { rows.len() * width }];
    let mut sums = Vec::with_capacity(rows.len());
    for segment in segments.clone() {
        // The first one goes into the rows themselves. `S::segment` is called at one place for all, since each call is a copy
        // of most of this file's code.
        let is_first = segment == segments.start;
        let mut parts = Vec::with_capacity(rows.len());
        if is_first {
            parts.extend(rows.iter_mut().map(Row::borrow));
        } else {
            scratch.fill(0.0);
            let outs = scratch.chunks_exact_mut(width);
            parts.extend(rows.iter().zip(outs).map(|(row, out)| Row {
                q: row.q,
                out,
                length: row.length,
                sum: Softmax::EMPTY,
            }));
        }
        kv.segment::<V>(shape, *kv_head, blocks_of(segment), &mut parts, &queries);
        sums.clear();
        sums.extend(parts.iter().map(|part| part.sum));
        if is_first {
            rows.iter_mut().zip(&sums).for_each(|(row, sum)| row.sum = *sum);
        } else {
            for ((row, out), sum) in rows.iter_mut().zip(scratch.chunks_exact(width)).zip(&sums) {
                row.merge::<V>(out, *sum);
            }
        }
    }
    if *is_whole {
        rows.iter_mut().for_each(Row::finish);
    }
}

fn blocks_of(segment: usize) -> Range<usize> {
    segment * SEGMENT..(segment + 1) * SEGMENT
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{kv::Int8Block, vector::Portable};

    /// On instructions with fused multiply-adds a result has the bits that portable Rust gives.
    #[test]
    fn all_instructions_give_the_same_bits() {
        let mut state = 7u32;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        for (heads, kv_heads, head_dim, past, tokens) in
            [(8, 2, 64, 0, 70), (5, 5, 16, 530, 1), (6, 1, 72, 60, 9), (4, 1, 128, 200, 3), (2, 1, 600, 5, 1)]
        {
            let shape = Attention { heads, kv_heads, head_dim, past, scale: 0.3 };
            let plane = kv_heads * head_dim * BLOCK;
            let count = 2 * (past + tokens).div_ceil(BLOCK);
            let mut float = || next() as f32 / (1 << 23) as f32 - 1.0;
            let q: Vec<f32> = (0..tokens * heads * head_dim).map(|_| float()).collect();
            let scales: Vec<f32> = (0..kv_heads * BLOCK).map(|_| 0.01 * (1.5 + float())).collect();
            let singles: Vec<f32> = (0..count * plane).map(|_| float()).collect();
            // Halves of all kinds below 2, subnormal ones too.
            let halves: Vec<u16> = (0..count * plane).map(|_| next() as u16 & 0xbfff).collect();
            let bytes: Vec<i8> = (0..count * plane).map(|_| next() as u8 as i8).collect();
            let singles: Vec<&[f32]> = singles.chunks_exact(plane).collect();
            let halves: Vec<&[u16]> = halves.chunks_exact(plane).collect();
            let bytes: Vec<Int8Block<'_>> = bytes.chunks_exact(plane).map(|b| (b, &scales[..])).collect();
            let types = [
                KvBlocks::F32 { keys: singles[..count / 2].to_vec(), values: singles[count / 2..].to_vec() },
                KvBlocks::F16 { keys: halves[..count / 2].to_vec(), values: halves[count / 2..].to_vec() },
                KvBlocks::Int8 { keys: bytes[..count / 2].to_vec(), values: bytes[count / 2..].to_vec() },
            ];
            for (kv, name) in types.into_iter().zip(["f32", "f16", "int8"]) {
                let mut expected = vec![0.0; q.len()];
                let sequence = AttentionSequence { past, tokens, kv: kv.clone() };
                let run = |task: &mut Task<'_>| match task.kv {
                    KvBlocks::F32 { keys, values } => {
                        run_body::<Portable<true>>(&shape, Direct(Floats { keys, values }), &mut task.work);
                    }
                    KvBlocks::F16 { keys, values } => {
                        run_body::<Portable<true>>(&shape, Direct(Floats { keys, values }), &mut task.work);
                    }
                    KvBlocks::Int8 { keys, values } => {
                        run_body::<Portable<true>>(&shape, Direct(Int8s { keys, values }), &mut task.work);
                    }
                    KvBlocks::Sums { .. } => unreachable!("not among the types"),
                };
                let merge = |into: &mut Row<'_>, from: &Row<'_>| merge_body::<Portable<true>>(into, from);
                attention_by(&shape, &[sequence], &q, &mut expected, (run, merge));
                assert!(expected.iter().all(|x| x.is_finite()) && expected.iter().any(|x| *x != 0.0));
                for isa in Isa::available().into_iter().filter(|isa| *isa != Isa::Scalar) {
                    let mut found = vec![0.0; q.len()];
                    attention_with(isa, shape, &q, &kv, &mut found);
                    let same = expected.iter().zip(&found).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{name} on {isa}: {heads} heads of {head_dim}, {tokens} after {past}");
                }
            }
        }
    }

    /// Shapes whose products wrap to what the slices have, or to nothing. The checks are those of release builds too, in
    /// which additions and products wrap.
    #[test]
    fn shapes_that_overflow_are_refused() {
        const WRAPS: usize = 288_230_376_151_711_748;
        let keys = vec![0.0f32; 64 * BLOCK];
        let keys = [&keys[..]];
        let kv = KvBlocks::F32 { keys: keys.to_vec(), values: keys.to_vec() };
        let good = Attention { heads: 4, kv_heads: 1, head_dim: 64, past: 0, scale: 1.0 };
        assert_eq!(WRAPS.wrapping_mul(64), 256, "the width that the slices have");
        for shape in [
            Attention { heads: WRAPS, ..good },
            Attention { heads: WRAPS, kv_heads: WRAPS, ..good },
            Attention { heads: 0, ..good },
            Attention { heads: 0, kv_heads: 0, ..good },
            Attention { kv_heads: 3, ..good },
            Attention { head_dim: 0, ..good },
            Attention { head_dim: WRAPS, ..good },
            Attention { head_dim: usize::MAX, ..good },
            Attention { heads: i64::MAX as usize, ..good },
            Attention { heads: usize::MAX, kv_heads: usize::MAX, ..good },
            Attention { past: usize::MAX, ..good },
            Attention { past: usize::MAX - BLOCK, ..good },
            Attention { past: BLOCK, ..good },
        ] {
            for tokens in [1, 3] {
                let (q, mut out) = (vec![0.0; tokens * 256], vec![0.0; tokens * 256]);
                let team = crate::Team::new(3).unwrap();
                let run = || team.install(|| attention(shape, &q, &kv, &mut out));
                let run = std::panic::AssertUnwindSafe(run);
                assert!(std::panic::catch_unwind(run).is_err(), "{shape:?}");
            }
        }
        attention(good, &[], &KvBlocks::F32 { keys: Vec::new(), values: Vec::new() }, &mut []);
    }

    #[test]
    fn heads_are_divided_evenly() {
        // By hand: the fewest parts of a group so that each thread has as many.
        for (tasks, group, threads, expected) in
            [(1, 4, 2, 2), (5, 4, 4, 4), (2, 6, 3, 3), (2, 6, 4, 2), (3, 1, 2, 1), (8, 4, 2, 1), (1, 5, 2, 5)]
        {
            assert_eq!(split(tasks, group, threads), expected, "{tasks} {group} {threads}");
        }
        assert_eq!(split(usize::MAX / 2, 4, usize::MAX), 4);
    }

    /// A number that is broken is seen in the result, whatever the type.
    #[test]
    fn what_is_not_a_number_is_passed_on() {
        let shape = Attention { heads: 1, kv_heads: 1, head_dim: 16, past: 0, scale: 1.0 };
        let mut good = vec![1.0; 16];
        let broken = |kv: &KvBlocks<'_>, q: &[f32], out: &mut [f32]| {
            for isa in Isa::available() {
                attention_with(isa, shape, q, kv, out);
                assert!(out.iter().all(|x| x.is_nan()), "{isa}: {out:?}");
            }
        };
        let q = [1.0; 16];
        let (fine, nan) = (vec![1.0; BLOCK], vec![f32::NAN; BLOCK]);
        let int8 = vec![1i8; 16 * BLOCK];
        let (fine, nan) = (vec![(&int8[..], &fine[..])], vec![(&int8[..], &nan[..])]);
        broken(&KvBlocks::Int8 { keys: nan.clone(), values: fine.clone() }, &q, &mut good);
        broken(&KvBlocks::Int8 { keys: fine.clone(), values: nan }, &q, &mut good);
        let mut query = q;
        query[3] = f32::NAN;
        broken(&KvBlocks::Int8 { keys: fine.clone(), values: fine }, &query, &mut good);
        let (one, nan) = (vec![0x3c00u16; 16 * BLOCK], vec![0x7e00u16; 16 * BLOCK]);
        broken(&KvBlocks::F16 { keys: vec![&nan], values: vec![&one] }, &q, &mut good);
        broken(&KvBlocks::F16 { keys: vec![&one], values: vec![&nan] }, &q, &mut good);
    }
}
