//! The gradients of our own operations, against finite differences.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};

use super::attention::{DocumentSoftmax, Places, Rope};
use super::ops::{CrossEntropy, GatedUnit, Norm};
use super::text::Random;

/// Two rows of four: one document and a half in the first, two in the second.
fn places() -> Places {
    Places { length: 4, starts: Arc::new(vec![0, 0, 0, 3, 0, 1, 1, 1]) }
}

fn random(shape: &[usize], stream: u64) -> Tensor {
    let mut random = Random::new(9, stream);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.normal()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Compares the gradient by `at` of the sum of `f` times random numbers with differences.
fn check(at: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) {
    let factors = random(f(at).unwrap().dims(), 77);
    let total = |x: &Tensor| (f(x)? * &factors)?.sum_all();
    let var = Var::from_tensor(at).unwrap();
    let gradients = total(var.as_tensor()).unwrap().backward().unwrap();
    let gradient = gradients.get(&var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let values = at.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let mut seen = 0;
    for (i, expected) in gradient.iter().enumerate() {
        let moved = |by: f32| {
            let mut values = values.clone();
            values[i] += by;
            let x = Tensor::from_vec(values, at.shape(), &Device::Cpu).unwrap();
            f64::from(total(&x).unwrap().to_scalar::<f32>().unwrap())
        };
        let step = 1e-2;
        let found = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
        let close = (found - f64::from(*expected)).abs() < 1e-2 * (1.0 + found.abs());
        assert!(close, "element {i}: {found} by differences, {expected} by the graph");
        seen += usize::from(expected.abs() > 1e-3);
    }
    assert!(seen * 3 > gradient.len(), "nearly all gradients are 0");
}

#[test]
fn norm() {
    let (x, w) = (random(&[8, 6], 1), random(&[6], 2));
    check(&x, |x| x.apply_op2(&w, Norm { quantise: false }));
    check(&w, |w| x.apply_op2(w, Norm { quantise: false }));
}

/// Through rounding the gradient is that of the norm alone.
#[test]
fn rounding_is_passed_straight_through() {
    let x = Var::from_tensor(&random(&[8, 6], 1)).unwrap();
    let w = random(&[6], 2);
    let gradient = |quantise| {
        let y = x.as_tensor().apply_op2(&w, Norm { quantise }).unwrap();
        let total = (y * random(&[8, 6], 3)).unwrap().sum_all().unwrap();
        let gradient = total.backward().unwrap().get(&x).unwrap().clone();
        (total.to_scalar::<f32>().unwrap(), gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap())
    };
    let (rounded, exact) = (gradient(true), gradient(false));
    assert_eq!(rounded.1, exact.1);
    assert!(rounded.0 != exact.0 && (rounded.0 - exact.0).abs() < 0.2, "{} {}", rounded.0, exact.0);
}

#[test]
fn gated_unit() {
    check(&random(&[5, 8], 4), |x| x.apply_op1(GatedUnit));
}

#[test]
fn rope() {
    let rope = Rope::new(&places(), 10.0, 4);
    check(&random(&[8, 8], 5), |x| x.apply_op1(rope.clone()));
}

#[test]
fn softmax_over_documents() {
    let softmax = || DocumentSoftmax { places: places(), scale: 0.7 };
    let x = random(&[2, 1, 8, 4], 6);
    let p = x.apply_op1(softmax()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    // The last token of the first row is alone in its document, as is the first of the second row.
    assert_eq!(p[12..16], [0.0, 0.0, 0.0, 1.0]);
    assert_eq!(p[32..36], [1.0, 0.0, 0.0, 0.0]);
    assert!(p[40] == 0.0 && p[41] > 0.0 && p[42] > 0.0 && p[43] == 0.0);
    // Most scores are of what is not seen and have no gradient: only those that are seen are moved.
    let factors = random(&[2, 1, 8, 4], 78);
    let var = Var::from_tensor(&x).unwrap();
    let total = |x: &Tensor| (x.apply_op1(softmax()).unwrap() * &factors).unwrap().sum_all().unwrap();
    let gradients = total(var.as_tensor()).backward().unwrap();
    let gradient = gradients.get(&var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let values = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for i in 0..values.len() {
        let moved = |by: f32| {
            let mut values = values.clone();
            values[i] += by;
            let x = Tensor::from_vec(values, x.shape(), &Device::Cpu).unwrap();
            total(&x).to_scalar::<f32>().unwrap()
        };
        let found = (moved(1e-2) - moved(-1e-2)) / 2e-2;
        assert!((found - gradient[i]).abs() < 1e-2, "element {i}: {found} {}", gradient[i]);
    }
}

#[test]
fn cross_entropy() {
    let loss = || CrossEntropy { targets: vec![2, 0, 1], weights: vec![1.0, 0.0, 0.5], total: 1.5 };
    let logits = random(&[3, 3], 7);
    let value = logits.apply_op1(loss()).unwrap().to_scalar::<f32>().unwrap();
    let rows = logits.to_vec2::<f32>().unwrap();
    let of = |row: usize, target: usize| {
        -(rows[row][target].exp() / rows[row].iter().map(|x| x.exp()).sum::<f32>()).ln()
    };
    assert!((value - (of(0, 2) + 0.5 * of(2, 1)) / 1.5).abs() < 1e-5);
    check(&logits, |x| x.apply_op1(loss()));
}
