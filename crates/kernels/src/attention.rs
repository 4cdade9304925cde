//! Causal grouped-query attention over a KV cache of blocks.
//!
//! Keys lie with the positions side by side and values with the dimensions side by side, so that both products run
//! along vectors and neither adds up lanes. The softmax is computed block by block with a running maximum; blocks stand
//! at fixed positions, so a token's result has the same bits whatever tokens are computed with it.

mod blocks;
mod float;
mod int8;

use blocks::Blocks;
pub use blocks::{Int8Block, KvBlocks};
use rayon::prelude::*;

use crate::{Isa, isa::vectorized, lanes::LANES, vector::Vector};

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
/// Queries and `out` are `[tokens, heads, head_dim]`; the blocks hold the positions in order.
///
/// # Panics
/// If the lengths do not agree with the shape.
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
    let width = heads * head_dim;
    assert!(width > 0 && kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads over {kv_heads}");
    assert!(q.len() == out.len() && q.len().is_multiple_of(width), "lengths of queries and output");
    let tokens = q.len() / width;
    let blocks = (past + tokens).div_ceil(BLOCK);
    assert!(kv.are(blocks, kv_heads, head_dim), "blocks of the KV cache");
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
    tasks.par_iter_mut().with_min_len(fewest).for_each(run);
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

#[inline(always)]
fn tiles<V: Vector, B: Blocks>(shape: &Attention, kv: B, task: &mut Task<'_>) {
    let (tiles, rest) = task.rows.as_chunks_mut::<TILE>();
    for rows in tiles {
        tile::<V, B, TILE>(shape, kv, task.kv_head, rows);
    }
    for row in rest {
        tile::<V, B, 1>(shape, kv, task.kv_head, std::array::from_mut(row));
    }
}

/// Rows in the order of their lengths, against the same head of keys and values.
#[inline(always)]
fn tile<V: Vector, B: Blocks, const R: usize>(
    shape: &Attention,
    kv: B,
    head: usize,
    rows: &mut [Row<'_>; R],
) {
    let mut largest = [f32::NEG_INFINITY; R];
    let mut total = [0.0f32; R];
    for row in rows.iter_mut() {
        row.out.fill(0.0);
    }
    let queries: [B::Query<'_>; R] = std::array::from_fn(|r| B::query::<V>(rows[r].q));
    let blocks = rows[R - 1].length.div_ceil(BLOCK);
    for block in 0..blocks {
        let scores = kv.scores::<V, R>(block, head, &queries);
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
        let mut out = rows.each_mut().map(|row| &mut *row.out);
        kv.weigh::<V, R>(block, head, &weights, &correction, visible, &mut out);
    }
    for (row, total) in rows.iter_mut().zip(total) {
        let factor = 1.0 / total;
        for x in row.out.iter_mut() {
            *x *= factor;
        }
    }
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
