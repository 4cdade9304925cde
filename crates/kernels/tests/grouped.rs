//! Products of weights with a scale for each group, on all instructions, against plain arithmetic.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use ternion_kernels::{
    ActivationType, GroupedInput, GroupedKind, GroupedMatrix, GroupedProduct, Isa, Team, WeightsError,
    grouped_matmul, grouped_matmul_f32, grouped_matmul_with,
};

/// A small generator, so that large cases need no large random input.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next() as f32 / (1u32 << 30) as f32 - 1.0).collect()
    }
}

/// Weights and scales as plain numbers, and the matrix that is made of them.
struct Case {
    weights: Vec<i32>,
    scales: Vec<f32>,
    matrix: GroupedMatrix,
    shape: [usize; 2],
    group: usize,
}

impl Case {
    fn new(kind: GroupedKind, shape: [usize; 2], group: usize, scale: impl Fn(usize) -> f32) -> Self {
        let [rows, cols] = shape;
        let mut noise = Noise(7);
        let mut weight = || match kind {
            GroupedKind::Ternary => (noise.next() % 3) as i32 - 1,
            GroupedKind::Binary => 2 * (noise.next() % 2) as i32 - 1,
        };
        let weights: Vec<i32> = (0..rows * cols).map(|_| weight()).collect();
        let scales: Vec<f32> = (0..rows * cols / group).map(scale).collect();
        let matrix = GroupedMatrix::new(kind, shape, group, |row, words, out| {
            let bits = 32 / kind.word();
            let weights = weights[row * cols..(row + 1) * cols].chunks_exact(kind.word());
            for (word, weights) in words.iter_mut().zip(weights) {
                let code = |w: &i32| if bits == 2 { *w + 1 } else { (*w + 1) / 2 } as u32;
                *word = weights.iter().enumerate().fold(0, |word, (i, w)| word | code(w) << (bits * i));
            }
            out.copy_from_slice(&scales[row * cols / group..(row + 1) * cols / group]);
            Ok::<(), WeightsError>(())
        });
        Self { weights, scales, matrix: matrix.unwrap(), shape, group }
    }

    fn weight(&self, row: usize, col: usize) -> f64 {
        let at = row * self.shape[1] + col;
        f64::from(self.weights[at]) * f64::from(self.scales[at / self.group])
    }

    /// The products in double precision.
    fn exact(&self, x: &[f32]) -> Vec<f64> {
        let [rows, cols] = self.shape;
        let rows_of = |x: &[f32]| -> Vec<f64> {
            (0..rows).map(|n| (0..cols).map(|k| self.weight(n, k) * f64::from(x[k])).sum()).collect()
        };
        x.chunks_exact(cols).flat_map(rows_of).collect()
    }

    fn product(&self, isa: Isa, x: &[f32], activations: ActivationType) -> Vec<f32> {
        let [rows, cols] = self.shape;
        let mut input = GroupedInput::default();
        input.quantize(x, &self.matrix, activations);
        let mut out = vec![f32::NAN; x.len() / cols * rows];
        grouped_matmul_with(
            isa,
            &[GroupedProduct { weights: &self.matrix, offset: 0 }],
            &input,
            &mut out,
            rows,
        );
        out
    }

    fn product_f32(&self, x: &[f32]) -> Vec<f32> {
        let [rows, cols] = self.shape;
        let mut out = vec![f32::NAN; x.len() / cols * rows];
        grouped_matmul_f32(&[GroupedProduct { weights: &self.matrix, offset: 0 }], x, &mut out, rows);
        out
    }
}

const KINDS: [GroupedKind; 2] = [GroupedKind::Ternary, GroupedKind::Binary];

fn half_scale(i: usize) -> f32 {
    half::f16::from_f32(0.01 + (i * 7919 % 101) as f32 / 100.0).to_f32()
}

/// With activations that int8 holds as they are and scales of 1, the products are the integer sums themselves.
#[test]
fn integer_sums_are_exact_on_all_instructions() {
    for kind in KINDS {
        for (shape, group) in [([1, 64], 64), ([16, 128], 128), ([37, 512], 256), ([48, 1152], 128)] {
            let case = Case::new(kind, shape, group, |_| 1.0);
            for tokens in [1, 2, 3, 4, 7, 16, 31] {
                let mut noise = Noise(tokens as u64);
                // Each plane of each group has a 127 or -127, so that its scale is 1.
                let x: Vec<f32> = (0..tokens * shape[1])
                    .map(|i| match i % 64 {
                        0..8 => 127.0 - 254.0 * (noise.next() % 2) as f32,
                        _ => (noise.next() % 255) as f32 - 127.0,
                    })
                    .collect();
                let expected: Vec<f32> = case.exact(&x).iter().map(|x| *x as f32).collect();
                for isa in Isa::available() {
                    for activations in [ActivationType::Int8, ActivationType::Int8x2] {
                        let found = case.product(isa, &x, activations);
                        assert!(found == expected, "{kind:?} {shape:?} {tokens} {isa} {activations}");
                    }
                }
                assert!(case.product_f32(&x) == expected, "{kind:?} {shape:?} {tokens}");
            }
        }
    }
}

#[test]
fn products_have_the_same_bits_on_all_instructions_and_are_close() {
    // Activations are at most 1, so rounding moves each by at most 1/254, and by as much less again with a second term. The
    // rest is that of float sums.
    let half_step = 1.0 / 254.0;
    let bounds =
        [(ActivationType::Int8, half_step + 1e-6), (ActivationType::Int8x2, half_step * half_step + 1e-6)];
    let odd = |i: usize| 0.01 + (i * 7919 % 101) as f32 / 100.0;
    for kind in KINDS {
        for (f16, scale) in [(true, half_scale as fn(usize) -> f32), (false, odd)] {
            for (shape, group) in [([5, 64], 64), ([33, 640], 128), ([17, 768], 256), ([64, 320], 64)] {
                let case = Case::new(kind, shape, group, scale);
                assert_eq!(case.matrix.has_f16_scales(), f16);
                for tokens in [1, 5, 16, 23] {
                    let x = Noise(tokens as u64).floats(tokens * shape[1]);
                    let exact = case.exact(&x);
                    let magnitude =
                        |n: usize| -> f64 { (0..shape[1]).map(|k| case.weight(n, k).abs()).sum() };
                    let magnitudes: Vec<f64> = (0..shape[0]).map(magnitude).collect();
                    let close = |found: &[f32], bound: f64| {
                        let pairs = found.iter().zip(&exact).zip(magnitudes.iter().cycle());
                        pairs.into_iter().all(|((a, b), most)| (f64::from(*a) - b).abs() <= bound * most)
                    };
                    for (activations, bound) in bounds {
                        let expected = case.product(Isa::Scalar, &x, activations);
                        assert!(close(&expected, bound), "{kind:?} {shape:?} {tokens} {activations}");
                        for isa in Isa::available() {
                            let found = case.product(isa, &x, activations);
                            assert!(found == expected, "{kind:?} {shape:?} {tokens} {isa} {activations}");
                        }
                    }
                    assert!(close(&case.product_f32(&x), 1e-6), "{kind:?} {shape:?} {tokens}");
                }
            }
        }
    }
}

#[test]
fn tokens_and_threads_change_nothing() {
    let case = Case::new(GroupedKind::Ternary, [200, 1024], 128, half_scale);
    let x = Noise(3).floats(37 * 1024);
    for activations in [ActivationType::Int8, ActivationType::Int8x2] {
        let all = case.product(Isa::detect(), &x, activations);
        for (x, expected) in x.chunks_exact(1024).zip(all.chunks_exact(200)) {
            assert!(case.product(Isa::detect(), x, activations) == expected);
        }
        let team = Team::new(3).unwrap();
        assert!(team.install(|| case.product(Isa::detect(), &x, activations)) == all);
    }
    let all = case.product_f32(&x);
    for (x, expected) in x.chunks_exact(1024).zip(all.chunks_exact(200)) {
        assert!(case.product_f32(x) == expected);
    }
    assert!(Team::new(2).unwrap().install(|| case.product_f32(&x)) == all);
}

#[test]
fn several_products_leave_what_lies_between() {
    let (a, b) = (
        Case::new(GroupedKind::Ternary, [20, 256], 128, half_scale),
        Case::new(GroupedKind::Ternary, [3, 256], 128, half_scale),
    );
    let x = Noise(5).floats(3 * 256);
    let products =
        [GroupedProduct { weights: &a.matrix, offset: 1 }, GroupedProduct { weights: &b.matrix, offset: 22 }];
    let mut input = GroupedInput::default();
    input.quantize(&x, &a.matrix, ActivationType::Int8);
    assert!(input.fits(&b.matrix));
    let mut out = vec![9.0; 2 * 30 + 25];
    grouped_matmul(&products, &input, &mut out, 30);
    let (expected_a, expected_b) = (
        a.product(Isa::detect(), &x, ActivationType::Int8),
        b.product(Isa::detect(), &x, ActivationType::Int8),
    );
    for t in 0..3 {
        let token = &out[t * 30..];
        assert_eq!((token[0], token[21]), (9.0, 9.0));
        assert_eq!(token[1..21], expected_a[t * 20..(t + 1) * 20]);
        assert_eq!(token[22..25], expected_b[t * 3..(t + 1) * 3]);
    }
    let short = std::panic::AssertUnwindSafe(|| grouped_matmul(&products, &input, &mut [0.0; 84], 30));
    assert!(std::panic::catch_unwind(short).is_err(), "the output is too short");
}

#[test]
fn rows_come_back_as_they_were() {
    for kind in KINDS {
        let case = Case::new(kind, [19, 384], 128, half_scale);
        let mut row = vec![0.0; 384];
        for n in 0..19 {
            case.matrix.row(n, &mut row);
            assert!((0..384).all(|k| f64::from(row[k]) == case.weight(n, k)), "{kind:?} {n}");
            assert_eq!(case.matrix.scale(n, 2), case.scales[n * 3 + 2]);
            assert_eq!(case.matrix.words(n).count(), 384 / kind.word());
        }
    }
}

#[test]
fn neighbouring_groups_with_one_scale_become_one() {
    let pairs = Case::new(GroupedKind::Ternary, [20, 256], 64, |i| half_scale(i / 2));
    assert_eq!((pairs.matrix.group(), pairs.matrix.bytes()), (128, 32 * 256 / 4 + 32 * 2 * 2));
    let single =
        Case::new(GroupedKind::Ternary, [20, 256], 64, |i| half_scale(if i == 41 { 9 } else { i / 2 }));
    assert_eq!(single.matrix.group(), 64);
    for case in [pairs, single] {
        let mut row = vec![0.0; 256];
        case.matrix.row(10, &mut row);
        assert!((0..256).all(|k| f64::from(row[k]) == case.weight(10, k)));
    }
}

#[test]
fn activations_that_are_no_numbers_are_seen_in_the_products() {
    let case = Case::new(GroupedKind::Ternary, [16, 256], 128, half_scale);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = Noise(1).floats(2 * 256);
        x[256 + 77] = bad;
        for isa in Isa::available() {
            let out = case.product(isa, &x, ActivationType::Int8x2);
            assert!(out[..16].iter().all(|x| x.is_finite()), "{isa}");
            assert!(out[16..].iter().all(|x| x.is_nan()), "{isa}");
        }
    }
    // Nothing overflows, and nothing that small counts.
    for value in [f32::MAX / 256.0, f32::MIN_POSITIVE, 0.0] {
        let out = case.product(Isa::detect(), &[value; 256], ActivationType::Int8x2);
        assert!(out.iter().all(|x| x.is_finite() && (value > 1.0 || *x == 0.0)), "{value}");
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let fill = |_: usize, _: &mut [u32], _: &mut [f32]| Ok::<(), WeightsError>(());
    for (shape, group) in [
        ([16, 128], 32),
        ([16, 96], 64),
        ([0, 128], 128),
        ([16, 0], 64),
        ([usize::MAX, 128], 128),
        ([16, 128], 256),
    ] {
        assert!(GroupedMatrix::new(GroupedKind::Ternary, shape, group, fill).is_err(), "{shape:?} {group}");
    }
    let failing = |row: usize, _: &mut [u32], _: &mut [f32]| match row {
        7 => Err(TestError::Row),
        _ => Ok(()),
    };
    let error = GroupedMatrix::new(GroupedKind::Binary, [16, 128], 128, failing).unwrap_err();
    assert_eq!(error, TestError::Row);
}

#[derive(Debug, PartialEq)]
enum TestError {
    Row,
    Shape,
}

impl From<WeightsError> for TestError {
    fn from(_: WeightsError) -> Self {
        Self::Shape
    }
}
