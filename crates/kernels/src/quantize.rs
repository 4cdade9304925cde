//! int8 activations, one scale for each token.

use crate::{
    float::norm_token,
    isa::multiversion,
    lanes::{self, LANES},
    team,
};

/// Activations `[tokens, cols]` as `round_half_even(x * s)` with `s = 127 / max(|x|, 1e-5)` for each token, as in
/// transformers' `BitLinear.activation_quant`.
///
/// A buffer that can be filled again and again. The scale of a token with an element that is infinite or NaN is NaN, and
/// so are its products: the failure is seen in the logits.
#[derive(Debug, Clone, Default)]
pub struct Quantized {
    pub(crate) values: Vec<i8>,
    pub(crate) tokens: Vec<TokenScale>,
    pub(crate) cols: usize,
}

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
        let tokens = x.chunks_exact(cols).zip(self.values.chunks_exact_mut(cols)).zip(&mut self.tokens);
        let mut tokens: Vec<_> = tokens.collect();
        team::for_each_mut(&mut tokens, |_, ((x, values), token)| quantize_token(x, values, token));
    }

    /// [`quantize`](Self::quantize) of what [`rms_norm`](crate::rms_norm) makes of `x`, which is not kept.
    ///
    /// # Panics
    /// If `weight` is empty or the length of `x` is no multiple of its length.
    pub fn quantize_normed(&mut self, x: &[f32], weight: &[f32], eps: f32) {
        let cols = weight.len();
        self.resize(x.len(), cols);
        let tokens = x.chunks_exact(cols).zip(self.values.chunks_exact_mut(cols)).zip(&mut self.tokens);
        let mut tokens: Vec<_> = tokens.collect();
        team::for_each_mut(&mut tokens, |_, ((x, values), token)| {
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
        for (t, (values, token)) in self.values.chunks_exact_mut(cols).zip(&mut self.tokens).enumerate() {
            quantize_token(&x[t * stride..t * stride + cols], values, token);
        }
    }

    fn resize(&mut self, elements: usize, cols: usize) {
        assert!(cols > 0 && elements.is_multiple_of(cols), "{elements} elements in tokens of {cols}");
        self.cols = cols;
        self.values.resize(elements, 0);
        self.tokens.resize(elements / cols, TokenScale::default());
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
        &self.values[token * self.cols..(token + 1) * self.cols]
    }

    /// The scale of a token: its values are its elements times this, rounded.
    pub fn scale(&self, token: usize) -> f32 {
        self.tokens[token].scale
    }
}

multiversion! {
    fn quantize_token(x: &[f32], values: &mut [i8], token: &mut TokenScale) = quantize_token_body;
}

#[inline(always)]
fn quantize_token_body<const FMA: bool>(x: &[f32], values: &mut [i8], token: &mut TokenScale) {
    let largest = largest(x);
    // Not `max`, which would make a number of NaN.
    let bound = if largest < 1e-5 { 1e-5 } else { largest };
    // Divided in this order because PyTorch does so for `127 / bound`; it can differ in the last bit.
    let scale = 127.0 * (1.0 / bound);
    let (groups, rest) = x.as_chunks::<LANES>();
    let (out_groups, out_rest) = values.as_chunks_mut::<LANES>();
    let mut sums = [0; LANES];
    for (x, out) in groups.iter().zip(out_groups) {
        for i in 0..LANES {
            // A cast through i32 is one instruction; within the clamp both casts are exact.
            let value = (x[i] * scale).round_ties_even().clamp(-128.0, 127.0) as i32;
            out[i] = value as i8;
            sums[i] += value;
        }
    }
    let mut sum: i32 = sums.iter().sum();
    for (x, out) in rest.iter().zip(out_rest) {
        let value = (x * scale).round_ties_even().clamp(-128.0, 127.0) as i32;
        *out = value as i8;
        sum += value;
    }
    *token = TokenScale { scale, sum };
}

/// The largest absolute value; NaN if an element is NaN.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let (groups, rest) = x.as_chunks::<LANES>();
    let mut most = [0.0f32; LANES];
    // The sum of all elements times 0 is NaN if one of them is NaN or infinite.
    let mut poison = [0.0f32; LANES];
    for x in groups {
        for i in 0..LANES {
            let a = x[i].abs();
            most[i] = if a > most[i] { a } else { most[i] };
            poison[i] += x[i] * 0.0;
        }
    }
    let mut tail = (0.0f32, 0.0f32);
    for &x in rest {
        tail = (tail.0.max(x.abs()), tail.1 + x * 0.0);
    }
    lanes::max(most).max(tail.0) + (lanes::sum(poison) + tail.1)
}
