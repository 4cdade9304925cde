//! Products of ternary weights with int8 activations: how the work is divided, and the scalar reference.

use std::ops::Range;

use rayon::prelude::*;

use crate::{Isa, Quantized, TernaryRef};

/// Multiply-adds below which other threads are not worth waking.
const PARALLEL: usize = 1 << 20;

/// Bytes of codes that are taken through all tokens before the next ones: they stay in the second-level cache.
const BLOCK_BYTES: usize = 64 << 10;

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
    let finish = scaled(scale, x);
    run(isa, &[(w, 0)], x, out, stride, &|_, token, acc| finish(token, acc));
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
    let finish: Vec<_> = products.iter().map(|p| scaled(p.scale, x)).collect();
    let parts: Vec<_> = products.iter().map(|p| (p.weights, p.offset)).collect();
    run(Isa::detect(), &parts, x, out, stride, &|part, token, acc| finish[part](token, acc));
}

/// Computes the part `part` of `of` of a [`matmul`] on the calling thread; the parts together are the whole.
///
/// # Safety
/// `out` is valid for writes of `(x.tokens() - 1) * stride + w.rows()` floats, and what other threads write there
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
    unsafe { compute(Isa::detect(), w, x, range, &SharedOut { at: out, stride }, &scaled(scale, x)) };
}

/// Turns the integer sum of a token into its product.
fn scaled(scale: f32, x: &Quantized) -> impl Fn(usize, i32) -> f32 + Sync {
    let scales: Vec<f32> = x.tokens.iter().map(|token| scale / token.scale).collect();
    move |token, acc| acc as f32 * scales[token]
}

/// The integer sums of [`matmul`], `[tokens, rows]`.
///
/// # Panics
/// As [`matmul_with`].
pub fn accumulate(isa: Isa, w: TernaryRef<'_>, x: &Quantized) -> Vec<i32> {
    let mut out = vec![0; x.tokens() * w.rows];
    run(isa, &[(w, 0)], x, &mut out, w.rows, &|_, _, acc| acc);
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

/// Products with weights whose rows begin at an offset in the output; `finish` is told which of them a sum is of.
fn run<T: Send>(
    isa: Isa,
    parts: &[(TernaryRef<'_>, usize)],
    x: &Quantized,
    out: &mut [T],
    stride: usize,
    finish: &(impl Fn(usize, usize, i32) -> T + Sync),
) {
    let mut end = 0;
    for (weights, offset) in parts {
        assert!(*offset >= end, "the rows of two products overlap");
        end = offset + weights.rows;
    }
    let Some(last) = x.tokens().checked_sub(1) else { return };
    assert!(stride >= end && last * stride + end <= out.len(), "the output is too short");
    let out = SharedOut { at: out.as_mut_ptr(), stride };
    let compute = |part: usize, units| {
        let (weights, offset) = parts[part];
        // SAFETY: Within the length that was checked.
        let out = unsafe { out.behind(offset) };
        // SAFETY: The length was checked, no rows overlap, and each unit belongs to one of the calls.
        unsafe { compute(isa, weights, x, units, &out, &|token, acc| finish(part, token, acc)) };
    };
    let threads = rayon::current_num_threads();
    let work: usize = parts.iter().map(|(w, _)| w.codes.len().saturating_mul(4 * x.tokens())).sum();
    if threads == 1 || work < PARALLEL {
        for (part, (weights, _)) in parts.iter().enumerate() {
            compute(part, 0..weights.rows / 4);
        }
        return;
    }
    // A few tasks for each thread, so that one that is held up does not hold up the others for long.
    let step = (end / 4).div_ceil(threads * 4).max(1);
    let mut tasks = Vec::new();
    for (part, (weights, _)) in parts.iter().enumerate() {
        let units = weights.rows / 4;
        tasks.extend((0..units).step_by(step).map(|first| (part, first..units.min(first + step))));
    }
    tasks.into_par_iter().for_each(|(part, units)| compute(part, units));
}

/// The output, which several threads write to in different places.
struct SharedOut<T> {
    at: *mut T,
    stride: usize,
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
}

// SAFETY: Each place is written by one thread: `compute` asks for that.
unsafe impl<T: Send> Sync for SharedOut<T> {}

/// Computes some units for all tokens.
///
/// # Safety
/// `out` is valid for writes of `(x.tokens() - 1) * stride + rows` elements with `rows` at most `stride`, and nobody else
/// writes to the rows of these units.
unsafe fn compute<T>(
    isa: Isa,
    weights: TernaryRef<'_>,
    x: &Quantized,
    units: Range<usize>,
    out: &SharedOut<T>,
    finish: &impl Fn(usize, i32) -> T,
) {
    assert!(isa.is_available(), "this CPU has no {isa}");
    assert_eq!(weights.cols, x.cols, "columns of the weights and the activations");
    let sink = |unit: usize, token: usize, sums: [i32; 4]| {
        for (i, sum) in sums.into_iter().enumerate() {
            let at = token * out.stride + weights.row_of(unit, i);
            // SAFETY: A row of the weights and a token below `x.tokens()`, for which the caller promises room; each
            // unit has rows of its own.
            unsafe { out.at.add(at).write(finish(token, sum)) };
        }
    };
    // Units in blocks, so that each is read from memory once, however many tokens there are.
    let step = (BLOCK_BYTES / weights.cols).max(1);
    for first in units.clone().step_by(step) {
        let task = Task { weights, x, first, last: units.end.min(first + step) };
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `isa` is available, which was checked above.
            Isa::Avx2 => unsafe { crate::x86::avx2::run(&task, &sink) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: As above.
            Isa::Avx512Vnni => unsafe { crate::x86::avx512::run(&task, &sink) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: As above.
            Isa::NeonDot => unsafe { crate::aarch64::dot::run(&task, &sink) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: As above.
            Isa::NeonI8mm => unsafe { crate::aarch64::i8mm::run(&task, &sink) },
            // The others are not available here.
            _ => scalar(&task, &sink),
        }
    }
}

fn scalar(task: &Task<'_>, sink: &impl Sink) {
    let weights = task.weights;
    for u in task.first..task.last {
        let codes = weights.unit(u);
        for token in 0..task.x.tokens() {
            let values = task.x.values(token);
            let sums = std::array::from_fn(|i| {
                let weight = |k| {
                    let (byte, shift) = weights.place(i, k);
                    i32::from((codes[byte] >> shift) & 3) - 1
                };
                values.iter().enumerate().map(|(k, &value)| weight(k) * i32::from(value)).sum()
            });
            sink(u, token, sums);
        }
    }
}
