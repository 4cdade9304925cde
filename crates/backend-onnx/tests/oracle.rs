//! Exported checkpoints against transformers' logits and against the engine candle.
//!
//! A case is `strict` where no activation lies near a rounding tie, so that right implementations agree.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use common::{cases, checkpoints, exported, largest_difference, open, same_argmax, whole};
use ternion_backend_candle::{Decoder as Candle, DecoderOptions};
use ternion_engine::{CausalLm, ComputeThreads};
use ternion_formats::Checkpoint;
use ternion_formats::convert::{Embedding, Options, Target};

/// What strict cases are held to against transformers, absolutely: as every engine.
const TOLERANCE: f32 = 1e-3;

#[test]
fn the_fast_variant_is_candle() {
    let Some(library) = common::library() else { return };
    let mut strict = 0;
    for folder in checkpoints() {
        let file = exported(&folder, &Options::new(Target::OnnxFast));
        let mut model = open(&library, &file.path, 2);
        assert!(model.is_fast());
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let options = DecoderOptions::new(&checkpoint.spec);
        let mut candle = Candle::new(checkpoint, &ComputeThreads::new(2), options).unwrap();
        let vocab = model.vocab_size();
        for case in cases(&folder) {
            let logits = whole(&mut model, &case.ids);
            let ours = largest_difference(&logits, &whole(&mut candle, &case.ids));
            let theirs = largest_difference(&logits, &case.logits);
            let place = format!("{} {}", folder.display(), case.name);
            println!("{place}: candle {ours:.1e}, transformers {theirs:.1e}");
            assert!(ours <= 1e-4, "{place}: {ours}");
            if case.strict {
                strict += 1;
                assert!(theirs <= TOLERANCE, "{place}: {theirs}");
                assert_eq!(same_argmax(&logits, &case.logits, vocab), case.ids.len(), "{place}");
            }
        }
    }
    assert!(strict >= 30, "only {strict} strict cases");
}

/// The integer products are exact and everything else is in single precision, so the portable variant is held to what
/// every engine is held to.
#[test]
fn the_portable_variant_is_transformers() {
    let Some(library) = common::library() else { return };
    let mut strict = 0;
    for folder in checkpoints() {
        let file = exported(&folder, &Options::new(Target::Onnx));
        let mut model = open(&library, &file.path, 2);
        assert!(!model.is_fast());
        let vocab = model.vocab_size();
        for case in cases(&folder).iter().filter(|case| case.strict) {
            let logits = whole(&mut model, &case.ids);
            let difference = largest_difference(&logits, &case.logits);
            let place = format!("{} {}", folder.display(), case.name);
            println!("{place}: {difference:.1e}");
            strict += 1;
            assert!(difference <= TOLERANCE, "{place}: {difference}");
            assert_eq!(same_argmax(&logits, &case.logits, vocab), case.ids.len(), "{place}");
        }
    }
    assert!(strict >= 30, "only {strict} strict cases");
}

/// A head of 8 bits rounds weights and hidden states to 127 steps of the largest of each 32: each rounding is off by up to
/// 1/254 of it, about 1/440 on average (uniform error, root mean square), against elements of about 1/2.2 of it. So a
/// logit, a sum of independent products, is off by sqrt(2) * 2.2 / 440 = 0.7 % of the logits' spread, and the largest of
/// some ten thousand by four to five times that. The bound of 5 % is out of reach of chance, and of any wrong block or
/// scale as well.
#[test]
fn a_head_of_8_bits_moves_logits_by_little() {
    let Some(library) = common::library() else { return };
    for folder in checkpoints() {
        let mut options = Options::new(Target::Onnx);
        options.embedding = Some(Embedding::Q8_0);
        let file = exported(&folder, &options);
        let mut model = open(&library, &file.path, 2);
        let vocab = model.vocab_size();
        for case in cases(&folder).iter().filter(|case| case.strict) {
            let logits = whole(&mut model, &case.ids);
            let spread = case.logits.iter().map(|x| x * x).sum::<f32>() / case.logits.len() as f32;
            let difference = largest_difference(&logits, &case.logits) / spread.sqrt();
            let same = same_argmax(&logits, &case.logits, vocab);
            let place = format!("{} {}", folder.display(), case.name);
            println!("{place}: {:.2} %, argmax {same}/{}", 100.0 * difference, case.ids.len());
            assert!(difference <= 0.05, "{place}: {difference}");
            assert!(10 * same >= 8 * case.ids.len(), "{place}: {same} of {}", case.ids.len());
        }
    }
}
