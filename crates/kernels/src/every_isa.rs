//! Every function that [`multiversion!`](crate::isa) compiles once for each set of instructions, on all that this CPU has.
//!
//! What a function has to give is what its body gives without any of these instructions, bit for bit: with fused
//! multiply-adds, which are exact in software too, or without them. The bodies themselves are held to plain arithmetic in
//! f64, here and in `tests/`.
#![allow(clippy::type_complexity, reason = "the types of the functions that are compared")]

use crate::{
    GatedUnit, Isa, Quantized, TernaryLayout, TernaryRef, accumulate, bounded, compact, dense, float,
    gated_matmul, leading, pack, quantize, rotary,
};

/// Lengths with and without whole vectors and rests of every kind.
const LENGTHS: [usize; 12] = [1, 2, 7, 15, 16, 17, 31, 33, 64, 100, 257, 2560];

fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1 << 23) as f32) - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Compares `function` on every set of instructions with the body that it is made of.
fn check<T: PartialEq + std::fmt::Debug>(
    name: &str,
    function: impl Fn() -> T,
    plain: impl Fn() -> T,
    fused: impl Fn() -> T,
) {
    let (plain, fused) = (plain(), fused());
    for isa in Isa::available() {
        let expected = if isa.is_fused() { &fused } else { &plain };
        assert_eq!(&isa.force(&function), expected, "{name} on {isa}");
    }
}

#[test]
fn forcing_is_seen_and_ends() {
    let best = Isa::detect();
    for isa in Isa::available() {
        assert_eq!(isa.force(Isa::detect), isa);
    }
    assert_eq!(Isa::detect(), best);
}

#[test]
fn norms() {
    for length in LENGTHS {
        let (x, weight) = (noise(1, length), noise(2, length));
        let with = |function: &dyn Fn(&[f32], &[f32], f32, &mut [f32])| {
            let mut out = vec![0.0; length];
            function(&x, &weight, 1e-5, &mut out);
            bits(&out)
        };
        check(
            "norm_token",
            || with(&float::norm_token),
            || with(&float::norm_token_body::<false>),
            || with(&float::norm_token_body::<true>),
        );
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / length as f64;
        for isa in Isa::available() {
            let found = isa.force(|| with(&float::norm_token));
            for ((found, x), weight) in found.iter().zip(&x).zip(&weight) {
                let exact = f64::from(*weight) * f64::from(*x) / (mean + 1e-5).sqrt();
                let found = f64::from(f32::from_bits(*found));
                assert!((found - exact).abs() <= 2e-6 * exact.abs(), "{isa}: {found} {exact}");
            }
        }
    }
}

#[test]
fn gated_units() {
    for length in LENGTHS {
        let gate: Vec<f32> = noise(3, length).iter().map(|x| x * 30.0).collect();
        let up = noise(4, length);
        let with = |function: &dyn Fn(&[f32], &[f32], &mut [f32])| {
            let mut out = vec![0.0; length];
            function(&gate, &up, &mut out);
            bits(&out)
        };
        check(
            "relu2_token",
            || with(&float::relu2_token),
            || with(&float::relu2_token_body::<false>),
            || with(&float::relu2_token_body::<true>),
        );
        check(
            "silu_token",
            || with(&float::silu_token),
            || with(&float::silu_token_body::<false>),
            || with(&float::silu_token_body::<true>),
        );
        for isa in Isa::available() {
            let found = isa.force(|| with(&float::silu_token));
            for ((found, gate), up) in found.iter().zip(&gate).zip(&up) {
                let (gate, up) = (f64::from(*gate), f64::from(*up));
                let exact = gate / (1.0 + (-gate).exp()) * up;
                let found = f64::from(f32::from_bits(*found));
                assert!((found - exact).abs() <= 2e-6 * exact.abs().max(1e-6), "{isa}: {found} {exact}");
            }
        }
    }
}

#[test]
fn rotations() {
    for half in LENGTHS {
        let (x, angles) = (noise(5, 2 * half), noise(6, half));
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a * 9.0).sin_cos()).unzip();
        let with = |function: &dyn Fn(&[f32], &[f32], &[f32], &mut [f32])| {
            let mut out = vec![0.0; 2 * half];
            function(&x, &cos, &sin, &mut out);
            bits(&out)
        };
        check(
            "head",
            || with(&rotary::head),
            || with(&rotary::head_body::<false>),
            || with(&rotary::head_body::<true>),
        );
    }
}

#[test]
fn maxima() {
    for length in [1, 31, 256, 257, 1000] {
        let mut x = noise(7, length);
        x[length / 2] = f32::NAN;
        let with = |function: &dyn Fn(&[f32], &mut [f32])| {
            let mut out = vec![f32::NEG_INFINITY; length.div_ceil(256)];
            function(&x, &mut out);
            bits(&out)
        };
        check(
            "chunk_maxima",
            || with(&leading::chunk_maxima),
            || with(&leading::chunk_maxima_body::<false>),
            || with(&leading::chunk_maxima_body::<true>),
        );
    }
}

#[test]
fn bounds_of_products() {
    for length in LENGTHS {
        let (weights, errors, norms) = (noise(5, length), noise(6, length), noise(7, length));
        let codes: Vec<u8> = weights.iter().map(|w| (w * 127.0) as i8 as u8 ^ 128).collect();
        let with = |function: &dyn Fn(&[f32], &[u8], f32, &mut [f32; 2])| {
            let mut sums = [0.0; 2];
            function(&weights, &codes, 0.008, &mut sums);
            bits(&sums)
        };
        check(
            "sums_of_squares",
            || with(&bounded::sums_of_squares),
            || with(&bounded::squares_body::<false>),
            || with(&bounded::squares_body::<true>),
        );
        let with = |function: &dyn Fn(&[f32], &[f32], &[f32], (f32, f32), &mut [f32])| {
            let mut out = vec![0.0; length];
            function(&weights, &errors, &norms, (0.3, -0.7), &mut out);
            bits(&out)
        };
        check(
            "limit",
            || with(&bounded::limit),
            || with(&bounded::limit_body::<false>),
            || with(&bounded::limit_body::<true>),
        );
    }
}

type Product<'a, W> = &'a dyn Fn(&[W], &[f32], usize, &mut [&mut [f32]]);

/// The bits of a product of plain weights.
fn product<W>(w: &[W], x: &[f32], cols: usize, function: Product<'_, W>) -> Vec<u32> {
    let rows = w.len() / cols;
    let mut out = vec![0.0; x.len() / cols * rows];
    function(w, x, cols, &mut out.chunks_mut(rows).collect::<Vec<_>>());
    bits(&out)
}

#[test]
fn plain_products() {
    for (rows, cols, tokens) in [(1, 1, 1), (5, 33, 3), (9, 100, 6), (6, 257, 1)] {
        let (w, x) = (noise(8, rows * cols), noise(9, tokens * cols));
        let singles: Vec<[u8; 4]> = w.iter().map(|w| w.to_le_bytes()).collect();
        let brains: Vec<[u8; 2]> = w.iter().map(|w| half::bf16::from_f32(*w).to_le_bytes()).collect();
        check(
            "singles",
            || product(&singles, &x, cols, &dense::singles),
            || product(&singles, &x, cols, &dense::singles_body::<false>),
            || product(&singles, &x, cols, &dense::singles_body::<true>),
        );
        check(
            "brains",
            || product(&brains, &x, cols, &dense::brains),
            || product(&brains, &x, cols, &dense::brains_body::<false>),
            || product(&brains, &x, cols, &dense::brains_body::<true>),
        );
    }
}

#[test]
fn roundings_of_weights() {
    for length in [1, 63, 64, 65, 128, 129, 640] {
        let row = noise(10, length);
        let with = |function: &dyn Fn(&[f32], &mut [u8], &mut [f32])| {
            let (mut codes, mut scales) =
                (vec![0u8; length.next_multiple_of(128)], vec![0.0; length.div_ceil(128)]);
            function(&row, &mut codes, &mut scales);
            (codes, bits(&scales))
        };
        check(
            "round_to_8",
            || with(&|row, codes, scales| compact::round_to_8(row, codes, &mut scales[0])),
            || with(&|row, codes, scales| compact::round_to_8_body::<false>(row, codes, &mut scales[0])),
            || with(&|row, codes, scales| compact::round_to_8_body::<true>(row, codes, &mut scales[0])),
        );
        check(
            "round_to_4",
            || with(&compact::round_to_4),
            || with(&compact::round_to_4_body::<false>),
            || with(&compact::round_to_4_body::<true>),
        );
    }
}

/// The values, scale bits and sum of one token.
fn quantized(
    x: &[f32],
    function: impl Fn(&[f32], &mut [i8], &mut quantize::TokenScale),
) -> (Vec<i8>, u32, i32) {
    let (mut values, mut token) = (vec![0; x.len()], quantize::TokenScale::default());
    function(x, &mut values, &mut token);
    (values, token.scale.to_bits(), token.sum)
}

#[test]
fn quantisation() {
    for length in LENGTHS {
        let x = noise(11, length);
        check(
            "quantize_token",
            || quantized(&x, quantize::quantize_token),
            || quantized(&x, quantize::quantize_token_body::<false>),
            || quantized(&x, quantize::quantize_token_body::<true>),
        );
        let largest = x.iter().fold(1e-5f32, |most, x| most.max(x.abs()));
        for isa in Isa::available() {
            let (values, scale, sum) = isa.force(|| quantized(&x, quantize::quantize_token));
            let scale = f32::from_bits(scale);
            assert!((scale - 127.0 / largest).abs() <= 1e-6 * scale, "{isa}");
            assert_eq!(sum, values.iter().map(|v| i32::from(*v)).sum::<i32>(), "{isa}");
            let expected: Vec<i8> = x.iter().map(|x| (x * scale).round_ties_even() as i8).collect();
            assert_eq!(values, expected, "{isa}");
        }
    }
}

/// What is normalised and quantised in one step is what two steps give.
#[test]
fn quantisation_of_norms() {
    for cols in LENGTHS {
        let tokens = 3;
        let (x, weight) = (noise(12, tokens * cols), noise(13, cols));
        for isa in Isa::available() {
            let (together, apart) = isa.force(|| {
                let (mut together, mut apart) = (Quantized::default(), Quantized::default());
                together.quantize_normed(&x, &weight, 1e-6);
                let mut normed = vec![0.0; x.len()];
                float::rms_norm(&x, &weight, 1e-6, &mut normed);
                apart.quantize(&normed, cols);
                (together, apart)
            });
            for (t, x) in x.chunks(cols).enumerate() {
                assert_eq!(together.values(t), apart.values(t), "{isa}, {cols} columns");
                assert_eq!(together.scale(t), apart.scale(t), "{isa}, {cols} columns");
                let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / cols as f64;
                for ((q, x), weight) in together.values(t).iter().zip(x).zip(&weight) {
                    let exact = f64::from(*weight) * f64::from(*x) / (mean + 1e-6).sqrt();
                    let exact = exact * f64::from(together.scale(t));
                    assert!((f64::from(*q) - exact).abs() <= 0.501, "{isa}: {q} {exact}");
                }
            }
        }
    }
}

/// A gated unit of two products is what the products and the unit give one after the other.
#[test]
fn gated_products() {
    let (rows, tokens) = (12, 3);
    for (layout, cols) in [(TernaryLayout::Quarters, 101), (TernaryLayout::I2s, 384)] {
        let trits =
            |seed| noise(seed, rows * cols).iter().map(|x| (x * 1.5).round() as i8).collect::<Vec<i8>>();
        let codes = [14, 15].map(|seed| pack(layout, &trits(seed), rows, cols).expect("a valid shape"));
        let weights =
            codes.each_ref().map(|c| TernaryRef::new(layout, c, rows, cols).expect("a valid shape"));
        let scales = [0.01, 0.003];
        let mut x = Quantized::default();
        x.quantize(&noise(16, tokens * cols), cols);
        let sums = weights.map(|w| accumulate(Isa::Scalar, w, &x));
        for unit in [GatedUnit::Relu2, GatedUnit::Silu] {
            for isa in Isa::available() {
                let found = isa.force(|| {
                    let mut out = vec![f32::NAN; tokens * rows];
                    let [gate, up] = [0, 1].map(|i| (weights[i], scales[i]));
                    gated_matmul(unit, gate, up, &x, &mut out);
                    out
                });
                let mut expected = vec![0.0; tokens * rows];
                for t in 0..tokens {
                    let [gate, up] = [0, 1].map(|i| {
                        let sums = &sums[i][t * rows..(t + 1) * rows];
                        sums.iter().map(|sum| *sum as f32 * (scales[i] / x.scale(t))).collect::<Vec<f32>>()
                    });
                    let out = &mut expected[t * rows..(t + 1) * rows];
                    match (unit, isa.is_fused()) {
                        (GatedUnit::Relu2, _) => float::relu2_token_body::<false>(&gate, &up, out),
                        (GatedUnit::Silu, false) => float::silu_token_body::<false>(&gate, &up, out),
                        (GatedUnit::Silu, true) => float::silu_token_body::<true>(&gate, &up, out),
                    }
                }
                assert_eq!(bits(&found), bits(&expected), "{unit:?} {layout:?} on {isa}");
            }
        }
    }
}
