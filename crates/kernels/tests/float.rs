//! The float operations against plain arithmetic in f64, and that their bits do not depend on how they are computed.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use ternion_kernels::{
    Attention, DenseRef, Team, attention, dense_matmul, dense_matmul_part,
    kv::{BLOCK, KvBlocks},
    relu2_glu, relu2_part, rms_norm, rms_norm_here, silu_glu,
};

fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1 << 23) as f32) - 1.0
        })
        .collect()
}

fn team(threads: usize) -> Team {
    Team::new(threads).unwrap()
}

fn close(ours: f32, exact: f64, size: f64) -> bool {
    (f64::from(ours) - exact).abs() <= 2e-6 * size.max(exact.abs())
}

#[test]
fn dense_products_of_all_types() {
    for (rows, cols, tokens) in [(1, 1, 1), (7, 33, 3), (258, 100, 5), (600, 64, 9)] {
        let weights = noise(1, rows * cols);
        let x = noise(2, tokens * cols);
        let singles: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let halves: Vec<u8> = weights.iter().flat_map(|w| half::f16::from_f32(*w).to_le_bytes()).collect();
        let brains: Vec<u8> = weights.iter().flat_map(|w| half::bf16::from_f32(*w).to_le_bytes()).collect();
        for (w, round) in [
            (DenseRef::F32(&singles), (|w| w) as fn(f32) -> f32),
            (DenseRef::F16(&halves), |w| half::f16::from_f32(w).to_f32()),
            (DenseRef::Bf16(&brains), |w| half::bf16::from_f32(w).to_f32()),
        ] {
            let stride = rows + 3;
            let mut all = vec![f32::NAN; tokens * stride];
            team(3).install(|| dense_matmul(w, rows, cols, &x, &mut all, stride));
            for of in [1, 2, 7, 100] {
                let mut parts = vec![f32::NAN; all.len()];
                for part in 0..of {
                    let at = parts.as_mut_ptr();
                    // SAFETY: The output has room for all tokens, and nobody else writes to it.
                    unsafe { dense_matmul_part(w, (rows, cols), &x, at, stride, (part, of)) };
                }
                let bits = |floats: &[f32]| floats.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&parts), bits(&all), "{of} parts");
            }
            let mut row = vec![0.0; cols];
            for n in 0..rows {
                w.row(n, &mut row);
                for t in 0..tokens {
                    let pairs = row.iter().zip(&x[t * cols..]);
                    let exact: f64 = pairs.clone().map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                    let size: f64 = pairs.map(|(w, x)| f64::from(w * x).abs()).sum();
                    assert!(close(all[t * stride + n], exact, size), "{rows} {cols} {t} {n}");
                }
                assert_eq!(row[0], round(weights[n * cols]));
            }
            for t in 0..tokens {
                assert!(all[t * stride + rows..(t + 1) * stride].iter().all(|y| y.is_nan()));
                let mut one = vec![0.0; rows];
                team(1).install(|| dense_matmul(w, rows, cols, &x[t * cols..(t + 1) * cols], &mut one, rows));
                assert_eq!(one, all[t * stride..t * stride + rows], "the bits of token {t}");
            }
        }
    }
}

#[test]
fn normalisation_and_gated_units() {
    for width in [1, 15, 16, 17, 100, 2560] {
        let tokens = 30;
        let x = noise(3, tokens * width);
        let weight = noise(4, width);
        let mut all = vec![0.0; x.len()];
        team(3).install(|| rms_norm(&x, &weight, 1e-5, &mut all));
        let mut here = vec![0.0; x.len()];
        rms_norm_here(&x, &weight, 1e-5, &mut here);
        assert_eq!(here, all);
        for (t, row) in x.chunks_exact(width).enumerate() {
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
            let mut one = vec![0.0; width];
            rms_norm(row, &weight, 1e-5, &mut one);
            assert_eq!(one, all[t * width..(t + 1) * width]);
            for i in 0..width {
                let exact = f64::from(weight[i]) * f64::from(row[i]) / (mean + 1e-5).sqrt();
                assert!(close(one[i], exact, 0.0), "{width} {t} {i}");
            }
        }

        let x: Vec<f32> = noise(5, tokens * 2 * width).iter().map(|x| x * 20.0).collect();
        for silu in [true, false] {
            let mut all = vec![0.0; tokens * width];
            let unit = if silu { silu_glu } else { relu2_glu };
            team(3).install(|| unit(&x, width, &mut all));
            for (t, row) in x.chunks_exact(2 * width).enumerate() {
                for i in 0..width {
                    let (g, u) = (f64::from(row[i]), f64::from(row[width + i]));
                    let exact = if silu { g / (1.0 + (-g).exp()) * u } else { g.max(0.0).powi(2) * u };
                    assert!(close(all[t * width + i], exact, 1e-12), "{silu} {width} {g} {u}");
                }
                if !silu {
                    let mut here = vec![0.0; width];
                    relu2_part(&row[..width], &row[width..], &mut here);
                    assert_eq!(here, all[t * width..(t + 1) * width]);
                }
            }
        }
    }
}

#[test]
fn silu_of_the_extremes() {
    for (gate, expected) in
        [(1000.0, 1000.0), (-1000.0, 0.0), (0.0, 0.0), (f32::MAX, f32::MAX), (f32::MIN, 0.0)]
    {
        let mut out = [0.0];
        silu_glu(&[gate, 1.0], 1, &mut out);
        assert!((out[0] - expected).abs() <= 1e-6 * expected.abs() + 1e-30, "{gate}: {}", out[0]);
    }
    for unit in [silu_glu, relu2_glu] {
        let mut out = [0.0];
        unit(&[f32::NAN, 1.0], 1, &mut out);
        assert!(out[0].is_nan());
    }
}

/// A KV cache of one layer in one of its types.
#[derive(Default)]
struct Cache {
    f32: [Vec<Vec<f32>>; 2],
    f16: [Vec<Vec<u16>>; 2],
    int8: [Vec<(Vec<i8>, Vec<f32>)>; 2],
}

const TYPES: [&str; 3] = ["f32", "f16", "int8"];

impl Cache {
    /// Keys and values `[positions, kv_heads, head_dim]`, which are rounded to what is stored. What lies behind them is not
    /// to be read.
    fn new(name: &str, k: &mut [f32], v: &mut [f32], kv_heads: usize, head_dim: usize) -> Self {
        let mut cache = Self::default();
        let (plane, width) = (kv_heads * head_dim * BLOCK, kv_heads * head_dim);
        for (side, x) in [k, v].into_iter().enumerate() {
            for (position, row) in x.chunks_exact_mut(width).enumerate() {
                let p = position % BLOCK;
                if p == 0 {
                    cache.f32[side].push(vec![1e30; plane]);
                    cache.f16[side].push(vec![0x7bff; plane]);
                    cache.int8[side].push((vec![77; plane], vec![f32::NAN; kv_heads * BLOCK]));
                }
                for (head, row) in row.chunks_exact_mut(head_dim).enumerate() {
                    let scale = row.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
                    for (d, x) in row.iter_mut().enumerate() {
                        let at = [(head * head_dim + d) * BLOCK + p, (head * BLOCK + p) * head_dim + d];
                        let paired = [
                            ((head * head_dim / 2 + d / 2) * BLOCK + p) * 2 + d % 2,
                            ((head * BLOCK / 2 + p / 2) * head_dim + d) * 2 + p % 2,
                        ];
                        match name {
                            "f32" => cache.f32[side].last_mut().unwrap()[at[side]] = *x,
                            "f16" => {
                                let half = half::f16::from_f32(*x);
                                cache.f16[side].last_mut().unwrap()[at[side]] = half.to_bits();
                                *x = half.to_f32();
                            }
                            _ => {
                                let block = cache.int8[side].last_mut().unwrap();
                                let rounded = (*x / scale).round();
                                block.0[paired[side]] = rounded as i8;
                                block.1[head * BLOCK + p] = scale;
                                *x = rounded * scale;
                            }
                        }
                    }
                }
            }
        }
        cache
    }

    fn with(&self, name: &str, run: impl FnOnce(&KvBlocks<'_>)) {
        match name {
            "f32" => {
                let [keys, values] =
                    self.f32.each_ref().map(|s| s.iter().map(Vec::as_slice).collect::<Vec<_>>());
                run(&KvBlocks::F32 { keys, values });
            }
            "f16" => {
                let [keys, values] =
                    self.f16.each_ref().map(|s| s.iter().map(Vec::as_slice).collect::<Vec<_>>());
                run(&KvBlocks::F16 { keys, values });
            }
            _ => {
                let [keys, values] = self
                    .int8
                    .each_ref()
                    .map(|s| s.iter().map(|(x, scales)| (&x[..], &scales[..])).collect::<Vec<_>>());
                run(&KvBlocks::Int8 { keys, values });
            }
        }
    }
}

#[test]
fn attention_of_all_shapes() {
    for name in TYPES {
        for shape in [
            (1, 1, 2, 3),
            (4, 2, 16, 70),
            (20, 5, 128, 130),
            (6, 2, 72, 66),
            (3, 1, 100, 200),
            (8, 8, 64, 65),
        ] {
            attention_of(name, shape);
        }
    }
    attention_of("f32", (1, 1, 1, 3));
}

fn attention_of(name: &str, (heads, kv_heads, head_dim, length): (usize, usize, usize, usize)) {
    {
        let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let q = noise(6, length * width);
        let (mut k, mut v) = (noise(7, length * kv_width), noise(8, length * kv_width));
        let cache = Cache::new(name, &mut k, &mut v, kv_heads, head_dim);
        let scale = 3.0 / (head_dim as f32).sqrt();
        let run = |threads: usize, from: usize, to: usize| {
            let shape = Attention { heads, kv_heads, head_dim, past: from, scale };
            let mut out = vec![0.0; (to - from) * width];
            cache.with(name, |kv| {
                team(threads).install(|| attention(shape, &q[from * width..to * width], kv, &mut out));
            });
            out
        };
        let all = run(1, 0, length);
        // Queries and weights in 16 bits beside the rounding of sums.
        let tolerance = if name == "int8" { 6e-5 } else { 3e-6 };
        for position in [0, 1, length / 2, length - 1] {
            for head in 0..heads {
                let kv = head / (heads / kv_heads);
                let query = &q[position * width + head * head_dim..][..head_dim];
                let at = |x: &[f32], p: usize, d: usize| f64::from(x[p * kv_width + kv * head_dim + d]);
                let scores: Vec<f64> = (0..=position)
                    .map(|p| {
                        (0..head_dim).map(|d| f64::from(query[d]) * at(&k, p, d)).sum::<f64>()
                            * f64::from(scale)
                    })
                    .collect();
                let most = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
                let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
                for d in 0..head_dim {
                    let exact: f64 =
                        (0..=position).map(|p| (scores[p] - most).exp() / total * at(&v, p, d)).sum();
                    let ours = all[position * width + head * head_dim + d];
                    assert!(
                        (f64::from(ours) - exact).abs() < tolerance,
                        "{name} {heads} {head_dim} {position}: {ours} {exact}"
                    );
                }
            }
        }
        for chunk in [1, 3, 17, 64] {
            for threads in [1, 3] {
                for from in (0..length).step_by(chunk) {
                    let to = length.min(from + chunk);
                    assert_eq!(run(threads, from, to), all[from * width..to * width], "chunks of {chunk}");
                }
            }
        }
    }
}
