//! Products of grouped weights with activations in int8: how the work is divided, and the scalar reference.

use super::input::{BINARY_SHIFTS, TERNARY_SHIFTS};
use super::{ActivationType, Block, GroupedInput, GroupedKind, GroupedMatrix, ROWS, grouped_matmul_f32};
use crate::grouped::input::Tile;
use crate::matmul::{SharedOut, has_room};
use crate::{Isa, team};

/// Bytes of codes of the smallest task.
const TASK_BYTES: usize = 16 << 10;

/// Multiply-adds below which other threads are not worth waking.
const PARALLEL: usize = 1 << 17;

/// One of several products of the same activations.
#[derive(Debug, Clone, Copy)]
pub struct GroupedProduct<'a> {
    /// The weights.
    pub weights: &'a GroupedMatrix,
    /// Where in each token's output its rows begin.
    pub offset: usize,
}

/// `out[t * stride + offset + n] = sum_k w[n, k] * x[t, k]` for each of `products`, with `x` as [`GroupedInput`] has rounded it.
/// What lies between stays as it is.
///
/// The sum over a plane of a group is exact in integers. It is multiplied by the activations' scale, and these are added up in
/// the planes' order; that is multiplied by the weights' scale and added to the groups before. Each step is one fused
/// multiply-add, so the bits do not depend on the instructions.
///
/// # Panics
/// If `x` [does not fit](GroupedInput::fits) the weights, the rows of a product begin before those of the one before it end, or
/// `out` is too short for the last token.
pub fn grouped_matmul(products: &[GroupedProduct<'_>], x: &GroupedInput, out: &mut [f32], stride: usize) {
    grouped_matmul_with(Isa::detect(), products, x, out, stride);
}

/// [`grouped_matmul`] or, for activations as they are, [`grouped_matmul_f32`] of `x`, `[tokens, cols]`. Products that round it alike
/// are computed together; `input` is a buffer.
///
/// # Panics
/// As those.
pub fn grouped_matmul_all(
    products: &[GroupedProduct<'_>],
    x: &[f32],
    activations: ActivationType,
    input: &mut GroupedInput,
    out: &mut [f32],
    stride: usize,
) {
    if activations == ActivationType::F32 {
        return grouped_matmul_f32(products, x, out, stride);
    }
    let rounds_as = |product: &GroupedProduct<'_>| (product.weights.kind(), product.weights.group());
    for products in products.chunk_by(|a, b| rounds_as(a) == rounds_as(b)) {
        input.quantize(x, products[0].weights, activations);
        grouped_matmul(products, input, out, stride);
    }
}

/// [`grouped_matmul`] with given instructions, for tests and measurements.
///
/// # Panics
/// As there, and if the CPU does not have them.
pub fn grouped_matmul_with(
    isa: Isa,
    products: &[GroupedProduct<'_>],
    x: &GroupedInput,
    out: &mut [f32],
    stride: usize,
) {
    assert!(isa.is_available(), "this CPU has no {isa}");
    for product in products {
        assert!(x.fits(product.weights), "activations for {:?}", product.weights);
    }
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Amx {
        // On all threads, which the blocks are divided over below.
        x.rows();
    }
    let work = |weights: &GroupedMatrix, block, write: &Write<'_>| multiply(isa, weights, block, x, write);
    by_blocks(products, x.tokens(), out, stride, work);
}

/// Computes the part `part` of `of` of a [`grouped_matmul`] with one matrix on the calling thread; the parts together are the
/// whole.
///
/// # Safety
/// `out` is valid for writes of `(x.tokens() - 1) * stride + weights.rows()` floats, and what other threads write there
/// meanwhile are other parts of the same product, or what lies between the rows of two tokens.
///
/// # Panics
/// If `x` [does not fit](GroupedInput::fits) the weights, `stride` is less than their rows, or `part` is not below `of`.
pub unsafe fn grouped_matmul_part(
    weights: &GroupedMatrix,
    x: &GroupedInput,
    out: *mut f32,
    stride: usize,
    part: (usize, usize),
) {
    assert!(x.fits(weights), "activations for {weights:?}");
    let isa = Isa::detect();
    let work = |weights: &GroupedMatrix, block, write: &Write<'_>| multiply(isa, weights, block, x, write);
    // SAFETY: The caller's promise.
    unsafe { one_part(weights, x.tokens(), out, stride, part, work) };
}

/// Writes the sums of a token.
pub(super) type Write<'a> = dyn Fn(usize, &[f32; ROWS]) + 'a;

/// One block times all activations.
fn multiply(isa: Isa, weights: &GroupedMatrix, block: usize, x: &GroupedInput, write: &Write<'_>) {
    // The first of a token's two terms waits for the second.
    let mut first = [0.0; ROWS];
    let task = Task { weights, block, x };
    let terms = x.terms();
    let mut sink = |row: usize, sums: [f32; ROWS]| {
        if terms == 1 {
            write(row, &sums);
        } else if row.is_multiple_of(2) {
            first = sums;
        } else {
            write(row / 2, &std::array::from_fn(|i| first[i] + sums[i]));
        }
    };
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: The callers have made sure that the CPU has these instructions.
        Isa::Amx => unsafe { crate::x86::amx::grouped::run(&task, &mut sink) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: As above.
        Isa::Avx512Vnni => unsafe { crate::x86::grouped_avx512::run(&task, &mut sink) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: As above.
        Isa::Avx2 => unsafe { crate::x86::grouped_avx2::run(&task, &mut sink) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: As above.
        Isa::AvxVnni => unsafe { crate::x86::grouped_avx2::run_vnni(&task, &mut sink) },
        _ => scalar(&task, &mut sink),
    }
}

/// Calls `work` for the blocks of a part of a product.
///
/// # Safety
/// As [`grouped_matmul_part`].
pub(super) unsafe fn one_part(
    weights: &GroupedMatrix,
    tokens: usize,
    out: *mut f32,
    stride: usize,
    (part, of): (usize, usize),
    work: impl Fn(&GroupedMatrix, usize, &Write<'_>),
) {
    let rows = weights.rows;
    assert!(part < of && stride >= rows, "part {part} of {of}, {rows} rows in a stride of {stride}");
    let (blocks, out) = (weights.blocks(), SharedOut { at: out, stride });
    for block in blocks * part / of..blocks * (part + 1) / of {
        // SAFETY: The caller promises the length, and that the rows of this part are nobody else's.
        let write = |token: usize, sums: &[f32; ROWS]| unsafe {
            assert!(token < tokens);
            write_rows(&out, token * stride, weights.rows_of(block), sums);
        };
        work(weights, block, &write);
    }
}

/// Writes sums to the rows of a token that begins at `token`.
///
/// # Safety
/// The rows lie within the output, and no other thread writes there.
unsafe fn write_rows(out: &SharedOut<f32>, token: usize, rows: std::ops::Range<usize>, sums: &[f32; ROWS]) {
    for (row, sum) in rows.zip(sums) {
        // SAFETY: The caller's promise.
        unsafe { out.set(token + row, *sum) };
    }
}

/// Calls `work` for all blocks of all products, divided over the threads. It is given a way to write the sums of a token.
pub(super) fn by_blocks(
    products: &[GroupedProduct<'_>],
    tokens: usize,
    out: &mut [f32],
    stride: usize,
    work: impl Fn(&GroupedMatrix, usize, &Write<'_>) + Sync,
) {
    let mut end = 0;
    for product in products {
        assert!(product.offset >= end, "the rows of two products overlap");
        end = product.offset.checked_add(product.weights.rows).expect("the offset of a product overflows");
    }
    if tokens == 0 {
        return;
    }
    assert!(has_room(out.len(), tokens, stride, end), "the output is too short");
    let out = SharedOut { at: out.as_mut_ptr(), stride };
    let compute = |product: &GroupedProduct<'_>, blocks: std::ops::Range<usize>| {
        for block in blocks {
            let rows = product.weights.rows_of(block);
            let write = |token: usize, sums: &[f32; ROWS]| {
                assert!(token < tokens);
                // SAFETY: The length was checked, and each block has rows of its own and belongs to one task.
                unsafe { write_rows(&out, token * out.stride + product.offset, rows.clone(), sums) };
            };
            work(product.weights, block, &write);
        }
    };
    let threads = team::threads();
    let work: usize = products.iter().map(|p| p.weights.rows * p.weights.cols).sum::<usize>() * tokens;
    if threads == 1 || work < PARALLEL {
        for product in products {
            compute(product, 0..product.weights.blocks());
        }
        return;
    }
    let all: usize = products.iter().map(|p| p.weights.blocks()).sum();
    let mut tasks = Vec::new();
    for product in products {
        let bytes = product.weights.words_of_row() * 4 * ROWS;
        // A prompt has work enough for tasks of few blocks.
        let step = all.div_ceil(threads * 16).max(TASK_BYTES / bytes / tokens).max(1);
        let blocks = product.weights.blocks();
        tasks.extend((0..blocks).step_by(step).map(|first| (product, first..blocks.min(first + step))));
    }
    team::for_each(tasks.len(), |task| compute(tasks[task].0, tasks[task].1.clone()));
}

/// One block of weights times all activations.
pub(crate) struct Task<'a> {
    weights: &'a GroupedMatrix,
    block: usize,
    x: &'a GroupedInput,
}

impl<'a> Task<'a> {
    pub(crate) fn kind(&self) -> GroupedKind {
        self.weights.kind
    }

    pub(crate) fn block(&self) -> Block<'a> {
        self.weights.block(self.block)
    }

    pub(crate) fn tiles(&self) -> impl Iterator<Item = (usize, Tile<'a>)> {
        self.x.tiles()
    }

    /// The values of the tiles of 16 rows, row by row.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn rows(&self) -> &'a [u32] {
        self.x.rows()
    }
}

/// The reference for all instructions.
fn scalar(task: &Task<'_>, sink: &mut impl FnMut(usize, [f32; ROWS])) {
    let block = task.block();
    let shifts: &[u32] = match task.kind() {
        GroupedKind::Ternary => &TERNARY_SHIFTS,
        GroupedKind::Binary => &BINARY_SHIFTS,
    };
    let (planes, bits) = (shifts.len(), 8 / shifts.len());
    for (first, tile) in task.tiles() {
        for row in 0..tile.size {
            let mut totals = [0.0f32; ROWS];
            for (g, codes) in block.codes.chunks_exact(block.lines).enumerate() {
                let mut sums = [0.0f32; ROWS];
                for (p, shift) in shifts.iter().enumerate() {
                    let at = (g * planes + p) * tile.size + row;
                    // Of a binary code twice its value.
                    let mut exact = [tile.starts[at] >> shift; ROWS];
                    for (v, line) in codes.iter().enumerate() {
                        let values = tile.values[((g * block.lines + v) * planes + p) * tile.size + row];
                        for (lane, exact) in exact.iter_mut().enumerate() {
                            for (code, value) in
                                line.word(lane).to_le_bytes().iter().zip(values.to_le_bytes())
                            {
                                let code = i32::from(code >> (bits * p)) & ((1 << bits) - 1);
                                *exact += (code << (2 - bits)) * i32::from(value.cast_signed());
                            }
                        }
                    }
                    for (sum, exact) in sums.iter_mut().zip(exact) {
                        *sum = ((exact << shift) as f32).mul_add(tile.scales[at], *sum);
                    }
                }
                let scales = block.scales.of(g);
                for lane in 0..ROWS {
                    totals[lane] = sums[lane].mul_add(scales[lane], totals[lane]);
                }
            }
            sink(first + row, totals);
        }
    }
}
