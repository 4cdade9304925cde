//! Products of grouped weights with activations in single precision: the reference for those in int8.

use super::product::{Write, by_blocks, one_part};
use super::{Block, GroupedKind, GroupedMatrix, GroupedProduct, MAX_GROUP, ROWS};
use crate::isa::multiversion;
use crate::lanes::{self, LANES, Lanes};

/// Tokens that are multiplied together.
const TILE: usize = 4;

/// Sums of a token, since each addition waits for the one before.
const CHAINS: usize = 4;

/// [`grouped_matmul`](super::grouped_matmul) of activations `[tokens, cols]` as they are.
///
/// Each output is one sum in one order, whatever the tokens beside it and the threads. Paths with and without fused
/// multiply-adds differ by rounding.
///
/// # Panics
/// If the widths of the weights differ, `x` is no whole number of tokens, the rows of a product begin before those of the one
/// before it end, or `out` is too short for the last token.
pub fn grouped_matmul_f32(products: &[GroupedProduct<'_>], x: &[f32], out: &mut [f32], stride: usize) {
    let Some(cols) = products.first().map(|product| product.weights.cols) else { return };
    assert!(products.iter().all(|p| p.weights.cols == cols), "products of different widths");
    assert!(x.len().is_multiple_of(cols), "{} activations in rows of {cols}", x.len());
    let tokens = x.len() / cols;
    by_blocks(products, tokens, out, stride, |weights, block, write| {
        let mut totals = vec![[0.0; ROWS]; tokens];
        multiply(weights, block, x, &mut totals);
        totals.iter().enumerate().for_each(|(token, totals)| write(token, totals));
    });
}

/// Computes a part of a [`grouped_matmul_f32`] with one matrix on the calling thread, as
/// [`grouped_matmul_part`](super::grouped_matmul_part) does.
///
/// # Safety
/// As there.
///
/// # Panics
/// As there, and if `x` is no whole number of tokens.
pub unsafe fn grouped_matmul_f32_part(
    weights: &GroupedMatrix,
    x: &[f32],
    out: *mut f32,
    stride: usize,
    part: (usize, usize),
) {
    assert!(x.len().is_multiple_of(weights.cols), "{} activations in rows of {}", x.len(), weights.cols);
    let tokens = x.len() / weights.cols;
    let work = |weights: &GroupedMatrix, block, write: &Write<'_>| {
        let mut totals = vec![[0.0; ROWS]; tokens];
        multiply(weights, block, x, &mut totals);
        totals.iter().enumerate().for_each(|(token, totals)| write(token, totals));
    };
    // SAFETY: The caller's promise.
    unsafe { one_part(weights, tokens, out, stride, part, work) };
}

multiversion! {
    fn multiply(weights: &GroupedMatrix, block: usize, x: &[f32], totals: &mut [[f32; ROWS]]) = multiply_body;
}

#[inline(always)]
fn multiply_body<const FMA: bool>(
    weights: &GroupedMatrix,
    block: usize,
    x: &[f32],
    totals: &mut [[f32; ROWS]],
) {
    const { assert!(ROWS == LANES) };
    let (cols, group, block) = (weights.cols, weights.group, weights.block(block));
    let mut wide = [[0.0; ROWS]; MAX_GROUP];
    let wide = &mut wide[..group];
    for g in 0..cols / group {
        match weights.kind {
            GroupedKind::Ternary => widen_ternary(&block, g, wide),
            GroupedKind::Binary => widen_binary(&block, g, wide),
        }
        let scales = block.scales.of(g);
        let x = |token: usize| &x[token * cols + g * group..][..group];
        let (tiles, rest) = totals.as_chunks_mut::<TILE>();
        for (i, totals) in tiles.iter_mut().enumerate() {
            tile::<TILE, FMA>(wide, std::array::from_fn(|t| x(TILE * i + t)), &scales, totals);
        }
        for (i, total) in rest.iter_mut().enumerate() {
            tile::<1, FMA>(wide, [x(TILE * tiles.len() + i)], &scales, std::array::from_mut(total));
        }
    }
}

#[inline(always)]
fn tile<const T: usize, const FMA: bool>(
    wide: &[Lanes],
    x: [&[f32]; T],
    scales: &Lanes,
    totals: &mut [Lanes; T],
) {
    let mut sums = [[[0.0; LANES]; CHAINS]; T];
    let wide = wide.as_chunks::<CHAINS>().0;
    let x = x.map(|x| &x.as_chunks::<CHAINS>().0[..wide.len()]);
    for (k, wide) in wide.iter().enumerate() {
        for t in 0..T {
            for c in 0..CHAINS {
                lanes::accumulate::<FMA>(&mut sums[t][c], &wide[c], &[x[t][k][c]; LANES]);
            }
        }
    }
    for (total, [a, b, c, d]) in totals.iter_mut().zip(sums) {
        let sum = std::array::from_fn(|i| (a[i] + b[i]) + (c[i] + d[i]));
        lanes::accumulate::<FMA>(total, &sum, scales);
    }
}

/// The weights of a group, column by column.
#[inline(always)]
fn widen_ternary(block: &Block<'_>, g: usize, wide: &mut [[f32; ROWS]]) {
    for (line, wide) in block.codes[g * block.lines..].iter().zip(wide.as_chunks_mut::<16>().0) {
        let words = line.words();
        for (k, wide) in wide.iter_mut().enumerate() {
            *wide = words.map(|word| ((word >> (2 * k) & 3) as i32 - 1) as f32);
        }
    }
}

#[inline(always)]
fn widen_binary(block: &Block<'_>, g: usize, wide: &mut [[f32; ROWS]]) {
    for (line, wide) in block.codes[g * block.lines..].iter().zip(wide.as_chunks_mut::<32>().0) {
        let words = line.words();
        for (k, wide) in wide.iter_mut().enumerate() {
            *wide = words.map(|word| (2 * (word >> k & 1) as i32 - 1) as f32);
        }
    }
}
