//! Products of ternary weights with int8 activations: how the work is divided, and the scalar reference.

mod sums;

use std::ops::Range;

use crate::{Isa, Quantized, TernaryRef, float, isa::multiversion, team};
use sums::Sums;

/// Multiply-adds below which other threads are not worth waking.
const PARALLEL: usize = 1 << 18;

/// Bytes of codes of the smallest task: a stretch of memory that is worth it.
const TASK_BYTES: usize = 16 << 10;

/// `out[t * stride + n] = (sum_k w[n, k] * x[t, k]) * (scale / x.scale(t))`, for `n` below `w.rows()`.
///
/// The sum is exact. `scale` is what the integer product is multiplied by to undo the quantisation of the weights.
/// What lies in `out` between the rows of two tokens stays as it is.
///
/// # Panics
/// If the widths of `w` and `x` differ, or `out` is too short for the last token.
pub fn matmul(w: TernaryRef<'_>, scale: f32, x: &Quantized, out: &mut [f32], stride: usize) {
    matmul_with(Isa::detect(), w, scale, x, out, stride);
}

/// [`matmul`] with given instructions, for tests and measurements.
///
/// # Panics
/// As [`matmul`], and if the CPU does not have them.
pub fn matmul_with(isa: Isa, w: TernaryRef<'_>, scale: f32, x: &Quantized, out: &mut [f32], stride: usize) {
    run(isa, &[(w, 0)], x, out, stride, &Scaled::new(&[scale], x));
}

/// Several products of the same activations, as one piece of work for the threads.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// The weights.
    pub weights: TernaryRef<'a>,
    /// What its integer product is multiplied by.
    pub scale: f32,
    /// Where in each token's output its rows begin.
    pub offset: usize,
}

/// [`matmul`] for each of `products`, which is faster than one after the other.
///
/// # Panics
/// As [`matmul`], and if a product's rows begin before those of the one before it end.
pub fn matmul_all(products: &[Product<'_>], x: &Quantized, out: &mut [f32], stride: usize) {
    let scales: Vec<f32> = products.iter().map(|p| p.scale).collect();
    let parts: Vec<_> = products.iter().map(|p| (p.weights, p.offset)).collect();
    run(Isa::detect(), &parts, x, out, stride, &Scaled::new(&scales, x));
}

/// What is made of gate and up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GatedUnit {
    /// [`relu2_glu`](crate::relu2_glu)
    Relu2,
    /// [`silu_glu`](crate::silu_glu)
    Silu,
}

impl GatedUnit {
    /// `out` from gate and up, element by element.
    pub(crate) fn apply(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        match self {
            Self::Relu2 => float::relu2_token(gate, up, out),
            Self::Silu => float::silu_token(gate, up, out),
        }
    }
}

/// A gated unit of the products of gate and up, `[tokens, rows]`, with the same bits as if these were kept: they are larger
/// than what is made of them, and for a chunk of a prompt larger than a cache.
///
/// # Panics
/// If the shapes of gate and up, or their layouts, or the widths of weights and activations differ, or `out` is too short.
pub fn gated_matmul(
    unit: GatedUnit,
    gate: (TernaryRef<'_>, f32),
    up: (TernaryRef<'_>, f32),
    x: &Quantized,
    out: &mut [f32],
) {
    gated_matmul_with(Isa::detect(), unit, gate, up, x, out);
}

/// [`gated_matmul`] whose products use given instructions, for tests and measurements.
///
/// # Panics
/// As [`gated_matmul`], and if the CPU does not have them.
pub fn gated_matmul_with(
    isa: Isa,
    unit: GatedUnit,
    gate: (TernaryRef<'_>, f32),
    up: (TernaryRef<'_>, f32),
    x: &Quantized,
    out: &mut [f32],
) {
    let ((gate, gate_scale), (up, up_scale)) = (gate, up);
    let same = (gate.rows, gate.cols, gate.layout) == (up.rows, up.cols, up.layout);
    assert!(same, "gate and up have different shapes");
    assert!(has_room(out.len(), x.tokens(), gate.rows, gate.rows), "the output is too short");
    let out = SharedOut { at: out.as_mut_ptr(), stride: gate.rows };
    let finish = Scaled::new(&[gate_scale, up_scale], x);
    let units = gate.rows / 4;
    let step = units.div_ceil(team::threads() * 16).max(TASK_BYTES / x.cols / 2).max(1);
    let step = step.next_multiple_of(sums::multiple(isa, x));
    sums::lay_out(isa, gate.layout, x);
    team::for_each(units.div_ceil(step), |task| {
        let units = task * step..units.min((task + 1) * step);
        let (mut gates, mut ups) = (Sums::new(isa, &gate, x, &units), Sums::new(isa, &up, x, &units));
        let mut values = vec![0.0; 3 * gates.width()];
        let (gate_values, rest) = values.split_at_mut(gates.width());
        let (up_values, gated) = rest.split_at_mut(gates.width());
        for block in gates.blocks(units) {
            gates.fill(gate, x, &block);
            ups.fill(up, x, &block);
            for token in 0..x.tokens() {
                finish.finish((0, token), gates.of(token), gate_values);
                finish.finish((1, token), ups.of(token), up_values);
                unit.apply(gate_values, up_values, gated);
                for (row, place) in gates.rows(&gate, &block) {
                    // SAFETY: The length was checked, and each unit has rows of its own and belongs to one task.
                    unsafe { out.copy(token * out.stride + row, &gated[place]) };
                }
            }
        }
    });
}

/// Computes the part `part` of `of` of a [`matmul`] on the calling thread; the parts together are the whole.
///
/// # Safety
/// `out` is valid for reads and writes of `(x.tokens() - 1) * stride + w.rows()` floats, and what other threads write there
/// meanwhile are other parts of the same product, or what lies between the rows of two tokens.
///
/// # Panics
/// If the widths of `w` and `x` differ, `stride` is less than the rows of `w`, or `part` is not below `of`.
pub unsafe fn matmul_part(
    w: TernaryRef<'_>,
    scale: f32,
    x: &Quantized,
    out: *mut f32,
    stride: usize,
    (part, of): (usize, usize),
) {
    assert!(part < of && stride >= w.rows, "part {part} of {of}, {} rows in a stride of {stride}", w.rows);
    let units = w.rows / 4;
    let range = units * part / of..units * (part + 1) / of;
    // SAFETY: The caller promises the length and that the rows of this part are nobody else's.
    unsafe {
        compute(Isa::detect(), w, x, range, &SharedOut { at: out, stride }, (&Scaled::new(&[scale], x), 0));
    };
}

/// What becomes of integer sums.
trait Finish<T>: Sync {
    /// Finishes sums of one of several products and a token.
    fn finish(&self, place: (usize, usize), sums: &[i32], out: &mut [T]);
}

/// A sum becomes its product.
struct Scaled {
    /// For each product and token.
    factors: Vec<f32>,
    tokens: usize,
}

impl Scaled {
    fn new(scales: &[f32], x: &Quantized) -> Self {
        let factors = scales.iter().flat_map(|scale| x.factors(*scale));
        Self { factors: factors.collect(), tokens: x.tokens() }
    }
}

impl Finish<f32> for Scaled {
    fn finish(&self, (part, token): (usize, usize), sums: &[i32], out: &mut [f32]) {
        scale(sums, self.factors[part * self.tokens + token], out);
    }
}

multiversion! {
    fn scale(sums: &[i32], factor: f32, out: &mut [f32]) = scale_body;
}

#[inline(always)]
fn scale_body<const FMA: bool>(sums: &[i32], factor: f32, out: &mut [f32]) {
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = *sum as f32 * factor;
    }
}

/// A sum stays what it is.
struct Sum;

impl Finish<i32> for Sum {
    fn finish(&self, _: (usize, usize), sums: &[i32], out: &mut [i32]) {
        out.copy_from_slice(sums);
    }
}

/// The integer sums of [`matmul`], `[tokens, rows]`.
///
/// # Panics
/// As [`matmul_with`].
pub fn accumulate(isa: Isa, w: TernaryRef<'_>, x: &Quantized) -> Vec<i32> {
    let mut out = vec![0; x.tokens() * w.rows];
    run(isa, &[(w, 0)], x, &mut out, w.rows, &Sum);
    out
}

/// What one task computes: the units `first..last`, for all tokens.
pub(crate) struct Task<'a> {
    pub(crate) weights: TernaryRef<'a>,
    pub(crate) x: &'a Quantized,
    pub(crate) first: usize,
    pub(crate) last: usize,
}

/// Gets, for a unit and a token, the exact sums of the four rows of the unit.
pub(crate) trait Sink: Fn(usize, usize, [i32; 4]) {}

impl<F: Fn(usize, usize, [i32; 4])> Sink for F {}

/// Tiles of nearly the same size, `most` tokens at most, each with its first token and how many it has: one more than `most`
/// tokens are two halves, not a whole tile and a single token.
pub(crate) fn tiles(tokens: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let tiles = tokens.div_ceil(most);
    let mut token = 0;
    (0..tiles).map(move |tile| {
        let count = (tokens - token).div_ceil(tiles - tile);
        token += count;
        (token - count, count)
    })
}

/// Products with weights whose rows begin at an offset in the output; `finish` is told which of them a sum is of.
fn run<T: Copy + Default + Send>(
    isa: Isa,
    parts: &[(TernaryRef<'_>, usize)],
    x: &Quantized,
    out: &mut [T],
    stride: usize,
    finish: &impl Finish<T>,
) {
    let mut end = 0;
    for (weights, offset) in parts {
        assert!(*offset >= end, "the rows of two products overlap");
        end = offset.checked_add(weights.rows).expect("the offset of a product overflows");
    }
    if x.tokens() == 0 {
        return;
    }
    assert!(has_room(out.len(), x.tokens(), stride, end), "the output is too short");
    for (weights, _) in parts {
        sums::lay_out(isa, weights.layout, x);
    }
    let out = SharedOut { at: out.as_mut_ptr(), stride };
    let compute = |part: usize, units| {
        let (weights, offset) = parts[part];
        // SAFETY: Within the length that was checked.
        let out = unsafe { out.behind(offset) };
        // SAFETY: The length was checked, no rows overlap, and each unit belongs to one of the calls.
        unsafe { compute(isa, weights, x, units, &out, (finish, part)) };
    };
    let threads = team::threads();
    let work: usize = parts.iter().map(|(w, _)| w.codes.len().saturating_mul(4 * x.tokens())).sum();
    if threads == 1 || work < PARALLEL {
        for (part, (weights, _)) in parts.iter().enumerate() {
            compute(part, 0..weights.rows / 4);
        }
        return;
    }
    // Many tasks for each thread, so that all end at nearly the same time and one that is held up does not hold up the
    // others for long.
    let step = (end / 4).div_ceil(threads * 16).max(TASK_BYTES / x.cols).max(1);
    let step = step.next_multiple_of(sums::multiple(isa, x));
    let mut tasks = Vec::new();
    for (part, (weights, _)) in parts.iter().enumerate() {
        let units = weights.rows / 4;
        tasks.extend((0..units).step_by(step).map(|first| (part, first..units.min(first + step))));
    }
    team::for_each(tasks.len(), |task| compute(tasks[task].0, tasks[task].1.clone()));
}

/// Whether `length` elements have room for `rows` of each of `tokens`, `stride` elements apart.
pub(crate) fn has_room(length: usize, tokens: usize, stride: usize, rows: usize) -> bool {
    let Some(last) = tokens.checked_sub(1) else { return true };
    let end = last.checked_mul(stride).and_then(|start| start.checked_add(rows));
    stride >= rows && end.is_some_and(|end| end <= length)
}

/// The output, which several threads write to in different places.
pub(crate) struct SharedOut<T> {
    pub(crate) at: *mut T,
    pub(crate) stride: usize,
}

impl<T> SharedOut<T> {
    /// The same output from `offset` on.
    ///
    /// # Safety
    /// `offset` lies within the output.
    unsafe fn behind(&self, offset: usize) -> Self {
        // SAFETY: The caller's promise.
        Self { at: unsafe { self.at.add(offset) }, stride: self.stride }
    }

    /// `count` elements from `index` on.
    ///
    /// # Safety
    /// There are so many, they are initialised, and nobody else uses them as long as the result lives.
    #[allow(clippy::mut_from_ref, reason = "the caller promises that nobody else has these elements")]
    unsafe fn slice(&self, index: usize, count: usize) -> &mut [T] {
        // SAFETY: The caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(index), count) }
    }

    /// # Safety
    /// There are as many elements from `index` on, and no other thread writes there.
    unsafe fn copy(&self, index: usize, values: &[T])
    where
        T: Copy,
    {
        // SAFETY: The caller's promise.
        unsafe { self.at.add(index).copy_from_nonoverlapping(values.as_ptr(), values.len()) };
    }

    /// # Safety
    /// `index` lies within the output, and no other thread writes there.
    pub(crate) unsafe fn set(&self, index: usize, value: T) {
        // SAFETY: The caller's promise.
        unsafe { self.at.add(index).write(value) };
    }
}

// SAFETY: Each place is written by one thread: `compute` asks for that.
unsafe impl<T: Send> Sync for SharedOut<T> {}

/// Computes some units for all tokens.
///
/// # Safety
/// `out` is valid for reads and writes of `(x.tokens() - 1) * stride + rows` elements with `rows` at most `stride`, and
/// nobody else uses the rows of these units.
unsafe fn compute<T>(
    isa: Isa,
    weights: TernaryRef<'_>,
    x: &Quantized,
    units: Range<usize>,
    out: &SharedOut<T>,
    (finish, part): (&impl Finish<T>, usize),
) {
    let mut sums = Sums::new(isa, &weights, x, &units);
    for block in sums.blocks(units) {
        sums.fill(weights, x, &block);
        for token in 0..x.tokens() {
            for (row, place) in sums.rows(&weights, &block) {
                // SAFETY: Rows of the weights and a token below `x.tokens()`, for which the caller promises room; each unit
                // has rows of its own.
                let out = unsafe { out.slice(token * out.stride + row, place.len()) };
                finish.finish((part, token), &sums.of(token)[place], out);
            }
        }
    }
}
