//! Causal grouped-query attention over a KV cache of blocks.
//!
//! Keys lie with the positions side by side and values with the dimensions side by side, so that both products run
//! along vectors and neither adds up lanes. The softmax is computed block by block with a running maximum; blocks stand
//! at fixed positions, so a token's result has the same bits whatever tokens are computed with it.

use rayon::prelude::*;

use crate::{
    isa::multiversion,
    lanes::{self, LANES, Lanes},
};

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

multiversion! {
    fn run(shape: &Attention, keys: &[&[f32]], values: &[&[f32]], task: &mut Task<'_>) = run_body;
}

#[inline(always)]
fn run_body<const FMA: bool>(shape: &Attention, keys: &[&[f32]], values: &[&[f32]], task: &mut Task<'_>) {
    let plane = BLOCK * shape.head_dim;
    let part = task.kv_head * plane..(task.kv_head + 1) * plane;
    let (tiles, rest) = task.rows.as_chunks_mut::<TILE>();
    for rows in tiles {
        tile::<TILE, FMA>(shape, keys, values, part.clone(), rows);
    }
    for row in rest {
        tile::<1, FMA>(shape, keys, values, part.clone(), std::array::from_mut(row));
    }
}

/// Rows in the order of their lengths, against the same head of keys and values.
#[inline(always)]
fn tile<const R: usize, const FMA: bool>(
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
        let mut weights = scores::<R, FMA>(rows, &keys[block][part.clone()]);
        let mut correction = [1.0f32; R];
        for r in 0..R {
            let visible = rows[r].length.saturating_sub(block * BLOCK).min(BLOCK);
            if visible == 0 {
                weights[r] = [[0.0; LANES]; VECTORS];
                continue;
            }
            let mut most = [f32::NEG_INFINITY; LANES];
            for (v, lanes) in weights[r].iter_mut().enumerate() {
                for i in 0..LANES {
                    let score =
                        if v * LANES + i < visible { lanes[i] * shape.scale } else { f32::NEG_INFINITY };
                    lanes[i] = score;
                    most[i] = if score > most[i] { score } else { most[i] };
                }
            }
            let new = largest[r].max(lanes::max(most));
            correction[r] = lanes::exp::<FMA>(largest[r] - new);
            largest[r] = new;
            let mut sum = [0.0; LANES];
            for lanes in &mut weights[r] {
                for i in 0..LANES {
                    lanes[i] = lanes::exp::<FMA>(lanes[i] - new);
                    sum[i] += lanes[i];
                }
            }
            total[r] = lanes::mul_add::<FMA>(total[r], correction[r], lanes::sum(sum));
        }
        let visible = (rows[R - 1].length - block * BLOCK).min(BLOCK);
        weigh::<R, FMA>(rows, &weights, &correction, &values[block][part.clone()], visible);
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
fn scores<const R: usize, const FMA: bool>(rows: &[Row<'_>; R], keys: &[f32]) -> [[Lanes; VECTORS]; R] {
    let mut sums = [[[0.0; LANES]; VECTORS]; R];
    for (d, keys) in keys.as_chunks::<BLOCK>().0.iter().enumerate() {
        let keys = keys.as_chunks::<LANES>().0;
        for r in 0..R {
            let q = [rows[r].q[d]; LANES];
            for v in 0..VECTORS {
                lanes::accumulate::<FMA>(&mut sums[r][v], &q, &keys[v]);
            }
        }
    }
    sums
}

/// `out = out * correction + weights * values`, over the first `visible` positions of a block, `[BLOCK, head_dim]`.
#[inline(always)]
fn weigh<const R: usize, const FMA: bool>(
    rows: &mut [Row<'_>; R],
    weights: &[[Lanes; VECTORS]; R],
    correction: &[f32; R],
    values: &[f32],
    visible: usize,
) {
    let head_dim = rows[0].out.len();
    let mut at = 0;
    while head_dim - at >= VECTORS * LANES {
        weigh_part::<R, VECTORS, FMA>(rows, weights, correction, values, visible, at);
        at += VECTORS * LANES;
    }
    while head_dim - at >= LANES {
        weigh_part::<R, 1, FMA>(rows, weights, correction, values, visible, at);
        at += LANES;
    }
    for i in at..head_dim {
        for r in 0..R {
            let mut sum = rows[r].out[i] * correction[r];
            for j in 0..visible {
                sum = lanes::mul_add::<FMA>(weights[r][j / LANES][j % LANES], values[j * head_dim + i], sum);
            }
            rows[r].out[i] = sum;
        }
    }
}

/// [`weigh`] for `V` vectors of dimensions from `at` on.
#[inline(always)]
fn weigh_part<const R: usize, const V: usize, const FMA: bool>(
    rows: &mut [Row<'_>; R],
    weights: &[[Lanes; VECTORS]; R],
    correction: &[f32; R],
    values: &[f32],
    visible: usize,
    at: usize,
) {
    let head_dim = rows[0].out.len();
    let mut sums = [[[0.0; LANES]; V]; R];
    for r in 0..R {
        let out = rows[r].out[at..at + V * LANES].as_chunks::<LANES>().0;
        for v in 0..V {
            for i in 0..LANES {
                sums[r][v][i] = out[v][i] * correction[r];
            }
        }
    }
    for j in 0..visible {
        let row = values[j * head_dim + at..j * head_dim + at + V * LANES].as_chunks::<LANES>().0;
        for r in 0..R {
            let weight = [weights[r][j / LANES][j % LANES]; LANES];
            for v in 0..V {
                lanes::accumulate::<FMA>(&mut sums[r][v], &weight, &row[v]);
            }
        }
    }
    for r in 0..R {
        let out = rows[r].out[at..at + V * LANES].as_chunks_mut::<LANES>().0;
        out.copy_from_slice(&sums[r]);
    }
}
