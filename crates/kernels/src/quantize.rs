//! int8 activations, one scale for each token.

use std::sync::OnceLock;

use crate::{
    float::norm_token,
    isa::multiversion,
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
    /// Each token from a new line on, [`stride`] lines apart.
    lines: Vec<Line>,
    pub(crate) tokens: Vec<TokenScale>,
    pub(crate) cols: usize,
    /// What [`fields`](Self::fields) has made.
    fields: OnceLock<Vec<Line>>,
    /// What [`starts`](Self::starts) has made.
    starts: OnceLock<Vec<Line>>,
}

/// The lines of all tokens.
#[derive(Clone, Copy)]
pub(crate) struct Lines<'a> {
    lines: &'a [Line],
    /// Lines from one token to the next.
    pub(crate) stride: usize,
    /// Lines of a token that are used.
    pub(crate) used: usize,
}

impl<'a> Lines<'a> {
    /// Those of a token.
    pub(crate) fn of(&self, token: usize) -> &'a [Line] {
        &self.lines[token * self.stride..][..self.used]
    }
}

/// Lines from one token to the next where each has `used`. An odd number: otherwise the same line of several tokens would lie
/// in the same few sets of a cache.
fn stride(used: usize) -> usize {
    used | 1
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
        self.starts.take();
        self.tokens.resize(elements / cols, TokenScale::default());
        self.lines.resize(elements / cols * stride(cols.div_ceil(Line::BYTES)), Line::EMPTY);
    }

    /// The place of each token.
    fn parts(&mut self) -> impl Iterator<Item = (&mut [i8], &mut TokenScale)> {
        let cols = self.cols;
        let lines = self.lines.chunks_exact_mut(stride(cols.div_ceil(Line::BYTES)));
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
        &Line::bytes(self.lines().of(token))[..self.cols]
    }

    /// The values of all tokens. What lies behind the last column of a token is any number.
    pub(crate) fn lines(&self) -> Lines<'_> {
        let used = self.cols.div_ceil(Line::BYTES);
        Lines { lines: &self.lines, stride: stride(used), used }
    }

    /// The values as codes in I2_S lie in vectors of 64 bytes, which are two groups: for each vector what its codes in each
    /// field of a byte are multiplied by, from the lowest field. Behind a last single group are zeros. Made once for all
    /// products, as it takes a good part of the time of a few rows.
    ///
    /// The width is a multiple of [`GROUP`].
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "vectors of AVX-512"))]
    pub(crate) fn fields(&self) -> Lines<'_> {
        let used = FIELDS * self.cols.div_ceil(FIELDS * Line::BYTES);
        let stride = stride(used);
        let lines = self.fields.get_or_init(|| {
            let mut all = vec![Line::EMPTY; self.tokens() * stride];
            let mut tokens: Vec<_> = all.chunks_exact_mut(stride).collect();
            team::for_each_mut(&mut tokens, |token, lines| {
                let groups = self.values(token).as_chunks::<GROUP>().0;
                for (lines, groups) in lines.as_chunks_mut::<FIELDS>().0.iter_mut().zip(groups.chunks(2)) {
                    for (g, group) in groups.iter().enumerate() {
                        // The first columns are in the highest bits.
                        for (line, part) in lines.iter_mut().zip(group.as_chunks::<PART>().0.iter().rev()) {
                            line.0.as_chunks_mut().0[g] = *part;
                        }
                    }
                }
            });
            all
        });
        Lines { lines, stride, used }
    }

    /// For each token a line with 16 times what a sum of products with codes, which are weights + 1, begins with.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "tiles of AMX"))]
    pub(crate) fn starts(&self) -> &[Line] {
        self.starts.get_or_init(|| {
            let line = |token: &TokenScale| {
                let mut line = Line::EMPTY;
                (0..Line::BYTES / 4).for_each(|lane| line.set_word(lane, (-token.sum).cast_unsigned()));
                line
            };
            self.tokens.iter().map(line).collect()
        })
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
    // Plain loops, one for each result, become vectors. A loop over groups of lanes with sums of their own becomes gathers.
    for (out, x) in values.iter_mut().zip(x) {
        *out = round(x * scale) as i8;
    }
    let sum = values.iter().map(|value| i32::from(*value)).sum();
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
    // The bits of positive floats are in the order of the floats, with those of infinity and what is not a number last.
    f32::from_bits(x.iter().map(|x| x.abs().to_bits()).fold(0, u32::max))
}
