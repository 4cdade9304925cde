//! Normalisation and activations.

use crate::{
    isa::multiversion,
    lanes::{self, LANES},
    team,
};

/// `weight * (x / sqrt(mean(x^2) + eps))` for each token of `x`, `[tokens, weight.len()]`, in the order in which
/// transformers multiplies.
///
/// # Panics
/// If the lengths do not agree.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert!(
        width > 0 && x.len() == out.len() && x.len().is_multiple_of(width),
        "lengths of the normalisation"
    );
    let mut tokens: Vec<_> = x.chunks_exact(width).zip(out.chunks_exact_mut(width)).collect();
    team::for_each_mut(&mut tokens, |_, (x, out)| norm_token(x, weight, eps, out));
}

/// [`rms_norm`] on the calling thread alone, for an engine with threads of its own.
///
/// # Panics
/// As [`rms_norm`].
pub fn rms_norm_here(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert!(
        width > 0 && x.len() == out.len() && x.len().is_multiple_of(width),
        "lengths of the normalisation"
    );
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        norm_token(x, weight, eps, out);
    }
}

multiversion! {
    pub(crate) fn norm_token(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = norm_token_body;
}

#[inline(always)]
pub(crate) fn norm_token_body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let (groups, rest) = x.as_chunks::<LANES>();
    // Two sums, since a chain of additions waits for each.
    let mut sums = [[0.0; LANES]; 2];
    for (i, group) in groups.iter().enumerate() {
        lanes::accumulate::<FMA>(&mut sums[i % 2], group, group);
    }
    let rest = lanes::partial(rest);
    lanes::accumulate::<FMA>(&mut sums[0], &rest, &rest);
    let mean = (lanes::sum(sums[0]) + lanes::sum(sums[1])) / x.len() as f32;
    let factor = 1.0 / (mean + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = weight * (x * factor);
    }
}

/// Adds `y` to `x`, element by element.
///
/// # Panics
/// If the lengths differ.
pub fn add(x: &mut [f32], y: &[f32]) {
    const PIECE: usize = 1 << 14;
    assert_eq!(x.len(), y.len(), "lengths of the sum");
    let mut pieces: Vec<_> = x.chunks_mut(PIECE).zip(y.chunks(PIECE)).collect();
    team::for_each_mut(&mut pieces, |_, (x, y)| x.iter_mut().zip(*y).for_each(|(x, y)| *x += y));
}

/// `relu(gate)^2 * up` from tokens `[gate, up]` of twice `width` elements.
///
/// # Panics
/// If the lengths do not agree.
pub fn relu2_glu(x: &[f32], width: usize, out: &mut [f32]) {
    gated(x, width, out, relu2_token);
}

/// `gate * sigmoid(gate) * up` from tokens `[gate, up]` of twice `width` elements.
///
/// # Panics
/// If the lengths do not agree.
pub fn silu_glu(x: &[f32], width: usize, out: &mut [f32]) {
    gated(x, width, out, silu_token);
}

/// `relu(gate)^2 * up`, element by element, on the calling thread alone: any part of a [`relu2_glu`] whose gate and up lie
/// apart.
///
/// # Panics
/// If the lengths differ.
pub fn relu2_part(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == out.len() && up.len() == out.len(), "lengths of the gated unit");
    relu2_token(gate, up, out);
}

fn gated(x: &[f32], width: usize, out: &mut [f32], unit: fn(&[f32], &[f32], &mut [f32])) {
    assert!(
        width > 0 && x.len() == 2 * out.len() && out.len().is_multiple_of(width),
        "lengths of the gated unit"
    );
    let mut tokens: Vec<_> = x.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)).collect();
    team::for_each_mut(&mut tokens, |_, (x, out)| {
        let (gate, up) = x.split_at(width);
        unit(gate, up, out);
    });
}

multiversion! {
    pub(crate) fn relu2_token(gate: &[f32], up: &[f32], out: &mut [f32]) = relu2_token_body;
}

#[inline(always)]
pub(crate) fn relu2_token_body<const FMA: bool>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        // Not `max`, which would make 0 of NaN.
        let gate = if *gate < 0.0 { 0.0 } else { *gate };
        *out = gate * gate * up;
    }
}

multiversion! {
    pub(crate) fn silu_token(gate: &[f32], up: &[f32], out: &mut [f32]) = silu_token_body;
}

#[inline(always)]
pub(crate) fn silu_token_body<const FMA: bool>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + lanes::exp::<FMA>(-gate)) * up;
    }
}
