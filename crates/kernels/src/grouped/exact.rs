//! Products of grouped weights with activations in single precision: the reference for those in int8.

use super::product::{Write, by_blocks, one_part};
use super::{Block, BlockScales, GroupedKind, GroupedMatrix, GroupedProduct, ROWS};
use crate::Isa;
use crate::isa::vectorized;
use crate::lanes::{LANES, Lanes};
use crate::vector::Vector;

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

/// All tokens' sums of a block of rows.
fn multiply(weights: &GroupedMatrix, block: usize, x: &[f32], totals: &mut [Lanes]) {
    product(Isa::detect(), weights, block, x, totals);
}

vectorized! {
    fn product(isa: Isa, weights: &GroupedMatrix, block: usize, x: &[f32], totals: &mut [Lanes]) = product_body;
}

#[inline(always)]
fn product_body<V: Vector>(weights: &GroupedMatrix, block: usize, x: &[f32], totals: &mut [Lanes]) {
    match weights.kind {
        GroupedKind::Ternary => tiles::<V, 2>(weights, block, x, totals),
        GroupedKind::Binary => tiles::<V, 1>(weights, block, x, totals),
    }
}

#[inline(always)]
fn tiles<V: Vector, const BITS: u32>(weights: &GroupedMatrix, block: usize, x: &[f32], totals: &mut [Lanes]) {
    const { assert!(ROWS == LANES) };
    let (cols, block) = (weights.cols, weights.block(block));
    let mut first = 0;
    while V::TOKENS >= 4 && totals.len() - first >= 4 {
        tile::<V, BITS, 4>(&block, cols, &x[first * cols..], &mut totals[first..]);
        first += 4;
    }
    while V::TOKENS >= 2 && totals.len() - first >= 2 {
        tile::<V, BITS, 2>(&block, cols, &x[first * cols..], &mut totals[first..]);
        first += 2;
    }
    while first < totals.len() {
        tile::<V, BITS, 1>(&block, cols, &x[first * cols..], &mut totals[first..]);
        first += 1;
    }
}

/// The sums of `T` tokens. Codes become floats as they are multiplied.
#[inline(always)]
fn tile<V: Vector, const BITS: u32, const T: usize>(
    block: &Block<'_>,
    cols: usize,
    x: &[f32],
    totals: &mut [Lanes],
) {
    let word = 32 / BITS as usize;
    let x: [&[f32]; T] = std::array::from_fn(|t| &x[t * cols..(t + 1) * cols]);
    let mut all = [V::splat(0.0); T];
    for (g, lines) in block.codes.chunks_exact(block.lines).enumerate() {
        let mut sums = [[V::splat(0.0); CHAINS]; T];
        for (l, line) in lines.iter().enumerate() {
            let first = (g * block.lines + l) * word;
            let x = x.map(|x| &x[first..first + word]);
            for column in (0..word).step_by(CHAINS) {
                for c in 0..CHAINS {
                    let weights = V::weights::<BITS>(line, (column + c) as u32);
                    for t in 0..T {
                        sums[t][c] = weights.mul_add(V::splat(x[t][column + c]), sums[t][c]);
                    }
                }
            }
        }
        let scales = match block.scales {
            BlockScales::F16(scales) => V::load_halves(&scales[g]),
            BlockScales::F32(scales) => V::load(&scales[g]),
        };
        for (all, [a, b, c, d]) in all.iter_mut().zip(sums) {
            *all = a.add(b).add(c.add(d)).mul_add(scales, *all);
        }
    }
    for (total, all) in totals.iter_mut().zip(all) {
        all.store(total);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WeightsError;
    use crate::vector::Portable;

    /// The same sums without vectors, in the same order.
    fn by_hand(weights: &GroupedMatrix, row: usize, x: &[f32]) -> f32 {
        let mut values = vec![0.0; weights.cols];
        weights.row(row, &mut values);
        let mut total = 0.0f32;
        for (g, x) in x.chunks_exact(weights.group).enumerate() {
            let scale = weights.scale(row, g);
            let mut sums = [0.0f32; CHAINS];
            for (i, x) in x.iter().enumerate() {
                let value = values[g * weights.group + i];
                let weight = if scale == 0.0 { 0.0 } else { value / scale };
                sums[i % CHAINS] = weight.mul_add(*x, sums[i % CHAINS]);
            }
            total = ((sums[0] + sums[1]) + (sums[2] + sums[3])).mul_add(scale, total);
        }
        total
    }

    /// Every set of instructions, fused, gives the bits of the reference, whatever the tokens beside.
    #[test]
    fn all_instructions_give_the_same_bits() {
        let mut state = 7u32;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        for kind in [GroupedKind::Ternary, GroupedKind::Binary] {
            for (group, halves) in [(64, true), (128, true), (128, false), (256, false)] {
                let (rows, cols) = (37, 2 * 256);
                let codes: Vec<u32> = (0..rows * cols / kind.word())
                    .map(|_| {
                        let word = next() << 8 ^ next();
                        if kind == GroupedKind::Ternary { word & !(word << 1 & 0xaaaa_aaaa) } else { word }
                    })
                    .collect();
                let fill = |row: usize, words: &mut [u32], scales: &mut [f32]| {
                    words.copy_from_slice(&codes[row * words.len()..(row + 1) * words.len()]);
                    for (g, scale) in scales.iter_mut().enumerate() {
                        let value = 0.5 + (row * 31 + g * 7) as f32 / 1000.0;
                        *scale = if halves { half::f16::from_f32(value).to_f32() } else { value };
                    }
                    Ok::<(), WeightsError>(())
                };
                let weights = GroupedMatrix::new(kind, [rows, cols], group, fill).unwrap();
                assert_eq!(weights.has_f16_scales(), halves);
                for tokens in [1, 2, 3, 4, 5, 11] {
                    let x: Vec<f32> = (0..tokens * cols).map(|_| next() as f32 / 8e6 - 1.0).collect();
                    for block in 0..weights.blocks() {
                        let mut expected = vec![[0.0; ROWS]; tokens];
                        product_body::<Portable<true>>(&weights, block, &x, &mut expected);
                        for (lane, row) in weights.rows_of(block).enumerate() {
                            for (total, x) in expected.iter().zip(x.chunks_exact(cols)) {
                                assert_eq!(total[lane], by_hand(&weights, row, x), "{kind:?}, row {row}");
                            }
                        }
                        for isa in Isa::available().into_iter().filter(|isa| *isa != Isa::Scalar) {
                            let mut found = vec![[f32::NAN; ROWS]; tokens];
                            product(isa, &weights, block, &x, &mut found);
                            assert!(found == expected, "{isa} {kind:?} {group} {tokens}");
                        }
                    }
                }
            }
        }
    }
}
