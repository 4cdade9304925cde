//! Against transformers: `fixtures/ops` has inputs and outputs of its single operations.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use safetensors::{SafeTensors, tensor::TensorView};
use ternion_kernels::{
    DenseRef, Isa, Quantized, TernaryLayout, TernaryRef, accumulate, matmul_with, pack, quantize_master,
    rms_norm, unpack,
};

static FILE: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
    std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/ops/ops.safetensors")).unwrap()
});

fn tensor(name: &str) -> TensorView<'static> {
    SafeTensors::deserialize(&FILE).unwrap().tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn floats(name: &str) -> Vec<f32> {
    tensor(name).data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn halves(name: &str) -> Vec<f32> {
    tensor(name).data().as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
}

fn ints(name: &str) -> Vec<i32> {
    tensor(name).data().as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
}

fn bytes(name: &str) -> Vec<i8> {
    tensor(name).data().iter().map(|b| *b as i8).collect()
}

#[test]
fn packing_is_that_of_transformers() {
    for case in ["a", "b", "c", "doc"] {
        let trits = bytes(&format!("pack.{case}.ternary"));
        let packed = tensor(&format!("pack.{case}.packed"));
        let (rows, cols) = (packed.shape()[0] * 4, packed.shape()[1]);
        assert_eq!(pack(TernaryLayout::Quarters, &trits, rows, cols).unwrap(), packed.data(), "{case}");
        assert_eq!(
            unpack(TernaryRef::new(TernaryLayout::Quarters, packed.data(), rows, cols).unwrap()),
            trits,
            "{case}"
        );
    }
}

#[test]
fn activations_are_those_of_transformers() {
    let mut quantized = Quantized::default();
    quantized.quantize(&floats("act.x"), 16);
    let expected = bytes("act.q");
    for token in 0..quantized.tokens() {
        assert_eq!(quantized.values(token), &expected[token * 16..(token + 1) * 16], "token {token}");
    }
    let scales: Vec<f32> = (0..quantized.tokens()).map(|t| quantized.scale(t)).collect();
    assert_eq!(scales, floats("act.scale"));
}

#[test]
fn products_are_those_of_transformers() {
    for cols in [64, 2560, 6912] {
        let case = format!("linear.k{cols}");
        let packed = tensor(&format!("{case}.packed"));
        let rows = packed.shape()[0] * 4;
        let weights = TernaryRef::new(TernaryLayout::Quarters, packed.data(), rows, cols).unwrap();
        let mut x = Quantized::default();
        x.quantize(&floats(&format!("{case}.x")), cols);
        let expected = bytes(&format!("{case}.q"));
        for token in 0..3 {
            assert_eq!(x.values(token), &expected[token * cols..(token + 1) * cols], "{case}");
        }
        for isa in Isa::available() {
            assert_eq!(accumulate(isa, weights, &x), ints(&format!("{case}.acc_int32")), "{case} {isa}");
            // `autobitlinear` multiplies by its scale, `bitlinear` divides.
            let auto = halves(&format!("{case}.auto_scale"))[0];
            let divided = 1.0 / halves(&format!("{case}.bitlinear_scale"))[0];
            for (scale, expected, tolerance) in [(auto, "exact_auto", 1e-6), (divided, "bitlinear_f32", 1e-6)]
            {
                let mut out = vec![0.0; 3 * rows];
                matmul_with(isa, weights, scale, &x, &mut out, rows);
                for (ours, theirs) in out.iter().zip(floats(&format!("{case}.{expected}"))) {
                    assert!(
                        (ours - theirs).abs() <= tolerance * theirs.abs().max(1.0),
                        "{case} {isa}: {ours} {theirs}"
                    );
                }
            }
        }
    }
}

#[test]
fn masters_are_quantised_as_by_transformers() {
    for case in ["ones", "random", "tie", "tiny", "zeros"] {
        let master = tensor(&format!("weight.{case}.w"));
        let (rows, cols) = (master.shape()[0], master.shape()[1]);
        let (codes, scale) = quantize_master(DenseRef::Bf16(master.data()), rows, cols).unwrap();
        let trits = unpack(TernaryRef::new(TernaryLayout::Quarters, &codes, rows, cols).unwrap());
        assert_eq!(trits, bytes(&format!("weight.{case}.ternary")), "{case}");
        for (trit, expected) in trits.iter().zip(floats(&format!("weight.{case}.dequant_f32"))) {
            let ours = f32::from(*trit) * scale;
            assert!((ours - expected).abs() <= 1e-6 * expected.abs(), "{case}: {ours} {expected}");
        }
    }
}

#[test]
fn normalisation_is_that_of_transformers() {
    let (x, weight) = (floats("rms.x"), floats("rms.w"));
    let mut out = vec![0.0; x.len()];
    rms_norm(&x, &weight, 1e-5, &mut out);
    for (ours, theirs) in out.iter().zip(floats("rms.y")) {
        assert!((ours - theirs).abs() <= 1e-6 * theirs.abs().max(1.0), "{ours} {theirs}");
    }
}
