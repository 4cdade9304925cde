//! Products of plain weights, for the head: half-precision weights are widened as they are read.
//!
//! Each output is one sum in 16 lanes, in the order of the columns, so it has the same bits in whatever tile it is
//! computed. Paths with and without fused multiply-adds differ by rounding.

use std::marker::PhantomData;

use crate::{
    Isa,
    isa::{multiversion, vectorized},
    lanes::{self, LANES, Lanes},
    matmul::has_room,
    team,
    vector::{Portable, Vector},
};

/// Rows and tokens of a tile: 16 vectors of sums.
const TILE: usize = 4;

const CACHE_LINE: usize = 64;

/// Rows that one task computes: enough to be worth it, and a multiple of [`TILE`].
const TASK_ROWS: usize = 256;

/// Whole vectors and what is left.
type Split<'a, T> = (&'a [[T; LANES]], &'a [T]);

/// A row-major matrix of plain weights as its little-endian bytes lie in the file, aligned or not.
#[derive(Debug, Clone, Copy)]
pub enum DenseRef<'a> {
    /// IEEE single precision.
    F32(&'a [u8]),
    /// IEEE half precision.
    F16(&'a [u8]),
    /// The upper half of a single.
    Bf16(&'a [u8]),
}

impl DenseRef<'_> {
    /// Number of weights.
    pub fn elements(&self) -> usize {
        match self {
            Self::F32(bytes) => bytes.len() / 4,
            Self::F16(bytes) | Self::Bf16(bytes) => bytes.len() / 2,
        }
    }

    /// Whether these are the weights of a matrix of this shape.
    fn is_matrix(&self, rows: usize, cols: usize) -> bool {
        cols > 0 && rows.checked_mul(cols) == Some(self.elements())
    }

    /// Row `index` of a matrix with rows as long as `out`, as singles.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        let at = index.checked_mul(out.len()).expect("the index of the row overflows");
        match self {
            Self::F32(bytes) => widen::<Single>(&bytes.as_chunks().0[at..], out),
            Self::F16(bytes) => widen::<Half<Portable<false>>>(&bytes.as_chunks().0[at..], out),
            Self::Bf16(bytes) => widen::<Brain>(&bytes.as_chunks().0[at..], out),
        }
    }
}

impl DenseRef<'_> {
    /// The rows from `first` on that each of `out`, one for each token, has room for.
    fn task(&self, first: usize, cols: usize, x: &[f32], out: &mut [&mut [f32]]) {
        match self {
            Self::F32(bytes) => singles(&bytes.as_chunks().0[first * cols..], x, cols, out),
            Self::F16(bytes) => halves(Isa::detect(), &bytes.as_chunks().0[first * cols..], x, cols, out),
            Self::Bf16(bytes) => brains(&bytes.as_chunks().0[first * cols..], x, cols, out),
        }
    }
}

fn widen<W: Weight>(weights: &[W::Bytes], out: &mut [f32]) {
    let weights = &weights[..out.len()];
    for (out, weight) in out.iter_mut().zip(weights) {
        *out = W::widen(*weight);
    }
}

/// A type of weights.
trait Weight {
    /// Its bytes, the lowest first.
    type Bytes: Copy + Sync;
    fn widen(bytes: Self::Bytes) -> f32;
    #[inline(always)]
    fn widen_all(bytes: &[Self::Bytes; LANES]) -> Lanes {
        let mut wide = [0.0; LANES];
        for i in 0..LANES {
            wide[i] = Self::widen(bytes[i]);
        }
        wide
    }
}

struct Single;
struct Half<V>(PhantomData<V>);
struct Brain;

impl Weight for Single {
    type Bytes = [u8; 4];
    #[inline(always)]
    fn widen(bytes: [u8; 4]) -> f32 {
        f32::from_le_bytes(bytes)
    }
}

impl<V: Vector> Weight for Half<V> {
    type Bytes = [u8; 2];
    #[inline(always)]
    fn widen(bytes: [u8; 2]) -> f32 {
        lanes::half(u16::from_le_bytes(bytes))
    }
    /// One or two instructions, which the compiler does not find by itself.
    #[inline(always)]
    fn widen_all(bytes: &[[u8; 2]; LANES]) -> Lanes {
        V::load_halves(&bytes.map(u16::from_le_bytes)).lanes()
    }
}

impl Weight for Brain {
    type Bytes = [u8; 2];
    #[inline(always)]
    fn widen(bytes: [u8; 2]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
    }
}

/// `out[t * stride + n] = sum_k w[n, k] * x[t, k]` for weights `[rows, cols]` and activations `[tokens, cols]`.
///
/// What lies in `out` between the rows of two tokens stays as it is.
///
/// # Panics
/// If `w` is not `rows * cols` weights, or `out` is too short for the last token.
pub fn dense_matmul(w: DenseRef<'_>, rows: usize, cols: usize, x: &[f32], out: &mut [f32], stride: usize) {
    assert!(w.is_matrix(rows, cols), "{} weights for {rows} x {cols}", w.elements());
    assert!(x.len().is_multiple_of(cols), "{} activations in rows of {cols}", x.len());
    by_rows(rows, x.len() / cols, out, stride, |first, out| w.task(first, cols, x, out));
}

/// Divides the rows of an output, `tokens` times `rows` with `stride` between, over the threads: `work` is called for
/// some rows with the number of the first and the places of all tokens.
pub(crate) fn by_rows(
    rows: usize,
    tokens: usize,
    out: &mut [f32],
    stride: usize,
    work: impl Fn(usize, &mut [&mut [f32]]) + Sync,
) {
    let Some(last) = tokens.checked_sub(1) else { return };
    assert!(has_room(out.len(), tokens, stride, rows), "the output is too short");
    // Each task has its own rows in the output of every token.
    let mut parts: Vec<Vec<&mut [f32]>> =
        (0..rows.div_ceil(TASK_ROWS)).map(|_| Vec::with_capacity(last + 1)).collect();
    for token in out.chunks_mut(stride).take(last + 1) {
        for (part, chunk) in parts.iter_mut().zip(token[..rows].chunks_mut(TASK_ROWS)) {
            part.push(chunk);
        }
    }
    team::for_each_mut(&mut parts, |i, out| work(i * TASK_ROWS, out));
}

/// Computes the part `part` of `of` of a [`dense_matmul`] on the calling thread; the parts together are the whole.
///
/// # Safety
/// `out` is valid for writes of `(x.len() / cols - 1) * stride + rows` floats, and what other threads write there
/// meanwhile are other parts of the same product, or what lies between the rows of two tokens.
///
/// # Panics
/// If `w` is not `rows * cols` weights, `stride` is less than `rows`, or `part` is not below `of`.
pub unsafe fn dense_matmul_part(
    w: DenseRef<'_>,
    (rows, cols): (usize, usize),
    x: &[f32],
    out: *mut f32,
    stride: usize,
    (part, of): (usize, usize),
) {
    assert!(w.is_matrix(rows, cols), "{} weights for {rows} x {cols}", w.elements());
    assert!(part < of && stride >= rows, "part {part} of {of}, {rows} rows in a stride of {stride}");
    let tiles = rows.div_ceil(TILE);
    let (first, last) = (tiles * part / of * TILE, (tiles * (part + 1) / of * TILE).min(rows));
    if first < last {
        // SAFETY: The caller promises the length, and that the rows of this part are nobody else's.
        let slice = |t| unsafe { std::slice::from_raw_parts_mut(out.add(t * stride + first), last - first) };
        let mut out: Vec<&mut [f32]> = (0..x.len() / cols).map(slice).collect();
        w.task(first, cols, x, &mut out);
    }
}

multiversion! {
    pub(crate) fn singles(w: &[[u8; 4]], x: &[f32], cols: usize, out: &mut [&mut [f32]]) = singles_body;
}
vectorized! {
    fn halves(isa: Isa, w: &[[u8; 2]], x: &[f32], cols: usize, out: &mut [&mut [f32]]) = halves_body;
}
multiversion! {
    pub(crate) fn brains(w: &[[u8; 2]], x: &[f32], cols: usize, out: &mut [&mut [f32]]) = brains_body;
}

#[inline(always)]
pub(crate) fn singles_body<const FMA: bool>(w: &[[u8; 4]], x: &[f32], cols: usize, out: &mut [&mut [f32]]) {
    task::<Single, FMA>(w, x, cols, out);
}

#[inline(always)]
fn halves_body<V: Vector>(w: &[[u8; 2]], x: &[f32], cols: usize, out: &mut [&mut [f32]]) {
    if V::FUSED {
        task::<Half<V>, true>(w, x, cols, out);
    } else {
        task::<Half<V>, false>(w, x, cols, out);
    }
}

#[inline(always)]
pub(crate) fn brains_body<const FMA: bool>(w: &[[u8; 2]], x: &[f32], cols: usize, out: &mut [&mut [f32]]) {
    task::<Brain, FMA>(w, x, cols, out);
}

/// All tokens for the rows that each of `out` has room for.
#[inline(always)]
fn task<W: Weight, const FMA: bool>(w: &[W::Bytes], x: &[f32], cols: usize, out: &mut [&mut [f32]]) {
    let Some(rows) = out.first().map(|out| out.len()) else { return };
    let mut row = 0;
    while row < rows {
        if rows - row >= TILE {
            tokens::<W, TILE, FMA>(&w[row * cols..], x, cols, row, out);
            row += TILE;
        } else {
            tokens::<W, 1, FMA>(&w[row * cols..], x, cols, row, out);
            row += 1;
        }
    }
}

/// All tokens for `R` rows, which stay in the first-level cache meanwhile.
#[inline(always)]
fn tokens<W: Weight, const R: usize, const FMA: bool>(
    w: &[W::Bytes],
    x: &[f32],
    cols: usize,
    row: usize,
    out: &mut [&mut [f32]],
) {
    let count = out.len();
    let mut token = 0;
    while token < count {
        let x = &x[token * cols..];
        if count - token >= TILE {
            tile::<W, R, TILE, FMA>(w, x, cols, row, &mut out[token..token + TILE]);
            token += TILE;
        } else {
            tile::<W, R, 1, FMA>(w, x, cols, row, &mut out[token..=token]);
            token += 1;
        }
    }
}

#[inline(always)]
fn tile<W: Weight, const R: usize, const T: usize, const FMA: bool>(
    w: &[W::Bytes],
    x: &[f32],
    cols: usize,
    row: usize,
    out: &mut [&mut [f32]],
) {
    let weights: [Split<'_, W::Bytes>; R] =
        std::array::from_fn(|r| w[r * cols..(r + 1) * cols].as_chunks::<LANES>());
    let inputs: [Split<'_, f32>; T] =
        std::array::from_fn(|t| x[t * cols..(t + 1) * cols].as_chunks::<LANES>());
    let mut sums = [[[0.0; LANES]; T]; R];
    let steps_per_line = (CACHE_LINE / (LANES * size_of::<W::Bytes>())).max(1);
    for k in 0..cols / LANES {
        // The streams of several rows are more than the hardware's prefetching follows: each line is asked for while the
        // same place of the rows before is computed.
        if k % steps_per_line == 0 {
            for r in 0..R {
                lanes::prefetch(w.as_ptr().wrapping_add((R + r) * cols + k * LANES));
            }
        }
        for r in 0..R {
            let wide = W::widen_all(&weights[r].0[k]);
            for t in 0..T {
                lanes::accumulate::<FMA>(&mut sums[r][t], &wide, &inputs[t].0[k]);
            }
        }
    }
    for r in 0..R {
        for t in 0..T {
            let mut lanes = sums[r][t];
            for (lane, (w, x)) in lanes.iter_mut().zip(weights[r].1.iter().zip(inputs[t].1)) {
                *lane = lanes::mul_add::<FMA>(W::widen(*w), *x, *lane);
            }
            out[t][row + r] = lanes::sum(lanes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_halves_are_widened_exactly() {
        for bits in 0..=u16::MAX {
            let theirs = half::f16::from_bits(bits).to_f32();
            let mut all = vec![lanes::half(bits)];
            for isa in Isa::available() {
                // One such weight among zeros.
                let mut weights = [[0; 2]; LANES];
                weights[bits as usize % LANES] = bits.to_le_bytes();
                let mut product = [0.0];
                halves(isa, &weights, &[1.0; LANES], LANES, &mut [&mut product[..]]);
                all.extend(product);
            }
            for ours in all {
                assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "{bits:#06x}: {ours} {theirs}");
            }
            let (ours, theirs) = (Brain::widen(bits.to_le_bytes()), half::bf16::from_bits(bits).to_f32());
            assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "{bits:#06x}: {ours} {theirs}");
        }
    }

    #[test]
    fn products_with_halves_are_those_with_singles_on_all_instructions() {
        let (rows, cols, tokens) = (6, 70, 5);
        let halves: Vec<half::f16> =
            (0..rows * cols).map(|i| half::f16::from_f32((i * 7919 % 2003) as f32 / 1001.0 - 1.0)).collect();
        let x: Vec<f32> = (0..tokens * cols).map(|i| (i * 31 % 17) as f32 - 8.0).collect();
        let products = |isa| {
            let bytes: Vec<[u8; 2]> = halves.iter().map(|half| half.to_le_bytes()).collect();
            let mut out = vec![0.0; tokens * rows];
            super::halves(isa, &bytes, &x, cols, &mut out.chunks_mut(rows).collect::<Vec<_>>());
            out
        };
        let singles: Vec<u8> = halves.iter().flat_map(|half| half.to_f32().to_le_bytes()).collect();
        let mut expected = vec![0.0; tokens * rows];
        dense_matmul(DenseRef::F32(&singles), rows, cols, &x, &mut expected, rows);
        for isa in Isa::available() {
            let found = products(isa);
            if isa == Isa::detect() {
                assert_eq!(found, expected, "{isa}");
            }
            let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4;
            assert!(found.iter().zip(&expected).all(close), "{isa}: {found:?} {expected:?}");
        }
    }
}
