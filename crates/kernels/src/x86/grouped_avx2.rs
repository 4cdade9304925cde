//! AVX2 for [`grouped_matmul`](crate::grouped_matmul): a block of 16 rows is two vectors of eight. `vpmaddubsw` adds pairs of
//! columns in 16 bits: a pair is at most 2 * 2 * 127, of which the 16 of the widest group fit. With AVX-VNNI one
//! instruction adds four columns in 32 bits.

use std::arch::x86_64::{
    __m256, __m256i, _mm_cvtsi32_si128, _mm_loadu_si128, _mm256_add_epi16, _mm256_add_epi32,
    _mm256_and_si256, _mm256_cvtepi32_ps, _mm256_cvtph_ps, _mm256_dpbusd_avx_epi32, _mm256_fmadd_ps,
    _mm256_load_si256, _mm256_loadu_ps, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8,
    _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256,
    _mm256_sll_epi32, _mm256_srl_epi16, _mm256_storeu_ps,
};

use crate::grouped::{Block, BlockScales, GroupedKind, ROWS, Task, Tile, shifts};
use crate::lanes;
use crate::quantize::Line;

/// Rows of a vector.
const HALF: usize = ROWS / 2;

/// Computes a task.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn run(task: &Task<'_>, sink: &mut impl FnMut(usize, [f32; ROWS])) {
    // SAFETY: As this function's features say.
    unsafe {
        match task.kind() {
            GroupedKind::Ternary => tiles::<4, Pairs>(task, sink),
            GroupedKind::Binary => tiles::<8, Pairs>(task, sink),
        }
    }
}

/// Computes a task with AVX-VNNI.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(crate) fn run_vnni(task: &Task<'_>, sink: &mut impl FnMut(usize, [f32; ROWS])) {
    // SAFETY: As this function's features say.
    unsafe {
        match task.kind() {
            GroupedKind::Ternary => tiles::<4, Fours>(task, sink),
            GroupedKind::Binary => tiles::<8, Fours>(task, sink),
        }
    }
}

/// How products are added up.
trait Step {
    /// Adds the products of unsigned codes and signed activations.
    ///
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn add(sum: __m256i, codes: __m256i, x: __m256i) -> __m256i;
    /// The sums of four columns in 32 bits.
    ///
    /// # Safety
    /// As above.
    unsafe fn widened(sum: __m256i) -> __m256i;
}

/// In 16 bits.
struct Pairs;
/// In 32 bits, by AVX-VNNI.
struct Fours;

impl Step for Pairs {
    #[inline(always)]
    unsafe fn add(sum: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: The caller's promise.
        unsafe { _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x)) }
    }
    #[inline(always)]
    unsafe fn widened(sum: __m256i) -> __m256i {
        // SAFETY: The caller's promise.
        unsafe { _mm256_madd_epi16(sum, _mm256_set1_epi16(1)) }
    }
}

impl Step for Fours {
    #[inline(always)]
    unsafe fn add(sum: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: The caller's promise.
        unsafe { _mm256_dpbusd_avx_epi32(sum, codes, x) }
    }
    #[inline(always)]
    unsafe fn widened(sum: __m256i) -> __m256i {
        sum
    }
}

/// Without target features of its own, so that it is compiled for those of the function that it is inlined into.
///
/// # Safety
/// The CPU has AVX2, FMA, F16C and the instructions of `S`.
#[inline(always)]
unsafe fn tiles<const P: usize, S: Step>(task: &Task<'_>, sink: &mut impl FnMut(usize, [f32; ROWS])) {
    let block = task.block();
    for (first, tile) in task.tiles() {
        let mut out = |row: usize, sums| sink(first + row, sums);
        // SAFETY: The caller's promise.
        unsafe {
            match tile.size {
                1 => rows::<P, 1, S>(&block, &tile, 0, &mut out),
                2 => rows::<P, 2, S>(&block, &tile, 0, &mut out),
                // Eight sums are what 16 registers have room for beside the rest.
                _ => {
                    (0..tile.size).step_by(4).for_each(|from| rows::<P, 4, S>(&block, &tile, from, &mut out));
                }
            }
        }
    }
}

/// The `T` rows of activations from `from` on.
///
/// # Safety
/// As [`tiles`].
#[inline(always)]
unsafe fn rows<const P: usize, const T: usize, S: Step>(
    block: &Block<'_>,
    tile: &Tile<'_>,
    from: usize,
    sink: &mut impl FnMut(usize, [f32; ROWS]),
) {
    let (groups, size, shifts) = (block.codes.len() / block.lines, tile.size, shifts::<P>());
    assert!(from + T <= size && tile.values.len() == block.codes.len() * P * size);
    assert!(tile.starts.len() == groups * P * size && tile.scales.len() == groups * P * size);
    // SAFETY: The caller's promise; what is loaded and stored are whole arrays.
    unsafe {
        let mask = _mm256_set1_epi8(if P == 4 { 3 } else { 1 });
        let mut totals = [[_mm256_setzero_ps(); 2]; T];
        for g in 0..groups {
            let mut group = [[_mm256_setzero_ps(); 2]; T];
            let codes = &block.codes[g * block.lines..(g + 1) * block.lines];
            for p in 0..P {
                let down = _mm_cvtsi32_si128((p * 8 / P) as i32);
                let mut sums = [[_mm256_setzero_si256(); 2]; T];
                for (i, line) in codes.iter().enumerate() {
                    if p == 0 {
                        lanes::prefetch_stream(std::ptr::from_ref(line));
                    }
                    let mut planes = halves(line);
                    for plane in &mut planes {
                        *plane = _mm256_and_si256(_mm256_srl_epi16(*plane, down), mask);
                    }
                    let at = ((g * block.lines + i) * P + p) * size + from;
                    for t in 0..T {
                        let x = _mm256_set1_epi32(tile.values[at + t].cast_signed());
                        for h in 0..2 {
                            sums[t][h] = S::add(sums[t][h], planes[h], x);
                        }
                    }
                }
                // A binary weight is twice its code less one.
                let up = _mm_cvtsi32_si128(shifts[p] as i32 + i32::from(P == 8));
                let at = (g * P + p) * size + from;
                for t in 0..T {
                    let start = _mm256_set1_epi32(tile.starts[at + t]);
                    let scale = _mm256_set1_ps(tile.scales[at + t]);
                    for h in 0..2 {
                        let sum = _mm256_add_epi32(_mm256_sll_epi32(S::widened(sums[t][h]), up), start);
                        group[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, group[t][h]);
                    }
                }
            }
            let scales = scales(&block.scales, g);
            for t in 0..T {
                for h in 0..2 {
                    totals[t][h] = _mm256_fmadd_ps(group[t][h], scales[h], totals[t][h]);
                }
            }
        }
        for (t, [low, high]) in totals.into_iter().enumerate() {
            let mut out = [0.0; ROWS];
            _mm256_storeu_ps(out.as_mut_ptr(), low);
            _mm256_storeu_ps(out.as_mut_ptr().add(HALF), high);
            sink(from + t, out);
        }
    }
}

/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn halves(line: &Line) -> [__m256i; 2] {
    let at = line.0.as_ptr();
    // SAFETY: A line is aligned and has twice the bytes of a vector.
    unsafe { [_mm256_load_si256(at.cast()), _mm256_load_si256(at.add(32).cast())] }
}

/// # Safety
/// The CPU has AVX2 and F16C.
#[inline(always)]
unsafe fn scales(scales: &BlockScales<'_>, group: usize) -> [__m256; 2] {
    // SAFETY: The arrays have 16 scales.
    unsafe {
        match scales {
            BlockScales::F16(scales) => {
                let at = scales[group].as_ptr();
                [
                    _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(at.add(HALF).cast())),
                ]
            }
            BlockScales::F32(scales) => {
                let at = scales[group].as_ptr();
                [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(HALF))]
            }
        }
    }
}
