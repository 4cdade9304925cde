//! Files of the Python package `gguf` are read, and it reads ours. `fixtures/gguf/generate.py` wrote the former.
#![allow(clippy::unwrap_used, reason = "a failure in a helper fails its test, as it should")]

mod common;

use std::io::Write;
use std::process::Command;

use common::fixture;
use ternion_formats::convert::{Embedding, Options, Target, convert};
use ternion_formats::gguf::{File, TensorType, Value, decode, encode, is_dense};
use ternion_formats::{Activation, Checkpoint, Family, Weights};

fn file(name: &str) -> File {
    File::open(fixture("gguf").join(name)).unwrap()
}

fn floats(file: &File, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.kind, TensorType::F32);
    file.data(tensor).as_chunks().0.iter().map(|&b: &[u8; 4]| f32::from_le_bytes(b)).collect()
}

#[test]
fn values_of_all_types_are_read() {
    let file = file("dense.gguf");
    for (key, value) in [
        ("test.u8", Value::U8(200)),
        ("test.i64", Value::I64(-(1 << 40))),
        ("test.f64", Value::F64(0.1)),
        ("test.bool", Value::Bool(true)),
    ] {
        assert_eq!(file.value(key), Some(&value));
    }
    let strings = file.array("test.strings").unwrap().unwrap();
    assert_eq!(strings.as_strings().unwrap().collect::<Vec<_>>(), ["", "é日🙂", &"x".repeat(300)]);
    let floats = file.array("test.floats").unwrap().unwrap();
    assert_eq!(floats.as_floats().unwrap().collect::<Vec<_>>(), [0.5, -1.5]);
}

#[test]
fn blocks_are_decoded_and_encoded_as_there() {
    let file = file("dense.gguf");
    let values = floats(&file, "values");
    for kind in [TensorType::F16, TensorType::Bf16, TensorType::Q8_0, TensorType::Q4_0, TensorType::Q6K] {
        let tensor = file.tensor(kind.name()).unwrap();
        assert_eq!(tensor.kind, kind);
        let (bytes, expected) = (file.data(tensor), floats(&file, &format!("{kind}.decoded")));
        let mut decoded = vec![0.0; expected.len()];
        decode(kind, &bytes, &mut decoded).unwrap();
        assert_eq!(decoded, expected, "{kind}");
        if kind != TensorType::Q6K {
            let mut encoded = vec![0; bytes.len()];
            encode(kind, &values, &mut encoded).unwrap();
            assert!(encoded[..] == bytes[..], "{kind} is encoded to other bytes");
        }
    }
}

#[test]
fn all_types_of_dense_tensors_are_decoded_as_there() {
    let file = file("types.gguf");
    let kinds: Vec<TensorType> = TensorType::ALL.iter().copied().filter(|kind| is_dense(*kind)).collect();
    assert_eq!(kinds.len(), 16);
    for kind in kinds {
        let tensor = file.tensor(kind.name()).unwrap();
        assert_eq!((tensor.kind, &tensor.dims[..]), (kind, &[256, 4][..]));
        let expected = floats(&file, &format!("{kind}.decoded"));
        let mut decoded = vec![0.0; expected.len()];
        decode(kind, &file.data(tensor), &mut decoded).unwrap();
        assert!(decoded.iter().map(|x| x.to_bits()).eq(expected.iter().map(|x| x.to_bits())), "{kind}");
    }
}

/// Ternary tensors with a scale in each block, some of them 0; in the Llama architecture with reordered rows.
#[test]
fn ternary_models_are_read() {
    let trits = std::fs::read(fixture("gguf").join("tq.trits")).unwrap();
    for (name, family, activation) in [
        // An architecture `bitnet` that says nothing of its activation is 1bitLLM's.
        ("bitnet-tq.gguf", Family::OneBitLlm, Activation::Silu),
        ("llama-tq.gguf", Family::Llama, Activation::Silu),
    ] {
        let checkpoint = Checkpoint::open(fixture("gguf").join(name)).unwrap();
        let spec = &checkpoint.spec;
        assert_eq!((spec.family, spec.activation), (family, activation));
        assert_eq!((spec.heads, spec.kv_heads, spec.head_dim, spec.vocab_size), (4, 2, 64, 300));
        let mut rest = &trits[..];
        for (index, linear) in checkpoint.layers[0].linears().into_iter().enumerate() {
            let Weights::Ternary(tensor) = &linear.weights else { panic!("{} is dense", linear.name) };
            let (own, after) = rest.split_at(tensor.rows * tensor.cols);
            rest = after;
            let expected: Vec<i8> = own.iter().map(|b| b.cast_signed()).collect();
            assert!(common::trits(tensor) == expected, "{name}: {}", linear.name);
            assert_eq!(
                tensor.scale,
                half::f16::from_f32(0.013 * (index + 1) as f32).to_f32(),
                "{}",
                linear.name
            );
        }
        assert!(rest.is_empty());
    }
}

const READER: &str = r#"
import sys, json
import numpy as np
from gguf import GGUFReader, quants
reader = GGUFReader(sys.argv[1])
out = {"tensors": {}, "fields": {}}
for tensor in reader.tensors:
    kind = tensor.tensor_type
    values = quants.dequantize(tensor.data, kind).astype(np.float64)
    out["tensors"][tensor.name] = [kind.name, [int(n) for n in tensor.shape], float(np.abs(values).sum()), float(values.flat[-1])]
for key in ("general.architecture", "tokenizer.ggml.pre", "bitnet.attention.layer_norm_rms_epsilon", "bitnet.block_count"):
    out["fields"][key] = reader.fields[key].contents()
out["tokens"] = len(reader.fields["tokenizer.ggml.tokens"].contents())
json.dump(out, sys.stdout)
"#;

/// Runs where `python3` has the package.
#[test]
fn our_files_are_read_there() {
    let probe = Command::new("python3").args(["-c", "import gguf"]).output();
    if !probe.is_ok_and(|probe| probe.status.success()) {
        // Past the harness, which would keep it to itself; `cargo xtask test` counts these lines.
        let mut stdout = std::io::stdout();
        writeln!(stdout, "skipped: Python has no package gguf").unwrap();
        return;
    }
    let checkpoint = Checkpoint::open(fixture("tiny-packed")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (target, ternary, embedding) in [
        (Target::GgufTq1, "TQ1_0", Embedding::Q6K),
        (Target::GgufTq2, "TQ2_0", Embedding::Q8_0),
        (Target::GgufTq2, "TQ2_0", Embedding::F16),
        (Target::GgufTq2, "TQ2_0", Embedding::Bf16),
    ] {
        let path = folder.path().join("x.gguf");
        let mut options = Options::new(target);
        (options.embedding, options.overwrite) = (Some(embedding), true);
        convert(&checkpoint, &path, &options, &mut |_, _| {}).unwrap();
        let output = Command::new("python3").args(["-c", READER]).arg(&path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let read: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(read["fields"]["general.architecture"], "bitnet");
        assert_eq!(read["fields"]["tokenizer.ggml.pre"], "llama-bpe");
        assert_eq!(read["fields"]["bitnet.block_count"], 3);
        assert_eq!(read["tokens"], 512);
        let ours = Checkpoint::open(&path).unwrap();
        let sum = |values: &[f32]| values.iter().map(|x| f64::from(x.abs())).sum::<f64>();
        let check = |name: &str, kind: &str, values: &[f32]| {
            let tensor = &read["tensors"][name];
            assert_eq!(tensor[0], kind, "{name}");
            let (theirs, ours) = (tensor[2].as_f64().unwrap(), sum(values));
            assert!((theirs - ours).abs() <= 1e-9 * ours, "{name}: {theirs} {ours}");
            assert_eq!(tensor[3].as_f64().unwrap(), f64::from(*values.last().unwrap()), "{name}");
        };
        check("token_embd.weight", &embedding.to_string().to_uppercase(), &ours.embed.to_f32());
        check("output_norm.weight", "F32", &ours.final_norm.weight);
        for (index, layer) in ours.layers.iter().enumerate() {
            let Weights::Ternary(down) = &layer.down.weights else { panic!("dense") };
            let trits: Vec<f32> = common::trits(down).into_iter().map(f32::from).collect();
            check(&format!("blk.{index}.ffn_down.weight"), ternary, &trits);
            check(&format!("blk.{index}.ffn_down.scale"), "F32", &[down.scale]);
        }
    }
}
