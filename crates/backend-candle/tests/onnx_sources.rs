//! Models that come from ONNX files by `convert`: their logits have the bits of those of the model from which the file was written.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::path::Path;

use ternion_backend_candle::{Decoder, DecoderOptions};
use ternion_engine::{CausalLm, ComputeThreads, LogitsWanted, SequenceInput};
use ternion_formats::convert::{self, Options, Target, convert};
use ternion_formats::{Checkpoint, CheckpointOptions};
use ternion_test_support::fixture;

fn logits(checkpoint: Checkpoint) -> Vec<u32> {
    let options = DecoderOptions::new(&checkpoint.spec);
    let mut model = Decoder::new(checkpoint, &ComputeThreads::new(2), options).unwrap();
    let sequence = model.new_sequence().unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| 3 + i * 7 % 250).collect();
    let mut logits = Vec::new();
    let input = SequenceInput::new(sequence, &tokens, LogitsWanted::From(0));
    model.forward(&[input], &mut logits).unwrap();
    logits.into_iter().map(f32::to_bits).collect()
}

fn write(checkpoint: &Checkpoint, out: &Path, target: Target) {
    convert(checkpoint, out, &Options::new(target), &mut |_, _| {}).unwrap();
}

#[test]
fn logits_are_those_of_the_source_to_the_bit() {
    let cases = [
        ("tiny-packed", Target::GgufTq2),
        ("llama-ternary", Target::Safetensors),
        ("1bitllm", Target::Safetensors),
        ("qwen3-ternary/ptq1_0.gguf", Target::GgufPq2),
        ("qwen3-ternary/q2_0_g64.gguf", Target::Mlx),
        ("qwen3-binary/q1_0.gguf", Target::GgufQ1),
    ];
    for (name, target) in cases {
        let expected = logits(Checkpoint::open(fixture(name)).unwrap());
        for variant in [Target::Onnx, Target::OnnxFast] {
            let folder = tempfile::tempdir().unwrap();
            let (onnx, out) = (folder.path().join("onnx"), folder.path().join("out"));
            write(&Checkpoint::open(fixture(name)).unwrap(), &onnx, variant);
            let read = convert::open(&onnx, &CheckpointOptions::default(), &mut |_, _| {}).unwrap();
            write(&read, &out, target);
            assert!(logits(read) == expected, "{name} {variant}");
            assert!(logits(Checkpoint::open(&out).unwrap()) == expected, "{name} {variant} {target}");
        }
    }
}
