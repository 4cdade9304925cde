//! Rotary position embedding.

use crate::{Attention, float::norm_token, isa::multiversion, team};

/// Takes apart the products of query, key and value, `[tokens, heads + 2 * kv_heads, head_dim]`, and rotates queries and
/// keys: dimension `i` with `i + head_dim / 2`, as transformers' `rotate_half`, by the angle whose cosine and sine are
/// at `i` of the token's part of `cos` and `sin`, `[tokens, head_dim / 2]`.
///
/// # Panics
/// If the lengths do not agree with the shape, or `head_dim` is odd, or the shape has no elements or more than a slice can
/// have.
pub fn rotate(
    shape: &Attention,
    qkv: &[f32],
    angles: (&[f32], &[f32]),
    q: &mut [f32],
    k: &mut [f32],
    v: &mut [f32],
) {
    take_apart(shape, qkv, angles, (q, k, v), true);
}

/// [`rotate`] that leaves keys as they are.
///
/// # Panics
/// As [`rotate`].
pub fn rotate_queries(
    shape: &Attention,
    qkv: &[f32],
    angles: (&[f32], &[f32]),
    q: &mut [f32],
    k: &mut [f32],
    v: &mut [f32],
) {
    take_apart(shape, qkv, angles, (q, k, v), false);
}

fn take_apart(
    shape: &Attention,
    qkv: &[f32],
    (cos, sin): (&[f32], &[f32]),
    (q, k, v): (&mut [f32], &mut [f32], &mut [f32]),
    with_keys: bool,
) {
    let Attention { head_dim, .. } = *shape;
    let (width, kv_width) = shape.widths();
    // The widths are bounded, so that this does not overflow; the products below are at most the lengths of slices.
    let (row, half) = (width + 2 * kv_width, head_dim / 2);
    assert!(head_dim.is_multiple_of(2) && qkv.len().is_multiple_of(row), "shape of the products");
    let tokens = qkv.len() / row;
    assert!(
        q.len() == tokens * width && k.len() == tokens * kv_width && v.len() == k.len(),
        "lengths of q, k, v"
    );
    assert!(cos.len() == tokens * half && sin.len() == cos.len(), "one angle for each pair of dimensions");
    let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
    let parts = q.chunks_exact_mut(width).zip(k.chunks_exact_mut(kv_width)).zip(v.chunks_exact_mut(kv_width));
    let mut tokens: Vec<_> = qkv.chunks_exact(row).zip(angles).zip(parts).collect();
    team::for_each_mut(&mut tokens, |_, ((qkv, (cos, sin)), ((q, k), v))| {
        let (queries, keys) = (q.chunks_exact_mut(head_dim), k.chunks_exact_mut(head_dim));
        for (i, (from, to)) in qkv.chunks_exact(head_dim).zip(queries.chain(keys)).enumerate() {
            if with_keys || i < width / head_dim {
                head(from, cos, sin, to);
            } else {
                to.copy_from_slice(from);
            }
        }
        v.copy_from_slice(&qkv[width + kv_width..]);
    });
}

/// Normalises each head of the queries and keys in products of query, key and value, `[tokens, heads + 2 * kv_heads, head_dim]`:
/// `weight * (x / sqrt(mean(x^2) + eps))`, with a weight of `head_dim` elements and an epsilon for queries and for keys.
///
/// # Panics
/// As [`rotate`], and if a weight has another length.
pub fn norm_heads(shape: &Attention, qkv: &mut [f32], q: (&[f32], f32), k: (&[f32], f32)) {
    let Attention { heads, kv_heads, head_dim, .. } = *shape;
    let (width, kv_width) = shape.widths();
    let row = width + 2 * kv_width;
    assert!(qkv.len().is_multiple_of(row), "shape of the products");
    assert!(q.0.len() == head_dim && k.0.len() == head_dim, "a weight for each element of a head");
    let mut tokens: Vec<_> = qkv.chunks_exact_mut(row).collect();
    team::for_each_mut(&mut tokens, |_, token| {
        let mut head = vec![0.0; head_dim];
        for (i, x) in token.chunks_exact_mut(head_dim).take(heads + kv_heads).enumerate() {
            let (weight, eps) = if i < heads { q } else { k };
            head.copy_from_slice(x);
            norm_token(&head, weight, eps, x);
        }
    });
}

multiversion! {
    pub(crate) fn head(from: &[f32], cos: &[f32], sin: &[f32], to: &mut [f32]) = head_body;
}

#[inline(always)]
pub(crate) fn head_body<const FMA: bool>(from: &[f32], cos: &[f32], sin: &[f32], to: &mut [f32]) {
    let (x, y) = from.split_at(cos.len());
    let (to_x, to_y) = to.split_at_mut(cos.len());
    for i in 0..cos.len().min(sin.len()).min(x.len()).min(y.len()).min(to_x.len()).min(to_y.len()) {
        to_x[i] = x[i] * cos[i] - y[i] * sin[i];
        to_y[i] = x[i] * sin[i] + y[i] * cos[i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_rotated_and_values_stay() {
        let shape = Attention { heads: 2, kv_heads: 1, head_dim: 4, past: 0, scale: 1.0 };
        let qkv: Vec<f32> = (0..32).map(|i| i as f32).collect();
        // By nothing, and by a right angle for the second pair.
        let (cos, sin) = ([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]);
        let (mut q, mut k, mut v) = ([0.0; 16], [0.0; 8], [0.0; 8]);
        rotate(&shape, &qkv, (&cos, &sin), &mut q, &mut k, &mut v);
        assert_eq!(q[..8], qkv[..8]);
        assert_eq!(q[8..], [16.0, -19.0, 18.0, 17.0, 20.0, -23.0, 22.0, 21.0]);
        assert_eq!(k, [8.0, 9.0, 10.0, 11.0, 24.0, -27.0, 26.0, 25.0]);
        assert_eq!(v, [12.0, 13.0, 14.0, 15.0, 28.0, 29.0, 30.0, 31.0]);
    }

    #[test]
    fn heads_are_normalised_one_by_one_and_values_stay() {
        let shape = Attention { heads: 2, kv_heads: 1, head_dim: 4, past: 0, scale: 1.0 };
        let mut qkv: Vec<f32> = (0..32).map(|i| (i % 7) as f32 - 2.0).collect();
        let before = qkv.clone();
        let (q, k) = ([1.0, 2.0, 3.0, 4.0], [0.5; 4]);
        norm_heads(&shape, &mut qkv, (&q, 1e-6), (&k, 1e-2));
        for (i, (found, x)) in qkv.chunks_exact(4).zip(before.chunks_exact(4)).enumerate() {
            let (weight, eps) = if i % 4 < 2 { (&q, 1e-6) } else { (&k, 1e-2) };
            let mean = x.iter().map(|x| x * x).sum::<f32>() / 4.0;
            for n in 0..4 {
                let expected = if i % 4 == 3 { x[n] } else { weight[n] * x[n] / (mean + eps).sqrt() };
                assert!((found[n] - expected).abs() < 1e-5, "head {i}: {found:?}");
            }
        }
    }

    #[test]
    fn shapes_that_overflow_are_refused() {
        const WRAPS: usize = 288_230_376_151_711_748;
        let good = Attention { heads: 2, kv_heads: 1, head_dim: 4, past: 0, scale: 1.0 };
        let odd = [1, 3, usize::MAX];
        let sizes = [0, WRAPS, i64::MAX as usize, usize::MAX - 1, 1 << 62];
        let heads = sizes.map(|heads| Attention { heads, ..good });
        let kv_heads = sizes.map(|kv_heads| Attention { kv_heads, ..good });
        let dims = sizes.into_iter().chain(odd).map(|head_dim| Attention { head_dim, ..good });
        for shape in heads.into_iter().chain(kv_heads).chain(dims) {
            let run = std::panic::AssertUnwindSafe(|| {
                rotate(
                    &shape,
                    &[0.0; 16],
                    (&[0.0; 2], &[0.0; 2]),
                    &mut [0.0; 8],
                    &mut [0.0; 4],
                    &mut [0.0; 4],
                );
            });
            assert!(std::panic::catch_unwind(run).is_err(), "{shape:?}");
        }
    }
}
