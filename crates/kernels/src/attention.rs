//! Causal grouped-query attention over a KV cache of blocks.
//!
//! Keys lie with the positions side by side and values with the dimensions side by side, so that both products run
//! along vectors and neither adds up lanes. The softmax is computed block by block with a running maximum; blocks stand
//! at fixed positions, so a token's result has the same bits whatever tokens are computed with it.

mod blocks;
mod float;
mod int8;

use blocks::{Blocks, Place};
pub use blocks::{Int8Block, KvBlocks};

use crate::{Isa, isa::vectorized, lanes::LANES, team, vector::Vector};

/// Positions in a block of the KV cache.
pub const BLOCK: usize = 64;

/// Vectors of a row of scores.
const VECTORS: usize = BLOCK / LANES;

/// Tokens of one task.
const TASK_TOKENS: usize = 16;

/// Pairs of a token and a head that are computed together.
const TILE: usize = 4;

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

/// `softmax(scale * q k^T) v` for queries at the positions `past..past + tokens`, each over all positions up to its own.
///
/// Queries and `out` are `[tokens, heads, head_dim]`; the blocks hold the positions in order.
///
/// # Panics
/// If the lengths do not agree with the shape, or the shape has no elements or more than a slice can have.
pub fn attention(shape: Attention, q: &[f32], kv: KvBlocks<'_>, out: &mut [f32]) {
    attention_with(Isa::detect(), shape, q, kv, out);
}

/// [`attention`] with given instructions, for tests and measurements.
///
/// # Panics
/// As [`attention`], and if the CPU does not have them.
pub fn attention_with(isa: Isa, shape: Attention, q: &[f32], kv: KvBlocks<'_>, out: &mut [f32]) {
    attention_by(shape, q, kv, out, |task| run(isa, &shape, kv, task));
}

fn attention_by(
    shape: Attention,
    q: &[f32],
    kv: KvBlocks<'_>,
    out: &mut [f32],
    run: impl Fn(&mut Task<'_>) + Sync + Send,
) {
    let Attention { heads, kv_heads, head_dim, past, .. } = shape;
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads over {kv_heads}");
    let (width, _) = shape.widths();
    assert!(q.len() == out.len() && q.len().is_multiple_of(width), "lengths of queries and output");
    let tokens = q.len() / width;
    if tokens == 0 {
        return;
    }
    // From here on sizes are bounded by the lengths of slices.
    let end = past.checked_add(tokens).expect("the positions of the queries overflow");
    assert!(kv.are(end.div_ceil(BLOCK), kv_heads, head_dim), "blocks of the KV cache");
    let group = heads / kv_heads;
    let split = split(tokens.div_ceil(TASK_TOKENS) * kv_heads, group, team::threads());
    let parts = kv_heads * split;
    let mut tasks: Vec<Task<'_>> = (0..tokens.div_ceil(TASK_TOKENS) * parts)
        .map(|i| Task {
            kv_head: i % parts / split,
            rows: Vec::with_capacity(TASK_TOKENS.min(tokens) * group),
        })
        .collect();
    for (i, (q, out)) in q.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)).enumerate() {
        let (token, head) = (i / heads, i % heads);
        let rows = &mut tasks[token / TASK_TOKENS * parts + head / (group / split)].rows;
        rows.push(Row { q, out, length: past + token + 1, largest: f32::NEG_INFINITY, total: 0.0 });
    }
    team::for_each_mut(&mut tasks, |_, task| run(task));
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

/// The tokens of a task for query heads that share a head of keys and values.
struct Task<'a> {
    kv_head: usize,
    rows: Vec<Row<'a>>,
}

/// One query.
struct Row<'a> {
    q: &'a [f32],
    out: &'a mut [f32],
    /// Positions that it sees.
    length: usize,
    /// The largest score so far.
    largest: f32,
    /// The sum of the weights so far, relative to that.
    total: f32,
}

vectorized! {
    fn run(isa: Isa, shape: &Attention, kv: KvBlocks<'_>, task: &mut Task<'_>) = run_body;
}

#[inline(always)]
fn run_body<V: Vector>(shape: &Attention, kv: KvBlocks<'_>, task: &mut Task<'_>) {
    match kv {
        KvBlocks::F32 { keys, values } => tiles::<V, _>(shape, float::Floats { keys, values }, task),
        KvBlocks::F16 { keys, values } => tiles::<V, _>(shape, float::Floats { keys, values }, task),
        KvBlocks::Int8 { keys, values } => tiles::<V, _>(shape, int8::Int8s { keys, values }, task),
    }
}

/// All rows block by block, so that a block is read from memory once for a task.
#[inline(always)]
fn tiles<V: Vector, B: Blocks>(shape: &Attention, kv: B, task: &mut Task<'_>) {
    let head = task.kv_head;
    let mut queries = Vec::with_capacity(task.rows.len());
    for row in &mut task.rows {
        row.out.fill(0.0);
        queries.push(B::query::<V>(row.q));
    }
    let longest = task.rows.last().map_or(0, |row| row.length);
    for block in 0..longest.div_ceil(BLOCK) {
        // While the first tile reads the block, it asks for the next one.
        let mut ahead = true;
        let (tiles, rest) = task.rows.as_chunks_mut::<TILE>();
        let (tile_queries, rest_queries) = queries.as_chunks::<TILE>();
        for (rows, queries) in tiles.iter_mut().zip(tile_queries) {
            let place = Place { block, head, ahead: std::mem::take(&mut ahead) };
            tile::<V, B, TILE>(shape, kv, place, rows, queries);
        }
        let (pairs, rest) = rest.as_chunks_mut::<2>();
        let (pair_queries, rest_queries) = rest_queries.as_chunks::<2>();
        for (rows, queries) in pairs.iter_mut().zip(pair_queries) {
            let place = Place { block, head, ahead: std::mem::take(&mut ahead) };
            tile::<V, B, 2>(shape, kv, place, rows, queries);
        }
        for (row, query) in rest.iter_mut().zip(rest_queries) {
            let place = Place { block, head, ahead: std::mem::take(&mut ahead) };
            tile::<V, B, 1>(shape, kv, place, std::array::from_mut(row), std::array::from_ref(query));
        }
    }
    for row in &mut task.rows {
        let factor = 1.0 / row.total;
        for x in row.out.iter_mut() {
            *x *= factor;
        }
    }
}

/// What a block adds to rows in the order of their lengths.
#[inline(always)]
fn tile<V: Vector, B: Blocks, const R: usize>(
    shape: &Attention,
    kv: B,
    place: Place,
    rows: &mut [Row<'_>; R],
    queries: &[B::Query<'_>; R],
) {
    let start = place.block * BLOCK;
    let longest = rows[R - 1].length.saturating_sub(start).min(BLOCK);
    if longest == 0 {
        return;
    }
    let scores = kv.scores::<V, R>(place, queries);
    let mut weights = [[0.0; BLOCK]; R];
    let mut correction = [1.0f32; R];
    for r in 0..R {
        let row = &mut rows[r];
        let visible = row.length.saturating_sub(start).min(BLOCK);
        if visible > 0 {
            let new = weigh_scores(&scores[r], shape.scale, visible, row.largest, &mut weights[r]);
            correction[r] = V::splat(row.largest - new.largest).exp_negative().lanes()[0];
            row.largest = new.largest;
            row.total = row.total * correction[r] + new.sum;
        }
    }
    let mut out = rows.each_mut().map(|row| &mut *row.out);
    kv.weigh::<V, R>(place, &weights, &correction, longest, &mut out);
}

/// What a block adds to a row's softmax.
struct BlockSum {
    /// The largest score so far.
    largest: f32,
    /// The sum of the block's weights, relative to that.
    sum: f32,
}

/// Turns the scores of the `visible` first positions of a block into weights relative to the largest score so far; the
/// other weights are 0.
#[inline(always)]
fn weigh_scores<V: Vector>(
    scores: &[V; VECTORS],
    scale: f32,
    visible: usize,
    largest: f32,
    weights: &mut [f32; BLOCK],
) -> BlockSum {
    let mut most = V::splat(f32::NEG_INFINITY);
    let mut scaled = *scores;
    for (v, score) in scaled.iter_mut().enumerate() {
        let hidden = V::splat(f32::NEG_INFINITY);
        *score = score.mul(V::splat(scale)).first(visible.saturating_sub(v * LANES), hidden);
        most = score.max(most);
    }
    let largest = largest.max(most.largest());
    let mut sum = V::splat(0.0);
    for (score, weights) in scaled.iter().zip(weights.as_chunks_mut::<LANES>().0) {
        let weight = score.sub(V::splat(largest)).exp_negative();
        weight.store(weights);
        sum = sum.add(weight);
    }
    BlockSum { largest, sum: sum.sum() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vector::Portable;

    /// On instructions with fused multiply-adds a result has the bits that portable Rust gives.
    #[test]
    fn all_instructions_give_the_same_bits() {
        let mut state = 7u32;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        for (heads, kv_heads, head_dim, past, tokens) in
            [(8, 2, 64, 0, 70), (5, 5, 16, 130, 1), (6, 1, 72, 60, 9), (4, 1, 128, 200, 3), (2, 1, 600, 5, 1)]
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
                KvBlocks::F32 { keys: &singles[..count / 2], values: &singles[count / 2..] },
                KvBlocks::F16 { keys: &halves[..count / 2], values: &halves[count / 2..] },
                KvBlocks::Int8 { keys: &bytes[..count / 2], values: &bytes[count / 2..] },
            ];
            for (kv, name) in types.into_iter().zip(["f32", "f16", "int8"]) {
                let mut expected = vec![0.0; q.len()];
                attention_by(shape, &q, kv, &mut expected, |task| {
                    run_body::<Portable<true>>(&shape, kv, task);
                });
                assert!(expected.iter().all(|x| x.is_finite()) && expected.iter().any(|x| *x != 0.0));
                for isa in Isa::available().into_iter().filter(|isa| *isa != Isa::Scalar) {
                    let mut found = vec![0.0; q.len()];
                    attention_with(isa, shape, &q, kv, &mut found);
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
        let kv = KvBlocks::F32 { keys: &keys, values: &keys };
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
                let run = || team.install(|| attention(shape, &q, kv, &mut out));
                let run = std::panic::AssertUnwindSafe(run);
                assert!(std::panic::catch_unwind(run).is_err(), "{shape:?}");
            }
        }
        attention(good, &[], KvBlocks::F32 { keys: &[], values: &[] }, &mut []);
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
        let broken = |kv: KvBlocks<'_>, q: &[f32], out: &mut [f32]| {
            for isa in Isa::available() {
                attention_with(isa, shape, q, kv, out);
                assert!(out.iter().all(|x| x.is_nan()), "{isa}: {out:?}");
            }
        };
        let q = [1.0; 16];
        let (fine, nan) = (vec![1.0; BLOCK], vec![f32::NAN; BLOCK]);
        let int8 = vec![1i8; 16 * BLOCK];
        let (fine, nan) = ([(&int8[..], &fine[..])], [(&int8[..], &nan[..])]);
        broken(KvBlocks::Int8 { keys: &nan, values: &fine }, &q, &mut good);
        broken(KvBlocks::Int8 { keys: &fine, values: &nan }, &q, &mut good);
        let mut query = q;
        query[3] = f32::NAN;
        broken(KvBlocks::Int8 { keys: &fine, values: &fine }, &query, &mut good);
        let (one, nan) = (vec![0x3c00u16; 16 * BLOCK], vec![0x7e00u16; 16 * BLOCK]);
        broken(KvBlocks::F16 { keys: &[&nan], values: &[&one] }, &q, &mut good);
        broken(KvBlocks::F16 { keys: &[&one], values: &[&nan] }, &q, &mut good);
    }
}
