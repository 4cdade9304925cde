//! [`Vector`] in registers of AVX2 with FMA, and of AVX-512.
//!
//! Every function here is inlined into one that is compiled for its instructions, which `vectorized!` calls only where
//! the CPU has them.

use std::arch::x86_64::{
    __m256, __m256i, __m512, __m512i, _CMP_LT_OQ, _mm_loadu_si128, _mm256_add_epi32, _mm256_add_ps,
    _mm256_andnot_ps, _mm256_blendv_ps, _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_cvtepi8_epi16,
    _mm256_cvtepi16_epi32, _mm256_cvtepi32_ps, _mm256_cvtph_ps, _mm256_cvtps_epi32, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_max_ps, _mm256_mul_ps, _mm256_packs_epi32,
    _mm256_permute4x64_epi64, _mm256_permutevar8x32_ps, _mm256_round_ps, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setr_ps, _mm256_setzero_si256, _mm256_slli_epi32, _mm256_srlv_epi32, _mm256_storeu_ps,
    _mm256_storeu_si256, _mm256_sub_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_castsi512_ps,
    _mm512_cmp_ps_mask, _mm512_cvtepi8_epi16, _mm512_cvtepi16_epi32, _mm512_cvtepi32_epi16,
    _mm512_cvtepi32_ps, _mm512_cvtph_ps, _mm512_cvtps_epi32, _mm512_dpwssd_epi32, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_blend_ps, _mm512_maskz_mov_ps, _mm512_max_ps,
    _mm512_mul_ps, _mm512_permutexvar_ps, _mm512_roundscale_ps, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_si512, _mm512_slli_epi32, _mm512_srlv_epi32, _mm512_storeu_ps, _mm512_sub_ps,
};

use crate::{
    lanes::{LANES, Lanes},
    quantize::Line,
    vector::Vector,
};

/// Rounding to nearest, ties to even, without exceptions: `_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC`.
const NEAREST: i32 = 8;

/// One register of AVX-512.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

// SAFETY (of all blocks): these are instructions of AVX-512 and VNNI, which the function that this is inlined into is compiled
// for; loads and stores touch the 16 elements of the reference, or 32.
impl Vector for Avx512 {
    type Ints = __m512i;
    type Pairs = __m512i;
    const TOKENS: usize = 4;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: See above.
        Self(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    fn load(x: &Lanes) -> Self {
        // SAFETY: See above.
        Self(unsafe { _mm512_loadu_ps(x.as_ptr()) })
    }
    #[inline(always)]
    fn store(self, out: &mut Lanes) {
        // SAFETY: See above.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), self.0) }
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: See above.
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: See above.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: See above.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        // SAFETY: See above.
        Self(unsafe { _mm512_fmadd_ps(self.0, a.0, b.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: See above.
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: See above.
        Self(unsafe { _mm512_roundscale_ps::<NEAREST>(self.0) })
    }
    #[inline(always)]
    fn power_of_two(self) -> Self {
        // SAFETY: See above.
        Self(unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        })
    }
    #[inline(always)]
    fn first(self, count: usize, other: Self) -> Self {
        let keep = if count < LANES { (1u16 << count) - 1 } else { u16::MAX };
        // SAFETY: See above.
        Self(unsafe { _mm512_mask_blend_ps(keep, other.0, self.0) })
    }
    #[inline(always)]
    fn zero_where_below(self, x: Self, limit: f32) -> Self {
        // SAFETY: See above.
        Self(unsafe {
            let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x.0, _mm512_set1_ps(limit));
            _mm512_maskz_mov_ps(!below, self.0)
        })
    }
    #[inline(always)]
    fn load_halves(x: &[u16; LANES]) -> Self {
        // SAFETY: See above.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) })
    }
    #[inline(always)]
    fn load_i16(x: &[i16; LANES]) -> Self {
        // SAFETY: See above.
        Self(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(x.as_ptr().cast()))) })
    }
    #[inline(always)]
    fn store_i16(self, out: &mut [i16; LANES]) {
        // SAFETY: See above.
        unsafe {
            let short = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(self.0));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), short);
        }
    }
    #[inline(always)]
    fn weights<const BITS: u32>(words: &Line, column: u32) -> Self {
        // By the lowest four bits, of which the upper ones belong to other columns.
        let table: [f32; LANES] = weights_of_bits(BITS);
        // SAFETY: See above; a line is 64 bytes.
        Self(unsafe {
            let words = _mm512_loadu_si512(words.0.as_ptr().cast());
            let codes = _mm512_srlv_epi32(words, _mm512_set1_epi32((BITS * column) as i32));
            _mm512_permutexvar_ps(codes, _mm512_loadu_ps(table.as_ptr()))
        })
    }
    #[inline(always)]
    fn zeros() -> __m512i {
        // SAFETY: See above.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    fn of_ints(x: __m512i) -> Self {
        // SAFETY: See above.
        Self(unsafe { _mm512_cvtepi32_ps(x) })
    }
    #[inline(always)]
    fn splat_pair(pair: [i16; 2]) -> __m512i {
        // SAFETY: See above.
        unsafe { _mm512_set1_epi32(one(pair)) }
    }
    #[inline(always)]
    fn load_pairs(x: &[i8; 2 * LANES]) -> __m512i {
        // SAFETY: See above.
        unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn add_products(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: See above.
        unsafe { _mm512_dpwssd_epi32(sum, a, b) }
    }
}

/// The weight for each value of the lowest bits of a word of codes.
#[inline(always)]
fn weights_of_bits(bits: u32) -> Lanes {
    std::array::from_fn(|i| if bits == 1 { (2 * (i & 1)) as f32 - 1.0 } else { (i & 3) as f32 - 1.0 })
}

/// Both integers of a pair in one, the first in the lower half.
#[inline(always)]
fn one([low, high]: [i16; 2]) -> i32 {
    i32::from(low as u16) | i32::from(high) << 16
}

/// Two registers of AVX2.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256, __m256);

impl Avx2 {
    #[inline(always)]
    fn each(self, f: impl Fn(__m256) -> __m256) -> Self {
        Self(f(self.0), f(self.1))
    }
    #[inline(always)]
    fn with(self, other: Self, f: impl Fn(__m256, __m256) -> __m256) -> Self {
        Self(f(self.0, other.0), f(self.1, other.1))
    }
}

// SAFETY (of all blocks): these are instructions of AVX2, FMA and F16C, which the function that this is inlined into is
// compiled for; loads and stores touch the 16 elements of the reference, or 32.
impl Vector for Avx2 {
    type Ints = [__m256i; 2];
    type Pairs = [__m256i; 2];

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: See above.
        let x = unsafe { _mm256_set1_ps(x) };
        Self(x, x)
    }
    #[inline(always)]
    fn load(x: &Lanes) -> Self {
        // SAFETY: See above.
        unsafe { Self(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
    }
    #[inline(always)]
    fn store(self, out: &mut Lanes) {
        // SAFETY: See above.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), self.0);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), self.1);
        }
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: See above.
        self.with(other, |a, b| unsafe { _mm256_sub_ps(a, b) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: See above.
        self.with(other, |a, b| unsafe { _mm256_mul_ps(a, b) })
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: See above.
        self.with(other, |a, b| unsafe { _mm256_add_ps(a, b) })
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        // SAFETY: See above.
        unsafe { Self(_mm256_fmadd_ps(self.0, a.0, b.0), _mm256_fmadd_ps(self.1, a.1, b.1)) }
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: See above.
        self.with(other, |a, b| unsafe { _mm256_max_ps(a, b) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: See above.
        self.each(|x| unsafe { _mm256_round_ps::<NEAREST>(x) })
    }
    #[inline(always)]
    fn power_of_two(self) -> Self {
        // SAFETY: See above.
        self.each(|n| unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        })
    }
    #[inline(always)]
    fn first(self, count: usize, other: Self) -> Self {
        let count = count as f32;
        // SAFETY: See above.
        unsafe {
            let low = _mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0);
            let high = _mm256_add_ps(low, _mm256_set1_ps(8.0));
            let keep = |index| _mm256_cmp_ps::<_CMP_LT_OQ>(index, _mm256_set1_ps(count));
            Self(_mm256_blendv_ps(other.0, self.0, keep(low)), _mm256_blendv_ps(other.1, self.1, keep(high)))
        }
    }
    #[inline(always)]
    fn zero_where_below(self, x: Self, limit: f32) -> Self {
        // SAFETY: See above.
        self.with(x, |y, x| unsafe {
            _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(limit)), y)
        })
    }
    #[inline(always)]
    fn load_halves(x: &[u16; LANES]) -> Self {
        let (low, high) = x.split_at(LANES / 2);
        // SAFETY: See above.
        let half = |x: &[u16]| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())) };
        Self(half(low), half(high))
    }
    #[inline(always)]
    fn load_i16(x: &[i16; LANES]) -> Self {
        let (low, high) = x.split_at(LANES / 2);
        // SAFETY: See above.
        let half = |x: &[i16]| unsafe {
            _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(x.as_ptr().cast())))
        };
        Self(half(low), half(high))
    }
    #[inline(always)]
    fn store_i16(self, out: &mut [i16; LANES]) {
        // SAFETY: See above.
        unsafe {
            let short = _mm256_packs_epi32(_mm256_cvtps_epi32(self.0), _mm256_cvtps_epi32(self.1));
            // The packing works in each half of the register: put the quarters in order.
            let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(short);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), ordered);
        }
    }
    #[inline(always)]
    fn weights<const BITS: u32>(words: &Line, column: u32) -> Self {
        // By the lowest three bits, of which the upper ones belong to other columns.
        let table: [f32; LANES] = weights_of_bits(BITS);
        // SAFETY: See above; a line is 64 bytes.
        unsafe {
            let table = _mm256_loadu_ps(table.as_ptr());
            let shift = _mm256_set1_epi32((BITS * column) as i32);
            let half = |at: usize| {
                let words = _mm256_loadu_si256(words.0.as_ptr().add(at).cast());
                _mm256_permutevar8x32_ps(table, _mm256_srlv_epi32(words, shift))
            };
            Self(half(0), half(32))
        }
    }
    #[inline(always)]
    fn zeros() -> [__m256i; 2] {
        // SAFETY: See above.
        [unsafe { _mm256_setzero_si256() }; 2]
    }
    #[inline(always)]
    fn of_ints([low, high]: [__m256i; 2]) -> Self {
        // SAFETY: See above.
        unsafe { Self(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)) }
    }
    #[inline(always)]
    fn splat_pair(pair: [i16; 2]) -> [__m256i; 2] {
        // SAFETY: See above.
        [unsafe { _mm256_set1_epi32(one(pair)) }; 2]
    }
    #[inline(always)]
    fn load_pairs(x: &[i8; 2 * LANES]) -> [__m256i; 2] {
        let (low, high) = x.split_at(LANES);
        // SAFETY: See above.
        let half = |x: &[i8]| unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(x.as_ptr().cast())) };
        [half(low), half(high)]
    }
    #[inline(always)]
    fn add_products(sum: [__m256i; 2], a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: See above.
        let add = |sum, a, b| unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)) };
        [add(sum[0], a[0], b[0]), add(sum[1], a[1], b[1])]
    }
}
