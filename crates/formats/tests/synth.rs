//! Synthetic checkpoints open like any other, and depend on their seed alone.
#![allow(clippy::unwrap_used, reason = "a failure in a helper fails its test, as it should")]

use std::fs;
use std::path::Path;

use ternion_core::ErrorKind;
use ternion_formats::synth::{Shape, write};
use ternion_formats::{Activation, Checkpoint, Family, Weights};

fn make(dir: &Path, seed: u64) {
    write(dir, &Shape::named("nano").unwrap(), seed, &mut |_, _| {}).unwrap();
}

#[test]
fn it_opens_and_is_plausible() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    let mut last = (0, 0);
    write(&dir, &Shape::named("tiny").unwrap(), 7, &mut |done, total| last = (done, total)).unwrap();
    assert!(last.0 == last.1 && last.0 > 0);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let spec = &checkpoint.spec;
    assert_eq!((spec.hidden_size, spec.layers, spec.heads, spec.kv_heads), (256, 3, 4, 2));
    assert_eq!((spec.activation, spec.sub_norms, spec.bos), (Activation::Relu2, true, Some(496)));
    assert_eq!(spec.eos, [497, 505]);
    for layer in &checkpoint.layers {
        for linear in layer.linears() {
            let Weights::Ternary(tensor) = &linear.weights else { panic!("dense") };
            let gain = tensor.scale * (0.6 * tensor.cols as f32).sqrt();
            assert!((0.7..1.3).contains(&gain), "{gain}");
            let zeros: u32 = tensor
                .codes
                .iter()
                .map(|b| (0..4).map(|i| u32::from(b >> (2 * i) & 3 == 1)).sum::<u32>())
                .sum();
            let share = f64::from(zeros) / (tensor.rows * tensor.cols) as f64;
            assert!((share - 0.4).abs() < 0.02, "{share}");
        }
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary folder is left");
}

#[test]
fn qwen3_opens_and_is_plausible() {
    let folder = tempfile::tempdir().unwrap();
    for (name, tied) in [("bonsai-1.7b", true), ("bonsai-8b", false)] {
        let mut shape = Shape::named(name).unwrap();
        assert_eq!((shape.head_dim(), shape.vocab_size), (128, 151_936));
        (shape.hidden_size, shape.intermediate_size, shape.layers, shape.vocab_size) = (256, 384, 2, 512);
        (shape.heads, shape.kv_heads) = (4, 2);
        let dir = folder.path().join(name);
        write(&dir, &shape, 7, &mut |_, _| {}).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        assert_eq!((checkpoint.spec.family, checkpoint.head.is_none()), (Family::Qwen3, tied));
        let factor = checkpoint.spec.rope.attention_factor();
        assert!((factor - 1.138_629_4).abs() < 1e-6, "{factor}");
        for linear in checkpoint.layers.iter().flat_map(ternion_formats::LayerTensors::linears) {
            let Weights::Grouped(matrix) = &linear.weights else { panic!("{}", linear.name) };
            let mut row = vec![0.0; matrix.cols()];
            matrix.row(0, &mut row);
            let power = row.iter().map(|x| x * x).sum::<f32>();
            assert!((0.6..1.6).contains(&power), "{}: {power}", linear.name);
        }
    }
    let wrong = Shape { intermediate_size: 100, ..Shape::named("bonsai-4b").unwrap() };
    let error = write(&folder.path().join("wrong"), &wrong, 0, &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("`intermediate_size` is 100"), "{error}");
}

#[test]
fn its_tokenizer_works() {
    for name in ["nano", "bitnet-large"] {
        let folder = tempfile::tempdir().unwrap();
        let mut shape = Shape::named(name).unwrap();
        (shape.hidden_size, shape.intermediate_size, shape.layers) = (64, 64, 1);
        (shape.heads, shape.kv_heads) = (2, 1);
        let dir = folder.path().join("model");
        write(&dir, &shape, 0, &mut |_, _| {}).unwrap();
        let tokenizer = Checkpoint::open(&dir).unwrap().tokenizer().unwrap();
        assert_eq!(tokenizer.vocab_size(), shape.vocab_size);
        let text = "How many days are in a week? Ein paar Größen: 7, 日本 🙂\n";
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        let specials = if name == "nano" { 16 } else { 256 };
        assert_eq!(ids[0] as usize, shape.vocab_size - specials, "the first of the special tokens");
        assert!(ids.len() < text.len(), "some letters are merged");
    }
}

#[test]
fn the_seed_decides() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["a", "b", "c"].map(|name| folder.path().join(name));
    for (dir, seed) in names.iter().zip([1, 1, 2]) {
        make(dir, seed);
    }
    let weights = names.map(|dir| fs::read(dir.join("model.safetensors")).unwrap());
    assert!(weights[0] == weights[1]);
    assert!(weights[0] != weights[2]);
}

#[test]
fn the_shapes_are_what_their_names_say() {
    let shape = Shape::named("bitnet-2b4t").unwrap();
    assert_eq!((shape.hidden_size, shape.head_dim(), shape.vocab_size), (2560, 128, 128_256));
    for name in Shape::names() {
        assert!(Shape::named(name).is_ok());
    }
    let error = Shape::named("bitnet-9b").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    assert!(
        error.to_string().contains("bitnet-9b") && error.to_string().contains("bitnet-2b4t, "),
        "{error}"
    );
}

#[test]
fn nothing_is_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("kept"), b"x").unwrap();
    let shape = Shape::named("nano").unwrap();
    let error = write(folder.path(), &shape, 0, &mut |_, _| {}).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    assert!(folder.path().join("kept").exists());

    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    make(&empty, 0);
    assert!(Checkpoint::open(&empty).is_ok());
}

#[test]
fn impossible_shapes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let nano = Shape::named("nano").unwrap();
    for (shape, field) in [
        (Shape { layers: 0, ..nano.clone() }, "layers"),
        (Shape { heads: 3, ..nano.clone() }, "heads"),
        (Shape { heads: 4, kv_heads: 3, ..nano.clone() }, "kv_heads"),
        (Shape { vocab_size: 200, ..nano.clone() }, "vocab_size"),
        (Shape { vocab_size: 1 << 30, ..nano.clone() }, "vocab_size"),
        (Shape { intermediate_size: 6, ..nano.clone() }, "intermediate_size"),
    ] {
        let error = write(&folder.path().join("x"), &shape, 0, &mut |_, _| {}).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidRequest);
        assert!(error.to_string().contains(field), "{error}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
