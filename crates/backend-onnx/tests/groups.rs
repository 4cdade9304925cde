//! Qwen3 with a scale for each group of a row, exported from every file form: against transformers, which computes on the same
//! values in f32 without rounding activations, and against the engine candle.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::path::{Path, PathBuf};

use common::{Case, cases_of, exported, feed, largest_difference, open, same_argmax, try_open, whole};
use ternion_backend_candle::{Decoder as Candle, DecoderOptions as CandleOptions};
use ternion_backend_onnx::{DecoderOptions, Library};
use ternion_core::config::ModelConfig;
use ternion_core::registry::{BackendFactory, Progress};
use ternion_core::{ErrorKind, GenerateRequest, Sampling};
use ternion_engine::{CausalLm, ComputeThreads};
use ternion_formats::Checkpoint;
use ternion_formats::convert::{Embedding, Options, Target, convert};
use ternion_kernels::ActivationType;

/// What logits are held to, absolutely: as every engine.
const TOLERANCE: f32 = 1e-3;

struct Model {
    forms: Vec<PathBuf>,
    cases: Vec<Case>,
}

fn models() -> Vec<Model> {
    let models = ternion_test_support::grouped_models().into_iter();
    models.map(|model| Model { cases: cases_of(&model.golden), forms: model.forms }).collect()
}

fn open_fast(library: &Library, path: &Path, activations: ActivationType) -> ternion_backend_onnx::Decoder {
    let mut options = DecoderOptions::default();
    (options.threads, options.activations) = (ComputeThreads::new(2), activations);
    try_open(library, path, options).unwrap()
}

/// All cases, those beyond the original context among them.
fn measure(model: &mut dyn CausalLm, cases: &[Case], place: &str) {
    let vocab = model.vocab_size();
    for case in cases {
        let logits = whole(model, &case.ids);
        let difference = largest_difference(&logits, &case.logits);
        println!("{place} {}: {difference:.1e}", case.name);
        assert!(difference <= TOLERANCE, "{place} {}: {difference}", case.name);
        assert_eq!(same_argmax(&logits, &case.logits, vocab), case.ids.len(), "{place} {}", case.name);
    }
}

#[test]
fn exports_of_every_form_give_the_logits_of_transformers() {
    let Some(library) = common::library() else { return };
    let mut forms = 0;
    for Model { forms: all, cases } in models() {
        assert!(cases.iter().any(|case| case.ids.len() > 64), "no case beyond the original context");
        for form in all {
            let portable = exported(&form, &Options::new(Target::Onnx));
            let fast = exported(&form, &Options::new(Target::OnnxFast));
            let name = form.display();
            measure(&mut open(&library, &portable.path, 2), &cases, &format!("{name} portable"));
            let mut model = open_fast(&library, &fast.path, ActivationType::F32);
            assert!(model.is_fast());
            measure(&mut model, &cases, &format!("{name} fast"));
            forms += 1;
        }
    }
    assert!(forms >= 3, "only {forms} forms");
}

#[test]
fn the_fast_variant_is_candle() {
    let Some(library) = common::library() else { return };
    for Model { forms, cases } in models() {
        let fast = exported(&forms[0], &Options::new(Target::OnnxFast));
        for activations in [ActivationType::Int8, ActivationType::Int8x2, ActivationType::F32] {
            let checkpoint = Checkpoint::open(&forms[0]).unwrap();
            let mut options = CandleOptions::new(&checkpoint.spec);
            options.activations = activations;
            let mut candle = Candle::new(checkpoint, &ComputeThreads::new(2), options).unwrap();
            let mut model = open_fast(&library, &fast.path, activations);
            for case in &cases {
                let ours = whole(&mut model, &case.ids);
                let difference = largest_difference(&ours, &whole(&mut candle, &case.ids));
                println!("{activations} {}: {difference:.1e}", case.name);
                // Rounding to int8 makes steps of what differs in the last bits.
                let bound = if activations == ActivationType::Int8 { 0.05 } else { 1e-4 };
                assert!(difference <= bound, "{activations} {}: {difference}", case.name);
            }
        }
    }
}

#[test]
fn chunks_forks_and_neighbours_change_nothing() {
    let Some(library) = common::library() else { return };
    for Model { forms, cases } in models() {
        let case = cases.iter().max_by_key(|case| case.ids.len()).unwrap();
        for (target, tolerance) in [(Target::OnnxFast, 0.0), (Target::Onnx, 1e-4)] {
            let file = exported(&forms[0], &Options::new(target));
            let mut model = open(&library, &file.path, 2);
            let vocab = model.vocab_size();
            let expected = whole(&mut model, &case.ids);
            let neighbour = model.new_sequence().unwrap();
            for chunk in [1, 7, 64] {
                let sequence = model.new_sequence().unwrap();
                let mut logits = Vec::new();
                for tokens in case.ids.chunks(chunk) {
                    logits.extend(feed(&mut model, sequence, tokens));
                    model.truncate(neighbour, 0).unwrap();
                    feed(&mut model, neighbour, &tokens[..1]);
                }
                let difference = largest_difference(&logits, &expected);
                assert!(difference <= tolerance, "{target}: chunks of {chunk}: {difference}");
                let half = case.ids.len() / 2;
                let fork = model.fork(sequence, half).unwrap();
                model.free(sequence);
                let rest = feed(&mut model, fork, &case.ids[half..]);
                let difference = largest_difference(&rest, &expected[half * vocab..]);
                assert!(difference <= tolerance, "{target}: on a fork: {difference}");
                model.free(fork);
            }
        }
    }
}

/// The weights take two bits and their scale; the tables of the rotary embedding and the padding of small tensors come on top.
#[test]
fn files_are_about_as_small_as_their_source() {
    for Model { forms, .. } in models() {
        let source = forms.iter().find(|form| form.extension().is_some_and(|e| e == "gguf")).unwrap();
        let checkpoint = Checkpoint::open(source).unwrap();
        let weights: usize = checkpoint.report().parameters as usize;
        for (target, bits) in [(Target::Onnx, 2.25), (Target::OnnxFast, 2.125)] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model");
            convert(&checkpoint, &path, &Options::new(target), &mut |_, _| {}).unwrap();
            let size = std::fs::metadata(path.join("model.onnx.data")).unwrap().len() as f64;
            let caches = if target == Target::Onnx { 2 * 256 * 48 * 4 } else { 0 };
            // 4096 bytes at most for each of a few dozen tensors.
            let most = weights as f64 * bits / 8.0 + f64::from(caches) + 80.0 * 4096.0;
            println!("{target}: {size} bytes for {weights} weights");
            assert!(size <= most, "{target}: {size}, expected at most {most}");
        }
        let mut options = Options::new(Target::Onnx);
        options.embedding = Some(Embedding::Q8_0);
        let folder = tempfile::tempdir().unwrap();
        let error = convert(&checkpoint, &folder.path().join("model"), &options, &mut |_, _| {}).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{error}");
        assert!(error.to_string().contains("each group of a row"), "{error}");
    }
}

#[tokio::test]
async fn they_answer_as_backends_with_their_options() {
    let Some(_) = common::library() else { return };
    let Model { forms, cases } = &models()[0];
    let case = cases.iter().find(|case| case.name == "sentence").unwrap();
    let mut answers = Vec::new();
    for target in [Target::Onnx, Target::OnnxFast] {
        let file = exported(&forms[0], &Options::new(target));
        for activations in [None, Some("f32"), Some("int8x2")] {
            let mut config = ModelConfig::for_path(&file.path);
            if let Some(activations) = activations {
                config.options.insert("activations".to_owned(), activations.into());
            }
            let loaded = ternion_backend_onnx::factory().load("model", &config, Progress::none()).await;
            if target == Target::Onnx && activations.is_some() {
                let error = loaded.err().unwrap();
                assert_eq!(error.kind(), ErrorKind::InvalidConfig);
                assert!(error.to_string().contains("options.activations"), "{error}");
                continue;
            }
            let request =
                GenerateRequest::new(case.ids.clone()).with_max_tokens(12).with_sampling(Sampling::greedy());
            let answer = loaded.unwrap().generate(request).await.unwrap().collect().await.unwrap();
            answers.push(answer.tokens);
        }
    }
    assert!(answers.len() == 4 && answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
}
