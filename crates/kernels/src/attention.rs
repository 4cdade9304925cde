//! Causal grouped-query attention over a KV cache of blocks.
//!
//! Keys lie with the positions side by side and values with the dimensions side by side, so that both products run
//! along vectors and neither adds up lanes. The softmax is computed block by block with a running maximum; blocks stand
//! at fixed positions, so a token's result has the same bits whatever tokens are computed with it.

use rayon::prelude::*;

use crate::{isa::vectorized, lanes::LANES, vector::Vector};

/// Positions in a block of the KV cache.
pub const BLOCK: usize = 64;

/// Vectors of a row of scores.
const VECTORS: usize = BLOCK / LANES;

/// Tokens of one task.
const TASK_TOKENS: usize = 16;

/// Pairs of a token and a head that are computed together.
const TILE: usize = 4;

/// Multiply-adds below which other threads are not worth waking.
const PARALLEL: usize = 1 << 16;

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

/// `softmax(scale * q k^T) v` for queries at the positions `past..past + tokens`, each over all positions up to its own.
///
/// Queries and `out` are `[tokens, heads, head_dim]`. The blocks hold the positions in order, [`BLOCK`] each: keys as
/// `[kv_heads, head_dim, BLOCK]`, values as `[kv_heads, BLOCK, head_dim]`.
///
/// # Panics
/// If the lengths do not agree with the shape.
pub fn attention(shape: Attention, q: &[f32], keys: &[&[f32]], values: &[&[f32]], out: &mut [f32]) {
    let Attention { heads, kv_heads, head_dim, past, .. } = shape;
    let width = heads * head_dim;
    assert!(width > 0 && kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads over {kv_heads}");
    assert!(q.len() == out.len() && q.len().is_multiple_of(width), "lengths of queries and output");
    let tokens = q.len() / width;
    let blocks = (past + tokens).div_ceil(BLOCK);
    let plane = kv_heads * BLOCK * head_dim;
    for side in [keys, values] {
        assert!(side.len() >= blocks && side.iter().all(|b| b.len() == plane), "blocks of the KV cache");
    }
    let group = heads / kv_heads;
    let mut tasks: Vec<Task<'_>> = (0..tokens.div_ceil(TASK_TOKENS) * kv_heads)
        .map(|i| Task { kv_head: i % kv_heads, rows: Vec::with_capacity(TASK_TOKENS.min(tokens) * group) })
        .collect();
    for (i, (q, out)) in q.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)).enumerate() {
        let (token, head) = (i / heads, i % heads);
        let rows = &mut tasks[token / TASK_TOKENS * kv_heads + head / group].rows;
        rows.push(Row { q, out, length: past + token + 1 });
    }
    let work = TASK_TOKENS.min(tokens) * group * head_dim * (past + tokens) * 2;
    let fewest = PARALLEL.div_ceil(work.max(1));
    tasks.par_iter_mut().with_min_len(fewest).for_each(|task| run(&shape, keys, values, task));
}

/// The tokens of a task for the query heads that share a head of keys and values.
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
}

vectorized! {
    fn run(shape: &Attention, keys: &[&[f32]], values: &[&[f32]], task: &mut Task<'_>) = run_body;
}

#[inline(always)]
fn run_body<V: Vector>(shape: &Attention, keys: &[&[f32]], values: &[&[f32]], task: &mut Task<'_>) {
    let plane = BLOCK * shape.head_dim;
    let part = task.kv_head * plane..(task.kv_head + 1) * plane;
    let (tiles, rest) = task.rows.as_chunks_mut::<TILE>();
    for rows in tiles {
        tile::<V, TILE>(shape, keys, values, part.clone(), rows);
    }
    for row in rest {
        tile::<V, 1>(shape, keys, values, part.clone(), std::array::from_mut(row));
    }
}

/// Rows in the order of their lengths, against the same head of keys and values.
#[inline(always)]
fn tile<V: Vector, const R: usize>(
    shape: &Attention,
    keys: &[&[f32]],
    values: &[&[f32]],
    part: std::ops::Range<usize>,
    rows: &mut [Row<'_>; R],
) {
    let mut largest = [f32::NEG_INFINITY; R];
    let mut total = [0.0f32; R];
    for row in rows.iter_mut() {
        row.out.fill(0.0);
    }
    let blocks = rows[R - 1].length.div_ceil(BLOCK);
    for block in 0..blocks {
        let scores = scores::<V, R>(rows, &keys[block][part.clone()]);
        let mut weights = [[0.0; BLOCK]; R];
        let mut correction = [1.0f32; R];
        for r in 0..R {
            let visible = rows[r].length.saturating_sub(block * BLOCK).min(BLOCK);
            if visible > 0 {
                let new = weigh_scores(&scores[r], shape.scale, visible, largest[r], &mut weights[r]);
                correction[r] = V::splat(largest[r] - new.largest).exp_negative().lanes()[0];
                largest[r] = new.largest;
                total[r] = total[r] * correction[r] + new.sum;
            }
        }
        let visible = (rows[R - 1].length - block * BLOCK).min(BLOCK);
        weigh::<V, R>(rows, &weights, &correction, &values[block][part.clone()], visible);
    }
    for (row, total) in rows.iter_mut().zip(total) {
        let factor = 1.0 / total;
        for x in row.out.iter_mut() {
            *x *= factor;
        }
    }
}

/// The products of the queries with all keys of a block, `[head_dim, BLOCK]`.
#[inline(always)]
fn scores<V: Vector, const R: usize>(rows: &[Row<'_>; R], keys: &[f32]) -> [[V; VECTORS]; R] {
    let mut sums = [[V::splat(0.0); VECTORS]; R];
    for (d, keys) in keys.as_chunks::<BLOCK>().0.iter().enumerate() {
        let keys = keys.as_chunks::<LANES>().0;
        let keys: [V; VECTORS] = std::array::from_fn(|v| V::load(&keys[v]));
        for r in 0..R {
            let q = V::splat(rows[r].q[d]);
            for v in 0..VECTORS {
                sums[r][v] = q.mul_add(keys[v], sums[r][v]);
            }
        }
    }
    sums
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

/// `out = out * correction + weights * values`, over the first `visible` positions of a block, `[BLOCK, head_dim]`.
#[inline(always)]
fn weigh<V: Vector, const R: usize>(
    rows: &mut [Row<'_>; R],
    weights: &[[f32; BLOCK]; R],
    correction: &[f32; R],
    values: &[f32],
    visible: usize,
) {
    let head_dim = rows[0].out.len();
    let mut at = 0;
    while head_dim - at >= VECTORS * LANES {
        weigh_part::<V, R, VECTORS>(rows, weights, correction, values, visible, at);
        at += VECTORS * LANES;
    }
    while head_dim - at >= LANES {
        weigh_part::<V, R, 1>(rows, weights, correction, values, visible, at);
        at += LANES;
    }
    for i in at..head_dim {
        for r in 0..R {
            let mut sum = rows[r].out[i] * correction[r];
            for j in 0..visible {
                sum += weights[r][j] * values[j * head_dim + i];
            }
            rows[r].out[i] = sum;
        }
    }
}

/// [`weigh`] for `N` vectors of dimensions from `at` on.
#[inline(always)]
fn weigh_part<V: Vector, const R: usize, const N: usize>(
    rows: &mut [Row<'_>; R],
    weights: &[[f32; BLOCK]; R],
    correction: &[f32; R],
    values: &[f32],
    visible: usize,
    at: usize,
) {
    let head_dim = rows[0].out.len();
    let mut sums = [[V::splat(0.0); N]; R];
    for r in 0..R {
        let out = rows[r].out[at..at + N * LANES].as_chunks::<LANES>().0;
        for v in 0..N {
            sums[r][v] = V::load(&out[v]).mul(V::splat(correction[r]));
        }
    }
    for j in 0..visible {
        let row = values[j * head_dim + at..j * head_dim + at + N * LANES].as_chunks::<LANES>().0;
        let row: [V; N] = std::array::from_fn(|v| V::load(&row[v]));
        for r in 0..R {
            let weight = V::splat(weights[r][j]);
            for v in 0..N {
                sums[r][v] = weight.mul_add(row[v], sums[r][v]);
            }
        }
    }
    for r in 0..R {
        let out = rows[r].out[at..at + N * LANES].as_chunks_mut::<LANES>().0;
        for v in 0..N {
            sums[r][v].store(&mut out[v]);
        }
    }
}
