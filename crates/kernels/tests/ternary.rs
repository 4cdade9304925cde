//! Every path for vector instructions against the scalar one, which is checked against plain arithmetic.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use proptest::prelude::*;
use ternion_kernels::{
    DenseRef, GatedUnit, Isa, MAX_COLS, Product, Quantized, Team, TernaryLayout, TernaryRef, accumulate,
    dense_matmul, gated_matmul_with, matmul, matmul_all, matmul_part, matmul_with, pack, relu2_glu, silu_glu,
    unpack,
};

/// Activations whose quantised values are these: the first of each token must be 127 or -127 or all 0.
fn quantized(values: &[i8], cols: usize) -> Quantized {
    let x: Vec<f32> = values.iter().map(|v| f32::from(*v)).collect();
    let mut out = Quantized::default();
    out.quantize(&x, cols);
    let stored: Vec<i8> = (0..out.tokens()).flat_map(|t| out.values(t).to_vec()).collect();
    assert_eq!(stored, values);
    out
}

fn naive(trits: &[i8], rows: usize, cols: usize, x: &Quantized) -> Vec<i32> {
    (0..x.tokens())
        .flat_map(|t| {
            (0..rows).map(move |n| {
                let row = &trits[n * cols..(n + 1) * cols];
                row.iter().zip(x.values(t)).map(|(w, q)| i32::from(*w) * i32::from(*q)).sum()
            })
        })
        .collect()
}

/// Both layouts; the second one only where the width allows it.
fn layouts(cols: usize) -> impl Iterator<Item = TernaryLayout> {
    let i2s = cols.is_multiple_of(128).then_some(TernaryLayout::I2s);
    std::iter::once(TernaryLayout::Quarters).chain(i2s)
}

/// A small generator, so that large cases need no large random input.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn trits(&mut self, count: usize) -> Vec<i8> {
        (0..count).map(|_| (self.next() % 3) as i8 - 1).collect()
    }

    /// Tokens of any int8 values that begin with 127.
    fn values(&mut self, tokens: usize, cols: usize) -> Vec<i8> {
        (0..tokens * cols)
            .map(|i| if i % cols == 0 { 127 } else { (self.next() % 255) as i8 })
            .collect::<Vec<i8>>()
            .into_iter()
            .map(|v| v.max(-127))
            .collect()
    }
}

/// Every trit times every int8 value that a token can have, at every place in a vector and in its tail, in each of the
/// four fields of a byte.
#[test]
fn every_trit_times_every_value_at_every_place() {
    every_product(TernaryLayout::Quarters, 64 + 32 + 5);
    // Two groups side by side in a vector, and one in its tail.
    every_product(TernaryLayout::I2s, 256 + 128);
}

fn every_product(layout: TernaryLayout, cols: usize) {
    const ROWS: usize = 12;
    for place in 0..cols {
        // Row n has one weight; three rows hold the three trits.
        let mut trits = vec![0i8; ROWS * cols];
        for row in 0..ROWS {
            trits[row * cols + place] = (row % 3) as i8 - 1;
        }
        let codes = pack(layout, &trits, ROWS, cols).unwrap();
        let weights = TernaryRef::new(layout, &codes, ROWS, cols).unwrap();
        // All values as tokens of one product, and every seventh alone: the two are different paths.
        let all: Vec<i8> = (-127..=127).collect();
        let alone = all.iter().skip(place % 7).step_by(7).map(std::slice::from_ref);
        for tokens in std::iter::once(&all[..]).chain(alone) {
            let mut values = vec![0i8; tokens.len() * cols];
            for (row, &value) in values.chunks_exact_mut(cols).zip(tokens) {
                row[place] = value;
                // A second value fixes the scale.
                row[(place + 1) % cols] = 127;
            }
            let x = quantized(&values, cols);
            let expected: Vec<i32> = tokens
                .iter()
                .flat_map(|&value| (0..ROWS).map(move |row| (row as i32 % 3 - 1) * i32::from(value)))
                .collect();
            for isa in Isa::available() {
                assert_eq!(accumulate(isa, weights, &x), expected, "{layout:?} {isa}: {tokens:?} at {place}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn all_shapes_agree(
        quarter in 1usize..6,
        cols in prop_oneof![1usize..400, (1usize..6).prop_map(|groups| 128 * groups)],
        tokens in 1usize..20,
        seed: u64,
    ) {
        let rows = 4 * quarter;
        let mut noise = Noise(seed);
        let trits = noise.trits(rows * cols);
        let x = quantized(&noise.values(tokens, cols), cols);
        let expected = naive(&trits, rows, cols, &x);
        for layout in layouts(cols) {
            let codes = pack(layout, &trits, rows, cols).unwrap();
            let weights = TernaryRef::new(layout, &codes, rows, cols).unwrap();
            prop_assert_eq!(unpack(weights), trits.clone());
            for isa in Isa::available() {
                prop_assert_eq!(&accumulate(isa, weights, &x), &expected, "{:?} {}", layout, isa);
            }
        }
    }
}

/// Blocks of rows and of tokens of all kinds: whole ones, parts of one, and several with a part of one behind them.
#[test]
fn blocks_of_all_kinds_agree() {
    for (i, units) in [1, 15, 16, 17, 33, 80].into_iter().enumerate() {
        for cols in [40, 64, 128, 1000, 1152] {
            let rows = 4 * units;
            let mut noise = Noise((i + cols) as u64);
            let trits = noise.trits(rows * cols);
            let all = noise.values(70, cols);
            for tokens in [3, 4, 5, 15, 16, 17, 32, 33, 47, 70] {
                let x = quantized(&all[..tokens * cols], cols);
                let mut expected = None;
                for layout in layouts(cols) {
                    let codes = pack(layout, &trits, rows, cols).unwrap();
                    let weights = TernaryRef::new(layout, &codes, rows, cols).unwrap();
                    for isa in Isa::available() {
                        let sums = accumulate(isa, weights, &x);
                        let expected = expected.get_or_insert_with(|| sums.clone());
                        assert!(sums == *expected, "{layout:?} on {isa}: {rows} x {cols}, {tokens} tokens");
                    }
                }
            }
        }
    }
}

/// The largest sums there can be do not overflow.
#[test]
fn the_extremes_are_exact() {
    for cols in [MAX_COLS, MAX_COLS - 1, 65_536 + 33, 8192] {
        for weight in [1i8, -1] {
            for value in [127i8, -127] {
                let tokens = 5;
                let expected = vec![i32::from(weight) * i32::from(value) * cols as i32; 4 * tokens];
                for layout in layouts(cols) {
                    let codes = pack(layout, &vec![weight; 4 * cols], 4, cols).unwrap();
                    let weights = TernaryRef::new(layout, &codes, 4, cols).unwrap();
                    for tokens in 1..=tokens {
                        let x = quantized(&vec![value; tokens * cols], cols);
                        for isa in Isa::available() {
                            let sums = accumulate(isa, weights, &x);
                            assert_eq!(sums, expected[..4 * tokens], "{isa}: {weight} * {value} * {cols}");
                        }
                    }
                }
            }
        }
    }
}

/// However many tokens are computed at once, on whatever threads and instructions, the floats are the same, and
/// what lies between the rows of the output stays.
#[test]
fn products_do_not_depend_on_how_they_are_computed() {
    let (rows, cols, tokens, stride) = (260, 1000, 23, 300);
    let mut noise = Noise(7);
    let trits = noise.trits(rows * cols);
    let codes = pack(TernaryLayout::Quarters, &trits, rows, cols).unwrap();
    let weights = TernaryRef::new(TernaryLayout::Quarters, &codes, rows, cols).unwrap();
    let inputs: Vec<f32> = (0..tokens * cols).map(|_| noise.next() as f32 / 1e8 - 10.0).collect();
    let mut x = Quantized::default();
    x.quantize(&inputs, cols);
    let mut expected = vec![f32::NAN; tokens * stride];
    matmul_with(Isa::Scalar, weights, 0.37, &x, &mut expected, stride);
    for token in 0..tokens {
        let row = &expected[token * stride..(token + 1) * stride];
        assert!(row[..rows].iter().all(|y| y.is_finite()) && row[rows..].iter().all(|y| y.is_nan()));
        // The formula, in the order in which transformers computes it.
        let sum: i32 =
            trits[..cols].iter().zip(x.values(token)).map(|(w, q)| i32::from(*w) * i32::from(*q)).sum();
        assert_eq!(row[0], sum as f32 * (0.37 / x.scale(token)));
    }
    for threads in [1, 2, 5] {
        let team = Team::new(threads).unwrap();
        for isa in Isa::available() {
            for chunk in [1, 2, 3, 7, 8, tokens] {
                for first in (0..tokens).step_by(chunk) {
                    let last = tokens.min(first + chunk);
                    let mut x = Quantized::default();
                    let mut out = vec![0.0; (last - first) * rows];
                    team.install(|| {
                        x.quantize(&inputs[first * cols..last * cols], cols);
                        matmul_with(isa, weights, 0.37, &x, &mut out, rows);
                    });
                    for (token, row) in (first..last).zip(out.chunks_exact(rows)) {
                        assert_eq!(
                            row,
                            &expected[token * stride..token * stride + rows],
                            "{isa} {threads} {chunk}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn large_products_agree_on_all_threads() {
    // More columns than AVX2 adds up in 16 bits, with a tail behind them or not. The last one has several tasks for each
    // thread and several blocks in a task.
    for (rows, cols, tokens) in [(2560, 1027, 13), (128, 2083, 5), (128, 2304, 1), (4096, 4096, 2)] {
        let mut noise = Noise(3);
        let trits = noise.trits(rows * cols);
        let x = quantized(&noise.values(tokens, cols), cols);
        let expected = naive(&trits, rows, cols, &x);
        for layout in layouts(cols) {
            let codes = pack(layout, &trits, rows, cols).unwrap();
            let weights = TernaryRef::new(layout, &codes, rows, cols).unwrap();
            for isa in Isa::available() {
                for threads in [1, 2, 3] {
                    let sums = Team::new(threads).unwrap().install(|| accumulate(isa, weights, &x));
                    assert_eq!(sums, expected, "{layout:?} {isa}: {rows} x {cols}, {threads} threads");
                }
            }
        }
    }
}

/// Sizes beyond one task and one block: floats, with a stride, side by side, and as parts, on all threads.
#[test]
fn products_of_many_tasks_and_blocks_are_those_of_one() {
    let (rows, cols, tokens, stride) = (4096, 2048, 3, 4200);
    let mut noise = Noise(17);
    let x = quantized(&noise.values(tokens, cols), cols);
    let trits = noise.trits(rows * cols);
    let sums = naive(&trits, rows, cols, &x);
    for layout in layouts(cols) {
        let codes = pack(layout, &trits, rows, cols).unwrap();
        let weights = TernaryRef::new(layout, &codes, rows, cols).unwrap();
        let mut expected = vec![7.0; tokens * stride];
        for token in 0..tokens {
            for row in 0..rows {
                let factor = 0.37 / x.scale(token);
                expected[token * stride + row] = sums[token * rows + row] as f32 * factor;
            }
        }
        for threads in [1, 2, 3, 5] {
            let team = Team::new(threads).unwrap();
            for isa in Isa::available() {
                let mut out = vec![7.0; tokens * stride];
                team.install(|| matmul_with(isa, weights, 0.37, &x, &mut out, stride));
                assert!(out == expected, "{layout:?} {isa}, {threads} threads");
            }
            // The same weights twice, side by side.
            let products = [0, stride].map(|offset| Product { weights, scale: 0.37, offset });
            let mut out = vec![7.0; tokens * 2 * stride];
            team.install(|| matmul_all(&products, &x, &mut out, 2 * stride));
            for (token, both) in out.chunks_exact(2 * stride).enumerate() {
                let one = &expected[token * stride..(token + 1) * stride];
                assert!(both[..stride] == *one && both[stride..] == *one, "{layout:?}, {threads} threads");
            }
            let mut out = vec![7.0; tokens * stride];
            for part in 0..threads {
                // SAFETY: The output has room for all tokens, and nobody else writes to it.
                unsafe { matmul_part(weights, 0.37, &x, out.as_mut_ptr(), stride, (part, threads)) };
            }
            assert!(out == expected, "{layout:?} in {threads} parts");
        }
    }
}

/// A gated unit of products that take many tasks and blocks, on all instructions and threads.
#[test]
fn gated_products_of_many_tasks_are_products_and_a_unit() {
    for (rows, cols, tokens) in [(4096, 4096, 2), (2048, 640, 33), (260, 128, 1)] {
        let mut noise = Noise(19);
        let x = quantized(&noise.values(tokens, cols), cols);
        for layout in layouts(cols) {
            let codes = [0, 1].map(|_| pack(layout, &noise.trits(rows * cols), rows, cols).unwrap());
            let [gate, up] =
                codes.each_ref().map(|codes| TernaryRef::new(layout, codes, rows, cols).unwrap());
            let mut both = vec![0.0; tokens * 2 * rows];
            matmul_with(Isa::Scalar, gate, 0.01, &x, &mut both, 2 * rows);
            matmul_with(Isa::Scalar, up, 0.02, &x, &mut both[rows..], 2 * rows);
            for (unit, apart) in
                [(GatedUnit::Relu2, relu2_glu as fn(&[f32], usize, &mut [f32])), (GatedUnit::Silu, silu_glu)]
            {
                let mut expected = vec![0.0; tokens * rows];
                apart(&both, rows, &mut expected);
                for threads in [1, 2, 3] {
                    let team = Team::new(threads).unwrap();
                    for isa in Isa::available() {
                        let mut out = vec![f32::NAN; tokens * rows];
                        team.install(|| {
                            gated_matmul_with(isa, unit, (gate, 0.01), (up, 0.02), &x, &mut out);
                        });
                        assert!(
                            out == expected,
                            "{unit:?} {layout:?} {isa}, {threads} threads: {rows} x {cols}"
                        );
                    }
                }
            }
        }
    }
}

/// Strides and offsets whose products wrap to a place within the output.
#[test]
fn places_that_overflow_are_refused() {
    let codes = pack(TernaryLayout::Quarters, &[1; 8 * 4], 8, 4).unwrap();
    let weights = TernaryRef::new(TernaryLayout::Quarters, &codes, 8, 4).unwrap();
    let x = quantized(&[127; 12], 4);
    let refused = |run: &dyn Fn(&mut [f32])| {
        let run = || run(&mut [0.0; 40]);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err()
    };
    // Twice this is 0 in release builds.
    let half = 1 << (usize::BITS - 1);
    for stride in [half, usize::MAX, usize::MAX - 7, half + 8, 7] {
        assert!(refused(&|out| matmul(weights, 1.0, &x, out, stride)), "{stride}");
        assert!(refused(&|out| dense_matmul(DenseRef::F32(&[0; 32 * 4]), 8, 4, &[1.0; 12], out, stride)));
    }
    for offset in [half, usize::MAX, usize::MAX - 7] {
        let product = Product { weights, scale: 1.0, offset };
        assert!(refused(&|out| matmul_all(&[product], &x, out, 12)), "{offset}");
    }
    for (rows, cols) in [(half, 2), (half, 1), (usize::MAX, 4), (0, 4), (8, 0)] {
        assert!(refused(&|out| dense_matmul(DenseRef::F32(&[0; 32 * 4]), rows, cols, &[1.0; 12], out, 12)));
    }
    assert!(refused(&|out| DenseRef::F32(&[0; 32 * 4]).row(half, &mut out[..4])));
}

/// The parts of a product, each on a thread of its own and in any number, are the product.
#[test]
fn parts_make_the_whole() {
    let (rows, cols, tokens, stride) = (36, 256, 5, 40);
    let mut noise = Noise(5);
    let trits = noise.trits(rows * cols);
    let inputs: Vec<f32> = (0..tokens * stride * 8).map(|_| noise.next() as f32 / 1e8 - 10.0).collect();
    let mut x = Quantized::default();
    let mut there = Quantized::default();
    let apart = cols + 3;
    let dense: Vec<f32> = (0..tokens).flat_map(|t| inputs[t * apart..t * apart + cols].to_vec()).collect();
    x.quantize_here(&inputs, tokens, cols, apart);
    there.quantize(&dense, cols);
    assert_eq!((x.values(4), x.scale(4)), (there.values(4), there.scale(4)));
    for layout in layouts(cols) {
        let codes = pack(layout, &trits, rows, cols).unwrap();
        let weights = TernaryRef::new(layout, &codes, rows, cols).unwrap();
        let mut expected = vec![7.0; tokens * stride];
        matmul(weights, 0.5, &x, &mut expected, stride);
        for of in [1, 2, 3, 50] {
            let mut out = vec![7.0; tokens * stride];
            let at = out.as_mut_ptr() as usize;
            std::thread::scope(|scope| {
                for part in 0..of {
                    let x = &x;
                    // SAFETY: The output has room for all tokens, and each thread has a part of its own.
                    scope.spawn(move || unsafe {
                        matmul_part(weights, 0.5, x, at as *mut f32, stride, (part, of));
                    });
                }
            });
            assert_eq!(out, expected, "{layout:?} in {of} parts");
        }
    }
}

/// Products side by side are those that come one after the other, and what lies between them stays.
#[test]
fn products_together_are_products_alone() {
    let (cols, tokens, stride) = (384, 4, 900);
    let mut noise = Noise(13);
    let x = quantized(&noise.values(tokens, cols), cols);
    let shapes = [
        (TernaryLayout::Quarters, 512, 0),
        (TernaryLayout::I2s, 64, 520),
        (TernaryLayout::Quarters, 300, 584),
    ];
    let codes: Vec<Vec<u8>> = shapes
        .iter()
        .map(|&(layout, rows, _)| pack(layout, &noise.trits(rows * cols), rows, cols).unwrap())
        .collect();
    let products: Vec<Product<'_>> = (codes.iter().zip(&shapes))
        .map(|(codes, &(layout, rows, offset))| {
            let weights = TernaryRef::new(layout, codes, rows, cols).unwrap();
            Product { weights, scale: rows as f32, offset }
        })
        .collect();
    let mut expected = vec![7.0; tokens * stride];
    for p in &products {
        matmul(p.weights, p.scale, &x, &mut expected[p.offset..], stride);
    }
    for threads in [1, 3] {
        let team = Team::new(threads).unwrap();
        let mut out = vec![7.0; tokens * stride];
        team.install(|| matmul_all(&products, &x, &mut out, stride));
        assert_eq!(out, expected, "{threads} threads");
    }
}

#[test]
#[should_panic(expected = "overlap")]
fn products_that_overlap_are_refused() {
    let codes = pack(TernaryLayout::Quarters, &[1; 8 * 4], 8, 4).unwrap();
    let weights = TernaryRef::new(TernaryLayout::Quarters, &codes, 8, 4).unwrap();
    let products = [0, 7].map(|offset| Product { weights, scale: 1.0, offset });
    matmul_all(&products, &quantized(&[127; 4], 4), &mut [0.0; 20], 20);
}

/// A map of a file can end where the next page is not there: nothing may be read behind the codes.
#[cfg(unix)]
#[test]
fn nothing_is_read_behind_the_end_of_a_map() {
    let folder = std::env::temp_dir();
    let mut noise = Noise(11);
    for cols in [1, 31, 63, 64, 65, 127, 1000, 128, 384, 1024, 4096] {
        let rows = 4 * (4096 / cols).max(1);
        let layout = layouts(cols).last().unwrap();
        let codes = pack(layout, &noise.trits(rows * cols), rows, cols).unwrap();
        // The codes end with the file, and the file with a page: what comes behind is not mapped or belongs to
        // another mapping, and a read of it by a kernel would be a fault or a wrong sum.
        let length = codes.len().next_multiple_of(4096);
        let mut content = vec![0u8; length - codes.len()];
        content.extend(&codes);
        let path = folder.join(format!("ternion-map-{}-{cols}", std::process::id()));
        std::fs::write(&path, &content).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        // Two pages more than the file has: touching them is a bus error, which no test survives.
        // SAFETY: The file is this test's own, and the pages behind its end are not touched.
        let map = unsafe { memmap2::MmapOptions::new().len(length + 8192).map(&file).unwrap() };
        let mapped = &map[length - codes.len()..length];
        let weights = TernaryRef::new(layout, mapped, rows, cols).unwrap();
        for tokens in [1, 3] {
            let x = quantized(&noise.values(tokens, cols), cols);
            let expected = accumulate(Isa::Scalar, TernaryRef::new(layout, &codes, rows, cols).unwrap(), &x);
            for isa in Isa::available() {
                assert_eq!(accumulate(isa, weights, &x), expected, "{isa} {cols}");
            }
        }
        assert_eq!(ternion_kernels::find_invalid_code(mapped), None);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn quantisation_rounds_half_to_even_and_passes_failures_on() {
    let mut x = Quantized::default();
    // Scale 1: the values are the elements, ties to even.
    let row = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.499_999_97, 126.5, -126.5, 1e-30, -0.0];
    x.quantize(&row, row.len());
    assert_eq!(x.values(0), [127, 0, 2, 2, 0, -2, -2, 0, 126, -126, 0, 0]);
    x.quantize(&[0.0; 40], 40);
    assert_eq!((x.values(0), x.scale(0)), (&[0i8; 40][..], 127.0 * 100_000.0));

    let codes = pack(TernaryLayout::Quarters, &[1; 4 * 40], 4, 40).unwrap();
    let weights = TernaryRef::new(TernaryLayout::Quarters, &codes, 4, 40).unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 15, 39] {
            let mut row = [1.0; 80];
            row[place] = bad;
            x.quantize(&row, 40);
            let mut out = [0.0; 8];
            matmul(weights, 1.0, &x, &mut out, 4);
            assert!(out[..4].iter().all(|y| !y.is_finite()), "{bad} at {place}: {out:?}");
            assert!(out[4..].iter().all(|y| y.is_finite()), "{bad} at {place}: {out:?}");
        }
    }
}

#[test]
fn quantisation_does_not_depend_on_the_other_tokens() {
    let mut noise = Noise(5);
    let (tokens, cols) = (200, 1003);
    let inputs: Vec<f32> = (0..tokens * cols).map(|_| noise.next() as f32 / 1e8 - 10.0).collect();
    let mut all = Quantized::default();
    all.quantize(&inputs, cols);
    for (token, row) in inputs.chunks_exact(cols).enumerate() {
        let mut one = Quantized::default();
        one.quantize(row, cols);
        assert_eq!((one.values(0), one.scale(0)), (all.values(token), all.scale(token)));
        let most = row.iter().fold(0f32, |m, x| m.max(x.abs()));
        let scale = 127.0 * (1.0 / most.max(1e-5));
        assert_eq!(one.scale(0), scale);
        for (q, x) in one.values(0).iter().zip(row) {
            assert_eq!(f32::from(*q), (x * scale).round_ties_even().clamp(-128.0, 127.0));
        }
    }
}
