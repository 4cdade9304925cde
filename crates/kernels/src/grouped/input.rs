//! Activations of a product with grouped weights, in int8.

use super::{GroupedKind, GroupedMatrix, MAX_GROUP};
use crate::isa::multiversion;
use crate::quantize::round;
use crate::team;

use std::sync::OnceLock;

/// How the activations of products with grouped weights are represented.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
#[non_exhaustive]
pub enum ActivationType {
    /// Single-precision floats, as they are: the reference.
    F32,
    /// int8 with a scale for each quarter (binary weights: eighth) of a weight group.
    Int8,
    /// The sum of two int8 values with a scale each, the second for what the first leaves: close to 16 bits.
    #[default]
    Int8x2,
}

impl ActivationType {
    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Int8 => "int8",
            Self::Int8x2 => "int8x2",
        }
    }
}

impl std::fmt::Display for ActivationType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Tokens that are multiplied together; each number of tokens is a sum of these.
const TILES: [usize; 5] = [16, 8, 4, 2, 1];

/// Below this an activation counts as 0: its scale times a power of two is still a normal float.
const LEAST: f32 = 1e-30;

/// The bits by which a plane's codes are too large where they lie in a byte. The weight of a binary code is twice the code
/// less one, so its planes are doubled: the first seven by a shift of the byte, which the last has no room for.
pub(crate) const TERNARY_SHIFTS: [u32; 4] = [0, 2, 4, 6];
pub(crate) const BINARY_SHIFTS: [u32; 8] = [0, 1, 2, 3, 4, 5, 6, 6];

/// The shifts of `P` planes.
#[cfg(target_arch = "x86_64")]
pub(crate) const fn shifts<const P: usize>() -> [u32; P] {
    let mut shifts = [0; P];
    let mut p = 0;
    while p < P {
        shifts[p] = if P == 4 { TERNARY_SHIFTS[p] } else { BINARY_SHIFTS[p] };
        p += 1;
    }
    shifts
}

/// Activations `[tokens, cols]` in int8, as products with grouped weights take them. A buffer that can be filled again and
/// again.
///
/// Each plane of a group has a scale of its own: `x = value * scale`, with `scale = max(|x|) / 127` over the plane's columns.
/// With [`ActivationType::Int8x2`] a token takes two rows, the second with what rounding took from the first. A plane with an
/// activation that is infinite or NaN has the scale NaN, and so the products are NaN.
#[derive(Debug, Clone, Default)]
pub struct GroupedInput {
    /// `[tiles][groups, lines of a group, planes, rows of the tile]`: the four columns of a plane in a line.
    values: Vec<u32>,
    /// `[tiles][groups, planes, rows of the tile]`: the sum of the values, negative, times the plane's power of two: codes are
    /// weights plus one.
    starts: Vec<i32>,
    /// As `starts`: the scales, divided by the plane's power of two.
    scales: Vec<f32>,
    /// First row and number of rows.
    tiles: Vec<(usize, usize)>,
    /// What [`rows`](Self::rows) has made.
    rows: OnceLock<Vec<u32>>,
    /// Rows of a token.
    terms: usize,
    tokens: usize,
    cols: usize,
    group: usize,
    planes: usize,
}

impl GroupedInput {
    /// Replaces the contents by `x`, tokens as wide as the rows of `weights`, rounded for products with these and others of the
    /// same kind, width and group.
    ///
    /// # Panics
    /// If the length of `x` is no multiple of that width, or `activations` are not in int8.
    pub fn quantize(&mut self, x: &[f32], weights: &GroupedMatrix, activations: ActivationType) {
        let cols = weights.cols;
        assert!(x.len().is_multiple_of(cols), "{} elements in tokens of {cols}", x.len());
        assert!(activations != ActivationType::F32, "activations in f32 are not rounded");
        self.terms = if activations == ActivationType::Int8x2 { 2 } else { 1 };
        (self.tokens, self.cols) = (x.len() / cols, cols);
        (self.group, self.planes) = (weights.group, weights.kind.planes());
        let rows = self.tokens * self.terms;
        let scales = cols / self.group * self.planes;
        self.values.resize(rows * cols / 4, 0);
        self.starts.resize(rows * scales, 0);
        self.scales.resize(rows * scales, 0.0);
        self.tiles.clear();
        self.rows.take();
        let mut first = 0;
        for size in TILES {
            while rows - first >= size {
                self.tiles.push((first, size));
                first += size;
            }
        }
        let (mut values, mut starts, mut left) =
            (&mut self.values[..], &mut self.starts[..], &mut self.scales[..]);
        let mut tiles = Vec::with_capacity(self.tiles.len());
        for &(first, size) in &self.tiles {
            let (tile_values, tile_starts, tile_scales);
            (tile_values, values) = values.split_at_mut(size * cols / 4);
            (tile_starts, starts) = starts.split_at_mut(size * scales);
            (tile_scales, left) = left.split_at_mut(size * scales);
            let tokens = first / self.terms..(first + size) / self.terms;
            let x = &x[tokens.start * cols..tokens.end * cols];
            tiles.push((x, Part { values: tile_values, starts: tile_starts, scales: tile_scales, size }));
        }
        let shape = Shape { cols, group: self.group, terms: self.terms };
        team::for_each_mut(&mut tiles, |_, (x, part)| match weights.kind {
            GroupedKind::Ternary => ternary(&shape, x, part),
            GroupedKind::Binary => binary(&shape, x, part),
        });
    }

    /// How many tokens there are.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Whether these are activations for products with `weights`.
    pub fn fits(&self, weights: &GroupedMatrix) -> bool {
        (self.cols, self.group, self.planes) == (weights.cols, weights.group, weights.kind.planes())
    }

    /// Rows of a token.
    pub(crate) fn terms(&self) -> usize {
        self.terms
    }

    /// The values of the tiles of 16 rows, which come first, row by row: `[tiles][groups, planes, 16, lines of a group]`. Made once for all products.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn rows(&self) -> &[u32] {
        const ROWS: usize = TILES[0];
        self.rows.get_or_init(|| {
            let lines = self.group / (4 * self.planes);
            let tiles = self.tiles.iter().filter(|(_, size)| *size == ROWS).count();
            let mut all = vec![0; tiles * ROWS * self.cols / 4];
            let mut parts: Vec<_> = all.chunks_exact_mut(ROWS * self.cols / 4).zip(self.tiles()).collect();
            team::for_each_mut(&mut parts, |_, (rows, (_, tile))| {
                let groups = tile.values.chunks_exact(lines * self.planes * ROWS);
                for (rows, values) in rows.chunks_exact_mut(lines * self.planes * ROWS).zip(groups) {
                    for (plane, rows) in rows.chunks_exact_mut(lines * ROWS).enumerate() {
                        for (row, values_of) in rows.chunks_exact_mut(lines).enumerate() {
                            for (line, value) in values_of.iter_mut().enumerate() {
                                *value = values[(line * self.planes + plane) * ROWS + row];
                            }
                        }
                    }
                }
            });
            all
        })
    }

    /// Rows that are multiplied together: the first of them, and their activations.
    #[inline(always)]
    pub(crate) fn tiles(&self) -> impl Iterator<Item = (usize, Tile<'_>)> {
        let (values, scales) = (self.cols / 4, self.cols / self.group * self.planes);
        self.tiles.iter().map(move |&(first, size)| {
            let scaled = first * scales..(first + size) * scales;
            let tile = Tile {
                values: &self.values[first * values..(first + size) * values],
                starts: &self.starts[scaled.clone()],
                scales: &self.scales[scaled],
                size,
            };
            (first, tile)
        })
    }
}

/// The activations of some rows; see [`GroupedInput`].
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    pub(crate) values: &'a [u32],
    pub(crate) starts: &'a [i32],
    pub(crate) scales: &'a [f32],
    pub(crate) size: usize,
}

struct Part<'a> {
    values: &'a mut [u32],
    starts: &'a mut [i32],
    scales: &'a mut [f32],
    size: usize,
}

struct Shape {
    cols: usize,
    group: usize,
    terms: usize,
}

multiversion! {
    fn ternary(shape: &Shape, x: &[f32], part: &mut Part<'_>) = ternary_body;
}
multiversion! {
    fn binary(shape: &Shape, x: &[f32], part: &mut Part<'_>) = binary_body;
}

#[inline(always)]
fn ternary_body<const FMA: bool>(shape: &Shape, x: &[f32], part: &mut Part<'_>) {
    quantize_tile::<4, 16>(shape, x, part, TERNARY_SHIFTS);
}

#[inline(always)]
fn binary_body<const FMA: bool>(shape: &Shape, x: &[f32], part: &mut Part<'_>) {
    quantize_tile::<8, 32>(shape, x, part, BINARY_SHIFTS);
}

/// `L` is the columns of a line, four for each of the `P` planes: column `P * j + p` is value `j` of plane `p`. There is no
/// multiplication whose rounding a fused addition would change, so all instructions give the same bits.
#[inline(always)]
fn quantize_tile<const P: usize, const L: usize>(
    shape: &Shape,
    x: &[f32],
    part: &mut Part<'_>,
    shifts: [u32; P],
) {
    let size = part.size;
    let mut rest = [[0.0f32; L]; MAX_GROUP / 16];
    for (token, x) in x.chunks_exact(shape.cols).enumerate() {
        for (g, x) in x.chunks_exact(shape.group).enumerate() {
            let rest = &mut rest[..shape.group / L];
            for (rest, x) in rest.iter_mut().zip(x.as_chunks::<L>().0) {
                *rest = *x;
            }
            for term in 0..shape.terms {
                let row = token * shape.terms + term;
                let mut largest = [0u32; L];
                for x in &*rest {
                    for l in 0..L {
                        // The bits of positive floats are in the floats' order, infinity and NaN last.
                        largest[l] = largest[l].max(x[l].abs().to_bits());
                    }
                }
                let mut most = [0u32; P];
                for (l, largest) in largest.iter().enumerate() {
                    most[l % P] = most[l % P].max(*largest);
                }
                let (mut factors, mut scales) = ([0.0f32; P], [0.0f32; P]);
                for p in 0..P {
                    let most = f32::from_bits(most[p]);
                    if !most.is_finite() {
                        scales[p] = f32::NAN;
                    } else if most >= LEAST {
                        scales[p] = most / 127.0;
                        factors[p] = 127.0 / most;
                    }
                }
                let (factors, wide): ([f32; L], [f32; L]) =
                    (std::array::from_fn(|l| factors[l % P]), std::array::from_fn(|l| scales[l % P]));
                let mut sums = [0i32; L];
                for (v, x) in rest.iter_mut().enumerate() {
                    let mut values = [0i8; L];
                    for l in 0..L {
                        let value = round(x[l] * factors[l]);
                        sums[l] += value;
                        values[l] = value as i8;
                        x[l] -= value as f32 * wide[l];
                    }
                    let at = (g * (shape.group / L) + v) * P * size + row;
                    for p in 0..P {
                        let bytes = std::array::from_fn(|j| values[P * j + p].cast_unsigned());
                        part.values[at + p * size] = u32::from_le_bytes(bytes);
                    }
                }
                for p in 0..P {
                    let sum: i32 = (0..4).map(|j| sums[P * j + p]).sum();
                    part.starts[(g * P + p) * size + row] = -(sum << shifts[p]);
                    part.scales[(g * P + p) * size + row] = scales[p] / (1u32 << shifts[p]) as f32;
                }
            }
        }
    }
}
