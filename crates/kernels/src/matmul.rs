//! Products of ternary weights with int8 activations: how the work is divided, and the scalar reference.

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
    let scales: Vec<f32> = x.tokens.iter().map(|token| scale / token.scale).collect();
    run(isa, w, x, out, stride, &|token, acc| acc as f32 * scales[token]);
}

/// The integer sums of [`matmul`], `[tokens, rows]`.
///
/// # Panics
/// As [`matmul_with`].
pub fn accumulate(isa: Isa, w: TernaryRef<'_>, x: &Quantized) -> Vec<i32> {
    let mut out = vec![0; x.tokens() * w.rows];
    run(isa, w, x, &mut out, w.rows, &|_, acc| acc);
    out
}

/// What one task computes: the byte rows `first..last`, for all tokens.
pub(crate) struct Task<'a> {
    pub(crate) weights: TernaryRef<'a>,
    pub(crate) x: &'a Quantized,
    pub(crate) first: usize,
    pub(crate) last: usize,
}

/// Gets, for a byte row and a token, the exact sums of the weight rows `row + i * rows / 4`.
pub(crate) trait Sink: Fn(usize, usize, [i32; 4]) {}

impl<F: Fn(usize, usize, [i32; 4])> Sink for F {}

fn run<T: Send>(
    isa: Isa,
    weights: TernaryRef<'_>,
    x: &Quantized,
    out: &mut [T],
    stride: usize,
    finish: &(impl Fn(usize, i32) -> T + Sync),
) {
    assert!(isa.is_available(), "this CPU has no {isa}");
    assert_eq!(weights.cols, x.cols, "columns of the weights and the activations");
    let Some(last) = x.tokens().checked_sub(1) else { return };
    assert!(stride >= weights.rows && last * stride + weights.rows <= out.len(), "the output is too short");
    let quarter = weights.rows / 4;
    let out = SharedOut(out.as_mut_ptr());
    let compute = |first: usize, last: usize| {
        let out = &out;
        let sink = |row: usize, token: usize, sums: [i32; 4]| {
            for (i, sum) in sums.into_iter().enumerate() {
                let at = token * stride + i * quarter + row;
                // SAFETY: `row < quarter` and `token < x.tokens()`, so `at` is below the length that was checked
                // above; each byte row belongs to one task, so no other thread writes there.
                unsafe { out.0.add(at).write(finish(token, sum)) };
            }
        };
        // Byte rows in blocks, so that each is read from memory once, however many tokens there are.
        let step = (BLOCK_BYTES / weights.cols).max(1);
        for first in (first..last).step_by(step) {
            let task = Task { weights, x, first, last: last.min(first + step) };
            match isa {
                Isa::Scalar => scalar(&task, &sink),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `isa` is available, which was checked above.
                Isa::Avx2 => unsafe { crate::x86::avx2::run(&task, &sink) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: As above.
                Isa::Avx512Vnni => unsafe { crate::x86::avx512::run(&task, &sink) },
                #[cfg(not(target_arch = "x86_64"))]
                _ => scalar(&task, &sink),
            }
        }
    };
    let threads = rayon::current_num_threads();
    let work = weights.rows.saturating_mul(weights.cols).saturating_mul(x.tokens());
    if threads == 1 || work < PARALLEL {
        compute(0, quarter);
        return;
    }
    // A few tasks for each thread, so that one that is held up does not hold up the others for long.
    let rows = quarter.div_ceil(threads * 4).max(1);
    (0..quarter.div_ceil(rows)).into_par_iter().for_each(|i| compute(i * rows, quarter.min((i + 1) * rows)));
}

/// The output, which several threads write to in different places.
struct SharedOut<T>(*mut T);

// SAFETY: Each place is written by one thread, see the only use.
unsafe impl<T: Send> Sync for SharedOut<T> {}

fn scalar(task: &Task<'_>, sink: &impl Sink) {
    let cols = task.weights.cols;
    for row in task.first..task.last {
        let codes = &task.weights.codes[row * cols..(row + 1) * cols];
        for token in 0..task.x.tokens() {
            let mut sums = [0; 4];
            for (&byte, &value) in codes.iter().zip(task.x.values(token)) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum += (i32::from((byte >> (2 * i)) & 3) - 1) * i32::from(value);
                }
            }
            sink(row, token, sums);
        }
    }
}
