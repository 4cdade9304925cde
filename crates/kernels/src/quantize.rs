//! int8 activations, one scale for each token.

use std::sync::OnceLock;

use crate::{
    float::norm_token,
    isa::multiversion,
    lanes::LANES,
    team,
    ternary::{FIELDS, GROUP},
};

/// Activations `[tokens, cols]` as `round_half_even(x * s)` with `s = 127 / max(|x|, 1e-5)` for each token, as in
/// transformers' `BitLinear.activation_quant`.
///
/// A buffer that can be filled again and again. The scale of a token with an element that is infinite or NaN is NaN, and
/// so are its products: the failure is seen in the logits.
#[derive(Debug, Clone, Default)]
pub struct Quantized {
    /// Each token from a new line on.
    lines: Vec<Line>,
    pub(crate) tokens: Vec<TokenScale>,
    pub(crate) cols: usize,
    /// [`fields`](Self::fields) of all tokens, where a product has asked for them.
    fields: OnceLock<Vec<Line>>,
}

/// A cache line. A vector that lies across two of them takes two loads, and products of several tokens by the same weights
/// have hardly less loads than products: without the alignment they take half as long again.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [i8; Line::BYTES]);

impl Line {
    pub(crate) const BYTES: usize = 64;

    /// Zeros.
    pub(crate) const EMPTY: Self = Self([0; Self::BYTES]);

    /// Its 32-bit words, the lowest byte first.
    #[inline(always)]
    pub(crate) fn words(&self) -> [u32; Self::BYTES / 4] {
        let words = self.0.as_chunks::<4>().0;
        std::array::from_fn(|i| u32::from_le_bytes(words[i].map(i8::cast_unsigned)))
    }

    /// One of the [`words`](Self::words).
    #[inline(always)]
    pub(crate) fn word(&self, index: usize) -> u32 {
        u32::from_le_bytes(self.0.as_chunks::<4>().0[index].map(i8::cast_unsigned))
    }

    #[inline(always)]
    pub(crate) fn set_word(&mut self, index: usize, word: u32) {
        self.0.as_chunks_mut::<4>().0[index] = word.to_le_bytes().map(u8::cast_signed);
    }

    pub(crate) fn bytes(lines: &[Self]) -> &[i8] {
        // SAFETY: A line is its bytes and nothing else, and the slice has these lines one behind the other.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines)) }
    }

    pub(crate) fn bytes_mut(lines: &mut [Self]) -> &mut [i8] {
        // SAFETY: As above; any bytes are a line.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), size_of_val(lines)) }
    }
}

/// Columns of a group that are in the same field of their bytes.
const PART: usize = GROUP / FIELDS;

/// What a product needs to know of a token beside its values.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct TokenScale {
    /// `s` above.
    pub(crate) scale: f32,
    /// Sum of the values: codes are weights + 1, so a product of codes is too large by this.
    pub(crate) sum: i32,
}

impl Quantized {
    /// Replaces the contents by `x`, tokens of `cols` elements each.
    ///
    /// # Panics
    /// If `cols` is 0 or the length of `x` is no multiple of it.
    pub fn quantize(&mut self, x: &[f32], cols: usize) {
        self.resize(x.len(), cols);
        let mut tokens: Vec<_> = x.chunks_exact(cols).zip(self.parts()).collect();
        team::for_each_mut(&mut tokens, |_, (x, (values, token))| quantize_token(x, values, token));
    }

    /// [`quantize`](Self::quantize) of what [`rms_norm`](crate::rms_norm) makes of `x`, which is not kept.
    ///
    /// # Panics
    /// If `weight` is empty or the length of `x` is no multiple of its length.
    pub fn quantize_normed(&mut self, x: &[f32], weight: &[f32], eps: f32) {
        let cols = weight.len();
        self.resize(x.len(), cols);
        let mut tokens: Vec<_> = x.chunks_exact(cols).zip(self.parts()).collect();
        team::for_each_mut(&mut tokens, |_, (x, (values, token))| {
            let mut normed = vec![0.0; cols];
            norm_token(x, weight, eps, &mut normed);
            quantize_token(&normed, values, token);
        });
    }

    /// [`quantize`](Self::quantize) on the calling thread alone, for an engine with threads of its own: tokens `stride`
    /// elements apart, the last of which may end with `x`.
    ///
    /// # Panics
    /// If `cols` is 0 or more than `stride`, or `x` is shorter than `tokens` tokens.
    pub fn quantize_here(&mut self, x: &[f32], tokens: usize, cols: usize, stride: usize) {
        assert!(cols <= stride, "tokens of {cols} elements in a stride of {stride}");
        self.resize(tokens * cols, cols);
        for (t, (values, token)) in self.parts().enumerate() {
            quantize_token(&x[t * stride..t * stride + cols], values, token);
        }
    }

    fn resize(&mut self, elements: usize, cols: usize) {
        assert!(cols > 0 && elements.is_multiple_of(cols), "{elements} elements in tokens of {cols}");
        self.cols = cols;
        self.fields.take();
        self.tokens.resize(elements / cols, TokenScale::default());
        self.lines.resize(elements / cols * cols.div_ceil(Line::BYTES), Line::EMPTY);
    }

    /// The place of each token.
    fn parts(&mut self) -> impl Iterator<Item = (&mut [i8], &mut TokenScale)> {
        let cols = self.cols;
        let lines = self.lines.chunks_exact_mut(cols.div_ceil(Line::BYTES));
        lines.map(move |lines| &mut Line::bytes_mut(lines)[..cols]).zip(&mut self.tokens)
    }

    /// How many tokens there are.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Elements of a token.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The values of a token.
    pub fn values(&self, token: usize) -> &[i8] {
        let lines = self.cols.div_ceil(Line::BYTES);
        &Line::bytes(&self.lines[token * lines..(token + 1) * lines])[..self.cols]
    }

    /// The values of a token as codes in I2_S lie in vectors of 64 bytes, which are two groups: for each field of a byte, from
    /// the lowest, what each vector's codes are multiplied by. Behind a last single group are zeros. Made once for all
    /// products, as it takes a good part of the time of a few rows.
    ///
    /// The width is a multiple of [`GROUP`].
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "vectors of AVX-512"))]
    pub(crate) fn fields(&self, token: usize) -> [&[Line]; FIELDS] {
        let lines = self.cols.div_ceil(FIELDS * Line::BYTES);
        let all = self.fields.get_or_init(|| {
            let mut all = vec![Line::EMPTY; self.tokens() * FIELDS * lines];
            for (token, fields) in all.chunks_exact_mut(FIELDS * lines).enumerate() {
                for (k, groups) in self.values(token).as_chunks::<GROUP>().0.chunks(2).enumerate() {
                    for (g, group) in groups.iter().enumerate() {
                        // The first columns are in the highest bits.
                        for (field, part) in group.as_chunks::<PART>().0.iter().rev().enumerate() {
                            fields[field * lines + k].0.as_chunks_mut().0[g] = *part;
                        }
                    }
                }
            }
            all
        });
        std::array::from_fn(|field| &all[(token * FIELDS + field) * lines..][..lines])
    }

    /// The scale of a token: its values are its elements times this, rounded.
    pub fn scale(&self, token: usize) -> f32 {
        self.tokens[token].scale
    }

    /// For each token what its integer sums are multiplied by, where `scale` undoes the quantisation of the weights.
    pub fn factors(&self, scale: f32) -> impl Iterator<Item = f32> + '_ {
        self.tokens.iter().map(move |token| scale / token.scale)
    }
}

multiversion! {
    pub(crate) fn quantize_token(x: &[f32], values: &mut [i8], token: &mut TokenScale) = quantize_token_body;
}

#[inline(always)]
pub(crate) fn quantize_token_body<const FMA: bool>(x: &[f32], values: &mut [i8], token: &mut TokenScale) {
    let largest = largest(x);
    // Not `max`, which would make a number of NaN.
    let bound = if largest < 1e-5 { 1e-5 } else { largest };
    // Divided in this order because PyTorch does so for `127 / bound`; it can differ in the last bit.
    let scale = if bound.is_finite() { 127.0 * (1.0 / bound) } else { f32::NAN };
    let (groups, rest) = x.as_chunks::<LANES>();
    let (out_groups, out_rest) = values.as_chunks_mut::<LANES>();
    let mut sums = [0; LANES];
    for (x, out) in groups.iter().zip(out_groups) {
        for i in 0..LANES {
            let value = round(x[i] * scale);
            out[i] = value as i8;
            sums[i] += value;
        }
    }
    let mut sum: i32 = sums.iter().sum();
    for (x, out) in rest.iter().zip(out_rest) {
        let value = round(x * scale);
        *out = value as i8;
        sum += value;
    }
    *token = TokenScale { scale, sum };
}

/// The nearest integer, of two the even one, for numbers of less than 7 bits (as all are whose scale is finite): the sum has
/// no bits below 1. Others give any int8, and no more is asked of them.
#[inline(always)]
pub(crate) fn round(x: f32) -> i32 {
    const SHIFT: f32 = 1.5 * (1 << 23) as f32;
    let bits = (x + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32;
    i32::from(bits as i8)
}

/// The largest absolute value; infinite or not a number if an element is.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let (groups, rest) = x.as_chunks::<LANES>();
    // The bits of positive floats are in the order of the floats, with those of infinity and what is not a number last.
    let mut most = [0u32; LANES];
    for x in groups {
        for i in 0..LANES {
            most[i] = most[i].max(x[i].abs().to_bits());
        }
    }
    let most = most.into_iter().chain(rest.iter().map(|x| x.abs().to_bits())).fold(0, u32::max);
    f32::from_bits(most)
}
