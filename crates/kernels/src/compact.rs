//! A copy of plain weights in 8 or 4 bits, for a head that is read whole for every token: what memory bounds gets faster
//! by the bytes that are saved. The activations are rounded to int8 as for ternary weights, so that a product is a sum of
//! integers for each group of columns.
//!
//! In 8 bits a row is one group, with one scale. In 4 bits a group is 128 columns; their 64 bytes hold the first 64
//! columns in the lower and the other 64 in the upper halves.

use std::ops::Range;
use std::sync::OnceLock;

use crate::{
    DenseRef, Isa, Quantized, dense,
    isa::multiversion,
    lanes::{self, LANES},
    quantize::{Line, round},
    team,
};

/// Bytes that are multiplied at a time, and columns that a row is filled up to a multiple of.
pub(crate) const BLOCK: usize = Line::BYTES;

/// Rows that are rounded together.
const PIECE: usize = 64;

/// How many bits a weight is rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CompactBits {
    /// A scale for each row: the largest weight of it becomes 127.
    Eight,
    /// A scale for each 128 columns of a row: the largest weight among them becomes -8.
    Four,
}

impl CompactBits {
    /// What is added to a weight, so that codes are unsigned.
    fn offset(self) -> i32 {
        match self {
            Self::Eight => 128,
            Self::Four => 8,
        }
    }

    /// Columns that are stored for a row of `cols`.
    fn padded(self, cols: usize) -> usize {
        match self {
            Self::Eight => cols.next_multiple_of(BLOCK),
            Self::Four => cols.next_multiple_of(2 * BLOCK),
        }
    }

    /// Bytes of a row, and its groups.
    fn row(self, cols: usize) -> (usize, usize) {
        let padded = self.padded(cols);
        match self {
            Self::Eight => (padded, 1),
            Self::Four => (padded / 2, padded / (2 * BLOCK)),
        }
    }

    /// Bytes that `rows` rows of `cols` weights take.
    pub fn bytes(self, rows: usize, cols: usize) -> usize {
        let (bytes, groups) = self.row(cols);
        rows * (bytes + groups * size_of::<f32>())
    }
}

/// A matrix `[rows, cols]` of rounded weights.
#[derive(Debug, Clone)]
pub struct CompactMatrix {
    bits: CompactBits,
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    /// Of each row those of its groups.
    scales: Vec<f32>,
}

impl CompactMatrix {
    /// Rounds what `read` fills in for ranges of rows, `cols` weights each. Divided over the threads of the caller's
    /// [`Team`](crate::Team), so that `read` is called by several of them.
    ///
    /// # Errors
    /// The first of `read`, for whichever rows.
    pub fn new<E: Send>(
        bits: CompactBits,
        rows: usize,
        cols: usize,
        read: impl Fn(Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        Self::with_notes(bits, rows, cols, read, |_, _, _| ()).map(|(matrix, _)| matrix)
    }

    /// [`new`](Self::new) with what `note` makes of the weights, codes and scales of each row.
    pub(crate) fn with_notes<E: Send, N: Send + Default + Clone>(
        bits: CompactBits,
        rows: usize,
        cols: usize,
        read: impl Fn(Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
        note: impl Fn(&[f32], &[u8], &[f32]) -> N + Sync,
    ) -> Result<(Self, Vec<N>), E> {
        let mut notes = vec![N::default(); rows];
        let (width, groups) = bits.row(cols);
        let mut matrix =
            Self { bits, rows, cols, codes: vec![0; rows * width], scales: vec![0.0; rows * groups] };
        let codes = matrix.codes.chunks_mut(PIECE * width.max(1));
        let scales = matrix.scales.chunks_mut(PIECE * groups.max(1));
        let places = codes.zip(scales).zip(notes.chunks_mut(PIECE));
        let mut pieces: Vec<_> =
            places.map(|((codes, scales), notes)| (codes, scales, notes, Ok(()))).collect();
        team::for_each_mut(&mut pieces, |i, (codes, scales, notes, outcome)| {
            let first = i * PIECE;
            let mut weights = vec![0.0; PIECE.min(rows - first) * cols];
            *outcome = read(first..first + weights.len() / cols, &mut weights);
            let places = codes.chunks_exact_mut(width).zip(scales.chunks_exact_mut(groups));
            for ((row, (codes, scales)), noted) in weights.chunks_exact(cols).zip(places).zip(&mut **notes) {
                match bits {
                    CompactBits::Eight => round_to_8(row, codes, &mut scales[0]),
                    CompactBits::Four => round_to_4(row, codes, scales),
                }
                *noted = note(row, codes, scales);
            }
        });
        pieces.into_iter().try_for_each(|(.., outcome)| outcome)?;
        Ok((matrix, notes))
    }

    /// [`new`](Self::new) of weights in memory.
    ///
    /// # Panics
    /// If `w` is not `rows * cols` weights.
    pub fn of(bits: CompactBits, w: DenseRef<'_>, rows: usize, cols: usize) -> Self {
        assert_eq!(Some(w.elements()), rows.checked_mul(cols), "weights for {rows} x {cols}");
        let read = |range: Range<usize>, out: &mut [f32]| -> Result<(), std::convert::Infallible> {
            range.zip(out.chunks_exact_mut(cols)).for_each(|(row, out)| w.row(row, out));
            Ok(())
        };
        let Ok(matrix) = Self::new(bits, rows, cols, read);
        matrix
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.codes.len() + size_of_val(&self.scales[..])
    }

    /// `out[t * stride + n]` is about `sum_k w[n, k] * x[t, k]`, as [`dense_matmul`](crate::dense_matmul).
    ///
    /// # Panics
    /// If `x` is no whole number of tokens, or `out` is too short for the last one.
    pub fn matmul(&self, x: &[f32], out: &mut [f32], stride: usize) {
        self.matmul_with(Isa::detect(), x, out, stride);
    }

    /// [`matmul`](Self::matmul) with given instructions, for tests and measurements.
    ///
    /// # Panics
    /// As there, and if the CPU does not have them.
    pub fn matmul_with(&self, isa: Isa, x: &[f32], out: &mut [f32], stride: usize) {
        assert!(x.len().is_multiple_of(self.cols), "{} activations in rows of {}", x.len(), self.cols);
        let inputs = Inputs::new(self.bits, x, self.cols);
        dense::by_rows(self.rows, inputs.factors.len(), out, stride, |first, out| {
            self.compute(isa, first, &inputs, out);
        });
    }

    /// The products of the rows from `first` on that each of `out`, one for each token, has room for.
    ///
    /// # Panics
    /// If the CPU does not have the instructions.
    pub(crate) fn compute(&self, isa: Isa, first: usize, inputs: &Inputs, out: &mut [&mut [f32]]) {
        assert!(isa.is_available(), "this CPU has no {isa}");
        let task = Task { matrix: self, first, inputs };
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: The CPU has these instructions, as was asserted.
            Isa::Amx if out.len() >= crate::x86::amx::FEWEST && self.bits == CompactBits::Eight => unsafe {
                crate::x86::amx::compact::run(&task, out);
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: As above.
            Isa::Avx512Vnni | Isa::Amx => unsafe { crate::x86::compact::run(&task, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: As above.
            Isa::Avx2 | Isa::AvxVnni => unsafe { crate::x86::compact_avx2::run(&task, out) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: As above.
            Isa::NeonDot | Isa::NeonI8mm => unsafe { crate::aarch64::compact::run(&task, out) },
            Isa::Scalar => portable_body::<{ cfg!(target_feature = "fma") }>(&task, out),
            _ => portable(&task, out),
        }
    }
}

/// What one task computes: the rows from `first` on that the output has room for, for all tokens.
pub(crate) struct Task<'a> {
    matrix: &'a CompactMatrix,
    first: usize,
    pub(crate) inputs: &'a Inputs,
}

impl<'a> Task<'a> {
    pub(crate) fn bits(&self) -> CompactBits {
        self.matrix.bits
    }

    /// Another task for the rows from `row` on, counted from the first of this one.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "tiles of AMX"))]
    pub(crate) fn behind(&self, row: usize) -> Self {
        Self { first: self.first + row, ..*self }
    }

    /// The codes and scales of a row, counted from the first of the task.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> (&'a [[u8; BLOCK]], &'a [f32]) {
        let (width, groups) = self.matrix.bits.row(self.matrix.cols);
        let row = self.first + row;
        let codes = &self.matrix.codes[row * width..(row + 1) * width];
        (codes.as_chunks().0, &self.matrix.scales[row * groups..(row + 1) * groups])
    }
}

/// Calls `tile::<T>` with the first of its tokens and the outputs of its tokens, for tiles of `TILE` tokens and what is left,
/// one of the counts. No function, since `tile` is compiled for instructions that a function here does not have.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! by_tiles {
    ($tile:ident, [$($count:literal),*], $most:expr, $task:expr, $out:expr) => {
        let mut token = 0;
        for out in $out.chunks_mut($most) {
            match out.len() {
                $($count => $tile::<$count>($task, token, out),)*
                _ => $tile::<{ $most }>($task, token, out),
            }
            token += out.len();
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) use by_tiles;

/// Activations as the products take them.
pub(crate) struct Inputs {
    values: Vec<Line>,
    /// For each token and group, lane by lane: the sum of the activations times what the codes are too large by, with
    /// the sign changed. The sum of a group begins with it.
    starts: Vec<[i32; LANES]>,
    /// What the sum of a token is multiplied by.
    factors: Vec<f32>,
    /// What [`tiles`](Self::tiles) has made.
    tiles: OnceLock<Vec<Line>>,
}

impl Inputs {
    fn new(bits: CompactBits, x: &[f32], cols: usize) -> Self {
        let mut rounded = Quantized::default();
        rounded.quantize(x, cols);
        Self::of(bits, &[&rounded], cols)
    }

    /// Of activations that are rounded already, the tokens of one after those of the other.
    pub(crate) fn of(bits: CompactBits, rounded: &[&Quantized], cols: usize) -> Self {
        let (padded, groups) = (bits.padded(cols), bits.row(cols).1);
        let tokens = || rounded.iter().flat_map(|rounded| (0..rounded.tokens()).map(move |t| (*rounded, t)));
        let mut values = vec![Line::EMPTY; tokens().count() * padded / BLOCK];
        for (padded, (rounded, t)) in Line::bytes_mut(&mut values).chunks_exact_mut(padded).zip(tokens()) {
            padded[..cols].copy_from_slice(rounded.values(t));
        }
        let starts = values.chunks_exact(padded / BLOCK / groups).map(|group| {
            let mut start = [0; LANES];
            for (lane, values) in group.iter().flat_map(|block| block.0.as_chunks::<4>().0.iter().enumerate())
            {
                start[lane] -= bits.offset() * values.iter().map(|v| i32::from(*v)).sum::<i32>();
            }
            start
        });
        let starts = starts.collect();
        let factors = tokens().map(|(rounded, t)| 1.0 / rounded.scale(t)).collect();
        Self { values, starts, factors, tiles: OnceLock::new() }
    }

    /// The values of each 16 tokens and 64 columns as a tile of 16 lines: line `j` has columns `4 * j..4 * j + 4` of each token.
    /// Those of all columns lie together.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "tiles of AMX"))]
    pub(crate) fn tiles(&self) -> &[Line] {
        const TOKENS: usize = BLOCK / 4;
        self.tiles.get_or_init(|| {
            let blocks = self.values.len() / self.factors.len();
            let mut tiles = vec![Line::EMPTY; self.factors.len().div_ceil(TOKENS) * blocks * TOKENS];
            for (token, values) in self.values.chunks_exact(blocks).enumerate() {
                let tiles = &mut tiles[token / TOKENS * blocks * TOKENS..];
                for (tile, values) in tiles.chunks_exact_mut(TOKENS).zip(values) {
                    for (line, word) in tile.iter_mut().zip(values.words()) {
                        line.set_word(token % TOKENS, word);
                    }
                }
            }
            tiles
        })
    }

    /// The blocks of values, the starts of the groups, and the factor of a token.
    #[inline(always)]
    pub(crate) fn token(&self, token: usize) -> (&[Line], &[[i32; LANES]], f32) {
        let tokens = self.factors.len();
        let (blocks, groups) = (self.values.len() / tokens, self.starts.len() / tokens);
        (
            &self.values[token * blocks..(token + 1) * blocks],
            &self.starts[token * groups..(token + 1) * groups],
            self.factors[token],
        )
    }
}

multiversion! {
    fn portable(task: &Task<'_>, out: &mut [&mut [f32]]) = portable_body;
}

#[inline(always)]
fn portable_body<const FMA: bool>(task: &Task<'_>, out: &mut [&mut [f32]]) {
    let rows = out.first().map_or(0, |out| out.len());
    for row in 0..rows {
        let (codes, scales) = task.row(row);
        for (token, out) in out.iter_mut().enumerate() {
            let (values, starts, factor) = task.inputs.token(token);
            out[row] = match task.bits() {
                CompactBits::Eight => {
                    let mut sum = starts[0];
                    for (codes, values) in codes.iter().zip(values) {
                        add_products(&mut sum, codes, values);
                    }
                    product(sum, scales[0], factor)
                }
                CompactBits::Four => {
                    let mut total = [0.0; LANES];
                    for (group, (scale, start)) in scales.iter().zip(starts).enumerate() {
                        let (mut sum, codes) = (*start, &codes[group]);
                        add_products(&mut sum, &codes.map(|code| code & 15), &values[2 * group]);
                        add_products(&mut sum, &codes.map(|code| code >> 4), &values[2 * group + 1]);
                        lanes::accumulate::<FMA>(&mut total, &sum.map(|sum| sum as f32), &[*scale; LANES]);
                    }
                    lanes::sum(total) * factor
                }
            };
        }
    }
}

/// A product in 8 bits from the sums of its lanes. Their sum is exact: it is below 2^31 for [`MAX_COLS`](crate::MAX_COLS)
/// columns, and what wraps on the way wraps back.
#[inline(always)]
pub(crate) fn product<const N: usize>(sums: [i32; N], scale: f32, factor: f32) -> f32 {
    let sum = sums.into_iter().fold(0, i32::wrapping_add);
    sum as f32 * scale * factor
}

/// Four products for each lane, as `vpdpbusd` adds them.
#[inline(always)]
fn add_products(sum: &mut [i32; LANES], codes: &[u8; BLOCK], values: &Line) {
    for i in 0..LANES {
        for k in 4 * i..4 * i + 4 {
            sum[i] += i32::from(codes[k]) * i32::from(values.0[k]);
        }
    }
}

/// The largest and the smallest element, or 0 where none is above or below.
#[inline(always)]
fn extremes(x: &[f32]) -> (f32, f32) {
    let (groups, rest) = x.as_chunks::<LANES>();
    let (mut most, mut least) = ([0.0f32; LANES], [0.0f32; LANES]);
    for x in groups {
        for i in 0..LANES {
            most[i] = if x[i] > most[i] { x[i] } else { most[i] };
            least[i] = if x[i] < least[i] { x[i] } else { least[i] };
        }
    }
    let rest = rest.iter().copied();
    (
        most.into_iter().chain(rest.clone()).fold(0.0, f32::max),
        least.into_iter().chain(rest).fold(0.0, f32::min),
    )
}

multiversion! {
    pub(crate) fn round_to_8(row: &[f32], codes: &mut [u8], scale: &mut f32) = round_to_8_body;
}

#[inline(always)]
pub(crate) fn round_to_8_body<const FMA: bool>(row: &[f32], codes: &mut [u8], scale: &mut f32) {
    let (most, least) = extremes(row);
    let largest = if most > -least { most } else { -least };
    *scale = largest / 127.0;
    let factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    for (code, x) in codes.iter_mut().zip(row) {
        *code = (round(x * factor) + 128) as u8;
    }
}

multiversion! {
    pub(crate) fn round_to_4(row: &[f32], codes: &mut [u8], scales: &mut [f32]) = round_to_4_body;
}

#[inline(always)]
pub(crate) fn round_to_4_body<const FMA: bool>(row: &[f32], codes: &mut [u8], scales: &mut [f32]) {
    for ((row, codes), scale) in row.chunks(2 * BLOCK).zip(codes.as_chunks_mut::<BLOCK>().0).zip(scales) {
        let (most, least) = extremes(row);
        // With its sign, so that the largest weight uses the one value that has no opposite.
        let largest = if most > -least { most } else { least };
        *scale = largest / -8.0;
        let factor = if largest == 0.0 { 0.0 } else { -8.0 / largest };
        let code = |x: &f32| (round(x * factor) + 8).clamp(0, 15) as u8;
        let (low, high) = row.split_at(row.len().min(BLOCK));
        // Beyond the end of a row the activations are 0.
        for (byte, x) in codes.iter_mut().zip(low) {
            *byte = code(x);
        }
        for (byte, x) in codes.iter_mut().zip(high) {
            *byte |= code(x) << 4;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u32, count: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn matrix(bits: CompactBits, weights: &[f32], rows: usize, cols: usize) -> CompactMatrix {
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        CompactMatrix::of(bits, DenseRef::F32(&bytes), rows, cols)
    }

    /// Each weight is within half a step of the original (in 4 bits, the one end of the scale within a whole one), and its
    /// products are those of the rounded weights.
    #[test]
    fn weights_are_rounded_by_group() {
        for (bits, cols) in [(CompactBits::Eight, 70), (CompactBits::Four, 70), (CompactBits::Four, 300)] {
            let rows = 131;
            let mut weights = noise(9, rows * cols);
            weights[3 * cols..4 * cols].fill(0.0);
            let matrix = matrix(bits, &weights, rows, cols);
            assert_eq!(matrix.bytes(), bits.bytes(rows, cols));
            let mut units = vec![0.0; cols * cols];
            (0..cols).for_each(|k| units[k * cols + k] = 1.0);
            let mut rounded = vec![0.0; cols * rows];
            matrix.matmul(&units, &mut rounded, rows);
            for (n, row) in weights.chunks_exact(cols).enumerate() {
                let (size, levels, most) = match bits {
                    CompactBits::Eight => (cols, 127.0, 0.501),
                    CompactBits::Four => (128, 8.0, 1.001),
                };
                for (g, group) in row.chunks(size).enumerate() {
                    let step = group.iter().fold(0.0f32, |most, w| most.max(w.abs())) / levels;
                    for (k, w) in group.iter().enumerate() {
                        let found = rounded[(g * size + k) * rows + n];
                        assert!((found - w).abs() <= most * step, "{bits:?} row {n} column {k}: {w} {found}");
                    }
                }
            }
        }
    }

    #[test]
    fn all_instructions_and_batches_give_the_same() {
        for (bits, rows, cols, tokens) in [
            (CompactBits::Eight, 300, 70, 1),
            (CompactBits::Eight, 9, 640, 19),
            (CompactBits::Eight, 300, 70, 5),
            (CompactBits::Eight, 139, 640, 37),
            (CompactBits::Four, 300, 70, 3),
            (CompactBits::Four, 257, 640, 10),
            (CompactBits::Four, 5, 129, 1),
        ] {
            let matrix = matrix(bits, &noise(2, rows * cols), rows, cols);
            let x = noise(3, tokens * cols);
            let mut expected = vec![0.0; tokens * rows];
            let inputs = Inputs::new(bits, &x, cols);
            let mut parts: Vec<&mut [f32]> = expected.chunks_mut(rows).collect();
            portable_body::<true>(&Task { matrix: &matrix, first: 0, inputs: &inputs }, &mut parts);
            for isa in Isa::available().into_iter().filter(|isa| *isa != Isa::Scalar) {
                let mut found = vec![0.0; tokens * rows];
                matrix.matmul_with(isa, &x, &mut found, rows);
                assert_eq!(found, expected, "{bits:?} on {isa}: {rows} x {cols}, {tokens} tokens");
                for (t, x) in x.chunks_exact(cols).enumerate() {
                    let mut one = vec![0.0; rows];
                    matrix.matmul_with(isa, x, &mut one, rows);
                    assert_eq!(one, found[t * rows..(t + 1) * rows], "{bits:?}, token {t} alone");
                }
            }
        }
    }

    /// The product for CPUs without a path of their own.
    #[test]
    fn the_portable_product_is_the_same_on_all_instructions() {
        let (rows, cols, tokens) = (70, 300, 3);
        for bits in [CompactBits::Eight, CompactBits::Four] {
            let matrix = matrix(bits, &noise(2, rows * cols), rows, cols);
            let inputs = Inputs::new(bits, &noise(3, tokens * cols), cols);
            let task = Task { matrix: &matrix, first: 0, inputs: &inputs };
            let product = |compute: &dyn Fn(&mut [&mut [f32]])| {
                let mut out = vec![0.0; tokens * rows];
                compute(&mut out.chunks_mut(rows).collect::<Vec<_>>());
                out
            };
            let plain = product(&|out| portable_body::<false>(&task, out));
            let fused = product(&|out| portable_body::<true>(&task, out));
            for isa in Isa::available() {
                let found = product(&|out| isa.force(|| portable(&task, out)));
                assert_eq!(found, if isa.is_fused() { &fused[..] } else { &plain }, "{bits:?} on {isa}");
            }
        }
    }

    #[test]
    fn what_is_not_a_number_is_passed_on() {
        for bits in [CompactBits::Eight, CompactBits::Four] {
            let mut x = vec![1.0; 130];
            x[7] = f32::NAN;
            let mut out = vec![0.0; 3];
            matrix(bits, &noise(1, 3 * 130), 3, 130).matmul(&x, &mut out, 3);
            assert!(out.iter().all(|y| y.is_nan()), "{out:?}");
        }
    }

    #[test]
    fn a_failure_to_read_is_passed_on() {
        let read =
            |range: Range<usize>, _: &mut [f32]| if range.contains(&100) { Err(range) } else { Ok(()) };
        assert_eq!(CompactMatrix::new(CompactBits::Eight, 200, 8, read).unwrap_err(), 64..128);
    }
}
