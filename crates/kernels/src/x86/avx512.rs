//! AVX-512-VNNI: `vpdpbusd` adds, in each 32-bit lane, four products of unsigned codes with signed activations.
//!
//! The four codes of a byte are masked out where they are and not shifted down: the second counts four times, the
//! third 16 times, the fourth 64 times, which an exact shift of the whole sum undoes. Since a code is the weight
//! plus one, the sum of the activations is taken off at the end.

use std::arch::x86_64::{
    __m128i, __m512i, __mmask64, _mm_add_epi32, _mm_setr_epi32, _mm_srav_epi32, _mm_storeu_si128,
    _mm256_add_epi32, _mm256_castsi256_si128, _mm256_extracti128_si256, _mm256_loadu_si256, _mm512_add_epi32,
    _mm512_and_si512, _mm512_castsi512_si256, _mm512_dpbusd_epi32, _mm512_extracti64x4_epi64,
    _mm512_load_si512, _mm512_loadu_si512, _mm512_maskz_loadu_epi8, _mm512_set1_epi8, _mm512_setzero_si512,
    _mm512_srai_epi32, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
    _mm512_unpacklo_epi64, _mm512_zextsi256_si512,
};

use crate::{
    TernaryLayout, lanes,
    matmul::{Sink, Task, tiles},
    quantize::Line,
    ternary::{FIELDS, GROUP},
};

/// Bytes of a vector.
const WIDTH: usize = 64;

/// Tokens whose sums are kept in registers together: 4 x 4 of the 32. With more than 18 sums the same instructions took half
/// as long again on Sapphire Rapids, though there is no spill.
const TILE: usize = 4;

/// Computes a task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(crate) fn run(task: &Task<'_>, sink: &impl Sink) {
    for (token, count) in tiles(task.x.tokens(), TILE) {
        match count {
            1 => rows::<1>(task, token, sink),
            2 => rows::<2>(task, token, sink),
            3 => rows::<3>(task, token, sink),
            _ => rows::<TILE>(task, token, sink),
        }
    }
}

/// The tokens `token..token + T` for all units of the task.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn rows<const T: usize>(task: &Task<'_>, token: usize, sink: &impl Sink) {
    let values: [&[i8]; T] = std::array::from_fn(|t| task.x.values(token + t));
    match task.weights.layout {
        TernaryLayout::Quarters => {
            units(task, token, sink, |codes| quarters::<T>(codes, &values, token == 0));
        }
        TernaryLayout::I2s => {
            let lines = task.x.fields();
            let fields: [&[[Line; FIELDS]]; T] = std::array::from_fn(|t| lines.of(token + t).as_chunks().0);
            if T == 1 {
                units(task, token, sink, |codes| i2s_row_by_row(codes, &fields));
            } else {
                units(task, token, sink, |codes| i2s(codes, &fields, token == 0));
            }
        }
    }
}

/// Gives `sink` what `product` makes of the codes of each unit.
#[inline]
fn units<const T: usize>(
    task: &Task<'_>,
    token: usize,
    sink: &impl Sink,
    product: impl Fn(&[u8]) -> [[i32; 4]; T],
) {
    for unit in task.first..task.last {
        for (t, sums) in product(task.weights.unit(unit)).into_iter().enumerate() {
            let offset = task.x.tokens[token + t].sum;
            // Codes are weights + 1. Wrapping: 128 * 131072 * 64 is just beyond what an i32 holds in between.
            sink(unit, token + t, sums.map(|sum| sum.wrapping_sub(offset)));
        }
    }
}

/// The sums of codes times values, for each of `T` tokens those of the four rows in `codes`. `ahead`: the codes come from
/// memory, as they do for the first tokens of a block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn quarters<const T: usize>(codes: &[u8], values: &[&[i8]; T], ahead: bool) -> [[i32; 4]; T] {
    let cols = codes.len();
    for values in values {
        assert_eq!(values.len(), cols);
    }
    let mut sums = [[_mm512_setzero_si512(); 4]; T];
    let whole = cols / WIDTH * WIDTH;
    for k in (0..whole).step_by(WIDTH) {
        if ahead {
            lanes::prefetch_stream(codes.as_ptr().wrapping_add(k));
        }
        // SAFETY: `k + WIDTH <= cols`, the length of `codes`.
        let bytes = unsafe { _mm512_loadu_si512(codes.as_ptr().add(k).cast()) };
        let planes = planes(bytes);
        for (sums, values) in sums.iter_mut().zip(values) {
            // SAFETY: `k + WIDTH <= cols`, which is also the length of each of `values`.
            let x = unsafe { _mm512_loadu_si512(values.as_ptr().add(k).cast()) };
            for (sum, plane) in sums.iter_mut().zip(planes) {
                *sum = _mm512_dpbusd_epi32(*sum, plane, x);
            }
        }
    }
    if whole < cols {
        let mask: __mmask64 = (1 << (cols - whole)) - 1;
        // SAFETY: The mask has `cols - whole` bits, and a masked load touches no other byte.
        let bytes = unsafe { _mm512_maskz_loadu_epi8(mask, codes.as_ptr().add(whole).cast()) };
        let planes = planes(bytes);
        for (sums, values) in sums.iter_mut().zip(values) {
            // SAFETY: As above.
            let x = unsafe { _mm512_maskz_loadu_epi8(mask, values.as_ptr().add(whole)) };
            for (sum, plane) in sums.iter_mut().zip(planes) {
                *sum = _mm512_dpbusd_epi32(*sum, plane, x);
            }
        }
    }
    sums.map(|sums| store(_mm_srav_epi32(add_up(sums), _mm_setr_epi32(0, 2, 4, 6))))
}

/// [`quarters`] for I2_S, one row after the other: a single stream of codes, as memory likes it.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn i2s_row_by_row<const T: usize>(codes: &[u8], values: &[&[[Line; FIELDS]]; T]) -> [[i32; 4]; T] {
    let mut out = [[_mm512_setzero_si512(); 4]; T];
    for (row, codes) in codes.chunks_exact(codes.len() / 4).enumerate() {
        // One sum for each field of a byte, counted once, 4, 16 and 64 times.
        let mut sums = [[_mm512_setzero_si512(); FIELDS]; T];
        for (k, bytes) in codes.chunks(WIDTH).enumerate() {
            lanes::prefetch_stream(bytes.as_ptr());
            let planes = planes(codes_of(bytes));
            for (sums, values) in sums.iter_mut().zip(values) {
                for ((sum, plane), line) in sums.iter_mut().zip(planes).zip(&values[k]) {
                    *sum = _mm512_dpbusd_epi32(*sum, plane, load(line));
                }
            }
        }
        for (out, [once, four, sixteen, sixty_four]) in out.iter_mut().zip(sums) {
            let low = _mm512_add_epi32(once, _mm512_srai_epi32::<2>(four));
            let high = _mm512_add_epi32(sixteen, _mm512_srai_epi32::<2>(sixty_four));
            out[row] = _mm512_add_epi32(low, _mm512_srai_epi32::<4>(high));
        }
    }
    out.map(|sums| store(add_up(sums)))
}

/// [`quarters`] for I2_S: the four rows side by side, so that each load of values serves four products, and one field of the
/// bytes after the other, so that a row has but one sum. `ahead` as there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn i2s<const T: usize>(codes: &[u8], values: &[&[[Line; FIELDS]]; T], ahead: bool) -> [[i32; 4]; T] {
    let width = codes.len() / 4;
    assert!(width.is_multiple_of(GROUP / FIELDS));
    for values in values {
        assert_eq!(values.len(), width.div_ceil(WIDTH));
    }
    let whole = width / WIDTH;
    let mut sums = [[_mm512_setzero_si512(); 4]; T];
    for field in (0..FIELDS).rev() {
        let mask = _mm512_set1_epi8((3_u8 << (2 * field)) as i8);
        for k in 0..whole {
            if ahead {
                // The next unit, a row in the time of each field.
                lanes::prefetch(codes.as_ptr().wrapping_add(codes.len() + field * width + k * WIDTH));
            }
            let mut planes = [mask; 4];
            for (row, plane) in planes.iter_mut().enumerate() {
                let at = codes.as_ptr().wrapping_add(row * width + k * WIDTH);
                // SAFETY: Row `row` of the four in `codes` has `width` bytes, at least `whole` times `WIDTH`.
                let bytes = unsafe { _mm512_loadu_si512(at.cast()) };
                *plane = _mm512_and_si512(bytes, mask);
            }
            // SAFETY: There are at least `whole` in each of `values`.
            unsafe { add_products(&mut sums, planes, values, (k, field)) };
        }
        if whole * WIDTH < width {
            let mut planes = [mask; 4];
            for (plane, codes) in planes.iter_mut().zip(codes.chunks_exact(width)) {
                *plane = _mm512_and_si512(codes_of(&codes[whole * WIDTH..]), mask);
            }
            // SAFETY: And one more, as `width` is.
            unsafe { add_products(&mut sums, planes, values, (whole, field)) };
        }
        if field > 0 {
            // A field counts four times as much as the next lower one.
            for sum in sums.as_flattened_mut() {
                *sum = _mm512_srai_epi32::<2>(*sum);
            }
        }
    }
    sums.map(|sums| store(add_up(sums)))
}

/// Adds the products of a field of four rows with the `k`-th of each token's values.
///
/// # Safety
/// Each of `values` has more than `k`, and there is such a field.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
unsafe fn add_products<const T: usize>(
    sums: &mut [[__m512i; 4]; T],
    planes: [__m512i; 4],
    values: &[&[[Line; FIELDS]]; T],
    (k, field): (usize, usize),
) {
    for (sums, values) in sums.iter_mut().zip(values) {
        // SAFETY: The caller's promise.
        let x = load(unsafe { values.get_unchecked(k).get_unchecked(field) });
        for (sum, plane) in sums.iter_mut().zip(planes) {
            *sum = _mm512_dpbusd_epi32(*sum, plane, x);
        }
    }
}

/// Two groups of codes, or the last one with zeros behind it.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn codes_of(bytes: &[u8]) -> __m512i {
    match (bytes.first_chunk::<WIDTH>(), bytes.first_chunk::<{ WIDTH / 2 }>()) {
        // SAFETY: The array has as many bytes as are loaded.
        (Some(bytes), _) => unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) },
        // SAFETY: As above.
        (None, Some(bytes)) => unsafe { _mm512_zextsi256_si512(_mm256_loadu_si256(bytes.as_ptr().cast())) },
        (None, None) => unreachable!("groups are whole"),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn load(line: &Line) -> __m512i {
    // SAFETY: A line has as many bytes as are loaded, and is aligned to them.
    unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn store(lanes: __m128i) -> [i32; 4] {
    let mut out = [0; 4];
    // SAFETY: `out` has room for four.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), lanes) };
    out
}

/// The four codes of each byte, where they are in it.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn planes(bytes: __m512i) -> [__m512i; 4] {
    [
        _mm512_and_si512(bytes, _mm512_set1_epi8(0b0000_0011)),
        _mm512_and_si512(bytes, _mm512_set1_epi8(0b0000_1100)),
        _mm512_and_si512(bytes, _mm512_set1_epi8(0b0011_0000)),
        _mm512_and_si512(bytes, _mm512_set1_epi8(0b1100_0000_u8 as i8)),
    ]
}

/// The sums of the lanes of four vectors, side by side.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn add_up([a, b, c, d]: [__m512i; 4]) -> __m128i {
    let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    let abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    let half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64::<1>(abcd));
    _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half))
}
