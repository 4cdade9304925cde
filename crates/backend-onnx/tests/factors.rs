//! GGUF files with rotary factors in a tensor: their exports compute what the file says.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::fs::File;
use std::path::Path;

use common::{cases, exported, largest_difference, open, whole};
use ternion_backend_candle::{Decoder as Candle, DecoderOptions as CandleOptions};
use ternion_engine::ComputeThreads;
use ternion_formats::convert::{Options, Target, convert};
use ternion_formats::gguf::{self, TensorType, Writer};
use ternion_formats::{Checkpoint, RopeScaling};
use ternion_test_support::fixture;

/// The GGUF file of a Llama with these factors.
fn with_factors(factors: &[f32], out: &Path) {
    let plain = out.with_extension("plain");
    let source = Checkpoint::open(fixture("llama-ternary")).unwrap();
    convert(&source, &plain, &Options::new(Target::GgufTq2), &mut |_, _| {}).unwrap();
    let file = gguf::File::open(&plain).unwrap();
    let mut writer = Writer::new();
    file.metadata().for_each(|(key, value)| writer.set(key, value.clone()));
    for tensor in file.tensors() {
        writer.tensor(&tensor.name, tensor.kind, &tensor.dims).unwrap();
    }
    writer.tensor("rope_freqs.weight", TensorType::F32, &[factors.len() as u64]).unwrap();
    let mut data = writer.begin(File::create(out).unwrap()).unwrap();
    for tensor in file.tensors() {
        data.tensor(&tensor.name, |out| out.write_all(&file.data(tensor))).unwrap();
    }
    let bytes: Vec<u8> = factors.iter().flat_map(|x| x.to_le_bytes()).collect();
    data.tensor("rope_freqs.weight", |out| out.write_all(&bytes)).unwrap();
    data.finish().unwrap();
}

#[test]
fn exports_rotate_by_the_factors_of_the_file() {
    let Some(library) = common::library() else { return };
    let folder = tempfile::tempdir().unwrap();
    let half = Checkpoint::open(fixture("llama-ternary")).unwrap().spec.head_dim / 2;
    let growing: Vec<f32> = (0..half).map(|i| 1.0 + i as f32 / 8.0).collect();
    let cases = cases(&fixture("llama-ternary"));
    for (name, factors) in [("ones", vec![1.0; half]), ("growing", growing)] {
        let path = folder.path().join(format!("{name}.gguf"));
        with_factors(&factors, &path);
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.spec.rope.scaling, RopeScaling::Factors(factors));
        let options = CandleOptions::new(&checkpoint.spec);
        let mut candle = Candle::new(checkpoint, &ComputeThreads::new(2), options).unwrap();
        for target in [Target::Onnx, Target::OnnxFast] {
            let file = exported(&path, &Options::new(target));
            let mut model = open(&library, &file.path, 2);
            for case in cases.iter().filter(|case| case.strict) {
                let logits = whole(&mut model, &case.ids);
                let expected = whole(&mut candle, &case.ids);
                let (difference, from_plain) =
                    (largest_difference(&logits, &expected), largest_difference(&logits, &case.logits));
                println!(
                    "{name} {target} {}: {difference:.1e} from candle, {from_plain:.1e} from transformers",
                    case.name
                );
                // Which activations lie at a tie of the int8 rounding is known for the plain model alone. One moves logits by up to
                // 0.3, other factors by more than 10.
                let bound = if name == "ones" { 1e-3 } else { 0.3 };
                assert!(difference <= bound, "{name} {target} {}: {difference}", case.name);
                // transformers has computed the model without factors, which is the one with factors of 1.
                assert!(
                    (from_plain <= 1e-3) == (name == "ones") || case.ids.len() < 2,
                    "{name} {target} {}: {from_plain}",
                    case.name
                );
            }
        }
    }
}
