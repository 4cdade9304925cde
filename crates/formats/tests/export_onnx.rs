//! What the exporter writes: a folder that stands alone, in one piece or not at all.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::path::Path;

use ternion_core::ErrorKind;
use ternion_formats::Checkpoint;
use ternion_formats::convert::{Embedding, Options, Target, convert};
use ternion_formats::onnx::{Host, Size, Summary, fast};
use ternion_test_support::fixture;

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

const MODELS: [&str; 7] = [
    "tiny-packed",
    "llama-ternary",
    "1bitllm",
    "nano-packed",
    "nano-master",
    "qwen3-ternary/ptq1_0.gguf",
    "qwen3-binary/q1_0.gguf",
];

#[test]
fn both_variants_of_every_family_pass_our_own_checks() {
    for name in MODELS {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        for (variant, runtime) in [(Target::OnnxFast, 17), (Target::Onnx, 24)] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("new/model");
            let mut seen = Vec::new();
            convert(&checkpoint, &path, &Options::new(variant), &mut |done, total| seen.push((done, total)))
                .unwrap();
            let total = seen[0].1;
            assert!(seen.windows(2).all(|w| w[0].0 <= w[1].0 && w[1].1 == total), "{seen:?}");
            assert_eq!(seen.last(), Some(&(total, total)));

            let host = Host::open(&path).unwrap();
            let summary = Summary::read(&host.model).unwrap();
            summary.check_operators(runtime).unwrap();
            assert_eq!(summary.producer, "ternion");
            assert_eq!(summary.metadata("ternion.minimum_onnxruntime"), Some(&*format!("1.{runtime}")));
            let spec = &checkpoint.spec;
            let vocab = summary.output("logits").unwrap().dims.as_ref().unwrap().last().cloned();
            assert_eq!(vocab, Some(Size::Known(spec.vocab_size as i64)));
            let own = summary.nodes.iter().filter(|node| node.domain == fast::DOMAIN).count();
            assert_eq!(own > 0, variant == Target::OnnxFast);
            // The folder stands alone.
            assert_eq!((host.vocab_size, host.layers), (Some(spec.vocab_size), Some(spec.layers)));
            assert_eq!((host.kv_heads, host.heads), (Some(spec.kv_heads), Some(spec.heads)));
            assert_eq!(host.sampling, checkpoint.sampling);
            assert_eq!(host.name(), "model");
            let ids = checkpoint.tokenizer().unwrap().encode("A week has seven days.", true).unwrap();
            assert_eq!(
                host.tokenizer(spec.vocab_size).unwrap().encode("A week has seven days.", true).unwrap(),
                ids
            );
        }
    }
}

/// The fast variant takes the codes as they are in the checkpoint, at places that can be mapped.
#[test]
fn packed_codes_go_into_the_data_file_unchanged() {
    let checkpoint = Checkpoint::open(fixture("tiny-packed")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    convert(&checkpoint, &path, &Options::new(Target::OnnxFast), &mut |_, _| {}).unwrap();
    let data = std::fs::read(path.join("model.onnx.data")).unwrap();
    for linear in checkpoint.layers.iter().flat_map(ternion_formats::LayerTensors::linears) {
        let codes = &linear.bytes().unwrap()[..];
        let found = data.chunks(4096).enumerate().any(|(page, _)| data[page * 4096..].starts_with(codes));
        assert!(found, "{}", linear.name);
    }
}

#[test]
fn a_smaller_head_is_smaller() {
    let checkpoint = Checkpoint::open(fixture("tiny-packed")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let size = |embedding: Option<Embedding>, name: &str| {
        let path = folder.path().join(name);
        let mut options = Options::new(Target::Onnx);
        options.embedding = embedding;
        convert(&checkpoint, &path, &options, &mut |_, _| {}).unwrap();
        std::fs::metadata(path.join("model.onnx.data")).unwrap().len() as usize
    };
    let weights = checkpoint.embed.elements();
    let saved = size(None, "full") - size(Some(Embedding::Q8_0), "bits8");
    assert!((2 * weights..4 * weights).contains(&saved), "{saved} of {weights} weights");
}

#[test]
fn what_exists_is_not_overwritten() {
    let checkpoint = Checkpoint::open(fixture("nano-packed")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("precious"), "x").unwrap();
    let options = Options::new(Target::Onnx);
    let error = convert(&checkpoint, &path, &options, &mut |_, _| {}).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    assert!(error.to_string().contains("is no checkpoint"), "{error}");
    assert_eq!((entries(&path), entries(folder.path())), (vec!["precious".into()], vec!["model".into()]));

    std::fs::remove_file(path.join("precious")).unwrap();
    convert(&checkpoint, &path, &options, &mut |_, _| {}).unwrap();
    assert!(entries(&path).contains(&"model.onnx".to_owned()));
    assert_eq!(entries(folder.path()), ["model"]);
}

#[test]
fn a_failure_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut checkpoint = Checkpoint::open(fixture("nano-packed")).unwrap();
    // Without a tokenizer, the model could not be run.
    checkpoint.folder = folder.path().join("nowhere");
    let error =
        convert(&checkpoint, &folder.path().join("model"), &Options::new(Target::Onnx), &mut |_, _| {})
            .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("tokenizer.json"), "{error}");

    let mut checkpoint = Checkpoint::open(fixture("nano-packed")).unwrap();
    checkpoint.spec.head_dim = 24;
    let error =
        convert(&checkpoint, &folder.path().join("model"), &Options::new(Target::Onnx), &mut |_, _| {})
            .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("multiple of 16"), "{error}");
    assert!(entries(folder.path()).is_empty());
}
